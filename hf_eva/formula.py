"""
The mathematics, as functions on lists of tensors with one entry per layer; nothing here knows modules or optimizers.

Every function works in place on its first argument, leaves every decision on the device (no host read) and takes
gradients as matrices `(d_out, d_in)`. Vectors: `a` of shape `(d_in,)` is the mean input, `g` of shape `(d_out,)` the
output gradient. A bias is one more column of the gradient, whose input is the constant 1; it is kept as a separate
`(d_out,)` tensor so that nothing of a weight's size is allocated.

Source of the published forms: Zhang, Shi and Li, "Eva: Practical Second-order Optimization with Kronecker-vectorized
Approximation", ICLR 2023 (arXiv 2308.02123).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

ITERATIONS = 2  # on the first gradient; a random first guess would take some twenty steps to find its subspaces
LEAST_COSINE = 0.5  # of an update with its momentum: no step is more than twice as long as one of AdamW

_TINY = 1e-30  # keeps 0/0 at 0; far below any statistic of a layer that receives a gradient


def update_averages_(averages: Sequence[Tensor], values: Sequence[Tensor], weights: Sequence[Tensor]) -> None:
    """`m ← (1 − w) m + w · new` for each tensor; a weight of 0 keeps the average, also where the new value is NaN."""
    for average, value, weight in zip(averages, values, weights, strict=True):
        average.copy_(torch.where(weight > 0, average.lerp(value, weight), average))


def eva_(
    grads: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    a: Sequence[Tensor],
    g: Sequence[Tensor],
    damping: float,
    relative: bool,
) -> list[Tensor]:
    """
    Eva: `P = (1/γ) [G − gᵀGa / (γ + ‖a‖²‖g‖²) · g aᵀ]`, the solution of `(v vᵀ + γI) P = G` with `v = g ⊗ a`.

    With `relative=True`, `γ = damping · ‖a‖²‖g‖²` and the common factor `1/γ` is left out, so that the scale of `P` is
    that of `G` whatever the loss is multiplied by.

    Returns:
        `⟨P, G⟩` per layer, as 0-dim tensors.
    """
    inner = []
    for grad, bias, a_, g_ in zip(grads, biases, a, g, strict=True):
        a_norm, g_norm = a_.dot(a_), g_.dot(g_)
        s = g_.dot(grad.mv(a_))
        square = _square(grad)
        if bias is not None:
            a_norm = a_norm + 1
            s = s + g_.dot(bias)
            square = square + bias.dot(bias)
        inner.append(_remove_component_(grad, bias, a_, g_, s, s, square, a_norm * g_norm, damping, relative))
    return inner


def eva_f_(
    grads: Sequence[Tensor], biases: Sequence[Tensor | None], a: Sequence[Tensor], damping: float, relative: bool
) -> list[Tensor]:
    """
    Eva-f, FOOF with vectors: `P = (1/γ) [G − (Ga) aᵀ / (γ + ‖a‖²)]`, the solution of `P (a aᵀ + γI) = G`.

    `relative` and the returned value are as in [`eva_`], with `γ = damping · ‖a‖²`.
    """
    inner = []
    for grad, bias, a_ in zip(grads, biases, a, strict=True):
        a_norm = a_.dot(a_)
        projected = grad.mv(a_)
        square = _square(grad)
        if bias is not None:
            a_norm = a_norm + 1
            projected = projected + bias
            square = square + bias.dot(bias)
        one, s = torch.ones_like(a_norm), projected.dot(projected)
        inner.append(_remove_component_(grad, bias, a_, projected, one, s, square, a_norm, damping, relative))
    return inner


def _remove_component_(
    grad: Tensor,
    bias: Tensor | None,
    a: Tensor,
    column: Tensor,
    s: Tensor,
    projection: Tensor,
    square: Tensor,
    curvature: Tensor,
    damping: float,
    relative: bool,
) -> Tensor:
    """
    `G ← scale · (G − s / (γ + curvature) · column aᵀ)`. Returns `⟨P, G⟩`, for which `projection` is `⟨column aᵀ, G⟩`.
    """
    gamma = (damping * curvature).clamp_min(_TINY) if relative else torch.full_like(curvature, damping)
    scale = torch.ones_like(gamma) if relative else gamma.reciprocal()
    coefficient = s / (gamma + curvature)
    grad.addr_(column * coefficient, a, alpha=-1).mul_(scale)
    if bias is not None:
        bias.sub_(column * coefficient).mul_(scale)
    return scale * (square - coefficient * projection)


def axis_means(grad: Tensor) -> list[Tensor]:
    """Eva-s's vectors: for each axis of a tensor of order ≥ 2, its mean over all other axes."""
    return [grad.mean(dim=[j for j in range(grad.ndim) if j != i]) for i in range(grad.ndim)]


