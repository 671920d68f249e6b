"""Runs a function in several processes that form a gloo group, with a limit on the time and the name of who failed."""

import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def run(function: Callable[..., Any], processes: int, *args: Any, limit: float = 120.0) -> list[Any]:
    """What `function(rank, *args)` returns in each process. It must be importable, and its result of plain tensors."""
    with tempfile.TemporaryDirectory() as folder:
        context = mp.spawn(_process, (function, processes, folder, args), nprocs=processes, join=False)
        deadline = time.monotonic() + limit
        try:
            while not context.join(timeout=1.0):  # raises when a process fails, with its rank and its traceback
                if time.monotonic() > deadline:
                    hung = [rank for rank, process in enumerate(context.processes) if process.is_alive()]
                    pytest.fail(f"{function.__name__}: ranks {hung} of {processes} still run after {limit:g} s")
        finally:
            for process in context.processes:
                process.kill()
                process.join()
        return [torch.load(Path(folder, f"{rank}.pt"), weights_only=True) for rank in range(processes)]


def _process(rank: int, function: Callable[..., Any], processes: int, folder: str, args: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=processes)
    torch.save(function(rank, *args), Path(folder, f"{rank}.pt"))
    dist.barrier()
    dist.destroy_process_group()
    # A mesh keeps its groups after that, and an interpreter that ends with threads of gloo aborts, one time in thirty.
    os._exit(0)
