"""Measures where the time of a training goes."""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState

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


class EvaCallback(TrainerCallback, ExportableState):
    """
    Times training steps (forward, backward, clipping and optimizer, without the loading of data), the optimizer alone,
    evaluations and the whole training. Works with any optimizer; the times survive a resumption.

    On a GPU the optimizer is timed by events, which are read only when the Trainer logs.
    """

    def __init__(self) -> None:
        self.times = Times()
        self._logged = Times()
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        self._train_started = self._step_started = self._optimizer_started = 0.0

    def interval(self) -> dict[str, float]:
        """What the Trainer logs beside the loss: means over the steps since the last call."""
        self._read_events()
        steps = self.times.steps - self._logged.steps
        in_steps = self.times.in_steps - self._logged.in_steps
        in_optimizer = self.times.in_optimizer - self._logged.in_optimizer
        self._logged = Times(**vars(self.times))
        if not steps or not in_steps:
            return {}
        return {"step_seconds": in_steps / steps, "optimizer_share": in_optimizer / in_steps}

    def summary(self) -> dict[str, float]:
        """The whole training, as metrics: seconds, the optimizer's share of a step and the peak memory in GiB."""
        self._read_events()
        return {
            "train_steps_seconds": self.times.in_steps,
            "train_evaluation_seconds": self.times.in_evaluation,
            "train_total_seconds": self._total(),
            "train_optimizer_share": self.times.optimizer_share,
            "train_peak_memory_gib": peak_memory() / 2**30,
        }

    def state(self) -> dict[str, Any]:
        self._read_events()
        return {"args": {}, "attributes": {"times": {**vars(self.times), "total": self._total()}}}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        saved = state.stateful_callbacks.get(type(self).__name__) if state.global_step > 0 else None
        self.times = Times(**saved["attributes"]["times"]) if saved else Times()
        self._logged = Times(**vars(self.times))
        self._events.clear()
        prepared = kwargs.get("optimizer")  # by Accelerate, which knows the scaler, and with Eva inside
        optimizer = getattr(prepared, "optimizer", prepared)
        if isinstance(optimizer, Eva) and optimizer.grad_scaler is None:
            optimizer.grad_scaler = getattr(prepared, "scaler", None)
        self._train_started = time.perf_counter()
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self._step_started = time.perf_counter()

    def on_pre_optimizer_step(self, args: TrainingArguments, *_: Any, **kwargs: Any) -> None:
        if args.device.type == "cuda":
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            self._events.append((start, end))
            start.record()
        self._optimizer_started = time.perf_counter()

    def on_optimizer_step(self, args: TrainingArguments, *_: Any, **kwargs: Any) -> None:
        if args.device.type == "cuda":
            self._events[-1][1].record()
        else:
            self.times.in_optimizer += time.perf_counter() - self._optimizer_started

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.times.in_steps += time.perf_counter() - self._step_started
        self.times.steps += 1

    def on_evaluate(self, *args: Any, metrics: dict[str, float], **kwargs: Any) -> None:
        if self._train_started:
            self.times.in_evaluation += sum(v for key, v in metrics.items() if key.endswith("_runtime"))

    def on_train_end(self, *args: Any, **kwargs: Any) -> None:
        self.times.total = self._total()
        self._train_started = 0.0

    def _total(self) -> float:
        running = time.perf_counter() - self._train_started if self._train_started else 0.0
        return self.times.total + running

    def _read_events(self) -> None:
        if self._events:
            torch.cuda.synchronize()
            self.times.in_optimizer += sum(start.elapsed_time(end) for start, end in self._events) / 1000
            self._events.clear()


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
