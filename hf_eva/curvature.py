"""What is known of the curvature of layers: its running averages, and the correction that they give a gradient."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from . import factors, formula, subspaces
from .capture import Statistics
from .config import EvaConfig
from .layers import Layer, working_dtype
from .routines import Routine, at_once
from .selection import statistics_shapes
from .stacks import Stack, State
from .step import Step

# Steps in which a layer's first gradient is looked for, because a look costs time: LoRA's A gets its first one at the
# second step, beside a B of zeros. Where it comes later, subspaces are found by the running averages alone.
SEARCH_STEPS = 3

# What is averaged of the tokens that layers receive and of the gradients that they get back.
OF_TOKENS = ("eva_a", "eva_a_square", "eva_g", "eva_g_square")


def is_refreshed(number: int, config: EvaConfig) -> bool:
    """Whether the step of this number, from 1, brings curvature up to date."""
    return number <= SEARCH_STEPS or (number - 1) % config.refresh_interval == 0


@dataclasses.dataclass
class Seen:
    """
    What a step knows of the n layers of a stack after it has seen their gradients.

    `weights` and `updates` are this step's weight in running averages and the number of steps that count in them, of
    shape `(n,)`; `newest` is `‖G‖²`, and `squares` its average, where one is kept. `vectors` (curvature `"joint"`) and
    `factors` (`"factored"`) are the curvature.
    """

    weights: Tensor
    updates: Tensor
    newest: Tensor
    squares: Tensor
    vectors: list[Tensor] = dataclasses.field(default_factory=list)
    factors: dict[str, factors.Factor] = dataclasses.field(default_factory=dict)


def observe(step: Step, stack: Stack, gradients: formula.Stacked) -> Routine[Seen]:
    """Bring the running averages up to date, between two refreshes those alone that the size of a step depends on."""
    is_new = [_create_statistics(step.state, layer, step.config) for layer in stack.layers]
    squares = step.squares_of(stack.weights)
    valid = squares > 0 if step.sound is None else (squares > 0) & step.sound.to(squares.device)
    if step.config.needs_inputs:
        return (yield from _observe_tokens(step, stack, squares, valid))
    return (yield from _observe_gradients(step, stack, gradients, squares, valid, step.refreshes or any(is_new)))


def average(state: State, stack: Stack, key: str, values: Tensor, weights: Tensor) -> Tensor:
    """The running averages of a statistic, with new values that have these weights."""
    averages = formula.averaged(stack.read(state, key), values, weights)
    stack.write(state, key, averages)
    return averages


def correction_of(
    config: EvaConfig,
    stack: Stack,
    matrices: formula.Stacked,
    biases: Tensor | None,
    seen: Seen,
    momenta: factors.Momenta | None = None,
) -> Routine[formula.Correction]:
    """What preconditions gradients, or momenta, as variant and curvature have it."""
    relative = config.damping_mode == "relative"
    if config.curvature == "factored":
        output, input = seen.factors.get("eva_g"), seen.factors.get("eva_a")
        assert isinstance(matrices, Tensor)
        known = momenta if config.variant == "eva_s" else None
        return factors.factored(matrices, output, input, config.exponent, known, stack.part)
    if config.variant == "eva_s":
        vectors = seen.vectors[::-1] if stack.kind.is_transposed else seen.vectors
        return formula.eva_s(matrices, vectors, config.damping, relative, stack.part)
    if config.variant == "eva_f":
        return formula.eva_f(matrices, biases, seen.vectors[0], config.damping, relative, stack.part)
    a, g = seen.vectors
    return formula.eva(matrices, biases, a, g, config.damping, relative, stack.part)


def _observe_tokens(step: Step, stack: Stack, squares: Tensor, valid: Tensor) -> Routine[Seen]:
    """Variants `"eva"` and `"eva_f"`: average the mean vectors and, where they are needed, the traces."""
    kept = [key for key in OF_TOKENS if key in step.state[stack.weights[0]]]
    if step.statistics is None:
        seen = yield from _count(step, stack, squares, valid & (stack.read(step.state, "eva_updates") > 0))
        averages = {key: stack.read(step.state, key) for key in kept}
    else:
        tokens, *sums = (
            torch.stack([getattr(step.statistics[index], f.name) for index in stack.indices])
            for f in dataclasses.fields(Statistics)
        )
        new = dict(zip(OF_TOKENS, sums, strict=True))
        if step.config.g_scale == "mean":
            scales = tokens.clamp_min(1).reciprocal()
            new |= {"eva_g": new["eva_g"] * scales.unsqueeze(1), "eva_g_square": new["eva_g_square"] * scales.square()}
        seen = yield from _count(step, stack, squares, valid & (tokens > 0))
        averages = {key: average(step.state, stack, key, new[key], seen.weights) for key in kept}
    if step.config.needs_traces:
        bases: dict[str, Tensor] = {}
        traces: dict[str, Tensor] = {}
        for key in ("eva_g", "eva_a"):
            if key in averages:  # the mean vector m as the one eigenvector, with eigenvalue ‖m‖²
                traces[key] = averages[f"{key}_square"]
                values = formula.norm(averages[key], dim=1) * formula.inverse(traces[key])
                bases[key] = (averages[key] * values.unsqueeze(1)).unsqueeze(2)
        seen.factors = yield from _factors(step.config, bases, traces)
    seen.vectors = [averages[key] for key in ("eva_a", "eva_g") if key in averages]
    return seen


def _observe_gradients(
    step: Step, stack: Stack, gradients: formula.Stacked, squares: Tensor, valid: Tensor, refreshes: bool
) -> Routine[Seen]:
    """
    Variant `"eva_s"`: average the means over axes, or track the subspaces of `Gᵀ G` and `G Gᵀ`, in units of the
    average `‖G‖²`.
    """
    seen = yield from _count(step, stack, squares, valid)
    if step.config.curvature == "joint":
        keys = [f"eva_v{axis}" for axis in range(len(stack.axes))]
        if refreshes:
            means = yield from formula.axis_means(gradients, stack.axes)
            named = zip(keys, means, strict=True)
            seen.vectors = [average(step.state, stack, key, mean, seen.weights) for key, mean in named]
        else:
            seen.vectors = [stack.read(step.state, key) for key in keys]
        return seen
    assert isinstance(gradients, Tensor)
    output, input = stack.read(step.state, "eva_g"), stack.read(step.state, "eva_a")
    if refreshes:
        output, input = yield from _follow(step, stack, stack.kind.matrices(gradients), output, input, seen, valid)
    bases = {"eva_g": output, "eva_a": input}
    seen.factors = yield from _factors(step.config, bases, dict.fromkeys(bases, seen.squares))
    return seen


def _follow(
    step: Step, stack: Stack, matrices: Tensor, output: Tensor, input: Tensor, seen: Seen, valid: Tensor
) -> Routine[tuple[Tensor, Tensor]]:
    """Bring the bases of both sides up to date, and return them."""
    squares = seen.newest
    if step.number <= SEARCH_STEPS:
        first = valid & (seen.updates == 1)
        output, input = yield from subspaces.find_bases(matrices, output, input, first, squares, stack.part)
    # The average that `‖G‖²` gets, in its new units.
    weights = (seen.weights * squares * formula.inverse(seen.squares)).where(valid, 0.0)
    output, input = yield from subspaces.subspace_step(matrices, output, input, weights, squares, stack.part)
    stack.write(step.state, "eva_g", output)
    stack.write(step.state, "eva_a", input)
    return output, input


def _count(step: Step, stack: Stack, squares: Tensor, valid: Tensor) -> Routine[Seen]:
    """
    Count the steps of each layer with a valid gradient, whose n-th weighs `decay` but at least `1/n` in averages, and
    average `‖G‖²` where it is kept.
    """
    has_squares = "eva_square" in step.state[stack.layers[0].weight]
    averages = stack.read(step.state, "eva_square") if has_squares else squares
    before = stack.read(step.state, "eva_updates")
    ((updates, weights, averages),) = yield from at_once(
        _counted, (before, valid, squares, averages), decay=step.config.decay
    )
    stack.write(step.state, "eva_updates", updates)
    if has_squares:
        stack.write(step.state, "eva_square", averages)
    return Seen(weights, updates, squares, averages)


def _counted(
    updates: Tensor, valid: Tensor, squares: Tensor, averages: Tensor, decay: float
) -> tuple[Tensor, Tensor, Tensor]:
    updates = updates + valid
    weights = updates.reciprocal().clamp_min(decay).where(valid, 0.0)
    return updates, weights, formula.averaged(averages, squares, weights)


def _factors(
    config: EvaConfig, bases: dict[str, Tensor], traces: dict[str, Tensor]
) -> Routine[dict[str, factors.Factor]]:
    found = yield from factors.factors_of(
        list(bases.values()), list(traces.values()), config.damping, config.damping_mode == "relative"
    )
    return dict(zip(bases, found, strict=True))


def _create_statistics(state: State, layer: Layer, config: EvaConfig) -> bool:
    """All statistics of a layer, zeros and random bases, if it has none yet, which is returned."""
    entry = state[layer.weight]
    is_new = "eva_updates" not in entry
    if is_new:
        for key, shape in statistics_shapes(layer, config).items():
            like = torch.zeros(shape, dtype=working_dtype(layer.weight), device=layer.weight.device)
            entry[key] = subspaces.initial_basis(*shape, like) if len(shape) == 2 else like
    return is_new
