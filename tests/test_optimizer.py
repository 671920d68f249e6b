"""`Eva` against the reference, and what a torch optimizer has to keep: its state dict, its precision, its manners."""

import copy
import io
import logging
import pickle
from dataclasses import replace

import pytest
import torch
from helpers import CONFIGS, assert_equal, assert_near, convnet, data, every_config, losses, mlp
from reference import Reference
from torch import nn

from hf_eva import Eva, EvaConfig, create_eva_optimizer, formula, plan

LINEAR = (nn.Linear, nn.Conv2d)
VARIANTS = ("eva", "eva_f", "eva_s")
RECIPES = (*VARIANTS, "rank_3")
STEPS = 5
# A direction that lies in a subspace up to rounding is rounding itself, and another one in the reference.
NEAR = {"eva": 1e-12, "eva_f": 1e-12, "eva_s": 1e-8}


def linear_names(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, LINEAR)]


def guess(dimension: int, rank: int) -> torch.Tensor:
    return formula.initial_basis(dimension, rank, torch.zeros((), dtype=torch.float64))


def train(model, optimizer, steps=STEPS, micro_batches=1, first=0, scale=1.0):
    for step in range(first, first + steps):
        for loss in losses(data(model, micro_batches, seed=step), scale):
            loss(model).backward()
        optimizer.step()
        model.zero_grad()


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


class Branches(nn.Module):
    """
    Two networks side by side; one is narrower than the rank. (In one network its neighbours would have gradients of
    fewer directions than the rank, and the reference would disagree about the directions that are rounding.)
    """

    def __init__(self):
        super().__init__()
        self.wide = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4))
        self.narrow = nn.Linear(3, 3)
        self.double()

    def forward(self, x):
        return self.wide(x) + nn.functional.pad(self.narrow(x[..., :3]), (0, 1))

    def __getitem__(self, index):
        return self.wide[index]


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


@pytest.mark.parametrize("config", [CONFIGS[name] for name in RECIPES], ids=RECIPES)
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


# Training ------------------------------------------------------------------------------------------------------------


@every_config
def test_the_loss_falls(family, config):
    model = family.build()
    if config.kl_mode == "clip":
        config = replace(config, kl_clip=1e-4)  # the bound decides the size of a step, whatever the learning rate is
    optimizer = create_eva_optimizer(model, lr=0.05 if config.base == "sgd" else 0.01, config=config)
    found = []
    for _ in range(24):
        loss = model(**family.batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append(loss.item())
    assert found[-1] < 0.8 * found[0], found


@every_config
@pytest.mark.parametrize("case", ["zero gradient", "one token", "one input and one output", "large", "small"])
def test_nothing_becomes_nan(config, case):
    sizes = (1, 1) if case == "one input and one output" else (3, 2)
    model = nn.Sequential(nn.Linear(*sizes), nn.Tanh(), nn.Linear(*reversed(sizes)))
    scales = {"large": 1e6, "small": 1e-6}
    lr = 0.01 / (scales.get(case, 1.0) if config.base == "sgd" else 1.0)
    optimizer = create_eva_optimizer(model, lr=lr, config=config)
    for step in range(6):
        x = torch.randn(1 if case == "one token" else 5, sizes[0])
        scale = step % 2 if case == "zero gradient" else scales.get(case, 1.0)
        (scale * model(x).square().sum()).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert all(parameter.isfinite().all() for parameter in model.parameters())
    assert all(value.isfinite().all() for state in optimizer.state.values() for value in state.values())


@pytest.mark.parametrize("config", [CONFIGS[name] for name in RECIPES], ids=RECIPES)
def test_a_zero_gradient_at_the_first_step_moves_nothing(config):
    model = mlp()
    before = copy.deepcopy(model)
    optimizer = create_eva_optimizer(model, config=config)
    (0 * model(data(model)[0][0]).sum()).backward()
    optimizer.step()
    assert_equal(model, before)


def statistics(model, optimizer):
    return {
        f"{name} {key}": value.clone()
        for name, parameter in model.named_parameters()
        for key, value in optimizer.state[parameter].items()
        if key.startswith("eva_")
    }


def step_with_gradients_of(value, model, optimizer):
    """And without a forward pass, so that there are no inputs either."""
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, value)
    optimizer.step()
    optimizer.zero_grad()


