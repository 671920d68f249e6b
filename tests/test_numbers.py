"""Numbers that go wrong: a step is right or skipped with one warning that names the layer; statistics stay sound."""

import copy
import logging
from types import SimpleNamespace

import pytest
import torch
from helpers import CONFIGS, FAMILIES, assert_equal, data, every_config, losses, mlp
from torch import nn

from hf_eva import create_eva_optimizer, soundness
from hf_eva import optimizer as step_of

BAD = (float("nan"), float("inf"), -float("inf"))
every_bad_number = pytest.mark.parametrize("value", BAD, ids=str)


@pytest.fixture(params=["host", "device"])
def decided(request, monkeypatch):
    """Where it is decided whether there is a step: the host must not wait for a device, whose masks then decide."""
    if request.param == "device":
        monkeypatch.setattr(step_of, "can_read", lambda tensor: False)


anywhere = pytest.mark.usefixtures("decided")


def plain(dtype=torch.float64) -> nn.Sequential:
    """Every parameter but the biases belongs to a layer that is preconditioned."""
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4)).to(dtype)


def backward(model, seed=0, scale=1.0):
    losses(data(model, seed=seed), scale)[0](model).backward()


def start(config, build=plain, steps=2, lr=0.01):
    model = build()
    optimizer = create_eva_optimizer(model, lr=lr, weight_decay=0.1, config=config)
    for seed in range(steps):
        backward(model, seed)
        optimizer.step()
        optimizer.zero_grad()
    return model, optimizer


def state_of(optimizer, *layers):
    return {
        f"{layer.name} {key}": value.clone()
        for layer in optimizer.layers
        if not layers or layer.name in layers
        for key, value in optimizer.state[layer.weight].items()
    }


def everything(optimizer):
    """The whole state, also that of AdamW and SGD."""
    return {
        f"{i} {key}": value.clone() for i, s in optimizer.state_dict()["state"].items() for key, value in s.items()
    }


def is_finite(model, optimizer) -> bool:
    tensors = [*model.parameters(), *(value for state in optimizer.state.values() for value in state.values())]
    return all(tensor.isfinite().all() for tensor in tensors)


@anywhere
@every_config
@every_bad_number
@pytest.mark.parametrize("name", ["0.weight", "1.bias", "3.bias"])
def test_a_bad_gradient_of_one_parameter_changes_nothing(config, value, name):
    """Of a layer, of a norm, or of a bias: all came from the same loss."""
    model, optimizer = start(config, mlp)
    before, state = copy.deepcopy(model), everything(optimizer)
    backward(model, 5)
    model.get_parameter(name).grad.view(-1)[2] = value
    optimizer.step()
    assert_equal(model, before)
    assert_equal(everything(optimizer), state)


@anywhere
@every_config
@every_bad_number
def test_a_step_without_one_sound_gradient_changes_nothing(config, value):
    """As after the clipping of a norm that is not finite, which puts NaN everywhere."""
    model, optimizer = start(config, mlp)
    before, state = copy.deepcopy(model), everything(optimizer)
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, value)
    optimizer.step()
    assert_equal(model, before)
    assert_equal(everything(optimizer), state)


@anywhere
@every_config
@every_bad_number
def test_a_bad_input_changes_nothing(config, value):
    model, optimizer = start(config)
    before, state = copy.deepcopy(model), everything(optimizer)
    x, y = data(model)[0]
    x[0, 0, 0] = value
    nn.functional.mse_loss(model(x), y).backward()
    optimizer.step()
    optimizer.zero_grad()
    assert_equal(model, before)
    assert_equal(everything(optimizer), state)


