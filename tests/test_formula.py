"""Each function of `formula` against the dense form of the reference, for all shapes."""

import math

import pytest
import reference
import torch
from helpers import assert_equal, assert_near
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_eva import formula

few = settings(max_examples=20, deadline=None)
dimension = st.integers(1, 9)
damping = st.floats(1e-3, 10.0)
seed = st.integers(0, 2**16)


def draw(seed, *shapes):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]


def check(inner, P, G, expected, factor=1.0):
    """`P` is `factor` times the reference's direction, and `inner` is ⟨P, G⟩."""
    assert_near([P], [factor * expected], 1e-8 * max(1.0, expected.abs().max().item()))
    torch.testing.assert_close(inner, (P * G).sum(), rtol=1e-8, atol=1e-8)


@few
@given(dimension, dimension, damping, seed, st.booleans(), st.booleans(), st.sampled_from(["eva", "eva_f"]))
def test_eva_and_eva_f(d_out, d_in, damping, seed, with_bias, relative, variant):
    G, a, g = draw(seed, (d_out, d_in + with_bias), (d_in + with_bias,), (d_out,))
    if with_bias:
        a[-1] = 1.0
    curvature = a.square().sum() * (g.square().sum() if variant == "eva" else 1.0)
    gamma = damping * curvature.item() if relative else damping
    grads, biases = [G[:, :d_in].clone()], [G[:, -1].clone() if with_bias else None]
    if variant == "eva":
        inner = formula.eva_(grads, biases, [a[:d_in]], [g], damping, relative)
        expected = reference.eva(G, a, g, gamma)
    else:
        inner = formula.eva_f_(grads, biases, [a[:d_in]], damping, relative)
        expected = reference.eva_f(G, a, gamma)
    P = torch.cat([grads[0], biases[0].unsqueeze(1)], 1) if with_bias else grads[0]
    check(inner[0], P, G, expected, gamma if relative else 1.0)


@few
@given(st.lists(st.integers(1, 5), min_size=2, max_size=5), damping, seed, st.booleans())
def test_eva_s_of_any_order(shape, damping, seed, relative):
    G, *vectors = draw(seed, shape, *((d,) for d in shape))
    curvature = math.prod(v.square().sum().item() for v in vectors)
    P = G.clone()
    inner = formula.eva_s_([P], [vectors], damping, relative)
    expected = reference.eva_s(G, vectors, damping * curvature if relative else damping)
    check(inner[0], P, G, expected)
    torch.testing.assert_close(P.norm(), G.norm())
    assert_near(formula.axis_means(G), reference.axis_means(G), 1e-14)


@few
@given(st.integers(2, 12), st.data(), st.floats(1e-3, 1.0), st.floats(0.1, 1.0), seed, st.booleans())
def test_the_power_of_a_factor(d, data, damping, exponent, seed, relative):
    rank = data.draw(st.integers(1, d - 1))
    (matrix,) = draw(seed, (d, d))
    values, vectors = torch.linalg.eigh(matrix @ matrix.T)
    U, top = vectors[:, -rank:], values[-rank:]
    trace = values.sum()
    factor = formula.factor_levels(U * top, trace, damping, relative)
    found = torch.eye(d, dtype=torch.float64)
    formula.factored_([found], [factor], [None], exponent, None)
    epsilon = damping * (trace / d if relative else 1.0)
    dense = reference.inverse_power(reference.factor(U, top, trace), epsilon, exponent)
    rest = (trace - top.sum()) / (d - rank)
    assert_near([found], [dense * (rest + epsilon) ** exponent], 1e-8)
    assert_near([factor[0] * factor[1]], [U * top], 1e-12)
    assert factor[2].min() >= 1


