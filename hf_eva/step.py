"""A step as data: what all its parts share, and the first look at all gradients that it begins with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from . import base
from .capture import Statistics
from .config import EvaConfig
from .diagnostics import LastStep
from .shards import Routine, axes_of, local, together, whole_sum
from .soundness import Watch, squared_norms_of
from .stacks import Scratch, Stack, State


@dataclass
class Step:
    """
    What all parts of one step share.

    `stacks` are the layers that it preconditions, `statistics` those of all planned layers where they are captured,
    and `by_rows` the ids of the weights of embeddings. `number` counts steps from 1. The first look tells `squares`,
    `‖G‖²` by the id of the parameter, 0-dim, or for embeddings the mean squares of rows, `(rows, 1)`; and `sound`,
    which says on the device whether there is a step, and is `None` where there is.
    """

    config: EvaConfig
    state: State
    groups: Sequence[dict[str, Any]]
    stacks: Sequence[Stack]
    statistics: Sequence[Statistics] | None
    by_rows: set[int]
    number: int
    scratch: Scratch
    last: LastStep
    squares: dict[int, Tensor] = field(default_factory=dict)
    sound: Tensor | None = None

    def look(self, watch: Watch) -> None:
        """Judge all gradients and statistics; not without preconditioning, where nothing is to differ from torch."""
        present = [p for group in self.groups for p in group["params"] if p.grad is not None]
        if self.config.variant == "none" or not present:
            return
        embeddings = [parameter for parameter in present if id(parameter) in self.by_rows]
        others = [parameter for parameter in present if id(parameter) not in self.by_rows]
        found = zip(others, squared_norms_of([local(parameter.grad) for parameter in others]), strict=True)
        routines = [*(_rows_and_sum(p) for p in embeddings), *(_sum(p, square) for p, square in found)]
        sums = dict(zip(map(id, embeddings + others), together(routines), strict=True))
        self.squares = {parameter: square for parameter, (square, _) in sums.items()}
        numbers = [(parameter, sums[id(parameter)][1]) for parameter in present]
        if self.statistics is not None:
            used = [pair for stack in self.stacks for pair in zip(stack.weights, stack.indices, strict=True)]
            numbers += [(weight, self.statistics[index].a_square) for weight, index in used]
            numbers += [(weight, self.statistics[index].g_square) for weight, index in used]
        self.sound = watch.judge(numbers)

    def squares_of(self, weights: Sequence[Tensor]) -> Tensor:
        """`‖G‖²` of the weights of a stack, `(n,)`."""
        return torch.stack([self.squares[id(weight)] for weight in weights])

    def sound_on(self, tensor: Tensor) -> Tensor | None:
        """`sound`, where a tensor is."""
        return None if self.sound is None else self.sound.to(tensor.device)


def _rows_and_sum(embedding: Tensor) -> Routine[tuple[Tensor, Tensor]]:
    """The mean squares of rows that this process holds, and the sum of those of all rows."""
    rows, columns = axes_of(embedding)
    (squares,) = yield from columns.sum(base.mean_squares(embedding))
    (total,) = yield from rows.sum(squares.sum())
    return squares, total


def _sum(parameter: Tensor, square: Tensor) -> Routine[tuple[Tensor, Tensor]]:
    total = yield from whole_sum(parameter, square)
    return total, total
