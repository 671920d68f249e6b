"""The step of base `"adamw"`: momentum, preconditioned and scaled to AdamW's size, and AdamW for everything else."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from . import base, factors, formula
from .curvature import Seen, average, correction_of, observe
from .diagnostics import row_sums
from .layers import Layer, working_dtype
from .selection import momentum_dtype
from .shards import Routine, local, together
from .soundness import replace_unless_
from .stacks import Stack
from .step import Step

# Times the learning rate, for embeddings: beside layers whose steps reach further where curvature turns them, those of
# AdamW are short.
EMBEDDING_FACTOR = 2.0

_LEAST_MOMENTUM = 1e-300  # whose logarithm is finite


def adamw_step(step: Step) -> None:
    """Take a step of all parameters."""
    together(_adamw_stack(step, stack) for stack in step.stacks)
    planned = {id(weight) for stack in step.stacks for weight in stack.weights}
    low = momentum_dtype(step.config)
    for group in step.groups:
        others = [p for p in group["params"] if p.grad is not None and id(p) not in planned]
        embeddings = [parameter for parameter in others if id(parameter) in step.by_rows]
        squares = [step.sizes[id(parameter)].squares for parameter in embeddings]
        base.row_adamw_(embeddings, squares, step.state, group, EMBEDDING_FACTOR, step.sound, low)
        if len(embeddings) < len(others):
            base.adamw_([p for p in others if id(p) not in step.by_rows], step.state, group, step.sound)


def _adamw_stack(step: Step, stack: Stack) -> Routine[None]:
    config = step.config
    gradients = stack.gradients(step.scratch)
    sound = step.sound_on(gradients)
    seen = yield from observe(step, stack, gradients)
    momenta = [local(_momentum(step, layer)) for layer in stack.layers]
    base.momentum_(gradients.unbind(), momenta, config.momentum, config.nesterov, sound)
    scales = replace_unless_(sound, (yield from _precondition_and_scale_(step, stack, gradients, seen)), 0.0)
    lr, weight_decay = stack.group["lr"], stack.group["weight_decay"]
    for layer, update, scale in zip(stack.layers, gradients.unbind(), scales.unbind(), strict=True):
        rows = layer.kind.rows(scale, update.ndim)
        base.decoupled_(local(layer.weight), update, rows, lr, weight_decay, sound)


def _precondition_and_scale_(step: Step, stack: Stack, momenta: Tensor, seen: Seen) -> Routine[Tensor]:
    """Turn momenta into updates, in place; returns what their rows are multiplied with, of shape `(n, d_out)`."""
    matrices, (of_rows, of_columns), config = stack.kind.matrices(momenta), stack.part, step.config
    row_squares = formula.squared_row_norms(matrices)
    weights = torch.stack(torch._foreach_norm([local(layer.weight) for layer in stack.layers])).to(momenta.dtype)
    row_squares, weights = yield from of_columns.sum(row_squares, weights.square())
    momentum_squares, weights = yield from of_rows.sum(of_rows.spread(row_squares), weights)
    # What a momentum that started from zero is divided by, as in Adam; Nesterov's is one step ahead.
    steps = seen.updates + config.nesterov
    starts = -torch.expm1(steps * math.log(max(config.momentum, _LEAST_MOMENTUM)))
    corrections, noises = starts * seen.squares.sqrt(), factors.noise_shares(starts, config.momentum, config.nesterov)
    norms, numel = momentum_squares.sum(1).sqrt(), stack.layers[0].weight.numel()
    units = formula.inverse(corrections)
    sizes = norms * units
    largest = factors.largest_sizes(weights.sqrt(), numel, stack.group["lr"])
    trusts = factors.trusts(sizes, largest, noises)
    known = factors.Momenta(units, sizes, noises, trusts)
    correction = yield from correction_of(config, stack, matrices, None, seen, known)
    (grams,) = yield from of_columns.sum(correction.grams())
    squares, products = correction.squares(row_squares, grams), correction.products(row_squares)
    correction.apply_(matrices)
    squares, products = yield from of_rows.sum(of_rows.spread(squares), of_rows.spread(products))
    shares = average(step.state, stack, "eva_rows", factors.row_shares(squares), seen.weights)
    scales = factors.row_scales(squares, products, shares, norms, numel, sizes, largest)
    step.last.keep(stack, row_sums, momentum_squares, products, squares, scales)
    return of_rows.take(scales)


def _momentum(step: Step, layer: Layer) -> Tensor:
    weight, entry = layer.weight, step.state[layer.weight]
    if "momentum_buffer" not in entry:
        dtype = momentum_dtype(step.config) or working_dtype(weight)
        entry["momentum_buffer"] = torch.zeros_like(weight, dtype=dtype, memory_format=torch.contiguous_format)
    return entry["momentum_buffer"]
