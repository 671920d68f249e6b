"""
The published mathematics, as functions of stacks, which are n layers of equal shape. No module, no optimizer here.

The recipe stands on it, in [`subspaces`] and [`factors`].

Every function leaves every decision on the device (no host read); a name that ends in `_` works in place on its first
argument. Gradients are matrices `(n, d_out, d_in)`. Vectors: `a` of shape `(n, d_in)` is the mean input, `g` of shape
`(n, d_out)` the output gradient. A bias is one more column of the gradient, whose input is the constant 1; it is kept
as a separate `(n, d_out)` tensor so that nothing of a weight's size is allocated.

Gradients may be in parts over processes, as their [`Part`] says. Then `d_out` or `d_in` is the size of the part of
whatever is computed from them, while vectors and bases that are given are whole; functions that need sums over all
parts are routines, see [`shards`].

Source of the published forms: Zhang, Shi and Li, "Eva: Practical Second-order Optimization with Kronecker-vectorized
Approximation", ICLR 2023 (arXiv 2308.02123).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from .base import BLOCK
from .routines import Routine
from .shards import WHOLE, Axis, Part, whole_axis

TINY = 1e-30  # keeps 0/0 at 0; far below any statistic of a layer that receives a gradient

Stacked: TypeAlias = Tensor | Sequence[Tensor]  # a stack, or its tensors one by one and in precisions of their own


def averaged(average: Tensor, value: Tensor, weight: Tensor) -> Tensor:
    """`(1 − w) m + w · new` with a weight `(n,)`; a weight of 0 keeps the average, also where the new value is NaN."""
    weight = over(weight, average)
    return torch.where(weight > 0, average.lerp(value, weight), average)


class Correction(NamedTuple):
    """
    What turns gradients into directions, `P = G + columns @ rows`, and products of both without a look at `P`.

    Shapes: `columns` and `images = G rowsᵀ` are `(n, d_out, k)`, `rows` is `(n, k, d_in)`. Of a bias, whose gradient
    is the last column of `G`, the last entry of each row is 1 and left out of `rows`.
    """

    columns: Tensor
    rows: Tensor
    images: Tensor

    def apply_(self, grads: Tensor) -> None:
        grads.baddbmm_(self.columns, self.rows)

    def sums(self, squares: Tensor, biases: Tensor | None, part: Part = WHOLE) -> Routine[tuple[Tensor, ...]]:
        """`‖G‖²`, `⟨P, G⟩` and `‖P‖²` of each matrix, of shape `(n,)`, from `‖G‖²` without biases."""
        (grams,) = yield from part.columns.sum(self.grams())
        grams = grams if biases is None else grams + 1
        inner, norms = self.columns * self.images, self.columns * self.columns.bmm(grams)
        added = [inner.sum((1, 2)), norms.sum((1, 2)), *([] if biases is None else [dot(biases, biases)])]
        inner, norms, *of_biases = yield from part.rows.sum(*added)
        squares = sum(of_biases, squares)
        # What remains of a matrix that is removed almost entirely is rounding.
        after = torch.maximum(squares + 2 * inner + norms, squares * eps(squares))
        return squares, squares + inner, after

    def products(self, squares: Tensor) -> Tensor:
        """`⟨P, G⟩` of every row, from the rows' `‖G‖²`; both `(n, d_out)`."""
        return squares + (self.columns * self.images).sum(2)

    def grams(self) -> Tensor:
        """Inner products of the rows with each other, `(n, k, k)`."""
        return self.rows.bmm(self.rows.mT)

    def squares(self, squares: Tensor, grams: Tensor) -> Tensor:
        """`‖P‖²` of every row, from the rows' `‖G‖²`, both `(n, d_out)`, and from `grams()`."""
        half = self.images + self.columns.bmm(grams) / 2
        # What remains of a row that is removed almost entirely is rounding.
        return torch.maximum(squares + 2 * (self.columns * half).sum(2), squares * eps(squares))


