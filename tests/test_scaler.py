"""A loss scale, as `GradScaler` puts it on under fp16, changes no step, and an overflow leaves nothing behind."""

import copy

import pytest
import torch
from accelerate import Accelerator
from helpers import CONFIGS, assert_near, data, every_config, losses, mlp
from tiny_training import arguments
from tiny_training import data as tiny_data
from tiny_training import model as tiny_model
from torch import nn

from hf_eva import EvaConfig, EvaTrainer, create_eva_optimizer

SCALERS = {
    "constant": {"init_scale": 2.0**16, "growth_interval": 1000},
    "growing": {"init_scale": 2.0**10, "growth_interval": 1, "growth_factor": 4.0},
    "falling": {"init_scale": 2.0**40, "growth_interval": 1000, "backoff_factor": 2.0**-6},
}
every_scaler = pytest.mark.parametrize("options", SCALERS.values(), ids=SCALERS.keys())


def scaler_of(options):
    return torch.amp.GradScaler("cpu", **options)


def state_of(optimizer):
    entries = optimizer.state_dict()["state"].items()
    return {f"{index} {key}": value.clone() for index, entry in entries for key, value in entry.items()}


def train(model, config, scaler=None, windows=range(5), overflows=(), max_norm=None, micro_batches=2):
    """As documented for `GradScaler`; the windows in `overflows` have an infinite input."""
    optimizer = create_eva_optimizer(model, lr=0.01, weight_decay=0.1, config=config, grad_scaler=scaler)
    scaler = scaler or torch.amp.GradScaler(enabled=False)
    for seed in windows:
        for x, y in data(model, micro_batches, seed=seed):
            if seed in overflows:
                x[0] = float("inf")
            scaler.scale(losses([(x, y)])[0](model) / micro_batches).backward()
        if max_norm is not None:
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(model.parameters(), max_norm)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    return optimizer


@every_config
@every_scaler
@pytest.mark.parametrize("max_norm", [None, 0.5])
def test_a_scale_changes_no_step(config, options, max_norm):
    model, expected = mlp(), mlp()
    expected.load_state_dict(model.state_dict())
    scaler = scaler_of(options)
    windows = range(4), range(10, 14)
    one = train(model, config, scaler, [*windows[0], 5, *windows[1]], overflows=[5], max_norm=max_norm)
    other = train(expected, config, None, [*windows[0], *windows[1]], max_norm=max_norm)
    assert scaler.get_scale() != options["init_scale"]
    assert_near(model, expected, 1e-12)
    assert_near(state_of(one), state_of(other), 1e-10)


@every_config
@pytest.mark.parametrize("first", [True, False])
def test_an_overflow_changes_nothing(config, first):
    """Where the scale is too large for the first gradients, too."""
    models = [mlp(), mlp()]
    models[1].load_state_dict(models[0].state_dict())
    scaler = scaler_of({"init_scale": 2.0**8})
    train(models[0], config, scaler, [7, 0, 1] if first else [0, 7, 1], overflows=[7])
    train(models[1], config, None, [0, 1])
    assert_near(*models, 1e-13)


@pytest.mark.parametrize("name", ["eva", "paper_eva"])
def test_autocast_to_fp16(name):
    models = [mlp(dtype=torch.float32) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    growing = scaler_of({"init_scale": 2.0**6, "growth_interval": 1})  # but not as far as to an overflow
    for model, scaler in zip(models, (growing, scaler_of({"enabled": False})), strict=True):
        with torch.autocast("cpu", torch.float16):
            train(model, CONFIGS[name], scaler)
    assert_near(*models, 2e-3)


@pytest.mark.parametrize("name", ["eva", "paper_eva"])
def test_fp16_without_a_scaler_is_refused(name):
    model = mlp(dtype=torch.float32)
    with torch.autocast("cpu", torch.float16), pytest.raises(RuntimeError, match=r"grad_scaler=accelerator\.scaler"):
        train(model, CONFIGS[name])


@pytest.mark.parametrize("name", ["eva_f", "eva_s", "paper_eva_f", "paper_eva_s"])
def test_variants_that_see_no_output_gradients_need_no_scaler(name):
    model = mlp(dtype=torch.float32)
    before = copy.deepcopy(model)
    with torch.autocast("cpu", torch.float16):
        train(model, CONFIGS[name])
    assert not torch.equal(model[0].weight, before[0].weight)


def test_an_accelerate_loop():
    """Whose optimizer counts the steps that were skipped."""
    models = [mlp(dtype=torch.float32) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    for model, is_scaled in zip(models, (True, False), strict=True):
        accelerator = Accelerator(cpu=True)
        accelerator.scaler = scaler_of(SCALERS["growing"]) if is_scaled else None
        optimizer = create_eva_optimizer(model, config=EvaConfig.paper("eva"), grad_scaler=accelerator.scaler)
        prepared, optimizer = accelerator.prepare(model, optimizer)
        for seed in (0, 1, 2, 3) if is_scaled else (0, 2, 3):
            x, y = data(model, seed=seed)[0]
            x = x * float("inf") if seed == 1 else x
            accelerator.backward(losses([(x, y)])[0](prepared))
            optimizer.step()
            optimizer.zero_grad()
            assert optimizer.step_was_skipped == (seed == 1)
    assert_near(*models, 1e-5)


def test_a_trainer_hands_its_scaler_over(tmp_path):
    models = []
    for scaler in (scaler_of(SCALERS["growing"]), None):
        settings = {"eva_preset": "paper_eva", "learning_rate": 0.1, "max_grad_norm": 0.0}
        trainer = EvaTrainer(model=tiny_model(), args=arguments(tmp_path, **settings), train_dataset=tiny_data())
        trainer.accelerator.scaler = scaler
        trainer.train()
        models.append(trainer.model)
    assert_near(*models, 1e-5)