@anywhere
@pytest.mark.parametrize("base", ["adamw", "sgd"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("implementation", [{}, {"foreach": True}, {"foreach": False}, {"fused": True}], ids=str)
@pytest.mark.parametrize("steps", [0, 2])
def test_every_implementation_skips_a_step(base, dtype, implementation, steps):
    """Embeddings, norms and biases, too; and from then on training goes as it would have gone."""
    if (base, dtype, implementation) == ("sgd", torch.bfloat16, {"fused": True}):
        pytest.skip("on a CPU, the fused SGD of torch 2.13 computes something else in bfloat16")
    family, config = FAMILIES["bert"], CONFIGS["rank_3" if base == "adamw" else "paper_eva_s"]
    models = [family.build().to(dtype)]
    models.append(copy.deepcopy(models[0]))
    for model in models:
        optimizer = create_eva_optimizer(model, lr=0.01, weight_decay=0.1, config=config, **implementation)
        for step in range(steps + 2):
            if step == steps and model is models[1]:
                for parameter in model.parameters():
                    parameter.grad = torch.full_like(parameter, float("nan"))
                optimizer.step()
                optimizer.zero_grad()
            model(**family.batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    assert is_finite(model, optimizer)
    assert_equal(*models)


@anywhere
@every_config
def test_training_goes_on_as_if_the_bad_step_had_not_been(config):
    models = []
    for is_disturbed in (False, True):
        torch.manual_seed(0)
        model, optimizer = start(config)
        if is_disturbed:
            backward(model, 9)
            model[0].weight.grad.fill_(float("nan"))
            model[2].weight.grad.fill_(float("nan"))
            for layer in (model[0], model[2]):
                layer.bias.grad = None
            optimizer.step()
            optimizer.zero_grad()
        for seed in (2, 3, 4):
            backward(model, seed)
            optimizer.step()
            optimizer.zero_grad()
        models.append(model)
    assert_equal(*models)


@every_config
def test_one_warning_names_the_layer(config, caplog):
    model, optimizer = start(config)
    with caplog.at_level(logging.WARNING, logger="hf_eva"):
        for seed in range(12):
            backward(model, seed)
            if seed in (1, 2):
                model[2].weight.grad.fill_(float("nan"))
            optimizer.step()
            optimizer.zero_grad()
    assert len(caplog.records) == 1 and "'2'" in caplog.text and "'0'" not in caplog.text


def test_a_warning_comes_when_the_flags_have_arrived(monkeypatch, caplog):
    """Those of a device; and one warning names all that is bad, each of them once."""
    arrived = []
    event = SimpleNamespace(query=lambda: bool(arrived))
    monkeypatch.setattr(soundness, "can_read", lambda tensor: False)
    monkeypatch.setattr(soundness, "_sent", lambda flags: (flags, event))
    model, optimizer = start(CONFIGS["rank_3"], mlp)
    for _ in range(3):
        backward(model)
        model[0].weight.grad.fill_(float("nan"))
        model[1].bias.grad.fill_(float("inf"))
        optimizer.step()
        optimizer.zero_grad()
    assert not caplog.records
    arrived.append(True)
    backward(model)
    optimizer.step()
    assert len(caplog.records) == 1 and "'0', '1.bias':" in caplog.text


@pytest.mark.parametrize("name", ["rank_3", "paper_eva"])
@pytest.mark.parametrize("value", BAD, ids=str)
def test_a_saved_state_with_bad_numbers_is_refused(name, value):
    _, optimizer = start(CONFIGS[name], mlp)
    before = everything(optimizer)
    saved = copy.deepcopy(optimizer.state_dict())
    saved["state"][0]["momentum_buffer"][0, 0] = value
    with pytest.raises(ValueError, match=r"The saved momentum_buffer of '0' .* an earlier checkpoint"):
        optimizer.load_state_dict(saved)
    assert_equal(everything(optimizer), before)


@anywhere
@every_config
def test_the_first_gradient_may_be_bad(config):
    model, optimizer = start(config, steps=0)
    before = copy.deepcopy(model)
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, float("nan"))
    optimizer.step()
    assert_equal(model, before)
    for seed in range(4):
        optimizer.zero_grad()
        backward(model, seed)
        optimizer.step()
    assert is_finite(model, optimizer)
    assert not torch.equal(model[0].weight, before[0].weight)


# Right, and not skipped ----------------------------------------------------------------------------------------------


@every_config
def test_an_input_of_zeros(config):
    """The mean input is zero, and so is the gradient of the first weight: biases and the second one learn."""
    model, optimizer = start(config)
    before = copy.deepcopy(model)
    y = torch.ones(4, 3, 4, dtype=torch.float64)
    for _ in range(3):
        nn.functional.mse_loss(model(torch.zeros(4, 3, 6, dtype=torch.float64)), y).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert is_finite(model, optimizer)
    assert not torch.equal(model[2].bias, before[2].bias) and not torch.equal(model[2].weight, before[2].weight)


@every_config
def test_zero_gradients_keep_statistics(config):
    model, optimizer = start(config)
    of_momentum = "eva_rows", "eva_momentum_square"
    kept = {name: value for name, value in state_of(optimizer).items() if "eva_" in name}
    kept = {name: value for name, value in kept.items() if not name.endswith(of_momentum)}
    backward(model, scale=0.0)
    optimizer.step()
    after = state_of(optimizer)
    assert is_finite(model, optimizer)
    for name, value in kept.items():
        torch.testing.assert_close(after[name], value)


@every_config
@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (7, 1), (2, 2)], ids=str)
@pytest.mark.parametrize("tokens", [1, 5])
@pytest.mark.parametrize("bias", [True, False])
def test_the_smallest_layers_learn(config, shape, tokens, bias):
    model = nn.Sequential(nn.Linear(*shape, bias=bias)).double()
    optimizer = create_eva_optimizer(model, lr=1e-3, config=config)
    x, before = torch.ones(tokens, shape[0], dtype=torch.float64), copy.deepcopy(model)
    first = model(x).square().mean().item()
    for _ in range(5):
        model(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert is_finite(model, optimizer)
    assert model(x).square().mean() < first and not torch.equal(model[0].weight, before[0].weight)


RECIPES = [name for name, config in CONFIGS.items() if config.base == "adamw"]


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("scale", [1e-30, 1e-18, 1e18, 1e30], ids=str)
@pytest.mark.parametrize("what", ["weights", "gradients"])
def test_numbers_of_every_size(name, scale, what):
    """In single precision, where their squares are zero or infinite: the step is as long as ever, or none at all."""
    torch.manual_seed(0)
    model = plain(torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(scale if what == "weights" else 1.0)
    optimizer = create_eva_optimizer(model, lr=0.01, config=CONFIGS[name])
    before = copy.deepcopy(model)
    for seed in range(3):
        backward(model, seed, scale=scale if what == "gradients" else 1.0)
        optimizer.step()
        optimizer.zero_grad()
    assert all(value.isfinite().all() for value in [*model.parameters(), *state_of(optimizer).values()])
    for layer, old in ((model[0], before[0]), (model[2], before[2])):
        moved = (layer.weight - old.weight).square().mean().sqrt()
        assert moved < 0.1 or moved < 1e-6 * scale


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("scale", [1e-12, 1e-6, 1e6, 1e12], ids=str)
def test_gradients_of_other_sizes_give_the_same_step(name, scale):
    models = [plain(torch.float32), plain(torch.float32)]
    models[1].load_state_dict(models[0].state_dict())
    for model, factor in zip(models, (1.0, scale), strict=True):
        optimizer = create_eva_optimizer(model, lr=0.01, config=CONFIGS[name], eps=0.0)
        for seed in range(3):
            backward(model, seed, scale=factor)
            optimizer.step()
            optimizer.zero_grad()
    for one, other in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)


# Windows that end without a step -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["eva", "eva_f"])
def test_an_overflow_without_a_step_leaves_the_statistics_alone(name):
    """Under fp16 the scaler skips the step, and the sums of that window are infinite."""
    model, optimizer = start(CONFIGS[name])
    expected, other = start(CONFIGS[name])
    expected.load_state_dict(model.state_dict())
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))  # AdamW's part would be shared
    x, y = data(model)[0]
    nn.functional.mse_loss(model(x * float("inf")), y).backward()
    model.zero_grad()  # and no step
    for one, rule in ((model, optimizer), (expected, other)):
        backward(one, 3)
        rule.step()
    assert_equal(model, expected)


@pytest.mark.parametrize("shape", [(1024, 3072), (1024, 3, 32, 32)], ids=["matrix", "image"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_norm_of_many_numbers_keeps_its_digits(shape, dtype):
    values = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    (found,) = soundness.squared_norms_of([values])
    assert found.dtype == torch.float32
    assert abs(found.item() / values.double().square().sum().item() - 1) < 1e-6
