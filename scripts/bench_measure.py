"""What the benchmark measures: seconds in turns, and what a step calls, moves, reads back and keeps."""

from __future__ import annotations

import contextlib
import math
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import peers
import torch
from bench_models import Architecture, batch_of, share
from bench_rules import OPTIMIZERS
from compare_timing import peak, start_of_peak, state_bytes
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry
from transformers import PreTrainedModel
from transformers.utils import logging

from hf_eva import EvaConfig, create_eva_optimizer
from hf_eva.curvature import SEARCH_STEPS
from hf_eva.products import product

LR, WEIGHT_DECAY, MAX_NORM = 1e-6, 0.01, 1.0  # the weights stay where they are: only the work counts
SMALL = 2, 8  # sentences and tokens of the batch that makes the gradients where only the step is timed
COPIED = 2**28  # bytes of the tensor that bandwidth is measured with, far beyond any cache
MULTIPLIED = 4, 768, 768, 16  # products that fit into a cache, of the shape of the recipe's

# Counts --------------------------------------------------------------------------------------------------------------

FREE = {"_local_scalar_dense", "_unsafe_view", "detach", "empty", "empty_like", "empty_strided", "new_empty"}
HOST_READS = {"_local_scalar_dense", "equal", "is_nonzero", "nonzero"}
OVERWRITING = {"copy_", "fill_", "zero_"}
PRODUCTS_OF_MATRICES = ("mm", "bmm", "addmm", "baddbmm")
ONEDNNS_PRODUCT = "_linear_pointwise"


@dataclass
class Counts:
    """
    Args:
        calls (`float`): Kernels on a GPU; operations that touch memory on a CPU, where a list of tensors is one.
        host_reads (`float`): Times that the host waits for a value of the device; on a CPU also the values that live
            on the host anyway, as AdamW's counts of steps do.
        bytes (`float`): What all operations read and write if none finds in a cache what another left there.
        flops (`float`): Multiplications and additions in products of matrices.
    """

    calls: float = 0
    host_reads: float = 0
    bytes: float = 0
    flops: float = 0


class _Counting(TorchDispatchMode):
    def __init__(self, counts: Counts) -> None:
        super().__init__()
        self.counts = counts

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func._schema.name.rpartition("::")[2]
        self.counts.host_reads += name in HOST_READS
        if not func.is_view and name not in FREE:
            self.counts.calls += 1
            self.counts.bytes += _moved(func._schema, name, args, kwargs or {}, result)
        if name.removesuffix("_") in PRODUCTS_OF_MATRICES:
            rule = flop_registry[getattr(torch.ops.aten, name.removesuffix("_"))]
            self.counts.flops += rule(*args, **(kwargs or {}), out_val=result)
        elif name == ONEDNNS_PRODUCT:
            self.counts.flops += 2 * args[0].shape[-1] * result.numel()
        return result


def _moved(schema: Any, name: str, args: tuple, kwargs: dict, result: Any) -> int:
    total = 0
    for index, argument in enumerate(schema.arguments):
        value = args[index] if index < len(args) else kwargs.get(argument.name)
        size = sum(map(_bytes, _tensors(value)))
        # The fused optimizers may divide gradients by a loss scale in place, and do not here.
        is_written = argument.alias_info is not None and argument.alias_info.is_write and argument.name != "grads"
        is_read = not is_written or not (argument.is_out or name in OVERWRITING)
        total += size * (is_written + is_read)
    results = result if isinstance(result, tuple) and len(schema.returns) > 1 else [result]
    fresh = (value for value, described in zip(results, schema.returns, strict=False) if described.alias_info is None)
    return total + sum(map(_bytes, chain.from_iterable(map(_tensors, fresh))))


def _tensors(value: Any) -> list[Tensor]:
    values = value if isinstance(value, list | tuple) else [value]
    return [one for one in values if isinstance(one, Tensor)]


