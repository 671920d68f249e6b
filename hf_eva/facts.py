"""The facts of a run: what it trained with, on what, how long and at what cost, as values that go into a JSON file."""

from __future__ import annotations

import json
import os
import platform
import shlex
import sys
from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil
import torch
import yaml
from accelerate.commands.config import default_config_file
from accelerate.state import AcceleratorState

from . import __version__
from .hardware import cpu_name
from .optimizer import Eva
from .runs import FACTS_FILE, Run, read_facts, read_state

_SECRETS = {"token", "password", "secret", "key"}


def run_facts(watch: Any, args: Any, state: Any, optimizer: Any, callbacks: Iterable[Any] = ()) -> dict[str, Any]:
    """
    What is known of the training that the [`EvaCallback`] `watch` has timed, with the arguments, the state, the
    optimizer and the callbacks of its Trainer; times in seconds, memory in GiB, energy in kWh.
    """
    log: dict[str, float] = next((log for log in reversed(state.log_history) if "train_runtime" in log), {})
    optimizer = getattr(optimizer, "optimizer", optimizer)
    is_eva = isinstance(optimizer, Eva)
    launcher = _launcher()
    return {
        **watch.summary(),
        "steps": watch.times.steps,
        "samples_per_second": log.get("train_samples_per_second"),
        "optimizer": str(getattr(args.optim, "value", args.optim)),
        "eva": is_eva,
        "changes": optimizer.config.changes() if is_eva else {},
        "plan": optimizer.plan.summary() if is_eva else None,
        "layers": _layer_names(optimizer) if is_eva else {},
        "hardware": _hardware(args),
        "energy": _energy(callbacks),
        "command": _command(launcher),
        "accelerate": _accelerate_state(),
        "accelerate_config": _accelerate_config(launcher),
        "versions": {
            "hf_eva": __version__,
            "accelerate": version("accelerate"),
            "Python": platform.python_version(),
        },
    }


def saved_facts(folder: Path) -> dict[str, Any]:
    """
    What can be known of a run from its folder: all of [`run_facts`] where [`EvaTrainer`] trained it and saved its
    state, or a stock Trainer with Eva, the times that its history tells where another trainer did.

    Raises:
        ValueError: the folder holds no run, or one that never finished a step.
    """
    state = read_state(folder)
    history = state["log_history"]
    times = state.get("stateful_callbacks", {}).get("EvaCallback", {}).get("attributes", {}).get("times")
    end = next((entry for entry in reversed(history) if "train_runtime" in entry), None)
    facts = dict.fromkeys(
        ("train_steps_seconds", "train_evaluation_seconds", "train_total_seconds", "train_optimizer_share", "plan")
    )
    facts |= dict.fromkeys(("train_peak_memory_gib", "optimizer", "hardware", "energy", "command", "accelerate"))
    facts |= {"steps": state["global_step"], "eva": False, "changes": {}, "layers": {}, "versions": {}}
    facts |= {"samples_per_second": None, "accelerate_config": None}
    if end is not None:
        facts["samples_per_second"] = end.get("train_samples_per_second")
        inside = history[: history.index(end)]
        facts["train_evaluation_seconds"] = sum(entry.get("eval_runtime", 0.0) for entry in inside)
        facts["train_total_seconds"] = end["train_runtime"]
        facts |= {key: value for key, value in end.items() if key in facts}
    if times and times["steps"]:
        facts["train_steps_seconds"] = times["in_steps"]
        facts["train_evaluation_seconds"] = times["in_evaluation"]
        facts["train_total_seconds"] = times["total"]
        facts["train_optimizer_share"] = times["in_optimizer"] / times["in_steps"]
    facts |= read_facts(folder)
    if not facts["steps"]:
        raise ValueError(f"the run in {folder} has not finished a step: there is no training to describe")
    return facts


