"""What a run left in its folder: its history, the time that its steps took, and the state of its layers."""

from __future__ import annotations

import json
import math
import re
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from .diagnostics import STRENGTH

STATE_FILE = "trainer_state.json"
FACTS_FILE = "eva_run.json"


@dataclass(frozen=True)
class Spectrum:
    """
    One side of a layer's curvature: the eigenvalues that the optimizer keeps, largest first, as `shares` of the trace,
    which is the mean squared norm of the gradient. `side` is `"inputs"` or `"outputs"`.
    """

    layer: str
    side: str
    shares: tuple[float, ...]


@dataclass(frozen=True)
class Strengths:
    """How strongly each layer was preconditioned: `values[i][j]` for `layers[i]` at `steps[j]`, NaN where unknown."""

    layers: tuple[str, ...]
    steps: tuple[int, ...]
    values: tuple[tuple[float, ...], ...]


@dataclass(frozen=True)
class Run:
    """A training: what the Trainer logged in it, and the folder where it left its files, if any."""

    name: str
    history: Sequence[dict[str, Any]]
    folder: Path | None = None
    facts: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def read(cls, folder: str | Path) -> Run:
        """
        The run whose output folder, or checkpoint, this is.

        Raises:
            ValueError: the folder holds no history of a training, or one without a loss.
        """
        folder = Path(folder)
        state = read_state(folder)
        history = state["log_history"]
        if not any("loss" in entry or "eval_loss" in entry for entry in history):
            raise ValueError(
                f"{folder / STATE_FILE} holds no loss: log with --logging_steps below the number of steps"
            )
        return cls(str(folder), history, folder, read_facts(folder))

    def series(self, key: str) -> tuple[list[int], list[float]]:
        """The steps at which `key` was logged, and its values there; the last of several at one step."""
        points = {entry["step"]: entry[key] for entry in self.history if key in entry}
        return list(points), list(points.values())

    def seconds(self, steps: Sequence[int]) -> list[float] | None:
        """
        Seconds of training until each of `steps`, without evaluations.

        From `step_seconds`, which [`EvaCallback`] logs. A run of the stock Trainer has none: there, all steps count
        alike, each with its share of `train_runtime` less the evaluations in it. `None` where neither was logged.
        """
        known_steps, known_seconds, counted = [0], [0.0], 0
        for entry in self.history:
            if "step_seconds" in entry and entry["step"] > counted:
                known_seconds.append(known_seconds[-1] + entry["step_seconds"] * (entry["step"] - counted))
                known_steps.append(entry["step"])
            if "loss" in entry:
                counted = entry["step"]
        if len(known_steps) == 1:
            end = next((entry for entry in self.history if "train_runtime" in entry), None)
            if end is None or not end["step"]:
                return None
            inside = self.history[: self.history.index(end)]
            evaluations = sum(entry.get("eval_runtime", 0.0) for entry in inside)
            known_steps, known_seconds = [0, end["step"]], [0.0, end["train_runtime"] - evaluations]
        return [_interpolated(step, known_steps, known_seconds) for step in steps]

    def first_below(self, loss: float) -> tuple[int, float | None] | None:
        """Step and seconds of the first evaluation whose loss is at most `loss`; `None` where there is none."""
        step = next((step for step, value in zip(*self.series("eval_loss"), strict=True) if value <= loss), None)
        if step is None:
            return None
        seconds = self.seconds([step])
        return step, seconds[0] if seconds else None

    def strengths(self) -> Strengths | None:
        """
        The strength of preconditioning, logged as `eva_strength/<layer>`: 1 − cos of the angle between a layer's
        update and its momentum, 0 where its direction is first-order. `None` where none was logged.
        """
        prefix = f"{STRENGTH}/"
        entries = [entry for entry in self.history if any(key.startswith(prefix) for key in entry)]
        if not entries:
            return None
        found = {key.removeprefix(prefix) for entry in entries for key in entry if key.startswith(prefix)}
        layers = sorted(found, key=self._order)
        values = [tuple(float(entry.get(prefix + layer, math.nan)) for entry in entries) for layer in layers]
        return Strengths(tuple(layers), tuple(entry["step"] for entry in entries), tuple(values))

    def spectra(self) -> list[Spectrum]:
        """The eigenvalues that the optimizer keeps of both factors of each layer, from the newest checkpoint."""
        path = self._optimizer_file()
        if path is None:
            return []
        saved = torch.load(path, map_location="cpu", weights_only=True, mmap=True)["state"]
        names = self.facts.get("layers", {})
        spectra = []
        for index, state in saved.items():
            for side, key in (("inputs", "eva_a"), ("outputs", "eva_g")):
                factor, trace = state.get(key), state.get("eva_square")
                # Vectors belong to the published forms, whose factors have one eigenvalue.
                if factor is None or factor.ndim != 2 or trace is None or not trace > 0:
                    continue
                shares = torch.linalg.vector_norm(factor.float(), dim=0).sort(descending=True).values
                name = names.get(str(index), f"parameter {index}")
                spectra.append(Spectrum(name, side, tuple(shares.tolist())))
        return sorted(spectra, key=lambda spectrum: self._order(spectrum.layer))

    def _optimizer_file(self) -> Path | None:
        if self.folder is None:
            return None
        # Checkpoints beyond the last step are those of an earlier run in the same folder.
        last = max((entry.get("step", 0) for entry in self.history), default=0)
        saved = {
            int(path.parent.name.split("-")[-1]): path for path in self.folder.glob("checkpoint-[0-9]*/optimizer.pt")
        }
        newest = max((step for step in saved if step <= last), default=None)
        own = self.folder / "optimizer.pt"
        return own if own.is_file() else None if newest is None else saved[newest]

    def _order(self, layer: str) -> tuple[Any, ...]:
        """As in the model where the run says it, else by name, with numbers by their size."""
        order = list(self.facts.get("layers", {}).values())
        parts = re.split(r"(\d+)", layer)
        natural = tuple(int(part) if index % 2 else part for index, part in enumerate(parts))
        return (order.index(layer) if layer in order else len(order), natural)