def _bytes(tensor: Tensor) -> int:
    """In memory: what is repeated by a stride of 0 is there once."""
    sizes = (size for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if stride)
    return math.prod(sizes) * tensor.element_size() if tensor.numel() else 0


@contextlib.contextmanager
def counting(device: str) -> Iterator[Counts]:
    """Counts what happens inside; a step takes longer there."""
    counts = Counts()
    if not device.startswith("cuda"):
        with _Counting(counts):
            yield counts
        return
    from torch.profiler import ProfilerActivity, profile

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            with profile(activities=[ProfilerActivity.CUDA]) as profiled, _Counting(counts):
                yield counts
        finally:
            torch.cuda.set_sync_debug_mode("default")
    counts.host_reads = sum("synchroniz" in str(warning.message) for warning in caught)
    counts.calls = sum(event.device_type == torch.autograd.DeviceType.CUDA for event in profiled.events())


# Seconds -------------------------------------------------------------------------------------------------------------


def seconds(device: str, work: Callable[[], Any]) -> float:
    if not device.startswith("cuda"):
        began = time.perf_counter()
        work()
        return time.perf_counter() - began
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize(device)
    start.record()
    work()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1000


def bandwidth(device: str, repeats: int = 5) -> float:
    """
    Bytes read and written per second, in the fastest of some copies and scalings of a large tensor. Both, because a
    copy on a CPU may also read what it overwrites, and an operation in place does not.
    """
    source = torch.ones(COPIED // 4, device=device)
    target = torch.empty_like(source).copy_(source)
    works = [lambda: target.copy_(source), lambda: target.mul_(1.0)] * repeats
    return 2 * COPIED / min(seconds(device, work) for work in works)


def product_rate(device: str, repeats: int = 20) -> float:
    """Multiplications and additions per second, in the fastest of some products of a low-rank basis and a gradient."""
    n, rows, columns, rank = MULTIPLIED
    grads, basis = torch.ones(n, rows, columns, device=device), torch.ones(n, columns, rank, device=device)
    return 2 * math.prod(MULTIPLIED) / min(seconds(device, lambda: product(grads, basis)) for _ in range(repeats))


@dataclass
class Side:
    """One of those that are measured in turns. All have the parameters of one model, and hooks of their own."""

    name: str
    model: PreTrainedModel
    optimizer: torch.optim.Optimizer | None = None
    interval: int = 1
    seconds: list[float] = field(default_factory=list)  # of one step, in each round
    counts: Counts = field(default_factory=Counts)
    spent: float = 0.0

    def backward(self, batch: dict[str, Tensor], autocast: bool = False) -> None:
        for parameter in self.model.parameters():
            parameter.grad = None
        with torch.autocast(self.model.device.type, torch.bfloat16, enabled=autocast):
            loss = self.model(**batch).loss
        loss.backward()

    def train(self, batch: dict[str, Tensor], autocast: bool) -> None:
        self.backward(batch, autocast)
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), MAX_NORM)
        self.optimizer.step()


def make_side(name: str, model: PreTrainedModel) -> Side:
    """An optimizer of the benchmark in the middle of a training: what only the first steps do lies behind it."""
    chosen, own = OPTIMIZERS[name], share(model)
    peer = peers.PEERS[chosen.peer]
    optimizer = peers.build(chosen.peer, own, LR * peer.lr_ratio, WEIGHT_DECAY, 1000, chosen.options)
    side = Side(name, own, optimizer, peers.interval_of(chosen.peer, chosen.options))
    for _ in range(SEARCH_STEPS):
        side.backward(batch_of(model, *SMALL))
        optimizer.step()
    for state in optimizer.state.values():
        if chosen.peer == "kfac" and isinstance(state["step"], int):  # which inverts at each of its first steps
            state["step"] = side.interval
    return side


def in_turns(sides: list[Side], rounds: int, patience: float, run: Callable[[Side], float]) -> None:
    """Rounds in which each side runs once, in changing order, as long as it has not taken more than its patience."""
    for number in range(rounds):
        for side in sides[:: -1 if number % 2 else 1]:
            if side.spent <= patience:
                began = time.perf_counter()
                side.seconds.append(run(side))
                side.spent += time.perf_counter() - began


