"""`EvaTrainer`: the stock Trainer with Eva, its times in the logs and in the model card."""

from __future__ import annotations

import copy
import dataclasses
import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_type_hints

import torch
from torch import Tensor
from transformers import Trainer, TrainingArguments

from .callbacks import EvaCallback, shorten_lines_of
from .checkpoints import last_checkpoint
from .config import PRESETS, EvaConfig, parse_options
from .facts import run_facts, run_of, save_facts
from .loss_scale import COUNT, count_items, hides_item_count, ignores_item_count, is_always_a_mean, share_of_window
from .model_card import write_training_section
from .registration import NAME, eva_class_and_kwargs
from .runs import STATE_FILE, Run, compare, read_facts


def _flags() -> type:
    """One optional argument `eva_<field>` for every field of [`EvaConfig`]; `None` stands for the preset's value."""
    types, help_texts = get_type_hints(EvaConfig), EvaConfig.help()
    return dataclasses.make_dataclass(
        "_Flags",
        [
            (
                f"eva_{f.name}",
                types[f.name] | None,
                field(default=None, metadata={"help": f"{help_texts[f.name]} Recipe: {f.default}."}),
            )
            for f in dataclasses.fields(EvaConfig)
        ],
    )


@dataclass
class EvaTrainingArgumentsMixin(_flags()):  # type: ignore[misc]
    """
    What makes [`EvaTrainingArguments`] of the arguments of any trainer, whose own defaults stay:

    ```python
    @dataclass
    class MySFTConfig(EvaTrainingArgumentsMixin, SFTConfig):
        pass
    ```

    Raises:
        ValueError: an option of Eva is unknown or out of range, or `baseline_run` is no run that was evaluated.
    """

    optim: str = field(
        default=NAME,
        metadata={"help": "The optimizer: 'eva', or any optimizer of TrainingArguments, such as 'adamw_torch_fused'."},
    )
    eva_preset: Literal[PRESETS] = field(  # type: ignore[valid-type]
        default="recipe",
        metadata={"help": "What the eva options start from: the recipe for transformers or a published algorithm."},
    )
    eva_exclude: list[str] | None = field(
        default=None,
        metadata={"help": "Layers not to precondition, as names, parts of names or regular expressions."},
    )
    eva_log_layers: bool = field(
        default=True,
        metadata={
            "help": "Log how strongly each layer is preconditioned, as eva_strength/<layer>, beside the mean. What is "
            "printed leaves it out."
        },
    )
    baseline_run: str | None = field(
        default=None,
        metadata={
            "help": "Output folder of an earlier run: the model card reports the time to its last evaluation loss."
        },
    )

    def __post_init__(self) -> None:
        with self._stock_optim():
            super().__post_init__()
        if self.optim == NAME:
            self.eva_config  # noqa: B018  raises here, and not when the training starts
        if self.baseline_run and self.process_index == 0:
            baseline = Run.read(self.baseline_run)
            compare(baseline, baseline)  # raises here, and not when the training is over

    @property
    def eva_config(self) -> EvaConfig | None:
        """The config that `eva_preset`, `optim_args` and `eva_*` describe; `None` for other optimizers."""
        if self.optim != NAME:
            return None
        flags = {f.name: getattr(self, f"eva_{f.name}") for f in dataclasses.fields(EvaConfig)}
        given = {name: value for name, value in flags.items() if value is not None}
        return EvaConfig.from_options({"preset": self.eva_preset, **parse_options(self.optim_args or ""), **given})

    def set_optimizer(self, name: str = NAME, **kwargs: Any) -> EvaTrainingArgumentsMixin:
        with self._stock_optim(name):
            super().set_optimizer(self.optim, **kwargs)
        return self

    @contextmanager
    def _stock_optim(self, name: str | None = None) -> Iterator[None]:
        """Hide the name that the stock class does not know while it checks all others."""
        self.optim = self.optim if name is None else name
        is_eva = self.optim == NAME
        if is_eva:
            self.optim = "adamw_torch"
        yield
        if is_eva:
            self.optim = NAME


@dataclass
class EvaTrainingArguments(EvaTrainingArgumentsMixin, TrainingArguments):
    """
    `TrainingArguments` with `optim="eva"` and an argument `eva_<field>` for every field of [`EvaConfig`]. Every other
    `optim` works as in `TrainingArguments`. Layers are chosen with `optim_target_modules` and `eva_exclude`.

    Raises:
        ValueError: an option of Eva is unknown or out of range.
    """


# Where Trainer looks for parameter groups among the arguments of an optimizer, before it makes its own.
PARAMETERS = ("params", "model", "optimizer_dict")

# Any trainer of transformers or built on it stands here at run time.
_AnyTrainer: Any = object