def eva(
    grads: Stacked, biases: Tensor | None, a: Tensor, g: Tensor, damping: float, relative: bool, part: Part = WHOLE
) -> Routine[Correction]:
    """
    Eva: `P = G − gᵀGa / (γ + ‖a‖²‖g‖²) · g aᵀ`, which is γ times the solution of `(v vᵀ + γI) X = G`, `v = g ⊗ a`.

    With `relative=True`, `γ = damping · ‖a‖²‖g‖²`. The factor 1/γ is the caller's: it is one number for all layers
    where the damping is absolute, and left out where it is relative, so that the scale of `P` is that of `G` whatever
    the loss is multiplied by.
    """
    a_norm, (image,) = dot(a, a), (yield from part.columns.sum(_apply(grads, part.columns.take(a))))
    if biases is not None:
        a_norm, image = a_norm + 1, image + biases
    unit, g_norm = _unit(g)
    unit = part.rows.take(unit)
    (inner,) = yield from part.rows.sum(dot(unit, image))
    coefficient = inner / _damped(a_norm, damping if relative else damping / g_norm, relative)
    return _rank_one(-unit * coefficient.unsqueeze(1), part.columns.take(a), image)


def eva_f(
    grads: Stacked, biases: Tensor | None, a: Tensor, damping: float, relative: bool, part: Part = WHOLE
) -> Routine[Correction]:
    """
    Eva-f, FOOF with vectors: `P = G − (Ga) aᵀ / (γ + ‖a‖²)`, which is γ times the solution of `X (a aᵀ + γI) = G`.

    `relative` and the factor 1/γ are as in [`eva`], with `γ = damping · ‖a‖²`.
    """
    a_norm, (image,) = dot(a, a), (yield from part.columns.sum(_apply(grads, part.columns.take(a))))
    if biases is not None:
        a_norm, image = a_norm + 1, image + biases
    return _rank_one(-image / _damped(a_norm, damping, relative).unsqueeze(1), part.columns.take(a), image)


def eva_s(
    grads: Stacked, vectors: Sequence[Tensor], damping: float, relative: bool, part: Part = WHOLE
) -> Routine[Correction]:
    """
    Eva-s, Shampoo with vectors: `P = G − ⟨G,V⟩ / (γ + ∏‖v_i‖²) · V` with `V = v_1 ∘ … ∘ v_k`, for gradients of any
    order k ≥ 2 as matrices `(n, d_1, d_2 ⋯ d_k)`. `relative` is as in [`eva`]; that `P` gets the norm of `G` is left
    to [`norm_ratios`].
    """
    (first, first_norm), (last, last_norm), *others = (_unit(vector) for vector in vectors)
    shift = damping if relative else damping / first_norm / last_norm
    for vector, other_norm in others:
        last = (last.unsqueeze(2) * vector.unsqueeze(1)).flatten(1)
        shift = shift if relative else shift / other_norm
    first, last = part.rows.take(first), part.columns.take(last)
    (image,) = yield from part.columns.sum(_apply(grads, last))
    (inner,) = yield from part.rows.sum(dot(first, image))
    return _rank_one(-first * (inner / (1 + shift)).unsqueeze(1), last, image)


def _unit(vectors: Tensor) -> tuple[Tensor, Tensor]:
    """Vectors of norm 1, or 0 where they are zero, and their squared norms: products of these may overflow."""
    squares = dot(vectors, vectors)
    return vectors / squares.sqrt().clamp_min(math.sqrt(least(vectors))).unsqueeze(1), squares


def _damped(curvature: Tensor, damping: float | Tensor, relative: bool) -> Tensor:
    return curvature + ((damping * curvature).clamp_min(TINY) if relative else damping)


def _rank_one(column: Tensor, row: Tensor, image: Tensor) -> Correction:
    return Correction(column.unsqueeze(2), row.unsqueeze(1), image.unsqueeze(2))


