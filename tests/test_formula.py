"""Each function of `formula`, `subspaces` and `factors` against the dense form of the reference, for all shapes."""

import math

import pytest
import reference
import torch
from helpers import assert_equal, assert_near
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_eva import factors, formula, subspaces
from hf_eva.routines import together

few = settings(max_examples=20, deadline=None)
dimension = st.integers(1, 9)
damping = st.floats(1e-3, 10.0)
seed = st.integers(0, 2**16)


def draw(seed, *shapes):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]


def result(routine):
    return together([routine])[0]


def stacked(*tensors):
    return [tensor.unsqueeze(0) for tensor in tensors]


def check(correction, G, expected, factor=1.0):
    """The direction is `factor` times the reference's; products and squares are those of the direction itself."""
    P = G.clone()
    correction.apply_(P)
    assert_near([P[0]], [factor * expected], 1e-8 * max(1.0, expected.abs().max().item()))
    squares = G.square().sum(2)
    torch.testing.assert_close(correction.products(squares), (P * G).sum(2), rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(
        correction.squares(squares, correction.grams()), P.square().sum(2), rtol=1e-8, atol=1e-8
    )


@few
@given(dimension, dimension, damping, seed, st.booleans(), st.sampled_from(["eva", "eva_f"]))
def test_eva_and_eva_f(d_out, d_in, damping, seed, relative, variant):
    G, a, g = draw(seed, (d_out, d_in), (d_in,), (d_out,))
    curvature = a.square().sum() * (g.square().sum() if variant == "eva" else 1.0)
    gamma = damping * curvature.item() if relative else damping
    if variant == "eva":
        correction = result(formula.eva(G.unsqueeze(0), None, *stacked(a, g), damping, relative))
        expected = reference.eva(G, a, g, gamma)
    else:
        correction = result(formula.eva_f(G.unsqueeze(0), None, a.unsqueeze(0), damping, relative))
        expected = reference.eva_f(G, a, gamma)
    check(correction, G.unsqueeze(0), expected, gamma)


@few
@given(dimension, dimension, damping, seed, st.booleans(), st.sampled_from(["eva", "eva_f"]))
def test_a_bias_is_a_column(d_out, d_in, damping, seed, relative, variant):
    G, a, g = draw(seed, (3, d_out, d_in + 1), (3, d_in + 1), (3, d_out))
    a[:, -1] = 1.0
    vectors = (a, g) if variant == "eva" else (a,)
    function = getattr(formula, variant)
    expected = G.clone()
    result(function(G, None, *vectors, damping, relative)).apply_(expected)
    P, biases = G[:, :, :-1].clone(), G[:, :, -1].clone()
    correction = result(function(P, biases, a[:, :-1], *vectors[1:], damping, relative))
    products = correction.products(G.square().sum(2))
    sums = result(correction.sums(P.square().sum((1, 2)), biases))
    correction.apply_(P)
    assert_near([torch.cat([P, (biases + correction.columns.sum(2)).unsqueeze(2)], 2)], [expected], 1e-12)
    torch.testing.assert_close(products, (expected * G).sum(2), rtol=1e-8, atol=1e-8)
    for found, (left, right) in zip(sums, ((G, G), (expected, G), (expected, expected)), strict=True):
        torch.testing.assert_close(found, (left * right).sum((1, 2)), rtol=1e-8, atol=1e-8)


@few
@given(st.lists(st.integers(1, 5), min_size=2, max_size=5), damping, seed, st.booleans())
def test_eva_s_of_any_order(shape, damping, seed, relative):
    G, *vectors = draw(seed, shape, *((d,) for d in shape))
    curvature = math.prod(v.square().sum().item() for v in vectors)
    P = G.view(1, shape[0], -1).clone()
    correction = result(formula.eva_s(P, stacked(*vectors), damping, relative))
    squares, _, after = result(correction.sums(P.square().sum((1, 2)), None))
    correction.apply_(P)
    P *= formula.norm_ratios(squares, after)
    expected = reference.eva_s(G, vectors, damping * curvature if relative else damping)
    assert_near([P.view(shape)], [expected], 1e-8 * max(1.0, expected.abs().max().item()))
    means = result(formula.axis_means(G.unsqueeze(0)))
    assert_near([mean[0] for mean in means], reference.axis_means(G), 1e-14)


def test_each_layer_of_a_stack_is_by_itself():
    G, a, g = draw(0, (3, 5, 4), (3, 4), (3, 5))
    U, V = draw(1, (3, 5, 2), (3, 4, 2))
    many = [
        result(formula.eva(G, None, a, g, 0.1, True)),
        result(formula.eva_f(G, None, a, 0.1, True)),
        result(formula.eva_s(G, [g, a], 0.1, True)),
        result(factors.factored(G, *result(factors.factors_of([U, V], [a[:, 0].abs() * 9] * 2, 0.1, True)), 0.5)),
    ]
    for i in range(3):
        one = slice(i, i + 1)
        sides = result(factors.factors_of([U[one], V[one]], [a[one, 0].abs() * 9] * 2, 0.1, True))
        alone = [
            result(formula.eva(G[one], None, a[one], g[one], 0.1, True)),
            result(formula.eva_f(G[one], None, a[one], 0.1, True)),
            result(formula.eva_s(G[one], [g[one], a[one]], 0.1, True)),
            result(factors.factored(G[one], *sides, 0.5)),
        ]
        for all_three, single in zip(many, alone, strict=True):
            assert_near([all_three.columns[one] @ all_three.rows[one]], [single.columns @ single.rows], 1e-13)


def test_what_is_left_of_a_row_that_is_removed_is_positive():
    """In float32 the products of vectors cancel to less than nothing."""
    G = torch.ones(1, 2, 1000) * torch.tensor([1.0, 3.0]).view(1, 2, 1)
    correction = result(formula.eva_f(G, None, torch.ones(1, 1000), 1e-12, True))
    assert (correction.squares(G.square().sum(2), correction.grams()) > 0).all()


@few
@given(st.integers(2, 12), st.data(), st.floats(1e-3, 1.0), st.floats(0.1, 1.0), seed, st.booleans())
def test_the_power_of_a_factor(d, data, damping, exponent, seed, relative):
    rank = data.draw(st.integers(1, d - 1))
    (matrix,) = draw(seed, (d, d))
    values, vectors = torch.linalg.eigh(matrix @ matrix.T)
    U, top = vectors[:, -rank:], values[-rank:]
    trace = values.sum()
    (factor,) = result(factors.factors_of(*([side] for side in stacked(U * top / trace, trace)), damping, relative))
    found = torch.eye(d, dtype=torch.float64).unsqueeze(0)
    result(factors.factored(found, factor, None, exponent)).apply_(found)
    epsilon = damping * (trace / d if relative else 1.0)
    dense = reference.inverse_power(reference.factor(U, top, trace), epsilon, exponent)
    rest = (trace - top.sum()) / (d - rank)
    assert_near([found[0]], [dense * (rest + epsilon) ** exponent], 1e-8)
    assert_near([factor.basis[0] * factor.values], [U * top / trace], 1e-12)
    assert factor.levels.min() >= 1


@few
@given(dimension, dimension, seed, st.sampled_from(["both", "output", "input"]), st.floats(-1, 1) | st.none())
def test_two_sides_multiply(d_out, d_in, seed, used, agreement):
    G, U, V = draw(seed, (d_out, d_in), (d_out, 1), (d_in, 1))
    U, V = U / U.norm(), V / V.norm()
    ones = torch.ones(1, dtype=G.dtype)
    sides = {"output": (U, 4 * ones, 9 * ones), "input": (V, 25 * ones, 4 * ones)}
    wanted = [factors.Factor(*stacked(*values)) if used in (side, "both") else None for side, values in sides.items()]
    momenta = None
    if agreement is not None:
        momenta = factors.Momenta(2 * ones, 2 * G.norm() * ones, 0 * ones, 0 * ones, agreement * ones)
    correction = result(factors.factored(G.unsqueeze(0), *wanted, 0.5, momenta))

    def power(side):
        basis, _, level = sides[side]
        f = (level ** (-0.5 * (1 - (agreement or 0.0) / 2)) - 1) if used in (side, "both") else 0.0
        return torch.eye(len(basis), dtype=G.dtype) + f * basis @ basis.T

    check(correction, G.unsqueeze(0), power("output") @ G @ power("input"))


def test_first_bases_are_the_subspaces_of_the_first_gradient():
    U, V = (torch.linalg.qr(matrix)[0] for matrix in draw(0, (9, 3), (7, 3)))
    G = (U @ torch.diag(torch.tensor([5.0, 2.0, 1.0], dtype=torch.float64)) @ V.T).unsqueeze(0)
    guesses = stacked(subspaces.initial_basis(9, 3, G), subspaces.initial_basis(7, 3, G))
    assert_equal(result(subspaces.find_bases(G * torch.nan, *guesses, torch.tensor([False]), torch.ones(1))), guesses)
    bases = result(subspaces.find_bases(G, *guesses, torch.tensor([True]), G.square().sum((1, 2))))
    assert_near([basis[0] @ basis[0].T for basis in bases], [U @ U.T, V @ V.T], 1e-12)


@few
@given(st.integers(1, 12), st.integers(1, 4), seed, st.floats(0.01, 1.0))
def test_bases_solve_within_what_the_gradient_shows(d, rank, seed, decay):
    gradients = [draw(seed + step, (1, d, d + 2))[0] for step in range(4)]
    bases = stacked(*(subspaces.initial_basis(size, min(rank, d), gradients[0]) for size in (d, d + 2)))
    dense = [(torch.zeros(len(basis[0]), len(basis[0]), dtype=basis.dtype), basis[0]) for basis in bases]
    for step, G in enumerate(gradients):
        weight = decay if step else 1.0
        bases = result(subspaces.subspace_step(G, *bases, torch.tensor([weight], dtype=torch.float64), torch.ones(1)))
        seen = zip((G[0], G[0].T), dense, reversed(dense), strict=True)
        found = [reference.ritz_step(old, U, M @ other, M @ M.T, weight) for M, (old, U), (_, other) in seen]
        dense = [(F, U) for F, U, _ in found]
        for basis, (F, _, values) in zip(bases, found, strict=True):
            lengths = subspaces.column_norms(basis)
            # Gram matrices square the condition of a span, whose vectors may lie close to one another.
            assert_near([basis[0] / lengths @ basis[0].T / values.max()], [F / values.max()], 1e-7)
            gram = basis[0].T @ basis[0] / values.max() ** 2
            assert_near([gram], [torch.diag(gram.diag())], 1e-7)


def test_bases_find_the_leading_eigenvectors():
    (left, _), (right, _) = (torch.linalg.qr(matrix) for matrix in draw(0, (20, 20), (20, 20)))
    values = torch.tensor([50.0, 20.0, 8.0] + [0.1] * 17, dtype=torch.float64)
    G = (left @ torch.diag(values.sqrt()) @ right.T).unsqueeze(0)
    bases = stacked(subspaces.initial_basis(20, 3, G), subspaces.initial_basis(20, 3, G))
    for step in range(200):
        weight = torch.tensor([0.05 if step else 1.0], dtype=torch.float64)
        bases = result(subspaces.subspace_step(G, *bases, weight, torch.ones(1)))
    for basis, vectors in zip(bases, (left, right), strict=True):
        assert_near([subspaces.column_norms(basis)[0].sort(descending=True).values], [values[:3]], 0.01)
        U = subspaces.unit_columns(basis)[0]
        assert_near([U @ U.T], [vectors[:, :3] @ vectors[:, :3].T], 1e-3)


def test_no_direction_is_counted_twice_where_there_are_few():
    """Two outputs and 16 vectors: the eigenvalues that are found are those of `Gᵀ G`, whose sum is the trace."""
    generator = torch.Generator().manual_seed(0)
    mean = torch.randn(1, 2, 384, generator=generator)
    bases = [subspaces.initial_basis(d, 16, mean).unsqueeze(0) for d in (2, 384)]
    trace = torch.zeros(())
    for step in range(10):
        G = mean + 0.3 * torch.randn(1, 2, 384, generator=generator)
        if step == 0:
            bases = result(subspaces.find_bases(G, *bases, torch.tensor([True]), torch.ones(1)))
        bases = result(
            subspaces.subspace_step(G, *bases, torch.tensor([weight := 0.05 if step else 1.0]), torch.ones(1))
        )
        trace = trace.lerp(G.square().sum(), weight)
        for basis in bases:
            assert subspaces.column_norms(basis).sum() <= 1.001 * trace
    assert subspaces.column_norms(bases[0]).sum() >= 0.999 * trace


@pytest.mark.parametrize("rank", [1, 4, 50])
def test_the_first_guess_is_the_same_everywhere(rank):
    like = torch.zeros((), dtype=torch.float32)
    torch.manual_seed(1)
    guess = subspaces.initial_basis(6, rank, like)
    torch.manual_seed(2)
    assert_equal([guess], [subspaces.initial_basis(6, rank, like)])
    assert guess.shape == (6, min(rank, 6)) and guess.dtype == torch.float32
    assert torch.linalg.matrix_rank(guess) == min(rank, 6)


def test_running_averages():
    averages = torch.tensor([[0.0, 0.0], [1.0, 1.0], [1.0, 1.0]])
    new = torch.tensor([[2.0, 2.0], [3.0, 3.0], [float("nan"), 5.0]])
    found = formula.averaged(averages, new, torch.tensor([1.0, 0.25, 0.0]))
    assert_equal([found], [torch.tensor([[2.0, 2.0], [1.5, 1.5], [1.0, 1.0]])])


@few
@given(seed, st.floats(1e-6, 1e3), st.floats(1e-3, 1.0))
def test_factors_over_all_layers(seed, kl_clip, lr):
    G, H = draw(seed, (3, 2), (4, 5))
    P, Q = 2 * G, 3 * H
    inner = [(P * G).sum(), (Q * H).sum()]
    expected = reference.kl_factor([P, Q], [G, H], lr, kl_clip)
    torch.testing.assert_close(formula.kl_factor(inner, [lr, lr], kl_clip), expected)
    found = formula.rescale_factor([G.norm().view(1), H.norm().view(1)], [P.norm().view(1), Q.norm().view(1)])
    torch.testing.assert_close(found, reference.rescale_factor([P, Q], [G, H]))


def test_each_stack_has_its_learning_rate_in_the_kl_factor():
    found = formula.kl_factor([torch.tensor([1.5, 0.5]), torch.tensor([3.0])], [0.1, 0.2], 1e-3)
    torch.testing.assert_close(found.item(), math.sqrt(1e-3 / (0.01 * 2 + 0.04 * 3)))


@pytest.mark.parametrize("shape", [(2, 5, 7), (1, 300, 400)])
def test_norms_of_rows(shape):
    (G,) = draw(0, shape)
    expected = G.square().sum(2)
    assert_near([formula.squared_row_norms(G)], [expected], 1e-12)
    assert_near([formula.squared_row_norms(G.mT.contiguous().mT)], [expected], 1e-12)
    assert_near([formula.squared_row_norms(G).sum(1)], [expected.sum(1)], 1e-9)


@few
@given(st.integers(3, 12), dimension, seed, st.floats(0.05, 0.95), st.floats(0.0, 1.0), st.floats(-1, 1))
def test_directions_outside_of_a_basis_count_as_far_as_they_are_signal(d, columns, seed, noise, trust, agreement):
    M, guess = draw(seed, (d, columns), (d, 2))
    U, one = torch.linalg.qr(guess)[0], torch.ones(1, dtype=M.dtype)
    values, trace, correction = torch.tensor([0.2, 0.5], dtype=M.dtype), 2.0, 1.7
    (factor,) = result(factors.factors_of([(U * values).unsqueeze(0)], [trace * one], 0.03, True))
    unit = one / (correction * trace**0.5)
    momenta = factors.Momenta(unit, M.norm() * unit, noise * one, trust * one, agreement * one)
    squares = (U.T @ M).square().sum(1).unsqueeze(0)
    powers = factors.momentum_powers(squares, factor.values, factor.levels, momenta, 0.5)[0]
    corrected = M / correction
    kept, others = (U.T @ corrected).square().sum(), (corrected - U @ (U.T @ corrected)).square().sum()
    signals = [reference.signal(x, share * trace, noise) for x, share in ((kept, values.sum()), (others, 0.3))]
    rest = (signals[1] / signals[0]).clamp(max=1) ** (trust / 2)
    exponent = 0.5 * (1 - agreement / 2)
    expected = reference.inverse_powers(U, values * trace, torch.tensor(trace), 0.03 * trace / d, exponent, rest)
    assert_near([torch.eye(d, dtype=M.dtype) + U @ torch.diag(powers - 1) @ U.T], [expected / rest], 1e-9)


def test_a_basis_that_explains_all_has_no_directions_outside():
    """What is left there is rounding, from which nothing can be told."""
    ones = torch.ones(1)
    for unexplained in (0.0, 1e-6):
        momenta = factors.Momenta(ones, (1 + unexplained) ** 0.5 * ones, 0.1 * ones, ones, ones)
        powers = factors.momentum_powers(
            ones.view(1, 1), (1 - unexplained) * torch.ones(1, 1), 4 * torch.ones(1, 1), momenta, 0.5
        )
        torch.testing.assert_close(powers, torch.full((1, 1), 4**-0.25), rtol=1e-4, atol=0)


@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("beta", [0.0, 0.5, 0.9, 0.99])
def test_how_far_gradients_confirm_momenta(beta, nesterov):
    """From norms alone, through a gradient of zero and over many steps, whose rounding must not add up."""
    known, M = (torch.zeros(1), torch.zeros(1, 2)), torch.zeros(6, 5, dtype=torch.float64)
    product, square = 0.0, 0.0
    for step in range(1, 300):
        G = draw(step, M.shape)[0] * (0.0 if step == 40 else 1 + (step > 150) * 30) + 0.2
        weight = max(0.2, 1 / step)
        before = M / (1 - beta ** (step - 1)) if step > 1 and beta else 0 * M
        product += weight * ((before * G).sum().item() - product)
        square += weight * (before.square().sum().item() - square)
        M = beta * M + (1 - beta) * G
        mixed = beta * M + (1 - beta) * G if nesterov else M
        seen = [torch.tensor([x]) for x in (G.square().sum().item(), mixed.square().sum().item(), step, weight)]
        *known, agreement = factors.follow_momenta(*known, *seen, beta, nesterov)
        expected = max(-1.0, min(1.0, product / square)) if square else 1.0
        assert agreement.item() == pytest.approx(expected, abs=1e-4)


def test_agreement_tells_signal_from_noise_and_from_steps_that_are_too_long():
    def agreement(gradients):
        known, M = [torch.zeros(shape, dtype=torch.float64) for shape in ((1,), (1, 2))], 0
        for step, G in enumerate(gradients, 1):
            M = 0.9 * M + 0.1 * G
            seen = [torch.tensor([x]).double() for x in (G.square().sum(), M.square().sum(), step, 1 / step)]
            *known, found = factors.follow_momenta(*known, *seen, 0.9, False)
        return found.item()

    noise = draw(0, (400, 2000))[0]
    assert agreement(torch.ones(400, 3)) == pytest.approx(1.0)
    assert agreement(noise) == pytest.approx(0.0, abs=0.05)
    assert agreement(noise + 10) == pytest.approx(1.0, abs=0.05)
    assert agreement([(-1.0) ** step * noise[0] for step in range(400)]) == -1.0
    assert agreement(noise[:1]) == 1.0


@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("beta", [0.0, 0.9, 0.95])
def test_what_noise_leaves_of_a_momentum(beta, nesterov):
    for steps in (1, 2, 7, 500):
        starts = torch.tensor([1 - beta ** (steps + nesterov)], dtype=torch.float64)
        found = factors.noise_shares(starts, beta, nesterov).item()
        assert found == pytest.approx(reference.noise_of_momentum(beta, steps, nesterov), rel=1e-9)


def test_coarse_steps_and_unknown_noise_are_not_trusted():
    sizes, largest = torch.tensor([2.0, 1.0, 0.5, 0.25, 0.01, 0.0]), torch.ones(6)
    expected = torch.tensor([0.0, 0.0, 0.5, 1.0, 1.0, 1.0])
    torch.testing.assert_close(factors.trusts(sizes, largest, torch.zeros(6)), expected)
    torch.testing.assert_close(factors.trusts(sizes, largest, torch.full((6,), 0.25)), expected / 4)
    assert (factors.trusts(sizes, largest, torch.full((6,), 1 / 3 + 1e-6)) == 0).all()


def scales_of(P, M, correction, square, shares=None, largest=1.0):
    squares, products = P.square().sum(1).unsqueeze(0), (P * M).sum(1).unsqueeze(0)
    shares = factors.row_shares(squares) if shares is None else shares.unsqueeze(0)
    correction, square, largest = (torch.tensor([value], dtype=P.dtype) for value in (correction, square, largest))
    norms = M.norm().unsqueeze(0)
    sizes = norms / (correction * square.sqrt())
    numel = torch.tensor([M.numel()], dtype=P.dtype)
    return factors.row_scales(squares, products, shares, norms, numel, sizes, largest)[0]


@few
@given(dimension, dimension, seed, st.floats(0.05, 1.0), st.floats(0.1, 1e4), st.floats(0.2, 5.0))
def test_updates_have_four_times_the_size_of_adamw(d_out, d_in, seed, correction, square, largest):
    P, M, shares = draw(seed, (d_out, d_in), (d_out, d_in), (d_out,))
    shares = shares.abs() + 0.1
    square = torch.tensor(square, dtype=P.dtype)
    found = P * scales_of(P, M, correction, square.item(), shares, largest).unsqueeze(1)
    assert_near([found], [reference.step_of_adamw(P, shares, M, correction, square, largest)], 1e-12)


def test_no_step_changes_weights_much_unless_noise_would():
    W = torch.randn(2, 50, 40, dtype=torch.float64) * torch.tensor([0.02, 2.0]).view(2, 1, 1)
    lr, norms = 0.004, W.flatten(1).norm(dim=1)
    largest = factors.largest_sizes(norms, 2000, lr)
    assert largest[0] == pytest.approx(0.05 * W[0].square().mean().sqrt().item() / (4 * lr))
    P, M = draw(0, (5, 4), (5, 4))
    sizes = [
        P.mul(scales_of(P, M, 1.0, M.square().sum().item(), None, largest).unsqueeze(1)).norm()
        for largest in (0.1, 0.2)
    ]
    assert sizes[0] == sizes[1]  # where a step is coarse, that of noise is let through
    assert factors.largest_sizes(norms, 2000, 0.0).isfinite().all()


def test_noise_and_signal_have_four_times_the_sizes_of_adamw():
    """Entries of 4 where all gradients were alike; where they were noise, four times what momentum leaves of them."""
    (G,) = draw(0, (30, 20))
    G /= G.norm(dim=1, keepdim=True)  # the turn towards equal rows is none
    same = scales_of(G, G, 1.0, G.square().sum().item()) * G.square().mean(1).sqrt()
    assert_near([same], [torch.full((30,), 4.0, dtype=G.dtype)], 1e-12)
    M = draw(1, (30, 20))[0] * 0.16
    noise = scales_of(M, M, 1.0, 600.0) * M.square().mean(1).sqrt()
    assert noise.mean() == pytest.approx(4 * 0.16, rel=0.1)
    assert_equal([scales_of(0 * M, M, 1.0, 600.0).isfinite()], [torch.ones(30, dtype=torch.bool)])


@pytest.mark.parametrize("relative", [True, False])
def test_zero_statistics_leave_the_gradient_alone(relative):
    (G,) = draw(0, (1, 3, 2))
    a, g = torch.zeros(1, 2, dtype=G.dtype), torch.zeros(1, 3, dtype=G.dtype)
    for correction in (
        result(formula.eva(G, None, a, g, 0.1, relative)),
        result(formula.eva_f(G, None, a, 0.1, relative)),
        result(formula.eva_s(G, [g, a], 0.1, relative)),
    ):
        P = G.clone()
        correction.apply_(P)
        assert_near([P], [G], 1e-14)