def make_sides(names: Sequence[str], model: PreTrainedModel, steps: int) -> list[Side]:
    """The optimizers that can be made, with the counts of a step of each."""
    sides = []
    for name in names:
        try:
            side = make_side(name, model)
            count_steps(side, whole_intervals(side, steps))
        except Exception as error:  # one that fails takes no other with it
            print(f"{name}: not measured, {type(error).__name__}: {error}", file=sys.stderr)
        else:
            sides.append(side)
    return sides


def count_steps(side: Side, steps: int) -> None:
    batch = batch_of(side.model, *SMALL)
    for _ in range(steps):
        side.backward(batch)
        with counting(str(side.model.device)) as counts:
            side.optimizer.step()
        for key, value in vars(counts).items():
            setattr(side.counts, key, getattr(side.counts, key) + value / steps)


def whole_intervals(side: Side, steps: int) -> int:
    return math.ceil(steps / side.interval) * side.interval


def time_steps(sides: list[Side], rounds: int, steps: int, patience: float) -> None:
    """Fills the seconds of the optimizer's step alone, after a backward pass that is not counted."""
    device = str(sides[0].model.device)
    batch = batch_of(sides[0].model, *SMALL)

    def run(side: Side) -> float:
        number, total = whole_intervals(side, steps), 0.0
        for _ in range(number):
            side.backward(batch)
            total += seconds(device, side.optimizer.step)
        return total / number

    in_turns(sides, rounds, patience, run)


def time_training(
    sides: list[Side], batch: dict[str, Tensor], rounds: int, steps: int, patience: float, autocast: bool
) -> None:
    """Fills the seconds of forward, backward, clipping and step together."""
    device = str(sides[0].model.device)

    def run(side: Side) -> float:
        number = whole_intervals(side, steps)
        return sum(seconds(device, lambda: side.train(batch, autocast)) for _ in range(number)) / number

    run(sides[0])  # what the first pass of this size sets up
    in_turns(sides, rounds, patience, run)


CAPTURES: dict[str, dict[str, Any]] = {
    "eva_f": {"variant": "eva_f"},
    "eva": {"variant": "eva"},
    "eva_quarter": {"variant": "eva", "token_fraction": 0.25},
}


def time_capture(
    model: PreTrainedModel, batch: dict[str, Tensor], rounds: int, steps: int, patience: float, autocast: bool
) -> list[Side]:
    """Forward and backward without hooks, with those of Eva-f and of Eva, and with these on a quarter of the batch."""
    device, sides = str(model.device), [Side("no capture", share(model))]
    for name, options in CAPTURES.items():
        own = share(model)
        sides.append(Side(name, own, create_eva_optimizer(own, config=EvaConfig(**options))))

    def run(side: Side) -> float:
        return sum(seconds(device, lambda: side.backward(batch, autocast)) for _ in range(steps)) / steps

    run(sides[0])
    in_turns(sides, rounds, patience, run)
    return sides


# Memory --------------------------------------------------------------------------------------------------------------


def measure_memory(
    architecture: Architecture, layers: int, dtype: torch.dtype, device: str, name: str | None
) -> dict[str, float]:
    """
    Bytes of an optimizer's state, and the most that parameters, gradients, optimizer and a step took together; without
    an optimizer, that of the backward pass alone. For a process of its own; what libraries load at first use is left
    out.
    """
    logging.set_verbosity_error()

    def train(depth: int) -> int:
        model = architecture.build(depth, device, dtype)
        side = make_side(name, model) if name else Side("", model)
        side.backward(batch_of(model, *SMALL))
        if side.optimizer is None:
            return 0
        side.optimizer.step()
        return state_bytes(side.optimizer, side.model)

    train(1)
    before = start_of_peak()
    return {"state_bytes": train(layers), "peak_bytes": peak() - before}
