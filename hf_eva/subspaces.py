"""
Low-rank bases that follow the leading eigenvectors of `G Gᵀ` and `Gᵀ G`, for stacks of gradients `(n, d_out, d_in)`.

The conventions are those of [`formula`].
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .formula import TINY, eps, inverse, norm, over
from .products import product
from .routines import Routine, at_once
from .shards import WHOLE, Part

ITERATIONS = 2  # on the first gradient; a random first guess would take some twenty steps to find its subspaces


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
    scales = over(inverse(squares).sqrt(), grads)
    (image,) = yield from part.columns.sum(product(grads, part.columns.take(input) * scales))
    left = torch.cat([image, part.rows.take(output)], 2)
    # In this order, G is read along its rows.
    (right,) = yield from part.rows.sum(product((left * scales).mT, grads).mT)
    outer = product(grads, right[:, :, input.shape[2] :] * scales)
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
    is_valid = over(weights > 0, output)
    new_output, new_input = yield from _ritz_step(values, columns, images, weights)
    return torch.where(is_valid, new_output, output), torch.where(is_valid, new_input, input)


def _ritz_step(
    values: tuple[Tensor, Tensor], columns: tuple[Tensor, Tensor], images: tuple[Tensor, Tensor], weights: Tensor
) -> Routine[list[Tensor]]:
    """
    [`subspace_step`] for both sides, each of which has the same number of `columns`. The last of these are those of
    `U`, which have the `values` ℓ; `images` are theirs under `Gᵀ`, or `G`.
    """
    grams = [side.mT.bmm(side) for side in columns]
    found = yield from at_once(_orthonormalized, *((gram,) for gram in grams))
    seen = [image.bmm(inverses) for image, (_, inverses) in zip(images, found, strict=True)]
    grams = [side.mT.bmm(side) for side in seen]
    turns = yield from at_once(
        _turned,
        *((*both, gram, of_side, weights) for both, gram, of_side in zip(found, grams, values, strict=True)),
    )
    return [side.bmm(turn) for side, turn in zip(columns, turns, strict=True)]


def _orthonormalized(grams: Tensor) -> tuple[Tensor, Tensor]:
    """
    Given columns in terms of orthonormal ones, and orthonormal columns in terms of the given ones, both `(n, k, k)`,
    from the Gram matrices of the given ones.
    """
    # Gram and Schmidt from the last column, which is the longest of the basis, to the first. Where gradients have
    # fewer directions than there are columns, the rest is rounding, which must not count directions once more.
    grams = grams.clone()
    grams.diagonal(dim1=1, dim2=2).mul_(1 + 4 * grams.shape[1] * eps(grams)).add_(torch.finfo(grams.dtype).tiny)
    factors = torch.linalg.cholesky_ex(grams.flip((1, 2)), upper=True).L.flip((1, 2))
    one = torch.eye(grams.shape[1], dtype=grams.dtype, device=grams.device).expand_as(grams)
    return factors, torch.linalg.solve_triangular(factors, one, upper=False)


def _turned(factors: Tensor, inverses: Tensor, grams: Tensor, values: Tensor, weights: Tensor) -> Tensor:
    """
    The new basis in terms of the given columns, `(n, k, r)`: of an average to which the last r of these belonged, with
    these values, and which gets the `grams` of the orthonormal ones' images.
    """
    rank, weights = values.shape[1], over(weights, grams)
    of_basis = factors[:, :, -rank:]
    projected = (of_basis * values.unsqueeze(1)).bmm(of_basis.mT)
    projected = projected.lerp(grams, weights).where(weights > 0, 0.0)  # what is decomposed may not be NaN
    ritz_values, vectors = torch.linalg.eigh(projected)
    return inverses.bmm(vectors[:, :, -rank:] * ritz_values[:, -rank:].clamp_min(0.0).unsqueeze(1))


def initial_basis(dimension: int, rank: int, like: Tensor) -> Tensor:
    """
    A first guess `U` of shape `(dimension, min(rank, dimension))`: random unit columns that every process draws alike.

    Random and not structured, because structured guesses can lie in the null space of every gradient: behind a layer
    norm the constant vector does, and so it does at the logits of a softmax.
    """
    generator = torch.Generator().manual_seed(dimension)
    basis = torch.randn(dimension, min(rank, dimension), generator=generator, dtype=torch.float64)
    return (basis / norm(basis, dim=0)).to(like.device, like.dtype)


def find_bases(
    grads: Tensor, output: Tensor, input: Tensor, valid: Tensor, squares: Tensor, part: Part = WHOLE
) -> Routine[tuple[Tensor, Tensor]]:
    """
    Turn guesses `U_B` and `U_A` to the dominant subspaces of first gradients, whose `‖G‖²` are given, for the layers
    that are `valid`.
    """
    valid = over(valid, output)
    for _ in range(ITERATIONS):
        _, right, outer_image = yield from subspace_images(grads, output, input, squares, part)
        images = outer_image, right[:, :, : input.shape[2]]
        output, input = (
            torch.where(valid, torch.linalg.qr(image.nan_to_num())[0], basis).contiguous()  # as bases that are read
            for basis, image in zip((output, input), images, strict=True)
        )
    return output, input


def column_norms(bases: Tensor) -> Tensor:
    """Norms `(n, r)` of the columns of matrices `(n, d, r)`."""
    return bases.square().sum(1).sqrt()  # many times faster than a norm over an axis that is not the last


def unit_columns(bases: Tensor, norms: Tensor | None = None) -> Tensor:
    """`U` of bases `U diag(ℓ)`; a column of zeros stays one."""
    norms = column_norms(bases) if norms is None else norms
    return bases / norms.clamp_min(TINY).unsqueeze(1)
