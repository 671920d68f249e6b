"""The base rules: with preconditioning off, torch's own optimizers bit for bit."""

import copy
from collections import defaultdict

import pytest
import torch
from helpers import assert_equal, assert_near, losses, mlp
from helpers import data as batches

from hf_eva import Eva, EvaConfig, base, create_eva_optimizer, plan

IMPLEMENTATIONS = [
    {"foreach": None, "fused": None},
    {"foreach": True, "fused": None},
    {"foreach": False, "fused": None},
    {"foreach": None, "fused": True},
    {"foreach": None, "fused": False},
]


def adamw(params, dtype=torch.float32, **options):
    """torch's, whose default is the fused one where Eva's is."""
    if options["foreach"] is None and options["fused"] is None and dtype != torch.bfloat16:
        options["fused"] = True
    return torch.optim.AdamW(params, **options)


def groups(model, **first):
    matrices = [parameter for parameter in model.parameters() if parameter.ndim >= 2]
    others = [parameter for parameter in model.parameters() if parameter.ndim < 2]
    return [{"params": matrices, "weight_decay": 0.1, **first}, {"params": others, "weight_decay": 0.0}]


def train(model, optimizer, steps=5):
    for step in range(steps):
        losses(batches(model, seed=step))[0](model).backward()
        if step == 2:
            model[3].weight.grad = None  # a parameter that no loss has reached
        optimizer.step()
        optimizer.zero_grad()


def step_alike(model, optimizer, expected, other_optimizer, steps):
    """The same gradients for both, because preconditioned layers go their own way."""
    for _ in range(steps):
        for one, other in zip(model.parameters(), expected.parameters(), strict=True):
            one.grad = torch.randn_like(one)
            other.grad = one.grad.clone()
        optimizer.step()
        other_optimizer.step()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS, ids=str)
def test_switched_off_it_is_adamw(implementation, dtype):
    model = mlp(dtype=dtype)
    expected = copy.deepcopy(model)
    options = {"lr": 0.01, "betas": (0.8, 0.95), "eps": 1e-6, **implementation}
    optimizer = Eva(groups(model, lr=0.02), plan=plan(model), config=EvaConfig(variant="none"), **options)
    other_optimizer = adamw(groups(expected, lr=0.02), dtype, **options)
    train(model, optimizer)
    train(expected, other_optimizer)
    assert_equal(model, expected)
    for one, other in zip(model.parameters(), expected.parameters(), strict=True):
        assert_equal(optimizer.state[one], other_optimizer.state[other])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS, ids=str)
@pytest.mark.parametrize(("momentum", "nesterov"), [(0.0, False), (0.9, False), (0.9, True)])
def test_switched_off_it_is_sgd(implementation, dtype, momentum, nesterov):
    if implementation["fused"]:
        implementation = {"fused": True}
    model = mlp(dtype=dtype)
    expected = copy.deepcopy(model)
    config = EvaConfig(variant="none", base="sgd", momentum=momentum, nesterov=nesterov)
    optimizer = Eva(groups(model, lr=0.02), lr=0.01, plan=plan(model), config=config, **implementation)
    sgd = torch.optim.SGD(groups(expected, lr=0.02), lr=0.01, momentum=momentum, nesterov=nesterov, **implementation)
    train(model, optimizer)
    train(expected, sgd)
    assert_equal(model, expected)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS, ids=str)
@pytest.mark.parametrize("rank", [1, 4])
def test_parameters_outside_the_plan_get_adamw(implementation, rank):
    model = mlp(dtype=torch.float32)
    expected = copy.deepcopy(model)
    optimizer = create_eva_optimizer(model, lr=0.01, weight_decay=0.1, config=EvaConfig(rank=rank), **implementation)
    other_optimizer = adamw(groups(expected), lr=0.01, **implementation)
    step_alike(model, optimizer, expected, other_optimizer, 5)
    planned = [name for name, parameter in model.named_parameters() if parameter.ndim == 2]
    one, other = dict(model.named_parameters()), dict(expected.named_parameters())
    assert_equal(*({n: p.detach() for n, p in named.items() if n not in planned} for named in (one, other)))
    assert all(not torch.equal(one[name], other[name]) for name in planned)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_embeddings_keep_one_second_moment_per_row(dtype):
    tokens, d, factor, group = 5000, 16, 2.0, {"lr": 0.1, "betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": 0.5}
    embedding = torch.nn.Embedding(tokens, d).to(dtype).weight
    expected, first, second = embedding.detach().double().clone(), 0.0, torch.zeros(tokens, 1, dtype=torch.float64)
    state = defaultdict(dict)
    for step in range(1, 5):
        embedding.grad = torch.randn(tokens, d).to(dtype) * (torch.arange(tokens) % 3 == step % 3).unsqueeze(1)
        with torch.no_grad():
            base.row_adamw_([embedding], [base.mean_squares(embedding)], state, base.longer(group, factor))
        gradient = embedding.grad.double()
        first = 0.8 * first + 0.2 * gradient
        second = 0.95 * second + 0.05 * gradient.square().mean(1, keepdim=True)
        direction = first / (1 - 0.8**step) / ((second / (1 - 0.95**step)).sqrt() + 1e-6)
        expected = (1 - 0.1 * 0.5) * expected - 0.1 * factor * direction
    assert_near([embedding], [expected], 1e-12 if dtype == torch.float64 else 0.05)
    assert sum(value.numel() for value in state[embedding].values()) == tokens * d + tokens + 1


