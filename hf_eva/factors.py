"""
The recipe: momenta `(n, d_out, d_in)` preconditioned by two low-rank factors, and scaled by the size of AdamW's.

The conventions are those of [`formula`].
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .formula import TINY, Correction, averaged, dot, inverse, least, norm
from .products import product
from .routines import Routine, at_once
from .shards import WHOLE, Part
from .subspaces import column_norms, unit_columns

LAYER_FACTOR = 4.0  # times AdamW's size: its learning rate suits what is steep, along which momenta are shortened
LEAST_COSINE = 0.5  # of an update with its momentum: no step is made more than twice as long for it
NOISE_SIZE = 0.2  # of AdamW's update where gradients are noise
LARGEST_CHANGE = 0.05  # of a weight in one step, where the step is longer than noise would make it
SMALL_CHANGE = 4.0  # times smaller than that, a step is no risk to a weight, and need not spread over all directions
FEWEST = 3.0  # gradients, from fewer of which nothing is known of noise
LEAST_SIGNAL = 0.03  # share of a momentum that counts as signal, whatever is measured
LEAST_KEPT = 1e-3  # share of a momentum in what is preconditioned; what is less would be lost in rounding
LEAST_REST = 1e-4  # of a trace; what is less may be rounding
LEAST_MOMENTUM = 1e-300  # whose logarithm is finite


class Factor(NamedTuple):
    """
    `F ≈ ρI + U diag(ℓ − ρ) Uᵀ`, damped by ε and up to a scalar: `I + U diag(level − 1) Uᵀ`, in units of the trace of
    `F`, so that gradients of any size can be squared twice.

    `basis` is `U` of shape `(n, d, r)`; `values` ℓ and `levels`, `(ℓ + ε) / (ρ + ε) ≥ 1`, are of shape `(n, r)`.
    """

    basis: Tensor
    values: Tensor
    levels: Tensor


def factors_of(
    bases: Sequence[Tensor], traces: Sequence[Tensor], damping: float, relative: bool
) -> Routine[list[Factor]]:
    """
    One factor for each side.

    Args:
        bases (tensors of shape `(n, d, r)`): `U diag(ℓ)`; its columns are orthogonal and `ℓ` are their norms. What
            the r vectors do not explain of the trace, which is 1, is spread evenly, as `ρ`.
        traces (tensors of shape `(n,)`): trace of `F`.
        damping (`float`): ε, added to the spectrum; with `relative=True` in units of the mean eigenvalue `1 / d`,
            otherwise in those of `F`.
    """
    values = [column_norms(side) for side in bases]
    sizes = (trace.new_full(trace.shape, side.shape[1]) for side, trace in zip(bases, traces, strict=True))
    levels = yield from at_once(_levels, *zip(values, traces, sizes, strict=True), damping=damping, relative=relative)
    sides = zip(bases, values, levels, strict=True)
    return [Factor(unit_columns(basis, lengths), lengths, of_side) for basis, lengths, of_side in sides]


def _levels(values: Tensor, traces: Tensor, dimensions: Tensor, damping: float, relative: bool) -> Tensor:
    rest = (1 - values.sum(1)).clamp_min(0.0) / (dimensions - values.shape[1]).clamp_min(1.0)
    shift = (damping / (dimensions if relative else traces.clamp_min(least(traces))) + TINY).unsqueeze(1)
    return ((values + shift) / (rest.unsqueeze(1) + shift)).clamp_min(1.0)


class Momenta(NamedTuple):
    """
    What is known of momenta that are preconditioned in the place of gradients; all of shape `(n,)`.

    Times `units` they have the units of their gradients' factors, and are corrected for their start from zero. Then
    `sizes`, the `c` of [`row_scales`], are their norms. `noises` come from [`noise_shares`], and `trusts`, in [0, 1],
    say how far that what looks like noise may be left out. `agreements` come from [`agreements_of`].
    """

    units: Tensor
    sizes: Tensor
    noises: Tensor
    trusts: Tensor
    agreements: Tensor


def momenta_of(
    norms: Tensor,
    squares: Tensor,
    updates: Tensor,
    largest: Tensor,
    agreements: Tensor,
    momentum: float,
    nesterov: bool,
) -> Momenta:
    """
    [`Momenta`] from their norms, the running averages of `‖G‖²`, the number of gradients that each has seen,
    [`largest_sizes`] and [`agreements_of`].
    """
    starts = _starts(updates + nesterov, momentum)  # Nesterov's is one step ahead
    units, noises = inverse(starts * squares.sqrt()), noise_shares(starts, momentum, nesterov)
    sizes = norms * units
    return Momenta(units, sizes, noises, trusts(sizes, largest, noises), agreements)


def _starts(updates: Tensor, momentum: float) -> Tensor:
    """What a momentum that started from zero is divided by, as in Adam."""
    return -torch.expm1(updates * math.log(max(momentum, LEAST_MOMENTUM)))


def follow_momenta(
    momenta: Tensor,
    averages: Tensor,
    squares: Tensor,
    mixed: Tensor,
    updates: Tensor,
    weights: Tensor,
    momentum: float,
    nesterov: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """
    Follow how far gradients confirm the momenta `M` of the gradients before them, by one more.

    Args:
        momenta (`Tensor` of shape `(n,)`): `‖M‖²`.
        averages (`Tensor` of shape `(n, 2)`): running averages of `⟨M̂, G⟩` and of `‖M̂‖²`, where `M̂` is `M` corrected
            for its start from zero.
        squares, mixed (`Tensor` of shape `(n,)`): `‖G‖²`, and the squared norm of what is preconditioned, a mix of `M`
            and `G`, from which `⟨M, G⟩` follows without a read of either.
        updates, weights (`Tensor` of shape `(n,)`): the number of gradients with this one, and its weight in averages.

    Returns:
        `‖M‖²` of the next `M`, the new averages, and [`agreements_of`] them.
    """
    kept = momentum**2 if nesterov else momentum  # share of `M` in the mix
    if kept < LEAST_KEPT:
        return momenta, averages, agreements_of(averages)
    products = (mixed - kept**2 * momenta - (1 - kept) ** 2 * squares) / (2 * kept * (1 - kept))
    # Of an error of `momenta`, less than half is left after each step.
    after = momentum**2 * momenta + 2 * momentum * (1 - momentum) * products + (1 - momentum) ** 2 * squares
    units = inverse(_starts(updates - 1, momentum)).where(updates > 1, 0.0)  # before the first, `M` is nothing
    new = torch.stack([units * products, units.square() * momenta], 1)
    averages = averaged(averages, new, weights)
    return after.clamp_min(0.0), averages, agreements_of(averages)


def agreements_of(averages: Tensor) -> Tensor:
    """
    How far gradients confirm momenta, of shape `(n,)`: `avg ⟨M̂, G⟩ / avg ‖M̂‖²` from [`follow_momenta`], in [−1, 1].

    It is 1 where all gradients are alike, and 0 where they are noise, of whatever size: `M` is made of the gradients
    before `G`, so that nothing of their noise is counted as signal. It is negative where steps are too long for the
    curvature, so that each gradient takes back what those before it have asked for. Of the first gradient nothing
    is known but that it agrees with itself.
    """
    products, squares = averages.unbind(1)
    return (products * inverse(squares)).clamp(-1.0, 1.0).where(squares > 0, 1.0)


def factored(
    grads: Tensor,
    output: Factor | None,
    input: Factor | None,
    exponent: float,
    momenta: Momenta | None = None,
    part: Part = WHOLE,
) -> Routine[Correction]:
    """
    `P = B^(−p) G A^(−p)` with two factors; `None` leaves a side out, but not both. Where `grads` are `momenta`, the
    powers are those of [`momentum_powers`].
    """
    d_out, d_in = grads.shape[1:]
    outer, *of_output = (part.rows.take(output.basis), *output[1:]) if output else _no_factor(grads, d_out)
    inner, *of_input = (part.columns.take(input.basis), *input[1:]) if input else _no_factor(grads, d_in)
    (image,) = yield from part.columns.sum(product(grads, inner))
    products = image.square().sum(1), outer.mT.bmm(image), product(outer.mT, grads)
    squares, cross, row = yield from part.rows.sum(*products)
    (row_squares,) = yield from part.columns.sum(row.square().sum(2))
    if momenta is None:
        inner_f, outer_f = (levels.pow(-exponent) - 1 for _, levels in (of_input, of_output))
    else:
        inner_f, outer_f = yield from at_once(
            _momentum_shifts, (squares, *of_input, *momenta), (row_squares, *of_output, *momenta), exponent=exponent
        )
    row.baddbmm_(cross * inner_f.unsqueeze(1), inner.mT)
    (row_image,) = yield from part.columns.sum(product(grads, row.mT))
    columns = torch.cat([image * inner_f.unsqueeze(1), outer * outer_f.unsqueeze(1)], 2)
    return Correction(columns, torch.cat([inner.mT, row], 1), torch.cat([image, row_image], 2))


def _no_factor(grads: Tensor, size: int) -> Factor:
    nothing = grads.new_zeros(len(grads), 0)
    return Factor(grads.new_zeros(len(grads), size, 0), nothing, nothing)


def _momentum_shifts(
    squares: Tensor,
    values: Tensor,
    levels: Tensor,
    units: Tensor,
    sizes: Tensor,
    noises: Tensor,
    trusts: Tensor,
    agreements: Tensor,
    exponent: float,
) -> Tensor:
    return momentum_powers(squares, values, levels, Momenta(units, sizes, noises, trusts, agreements), exponent) - 1


def momentum_powers(squares: Tensor, values: Tensor, levels: Tensor, momenta: Momenta, exponent: float) -> Tensor:
    """
    `level^(−p)` on one side of momenta whose `‖Mᵀu‖²` along each direction are `squares`, like `values` ℓ and `levels`
    of shape `(n, r)`; 1 is what the directions outside of the basis get.

    `p = exponent · (1 − ½ agreement)`: where gradients agree, `ℓ` is the square of what is to be followed, and both
    sides to the power ½ would turn it upside down. Where each takes back what those before it have asked for, steps
    are too long along what is steep, and p is larger.

    In a fine-tuning, the directions outside of the basis are mostly noise, which such powers make the larger part of
    an update. So these count only as far as they carry signal: the share of `‖M̂‖²` that is more than noise would
    leave there, in units of what it is within the basis, and at most 1. Of that each side takes the root, because most
    of an update lies outside of both bases. Where steps are coarse beside the weights, or little is known of noise,
    they count in full, as `trusts` say: early in a training from scratch, all signal is in a few steep directions,
    along which steps must be short.
    """
    powers = levels.pow(-exponent * (1 - momenta.agreements / 2).unsqueeze(1))
    energy, explained = (squares.sum(1).sqrt() * momenta.units).square(), values.sum(1)
    rest = 1 - explained
    expected, found = torch.stack([explained, rest]), torch.stack([energy, momenta.sizes.square() - energy])
    within, outside = (1 - momenta.noises * expected / found.clamp_min(TINY)).clamp_min(0.0) + LEAST_SIGNAL
    gains = (outside / within).clamp_max(1.0).pow(momenta.trusts / 2).where(rest > LEAST_REST, 1.0)
    return (powers / gains.unsqueeze(1)).clamp_max(1.0)


def noise_shares(starts: Tensor, momentum: float, nesterov: bool) -> Tensor:
    """
    `Σ w² / (Σ w)²` of the weights w that gradients have in a momentum, whose sum is `starts`: of `‖M̂‖²` in units of
    `E‖G‖²`, what is left where gradients are noise.
    """
    squares = (1 - momentum) / (1 + momentum) * starts * (2 - starts)
    if nesterov:  # as in the next momentum, where the newest gradient counts twice
        squares = squares + 2 * momentum * (1 - momentum) ** 2
    return squares / starts.square().clamp_min(TINY)


def trusts(sizes: Tensor, largest: Tensor, noises: Tensor) -> Tensor:
    """
    `Momenta.trusts`: 0 where an update of size `c` would be as large as [`largest_sizes`] lets it, growing to 1 where
    it is [`SMALL_CHANGE`] times smaller; times `1 − FEWEST / N`, of a mean of `N = 1 / noises` gradients.

    The second factor is more than caution: the first gradients agree, as all of a network that is far from where it
    has to go, and if steps were turned to them alone, these would be too long along its steepest directions.
    """
    room = (largest / sizes.clamp_min(TINY)).log() / math.log(SMALL_CHANGE)
    return room.clamp(0.0, 1.0) * (1 - FEWEST * noises).clamp_min(0.0)


def row_shares(squares: Tensor) -> Tensor:
    """Squared norms of rows in units of their mean."""
    return squares / squares.mean(1, keepdim=True).clamp_min(TINY)


def largest_sizes(weight_norms: Tensor, numel: float, lr: float) -> Tensor:
    """
    Sizes of updates, times [`LAYER_FACTOR`], that change weights by [`LARGEST_CHANGE`] of their root mean square.

    A bound of trust: in a new network, whose weights are small, all gradients of the first steps agree, and steps of
    AdamW's full size throw away what its first weights were made for.
    """
    return weight_norms * (LARGEST_CHANGE / (math.sqrt(numel) * max(LAYER_FACTOR * lr, TINY)))


def row_scales(
    squares: Tensor,
    products: Tensor,
    shares: Tensor,
    norms: Tensor,
    numels: Tensor,
    sizes: Tensor,
    largest: Tensor,
) -> Tensor:
    """
    What to multiply the rows of each update `P` with: no row dominates, and the step has [`LAYER_FACTOR`] times the
    size of one of AdamW's.

    Rows are divided by the root of their running share, as in NorMuon (Li et al., arXiv 2510.05491). An update of
    AdamW has entries of the size `c = ‖M̂‖ / sqrt(E‖G‖²)`: 1 where gradients agree, about 0.2 where they are noise.
    Times the factor so has this one, where they are noise. Where they agree (`c ≥ ½`) it is longer, so that it goes as
    far along the momentum as one of that size can, `⟨P, M⟩ = c ‖M‖ sqrt(numel)`, up to twice as long; in between the
    cosine of update and momentum counts to the power `2c`. No `c` is above 1, nor above `largest` where noise is not.

    Args:
        squares, products (`Tensor` of shape `(n, d_out)`): `‖P‖²` and `⟨P, M⟩` of every row, where `M` is the momentum
            that was turned into `P`.
        shares (`Tensor` of shape `(n, d_out)`): running averages of `squares`, divided by their mean.
        norms (`Tensor` of shape `(n,)`): `‖M‖`.
        numels (`Tensor` of shape `(n,)`): number of entries of each `M`, or of what its update should be as large as.
        sizes (`Tensor` of shape `(n,)`): `c`, from `M̂`, which is `M` corrected for its start from zero, as in Adam.
        largest (`Tensor` of shape `(n,)`): bounds on `c`, from [`largest_sizes`].

    Returns:
        `Tensor` of shape `(n, d_out)`.
    """
    levels = shares.clamp_min(TINY).rsqrt()
    lengths = norm(squares.sqrt() * levels, dim=1).clamp_min(TINY)
    cosines = (dot(products, levels) / (lengths * norms.clamp_min(TINY))).clamp(LEAST_COSINE, 1.0)
    sizes = sizes.minimum(largest.clamp(NOISE_SIZE, 1.0))
    reaches = cosines.pow((2 * sizes).clamp_max(1.0))
    return levels * (LAYER_FACTOR * sizes * numels.sqrt() / (reaches * lengths)).unsqueeze(1)
