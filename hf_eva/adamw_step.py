"""The step of base `"adamw"`: momentum, preconditioned and scaled by AdamW's size, and AdamW for everything else."""

from __future__ import annotations

import torch
from torch import Tensor

from . import base, factors, formula
from .curvature import Seen, correction_of, observe
from .diagnostics import row_sums
from .layers import Layer, working_dtype
from .routines import Routine, at_once, together
from .selection import momentum_dtype
from .shards import local
from .soundness import replace_unless_, squared_norms_of
from .stacks import Stack
from .step import Step

EMBEDDING_FACTOR = 6.0  # times the learning rate: embeddings have to keep up with the layers


def adamw_step(step: Step) -> None:
    """Take a step of all parameters."""
    for wave in step.waves():
        together(_adamw_stack(step, stack) for stack in wave)
    planned = {id(weight) for stack in step.stacks for weight in stack.weights}
    embedded, low = step.by_rows | step.tables, momentum_dtype(step.config)
    for group in step.groups:
        others = [p for p in group["params"] if p.grad is not None and id(p) not in planned]
        embeddings = [parameter for parameter in others if id(parameter) in step.by_rows]
        squares = [step.sizes[id(parameter)].squares for parameter in embeddings]
        far = base.longer(group, EMBEDDING_FACTOR)
        base.row_adamw_(embeddings, squares, step.state, far, step.sound, low)
        tables = [parameter for parameter in others if id(parameter) in step.tables]
        rest = [parameter for parameter in others if id(parameter) not in embedded]
        for parameters, options in ((tables, far), (rest, group)):
            if parameters:
                base.adamw_(parameters, step.state, options, step.sound)


def _adamw_stack(step: Step, stack: Stack) -> Routine[None]:
    config = step.config
    gradients = stack.gradients(step.scratch)
    sound = step.sound_on(gradients)
    seen = yield from observe(step, stack, gradients)
    momenta = [local(_momentum(step, layer)) for layer in stack.layers]
    base.momentum_(gradients.unbind(), momenta, config.momentum, config.nesterov, sound)
    correction, scales = yield from _correction_and_scales(step, stack, gradients, seen)
    correction.apply_(stack.kind.matrices(gradients))
    by_layer = replace_unless_(sound, scales, 0.0).unbind()
    base.decoupled_(
        [local(weight) for weight in stack.weights],
        gradients.unbind(),
        [stack.kind.rows(scale, gradients.ndim - 1) for scale in by_layer],
        stack.group["lr"],
        stack.group["weight_decay"],
        sound,
    )


def _correction_and_scales(
    step: Step, stack: Stack, momenta: Tensor, seen: Seen
) -> Routine[tuple[formula.Correction, Tensor]]:
    """What turns momenta into updates, and what the rows of these are multiplied with, of shape `(n, d_out)`."""
    matrices, (of_rows, of_columns), config = stack.kind.matrices(momenta), stack.part, step.config
    row_squares = formula.squared_row_norms(matrices)
    weights = torch.stack(squared_norms_of([local(weight) for weight in stack.weights]))
    row_squares, weights = yield from of_columns.sum(row_squares, weights)
    momentum_squares, weights = yield from of_rows.sum(of_rows.spread(row_squares), weights)
    # All sizes go by the root of this number, and a step of some layers is longer than its entries would make it.
    mixed, numel = momentum_squares.sum(1), stack.layers[0].weight.numel() * stack.reach**2
    norms, largest = mixed.sqrt(), factors.largest_sizes(weights.sqrt(), numel, stack.group["lr"])
    agreements = yield from _agreements(step, stack, seen, mixed)
    (found,) = yield from at_once(
        factors.momenta_of,
        (norms, seen.squares, seen.updates, largest, agreements),
        momentum=config.momentum,
        nesterov=config.nesterov,
    )
    known = factors.Momenta(*found)
    correction = yield from correction_of(config, stack, matrices, None, seen, known)
    (grams,) = yield from of_columns.sum(correction.grams())
    squares, products = correction.squares(row_squares, grams), correction.products(row_squares)
    squares, products = yield from of_rows.sum(of_rows.spread(squares), of_rows.spread(products))
    ((shares, scales),) = yield from at_once(
        _shares_and_scales,
        (
            squares,
            products,
            stack.read(step.state, "eva_rows"),
            seen.weights,
            norms,
            norms.new_full(norms.shape, numel),
            known.sizes,
            largest,
        ),
    )
    stack.write(step.state, "eva_rows", shares)
    step.last.keep(stack, row_sums, momentum_squares, products, squares, scales)
    return correction, of_rows.take(scales)


def _agreements(step: Step, stack: Stack, seen: Seen, mixed: Tensor) -> Routine[Tensor]:
    """How far gradients confirm momenta, 1 where nothing depends on it; `mixed` as in [`factors.follow_momenta`]."""
    if "eva_agreement" not in step.state[stack.weights[0]]:
        return torch.ones_like(mixed)
    momenta, averages = (stack.read(step.state, key) for key in ("eva_momentum_square", "eva_agreement"))
    ((new_momenta, new_averages, agreements),) = yield from at_once(
        factors.follow_momenta,
        (momenta, averages, seen.newest, mixed, seen.updates, seen.weights),
        momentum=step.config.momentum,
        nesterov=step.config.nesterov,
    )
    stack.write(step.state, "eva_momentum_square", replace_unless_(step.sound_on(mixed), new_momenta, momenta))
    stack.write(step.state, "eva_agreement", new_averages)
    return agreements


def _shares_and_scales(
    squares: Tensor, products: Tensor, averages: Tensor, weights: Tensor, *others: Tensor
) -> tuple[Tensor, Tensor]:
    shares = formula.averaged(averages, factors.row_shares(squares), weights)
    return shares, factors.row_scales(squares, products, shares, *others)


def _momentum(step: Step, layer: Layer) -> Tensor:
    weight, entry = layer.weight, step.state[layer.weight]
    if "momentum_buffer" not in entry:
        dtype = momentum_dtype(step.config) or working_dtype(weight)
        entry["momentum_buffer"] = torch.zeros_like(weight, dtype=dtype, memory_format=torch.contiguous_format)
    return entry["momentum_buffer"]
