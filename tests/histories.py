"""Folders of runs as the Trainer leaves them, without a training."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

LAYERS = ("encoder.layer.2.dense", "encoder.layer.10.dense", "classifier")


def write_run(
    folder: Path,
    losses: tuple[float, ...] = (0.6, 0.4),
    *,
    step_seconds: float | None = 0.5,
    strengths: bool = False,
    spectra: bool = False,
    facts: dict[str, Any] | None = None,
    **evaluation: float,
) -> Path:
    """
    A run of ten steps: a loss at each, logged with `step_seconds`, and an evaluation after equal parts of them with
    the `losses` and the metrics `evaluation`.
    """
    history: list[dict[str, Any]] = [{"step": step, "loss": 1 / step} for step in range(1, 11)]
    for entry in history:
        entry |= {} if step_seconds is None else {"step_seconds": step_seconds}
        entry |= {f"eva_strength/{layer}": 0.02 * entry["step"] for layer in LAYERS} if strengths else {}
    for part, loss in enumerate(losses, start=1):
        step = 10 * part // len(losses)
        history.append({"step": step, "eval_loss": loss, "eval_runtime": 2.0, **evaluation})
    history.sort(key=lambda entry: entry["step"])
    history.append({"step": 10, "train_runtime": 9.0, "train_samples_per_second": 8.0})
    folder.mkdir(parents=True)
    (folder / "trainer_state.json").write_text(json.dumps({"log_history": history, "global_step": 10}))
    if facts is not None:
        (folder / "eva_run.json").write_text(json.dumps(facts))
    if spectra:
        write_optimizer(folder / "checkpoint-10")
        write_optimizer(folder / "checkpoint-90", scale=9.0)  # of an earlier, longer run in the same folder
    return folder


def write_optimizer(folder: Path, scale: float = 1.0) -> None:
    """The state of two layers whose factors have the eigenvalues 2 and 5, and 1 and 3, out of 10."""
    factors = {"eva_a": torch.tensor([[2.0, 3.0], [0.0, 4.0]]), "eva_g": torch.tensor([[0.0, 3.0], [1.0, 0.0]])}
    state = {
        0: {"exp_avg": torch.zeros(3)},
        1: {**{key: value * scale / 10 for key, value in factors.items()}, "eva_square": torch.tensor(10.0)},
        2: {"eva_a": torch.ones(4), "eva_g": torch.ones(4), "eva_square": torch.tensor(1.0)},  # of the published form
    }
    folder.mkdir()
    torch.save({"state": state, "param_groups": []}, folder / "optimizer.pt")
