"""The one averaging of statistics over processes, and who of them speaks."""

from __future__ import annotations

import os

import torch.distributed as dist
from torch import Tensor


def sum_over_processes_(buffer: Tensor) -> int:
    """
    Sum a buffer over all processes of the default group, in place, with one all-reduce.

    Returns:
        `int`: the number of processes whose buffers were summed; 1 where no process group is running.
    """
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return 1
    dist.all_reduce(buffer)
    return dist.get_world_size()


def is_main_process() -> bool:
    """Whether this is the first process of all, or will be once the group that a launcher has announced is running."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank() == 0
    return os.environ.get("RANK", "0") == "0"
