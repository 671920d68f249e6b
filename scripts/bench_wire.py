"""
What the statistics of Eva cost on the wire: one all-reduce of one buffer per step, measured in gloo processes on this
machine, and by a model fitted to that for more processes.

The model is that of a ring: each of p processes sends and receives 2 (p − 1) messages, each of 1/p of the buffer, at a
latency and a bandwidth that are the same for every p. What it says of many processes supposes links between them like
those that were measured, which on one machine are memory and shared cores, and no other traffic: not the gradients'
either, whose all-reduce follows the same model and stands beside it.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

from hf_eva import plan

MEASURED = (1, 2, 4)  # processes
MODELLED = (8, 16, 64, 256, 1024)
LADDER = (2**12, 2**16, 2**20, 2**22, 2**24)  # bytes of the messages that the model is fitted to
VARIANTS = ("eva_s", "eva_f", "eva")


def statistics_bytes(model: nn.Module, variant: str) -> int:
    """Of the buffer: for each layer the number of tokens, and of inputs and output gradients the sum and a square."""
    if variant == "eva_s":  # which is made of gradients, that are the same everywhere
        return 0
    shapes = [layer.shape for layer in plan(model).layers]
    return 4 * sum(d_in + 2 + (variant == "eva") * (d_out + 1) for d_out, d_in in shapes)


@dataclass(frozen=True)
class Ring:
    """`latency` in seconds, `bandwidth` in bytes per second, and the median relative `error` of what they explain."""

    latency: float
    bandwidth: float
    error: float = 0.0

    @staticmethod
    def messages(processes: int) -> int:
        """That a process sends."""
        return 2 * (processes - 1)

    @classmethod
    def sent(cls, size: float, processes: int) -> float:
        """Bytes that a process sends."""
        return cls.messages(processes) / processes * size

    def seconds(self, size: float, processes: int) -> float:
        if not size:  # nothing is sent
            return 0.0
        return self.messages(processes) * self.latency + self.sent(size, processes) / self.bandwidth


def fit(measured: dict[tuple[int, int], float]) -> Ring:
    """The least relative squares of seconds by size and processes, of more than one, in which neither is negative."""
    points = {key: value for key, value in measured.items() if key[1] > 1}
    rows = torch.tensor(
        [[Ring.messages(key[1]), Ring.sent(*key), value] for key, value in points.items()], dtype=torch.float64
    )
    relative = rows[:, :2] / rows[:, 2:]
    scale = relative.norm(dim=0)
    ones = torch.ones(len(rows), 1, dtype=torch.float64)
    answers = []
    for kept in ([0, 1], [1], [0]):  # both, or one of them alone where the other would be negative
        found = torch.zeros(2, dtype=torch.float64)
        found[kept] = torch.linalg.lstsq(relative[:, kept] / scale[kept], ones).solution[:, 0] / scale[kept]
        if (found >= 0).all():
            answers.append(((relative @ found - 1).square().sum().item(), found))
    latency, per_byte = min(answers, key=lambda answer: answer[0])[1].tolist()
    ring = Ring(latency, 1 / per_byte if per_byte else float("inf"))
    errors = [abs(ring.seconds(*key) / value - 1) for key, value in points.items()]
    return Ring(ring.latency, ring.bandwidth, statistics.median(errors))


def time_all_reduces(sizes: Sequence[int], rounds: int) -> dict[tuple[int, int], float]:
    """Median seconds of an all-reduce of so many bytes by so many gloo processes, of the slowest, taken in turns."""
    with tempfile.TemporaryDirectory() as folder:
        # From a process of its own, so that its forks inherit no threads and import nothing again.
        wanted = json.dumps({"folder": folder, "sizes": sorted(set(sizes) - {0}), "rounds": rounds})
        subprocess.run([sys.executable, __file__, wanted], check=True)
        found = [torch.load(Path(folder, f"{rank}.pt")) for rank in range(max(MEASURED))]
    return {
        key: statistics.median(max(turn) for turn in zip(*(seconds[key] for seconds in found[: key[1]]), strict=True))
        for key in found[0]
    }


def _process(rank: int, folder: str, sizes: Sequence[int], rounds: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=max(MEASURED))
    groups = {processes: dist.new_group(list(range(processes))) for processes in MEASURED}
    buffers = {size: torch.zeros(max(1, size // 4)) for size in sizes}
    found: dict[tuple[int, int], list[float]] = {}
    for number in range(rounds + 1):  # the first one sets up connections
        for size, buffer in buffers.items():
            for processes, group in groups.items():
                dist.barrier()
                if rank >= processes:
                    continue
                began = time.perf_counter()
                dist.all_reduce(buffer, group=group)
                if number:
                    found.setdefault((size, processes), []).append(time.perf_counter() - began)
    torch.save(found, Path(folder, f"{rank}.pt"))
    dist.barrier()
    dist.destroy_process_group()


def main() -> None:
    wanted = json.loads(sys.argv[1])
    arguments = wanted["folder"], wanted["sizes"], wanted["rounds"]
    mp.start_processes(_process, arguments, nprocs=max(MEASURED), start_method="fork")


if __name__ == "__main__":
    main()
