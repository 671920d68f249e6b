"""
The mathematics, as functions of stacks: of n layers of equal shape at once. Nothing here knows modules or optimizers.

Every function leaves every decision on the device (no host read); a name that ends in `_` works in place on its first
argument. Gradients are matrices `(n, d_out, d_in)`. Vectors: `a` of shape `(n, d_in)` is the mean input, `g` of shape
`(n, d_out)` the output gradient. A bias is one more column of the gradient, whose input is the constant 1; it is kept
as a separate `(n, d_out)` tensor so that nothing of a weight's size is allocated.

Source of the published forms: Zhang, Shi and Li, "Eva: Practical Second-order Optimization with Kronecker-vectorized
Approximation", ICLR 2023 (arXiv 2308.02123).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .base import BLOCK

ITERATIONS = 2  # on the first gradient; a random first guess would take some twenty steps to find its subspaces
LEAST_COSINE = 0.5  # of an update with its momentum: no step is more than twice as long as one of AdamW
NOISE_SIZE = 0.2  # of AdamW's update where gradients are noise
LARGEST_CHANGE = 0.05  # of a weight in one step, where the step is longer than noise would make it

_TINY = 1e-30  # keeps 0/0 at 0; far below any statistic of a layer that receives a gradient


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

    def apply_(self, grads: Tensor, biases: Tensor | None = None) -> None:
        grads.baddbmm_(self.columns, self.rows)
        if biases is not None:
            biases.add_(self.columns.sum(2))

    def products(self, squares: Tensor) -> Tensor:
        """`⟨P, G⟩` of every row, from the rows' `‖G‖²`; both `(n, d_out)`."""
        return squares + (self.columns * self.images).sum(2)

    def squares(self, squares: Tensor) -> Tensor:
        """`‖P‖²` of every row, from the rows' `‖G‖²`; both `(n, d_out)`."""
        half = self.images + self.columns.bmm(self.rows.bmm(self.rows.mT)) / 2
        # What remains of a row that is removed almost entirely is rounding.
        return torch.maximum(squares + 2 * (self.columns * half).sum(2), squares * _eps(squares))


def eva(grads: Tensor, biases: Tensor | None, a: Tensor, g: Tensor, damping: float, relative: bool) -> Correction:
    """
    Eva: `P = G − gᵀGa / (γ + ‖a‖²‖g‖²) · g aᵀ`, which is γ times the solution of `(v vᵀ + γI) X = G`, `v = g ⊗ a`.

    With `relative=True`, `γ = damping · ‖a‖²‖g‖²`. The factor 1/γ is the caller's: it is one number for all layers
    where the damping is absolute, and left out where it is relative, so that the scale of `P` is that of `G` whatever
    the loss is multiplied by.
    """
    a_norm, image = _dot(a, a), _apply(grads, a)
    if biases is not None:
        a_norm, image = a_norm + 1, image + biases
    unit, g_norm = _unit(g)
    coefficient = _dot(unit, image) / _damped(a_norm, damping if relative else damping / g_norm, relative)
    return _rank_one(-unit * coefficient.unsqueeze(1), a, image)


def eva_f(grads: Tensor, biases: Tensor | None, a: Tensor, damping: float, relative: bool) -> Correction:
    """
    Eva-f, FOOF with vectors: `P = G − (Ga) aᵀ / (γ + ‖a‖²)`, which is γ times the solution of `X (a aᵀ + γI) = G`.

    `relative` and the factor 1/γ are as in [`eva`], with `γ = damping · ‖a‖²`.
    """
    a_norm, image = _dot(a, a), _apply(grads, a)
    if biases is not None:
        a_norm, image = a_norm + 1, image + biases
    return _rank_one(-image / _damped(a_norm, damping, relative).unsqueeze(1), a, image)


def eva_s(grads: Tensor, vectors: Sequence[Tensor], damping: float, relative: bool) -> Correction:
    """
    Eva-s, Shampoo with vectors: `P = G − ⟨G,V⟩ / (γ + ∏‖v_i‖²) · V` with `V = v_1 ∘ … ∘ v_k`, for gradients of any
    order k ≥ 2 as matrices `(n, d_1, d_2 ⋯ d_k)`. `relative` is as in [`eva`]; that `P` gets the norm of `G` is left
    to [`restore_norms_`].
    """
    (first, norm), (last, last_norm), *others = (_unit(vector) for vector in vectors)
    shift = damping if relative else damping / norm / last_norm
    for vector, other_norm in others:
        last = (last.unsqueeze(2) * vector.unsqueeze(1)).flatten(1)
        shift = shift if relative else shift / other_norm
    image = _apply(grads, last)
    return _rank_one(-first * (_dot(first, image) / (1 + shift)).unsqueeze(1), last, image)


