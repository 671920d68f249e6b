"""
The formulas a second time: in float64, for one layer, every matrix formed and every system solved.

To be read next to the papers, and to share nothing with the package. `G` is the gradient of a layer's weight as a
matrix `(d_out, d_in)`. Whole steps of them are in `reference_step`.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

# The published family ------------------------------------------------------------------------------------------------


def eva(G: Tensor, a: Tensor, g: Tensor, damping: float) -> Tensor:
    """Solves `(v vᵀ + γ I) P = G` with `v = g ⊗ a`."""
    v = torch.outer(g, a).flatten()
    C = torch.outer(v, v) + damping * torch.eye(len(v), dtype=v.dtype)
    return torch.linalg.solve(C, G.flatten()).view_as(G)


def eva_f(G: Tensor, a: Tensor, damping: float) -> Tensor:
    """`P = G (a aᵀ + γ I)⁻¹`."""
    A = torch.outer(a, a) + damping * torch.eye(len(a), dtype=a.dtype)
    return torch.linalg.solve(A, G.T).T


def axis_means(G: Tensor) -> list[Tensor]:
    """For each axis, the mean over all others."""
    return [G.transpose(0, i).flatten(1).mean(1) for i in range(G.ndim)]


def eva_s(G: Tensor, vectors: Sequence[Tensor], damping: float) -> Tensor:
    """`P = G − ⟨G,V⟩ / (γ + ∏‖v_i‖²) · V`, `V = v_1 ∘ … ∘ v_k`, with the norm of `G`; for `G` of any order."""
    letters = "abcdefgh"[: G.ndim]
    V = torch.einsum(f"{','.join(letters)}->{letters}", *vectors)
    curvature = torch.stack([v.square().sum() for v in vectors]).prod()
    P = G - (G * V).sum() / (damping + curvature) * V
    return P * G.norm() / P.norm()


def average(old: Tensor | None, new: Tensor, decay: float) -> Tensor:
    """`m ← (1 − ξ) m + ξ · new`; the first value stands for itself."""
    return new if old is None else (1 - decay) * old + decay * new


def weight(decay: float, step: int) -> float:
    """A plain mean of the first steps, until the newest would weigh less than ξ."""
    return max(decay, 1 / step)


def kl_factor(P: Sequence[Tensor], G: Sequence[Tensor], lr: float, kl_clip: float) -> Tensor:
    """`ν = min(1, sqrt(κ / Σ lr² ⟨P, G⟩))`."""
    size = sum(lr**2 * (p * g).sum() for p, g in zip(P, G, strict=True))
    return torch.sqrt(kl_clip / size).clamp(max=1.0)


def rescale_factor(P: Sequence[Tensor], G: Sequence[Tensor]) -> Tensor:
    """What makes `‖P‖ = ‖G‖` over all layers together."""
    return torch.sqrt(sum(g.square().sum() for g in G) / sum(p.square().sum() for p in P))


# The recipe ----------------------------------------------------------------------------------------------------------


def factor(U: Tensor, values: Tensor, trace: Tensor) -> Tensor:
    """`ρ I + U diag(ℓ − ρ) Uᵀ`: eigenvalues ℓ in the span of U, and what they leave of the trace evenly elsewhere."""
    d, r = U.shape
    rho = (trace - values.sum()).clamp(min=0) / max(d - r, 1)
    excess = (values - rho).clamp(min=0)  # a direction below the rest counts as a part of it
    return rho * torch.eye(d, dtype=U.dtype) + U @ torch.diag(excess) @ U.T


def inverse_power(matrix: Tensor, damping: float, exponent: float) -> Tensor:
    """`(F + ε I)^(−p)` by eigendecomposition."""
    values, vectors = torch.linalg.eigh(matrix)
    return vectors @ torch.diag((values + damping) ** -exponent) @ vectors.T


def inverse_powers(
    U: Tensor, values: Tensor, trace: Tensor, damping: float, exponents: Tensor, rest: float = 1.0
) -> Tensor:
    """
    As [`inverse_power`] of [`factor`], up to a scalar, with an exponent of its own for every direction of U, times
    `rest` for the others, but none of U above these.
    """
    d, r = U.shape
    rho = (trace - values.sum()).clamp(min=0) / max(d - r, 1)
    powers = ((torch.maximum(values, rho) + damping) / (rho + damping)) ** -exponents
    return rest * torch.eye(d, dtype=U.dtype) + U @ torch.diag(powers.clamp(max=rest) - rest) @ U.T


def noise_of_momentum(beta: float, steps: int, nesterov: bool) -> float:
    """What is left of the square of the mean of gradients that are noise, in units of the mean of their squares."""
    weights = [(1 - beta) * beta**age for age in range(steps)]
    if nesterov:
        weights = [beta * weight for weight in weights]
        weights[0] += 1 - beta
    return sum(weight**2 for weight in weights) / sum(weights) ** 2


def signal(found: Tensor, expected: Tensor, noise: float) -> Tensor:
    """The share of the squared momentum `found` that noise does not explain, where gradients have `expected`."""
    return (1 - noise * expected / found).clamp(min=0) + 0.03


def trust(size: Tensor, largest: Tensor, noise: float) -> Tensor:
    """1 where a step is at most a quarter of the largest and noise is known, 0 where it is as long as that."""
    return max(0.0, 1 - 3 * noise) * (torch.log(largest / size) / math.log(4)).clamp(0, 1)


def first_basis(guess: Tensor, matrix: Tensor) -> Tensor:
    """Two rounds of subspace iteration."""
    for _ in range(2):
        guess = torch.linalg.qr(matrix @ guess)[0]
    return guess


def ritz_step(old: Tensor, U: Tensor, others: Tensor, matrix: Tensor, decay: float) -> tuple[Tensor, Tensor, Tensor]:
    """
    The leading eigenvectors of `(1 − w) old + w F` among all vectors in the span of U and of `others`; returns
    `U diag(ℓ) Uᵀ`, U and ℓ.
    """
    left, values, _ = torch.linalg.svd(torch.cat([U, others / others.norm()], 1), full_matrices=False)
    Q = left[:, values > 1e-9]
    values, vectors = torch.linalg.eigh(Q.T @ ((1 - decay) * old + decay * matrix) @ Q)
    r = min(U.shape[1], Q.shape[1])
    U, values = Q @ vectors[:, -r:], values[-r:].clamp(min=0)
    return U @ torch.diag(values) @ U.T, U, values


def mean_squares_of_rows(P: Tensor) -> Tensor:
    return P.square().sum(1) / P.square().sum() * len(P)


def step_of_adamw(
    P: Tensor, shares: Tensor, M: Tensor, correction: float, square: Tensor, largest: float | Tensor = 1.0
) -> Tensor:
    """`P` with its rows divided by their usual size, four times as long as a step of AdamW."""
    P = P / shares.sqrt().unsqueeze(1)
    size = min(M.norm() / correction / square.sqrt(), torch.as_tensor(largest, dtype=P.dtype), torch.ones_like(square))
    cosine = ((P * M).sum() / (P.norm() * M.norm())).clamp(0.5, 1)
    return 4 * size / cosine ** (2 * size).clamp(max=1) * P.numel() ** 0.5 * P / P.norm()
