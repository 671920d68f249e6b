"""
The step of base `"sgd"`: SGD for all parameters, with preconditioned gradients for the layers, of one controlled size.

A first pass over the layers finds what turns each gradient into a direction, and how large all of them are together.
Only then are weights and momentum touched, and mostly without a direction being written down.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from . import base, formula
from .config import EvaConfig
from .curvature import correction_of, observe
from .routines import Routine, together
from .shards import local
from .stacks import Stack
from .step import Step


class _Directions(NamedTuple):
    """
    What turns the gradients of a stack into `P = scales (G + columns @ rows)`, the gradients of its biases, and
    `‖G‖²`, `⟨P, G⟩` and `‖P‖²` of each layer.
    """

    correction: formula.Correction
    scales: Tensor
    biases: Tensor | None
    squares: Tensor
    products: Tensor
    direction_squares: Tensor


def sgd_step(step: Step) -> None:
    """Take a step of all parameters."""
    config = step.config
    stacks: list[Stack] = []
    found: list[_Directions] = []
    for wave in step.waves():
        stacks += wave
        found += together(_directions(step, stack) for stack in wave)
    factor = step.last.factor = _size_factor(config, stacks, found)
    done: set[int] = set()
    for stack, directions in zip(stacks, found, strict=True):
        done |= _take(step, stack, directions, 1.0 if factor is None else factor)
    for group in step.groups:
        others = [p for p in group["params"] if p.grad is not None and id(p) not in done]
        if others:
            base.sgd_(others, step.state, group, config.momentum, config.nesterov, step.sound)


def _directions(step: Step, stack: Stack) -> Routine[_Directions]:
    config = step.config
    biases = yield from stack.bias_gradients()
    if config.needs_products_only:
        gradients: formula.Stacked = stack.gradients_apart()
        matrices: formula.Stacked = [stack.kind.matrix(gradient) for gradient in gradients]
    else:
        gradients = stack.gradients(step.scratch)
        matrices = stack.kind.matrices(gradients)
    seen = yield from observe(step, stack, gradients)
    correction = yield from correction_of(config, stack, matrices, biases, seen, None)
    squares, products, after = yield from correction.sums(step.squares_of(stack.weights), biases, stack.part)
    scales = torch.ones_like(squares)
    if config.variant == "eva_s" and config.curvature == "joint":
        scales = formula.norm_ratios(squares, after)
        products, after = products * scales, squares
    step.last.keep(stack, torch.stack, (squares, products, after), 1)
    return _Directions(correction, scales, biases, squares, products, after)


def _size_factor(config: EvaConfig, stacks: Sequence[Stack], found: Sequence[_Directions]) -> Tensor | float | None:
    """What all directions together are multiplied with, see [`formula.eva`] for the share of the damping."""
    if config.kl_mode == "rescale" and stacks:
        return formula.rescale_factor([d.squares.sqrt() for d in found], [d.direction_squares.sqrt() for d in found])
    scale = 1 / config.damping if config.divides_by_damping else 1.0
    if config.kl_mode == "clip" and stacks:
        return scale * formula.kl_factor(
            [directions.products * scale for directions in found],
            [stack.group["lr"] for stack in stacks],
            config.kl_clip,
        )
    return scale if config.divides_by_damping else None


def _take(step: Step, stack: Stack, directions: _Directions, factor: Tensor | float) -> set[int]:
    """
    Take the step of the weights whose memory allows it, and return their ids. Of all others, and of biases, `.grad`
    holds the direction afterwards.
    """
    (columns, rows, _), scales, config = directions.correction, directions.scales * factor, step.config
    columns = columns * scales.view(-1, 1, 1)
    if directions.biases is not None:
        stack.write_bias_gradients(directions.biases * scales.unsqueeze(1) + columns.sum(2))
    left, right = (rows.mT, columns.mT) if stack.kind.is_transposed else (columns, rows)
    done = set()
    for weight, one, other, scale in zip(stack.weights, left, right, scales, strict=True):
        assert weight.grad is not None
        grad, tensors = local(weight.grad), [weight.detach(), weight.grad]
        if config.momentum:
            tensors.append(base.sgd_buffer(weight, step.state))
        matrices = [local(tensor) for tensor in tensors]
        # Elsewhere a few operations on all tensors at once cost less than some on each.
        is_direct = step.sound is None and grad.device.type == "cpu"
        if is_direct and all(matrix.is_contiguous() and matrix.dtype == columns.dtype for matrix in matrices):
            matrices = [matrix.flatten(1) for matrix in matrices]
            base.directed_sgd_(matrices, one, other, scale, stack.group, config.momentum, config.nesterov)
            done.add(id(weight))
        else:
            base.direct_(grad, one, other, scale)
    return done
