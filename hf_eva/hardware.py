"""The names of what a training runs on."""

from __future__ import annotations

import platform
from pathlib import Path

import torch


def cpu_name() -> str:
    """The model of the processor."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


def accelerators() -> list[str]:
    """Every accelerator that torch sees, with its memory where it is known; empty on a machine with CPUs alone."""
    if torch.cuda.is_available():
        found = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
        return [f"{one.name}, {one.total_memory / 2**30:.0f} GiB" for one in found]
    if not torch.accelerator.is_available():
        return []
    device = torch.accelerator.current_accelerator()
    return [str(device)] * torch.accelerator.device_count()
