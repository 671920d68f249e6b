"""Measures where the time of a training goes, and what Eva does in it."""

from __future__ import annotations

import sys
import time
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import (
    PrinterCallback,
    ProgressCallback,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.trainer_callback import ExportableState

from .diagnostics import CURVATURE, STRENGTH
from .facts import run_facts, save_facts
from .optimizer import Eva


@dataclass
class Times:
    """Seconds since a training began, over all its resumptions, and the steps they cover."""

    steps: int = 0
    in_steps: float = 0.0
    in_optimizer: float = 0.0
    in_evaluation: float = 0.0
    total: float = 0.0

    @property
    def optimizer_share(self) -> float:
        """Share of the optimizer in the training steps, between 0 and 1."""
        return self.in_optimizer / self.in_steps if self.in_steps else 0.0


class _Stopwatch:
    """Seconds between starts and stops; on a GPU those of the device, by events that are not read before `read`."""

    def __init__(self) -> None:
        self._seconds = self._started = 0.0
        self._start: torch.cuda.Event | None = None
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    def start(self, device: torch.device) -> None:
        self._started = time.perf_counter()
        self._start = _event() if device.type == "cuda" else None

    def stop(self) -> None:
        if self._start is not None:
            self._events.append((self._start, _event()))
        else:
            self._seconds += time.perf_counter() - self._started

    def read(self) -> float:
        """All seconds since the last call."""
        if self._events:
            self._events[-1][1].synchronize()
            self._seconds += sum(start.elapsed_time(end) for start, end in self._events) / 1000
            self._events.clear()
        seconds, self._seconds = self._seconds, 0.0
        return seconds


def _event() -> torch.cuda.Event:
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


class EvaCallback(TrainerCallback, ExportableState):
    """
    Tells where the time of a training goes and what Eva does to its layers.

    It times training steps (forward, backward, clipping and optimizer, without the loading of data), the optimizer
    alone, evaluations and the whole training, with any optimizer; the times survive a resumption. Nothing waits for a
    device or is computed before somebody asks: with `interval`, as [`EvaTrainer`] does when it logs.

    In a stock Trainer that trains with Eva it logs the same, less the values of single layers, and leaves the facts of
    the run in its folder, for `hf-eva card`; [`register`] puts it there. In a loop of Accelerate's, or in a plain one,
    the optimizer is given:

    ```python
    watch = EvaCallback(optimizer)
    for number, batch in enumerate(loader):
        with accelerator.accumulate(model), watch.timing():
            ...
            optimizer.step()
        if number % 100 == 99:
            accelerator.log(watch.interval(), step=number)
    ```

    Args:
        optimizer (`torch.optim.Optimizer`, *optional*): what to watch where there is no Trainer, also as Accelerate
            wraps it.
    """

    def __init__(self, optimizer: Any = None) -> None:
        self._times, self._logged = Times(), Times()
        self._step, self._optimizer_step = _Stopwatch(), _Stopwatch()
        self._train_started = 0.0
        self._watched: weakref.ref[torch.optim.Optimizer] | None = None
        self._hooks: list[Any] = []
        if optimizer is not None:
            inner = self._watch(optimizer)
            self._train_started = time.perf_counter()
            self._hooks = [
                inner.register_step_pre_hook(lambda optimizer, *_: self._optimizer_step.start(_device(optimizer))),
                inner.register_step_post_hook(lambda *_: self._end_of_step()),
            ]

    @property
    def times(self) -> Times:
        """What was measured until now."""
        self._times.in_steps += self._step.read()
        self._times.in_optimizer += self._optimizer_step.read()
        return self._times

    @times.setter
    def times(self, times: Times | dict[str, Any]) -> None:
        # As a Trainer does that restores the callbacks of a checkpoint.
        self._times = Times(**times) if isinstance(times, dict) else times

    @contextmanager
    def timing(self) -> Iterator[None]:
        """Count what happens inside, the work on one batch, to the time of the steps; for loops without a Trainer."""
        optimizer = self._optimizer()
        if optimizer is None:
            raise RuntimeError("Nothing can be timed without an optimizer: give it, as in EvaCallback(optimizer).")
        self._step.start(_device(optimizer))
        yield
        self._step.stop()

    def interval(self, layers: bool = True) -> dict[str, float]:
        """
        What a Trainer logs beside the loss, empty where no step was made since the last call: `step_seconds`,
        `optimizer_milliseconds` and `optimizer_share`, means over the steps since then, and what
        `Eva.diagnostics` tells of the last step, with or without the strength of each of the `layers`.
        """
        times = self.times
        steps = times.steps - self._logged.steps
        in_steps = times.in_steps - self._logged.in_steps
        in_optimizer = times.in_optimizer - self._logged.in_optimizer
        self._logged = Times(**vars(times))
        if not steps:
            return {}
        found = {"optimizer_milliseconds": 1000 * in_optimizer / steps}
        if in_steps:
            found = {"step_seconds": in_steps / steps, **found, "optimizer_share": in_optimizer / in_steps}
        optimizer = self._optimizer()
        return found | (optimizer.diagnostics(layers) if isinstance(optimizer, Eva) else {})

    def summary(self) -> dict[str, float]:
        """The whole training, as metrics: seconds, the optimizer's share of a step and the peak memory in GiB."""
        times = self.times
        return {
            "train_steps_seconds": times.in_steps,
            "train_evaluation_seconds": times.in_evaluation,
            "train_total_seconds": self._total(),
            "train_optimizer_share": times.optimizer_share,
            "train_peak_memory_gib": peak_memory() / 2**30,
        }

    def state(self) -> dict[str, Any]:
        return {"args": {}, "attributes": {"times": {**vars(self.times), "total": self._total()}}}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        saved = state.stateful_callbacks.get(type(self).__name__) if state.global_step > 0 else None
        self._times = Times(**saved["attributes"]["times"]) if saved else Times()
        self._logged = Times(**vars(self._times))
        self._step, self._optimizer_step = _Stopwatch(), _Stopwatch()
        for hook in self._hooks:  # the events of the Trainer take their place
            hook.remove()
        prepared = kwargs.get("optimizer")  # by Accelerate, which knows the scaler
        optimizer = self._watch(prepared)
        if isinstance(optimizer, Eva) and optimizer.grad_scaler is None:
            optimizer.grad_scaler = getattr(prepared, "scaler", None)
        self._train_started = time.perf_counter()
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()

    def on_step_begin(self, args: TrainingArguments, *_: Any, **kwargs: Any) -> None:
        self._step.start(args.device)

    def on_pre_optimizer_step(self, args: TrainingArguments, *_: Any, **kwargs: Any) -> None:
        self._optimizer_step.start(args.device)

    def on_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        self._optimizer_step.stop()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self._step.stop()
        self._times.steps += 1

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        # In an `EvaTrainer` it is all there, and what follows adds nothing.
        if not logs or not isinstance(self._optimizer(), Eva):
            return
        is_end = "train_runtime" in logs and "train_steps_seconds" not in logs
        added = self.summary() if is_end else self.interval(layers=False) if "loss" in logs else {}
        # The callbacks that come after this one see `logs`, the history has a copy.
        logs.update(added)
        state.log_history[-1].update(added)
        if is_end and state.is_world_process_zero:  # for `hf-eva card`
            save_facts(run_facts(self, args, state, self._optimizer()), Path(args.output_dir))

    def on_evaluate(self, *args: Any, metrics: dict[str, float], **kwargs: Any) -> None:
        if self._train_started:
            self._times.in_evaluation += sum(v for key, v in metrics.items() if key.endswith("_runtime"))

    def on_train_end(self, *args: Any, **kwargs: Any) -> None:
        self._times.total = self._total()
        self._train_started = 0.0

    def _watch(self, optimizer: Any) -> Any:
        """The optimizer inside of Accelerate's. It is not kept alive: it keeps the model."""
        inner = getattr(optimizer, "optimizer", optimizer)
        self._watched = weakref.ref(inner) if inner is not None else None
        return inner

    def _optimizer(self) -> torch.optim.Optimizer | None:
        return self._watched() if self._watched is not None else None

    def _end_of_step(self) -> None:
        self._optimizer_step.stop()
        self._times.steps += 1

    def _total(self) -> float:
        running = time.perf_counter() - self._train_started if self._train_started else 0.0
        return self._times.total + running


# What a line on the console has no place for: the layers are many, and curvature is looked at over time.
_NOT_PRINTED = (f"{STRENGTH}/", CURVATURE)


def shorten_lines_of(console: TrainerCallback) -> None:
    """Where this is a callback of the Trainer's that prints the logs, have it leave out what would flood its lines."""
    if not isinstance(console, PrinterCallback | ProgressCallback):
        return
    on_log = console.on_log

    def on_brief_log(*args: Any, logs: dict[str, float], **kwargs: Any) -> None:
        brief = {key: value for key, value in logs.items() if not key.startswith(_NOT_PRINTED)}
        on_log(*args, logs=brief, **kwargs)

    console.on_log = on_brief_log


def _device(optimizer: torch.optim.Optimizer) -> torch.device:
    device: torch.device = next(p.device for group in optimizer.param_groups for p in group["params"])
    return device


def peak_memory() -> int:
    """Bytes: the most that this process allocated on its GPU, or its largest resident size where there is none."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    if sys.platform == "win32":
        import psutil  # which accelerate brings along

        return int(psutil.Process().memory_info().peak_wset)
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
