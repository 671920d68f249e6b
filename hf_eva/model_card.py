"""The facts of a run, and the section of the model card that states them."""

from __future__ import annotations

import os
import platform
import re
import shlex
import sys
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from huggingface_hub import ModelCard
from jinja2 import Environment, StrictUndefined

from . import __version__
from .optimizer import Eva

if TYPE_CHECKING:
    from transformers import Trainer

_NEXT_SECTION = "### Framework versions"
# What the stock card says of a model built from a config, and of an optimizer whose options are not optim_args.
_NAMELESS_BASE = "This model is a fine-tuned version of [](https://huggingface.co/) on"
_STOCK_OPTIMIZER = re.compile(r"^(- optimizer: )Use eva and the args are:\n.*$", re.MULTILINE)


def add_training_section(path: Path, trainer: Trainer) -> None:
    """
    Add the section "Training time" to the model card at `path`, which the stock Trainer has written, and the tag `eva`
    to its metadata where Eva trained the model.
    """
    facts = run_facts(trainer)
    template = files("hf_eva").joinpath("templates/training_section.md.j2").read_text(encoding="utf-8")
    environment = Environment(undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    section = environment.from_string(template).render(facts)
    card = ModelCard.load(path)
    text = card.text.replace(_NAMELESS_BASE, "This model was trained from scratch on")
    if facts["eva"]:
        text = _STOCK_OPTIMIZER.sub(r"\1eva, see the settings under Training time", text)
    head, next_section, tail = text.partition(_NEXT_SECTION)
    card.text = f"{head.rstrip()}\n\n{section.strip()}\n\n{next_section}{tail}"
    if facts["eva"]:
        card.data.tags = [*(tag for tag in card.data.tags or [] if tag != "eva"), "eva"]
    card.save(path)


def run_facts(trainer: Any) -> dict[str, Any]:
    """Everything that the section states, as plain values; times in seconds, memory in GiB."""
    log: dict[str, float] = next((log for log in reversed(trainer.state.log_history) if "train_runtime" in log), {})
    optimizer = getattr(trainer.optimizer, "optimizer", trainer.optimizer)
    config = optimizer.config if isinstance(optimizer, Eva) else None
    return {
        **trainer.eva_callback.summary(),
        "steps": trainer.eva_callback.times.steps,
        "samples_per_second": log.get("train_samples_per_second"),
        "optimizer": str(getattr(trainer.args.optim, "value", trainer.args.optim)),
        "eva": config is not None,
        "changes": config.changes() if config else {},
        "plan": optimizer.plan.summary() if config else None,
        "hardware": _hardware(trainer.args),
        "command": _command(),
        "versions": {
            "hf_eva": __version__,
            "accelerate": version("accelerate"),
            "Python": platform.python_version(),
        },
        "duration": _duration,
    }


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min {rest} s"
    return f"{minutes} min {rest} s" if minutes else f"{seconds:.1f} s"


def _hardware(args: Any) -> str:
    processes = f"{args.world_size} processes, each with " if args.world_size > 1 else ""
    if args.device.type == "cuda":
        return f"{processes}one {torch.cuda.get_device_name(args.device)}"
    threads = torch.get_num_threads()
    return f"{processes}{threads} CPU thread{'s' if threads > 1 else ''} of {cpu_name()}"


def cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


def _command() -> str | None:
    """The command line of a script, without secrets; `None` in a notebook or an interactive session."""
    if not sys.argv or not sys.argv[0].endswith(".py"):
        return None
    arguments, hide_next = [], False
    for argument in sys.argv:
        name, equals, _ = argument.partition("=")
        secret = name.startswith("-") and "token" in name.replace("-", "_").split("_")
        arguments.append("***" if hide_next else f"{name}=***" if secret and equals else argument)
        hide_next = secret and not equals
    launcher = "torchrun" if "TORCHELASTIC_RUN_ID" in os.environ else "python"
    if any(name.startswith("ACCELERATE_") for name in os.environ):
        launcher = "accelerate launch"
    return f"{launcher} {shlex.join(arguments)}"