@few
@given(dimension, dimension, seed, st.booleans(), st.booleans(), st.booleans())
def test_two_sides_multiply(d_out, d_in, seed, with_output, with_input, agree):
    G, U, V = draw(seed, (d_out, d_in), (d_out, 1), (d_in, 1))
    U, V, P = U / U.norm(), V / V.norm(), G.clone()
    ones = torch.ones(1, dtype=G.dtype)
    sides = {"output": (U, 4 * ones, 9 * ones), "input": (V, 25 * ones, 4 * ones)}
    wanted = [sides["output"] if with_output else None], [sides["input"] if with_input else None]
    formula.factored_([P], *wanted, 0.5, [0.5 * ones[0]] if agree else None)

    def power(side, projection):
        basis, value, level = sides[side]
        agreement = min(1.0, 2 * projection.norm().item() / value.item() ** 0.5) if agree else 0.0
        f = level ** (-0.5 * (1 - agreement / 2)) - 1
        return torch.eye(len(basis), dtype=G.dtype) + f * basis @ basis.T

    left = power("output", U.T @ G) if with_output else torch.eye(d_out, dtype=G.dtype)
    right = power("input", G @ V) if with_input else torch.eye(d_in, dtype=G.dtype)
    assert_near([P], [left @ G @ right], 1e-10)


def test_first_bases_are_the_subspaces_of_the_first_gradient():
    U, V = (torch.linalg.qr(matrix)[0] for matrix in draw(0, (9, 3), (7, 3)))
    G = U @ torch.diag(torch.tensor([5.0, 2.0, 1.0], dtype=torch.float64)) @ V.T
    bases = [formula.initial_basis(9, 3, G), formula.initial_basis(7, 3, G)]
    guesses = [basis.clone() for basis in bases]
    formula.find_bases_(G * torch.nan, bases, torch.tensor(False))
    assert_equal(bases, guesses)
    formula.find_bases_(G, bases, torch.tensor(True))
    assert_near([basis @ basis.T for basis in bases], [U @ U.T, V @ V.T], 1e-12)


@few
@given(st.integers(1, 12), st.integers(1, 4), seed, st.floats(0.01, 1.0))
def test_subspace_iteration(d, rank, seed, decay):
    """Up to the sign and the order of the columns, which no factor depends on."""
    rank = min(d, rank)
    matrices = [draw(seed + step, (d, d + 2))[0] for step in range(4)]
    basis = formula.initial_basis(d, rank, matrices[0])
    Z, U = None, basis.clone()
    for step, G in enumerate(matrices):
        weight = torch.tensor(decay if step else 1.0, dtype=torch.float64)
        formula.update_bases_([basis], [G @ G.T @ formula.unit_columns(basis)], [weight])
        Z, U, values = reference.subspace_iteration(Z, U, G @ G.T, decay)
        scale = values.max()
        assert_near([basis @ basis.T / scale**2], [Z @ Z.T / scale**2], 1e-9)
        # The columns are orthogonal to what eigenvectors of ZᵀZ resolve, of which the next step has to know nothing.
        gram = basis.T @ basis / scale**2
        assert_near([gram], [torch.diag(gram.diag())], 1e-9)


def test_subspace_iteration_finds_the_leading_eigenvectors():
    vectors, _ = torch.linalg.qr(draw(0, (20, 20))[0])
    values = torch.tensor([50.0, 20.0, 8.0] + [0.1] * 17, dtype=torch.float64)
    F = vectors @ torch.diag(values) @ vectors.T
    basis = formula.initial_basis(20, 3, F)
    for step in range(200):
        weight = torch.tensor(0.05 if step else 1.0, dtype=torch.float64)
        formula.update_bases_([basis], [F @ formula.unit_columns(basis)], [weight])
    assert_near([basis.norm(dim=0).sort(descending=True).values], [values[:3]], 0.01)
    U = formula.unit_columns(basis)
    assert_near([U @ U.T], [vectors[:, :3] @ vectors[:, :3].T], 1e-3)


@pytest.mark.parametrize("rank", [1, 4, 50])
def test_the_first_guess_is_the_same_everywhere(rank):
    like = torch.zeros((), dtype=torch.float32)
    torch.manual_seed(1)
    guess = formula.initial_basis(6, rank, like)
    torch.manual_seed(2)
    assert_equal([guess], [formula.initial_basis(6, rank, like)])
    assert guess.shape == (6, min(rank, 6)) and guess.dtype == torch.float32
    assert torch.linalg.matrix_rank(guess) == min(rank, 6)