def eva_s_(
    grads: Sequence[Tensor], vectors: Sequence[Sequence[Tensor]], damping: float, relative: bool
) -> list[Tensor]:
    """
    Eva-s, Shampoo with vectors: `P = G − ⟨G,V⟩ / (γ + ∏‖v_i‖²) · V` with `V = v_1 ∘ … ∘ v_k`, then rescaled to
    `‖P‖ = ‖G‖`. Gradients of any order k ≥ 2. `relative` and the returned value are as in [`eva_`].
    """
    inner = []
    for grad, (first, *rest) in zip(grads, vectors, strict=True):
        last = rest[0]
        for vector in rest[1:]:
            last = torch.outer(last, vector).flatten()
        matrix = grad.view(len(first), -1) if grad.ndim > 2 else grad
        curvature = first.dot(first) * last.dot(last)
        gamma = (damping * curvature).clamp_min(_TINY) if relative else damping
        s = first.dot(matrix.mv(last))
        square = _square(matrix)
        coefficient = s / (gamma + curvature)
        matrix.addr_(first * coefficient, last, alpha=-1)
        ratio = square.sqrt() / _norm(matrix).clamp_min(_TINY)
        matrix.mul_(ratio)
        inner.append(ratio * (square - coefficient * s))
    return inner


def kl_factor(inner: Sequence[Tensor], lrs: Sequence[float], kl_clip: float) -> Tensor:
    """The published step bound `ν = min(1, sqrt(κ / Σ_layers lr² ⟨P, G⟩))`, one factor for all layers."""
    size = torch.stack([value * lr**2 for value, lr in zip(inner, lrs, strict=True)]).sum()
    return (kl_clip / size.clamp_min(_TINY)).sqrt().clamp_max(1.0)


def rescale_factor(before: Sequence[Tensor], after: Sequence[Tensor]) -> Tensor:
    """The factor that restores the joint norm of all tensors, from the norms of each before and after."""
    total = _norm(torch.stack(list(before)))
    return total / _norm(torch.stack(list(after))).clamp_min(_TINY)


def factor_levels(basis: Tensor, trace: Tensor, damping: float, relative: bool) -> tuple[Tensor, Tensor, Tensor]:
    """
    One factor `F ≈ ρI + U diag(ℓ − ρ) Uᵀ`, damped by ε and up to a scalar: `I + U diag(level − 1) Uᵀ`.

    Args:
        basis (`Tensor` of shape `(d, r)`): `U diag(ℓ)`; its columns are orthogonal and `ℓ` are their norms.
        trace (0-dim `Tensor`): trace of `F`. What the r vectors do not explain is spread evenly, as `ρ`.
        damping (`float`): ε, added to the spectrum; with `relative=True` in units of the mean eigenvalue `trace / d`.

    Returns:
        `U` of shape `(d, r)`, and `ℓ` and `level = (ℓ + ε) / (ρ + ε) ≥ 1` of shape `(r,)`.
    """
    (dimension, rank), values = basis.shape, _norm(basis, dim=0)
    rest = (trace - values.sum()).clamp_min(0.0) / max(dimension - rank, 1)
    shift = (damping * trace / dimension if relative else damping) + _TINY
    return unit_columns(basis), values, ((values + shift) / (rest + shift)).clamp_min(1.0)


