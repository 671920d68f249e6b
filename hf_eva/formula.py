"""
The mathematics, as functions of stacks: of n layers of equal shape at once. Nothing here knows modules or optimizers.

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
from .shards import WHOLE, Axis, Part, Routine, whole_axis

ITERATIONS = 2  # on the first gradient; a random first guess would take some twenty steps to find its subspaces
LEAST_COSINE = 0.5  # of an update with its momentum: no step is more than twice as long as one of AdamW
NOISE_SIZE = 0.2  # of AdamW's update where gradients are noise
LARGEST_CHANGE = 0.05  # of a weight in one step, where the step is longer than noise would make it
SMALL_CHANGE = 4.0  # times smaller than that, a step is no risk to a weight, and need not spread over all directions
FEWEST = 5.0  # gradients, from fewer of which nothing is known of noise
LEAST_SIGNAL = 0.03  # share of a momentum that counts as signal, whatever is measured
LEAST_REST = 1e-4  # of a trace; what is less may be rounding

_TINY = 1e-30  # keeps 0/0 at 0; far below any statistic of a layer that receives a gradient

Stacked: TypeAlias = Tensor | Sequence[Tensor]  # a stack, or its tensors one by one and in precisions of their own


def averaged(average: Tensor, value: Tensor, weight: Tensor) -> Tensor:
    """`(1 − w) m + w · new` with a weight `(n,)`; a weight of 0 keeps the average, also where the new value is NaN."""
    weight = _over(weight, average)
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
        added = [inner.sum((1, 2)), norms.sum((1, 2)), *([] if biases is None else [_dot(biases, biases)])]
        inner, norms, *of_biases = yield from part.rows.sum(*added)
        squares = sum(of_biases, squares)
        # What remains of a matrix that is removed almost entirely is rounding.
        after = torch.maximum(squares + 2 * inner + norms, squares * _eps(squares))
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
        return torch.maximum(squares + 2 * (self.columns * half).sum(2), squares * _eps(squares))


def eva(
    grads: Stacked, biases: Tensor | None, a: Tensor, g: Tensor, damping: float, relative: bool, part: Part = WHOLE
) -> Routine[Correction]:
    """
    Eva: `P = G − gᵀGa / (γ + ‖a‖²‖g‖²) · g aᵀ`, which is γ times the solution of `(v vᵀ + γI) X = G`, `v = g ⊗ a`.

    With `relative=True`, `γ = damping · ‖a‖²‖g‖²`. The factor 1/γ is the caller's: it is one number for all layers
    where the damping is absolute, and left out where it is relative, so that the scale of `P` is that of `G` whatever
    the loss is multiplied by.
    """
    a_norm, (image,) = _dot(a, a), (yield from part.columns.sum(_apply(grads, part.columns.take(a))))
    if biases is not None:
        a_norm, image = a_norm + 1, image + biases
    unit, g_norm = _unit(g)
    unit = part.rows.take(unit)
    (inner,) = yield from part.rows.sum(_dot(unit, image))
    coefficient = inner / _damped(a_norm, damping if relative else damping / g_norm, relative)
    return _rank_one(-unit * coefficient.unsqueeze(1), part.columns.take(a), image)


def eva_f(
    grads: Stacked, biases: Tensor | None, a: Tensor, damping: float, relative: bool, part: Part = WHOLE
) -> Routine[Correction]:
    """
    Eva-f, FOOF with vectors: `P = G − (Ga) aᵀ / (γ + ‖a‖²)`, which is γ times the solution of `X (a aᵀ + γI) = G`.

    `relative` and the factor 1/γ are as in [`eva`], with `γ = damping · ‖a‖²`.
    """
    a_norm, (image,) = _dot(a, a), (yield from part.columns.sum(_apply(grads, part.columns.take(a))))
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
    (first, norm), (last, last_norm), *others = (_unit(vector) for vector in vectors)
    shift = damping if relative else damping / norm / last_norm
    for vector, other_norm in others:
        last = (last.unsqueeze(2) * vector.unsqueeze(1)).flatten(1)
        shift = shift if relative else shift / other_norm
    first, last = part.rows.take(first), part.columns.take(last)
    (image,) = yield from part.columns.sum(_apply(grads, last))
    (inner,) = yield from part.rows.sum(_dot(first, image))
    return _rank_one(-first * (inner / (1 + shift)).unsqueeze(1), last, image)


def _unit(vectors: Tensor) -> tuple[Tensor, Tensor]:
    """Vectors of norm 1, or 0 where they are zero, and their squared norms: products of these may overflow."""
    squares = _dot(vectors, vectors)
    return vectors / squares.sqrt().clamp_min(math.sqrt(_least(vectors))).unsqueeze(1), squares


def _damped(curvature: Tensor, damping: float | Tensor, relative: bool) -> Tensor:
    return curvature + ((damping * curvature).clamp_min(_TINY) if relative else damping)


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
    return squares.sqrt() / direction_squares.sqrt().clamp_min(_TINY)


def kl_factor(inner: Sequence[Tensor], lrs: Sequence[float], kl_clip: float) -> Tensor:
    """
    The published step bound `ν = min(1, sqrt(κ / Σ_layers lr² ⟨P, G⟩))`, one factor for all layers, from the inner
    products of each stack and its learning rate.
    """
    size = torch.stack([values.sum() * lr**2 for values, lr in zip(inner, lrs, strict=True)]).sum()
    return (kl_clip / size.clamp_min(_TINY)).sqrt().clamp_max(1.0)


def rescale_factor(before: Sequence[Tensor], after: Sequence[Tensor]) -> Tensor:
    """The factor that restores the joint norm of all tensors, from the norms of each before and after."""
    return _norm(torch.cat(list(before))) / _norm(torch.cat(list(after))).clamp_min(_TINY)


def factor_levels(bases: Tensor, traces: Tensor, damping: float, relative: bool) -> tuple[Tensor, Tensor, Tensor]:
    """
    One factor `F ≈ ρI + U diag(ℓ − ρ) Uᵀ`, damped by ε and up to a scalar: `I + U diag(level − 1) Uᵀ`. Everything is
    in units of the trace of `F`, so that gradients of any size can be squared twice.

    Args:
        bases (`Tensor` of shape `(n, d, r)`): `U diag(ℓ)`; its columns are orthogonal and `ℓ` are their norms. What
            the r vectors do not explain of the trace, which is 1, is spread evenly, as `ρ`.
        traces (`Tensor` of shape `(n,)`): trace of `F`.
        damping (`float`): ε, added to the spectrum; with `relative=True` in units of the mean eigenvalue `1 / d`,
            otherwise in those of `F`.

    Returns:
        `U` of shape `(n, d, r)`, and `ℓ` and `level = (ℓ + ε) / (ρ + ε) ≥ 1` of shape `(n, r)`.
    """
    dimension, rank = bases.shape[1:]
    values = column_norms(bases)
    rest = (1 - values.sum(1, keepdim=True)).clamp_min(0.0) / max(dimension - rank, 1)
    shift = damping / dimension if relative else damping / traces.clamp_min(_least(traces)).unsqueeze(1)
    shift = shift + _TINY
    return unit_columns(bases, values), values, ((values + shift) / (rest + shift)).clamp_min(1.0)


class Momenta(NamedTuple):
    """
    What is known of momenta that are preconditioned in the place of gradients; all of shape `(n,)`.

    `corrections` bring them to the units of the factors of their gradients, and correct their start from zero, when
    they are divided by them. `squares` are `‖M‖²`. `noises` come from [`noise_shares`], and `trusts`, in [0, 1], say
    how far that what looks like noise may be left out.
    """

    corrections: Tensor
    squares: Tensor
    noises: Tensor
    trusts: Tensor


def factored(
    grads: Tensor,
    output: tuple[Tensor, Tensor, Tensor] | None,
    input: tuple[Tensor, Tensor, Tensor] | None,
    exponent: float,
    momenta: Momenta | None = None,
    part: Part = WHOLE,
) -> Routine[Correction]:
    """
    `P = B^(−p) G A^(−p)` with the factors of [`factor_levels`]; `None` leaves a side out, but not both. Where `grads`
    are `momenta`, the powers are those of [`momentum_powers`].
    """
    d_out, d_in = grads.shape[1:]
    outer, *of_output = (part.rows.take(output[0]), *output[1:]) if output else _no_factor(grads, d_out)
    inner, *of_input = (part.columns.take(input[0]), *input[1:]) if input else _no_factor(grads, d_in)
    (image,) = yield from part.columns.sum(grads.bmm(inner))
    products = image.square().sum(1), outer.mT.bmm(image), outer.mT.bmm(grads)
    squares, cross, row = yield from part.rows.sum(*products)
    (row_squares,) = yield from part.columns.sum(row.square().sum(2))
    inner_f, outer_f = (
        (levels.pow(-exponent) if momenta is None else momentum_powers(levels, exponent, energies, values, momenta))
        - 1
        for (values, levels), energies in ((of_input, squares), (of_output, row_squares))
    )
    row.baddbmm_(cross * inner_f.unsqueeze(1), inner.mT)
    (row_image,) = yield from part.columns.sum(grads.bmm(row.mT))
    columns = torch.cat([image * inner_f.unsqueeze(1), outer * outer_f.unsqueeze(1)], 2)
    return Correction(columns, torch.cat([inner.mT, row], 1), torch.cat([image, row_image], 2))


def _no_factor(grads: Tensor, size: int) -> tuple[Tensor, Tensor, Tensor]:
    nothing = grads.new_zeros(len(grads), 0)
    return grads.new_zeros(len(grads), size, 0), nothing, nothing


def momentum_powers(levels: Tensor, exponent: float, squares: Tensor, values: Tensor, momenta: Momenta) -> Tensor:
    """
    `level^(−p)` on one side of momenta whose `‖Mᵀu‖²` along each direction are `squares`, like `values` ℓ and `levels`
    of shape `(n, r)`; 1 is what the directions outside of the basis get.

    p is `exponent` for a direction whose gradients are noise and goes down to half of it where they agree:
    `p = exponent · (1 − ½ min(1, ‖M̂ᵀu‖ / sqrt(ℓ)))`. Where they agree, `ℓ` is the square of what is to be followed,
    and both sides to the power ½ would turn it upside down.

    In a fine-tuning, the directions outside of the basis are mostly noise, which such powers make the larger part of
    an update. So these count only as far as they carry signal: the share of `‖M̂‖²` that is more than noise would
    leave there, in units of what it is within the basis, and at most 1. Where steps are coarse beside the weights, or
    little is known of noise, they count in full, as `trusts` say: early in a training from scratch, all signal is in
    a few steep directions, along which steps must be short.
    """
    units = inverse(momenta.corrections.square())
    scaled = squares * units.unsqueeze(1)
    agreement = (scaled / values.clamp_min(_TINY)).sqrt().clamp_max(1.0)
    powers = levels.pow(-exponent * (1 - agreement / 2))
    energy, explained = scaled.sum(1), values.sum(1)
    rest = momenta.squares * units - energy
    kept, others = (
        (1 - momenta.noises * share / found.clamp_min(_TINY)).clamp_min(0.0) + LEAST_SIGNAL
        for share, found in ((explained, energy), (1 - explained, rest))
    )
    gains = (others / kept).clamp_max(1.0).pow(momenta.trusts).where(1 - explained > LEAST_REST, 1.0)
    return (powers / gains.unsqueeze(1)).clamp_max(1.0)


def noise_shares(starts: Tensor, momentum: float, nesterov: bool) -> Tensor:
    """
    `Σ w² / (Σ w)²` of the weights w that gradients have in a momentum, whose sum is `starts`: of `‖M̂‖²` in units of
    `E‖G‖²`, what is left where gradients are noise.
    """
    squares = (1 - momentum) / (1 + momentum) * starts * (2 - starts)
    if nesterov:  # as in the next momentum, where the newest gradient counts twice
        squares = squares + 2 * momentum * (1 - momentum) ** 2
    return squares / starts.square().clamp_min(_TINY)


def trusts(sizes: Tensor, largest: Tensor, noises: Tensor) -> Tensor:
    """
    `Momenta.trusts`: 0 where an update of size `c` would be as large as [`largest_sizes`] lets it, growing to 1 where
    it is [`SMALL_CHANGE`] times smaller; times `1 − FEWEST / N`, of a mean of `N = 1 / noises` gradients.

    The second factor is more than caution: the first gradients agree, as all of a network that is far from where it
    has to go, and if steps were turned to them alone, these would be too long along its steepest directions.
    """
    room = (largest / sizes.clamp_min(_TINY)).log() / math.log(SMALL_CHANGE)
    return room.clamp(0.0, 1.0) * (1 - FEWEST * noises).clamp_min(0.0)


class Images(NamedTuple):
    """
    Of bases of unit columns and a `G` of norm 1: `[G U_A, U_B]`, its image under `Gᵀ`, and `(G Gᵀ) U_B`; all
    `(n, d, columns)`.
    """

    left: Tensor
    right: Tensor
    outer: Tensor


def subspace_images(
    grads: Tensor, output: Tensor, input: Tensor, squares: Tensor, part: Part = WHOLE
) -> Routine[Images]:
    """All that is known of `G / ‖G‖` through both bases, whole, in three reads of `G`, whose `‖G‖²` are given."""
    scales = _over(inverse(squares).sqrt(), grads)
    (image,) = yield from part.columns.sum(grads.bmm(part.columns.take(input) * scales))
    left = torch.cat([image, part.rows.take(output)], 2)
    # In this order, G is read along its rows.
    (right,) = yield from part.rows.sum((left * scales).mT.bmm(grads).mT)
    outer = grads.bmm(right[:, :, input.shape[2] :] * scales)
    outer, right = yield from part.columns.sum(outer, part.columns.spread(right))
    left, outer = yield from part.rows.sum(part.rows.spread(left), part.rows.spread(outer))
    return Images(left, right, outer)


def subspace_step(
    grads: Tensor, output: Tensor, input: Tensor, weights: Tensor, squares: Tensor, part: Part = WHOLE
) -> Routine[tuple[Tensor, Tensor]]:
    """
    Follow the leading eigenvectors of the running averages of `G Gᵀ` and `Gᵀ G`, by one more gradient. Here `G` stands
    for gradients divided by their norms, whose squares are given, so that those of any size can be squared twice.

    Bases of shape `(n, d, r)` hold `U diag(ℓ)`, the largest ℓ last. On the output side, the average
    `(1 − w) U_B diag(ℓ) U_Bᵀ + w G Gᵀ` is solved exactly within the span of `U_B` and of `G U_A`, by Rayleigh and
    Ritz, and likewise on the input side. The images under `G` bring in the directions of this gradient that a basis
    lacks; the power iteration on `U_B` alone, which needs the same products, would take many steps to find them.
    """
    values, rank = (column_norms(output), column_norms(input)), input.shape[2]
    inner = unit_columns(input, values[1])
    left, right, outer_image = yield from subspace_images(grads, unit_columns(output, values[0]), inner, squares, part)
    columns = left, torch.cat([right[:, :, rank:], inner], 2)
    images = right, torch.cat([outer_image, left[:, :, :rank]], 2)
    is_valid = _over(weights > 0, output)
    new_output, new_input = _ritz_step(values, columns, images, weights)
    return torch.where(is_valid, new_output, output), torch.where(is_valid, new_input, input)


def _ritz_step(
    values: tuple[Tensor, Tensor], columns: tuple[Tensor, Tensor], images: tuple[Tensor, Tensor], weights: Tensor
) -> list[Tensor]:
    """
    [`subspace_step`] for both sides, each of which has the same number of `columns`. The last of these are those of
    `U`, which have the `values` ℓ; `images` are theirs under `Gᵀ`, or `G`.
    """
    # Gram and Schmidt from the last column, which is the longest of the basis, to the first. Where gradients have
    # fewer directions than there are columns, the rest is rounding, which must not count directions once more.
    grams = torch.cat([side.mT.bmm(side) for side in columns])
    grams.diagonal(dim1=1, dim2=2).mul_(1 + 4 * grams.shape[1] * _eps(grams)).add_(torch.finfo(grams.dtype).tiny)
    factors = torch.linalg.cholesky_ex(grams.flip((1, 2)), upper=True).L.flip((1, 2))
    one = torch.eye(grams.shape[1], dtype=grams.dtype, device=grams.device).expand_as(grams)
    inverses = torch.linalg.solve_triangular(factors, one, upper=False)
    seen = [side.bmm(inverse) for side, inverse in zip(images, inverses.chunk(2), strict=True)]
    # `factors` are the given columns in terms of the orthonormal ones; only those of `U` were in the average.
    old = torch.cat([torch.nn.functional.pad(side, (grams.shape[1] - side.shape[1], 0)) for side in values])
    weights = _over(weights.repeat(2), grams)
    projected = (factors * old.unsqueeze(1)).bmm(factors.mT)
    projected.lerp_(torch.cat([side.mT.bmm(side) for side in seen]), weights)
    ritz_values, vectors = torch.linalg.eigh(projected.where(weights > 0, 0.0))  # which may not be NaN
    turns = inverses.bmm(vectors * ritz_values.clamp_min(0.0).unsqueeze(1)).chunk(2)
    return [side.bmm(turn[:, :, -kept.shape[1] :]) for side, turn, kept in zip(columns, turns, values, strict=True)]


def column_norms(bases: Tensor) -> Tensor:
    """Norms `(n, r)` of the columns of matrices `(n, d, r)`."""
    return bases.square().sum(1).sqrt()  # many times faster than a norm over an axis that is not the last


def unit_columns(bases: Tensor, norms: Tensor | None = None) -> Tensor:
    """`U` of bases `U diag(ℓ)`; a column of zeros stays one."""
    norms = column_norms(bases) if norms is None else norms
    return bases / norms.clamp_min(_TINY).unsqueeze(1)


def initial_basis(dimension: int, rank: int, like: Tensor) -> Tensor:
    """
    A first guess `U` of shape `(dimension, min(rank, dimension))`: random unit columns that every process draws alike.

    Random and not structured, because structured guesses can lie in the null space of every gradient: behind a layer
    norm the constant vector does, and so it does at the logits of a softmax.
    """
    generator = torch.Generator().manual_seed(dimension)
    basis = torch.randn(dimension, min(rank, dimension), generator=generator, dtype=torch.float64)
    return (basis / _norm(basis, dim=0)).to(like.device, like.dtype)


def find_bases(
    grads: Tensor, output: Tensor, input: Tensor, valid: Tensor, squares: Tensor, part: Part = WHOLE
) -> Routine[tuple[Tensor, Tensor]]:
    """
    Turn guesses `U_B` and `U_A` to the dominant subspaces of first gradients, whose `‖G‖²` are given, for the layers
    that are `valid`.
    """
    valid = _over(valid, output)
    for _ in range(ITERATIONS):
        _, right, outer_image = yield from subspace_images(grads, output, input, squares, part)
        images = outer_image, right[:, :, : input.shape[2]]
        output, input = (
            torch.where(valid, torch.linalg.qr(image.nan_to_num())[0], basis).contiguous()  # as bases that are read
            for basis, image in zip((output, input), images, strict=True)
        )
    return output, input


def inverse(squares: Tensor) -> Tensor:
    """`1 / ‖G‖²`, a finite number also where that is 0."""
    return squares.clamp_min(_least(squares)).reciprocal()


def row_shares(squares: Tensor) -> Tensor:
    """Squared norms of rows in units of their mean."""
    return squares / squares.mean(1, keepdim=True).clamp_min(_TINY)


def largest_sizes(weight_norms: Tensor, numel: int, lr: float) -> Tensor:
    """
    Sizes of updates that change weights by [`LARGEST_CHANGE`] of their root mean square.

    A bound of trust: in a new network, whose weights are small, all gradients of the first steps agree, and steps of
    AdamW's full size throw away what its first weights were made for.
    """
    return weight_norms * (LARGEST_CHANGE / (math.sqrt(numel) * max(lr, _TINY)))


def row_scales(
    squares: Tensor,
    products: Tensor,
    shares: Tensor,
    norms: Tensor,
    numel: int,
    sizes: Tensor,
    largest: Tensor,
) -> Tensor:
    """
    What to multiply the rows of each update `P` with: no row dominates, and the step has the size of one of AdamW's.

    Rows are divided by the root of their running share, as in NorMuon (Li et al., arXiv 2510.05491). An update of
    AdamW has entries of the size `c = ‖M̂‖ / sqrt(E‖G‖²)`: 1 where gradients agree, about 0.2 where they are noise. So
    has this one, where they are noise. Where they agree (`c ≥ ½`) it is longer, so that it goes as far along the
    momentum as AdamW's size allows, `⟨P, M⟩ = c ‖M‖ sqrt(numel)`, up to twice as long; in between the cosine of update
    and momentum counts to the power `2c`. No `c` is above 1, nor above `largest` where noise is not.

    Args:
        squares, products (`Tensor` of shape `(n, d_out)`): `‖P‖²` and `⟨P, M⟩` of every row, where `M` is the momentum
            that was turned into `P`.
        shares (`Tensor` of shape `(n, d_out)`): running averages of `squares`, divided by their mean.
        norms (`Tensor` of shape `(n,)`): `‖M‖`.
        numel (`int`): number of entries of one `M`.
        sizes (`Tensor` of shape `(n,)`): `c`, from `M̂`, which is `M` corrected for its start from zero, as in Adam.
        largest (`Tensor` of shape `(n,)`): bounds on `c`, from [`largest_sizes`].

    Returns:
        `Tensor` of shape `(n, d_out)`.
    """
    levels = shares.clamp_min(_TINY).rsqrt()
    lengths = _norm(squares.sqrt() * levels, dim=1).clamp_min(_TINY)
    cosines = (_dot(products, levels) / (lengths * norms.clamp_min(_TINY))).clamp(LEAST_COSINE, 1.0)
    sizes = sizes.minimum(largest.clamp(NOISE_SIZE, 1.0))
    reaches = cosines.pow((2 * sizes).clamp_max(1.0))
    return levels * (sizes * math.sqrt(numel) / (reaches * lengths)).unsqueeze(1)


def squared_row_norms(matrices: Tensor) -> Tensor:
    """`‖·‖²` of every row of matrices `(n, d_out, d_in)`, of shape `(n, d_out)`."""
    if matrices.stride(-1) == 1:
        return _norm(matrices, dim=2).square()
    # Along an axis that is not the last one, a norm is slow and a sum is not; in parts, for the memory's sake.
    parts = matrices.mT.split(max(1, BLOCK // max(1, len(matrices) * matrices.shape[1])), dim=1)
    return torch.stack([part.square().sum(1) for part in parts]).sum(0)


def _norm(tensor: Tensor, dim: int | None = None) -> Tensor:
    norm: Tensor = torch.linalg.vector_norm(tensor, dim=dim)
    return norm


def _dot(left: Tensor, right: Tensor) -> Tensor:
    """Inner products over the last axis."""
    product: Tensor = torch.linalg.vecdot(left, right)
    return product


def _apply(matrices: Stacked, vectors: Tensor) -> Tensor:
    """`(n, d_out, d_in)` matrices times `(n, d_in)` vectors."""
    if not isinstance(matrices, Tensor):
        pairs = zip(matrices, vectors.unbind(), strict=True)
        return torch.stack([matrix.to(vector.dtype).mv(vector) for matrix, vector in pairs])
    return matrices.bmm(vectors.unsqueeze(2)).squeeze(2)


def _over(values: Tensor, stack: Tensor) -> Tensor:
    """A view of values `(n,)` that broadcasts over a stack."""
    return values.view(-1, *[1] * (stack.ndim - 1))


def _eps(tensor: Tensor) -> float:
    return torch.finfo(tensor.dtype).eps


def _least(tensor: Tensor) -> float:
    """The least number that has an inverse."""
    return torch.finfo(tensor.dtype).tiny