def test_embeddings_of_a_model_get_their_rule():
    model = torch.nn.Sequential(torch.nn.Embedding(7, 6), torch.nn.Linear(6, 5)).double()
    optimizer = create_eva_optimizer(model, lr=0.01)
    for one in model.parameters():
        one.grad = torch.randn_like(one)
    optimizer.step()
    assert optimizer.state[model[0].weight]["exp_avg_sq"].shape == (7, 1)
    assert optimizer.state[model[1].bias]["exp_avg_sq"].shape == (5,)
    switched_off = create_eva_optimizer(model, lr=0.01, config=EvaConfig(variant="none"))
    switched_off.step()
    assert switched_off.state[model[0].weight]["exp_avg_sq"].shape == (7, 6)


class Tables(torch.nn.Module):
    """Parameters that a module holds itself: two tables of embeddings, and what only looks like one."""

    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(6, 5)
        shapes = {"pos_embed": (1, 7, 6), "cls_token": (1, 1, 6), "experts": (1, 7, 6), "embedded_experts": (2, 7, 6)}
        for name, shape in shapes.items():
            setattr(self, name, torch.nn.Parameter(torch.randn(shape)))


def test_tables_of_embeddings_step_as_far_as_embeddings():
    model = Tables().double()
    expected = copy.deepcopy(model)
    optimizer = create_eva_optimizer(model, lr=0.01, weight_decay=0.1)
    adamw = torch.optim.AdamW(
        [
            {"params": [expected.pos_embed, expected.cls_token], "lr": 6 * 0.01, "weight_decay": 0.1 / 6},
            {"params": [expected.experts, expected.embedded_experts], "weight_decay": 0.1},
            {"params": [expected.layer.bias], "weight_decay": 0.0},
        ],
        lr=0.01,
        fused=True,
    )
    step_alike(model, optimizer, expected, adamw, 3)
    for name in ("pos_embed", "cls_token", "experts", "embedded_experts", "layer.bias"):
        assert_near([model.get_parameter(name)], [expected.get_parameter(name)], 1e-12)


@pytest.mark.parametrize("block", [base.BLOCK, 4], ids=["all at once", "in blocks"])
@pytest.mark.parametrize("nesterov", [True, False])
def test_momentum(nesterov, block, monkeypatch):
    monkeypatch.setattr(base, "BLOCK", block)
    buffer, beta = torch.zeros(3, 2, dtype=torch.float64), 0.9
    expected = buffer.clone()
    for _ in range(4):
        gradient = torch.randn(3, 2, dtype=torch.float64)
        update = gradient.clone()
        base.momentum_([update], [buffer], beta, nesterov)
        expected = beta * expected + (1 - beta) * gradient
        assert_near([buffer], [expected], 1e-15)
        assert_near([update], [beta * expected + (1 - beta) * gradient if nesterov else expected], 1e-15)


@pytest.mark.parametrize("sound", [None, True, False])
@pytest.mark.parametrize("block", [base.BLOCK, 4], ids=["all at once", "one by one"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_decoupled_weight_decay(dtype, block, sound, monkeypatch):
    monkeypatch.setattr(base, "BLOCK", block)
    shapes, precise = [(3, 2), (2, 5)], torch.promote_types(dtype, torch.float32)
    weights = [torch.randn(shape).to(dtype) for shape in shapes]
    updates = [torch.randn(shape, dtype=precise) for shape in shapes]
    scales = [torch.rand(3, 1, dtype=precise), torch.rand(5, dtype=precise)]  # of rows, and of columns
    expected = [
        weight.double() if sound is False else (1 - 0.1 * 0.5) * weight.double() - 0.1 * scale * update
        for weight, update, scale in zip(weights, updates, scales, strict=True)
    ]
    flag = None if sound is None else torch.tensor(sound)
    kept = [scale * (sound is not False) for scale in scales]  # as a step that is not sound leaves them
    base.decoupled_(weights, updates, kept, lr=0.1, weight_decay=0.5, sound=flag)
    assert all(weight.dtype == dtype for weight in weights)
    assert_near(weights, expected, 1e-15 if dtype == torch.float64 else 0.02)


@pytest.mark.parametrize("nesterov", [False, True])
def test_momentum_of_low_precision_is_rounded_once_a_step(nesterov, monkeypatch):
    """And what is preconditioned is not: in bfloat16 a product with 0.95 alone would lose what a step adds."""
    monkeypatch.setattr(base, "BLOCK", 16)
    gradients = [torch.randn(5, 7), torch.randn(3, 4)]
    kept = [torch.randn_like(gradient).bfloat16() for gradient in gradients]
    averages = [0.95 * buffer.double() + 0.05 * grad.double() for buffer, grad in zip(kept, gradients, strict=True)]
    mixes = [
        0.95 * average + 0.05 * grad.double() if nesterov else average
        for average, grad in zip(averages, gradients, strict=True)
    ]
    base.momentum_(gradients, kept, 0.95, nesterov)
    assert_near(gradients, mixes, 1e-6)
    assert all(torch.equal(one, other.float().bfloat16()) for one, other in zip(kept, averages, strict=True))


def test_a_step_that_is_skipped_keeps_momentum_of_low_precision():
    gradient, kept = torch.full((40,), float("nan")), torch.randn(40).bfloat16()
    before = kept.clone()
    base.momentum_([gradient], [kept], 0.95, True, torch.tensor(False))
    assert torch.equal(kept, before) and gradient.isfinite().all()
