"""The state of an optimizer: what it is made of, how training resumes from it, and which state is refused."""

import copy
import dataclasses
import io
import pickle

import pytest
import torch
from helpers import FAMILIES, assert_equal, data, every_config, gpt2, mlp, train
from torch import nn

from hf_eva import Eva, EvaConfig, create_eva_optimizer


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


@every_config
@pytest.mark.parametrize("steps", [3, 4, 5])
def test_refreshes_go_on_in_their_turn(config, steps):
    config = dataclasses.replace(config, refresh_interval=4)
    model = mlp()
    optimizer = create_eva_optimizer(model, lr=0.002, config=config)
    train(model, optimizer, steps)
    resumed = copy.deepcopy(model)
    second = create_eva_optimizer(resumed, lr=0.002, config=config)
    second.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for one, its in ((model, optimizer), (resumed, second)):
        train(one, its, 3, first=steps)
    assert_equal(resumed, model)


# Momentum in low precision -------------------------------------------------------------------------------------------

LOW = EvaConfig(rank=3, momentum_dtype="bfloat16")


def train_text(model, optimizer, steps=3):
    found = []
    for _ in range(steps):
        loss = model(**FAMILIES["gpt2"].batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append(loss.item())
    return found


def dtypes(model, optimizer):
    """Of all state but counts, by what it belongs to and its name."""
    own = {id(layer.weight): "layer" for layer in optimizer.layers}
    own |= {id(module.weight): "embedding" for module in model.modules() if isinstance(module, nn.Embedding)}
    return {
        (own.get(id(parameter), "other"), key): value.dtype
        for parameter, state in optimizer.state.items()
        for key, value in state.items()
        if key != "step"
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_only_momentum_is_kept_in_low_precision(dtype):
    model, precise = gpt2().to(dtype), torch.promote_types(dtype, torch.float32)
    optimizer = create_eva_optimizer(model, lr=0.01, config=LOW)
    train_text(model, optimizer, 1)
    names = "a", "agreement", "g", "momentum_square", "rows", "square", "updates"
    statistics = {("layer", f"eva_{name}"): precise for name in names}
    assert dtypes(model, optimizer) == statistics | {
        ("layer", "momentum_buffer"): torch.bfloat16,
        ("embedding", "exp_avg"): torch.bfloat16,
        ("embedding", "exp_avg_sq"): precise,
        ("other", "exp_avg"): dtype,
        ("other", "exp_avg_sq"): dtype,
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_training_with_low_momentum_resumes_bit_for_bit(dtype):
    model = gpt2().to(dtype)
    optimizer = create_eva_optimizer(model, lr=0.01, weight_decay=0.1, config=LOW)
    train_text(model, optimizer)
    saved, resumed = io.BytesIO(), copy.deepcopy(model)
    torch.save(optimizer.state_dict(), saved)
    saved.seek(0)
    second = create_eva_optimizer(resumed, lr=0.01, weight_decay=0.1, config=LOW)
    second.load_state_dict(torch.load(saved, weights_only=True))
    assert dtypes(resumed, second) == dtypes(model, optimizer)
    assert train_text(resumed, second) == train_text(model, optimizer)
    assert_equal(resumed, model)


def test_low_momentum_trains_as_well():
    models = [gpt2(), gpt2()]
    models[1].load_state_dict(models[0].state_dict())
    pairs = zip(models, (EvaConfig(rank=3), LOW), strict=True)
    one, other = (
        train_text(model, create_eva_optimizer(model, lr=0.003, config=config), 24) for model, config in pairs
    )
    assert one[-1] < 0.9 * one[0] and one != other
    assert other == pytest.approx(one, rel=2e-3)


@pytest.mark.parametrize(("first", "second"), [(LOW, EvaConfig(rank=3)), (EvaConfig(rank=3), LOW)])
def test_the_config_says_what_a_loaded_momentum_is_kept_in(first, second):
    model = gpt2()
    optimizer = create_eva_optimizer(model, config=first)
    train_text(model, optimizer, 1)
    other = create_eva_optimizer(model, config=second)
    other.load_state_dict(optimizer.state_dict())
    loaded = dtypes(model, other)
    train_text(model, other, 1)
    assert loaded == dtypes(model, other)
    expected = {"bfloat16": torch.bfloat16, "float32": torch.float32}[second.momentum_dtype]
    assert {loaded["layer", "momentum_buffer"], loaded["embedding", "exp_avg"]} == {expected}


def test_low_momentum_follows_a_model_of_another_precision():
    model = gpt2()
    optimizer = create_eva_optimizer(model, config=LOW)
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        model.to(dtype)
        train_text(model, optimizer, 1)
        found = dtypes(model, optimizer)
        assert {found["layer", "momentum_buffer"], found["embedding", "exp_avg"]} == {torch.bfloat16}
        assert found["layer", "eva_rows"] == torch.promote_types(dtype, torch.float32)


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
        (
            EvaConfig(rank=3),
            r"0 has eva_a\[6, 6\], eva_agreement\[2\], eva_g\[5, 5\].* "
            r"where eva_a\[6, 3\], eva_agreement\[2\], eva_g\[5, 3\].* is expected",
        ),
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