def factored_(
    grads: Sequence[Tensor],
    outputs: Sequence[tuple[Tensor, Tensor, Tensor] | None],
    inputs: Sequence[tuple[Tensor, Tensor, Tensor] | None],
    exponent: float,
    corrections: Sequence[Tensor] | None,
) -> None:
    """
    `P = B^(−p) G A^(−p)` with the factors of [`factor_levels`]; `None` leaves a side out.

    With `corrections`, which divide `G` as Adam's do its momentum, p is `exponent` for a direction whose `G` is noise
    and goes down to half of it where gradients agree: `p = exponent · (1 − ½ min(1, ‖uᵀĜ‖ / sqrt(ℓ)))`. Where they
    agree, `ℓ` is the square of what is to be followed, and both sides to the power ½ would turn it upside down.
    """
    for index, (grad, output, input) in enumerate(zip(grads, outputs, inputs, strict=True)):
        correction = None if corrections is None else corrections[index]
        columns, rows = [], []  # P = G + columns @ rows: one rewrite of G for both sides
        if input is not None:
            basis, values, levels = input
            column = grad.mm(basis)
            f = _power(levels, exponent, _norm(column, dim=0), values, correction)
            columns.append(column * f)
            rows.append(basis.T)
        if output is not None:
            basis, values, levels = output
            row = basis.T.mm(grad)
            f = _power(levels, exponent, _norm(row, dim=1), values, correction)
            if input is not None:
                row.addmm_(basis.T.mm(columns[0]), rows[0])
            columns.append(basis * f)
            rows.append(row)
        if columns:
            grad.addmm_(torch.cat(columns, 1), torch.cat(rows, 0))


def _power(levels: Tensor, exponent: float, lengths: Tensor, values: Tensor, correction: Tensor | None) -> Tensor:
    """`level^(−p) − 1`, see [`factored_`]."""
    if correction is None:
        return levels.pow(-exponent) - 1
    agreement = (lengths / (correction * values.sqrt()).clamp_min(_TINY)).clamp_max(1.0)
    return levels.pow(-exponent * (1 - agreement / 2)) - 1


def gram_images(grad: Tensor, output: Tensor, input: Tensor) -> tuple[Tensor, Tensor]:
    """`(G Gᵀ) U_B` and `(Gᵀ G) U_A` of the unit columns `U` of two bases, in three reads of `G`."""
    output, input = unit_columns(output), unit_columns(input)
    both = grad.T.mm(torch.cat([output, grad.mm(input)], 1))
    return grad.mm(both[:, : output.shape[1]]), both[:, output.shape[1] :]


def update_bases_(bases: Sequence[Tensor], images: Sequence[Tensor], weights: Sequence[Tensor]) -> None:
    """
    One streaming subspace iteration each: `Z ← (1 − w) U diag(ℓ) + w · F U`, rotated to orthogonal columns.

    A basis of shape `(d, r)` holds `U diag(ℓ)`; its image is `F U`. The rotation by the eigenvectors of `ZᵀZ` gives
    the left singular vectors of `Z` times its singular values without a decomposition of anything larger than
    `(r, r)`; the next step's rotation removes what rounding leaves.
    """
    update_averages_(bases, images, weights)
    for basis in bases:
        if basis.shape[1] > 1:
            basis.copy_(basis.mm(torch.linalg.eigh(basis.T.mm(basis)).eigenvectors))


def unit_columns(basis: Tensor) -> Tensor:
    """`U` of a basis `U diag(ℓ)`; a column of zeros stays one."""
    return basis / _norm(basis, dim=0).clamp_min(_TINY)


