"""`Eva` against the reference, in float64: the published family and the recipe."""

import copy

import pytest
from helpers import STEPS, Branches, assert_near, convnet, data, every_recipe, guess, linear_names, losses, mlp, train
from reference_step import Reference
from torch import nn

from hf_eva import EvaConfig, create_eva_optimizer

VARIANTS = ("eva", "eva_f", "eva_s")
# A direction that lies in a subspace up to rounding is rounding itself, and another one in the reference.
NEAR = {"eva": 1e-12, "eva_f": 1e-12, "eva_s": 1e-8}


def train_twice(model, config, lr=0.05, weight_decay=0.1, micro_batches=2):
    """Trains `model` with the package and returns it beside a copy that the reference has trained."""
    expected = copy.deepcopy(model)
    optimizer = create_eva_optimizer(model, lr=lr, weight_decay=weight_decay, config=config)
    reference = Reference(expected, linear_names(expected), config, lr=lr, weight_decay=weight_decay, guess=guess)
    factors = []
    for step in range(STEPS):
        train(model, optimizer, 1, micro_batches, first=step)
        reference.step(*losses(data(expected, micro_batches, seed=step)))
        factors.append(reference.nu.item())
    return model, expected, factors


# The published family ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("build", [mlp, convnet])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_the_published_algorithm(variant, build, bias, momentum):
    model, expected, _ = train_twice(build(bias), EvaConfig.paper(variant, momentum=momentum))
    assert_near(model, expected, 1e-12)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(("kl_clip", "active"), [(1e-9, True), (1e6, False)])
def test_the_kl_clip(variant, kl_clip, active):
    model, expected, factors = train_twice(mlp(), EvaConfig.paper(variant, kl_clip=kl_clip), lr=0.002)
    assert all(factor < 1 if active else factor == 1 for factor in factors)
    assert_near(model, expected, 1e-12)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(
    "changes",
    [
        {"kl_mode": "rescale"},
        {"kl_mode": "none"},
        {"g_scale": "sum"},
        {"damping_mode": "relative", "damping": 0.1},
        {"damping_mode": "relative", "kl_mode": "rescale", "g_scale": "sum"},
        {"nesterov": True, "decay": 0.3},
    ],
    ids=str,
)
def test_the_published_algorithm_changed(variant, changes):
    # Without size control an absolute damping divides by γ: the learning rate has to be small. No norm follows a layer
    # of this model: before one, the means over outputs that "eva_s" takes are zero up to rounding.
    model, expected, _ = train_twice(convnet(), EvaConfig.paper(variant, **changes), lr=0.002)
    assert_near(model, expected, 1e-12)


def test_conv1d_is_a_transposed_linear():
    conv1d = pytest.importorskip("transformers.pytorch_utils").Conv1D
    linear = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4)).double()
    transposed = nn.Sequential(conv1d(5, 6), nn.Tanh(), conv1d(4, 5)).double()
    for one, other in ((linear[0], transposed[0]), (linear[2], transposed[2])):
        other.weight.data, other.bias.data = one.weight.data.T.clone(), one.bias.data.clone()
    for config in (*map(EvaConfig.paper, VARIANTS), *(EvaConfig(variant=variant, rank=1) for variant in VARIANTS)):
        pair = [copy.deepcopy(linear), copy.deepcopy(transposed)]
        for model in pair:
            train(model, create_eva_optimizer(model, lr=0.01, weight_decay=0.1, config=config))
        weights = [[model[i].weight.T if model is pair[1] else model[i].weight for i in (0, 2)] for model in pair]
        assert_near(*weights, 1e-12)
        assert_near([pair[0][0].bias, pair[0][2].bias], [pair[1][0].bias, pair[1][2].bias], 1e-12)


# The recipe ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("build", [mlp, Branches, convnet])
@pytest.mark.parametrize("exponent", [0.5, 1.0])
@pytest.mark.parametrize(("variant", "rank"), [("eva", 1), ("eva_f", 1), ("eva_s", 1), ("eva_s", 4)])
def test_the_recipe(build, variant, rank, exponent):
    config = EvaConfig(variant=variant, rank=rank, exponent=exponent)
    model, expected, _ = train_twice(build(), config, lr=0.01)
    assert_near(model, expected, NEAR[variant])


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(
    "changes",
    [
        {"damping_mode": "absolute"},
        {"g_scale": "mean"},
        {"nesterov": False, "momentum": 0.8},
        {"momentum": 0.0, "nesterov": False},
    ],
)
def test_the_recipe_changed(variant, changes):
    model, expected, _ = train_twice(mlp(), EvaConfig(variant=variant, rank=1, **changes), lr=0.01)
    assert_near(model, expected, NEAR[variant])


@pytest.mark.parametrize("config", [EvaConfig.paper, EvaConfig], ids=["paper", "recipe"])
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("interval", [2, 5])
def test_curvature_that_is_refreshed_now_and_then(config, variant, interval):
    config = config(variant=variant, refresh_interval=interval)
    model, expected, _ = train_twice(mlp(), config, lr=0.002 if config.base == "sgd" else 0.01)
    assert_near(model, expected, NEAR[variant])


@every_recipe
def test_the_scale_of_the_loss_does_not_matter(config):
    models = [mlp(), mlp()]
    models[1].load_state_dict(models[0].state_dict())
    for model, scale in zip(models, (1.0, 1000.0), strict=True):
        train(model, create_eva_optimizer(model, lr=0.01, config=config, eps=0.0), scale=scale)
    assert_near(*models, 1e-10)


@pytest.mark.parametrize("variant", VARIANTS)
def test_accumulation_does_not_matter(variant):
    models = [mlp(), mlp()]
    models[1].load_state_dict(models[0].state_dict())
    optimizers = [create_eva_optimizer(model, lr=0.01, config=EvaConfig(variant=variant, rank=1)) for model in models]
    for step in range(STEPS):
        (x, y), *_ = data(models[0], seed=step)
        for model, optimizer, parts in zip(models, optimizers, (1, 4), strict=True):
            for loss in losses(list(zip(x.chunk(parts), y.chunk(parts), strict=True))):
                loss(model).backward()
            optimizer.step()
            optimizer.zero_grad()
    assert_near(*models, NEAR[variant])