def test_running_averages():
    averages = [torch.zeros(3), torch.ones(3), torch.ones(3)]
    news = [torch.full((3,), 2.0), torch.full((3,), 3.0), torch.full((3,), float("nan"))]
    formula.update_averages_(averages, news, [torch.tensor(1.0), torch.tensor(0.25), torch.tensor(0.0)])
    assert_equal(averages, [torch.full((3,), 2.0), torch.full((3,), 1.5), torch.ones(3)])


@few
@given(seed, st.floats(1e-6, 1e3), st.floats(1e-3, 1.0))
def test_factors_over_all_layers(seed, kl_clip, lr):
    G, H = draw(seed, (3, 2), (4, 5))
    P, Q = 2 * G, 3 * H
    inner = [(P * G).sum(), (Q * H).sum()]
    expected = reference.kl_factor([P, Q], [G, H], lr, kl_clip)
    torch.testing.assert_close(formula.kl_factor(inner, [lr, lr], kl_clip), expected)
    found = formula.rescale_factor([G.norm(), H.norm()], [P.norm(), Q.norm()])
    torch.testing.assert_close(found, reference.rescale_factor([P, Q], [G, H]))


def test_each_layer_has_its_learning_rate_in_the_kl_factor():
    found = formula.kl_factor([torch.tensor(2.0), torch.tensor(3.0)], [0.1, 0.2], 1e-3)
    torch.testing.assert_close(found.item(), math.sqrt(1e-3 / (0.01 * 2 + 0.04 * 3)))


def scales_of(P, M, correction, square, shares=None):
    squares, products = formula.row_sums([P], [M])
    shares = formula.row_shares(squares) if shares is None else [shares]
    correction, square = (torch.tensor(value, dtype=P.dtype) for value in (correction, square))
    return formula.row_scales(squares, products, shares, [M], [square], [correction])[0]


@few
@given(dimension, dimension, seed, st.floats(0.05, 1.0), st.floats(0.1, 1e4))
def test_updates_have_the_size_of_adamw(d_out, d_in, seed, correction, square):
    P, M, shares = draw(seed, (d_out, d_in), (d_out, d_in), (d_out,))
    shares = shares.abs() + 0.1
    square = torch.tensor(square, dtype=P.dtype)
    found = P * scales_of(P, M, correction, square.item(), shares).unsqueeze(1)
    assert_near([found], [reference.step_of_adamw(P, shares, M, correction, square)], 1e-12)


def test_noise_and_signal_have_the_sizes_of_adamw():
    """Entries of 1 where all gradients were alike; where they were noise, the share that momentum leaves of them."""
    (G,) = draw(0, (30, 20))
    G /= G.norm(dim=1, keepdim=True)  # the turn towards equal rows is none
    same = scales_of(G, G, 1.0, G.square().sum().item()) * G.square().mean(1).sqrt()
    assert_near([same], [torch.ones(30, dtype=G.dtype)], 1e-12)
    M = draw(1, (30, 20))[0] * 0.16
    noise = scales_of(M, M, 1.0, 600.0) * M.square().mean(1).sqrt()
    assert noise.mean() == pytest.approx(0.16, rel=0.1)
    assert_equal([scales_of(0 * M, M, 1.0, 600.0).isfinite()], [torch.ones(30, dtype=torch.bool)])


@pytest.mark.parametrize("relative", [True, False])
def test_zero_statistics_leave_the_gradient_alone(relative):
    G = draw(0, (3, 2))[0]
    zero = [torch.zeros(2, dtype=G.dtype)], [torch.zeros(3, dtype=G.dtype)]
    scale = 1.0 if relative else 10.0
    for apply in (
        lambda P: formula.eva_([P], [None], *zero, 0.1, relative),
        lambda P: formula.eva_f_([P], [None], zero[0], 0.1, relative),
    ):
        P = G.clone()
        apply(P)
        assert_near([P], [scale * G], 1e-14)
    P = G.clone()
    formula.eva_s_([P], [[zero[1][0], zero[0][0]]], 0.1, relative)
    assert_near([P], [G], 1e-14)
