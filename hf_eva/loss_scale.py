"""
How a mean loss is put together from the micro-batches of a window.

Trainer counts the items (labels) of all micro-batches and expects the model to divide by their number. Many models
take the mean over each micro-batch instead. Trainer looks at signatures only and so takes most of them for models that
divide: their gradients are then too large by the number of micro-batches and of processes.
"""

from __future__ import annotations

import ast
import inspect
import logging
import textwrap
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

logger = logging.getLogger(__name__)

COUNT = "num_items_in_batch"
IGNORED = -100  # the label that counts for no loss of transformers


def ignores_item_count(model: nn.Module) -> bool:
    """
    Whether a model's forward pass leaves `num_items_in_batch` alone: it neither names it nor hands its keyword
    arguments to a `loss_function` of transformers, which divides by it. Where the code cannot be read it counts as one
    that does, because a mean over a micro-batch can be weighted and a sum cannot.
    """
    tree = _code(inspect.unwrap(type(_base_model(model)).forward))
    return tree is None or not any(_names_count(node) or _hands_on(node, "loss_function") for node in ast.walk(tree))


def hides_item_count(compute_loss: Any) -> bool:
    """Whether a trainer's own `compute_loss` neither reads `num_items_in_batch` nor hands all its arguments on."""
    tree = _code(compute_loss)
    return tree is not None and not any(
        _names_count(node) or _hands_on(node, "compute_loss") for node in ast.walk(tree)
    )


def _names_count(node: ast.AST) -> bool:
    """As a variable, a keyword or a key, but not among the arguments of the function."""
    return not isinstance(node, ast.arg) and COUNT in (getattr(node, name, "") for name in ("id", "arg", "value"))


def _hands_on(node: ast.AST, function: str) -> bool:
    """Whether the arguments that are not named go to a method of this name."""
    if not isinstance(node, ast.Call) or getattr(node.func, "attr", "") != function:
        return False
    return any(keyword.arg is None for keyword in node.keywords) or any(isinstance(a, ast.Starred) for a in node.args)


def _code(function: Any) -> ast.AST | None:
    try:
        return ast.parse(textwrap.dedent(inspect.getsource(function)))
    except (OSError, TypeError, SyntaxError):
        return None


def count_items(batch: Mapping[str, Any], names: Iterable[str] = ()) -> Tensor | None:
    """Over how many labels of a batch its mean loss is taken, as a 0-dim tensor; `None` where labels are no tensor."""
    labels: Any = next((batch[name] for name in ("labels", *names) if name in batch), None)
    if not isinstance(labels, Tensor):
        return None
    return torch.tensor(labels.numel()) if labels.is_floating_point() else labels.ne(IGNORED).sum()


def is_always_a_mean(model: nn.Module, batch: Mapping[str, Any]) -> bool:
    """Whether the loss is a regression's or that of several labels at once, which is no sum over items."""
    config = getattr(model, "config", None)
    problem, labels = getattr(config, "problem_type", None), batch.get("labels")
    if problem is not None:
        return problem in ("regression", "multi_label_classification")
    is_classifier = "Classification" in str(getattr(model, "loss_type", None))
    has_numbers = isinstance(labels, Tensor) and labels.is_floating_point()
    return has_numbers or (is_classifier and getattr(config, "num_labels", None) == 1)


def share_of_window(loss: Tensor, items: Tensor, window_items: Tensor, micro_batches: int) -> Tensor:
    """
    The mean loss of one micro-batch, scaled so that the mean over a window's micro-batches is the mean over its items.

    Args:
        loss (0-dim `Tensor`): mean over `items`; whatever it is where there are none.
        items, window_items (0-dim `Tensor`): labels in the micro-batch and in the whole window.
        micro_batches (`int`): how many the window has.
    """
    share: Any = (items * micro_batches / window_items).to(loss.device, loss.dtype)
    return torch.where(items.to(loss.device) > 0, loss * share, torch.zeros_like(loss))


def warn_of_loss_scale(model: nn.Module, micro_batches: int, processes: int) -> None:
    """Say that the stock Trainer makes the gradients of this model too large, where it does."""
    factor = micro_batches * processes
    if factor > 1 and _takes_any_argument(model) and ignores_item_count(model):
        logger.warning(
            "%s takes the mean loss of each batch by itself, but Trainer expects it to divide by the number of labels "
            "in all %d batches of a step: its gradients and the losses that it logs are %d times too large, which "
            "gradient clipping and absolute damping notice. hf_eva.EvaTrainer corrects it, for any optimizer.",
            type(model).__name__,
            factor,
            factor,
        )


def _takes_any_argument(model: nn.Module) -> bool:
    """What Trainer takes for a sign that a model counts items."""
    base = _base_model(model)
    if hasattr(base, "accepts_loss_kwargs"):
        return bool(base.accepts_loss_kwargs)
    return any(p.kind is p.VAR_KEYWORD for p in inspect.signature(base.forward).parameters.values())


def _base_model(model: Any) -> Any:
    """The model inside a PEFT model."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model