def axis_means(grads: Stacked, parts: Sequence[Axis] | None = None) -> Routine[Sequence[Tensor]]:
    """
    Eva-s's vectors: for each axis of gradients `(n, d_1, …, d_k)`, its mean over all other axes, `(n, d_i)`. Of these
    axes processes may have `parts`; the vectors are whole.
    """
    parts = [whole_axis(size) for size in grads[0].shape] if parts is None else parts
    numel = math.prod(part.whole for part in parts)
    found = zip(*(_axis_sums(grad) for grad in grads), strict=True)
    sums: Sequence[Tensor] = [
        part.spread(torch.stack(of_axis) / (numel // part.whole)) for part, of_axis in zip(parts, found, strict=True)
    ]
    for part in parts:
        sums = yield from part.sum(*sums)
    return sums


def _axis_sums(grad: Tensor) -> list[Tensor]:
    """For each axis of one gradient the sums over all others."""
    dtype = torch.promote_types(grad.dtype, torch.float32)
    if grad.ndim > 2 or grad.dtype != dtype:
        axes = range(grad.ndim)
        return [grad.sum([other for other in axes if other != axis], dtype=dtype) for axis in axes]
    # Products with ones are faster than sums, and those of a block find it in the cache the second time.
    ones = grad.new_ones(max(grad.shape))
    rows = max(1, BLOCK // max(1, grad.shape[1])) if grad.device.type == "cpu" else max(1, len(grad))
    blocks, columns = grad.split(rows), grad.new_zeros(grad.shape[1])
    sums = []
    for block in blocks:
        sums.append(block.mv(ones[: grad.shape[1]]))
        columns.addmv_(block.mT, ones[: len(block)])
    return [torch.cat(sums), columns]


def norm_ratios(squares: Tensor, direction_squares: Tensor) -> Tensor:
    """What to multiply directions with, to bring each to the norm of its gradient; all of shape `(n,)`."""
    return squares.sqrt() / direction_squares.sqrt().clamp_min(TINY)


def kl_factor(inner: Sequence[Tensor], lrs: Sequence[float], kl_clip: float) -> Tensor:
    """
    The published step bound `ν = min(1, sqrt(κ / Σ_layers lr² ⟨P, G⟩))`, one factor for all layers, from the inner
    products of each stack and its learning rate.
    """
    size = torch.stack([values.sum() * lr**2 for values, lr in zip(inner, lrs, strict=True)]).sum()
    return (kl_clip / size.clamp_min(TINY)).sqrt().clamp_max(1.0)


def rescale_factor(before: Sequence[Tensor], after: Sequence[Tensor]) -> Tensor:
    """The factor that restores the joint norm of all tensors, from the norms of each before and after."""
    return norm(torch.cat(list(before))) / norm(torch.cat(list(after))).clamp_min(TINY)


def inverse(squares: Tensor) -> Tensor:
    """`1 / ‖G‖²`, a finite number also where that is 0."""
    return squares.clamp_min(least(squares)).reciprocal()


def squared_row_norms(matrices: Tensor) -> Tensor:
    """`‖·‖²` of every row of matrices `(n, d_out, d_in)`, of shape `(n, d_out)`."""
    if matrices.stride(-1) == 1:
        return norm(matrices, dim=2).square()
    # Along an axis that is not the last one, a norm is slow and a sum is not; in parts, for the memory's sake.
    parts = matrices.mT.split(max(1, BLOCK // max(1, len(matrices) * matrices.shape[1])), dim=1)
    return torch.stack([part.square().sum(1) for part in parts]).sum(0)


def norm(tensor: Tensor, dim: int | None = None) -> Tensor:
    """Of a whole tensor, or of all its vectors along an axis."""
    found: Tensor = torch.linalg.vector_norm(tensor, dim=dim)
    return found


def dot(left: Tensor, right: Tensor) -> Tensor:
    """Inner products over the last axis."""
    product: Tensor = torch.linalg.vecdot(left, right)
    return product


def _apply(matrices: Stacked, vectors: Tensor) -> Tensor:
    """`(n, d_out, d_in)` matrices times `(n, d_in)` vectors."""
    if not isinstance(matrices, Tensor):
        pairs = zip(matrices, vectors.unbind(), strict=True)
        return torch.stack([matrix.to(vector.dtype).mv(vector) for matrix, vector in pairs])
    return matrices.bmm(vectors.unsqueeze(2)).squeeze(2)


def over(values: Tensor, stack: Tensor) -> Tensor:
    """A view of values `(n,)` that broadcasts over a stack."""
    return values.view(-1, *[1] * (stack.ndim - 1))


def eps(tensor: Tensor) -> float:
    """The relative rounding error of a precision."""
    return torch.finfo(tensor.dtype).eps


def least(tensor: Tensor) -> float:
    """The least number that has an inverse."""
    return torch.finfo(tensor.dtype).tiny
