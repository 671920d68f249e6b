"""
Capture in compiled graphs, without a break: what hooks do there becomes a part of the graph.

A layer's output passes an identity that has a second argument, the layer's *anchor*. Its backward pass gives the sums
to the anchor as its gradient, so that autograd adds them up as it does for weights, outside of all graphs. The `.grad`
of an anchor is the layer's slot in the buffer of the [`Capture`].
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .layers import LayerKind, Sample, Wanted, working_dtype
from .masks import MaskScope


def anchor_of(slot: Tensor, committed: Callable[[], None]) -> Tensor:
    """The anchor of a slot; `committed` is called after each backward pass that has added to it."""
    anchor = torch.empty_like(slot, requires_grad=True)
    anchor.grad = slot
    anchor.register_post_accumulate_grad_hook(partial(_forward_call, committed))
    return anchor


def _forward_call(committed: Callable[[], None], anchor: Tensor) -> None:
    committed()


def before_model(scope: MaskScope, mask_padding: bool, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """What the hook of a model does in a graph. Windows begin and end outside of it."""
    if mask_padding:
        scope.enter(args, kwargs)


def after_layer(
    kind: LayerKind,
    anchor: Tensor,
    scope: MaskScope,
    index: int,
    wanted: Wanted,
    module: nn.Module,
    args: Any,
    kwargs: Any,
    output: Tensor,
) -> Tensor | None:
    """What the hook of a layer does in a graph; returns the output, tied to the layer's anchor."""
    x = args[0] if args else next(iter(kwargs.values()))
    rows = scope.rows(index, x)
    if isinstance(rows, str) and rows == "none":
        return None
    with torch.no_grad():
        real = None if isinstance(rows, str) else rows
        weight = module.weight
        assert isinstance(weight, Tensor)
        sample = wanted.sample(kind, x)
        sums = sample.input_sums(module, x.detach(), working_dtype(weight), real)
    tied: Tensor = _Tie.apply(output, anchor, sums, sample, wanted.output_gradients)  # type: ignore[no-untyped-call]
    return tied


class _Tie(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, output: Tensor, anchor: Tensor, sums: Tensor, sample: Sample, with_output_gradients: bool
    ) -> Tensor:
        ctx.save_for_backward(sums, anchor)
        ctx.sample, ctx.with_output_gradients = sample, with_output_gradients
        ctx.mark_dirty(output)  # it is the same tensor, also for what works in place on it
        return output

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        sums, anchor = ctx.saved_tensors
        if ctx.with_output_gradients:
            sums = torch.cat([sums, ctx.sample.output_gradient_sums(grad, sums.dtype)])
        # A model that has been moved has new anchors after its next step.
        return grad, sums.to(anchor), None, None, None