def save_facts(facts: dict[str, Any], folder: Path) -> None:
    """Write them beside the history of the run, where [`saved_facts`] finds them."""
    (folder / FACTS_FILE).write_text(json.dumps(facts, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def run_of(trainer: Any, facts: dict[str, Any]) -> Run:
    """The run of a live trainer, as [`Run.read`] would find it in its folder."""
    folder = Path(trainer.args.output_dir)
    return Run(str(folder), trainer.state.log_history, folder, facts)


def _hardware(args: Any) -> str:
    processes = f"{args.world_size} processes, each with " if args.world_size > 1 else ""
    if args.device.type == "cuda":
        return f"{processes}one {torch.cuda.get_device_name(args.device)}"
    threads = torch.get_num_threads()
    return f"{processes}{threads} CPU thread{'s' if threads > 1 else ''} of {cpu_name()}"


def _layer_names(optimizer: Eva) -> dict[str, str]:
    """The layers by the number that their weight has in the optimizer's state dict."""
    names = {id(layer.weight): layer.name for layer in optimizer.layers}
    parameters = (parameter for group in optimizer.param_groups for parameter in group["params"])
    return {str(index): names[id(p)] for index, p in enumerate(parameters) if id(p) in names}


def _energy(callbacks: Iterable[Any]) -> dict[str, Any] | None:
    """What CodeCarbon measured, where `--report_to codecarbon` had it run."""
    for callback in callbacks:
        data = getattr(getattr(callback, "tracker", None), "final_emissions_data", None)
        if data is not None:
            return {
                "kwh": data.energy_consumed,
                "cpu_kwh": data.cpu_energy,
                "gpu_kwh": data.gpu_energy,
                "ram_kwh": data.ram_energy,
                "co2_kg": data.emissions,
                "country": data.country_name,
                "version": data.codecarbon_version,
            }
    return None


# How it was started --------------------------------------------------------------------------------------------------


def _launcher() -> tuple[list[str], Path] | None:
    """The words and the folder of the `accelerate launch` or `torchrun` that started this process, if one did."""
    if "TORCHELASTIC_RUN_ID" not in os.environ and not any(name.startswith("ACCELERATE_") for name in os.environ):
        return None
    try:
        for process in psutil.Process().parents()[:3]:
            words = process.cmdline()
            for index, word in enumerate(words):
                name, rest = Path(word).name, words[index + 1 :]
                if name in ("torchrun", "torch.distributed.run"):
                    return ["torchrun", *rest], Path(process.cwd())
                if name in ("accelerate", "accelerate.commands.accelerate_cli") and rest[:1] == ["launch"]:
                    return ["accelerate", *rest], Path(process.cwd())
                if name in ("accelerate-launch", "accelerate.commands.launch"):
                    return ["accelerate", "launch", *rest], Path(process.cwd())
    except psutil.Error:  # another user's process, or one that has ended
        pass
    return None


def _command(launcher: tuple[list[str], Path] | None) -> str | None:
    """The command line of a script, without secrets; `None` in a notebook or an interactive session."""
    if not sys.argv or not sys.argv[0].endswith(".py"):
        return None
    # The interpreter's own words, where they are those of the script: they know `-m hf_eva` and options of Python.
    is_own = sys.orig_argv[-len(sys.argv) :] == sys.argv
    words = launcher[0] if launcher else ["python", *(sys.orig_argv[1:] if is_own else sys.argv)]
    arguments, hide_next = [], False
    for argument in words:
        name, equals, _ = argument.partition("=")
        secret = name.startswith("-") and not _SECRETS.isdisjoint(name.lstrip("-").replace("-", "_").split("_"))
        arguments.append("***" if hide_next else f"{name}=***" if secret and equals else argument)
        hide_next = secret and not equals
    return shlex.join(arguments)


def _accelerate_state() -> dict[str, Any]:
    state = AcceleratorState()
    return {
        "distributed_type": str(getattr(state.distributed_type, "value", state.distributed_type)),
        "num_processes": state.num_processes,
        "mixed_precision": state.mixed_precision,
    }


def _accelerate_config(launcher: tuple[list[str], Path] | None) -> dict[str, Any] | None:
    """Name and contents of the configuration file that `accelerate launch` read, without addresses."""
    if launcher is None or launcher[0][0] != "accelerate":
        return None
    words, folder = launcher
    given = [word.partition("=") for word in words]
    names = ("--config_file", "--config-file")
    name = next(
        (value if equals else words[index + 1] for index, (flag, equals, value) in enumerate(given) if flag in names),
        default_config_file,
    )
    try:
        values = yaml.safe_load((folder / name).read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError):
        return None
    if not isinstance(values, dict):
        return None
    shown = {key: value for key, value in values.items() if value is not None and key != "main_process_ip"}
    return {"file": name if name != default_config_file else Path(name).name, "values": shown}
