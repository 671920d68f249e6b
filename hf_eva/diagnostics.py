"""What a step did to its layers: kept as tensors that the step made anyway, and measured when somebody asks."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .config import EvaConfig
from .stacks import Stack, State
from .subspaces import column_norms

STRENGTH = "eva_strength"  # on average; of a layer `eva_strength/<layer>`
CURVATURE = "eva_curvature_"  # and the side


class LastStep:
    """
    What is left of a step: of every stack how to get its sums, see [`row_sums`], and the `factor` that all directions
    together were multiplied with, if any.
    """

    def __init__(self) -> None:
        self.factor: Tensor | float | None = None
        self._stacks: list[tuple[Stack, Callable[[], Tensor]]] = []

    def keep(self, stack: Stack, sums: Callable[..., Tensor], *values: Any) -> None:
        """Keep what the sums of a stack are made of, without computing anything."""
        self._stacks.append((stack, partial(sums, *values)))

    def measure(self, state: State, config: EvaConfig, planned: int, layers: bool) -> dict[str, float]:
        """See `Eva.diagnostics`. What is not finite is left out."""
        names = [layer.name for stack, _ in self._stacks for layer in stack.layers]
        numel = sum(_numel(stack) for stack, _ in self._stacks)
        rows, factor = self._read(state)
        strengths = {name: _strength(*row[:3]) for name, row in zip(names, rows, strict=True)}
        known = {name: value for name, value in strengths.items() if math.isfinite(value)}
        found = {STRENGTH: statistics.fmean(known.values()) if known else math.nan}
        squares = sum(row[2] for row in rows)
        found["eva_update_size"] = factor * math.sqrt(squares / numel) if known and squares >= 0 else math.nan
        if config.kl_mode != "none":
            name = "eva_kl_factor" if config.kl_mode == "clip" else "eva_rescale_factor"
            found[name] = factor * (config.damping if config.divides_by_damping else 1.0)
        for column, side in ((3, "inputs"), (4, "outputs")):
            norms = [row[column] for row in rows if math.isfinite(row[column])]
            found[f"{CURVATURE}{side}"] = statistics.median(norms) if norms else math.nan
        found["eva_fallback_layers"] = planned - len(known)
        if layers:
            found |= {f"{STRENGTH}/{name}": value for name, value in known.items()}
        return {name: value for name, value in found.items() if math.isfinite(value)}

    def _read(self, state: State) -> tuple[list[list[float]], float]:
        """For every layer its three sums and two norms of its curvature, and the factor, in one copy to the host."""
        if not self._stacks:
            return [], 1.0
        tables = [torch.cat([sums(), _curvature_norms(stack, state)], dim=1) for stack, sums in self._stacks]
        values = [table.flatten() for table in tables]
        if isinstance(self.factor, Tensor):
            values.append(self.factor.view(1))
        device = values[0].device
        read = torch.cat([value.to(device) for value in values]).tolist()
        factor = read.pop() if isinstance(self.factor, Tensor) else 1.0 if self.factor is None else self.factor
        width = tables[0].shape[1]
        return [read[start : start + width] for start in range(0, len(read), width)], factor


def row_sums(squares: Tensor, products: Tensor, direction_squares: Tensor, scales: Tensor) -> Tensor:
    """
    `‖M‖²`, `⟨U, M⟩` and `‖U‖²` of each layer, of shape `(n, 3)`, where the update `U` has the rows of the direction
    `P` times `scales`; from `‖M‖²`, `⟨P, M⟩` and `‖P‖²` of every row, `(n, d_out)`.
    """
    sums = squares, scales * products, scales.square() * direction_squares
    return torch.stack([values.sum(1) for values in sums], dim=1)


def _numel(stack: Stack) -> int:
    """All entries of the weights, and of the biases that are preconditioned with them."""
    biases = [layer.bias for layer in stack.layers if stack.has_bias]
    return sum(tensor.numel() for tensor in (*(layer.weight for layer in stack.layers), *biases) if tensor is not None)


def _strength(square: float, product: float, update_square: float) -> float:
    """1 − cos, and NaN where there is no update."""
    if not square > 0 or not update_square > 0:
        return math.nan
    return max(0.0, 1 - product / (math.sqrt(square) * math.sqrt(update_square)))


def _curvature_norms(stack: Stack, state: State) -> Tensor:
    """The largest eigenvalue of each layer's curvature of inputs and of outputs, `(n, 2)`; NaN where there is none."""
    keys = state[stack.layers[0].weight]
    if "eva_v0" in keys:
        axes = [stack.read(state, key).square().sum(1) for key in keys if key.startswith("eva_v")]
        first, others = axes[0], torch.stack(axes[1:]).prod(0)
        sides: Iterator[Tensor] | Sequence[Tensor] = (first, others) if stack.kind.is_transposed else (others, first)
    else:
        nothing = torch.full_like(stack.read(state, "eva_updates"), math.nan)
        sides = (_largest(stack, state, key) if key in keys else nothing for key in ("eva_a", "eva_g"))
    return torch.stack(list(sides), dim=1)


def _largest(stack: Stack, state: State, key: str) -> Tensor:
    """Of vectors `(n, d)` their squares, of bases `(n, d, r)`, which are in units of the trace, the longest column."""
    values = stack.read(state, key)
    if values.ndim == 2:
        return values.square().sum(1)
    return column_norms(values).amax(1) * stack.read(state, "eva_square")