def initial_basis(dimension: int, rank: int, like: Tensor) -> Tensor:
    """
    A first guess `U` of shape `(dimension, min(rank, dimension))`: random unit columns that every process draws alike.

    Random and not structured, because structured guesses can lie in the null space of every gradient: behind a layer
    norm the constant vector does, and so it does at the logits of a softmax.
    """
    generator = torch.Generator().manual_seed(dimension)
    basis = torch.randn(dimension, min(rank, dimension), generator=generator, dtype=torch.float64)
    return (basis / _norm(basis, dim=0)).to(like.device, like.dtype)


def find_bases_(grad: Tensor, bases: Sequence[Tensor], valid: Tensor) -> None:
    """Turn the guesses `U_B` and `U_A` towards the dominant subspaces of the first gradient, where that is `valid`."""
    for _ in range(ITERATIONS):
        for basis, image in zip(bases, gram_images(grad, *bases), strict=True):
            basis.copy_(torch.where(valid, torch.linalg.qr(image.nan_to_num())[0], basis))


def row_sums(updates: Sequence[Tensor], momenta: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """For every row of each update `P` its squared norm, and its inner product with that row of the momentum `M`."""
    squares = [_norm(update, dim=1).square() for update in updates]
    products = [torch.linalg.vecdot(update, m) for update, m in zip(updates, momenta, strict=True)]
    return squares, products


def row_shares(squares: Sequence[Tensor]) -> list[Tensor]:
    """Squared norms of rows in units of their mean."""
    return [square / square.mean().clamp_min(_TINY) for square in squares]


def row_scales(
    squares: Sequence[Tensor],
    products: Sequence[Tensor],
    shares: Sequence[Tensor],
    momenta: Sequence[Tensor],
    grad_squares: Sequence[Tensor],
    corrections: Sequence[Tensor],
) -> list[Tensor]:
    """
    What to multiply the rows of each update `P` with: no row dominates, and the step has the size of one of AdamW's.

    Rows are divided by the root of their running share, as in NorMuon (Li et al., arXiv 2510.05491). An update of
    AdamW has entries of the size `c = ‖M̂‖ / sqrt(E‖G‖²)`: 1 where gradients agree, about 0.2 where they are noise. So
    has this one, where they are noise. Where they agree (`c ≥ ½`) it is longer, so that it goes as far along the
    momentum as AdamW's size allows, `⟨P, M⟩ = c ‖M‖ sqrt(numel)`, up to twice as long; in between the cosine of update
    and momentum counts to the power `2c`.

    Args:
        squares, products (list of `Tensor` of shape `(d_out,)`): from [`row_sums`].
        shares (list of `Tensor` of shape `(d_out,)`): running averages of `squares`, divided by their mean.
        momenta (list of `Tensor`): `M`.
        grad_squares (list of 0-dim `Tensor`): running averages of `‖G‖²`.
        corrections (list of 0-dim `Tensor`): what to divide `M` by for its start from zero, as in Adam.
    """
    norms = torch._foreach_norm(list(momenta))
    scales = []
    for square, product, share, momentum, norm, grad_square, correction in zip(
        squares, products, shares, momenta, norms, grad_squares, corrections, strict=True
    ):
        level = share.clamp_min(_TINY).rsqrt()
        length = (square * level.square()).sum().sqrt().clamp_min(_TINY)
        cosine = ((product * level).sum() / (length * norm.clamp_min(_TINY))).clamp(LEAST_COSINE, 1.0)
        size = (norm / (correction * grad_square.sqrt()).clamp_min(_TINY)).clamp_max(1.0)
        reach = cosine.pow((2 * size).clamp_max(1.0))
        scales.append(level * (size * math.sqrt(momentum.numel()) / (reach * length)))
    return scales


def _norm(tensor: Tensor, dim: int | None = None) -> Tensor:
    norm: Tensor = torch.linalg.vector_norm(tensor, dim=dim)
    return norm


def _square(tensor: Tensor) -> Tensor:
    return _norm(tensor).square()
