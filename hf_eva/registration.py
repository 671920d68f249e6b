"""Makes `eva` an `--optim` of transformers. The only file that touches private names of transformers."""

from __future__ import annotations

import os
from typing import Any

import transformers
from torch import nn
from transformers import TrainingArguments

from .callbacks import EvaCallback
from .config import EvaConfig, parse_options
from .loss_scale import warn_of_loss_scale
from .optimizer import Eva
from .selection import plan

NAME = "eva"


def register() -> None:
    """
    Make `optim="eva"` valid for the stock `Trainer` and all its subclasses, on the command line and in Python.

    Options are given as `optim_args="rank=8,damping=0.03"`, layers are chosen with `optim_target_modules`. Trainings
    with it log what [`EvaCallback`] tells. Calling it again changes nothing; [`unregister`] takes it back. It holds
    for one process: each process of a training calls it.

    Raises:
        RuntimeError: this version of transformers has no table of optimizers that could be extended.
    """
    names, handlers, callbacks = _tables()
    if NAME in handlers:
        return
    member = str.__new__(names, NAME)
    member._name_, member._value_, member._sort_order_ = NAME.upper(), NAME, len(names._member_names_)
    names._member_map_[member._name_] = member
    names._member_names_.append(member._name_)
    # Looked up by its value it is a plain string, which is what TrainingArguments then hold: pickled, the member would
    # not load in a process that has not registered it.
    names._value2member_map_[NAME] = NAME
    handlers[NAME] = _handler
    callbacks.append(EvaCallback)  # ahead of those that report, which a trainer adds to its copy of the list


def unregister() -> None:
    """Take back what [`register`] did."""
    names, handlers, callbacks = _tables()
    if handlers.pop(NAME, None) is None:
        return
    callbacks.remove(EvaCallback)
    names._member_names_.remove(NAME.upper())
    del names._member_map_[NAME.upper()]
    del names._value2member_map_[NAME]


def eva_class_and_kwargs(args: TrainingArguments, model: nn.Module | None) -> tuple[type[Eva], dict[str, Any]]:
    """
    The optimizer class and its keyword arguments, in the form of `Trainer.get_optimizer_cls_and_kwargs`.

    Raises:
        ValueError: an option is unknown or out of range, a filter matches nothing, or the setup is not supported.
    """
    if model is None:
        raise ValueError("Eva needs the model to choose its layers: pass model= to get_optimizer_cls_and_kwargs.")
    _refuse_unsupported(args)
    config = getattr(args, "eva_config", None) or EvaConfig.from_options(parse_options(args.optim_args or ""))
    planned = plan(model, args.optim_target_modules, getattr(args, "eva_exclude", None), config)
    return Eva, {
        "lr": args.learning_rate,
        "betas": (args.adam_beta1, args.adam_beta2),
        "eps": args.adam_epsilon,
        "plan": planned,
        "config": config,
    }


def _refuse_unsupported(args: TrainingArguments) -> None:
    if args.deepspeed:
        raise ValueError("optim='eva' does not run under DeepSpeed, which owns the gradients: use DDP or FSDP2.")
    if _fsdp_version(args) == 1:
        raise ValueError(
            "optim='eva' does not run under FSDP1, which flattens weights: use FSDP2 (version 2 in `fsdp_config`, "
            "`--fsdp_version 2` of `accelerate launch`) or DDP."
        )
    if args.parallel_mode.value == "not_distributed":
        raise ValueError(
            f"optim='eva' does not run under nn.DataParallel, which was chosen because {args.n_gpu} GPUs are visible: "
            "start the script with `accelerate launch` or `torchrun`, or set CUDA_VISIBLE_DEVICES=0."
        )


def _fsdp_version(args: TrainingArguments) -> int:
    """The version of FSDP that the arguments or the launcher ask for; 0 without it."""
    if not args.fsdp and os.environ.get("ACCELERATE_USE_FSDP", "false").lower() not in ("1", "true", "yes"):
        return 0
    plugin, config = (getattr(args, name, None) or {} for name in ("fsdp_plugin_args", "fsdp_config"))
    return int(plugin.get("fsdp_version") or config.get("version") or os.environ.get("FSDP_VERSION") or 1)


def _handler(context: Any) -> tuple[type[Eva], dict[str, Any]]:
    if context.args.process_index == 0:
        processes = context.args.world_size if context.args.average_tokens_across_devices else 1
        warn_of_loss_scale(context.model, context.args.gradient_accumulation_steps, processes)
    return eva_class_and_kwargs(context.args, context.model)


def _tables() -> tuple[Any, dict[str, Any], list[Any]]:
    """The enumeration of all values of `optim`, the function behind each, and the callbacks of every trainer."""
    try:
        from transformers.trainer import DEFAULT_CALLBACKS as callbacks
        from transformers.trainer_optimizer import _OPTIMIZER_HANDLERS as handlers
        from transformers.training_args import OptimizerNames as names

        # What is needed of an enumeration, beside the names that every dictionary has.
        _ = names._member_map_, names._member_names_, names._value2member_map_
    except (ImportError, AttributeError) as error:
        raise RuntimeError(
            f"cannot add 'eva' to the optimizers of transformers {transformers.__version__} ({error}): install "
            "transformers>=5.6,<6, or use hf_eva.EvaTrainer, which needs no registration."
        ) from error
    return names, handlers, callbacks