@every_config
def test_the_first_gradient_is_the_first_that_has_a_direction(config):
    """A gradient of zeros comes first for LoRA's A, beside a B of zeros."""
    models = [mlp(), mlp()]
    models[1].load_state_dict(models[0].state_dict())
    optimizers = [create_eva_optimizer(model, lr=0.0, config=config) for model in models]
    step_with_gradients_of(0.0, models[1], optimizers[1])
    for pair in zip(models, optimizers, strict=True):
        train(*pair, 2)
    one, other = map(statistics, models, optimizers)
    assert all(value.any() for value in other.values())
    assert_near(one, other, 1e-10)


@every_config
@pytest.mark.parametrize("value", [0.0, float("inf"), float("nan")])
def test_a_gradient_without_a_direction_leaves_the_statistics_alone(config, value):
    model = mlp()
    optimizer = create_eva_optimizer(model, config=config)
    train(model, optimizer, 2)
    before = statistics(model, optimizer)
    step_with_gradients_of(value, model, optimizer)
    assert_near(statistics(model, optimizer), before, 1e-12)


def test_layers_without_gradient_are_left_alone():
    model = Branches()
    before = copy.deepcopy(model)
    optimizer = create_eva_optimizer(model, weight_decay=0.1)
    model.wide(data(model)[0][0]).sum().backward()
    optimizer.step()
    assert_equal(model.narrow, before.narrow)
    assert not torch.equal(model.wide[0].weight, before.wide[0].weight)
    assert model.narrow.weight not in optimizer.state


@every_config
def test_the_memory_format_does_not_matter(config):
    models = [convnet(), convnet()]
    models[1].load_state_dict(models[0].state_dict())
    models[1].to(memory_format=torch.channels_last)
    for model in models:
        train(model, create_eva_optimizer(model, lr=0.01, config=config))
    assert_near(*models, 1e-12)


# State ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@every_config
def test_training_resumes_bit_for_bit(config, dtype):
    model = mlp(dtype=dtype)
    resumed = copy.deepcopy(model)
    optimizer = create_eva_optimizer(model, lr=0.01, weight_decay=0.1, config=config)
    train(model, optimizer, 3)
    saved = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, saved)
    train(model, optimizer, 3, first=3)

    saved.seek(0)
    checkpoint = torch.load(saved, weights_only=True)
    resumed.load_state_dict(checkpoint["model"])
    second = create_eva_optimizer(resumed, lr=0.01, weight_decay=0.1, config=config)
    second.load_state_dict(checkpoint["optimizer"])
    train(resumed, second, 3, first=3)
    assert_equal(resumed, model)
    for one, other in zip(
        second.state_dict()["state"].values(), optimizer.state_dict()["state"].values(), strict=True
    ):
        assert_equal(one, other)


def test_a_loaded_state_is_a_copy():
    model = mlp()
    optimizer = create_eva_optimizer(model)
    train(model, optimizer, 1)
    other = create_eva_optimizer(model)
    other.load_state_dict(optimizer.state_dict())
    train(model, optimizer, 1)
    assert not torch.equal(
        optimizer.state[model[0].weight]["momentum_buffer"], other.state[model[0].weight]["momentum_buffer"]
    )


@every_config
def test_the_state_is_lazy_and_plain(config):
    model = mlp()
    optimizer = create_eva_optimizer(model, config=config)
    assert optimizer.state_dict()["state"] == {}
    optimizer.load_state_dict(optimizer.state_dict())  # as `accelerator.prepare` does before the first step
    train(model, optimizer, 1)
    for state in optimizer.state_dict()["state"].values():
        assert all(isinstance(key, str) and type(value) is torch.Tensor for key, value in state.items())


@every_config
def test_a_low_precision_model_keeps_statistics_in_float32(config):
    model = mlp(dtype=torch.bfloat16)
    optimizer = create_eva_optimizer(model, lr=0.01, config=config)
    before = copy.deepcopy(model)
    train(model, optimizer, 2)
    for layer in optimizer.layers:
        assert {v.dtype for k, v in optimizer.state[layer.weight].items() if k.startswith("eva_")} == {torch.float32}
        assert layer.weight.dtype == torch.bfloat16 and layer.weight.isfinite().all()
    assert not torch.equal(before[0].weight, model[0].weight)


# Manners -------------------------------------------------------------------------------------------------------------


class Bypass(nn.Module):
    """Uses the weight of `used` and never calls it."""

    def __init__(self):
        super().__init__()
        self.called, self.used = nn.Linear(6, 5), nn.Linear(5, 4)

    def forward(self, x):
        return nn.functional.linear(self.called(x).tanh(), self.used.weight, self.used.bias)


