"""What a comparison measures beside the loss: the times of all optimizers, in turns, and the memory of each."""

import gc
import math
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import peers
import torch
from compare_runs import Job, make_trainer
from torch import Tensor, nn
from transformers import TrainerCallback

from hf_eva.callbacks import EvaCallback


class Pace(TrainerCallback):
    """Times the steps of each training but the first, to which the machine is as the optimizer before has left it."""

    def __init__(self) -> None:
        self.seconds: list[float] = []  # of each step
        self.started = 0.0
        self.callback: EvaCallback | None = None  # which times the optimizer
        self.in_first = 0.0  # seconds of the optimizer in the step that does not count

    def on_train_begin(self, *_: Any, **kwargs: Any) -> None:
        self.seconds = []

    def on_step_begin(self, args: Any, *_: Any, **kwargs: Any) -> None:
        _synchronize(args)
        self.started = time.perf_counter()

    def on_step_end(self, args: Any, *_: Any, **kwargs: Any) -> None:
        _synchronize(args)
        self.seconds.append(time.perf_counter() - self.started)
        if len(self.seconds) == 1:
            self.in_first = self.in_optimizer

    @property
    def in_optimizer(self) -> float:
        assert self.callback is not None
        return self.callback.times.in_optimizer


def _synchronize(args: Any) -> None:
    if args.device.type == "cuda":
        torch.cuda.synchronize(args.device)


class Side:
    """
    One of the optimizers that take turns. A turn is a whole training of the Trainer's, and not a part of one in a
    thread of its own: OpenMP has other threads for each of these, and then lets all of them sleep between operations.
    """

    def __init__(self, job: Job, steps: int, folder: str) -> None:
        interval = peers.interval_of(job.peer, job.options)
        self.steps = math.ceil(steps / interval) * interval
        self.pace = Pace()
        self.trainer = make_trainer(replace(job, steps=self.steps + 1), folder, self.pace)
        self.pace.callback = self.trainer.eva_callback
        self.rounds: list[tuple[float, float]] = []  # seconds in the steps of a round, and in the optimizer

    def run_round(self) -> None:
        self.trainer.lr_scheduler = None  # the one before is at its end
        self.trainer.train()
        self.rounds.append((sum(self.pace.seconds[1:]), self.pace.in_optimizer - self.pace.in_first))


def measure_times(jobs: dict[str, Job], baseline: str, rounds: int, steps: int) -> dict[str, dict[str, float]]:
    """
    Times all optimizers of a task in turns, so that a machine that slows down slows all of them.

    A round has `steps` steps or, where the work of an optimizer repeats after some steps, as many whole periods as it
    takes to reach them, after one that is not counted. The loop is the Trainer's own; a first round is not counted.
    """
    with tempfile.TemporaryDirectory() as folder:
        sides = {name: Side(job, steps, os.path.join(folder, name)) for name, job in jobs.items()}
        for number in range(rounds + 1):
            for name, side in list(sides.items())[:: 1 if number % 2 else -1]:
                try:
                    side.run_round()
                except Exception as error:
                    if name == baseline:
                        raise
                    print(f"{name}: not timed, {type(error).__name__}: {error}", file=sys.stderr)
                    del sides[name]
    per_step = {name: [total / side.steps for total, _ in side.rounds[1:]] for name, side in sides.items()}
    measured = {}
    for name, side in sides.items():
        measured[name] = {
            "step_seconds": statistics.median(per_step[name]),
            **ratios(per_step[name], per_step[baseline]),
            "optimizer_share": statistics.median(part / total for total, part in side.rounds[1:]),
        }
    return measured


def ratios(own: Sequence[float], other: Sequence[float]) -> dict[str, float]:
    """Quartiles of the ratios of two sides, round by round, in the rounds that both have."""
    values = [one / two for one, two in zip(own, other, strict=False)]
    low, middle, high = statistics.quantiles(values, n=4) if len(values) > 1 else values * 3
    return {"ratio": middle, "ratio_low": low, "ratio_high": high}


# Every tensor of more than a few pages goes back to the system as soon as it is freed, so that its memory can be seen.
MEMORY_ENVIRONMENT = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}


def measure_memory(job: Job) -> dict[str, float]:
    """
    Returns the bytes of the optimizer's state, and the most that model, gradients, optimizer and a step took together:
    on a GPU what was allocated, under Linux by how much the process grew, elsewhere nothing.
    """
    steps = peers.interval_of(job.peer, job.options) + 1
    _warm_up(job.arguments, replace(job, steps=1))
    before = start_of_peak()
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(replace(job, steps=steps), folder)
        trainer.train()
    return {"state_bytes": state_bytes(trainer.optimizer, trainer.model), "peak_bytes": peak() - before}


_warmed: set[tuple[str, ...]] = set()


def _warm_up(arguments: tuple[str, ...], job: Job) -> None:
    """What libraries load and keep at their first use belongs to no optimizer."""
    if arguments not in _warmed:
        _warmed.add(arguments)
        with tempfile.TemporaryDirectory() as folder:
            make_trainer(job, folder).train()


def start_of_peak() -> float:
    """Bytes that are taken now, to be subtracted from [`peak`]; nan where the system does not say."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    try:
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    except OSError:
        return math.nan
    return _status("VmRSS")


def peak() -> float:
    return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else _status("VmHWM")


def _status(key: str) -> float:
    """Bytes that Linux reports of this process; nan elsewhere."""
    path = Path("/proc/self/status")
    lines = path.read_text().splitlines() if path.exists() else []
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(key + ":")), math.nan)


def state_bytes(optimizer: torch.optim.Optimizer, model: nn.Module) -> int:
    """Bytes of all tensors in the state of an optimizer, however deep, each memory once and none of the model's."""
    known = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    seen: set[int] = set()
    found, todo = 0, [dict(optimizer.state)]
    while todo:
        value = todo.pop()
        if id(value) in seen or isinstance(value, nn.Module):
            continue
        seen.add(id(value))
        if isinstance(value, Tensor):
            storage = value.untyped_storage()
            if storage.data_ptr() not in known:
                known.add(storage.data_ptr())
                found += storage.nbytes()
        elif isinstance(value, dict):
            todo += value.values()
        elif isinstance(value, list | tuple | set):
            todo += value
        elif hasattr(value, "__dict__"):
            todo += vars(value).values()
    return found