def read_state(folder: Path) -> dict[str, Any]:
    """
    The `trainer_state.json` of a run or of one of its checkpoints.

    Raises:
        ValueError: there is none, or it is not one.
    """
    path = folder / STATE_FILE
    if not path.is_file():
        raise ValueError(f"there is no {path}: name the output folder of a run, or one of its checkpoints")
    state = _read_json(path)
    if not isinstance(state.get("log_history"), list):
        raise ValueError(f"{path} is not the state of a Trainer: it has no log_history")
    return state


def read_facts(folder: Path) -> dict[str, Any]:
    """What [`EvaTrainer`] noted of a run beside its history, empty where it was another trainer."""
    places = (
        [folder / FACTS_FILE, folder.parent / FACTS_FILE] if "checkpoint-" in folder.name else [folder / FACTS_FILE]
    )
    return next((_read_json(path) for path in places if path.is_file()), {})


def compare(run: Run, baseline: Run) -> dict[str, Any]:
    """
    How long `run` took to the last evaluation loss of `baseline`: both their times in seconds (`None` where unknown),
    their steps, and the ratio of the times. `steps` is `None` where the run never got there.

    Raises:
        ValueError: one of them was never evaluated.
    """
    for one in (run, baseline):
        if not one.series("eval_loss")[0]:
            raise ValueError(
                f"the run {one.name} has no evaluation loss to compare: train it with --eval_strategy steps"
            )
    steps, losses = baseline.series("eval_loss")
    target = losses[-1]
    spent = baseline.seconds(steps[-1:])
    reached = run.first_below(target)
    seconds = reached[1] if reached else None
    return {
        "baseline": Path(baseline.name).name,
        "baseline_optimizer": baseline.facts.get("optimizer"),
        "baseline_hardware": baseline.facts.get("hardware"),
        "baseline_steps": steps[-1],
        "baseline_seconds": spent[0] if spent else None,
        "loss": target,
        "best_loss": min(run.series("eval_loss")[1]),
        "steps": reached[0] if reached else None,
        "seconds": seconds,
        "ratio": seconds / spent[0] if seconds is not None and spent and spent[0] > 0 else None,
    }


def _read_json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    if not isinstance(found, dict):
        raise ValueError(f"{path} holds {type(found).__name__} where a dictionary is expected")
    return found


def _interpolated(x: float, xs: Sequence[float], ys: Sequence[float]) -> float:
    """On the straight line between the two points around `x`, or through the last two beyond them."""
    right = min(max(bisect_right(xs, x), 1), len(xs) - 1)
    slope = (ys[right] - ys[right - 1]) / (xs[right] - xs[right - 1])
    return ys[right] + slope * (x - xs[right])