@pytest.mark.parametrize("variant", ["eva", "eva_f"])
def test_a_layer_that_is_never_called_gets_the_base_rule_and_one_warning(variant, caplog):
    model = Bypass()
    expected = copy.deepcopy(model)
    optimizer = create_eva_optimizer(model, lr=0.01, weight_decay=0.1, config=EvaConfig(variant=variant))
    adamw = torch.optim.AdamW(expected.parameters(), lr=0.01, weight_decay=0.1)
    with caplog.at_level(logging.WARNING, logger="hf_eva"):
        for _ in range(3):
            model(torch.randn(7, 6)).square().sum().backward()
            expected.used.weight.grad = model.used.weight.grad.clone()
            optimizer.step()
            optimizer.zero_grad()
            adamw.step()
    assert_equal([model.used.weight], [expected.used.weight])
    assert len(caplog.records) == 1 and "'used'" in caplog.text


def test_a_closure_is_evaluated_with_gradients():
    model = mlp()
    optimizer = create_eva_optimizer(model)
    (loss,) = losses(data(model))

    def closure():
        optimizer.zero_grad()
        value = loss(model)
        value.backward()
        return value

    first = optimizer.step(closure)
    for _ in range(10):
        last = optimizer.step(closure)
    assert last < first


def test_schedulers_set_the_learning_rate_of_each_group():
    model = mlp()
    optimizer = create_eva_optimizer(model, lr=0.1)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.0)
    before = copy.deepcopy(model)
    train(model, optimizer, 1)
    scheduler.step()
    assert_equal(model, before)


def test_the_representation_names_all_hyperparameters():
    text = repr(create_eva_optimizer(mlp()))
    assert "layers: 3" in text
    assert all(name in text for name in ("lr", "weight_decay", *EvaConfig().to_dict()))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lr": -1.0}, r"lr must be a number in \[0, inf\)"),
        ({"lr": torch.tensor(0.1)}, "lr must be a number"),
        ({"betas": (0.9, 1.0)}, "betas must be two numbers"),
        ({"eps": -1.0}, "eps must be"),
        ({"weight_decay": -1.0}, "weight_decay must be"),
    ],
)
def test_values_out_of_range_are_refused(changes, message):
    model = mlp()
    with pytest.raises(ValueError, match=message):
        Eva(model.parameters(), plan=plan(model), **changes)


def test_a_planned_weight_must_be_among_the_parameters():
    model = mlp()
    with pytest.raises(ValueError, match="'3', whose weight is not among the parameters"):
        Eva(model[0].parameters(), plan=plan(model))


# What is refused -----------------------------------------------------------------------------------------------------


def trained(config: EvaConfig | None = None) -> tuple[nn.Module, Eva]:
    model = mlp()
    optimizer = create_eva_optimizer(model, config=config)
    model(data(model)[0][0]).square().sum().backward()
    optimizer.step()
    return model, optimizer


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (EvaConfig(rank=3), r"0 has eva_a\[6, 6\], eva_g\[5, 5\].* where eva_a\[6, 3\], eva_g\[5, 3\].* is expected"),
        (EvaConfig.paper("eva"), r"0 has eva_a\[6, 6\].* where eva_a\[6\], eva_g\[5\] is expected"),
        (EvaConfig.paper("eva_s"), r"where eva_v0\[5\], eva_v1\[6\] is expected"),
    ],
)
def test_the_state_of_another_config_is_refused(config, message):
    _, optimizer = trained(config)
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(trained()[1].state_dict())
    for index, state in before["state"].items():
        assert all(torch.equal(value, optimizer.state_dict()["state"][index][key]) for key, value in state.items())


def test_the_state_of_another_optimizer_is_refused():
    stranger, _ = trained()
    groups = [{"params": group["params"]} for group in create_eva_optimizer(stranger).param_groups]
    adamw = torch.optim.AdamW(groups)
    adamw.step()
    with pytest.raises(ValueError, match=r"0 has no statistics where .* is expected"):
        create_eva_optimizer(mlp()).load_state_dict(adamw.state_dict())


@pytest.mark.parametrize("duplicate", [copy.copy, copy.deepcopy, pickle.dumps])
def test_an_optimizer_is_not_copied(duplicate):
    _, optimizer = trained()
    with pytest.raises(TypeError, match="keep its state_dict"):
        duplicate(optimizer)


def test_two_implementations_at_once_are_refused():
    with pytest.raises(ValueError, match="fused must be left out or False where foreach is True"):
        create_eva_optimizer(mlp(), foreach=True, fused=True)


def test_sparse_gradients_are_refused():
    model = mlp()
    optimizer = create_eva_optimizer(model)
    model[0].weight.grad = torch.ones_like(model[0].weight).to_sparse()
    with pytest.raises(RuntimeError, match="Layer '0' has a sparse gradient"):
        optimizer.step()
