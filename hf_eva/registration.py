"""Makes `eva` an `--optim` of transformers. The only file that touches private names of transformers."""

from __future__ import annotations

import functools
from typing import Any

import transformers
from torch import nn
from transformers import TrainingArguments, training_args
from transformers.training_args import OptimizerNames, ParallelMode

from .config import EvaConfig, parse_options
from .optimizer import Eva
from .selection import plan

NAME = "eva"


def register() -> None:
    """
    Make `optim="eva"` valid for the stock `Trainer` and all its subclasses, on the command line and in Python.

    Options are given as `optim_args="rank=8,damping=0.03"`, layers are chosen with `optim_target_modules`. Calling it
    again changes nothing; [`unregister`] takes it back.

    Raises:
        RuntimeError: this version of transformers has no table of optimizers that could be extended.
    """
    handlers = _handlers()
    if NAME in handlers:
        return
    member = str.__new__(OptimizerNames, NAME)
    member._name_, member._value_ = NAME.upper(), NAME
    member.__objclass__ = OptimizerNames
    member._sort_order_ = len(OptimizerNames._member_names_)
    OptimizerNames._member_names_.append(member._name_)
    OptimizerNames._member_map_[member._name_] = member
    OptimizerNames._value2member_map_[NAME] = member
    handlers[NAME] = _handler
    TrainingArguments.__post_init__ = _with_plain_name(TrainingArguments.__post_init__)


def unregister() -> None:
    """Take back what [`register`] did."""
    handlers = _handlers()
    if handlers.pop(NAME, None) is None:
        return
    OptimizerNames._member_names_.remove(NAME.upper())
    del OptimizerNames._member_map_[NAME.upper()]
    del OptimizerNames._value2member_map_[NAME]
    TrainingArguments.__post_init__ = TrainingArguments.__post_init__.__wrapped__


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
    if args.fsdp:
        raise ValueError("optim='eva' does not run under FSDP, which shards gradients: use DDP.")
    if args.parallel_mode == ParallelMode.NOT_DISTRIBUTED:
        raise ValueError(
            f"optim='eva' does not run under nn.DataParallel, which was chosen because {args.n_gpu} GPUs are visible: "
            "start the script with `accelerate launch` or `torchrun`, or set CUDA_VISIBLE_DEVICES=0."
        )


def _handler(context: Any) -> tuple[type[Eva], dict[str, Any]]:
    return eva_class_and_kwargs(context.args, context.model)


def _handlers() -> dict[str, Any]:
    try:
        from transformers.trainer_optimizer import _OPTIMIZER_HANDLERS
    except ImportError:
        raise RuntimeError(
            f"hf_eva does not know how to register itself with transformers {transformers.__version__}, which has no "
            "transformers.trainer_optimizer: install transformers>=5.6,<6, or use hf_eva.EvaTrainer."
        ) from None
    handlers: dict[str, Any] = _OPTIMIZER_HANDLERS
    return handlers


def _with_plain_name(post_init: Any) -> Any:
    """`__post_init__` that leaves `optim` a plain string: the enum member could not be unpickled without hf_eva."""

    @functools.wraps(post_init)
    def wrapped(self: training_args.TrainingArguments) -> None:
        post_init(self)
        if self.optim == NAME:
            self.optim = NAME

    return wrapped
