"""What a training with `Eva` looks like, and the manners that a torch optimizer has to keep."""

import copy
import logging
from dataclasses import replace

import pytest
import torch
from helpers import (
    RECIPES,
    Branches,
    assert_equal,
    assert_near,
    convnet,
    data,
    difference,
    every_config,
    every_recipe,
    losses,
    mlp,
    train,
)
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from hf_eva import Eva, EvaConfig, create_eva_optimizer, plan


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


@every_recipe
def test_a_zero_gradient_at_the_first_step_moves_nothing(config):
    model = mlp()
    before = copy.deepcopy(model)
    optimizer = create_eva_optimizer(model, config=config)
    (0 * model(data(model)[0][0]).sum()).backward()
    optimizer.step()
    assert_equal(model, before)


def statistics(model, optimizer):
    """All of gradients; momentum goes on where there are none."""
    return {
        f"{name} {key}": value.clone()
        for name, parameter in model.named_parameters()
        for key, value in optimizer.state[parameter].items()
        if key.startswith("eva_") and key != "eva_momentum_square"
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
        train(model, create_eva_optimizer(model, lr=0.002, config=config))
    assert_near(*models, 1e-12)


@every_config
def test_autocast_trains_nearly_as_float32_does(config):
    """Whether it ends before the backward pass, as it should, or with the step."""
    first = mlp(dtype=torch.float32)
    models = [first, copy.deepcopy(first), copy.deepcopy(first)]
    for model, (forward, step) in zip(models, ((False, False), (True, False), (True, True)), strict=True):
        optimizer = create_eva_optimizer(model, lr=0.01, config=config)
        for seed in range(4):
            with torch.autocast("cpu", torch.bfloat16, enabled=step):
                with torch.autocast("cpu", torch.bfloat16, enabled=forward):
                    loss = losses(data(model, seed=seed))[0](model)
                loss.backward()
                optimizer.step()
            optimizer.zero_grad()
    float32, expected, found = models
    assert_near(expected, float32, 1e-2, 1e-3)
    assert_equal(found, expected)
    assert {value.dtype for state in optimizer.state.values() for value in state.values()} == {torch.float32}


class RoundedProducts(TorchFunctionMode):
    """What a GPU makes of float32 products where TF32 is allowed: their factors keep ten bits."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        is_product = "mm" in function.__name__ or function.__name__ in ("linear", "mv", "addmv_", "matmul")
        if is_product and torch.backends.cuda.matmul.fp32_precision == "tf32":
            args = [self.round(value) if isinstance(value, Tensor) else value for value in args]
        return function(*args, **(kwargs or {}))

    @staticmethod
    def round(factor):
        mantissa, exponent = torch.frexp(factor)
        return torch.ldexp((mantissa * 2**11).round() / 2**11, exponent)


def allow_by_class():
    torch.backends.cuda.matmul.allow_tf32 = True


def allow_by_name():
    torch.set_float32_matmul_precision("high")


def allow_everywhere():
    torch.backends.fp32_precision = "tf32"


@pytest.fixture
def precision():
    """Gives the precision of products back as it was."""
    yield
    torch.set_float32_matmul_precision("highest")
    for place in (torch.backends, torch.backends.cuda.matmul, torch.backends.mkldnn.matmul):
        place.fp32_precision = "none"


@pytest.mark.skipif(not hasattr(torch.backends, "fp32_precision"), reason="torch before 2.9 cannot tell it on a CPU")
@pytest.mark.parametrize(
    ("allow", "is_old"),
    [(allow_by_class, False), (allow_by_name, False), (allow_everywhere, False), (allow_by_name, True)],
)
@every_config
def test_products_of_a_step_are_not_rounded_where_those_of_the_model_are(
    config, allow, is_old, precision, monkeypatch
):
    if is_old:  # as with a torch that has one name for all
        monkeypatch.setattr("hf_eva.optimizer.hasattr", lambda *_: False, raising=False)
    expected = mlp(dtype=torch.float32)
    found = copy.deepcopy(expected)
    train(expected, create_eva_optimizer(expected, lr=0.01, config=config), steps=4)
    optimizer = create_eva_optimizer(found, lr=0.01, config=config)
    allow()
    for seed in range(4):
        losses(data(found, seed=seed))[0](found).backward()
        with RoundedProducts():
            assert (torch.eye(2) @ torch.full((2, 2), 1 / 3) != 1 / 3).all()
            optimizer.step()
        optimizer.zero_grad()
        assert torch.backends.cuda.matmul.fp32_precision == "tf32"
        assert allow is allow_everywhere or torch.get_float32_matmul_precision() == "high"
    assert_equal(found, expected)


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
    fused = optimizer.param_groups[0]["fused"]
    adamw = torch.optim.AdamW(expected.parameters(), lr=0.01, weight_decay=0.1, fused=fused)
    with caplog.at_level(logging.WARNING, logger="hf_eva"):
        for _ in range(3):
            model(torch.randn(7, 6)).square().sum().backward()
            expected.used.weight.grad = model.used.weight.grad.clone()
            optimizer.step()
            optimizer.zero_grad()
            adamw.step()
    assert_equal([model.used.weight], [expected.used.weight])
    assert len(caplog.records) == 1 and "'used'" in caplog.text


@pytest.mark.parametrize("variant", ["eva", "eva_s"])
def test_a_layer_that_comes_between_two_refreshes(variant):
    """Its first gradient refreshes what is made of gradients; statistics of tokens come with the next refresh."""
    first, late = nn.Linear(6, 5).double(), nn.Linear(5, 4).double()
    model, kept = nn.ModuleList([first, late]), []
    for interval in (1, 4):
        torch.manual_seed(0)
        config = EvaConfig(variant=variant, refresh_interval=interval)
        optimizer = create_eva_optimizer(model, lr=0.0, config=config)
        for step in range(5):
            x = first(torch.randn(7, 6, dtype=torch.float64))
            (late(x) if step >= 3 else x).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
            if step == 3:
                kept.append({k: v.clone() for k, v in optimizer.state[late.weight].items() if k.startswith("eva_")})
        optimizer.detach()
        assert optimizer.state[late.weight]["eva_updates"] == (2 if interval == 1 or variant == "eva_s" else 1)
    if variant == "eva_s":
        assert_equal(*(list(state.values()) for state in kept))
    else:
        assert kept[0] and not kept[1]


CLIPPED = {
    **RECIPES,
    **{f"{v}_{mode}": EvaConfig.paper(v, kl_mode=mode) for v in ("eva", "eva_f") for mode in ("none", "rescale")},
    "eva_s_relative": EvaConfig.paper("eva_s", damping_mode="relative"),
}


def moved(config, factor):
    """How far a step moves the planned weights, where gradients are clipped by a factor before it."""
    torch.manual_seed(0)
    model = mlp()
    before = copy.deepcopy(model)
    optimizer = create_eva_optimizer(model, lr=0.1, config=config)
    losses(data(model))[0](model).backward()
    for parameter in model.parameters():
        parameter.grad.mul_(factor)
    optimizer.step()
    return {name: (model[name].weight - before[name].weight).detach() for name in (0, 3, 5)}


@pytest.mark.parametrize("config", CLIPPED.values(), ids=CLIPPED)
def test_clipping_shortens_a_step_at_most_and_does_not_turn_it(config):
    """Damping stands beside statistics from before the clipping, or is relative to them."""
    factor = 2.0**-7  # below a norm the rows of a gradient sum to zero but for rounding, which this leaves as it is
    shortened = factor if config.base == "sgd" else 1.0
    whole = {name: shortened * step for name, step in moved(config, 1.0).items()}
    assert_near(moved(config, factor), whole, 1e-12)


def test_absolute_damping_beside_vectors_of_a_clipped_gradient():
    """The limit that docs/mathematics.md tells of: a matrix clipped by c is damped as by γ / c⁴."""
    plain, other = EvaConfig.paper("eva_s", damping=1e-3), EvaConfig.paper("eva_s", damping=1e-3 / 0.5**4)
    clipped = {name: 2 * step for name, step in moved(plain, 0.5).items()}
    assert_near(clipped, moved(other, 1.0), 1e-12)
    assert difference(clipped, moved(plain, 1.0))[0] > 1e-3


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


def test_two_implementations_at_once_are_refused():
    with pytest.raises(ValueError, match="fused must be left out or False where foreach is True"):
        create_eva_optimizer(mlp(), foreach=True, fused=True)


def test_sparse_gradients_are_refused():
    model = mlp()
    optimizer = create_eva_optimizer(model)
    model[0].weight.grad = torch.ones_like(model[0].weight).to_sparse()
    with pytest.raises(RuntimeError, match="Layer '0' has a sparse gradient"):
        optimizer.step()