class EvaTrainerMixin(_AnyTrainer):
    """
    What makes an [`EvaTrainer`] of any trainer: `class MySFTTrainer(EvaTrainerMixin, SFTTrainer): ...`.

    It creates the optimizer where `args.optim` is `"eva"`, logs the time per step and the optimizer's share of it
    beside what `Eva.diagnostics` tells, and adds the section "Training time" to the model card, also for other
    optimizers. With any of them micro-batches count by their labels where the model does not divide its loss by the
    number of all, as Trainer expects.

    `card_defaults` holds arguments of `create_model_card` for every card of this trainer: those that `push_to_hub`
    writes, those that a script asks for and those written by hand.
    """

    # Attributes of Trainer.
    model_accepts_loss_kwargs: bool
    compute_loss_func: Any

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.card_defaults: dict[str, Any] = {}
        # In a trainer built after `register()` there is one.
        if not any(isinstance(callback, EvaCallback) for callback in self.callback_handler.callbacks):
            self.add_callback(EvaCallback())
        for callback in self.callback_handler.callbacks:
            shorten_lines_of(callback)
        self._window: tuple[Tensor, int] | None = None
        model = self.accelerator.unwrap_model(self.model)
        smoother = getattr(self, "label_smoother", None)
        own = [vars(cls)["compute_loss"] for cls in type(self).__mro__ if "compute_loss" in vars(cls)]
        if self.model_accepts_loss_kwargs and (
            ignores_item_count(model)
            or any(map(hides_item_count, own))
            or (smoother is not None and COUNT not in inspect.signature(smoother.__call__).parameters)
        ):
            # Then Trainer divides by the number of micro-batches, and `compute_loss` weighs each of them.
            self.model_accepts_loss_kwargs = False

    def train(self, resume_from_checkpoint: Any = None, *args: Any, **kwargs: Any) -> Any:
        if resume_from_checkpoint is True:  # Trainer would take the newest, whole or not
            resume_from_checkpoint = last_checkpoint(self.args.output_dir) or True
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        # One that is written over is not whole from the first file on.
        folder = Path(self._get_output_dir(trial=trial), f"checkpoint-{self.state.global_step}")
        if self.args.should_save:
            (folder / STATE_FILE).unlink(missing_ok=True)
        self.accelerator.wait_for_everyone()
        super()._save_checkpoint(model, trial)

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        # The state of the trainer is written next, and says that every process has written its files.
        self.accelerator.wait_for_everyone()

    def get_optimizer_cls_and_kwargs(self, args: TrainingArguments, model: Any = None) -> tuple[Any, Any]:
        if args.optim != NAME:
            optimizer: tuple[Any, Any] = super().get_optimizer_cls_and_kwargs(args, model)
            return optimizer
        cls, options = eva_class_and_kwargs(args, model)
        # A trainer may give parameters of its own, such as those of a loss: it is asked with a name that it knows.
        stock = copy.copy(args)
        stock.optim = "adamw_torch"
        _, stock_options = super().get_optimizer_cls_and_kwargs(stock, model)
        return cls, {**options, **{name: stock_options[name] for name in PARAMETERS if name in stock_options}}

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: Any) -> tuple[list[Any], Any]:
        batches, num_items = super().get_batch_samples(epoch_iterator, num_batches, device)
        self._window = None
        if not batches or self.compute_loss_func is not None:
            return batches, num_items
        if is_always_a_mean(self.model, batches[0]):
            num_items = None
        counts = [items.to(device) for batch in batches if (items := count_items(batch, self.label_names)) is not None]
        if num_items is None and len(counts) == len(batches):
            total = torch.stack(counts).sum()
            if self.args.average_tokens_across_devices and self.args.world_size > 1:
                total = self.accelerator.gather(total).sum() / self.args.world_size
            self._window = total, len(batches)
        return batches, num_items

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None, **kwargs: Any
    ) -> Any:
        items = count_items(inputs, self.label_names)  # before Trainer takes labels out of the inputs
        if self.compute_loss_func is None and is_always_a_mean(self.model, inputs):
            num_items_in_batch = None
        result = super().compute_loss(
            model, inputs, return_outputs=return_outputs, num_items_in_batch=num_items_in_batch, **kwargs
        )
        if not model.training or self._window is None or items is None:
            return result
        loss, *outputs = result if return_outputs else (result,)
        loss = share_of_window(loss, items, *self._window)
        return (loss, *outputs) if return_outputs else loss

    @property
    def eva_callback(self) -> EvaCallback:
        """The callback that times this trainer and tells what Eva does in it."""
        return next(cb for cb in self.callback_handler.callbacks if isinstance(cb, EvaCallback))

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if "loss" in logs:
            logs.update(self.eva_callback.interval(getattr(self.args, "eva_log_layers", True)))
        elif "train_runtime" in logs:
            logs.update(self.eva_callback.summary())
        super().log(logs, *args, **kwargs)

    def save_state(self) -> None:
        super().save_state()
        if self.is_world_process_zero() and self.eva_callback.times.steps:
            save_facts(self._facts(), Path(self.args.output_dir))

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        described = kwargs if args else {**self.card_defaults, **kwargs}
        super().create_model_card(*args, **described)
        if self.is_world_process_zero():
            folder, is_trained = Path(self.args.output_dir), self.eva_callback.times.steps > 0
            # A trainer that has not trained describes the training that its folder tells of, if any.
            facts = self._facts() if is_trained else read_facts(folder)
            if facts:
                run = run_of(self, facts) if is_trained else Run.read(folder)
                write_training_section(run, facts, self._baseline(), described)
                save_facts(facts, folder)

    def _facts(self) -> dict[str, Any]:
        callbacks = self.callback_handler.callbacks
        return run_facts(self.eva_callback, self.args, self.state, self.optimizer, callbacks)

    def _baseline(self) -> Run | None:
        folder = getattr(self.args, "baseline_run", None)
        return Run.read(folder) if folder else None


class EvaTrainer(EvaTrainerMixin, Trainer):
    """The stock `Trainer`, with the same arguments, whose `optim` may be `"eva"`; see [`EvaTrainerMixin`]."""
