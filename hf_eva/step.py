"""A step as data: what all its parts share, and the first look at all numbers that it begins with."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import base
from .capture import Statistics
from .config import EvaConfig
from .diagnostics import LastStep
from .routines import Routine, together
from .shards import axes_of, local, whole_sum
from .soundness import Watch, squared_norms_of
from .stacks import Scratch, Stack, State, waves_of


class Size(NamedTuple):
    """
    Of a gradient `‖G‖²`, 0-dim, and the same once more; of an embedding the mean squares of the rows that this process
    holds, `(rows, 1)`, and the sum of those of all rows.
    """

    squares: Tensor
    total: Tensor


def sizes_of(groups: Sequence[dict[str, Any]], by_rows: set[int]) -> dict[int, Size]:
    """The sizes of all gradients, by the id of the parameter; `by_rows` as in [`Step`]."""
    present = [p for group in groups for p in group["params"] if p.grad is not None]
    embeddings = [parameter for parameter in present if id(parameter) in by_rows]
    others = [parameter for parameter in present if id(parameter) not in by_rows]
    found = zip(others, squared_norms_of([local(parameter.grad) for parameter in others]), strict=True)
    routines = [*(_rows_and_sum(p) for p in embeddings), *(_sum(p, square) for p, square in found)]
    return dict(zip(map(id, embeddings + others), together(routines), strict=True))


@dataclass
class Step:
    """
    What all parts of one step share.

    `stacks` are the layers that it preconditions, `statistics` those of all planned layers where they are captured.
    `refreshes` says whether curvature is brought up to date, or used as it is.
    `by_rows` the ids of the weights of `nn.Embedding`, and `tables` those of other embeddings. `sizes` are those of
    all gradients, see [`sizes_of`]. `number` counts steps from 1. The first look tells `sound`, which says on the
    device whether there is a step, and is `None` where there is.
    """

    config: EvaConfig
    state: State
    groups: Sequence[dict[str, Any]]
    stacks: Sequence[Stack]
    statistics: Sequence[Statistics] | None
    refreshes: bool
    by_rows: set[int]
    tables: set[int]
    sizes: dict[int, Size]
    number: int
    scratch: Scratch
    last: LastStep
    sound: Tensor | None = None

    def waves(self) -> Iterator[Sequence[Stack]]:
        """Stacks that are stepped side by side, and that have the scratch buffer to themselves until the next wave."""
        for wave in waves_of(self.stacks):
            self.scratch.clear(sum(stack.size for stack in wave))
            yield wave

    def look(self, watch: Watch) -> None:
        """Judge all gradients and statistics."""
        if not self.sizes:
            return
        parameters = [p for group in self.groups for p in group["params"] if id(p) in self.sizes]
        numbers = [(parameter, self.sizes[id(parameter)].total) for parameter in parameters]
        if self.statistics is not None:
            weights = [weight for stack in self.stacks for weight in stack.weights]
            used = [self.statistics[index] for stack in self.stacks for index in stack.indices]
            if self.config.needs_traces:
                squares = [s.a_square for s in used] + [s.g_square for s in used]
            else:
                squares = squared_norms_of([s.a for s in used] + [s.g for s in used])
            numbers += zip(weights + weights, squares, strict=True)
        self.sound = watch.judge(numbers)

    def squares_of(self, weights: Sequence[Tensor]) -> Tensor:
        """`‖G‖²` of the weights of a stack, `(n,)`."""
        return torch.stack([self.sizes[id(weight)].squares for weight in weights])

    def sound_on(self, tensor: Tensor) -> Tensor | None:
        """`sound`, where a tensor is."""
        return None if self.sound is None else self.sound.to(tensor.device)


def _rows_and_sum(embedding: Tensor) -> Routine[Size]:
    rows, columns = axes_of(embedding)
    (squares,) = yield from columns.sum(base.mean_squares(embedding))
    (total,) = yield from rows.sum(squares.sum())
    return Size(squares, total)


def _sum(parameter: Tensor, square: Tensor) -> Routine[Size]:
    total = yield from whole_sum(parameter, square)
    return Size(total, total)