def _unit(vectors: Tensor) -> tuple[Tensor, Tensor]:
    """Vectors of norm 1, or 0 where they are zero, and their squared norms: products of these may overflow."""
    squares = _dot(vectors, vectors)
    return vectors / squares.sqrt().clamp_min(math.sqrt(_least(vectors))).unsqueeze(1), squares


def _damped(curvature: Tensor, damping: float | Tensor, relative: bool) -> Tensor:
    return curvature + ((damping * curvature).clamp_min(_TINY) if relative else damping)


def _rank_one(column: Tensor, row: Tensor, image: Tensor) -> Correction:
    return Correction(column.unsqueeze(2), row.unsqueeze(1), image.unsqueeze(2))


def axis_means(grads: Tensor) -> list[Tensor]:
    """Eva-s's vectors: for each axis of gradients `(n, d_1, …, d_k)`, its mean over all other axes, `(n, d_i)`."""
    axes = range(1, grads.ndim)
    return [grads.mean(dim=[j for j in axes if j != i]) for i in axes]


def restore_norms_(directions: Tensor, squares: Tensor) -> Tensor:
    """Bring each direction to the norm whose square is given; returns the factors, of shape `(n,)`."""
    ratios = squares.sqrt() / squared_norms(directions).sqrt().clamp_min(_TINY)
    directions.mul_(_over(ratios, directions))
    return ratios


def kl_factor(inner: Sequence[Tensor], lrs: Sequence[float], kl_clip: float) -> Tensor:
    """
    The published step bound `ν = min(1, sqrt(κ / Σ_layers lr² ⟨P, G⟩))`, one factor for all layers, from the inner
    products of each stack and its learning rate.
    """
    size = torch.stack([values.sum() * lr**2 for values, lr in zip(inner, lrs, strict=True)]).sum()
    return (kl_clip / size.clamp_min(_TINY)).sqrt().clamp_max(1.0)


def rescale_factor(before: Sequence[Tensor], after: Sequence[Tensor]) -> Tensor:
    """The factor that restores the joint norm of all tensors, from the norms of each before and after."""
    total = _norm(torch.stack(list(before)))
    return total / _norm(torch.stack(list(after))).clamp_min(_TINY)


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


def factored(
    grads: Tensor,
    output: tuple[Tensor, Tensor, Tensor] | None,
    input: tuple[Tensor, Tensor, Tensor] | None,
    exponent: float,
    corrections: Tensor | None,
) -> Correction:
    """
    `P = B^(−p) G A^(−p)` with the factors of [`factor_levels`]; `None` leaves a side out, but not both.

    With `corrections` of shape `(n,)`, which divide `G` as Adam's do its momentum and bring it to the units of `ℓ`, p
    is `exponent` for a direction whose `G` is noise and goes down to half of it where gradients agree:
    `p = exponent · (1 − ½ min(1, ‖uᵀĜ‖ / sqrt(ℓ)))`. Where they agree, `ℓ` is the square of what is to be followed,
    and both sides to the power ½ would turn it upside down.
    """
    columns, rows, images = [], [], []
    if input is not None:
        basis, values, levels = input
        image = grads.bmm(basis)
        f = _power(levels, exponent, column_norms(image), values, corrections)
        columns.append(image * f.unsqueeze(1))
        rows.append(basis.mT)
        images.append(image)
    if output is not None:
        basis, values, levels = output
        row = basis.mT.bmm(grads)
        f = _power(levels, exponent, _norm(row, dim=2), values, corrections)
        if input is not None:
            row.baddbmm_(basis.mT.bmm(columns[0]), rows[0])
        columns.append(basis * f.unsqueeze(1))
        rows.append(row)
        images.append(grads.bmm(row.mT))
    return Correction(torch.cat(columns, 2), torch.cat(rows, 1), torch.cat(images, 2))


def _power(levels: Tensor, exponent: float, lengths: Tensor, values: Tensor, corrections: Tensor | None) -> Tensor:
    """`level^(−p) − 1`, see [`factored_`]."""
    if corrections is None:
        return levels.pow(-exponent) - 1
    agreement = (lengths / (corrections.unsqueeze(1) * values.sqrt()).clamp_min(_TINY)).clamp_max(1.0)
    return levels.pow(-exponent * (1 - agreement / 2)) - 1


