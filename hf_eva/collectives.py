"""The one averaging of statistics over processes, and who of them speaks."""

from __future__ import annotations

import os

import torch.distributed as dist
from torch import Tensor


def begin_sum_(buffer: Tensor) -> tuple[int, dist.Work | None]:
    """
    Begin to sum a buffer over all processes of the default group, in place, with one all-reduce.

    Returns:
        `tuple(int, Work)`: the number of processes whose buffers are summed, 1 where no process group is running; and
        what to `wait()` for before the buffer is read or written, `None` where nothing is sent. With NCCL it is the
        stream that waits and not the host.
    """
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return 1, None
    return dist.get_world_size(), dist.all_reduce(buffer, async_op=True)


def is_main_process() -> bool:
    """Whether this is the first process of all, or will be once the group that a launcher has announced is running."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank() == 0
    return os.environ.get("RANK", "0") == "0"
