"""The step of base `"sgd"`: preconditioned gradients, one control of their size, then SGD for all parameters."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import base, formula
from .config import EvaConfig
from .curvature import Seen, correction_of, observe
from .diagnostics import correction_squares, correction_sums, direction_sums
from .shards import Routine, together
from .stacks import Stack
from .step import Step


def sgd_step(step: Step) -> None:
    """Take a step of all parameters."""
    config = step.config
    done = together(_sgd_stack(step, stack) for stack in step.stacks)
    updates = [update for stack_updates, _, _ in done for update in stack_updates]
    norms = [norms for _, _, norms in done if norms]
    factor = step.last.factor = _size_factor(config, step.stacks, [inner for _, inner, _ in done], norms)
    if updates and factor is not None:
        torch._foreach_mul_(updates, factor)
    for group in step.groups:
        present = [parameter for parameter in group["params"] if parameter.grad is not None]
        if present:
            base.sgd_(present, step.state, group, config.momentum, config.nesterov, step.sound)


def _sgd_stack(step: Step, stack: Stack) -> Routine[tuple[list[Tensor], Tensor, tuple[Tensor, Tensor] | None]]:
    """The gradients that hold the directions, `⟨P, G⟩` per layer, and where they are wanted `‖G‖` and `‖P‖`."""
    gradients, biases = stack.gradients(step.scratch), (yield from stack.bias_gradients())
    seen = yield from observe(step, stack, gradients)
    inner, norms = yield from _precondition_(step, stack, gradients, biases, seen)
    return stack.write_gradients(gradients, biases), inner, norms


def _precondition_(
    step: Step, stack: Stack, gradients: Tensor, biases: Tensor | None, seen: Seen
) -> Routine[tuple[Tensor, tuple[Tensor, Tensor] | None]]:
    """Turn gradients into directions, in place; returns `⟨P, G⟩` per layer and, to rescale, `‖G‖` and `‖P‖`."""
    config, matrices = step.config, stack.kind.matrices(gradients)
    before = (yield from stack.norms(gradients, biases)) if config.kl_mode == "rescale" else None
    squares = formula.squared_norms(gradients)
    correction = yield from correction_of(config, stack, matrices, biases, seen, None)
    # For diagnostics, parts send a few more numbers along; of whole layers they are made when somebody asks.
    grams = [] if stack.is_whole else [correction.grams()]
    squares, *grams = yield from stack.part.columns.sum(squares, *grams)
    whole = squares if biases is None else squares + formula.squared_norms(biases)
    inner = whole + (correction.columns * correction.images).sum((1, 2))
    parts = [whole, correction_squares(correction, whole, grams[0], biases is not None)] if grams else []
    inner, squares, *parts = yield from stack.part.rows.sum(inner, squares, *parts)
    correction.apply_(matrices, biases)
    keeps_norms = config.variant == "eva_s" and config.curvature == "joint"
    if stack.is_whole:
        step.last.keep(stack, correction_sums, correction, whole, inner, biases is not None, keeps_norms)
    else:
        step.last.keep(stack, direction_sums, parts[0], inner, parts[1], keeps_norms)
    if keeps_norms:
        inner = inner * (yield from formula.restore_norms_(gradients, squares, stack.part))
    return inner, None if before is None else (before, (yield from stack.norms(gradients, biases)))


def _size_factor(
    config: EvaConfig, stacks: Sequence[Stack], inner: Sequence[Tensor], norms: Sequence[tuple[Tensor, Tensor]]
) -> Tensor | float | None:
    """What all directions together are multiplied with, see [`formula.eva`] for the share of the damping."""
    if config.kl_mode == "rescale" and stacks:
        return formula.rescale_factor(*zip(*norms, strict=True))
    scale = 1 / config.damping if config.divides_by_damping else 1.0
    if config.kl_mode == "clip" and stacks:
        return scale * formula.kl_factor(
            [values * scale for values in inner], [stack.group["lr"] for stack in stacks], config.kl_clip
        )
    return scale if config.divides_by_damping else None
