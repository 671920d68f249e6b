"""From a model to its optimizer in one call."""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import nn

from .config import EvaConfig
from .optimizer import Eva
from .selection import Filter, plan

logger = logging.getLogger(__name__)


def create_eva_optimizer(
    model: nn.Module,
    lr: float = 1e-3,
    weight_decay: float = 0.0,
    config: EvaConfig | None = None,
    *,
    include: Filter | None = None,
    exclude: Filter | None = None,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    foreach: bool | None = None,
    fused: bool | None = None,
    grad_scaler: torch.amp.GradScaler | None = None,
) -> Eva:
    """
    One optimizer for all trainable parameters of a model, ready for `accelerator.prepare`.

    Args:
        model (`nn.Module`): the model, before it is prepared or compiled.
        lr (`float`, defaults to 1e-3): learning rate; AdamW's carries over.
        weight_decay (`float`, defaults to 0.0): for weight matrices; biases and the parameters of norms get none.
        config ([`EvaConfig`], *optional*): defaults to the recipe, `EvaConfig()`.
        include, exclude (`str` or list of `str`, *optional*): which layers to precondition, see [`plan`].
        betas, eps, foreach, fused, grad_scaler: see [`Eva`].

    Raises:
        ValueError: a filter matches nothing, the model has no layer to precondition, or a value is out of range.

    Example:

    ```python
    optimizer = create_eva_optimizer(model, lr=3e-4, weight_decay=0.01)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    ```
    """
    planned = plan(model, include, exclude, config)
    logger.info("Eva: %s", planned.summary())
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups: list[dict[str, Any]] = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    return Eva(
        [group for group in groups if group["params"]],
        lr=lr,
        betas=betas,
        eps=eps,
        plan=planned,
        config=config,
        foreach=foreach,
        fused=fused,
        grad_scaler=grad_scaler,
    )
