"""`create_eva_optimizer`: from a model to groups of parameters."""

import logging

import pytest
import torch
from helpers import bert, mlp
from torch import nn

from hf_eva import Eva, EvaConfig, create_eva_optimizer


def test_matrices_decay_and_the_rest_does_not():
    model = bert()
    optimizer = create_eva_optimizer(model, lr=0.1, weight_decay=0.3)
    decays = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    for name, parameter in model.named_parameters():
        assert decays.pop(id(parameter)) == (0.0 if name.endswith("bias") or "LayerNorm" in name else 0.3), name
    assert not decays
    assert isinstance(optimizer, Eva) and isinstance(optimizer, torch.optim.Optimizer)


def test_it_decays_what_the_trainer_decays():
    trainer = pytest.importorskip("transformers").Trainer
    model = bert()
    expected = set(trainer.get_decay_parameter_names(None, model))
    matrices = {id(p) for p in create_eva_optimizer(model).param_groups[0]["params"]}
    assert {name for name, parameter in model.named_parameters() if id(parameter) in matrices} == expected


def test_frozen_parameters_stay_outside():
    model = mlp()
    model[0].requires_grad_(False)
    parameters = [p for group in create_eva_optimizer(model).param_groups for p in group["params"]]
    assert len(parameters) == len(list(model.parameters())) - 2
    assert all(parameter.requires_grad for parameter in parameters)


def test_arguments_arrive():
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    config = EvaConfig(rank=2)
    optimizer = create_eva_optimizer(
        model, 0.1, 0.2, config, include=["0", "1"], exclude="1", betas=(0.5, 0.6), eps=0.7, foreach=False, fused=False
    )
    (group,) = optimizer.param_groups
    expected = {"lr": 0.1, "weight_decay": 0.2, "betas": (0.5, 0.6), "eps": 0.7, "foreach": False, "fused": False}
    assert group.items() >= expected.items()
    assert optimizer.config is config and [layer.name for layer in optimizer.layers] == ["0"]


def test_defaults_are_those_of_adamw():
    group, adamw = create_eva_optimizer(mlp()).param_groups[0], torch.optim.AdamW(mlp().parameters()).param_groups[0]
    assert {key: group[key] for key in ("lr", "betas", "eps")} == {key: adamw[key] for key in ("lr", "betas", "eps")}


def test_one_line_is_logged(caplog):
    with caplog.at_level(logging.INFO, logger="hf_eva"):
        create_eva_optimizer(mlp())
    assert len(caplog.records) == 1 and "3 layers preconditioned" in caplog.text


def test_errors_come_through():
    with pytest.raises(ValueError, match="matches no linear layer"):
        create_eva_optimizer(mlp(), include=["nothing"])
    with pytest.raises(ValueError, match="no layer to precondition"):
        create_eva_optimizer(nn.LayerNorm(3))
    with pytest.raises(ValueError, match="lr must be"):
        create_eva_optimizer(mlp(), lr=-1.0)


@pytest.mark.parametrize("config", [None, EvaConfig(variant="eva")])
def test_a_model_on_the_meta_device_gets_an_optimizer(config):
    with torch.device("meta"):
        model = mlp()
    optimizer = create_eva_optimizer(model, config=config)
    assert len(optimizer.layers) == 3 and not optimizer.state
    model.to_empty(device="cpu")