def gram_images(grads: Tensor, output: Tensor, input: Tensor) -> tuple[Tensor, Tensor]:
    """`(G Gᵀ) U_B` and `(Gᵀ G) U_A` for bases of unit columns, in three reads of `G`."""
    both = torch.cat([output, grads.bmm(input)], 2).mT.bmm(grads)  # in this order, G is read along its rows
    rank = output.shape[2]
    return grads.bmm(both[:, :rank].mT), both[:, rank:].mT


def subspace_step(
    output: Tensor, input: Tensor, images: tuple[Tensor, Tensor], weights: Tensor
) -> tuple[Tensor, Tensor]:
    """
    One streaming subspace iteration for each side: `Z ← (1 − w) U diag(ℓ) + w · F U`, rotated to orthogonal columns; a
    weight of 0 leaves everything as it is.

    Bases of shape `(n, d, r)` hold `U diag(ℓ)`; their images are `F U`. The rotation by the eigenvectors of `ZᵀZ`
    gives the left singular vectors of `Z` times its singular values, the largest last, without a decomposition of
    anything larger than `(r, r)`; the next step's rotation removes what rounding leaves.
    """
    bases = [averaged(basis, image, weights) for basis, image in zip((output, input), images, strict=True)]
    grams = [basis.mT.bmm(basis) for basis in bases]
    if grams[0].shape == grams[1].shape:  # one call for both sides
        rotations = torch.linalg.eigh(torch.cat(grams)).eigenvectors.tensor_split(2)
    else:
        rotations = tuple(torch.linalg.eigh(gram).eigenvectors for gram in grams)
    is_new = _over(weights > 0, output)
    output, input = (
        torch.where(is_new, basis.bmm(rotation), old)
        for old, basis, rotation in zip((output, input), bases, rotations, strict=True)
    )
    return output, input


def column_norms(bases: Tensor) -> Tensor:
    """Norms `(n, r)` of the columns of matrices `(n, d, r)`."""
    return bases.square().sum(1).sqrt()  # many times faster than a norm over an axis that is not the last


def unit_columns(bases: Tensor, norms: Tensor | None = None) -> Tensor:
    """`U` of bases `U diag(ℓ)`; a column of zeros stays one."""
    norms = column_norms(bases) if norms is None else norms
    return bases / norms.clamp_min(_TINY).unsqueeze(1)


def orthogonal_columns(bases: Tensor, lengths: Tensor) -> Tensor:
    """
    `U` of bases `U diag(ℓ)`, by Gram and Schmidt from the last column, which is the longest, to the first; times
    `lengths` of shape `(n,)`.

    Where gradients have fewer directions than there are columns, what is left in the others is rounding, which shares
    directions with the longest: an image would count these again.
    """
    units = unit_columns(bases)
    grams = units.mT.bmm(units)
    grams.diagonal(dim1=1, dim2=2).add_(bases.shape[2] * _eps(bases))
    factors = torch.linalg.cholesky_ex(grams.flip((1, 2)), upper=True).L.flip((1, 2))
    return torch.linalg.solve_triangular(factors / _over(lengths, factors), units, upper=False, left=False)


def initial_basis(dimension: int, rank: int, like: Tensor) -> Tensor:
    """
    A first guess `U` of shape `(dimension, min(rank, dimension))`: random unit columns that every process draws alike.

    Random and not structured, because structured guesses can lie in the null space of every gradient: behind a layer
    norm the constant vector does, and so it does at the logits of a softmax.
    """
    generator = torch.Generator().manual_seed(dimension)
    basis = torch.randn(dimension, min(rank, dimension), generator=generator, dtype=torch.float64)
    return (basis / _norm(basis, dim=0)).to(like.device, like.dtype)


