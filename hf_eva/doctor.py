"""What a machine offers to a training with Eva: versions, devices, and what will be used of them."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from typing import Any

import torch
from torch import nn

from . import __version__
from .config import EvaConfig
from .factory import create_eva_optimizer
from .hardware import accelerators, cpu_name

# Beside torch: what each package adds, by the extra that installs it.
_PACKAGES = {
    "transformers": "trainer",
    "accelerate": "trainer",
    "datasets": "examples",
    "matplotlib": "plot",
    "codecarbon": "energy",
    "peft": "peft",
    "tensorboard": "tensorboard",
}
_STEPS = 20


def examine() -> dict[str, Any]:
    """
    Everything that `hf-eva doctor` tells, as plain values. `problems` are sentences about what will not work; it is
    empty on a machine where a training can start.
    """
    problems: list[str] = []
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    place, devices = device.type if device else "cpu", accelerators()
    found = {
        "versions": {"hf_eva": __version__, "python": platform.python_version(), "torch": torch.__version__},
        "system": f"{platform.system()} {platform.machine()}",
        "packages": _packages(problems),
        "devices": [*devices, f"{cpu_name()}, {os.cpu_count()} cores"],
        "use": {
            "device": place,
            "processes": max(1, len(devices)),
            "threads": torch.get_num_threads(),
            "bf16": _supports_bf16(place),
            "accelerate_config": _default_config(),
            "hub": "offline"
            if os.environ.get("HF_HUB_OFFLINE", "0").upper() in ("1", "ON", "YES", "TRUE")
            else "online",
        },
        "optim_eva": _registers(problems),
        "step": _step(place, problems),
    }
    return {"ok": not problems, **found, "problems": problems}


def report(found: dict[str, Any]) -> str:
    """What [`examine`] found, for a person."""
    use = found["use"]
    rows = [*found["versions"].items(), ("system", found["system"])]
    rows += [
        (name, one["version"] or f"not installed: pip install 'hf-eva[{one['extra']}]'")
        for name, one in found["packages"].items()
    ]
    rows += [("device", text) for text in found["devices"]]
    rows += [
        (
            "will be used",
            f"{use['device']}, {use['processes']} process{'es' if use['processes'] > 1 else ''}, "
            f"{use['threads']} CPU thread{'s' if use['threads'] > 1 else ''} each",
        ),
        ("bf16", "supported" if use["bf16"] else "not supported"),
        ("accelerate config", use["accelerate_config"] or "none: `accelerate config` writes one"),
        ("Hub", use["hub"]),
        ("--optim eva", {True: "works", False: "does not work", None: "needs transformers"}[found["optim_eva"]]),
        ("a step of Eva", "works" if found["step"] else "does not work"),
        *(("problem", text) for text in found["problems"]),
    ]
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name.ljust(width)}  {text}" for name, text in rows)


def _packages(problems: list[str]) -> dict[str, dict[str, Any]]:
    """Version, extra and range of each optional package; one outside its range is a problem."""
    ranges = _ranges()
    found: dict[str, dict[str, Any]] = {}
    for name, extra in _PACKAGES.items():
        try:
            version = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            version = None
        wanted = ranges.get(name)
        found[name] = {"version": version, "extra": extra, "supported": str(wanted) if wanted is not None else None}
        if version and wanted is not None and not wanted.contains(version, prereleases=True):
            problems.append(
                f"{name} {version} is installed and {name}{wanted} is supported: pip install 'hf-eva[{extra}]'"
            )
    return found


def _ranges() -> dict[str, Any]:
    """The versions that the installed hf-eva asks for; empty where it runs from a checkout or without `packaging`."""
    try:
        from packaging.requirements import Requirement

        needs = importlib.metadata.requires("hf-eva") or []
    except (ModuleNotFoundError, importlib.metadata.PackageNotFoundError):
        return {}
    return {need.name: need.specifier for need in map(Requirement, needs) if need.name in _PACKAGES}


def _supports_bf16(place: str) -> bool:
    return place == "cpu" or (place == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False))


def _default_config() -> str | None:
    try:
        from accelerate.commands.config import default_config_file
    except ImportError:
        return None
    return str(default_config_file) if os.path.isfile(default_config_file) else None


def _registers(problems: list[str]) -> bool | None:
    """Whether `--optim eva` can be made valid for the Trainer that is installed; `None` where there is none."""
    try:
        from .registration import register
    except ModuleNotFoundError:
        return None
    try:
        register()
    except Exception as error:  # whatever an unknown release raises is the answer
        problems.append(str(error))
        return False
    return True


def _step(place: str, problems: list[str]) -> bool:
    """Whether a small training lowers its loss on the device that will be used."""
    try:
        generator = torch.Generator().manual_seed(0)
        inputs, targets = (torch.randn(32, size, generator=generator).to(place) for size in (16, 4))
        model = nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 4)).to(place)
        optimizer = create_eva_optimizer(model, lr=1e-2, config=EvaConfig(rank=4))
        losses = []
        for _ in range(_STEPS):
            optimizer.zero_grad()
            loss = nn.functional.mse_loss(model(inputs), targets)
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
        if not losses[-1] < losses[0]:
            problems.append(
                f"{_STEPS} steps on {place} did not lower the loss: {losses[0]:.3g} became {losses[-1]:.3g}"
            )
            return False
    except Exception as error:  # of the driver, of a kernel: the report names it
        problems.append(f"a step on {place} failed: {error}")
        return False
    return True
