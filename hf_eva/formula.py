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

# AdamW's update has a root-mean-square size of about 0.2 per entry over a training (Liu et al., "Muon is scalable for
# LLM training", arXiv 2502.16982, section 2.2): the factor that lets AdamW's learning rate carry over.
ADAMW_RMS = 0.2

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


def factor_power(
    basis: Tensor, trace: Tensor, damping: float, relative: bool, exponent: float
) -> tuple[Tensor, Tensor]:
    """
    One factor `F ≈ ρI + U diag(ℓ − ρ) Uᵀ` to the power `−exponent`, up to a scalar: `I + U diag(f) Uᵀ`.

    Args:
        basis (`Tensor` of shape `(d, r)`): `U diag(ℓ)`; its columns are orthogonal and `ℓ` are their norms.
        trace (0-dim `Tensor`): trace of `F`. What the r vectors do not explain is spread evenly, as `ρ`.
        damping (`float`): ε, added to the spectrum; with `relative=True` in units of the mean eigenvalue `trace / d`.

    Returns:
        `U` of shape `(d, r)` and `f ≤ 0` of shape `(r,)`.
    """
    (dimension, rank), values = basis.shape, _norm(basis, dim=0)
    rest = (trace - values.sum()).clamp_min(0.0) / max(dimension - rank, 1)
    shift = (damping * trace / dimension if relative else damping) + _TINY
    f = ((values + shift) / (rest + shift)).pow(-exponent).sub(1.0).clamp_max(0.0)
    return unit_columns(basis), f


def factored_(
    grads: Sequence[Tensor],
    outputs: Sequence[tuple[Tensor, Tensor] | None],
    inputs: Sequence[tuple[Tensor, Tensor] | None],
) -> None:
    """`P = (I + U_B diag(f_B) U_Bᵀ) G (I + U_A diag(f_A) U_Aᵀ)`, see [`factor_power`]; `None` leaves a side out."""
    for grad, output, input in zip(grads, outputs, inputs, strict=True):
        columns, rows = [], []  # P = G + columns @ rows: one rewrite of G for both sides
        if input is not None:
            basis, f = input
            columns.append(grad.mm(basis) * f)
            rows.append(basis.T)
        if output is not None:
            basis, f = output
            row = basis.T.mm(grad)
            if input is not None:
                row.addmm_(basis.T.mm(columns[0]), rows[0])
            columns.append(basis * f)
            rows.append(row)
        if columns:
            grad.addmm_(torch.cat(columns, 1), torch.cat(rows, 0))


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


def adamw_scales(updates: Sequence[Tensor]) -> list[Tensor]:
    """For each update the 0-dim factor that gives it AdamW's size, `‖P‖ = 0.2 · sqrt(numel)`."""
    norms = torch._foreach_norm(list(updates))
    return [
        ADAMW_RMS * math.sqrt(update.numel()) / norm.clamp_min(_TINY)
        for update, norm in zip(updates, norms, strict=True)
    ]


def _norm(tensor: Tensor, dim: int | None = None) -> Tensor:
    norm: Tensor = torch.linalg.vector_norm(tensor, dim=dim)
    return norm


def _square(tensor: Tensor) -> Tensor:
    return _norm(tensor).square()