def find_bases(grads: Tensor, output: Tensor, input: Tensor, valid: Tensor, squares: Tensor) -> tuple[Tensor, Tensor]:
    """
    Turn guesses `U_B` and `U_A` to the dominant subspaces of first gradients, whose `‖G‖²` are given, for the layers
    that are `valid`.
    """
    valid, lengths = _over(valid, output), _over(inverse(squares), output)
    for _ in range(ITERATIONS):
        images = gram_images(grads, output * lengths, input * lengths)
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
    Sizes of updates that change weights by [`LARGEST_CHANGE`] of their root mean square, but at least [`NOISE_SIZE`].

    A bound of trust: in a new network, whose weights are small, all gradients of the first steps agree, and steps of
    AdamW's full size throw away what its first weights were made for.
    """
    return (weight_norms * (LARGEST_CHANGE / (math.sqrt(numel) * max(lr, _TINY)))).clamp_min(NOISE_SIZE)


def row_scales(
    squares: Tensor,
    products: Tensor,
    shares: Tensor,
    norms: Tensor,
    numel: int,
    grad_squares: Tensor,
    corrections: Tensor,
    largest: Tensor,
) -> Tensor:
    """
    What to multiply the rows of each update `P` with: no row dominates, and the step has the size of one of AdamW's.

    Rows are divided by the root of their running share, as in NorMuon (Li et al., arXiv 2510.05491). An update of
    AdamW has entries of the size `c = ‖M̂‖ / sqrt(E‖G‖²)`: 1 where gradients agree, about 0.2 where they are noise. So
    has this one, where they are noise. Where they agree (`c ≥ ½`) it is longer, so that it goes as far along the
    momentum as AdamW's size allows, `⟨P, M⟩ = c ‖M‖ sqrt(numel)`, up to twice as long; in between the cosine of update
    and momentum counts to the power `2c`. No `c` is above `largest`.

    Args:
        squares, products (`Tensor` of shape `(n, d_out)`): `‖P‖²` and `⟨P, M⟩` of every row, where `M` is the momentum
            that was turned into `P`.
        shares (`Tensor` of shape `(n, d_out)`): running averages of `squares`, divided by their mean.
        norms (`Tensor` of shape `(n,)`): `‖M‖`.
        numel (`int`): number of entries of one `M`.
        grad_squares (`Tensor` of shape `(n,)`): running averages of `‖G‖²`.
        corrections (`Tensor` of shape `(n,)`): what to divide `M` by for its start from zero, as in Adam.
        largest (`Tensor` of shape `(n,)`): bounds on `c`, from [`largest_sizes`].

    Returns:
        `Tensor` of shape `(n, d_out)`.
    """
    levels = shares.clamp_min(_TINY).rsqrt()
    lengths = _norm(squares.sqrt() * levels, dim=1).clamp_min(_TINY)
    cosines = (_dot(products, levels) / (lengths * norms.clamp_min(_TINY))).clamp(LEAST_COSINE, 1.0)
    sizes = (norms / (corrections * grad_squares.sqrt()).clamp_min(_TINY)).minimum(largest.clamp_max(1.0))
    reaches = cosines.pow((2 * sizes).clamp_max(1.0))
    return levels * (sizes * math.sqrt(numel) / (reaches * lengths)).unsqueeze(1)


def squared_norms(stack: Tensor) -> Tensor:
    """`‖·‖²` of each tensor of a contiguous stack, of shape `(n,)`."""
    rows = stack.view(len(stack), -1, stack.shape[-1])
    return _norm(rows, dim=2).square().sum(1)


def squared_row_norms(matrices: Tensor) -> Tensor:
    """`‖·‖²` of every row of matrices `(n, d_out, d_in)`, of shape `(n, d_out)`."""
    if matrices.stride(-1) == 1:
        return _norm(matrices, dim=2).square()
    # Along an axis that is not the last one, a norm is slow and a sum is not; in parts, for the memory's sake.
    parts = matrices.mT.split(max(1, BLOCK // (len(matrices) * matrices.shape[1])), dim=1)
    return torch.stack([part.square().sum(1) for part in parts]).sum(0)


def _norm(tensor: Tensor, dim: int | None = None) -> Tensor:
    norm: Tensor = torch.linalg.vector_norm(tensor, dim=dim)
    return norm


def _dot(left: Tensor, right: Tensor) -> Tensor:
    """Inner products over the last axis."""
    product: Tensor = torch.linalg.vecdot(left, right)
    return product


def _apply(matrices: Tensor, vectors: Tensor) -> Tensor:
    """`(n, d_out, d_in)` matrices times `(n, d_in)` vectors."""
    return matrices.bmm(vectors.unsqueeze(2)).squeeze(2)


def _over(values: Tensor, stack: Tensor) -> Tensor:
    """A view of values `(n,)` that broadcasts over a stack."""
    return values.view(-1, *[1] * (stack.ndim - 1))


def _eps(tensor: Tensor) -> float:
    return torch.finfo(tensor.dtype).eps


def _least(tensor: Tensor) -> float:
    """The least number that has an inverse."""
    return torch.finfo(tensor.dtype).tiny
