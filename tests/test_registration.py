"""`optim="eva"` in the stock Trainer."""

from __future__ import annotations

import dataclasses
import logging
import subprocess
import sys

import pytest
import torch
from tiny_training import arguments, data, model, stock_arguments
from transformers import HfArgumentParser, Trainer, TrainingArguments
from transformers.training_args import OptimizerNames

from hf_eva import Eva, EvaConfig, EvaTrainer, register, unregister


@pytest.fixture(autouse=True)
def registered():
    register()
    yield
    unregister()


def test_the_stock_parser_knows_the_name(tmp_path):
    parser = HfArgumentParser(TrainingArguments)
    assert "eva" in next(action for action in parser._actions if action.dest == "optim").choices
    command = ["--output_dir", str(tmp_path), "--use_cpu", "--optim", "eva"]
    (args,) = parser.parse_args_into_dataclasses(command)
    assert type(args.optim) is str and args.optim == "eva"


def test_the_stock_trainer_trains_with_it(tmp_path):
    args = stock_arguments(
        tmp_path, optim="eva", optim_args="rank=2, damping=0.1", optim_target_modules=["dense"], weight_decay=0.1
    )
    trainer = Trainer(model(), args, train_dataset=data())
    trainer.train()
    optimizer = trainer.optimizer.optimizer
    assert isinstance(optimizer, Eva) and optimizer.config == EvaConfig(rank=2, damping=0.1)
    assert all("dense" in layer.name for layer in optimizer.layers)
    assert {group["weight_decay"] for group in optimizer.param_groups} == {0.1, 0.0}


def test_it_trains_as_eva_trainer_does(tmp_path):
    weights = []
    for cls, make in ((EvaTrainer, arguments), (Trainer, stock_arguments)):
        trainer = cls(model(), make(tmp_path, optim="eva", optim_args="rank=2"), train_dataset=data())
        trainer.train()
        weights.append(trainer.model.state_dict())
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_it_says_once_that_the_stock_trainer_scales_the_loss_of_a_bert(tmp_path, caplog):
    for accumulated in (1, 4):
        args = stock_arguments(tmp_path, optim="eva", gradient_accumulation_steps=accumulated, max_steps=2)
        with caplog.at_level(logging.WARNING, logger="hf_eva"):
            Trainer(model(), args, train_dataset=data()).train()
    assert len(caplog.records) == 1 and "gradients and the losses that it logs are 4 times too large" in caplog.text


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"optim_args": "dampin=0.1"}, "Unknown Eva option 'dampin': did you mean 'damping'"),
        ({"optim_args": "rank=x"}, "rank must be a whole number, got 'x'"),
        ({"optim_target_modules": ["queri"]}, "matches no linear layer of the model: near misses are .*query"),
    ],
)
def test_bad_options_are_refused_before_training(tmp_path, changes, message):
    trainer = Trainer(model(), stock_arguments(tmp_path, optim="eva", **changes), train_dataset=data())
    with pytest.raises(ValueError, match=message):
        trainer.train()


def test_registering_twice_changes_nothing_and_unregistering_takes_it_back(tmp_path):
    names, helps = list(OptimizerNames), HfArgumentParser(TrainingArguments).format_help()
    register()
    assert list(OptimizerNames) == names and HfArgumentParser(TrainingArguments).format_help() == helps
    unregister()
    unregister()
    assert list(OptimizerNames) == [name for name in names if name.value != "eva"]
    with pytest.raises(ValueError, match="eva is not a valid OptimizerNames"):
        stock_arguments(tmp_path, optim="eva")
    register()
    assert stock_arguments(tmp_path, optim="eva").optim == "eva"


def test_all_ways_to_name_the_optimizer_leave_a_plain_string(tmp_path):
    settings = {"output_dir": str(tmp_path), "use_cpu": True, "optim": "eva"}
    (from_file,) = HfArgumentParser(TrainingArguments).parse_dict(settings)
    replaced = dataclasses.replace(from_file, learning_rate=1.0)
    chosen = stock_arguments(tmp_path).set_optimizer("eva", args="rank=2")
    for args in (from_file, replaced, chosen):
        assert type(args.optim) is str and args.to_dict()["optim"] == "eva"


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("transformers.trainer_optimizer._OPTIMIZER_HANDLERS", None),
        ("transformers.training_args.OptimizerNames", None),
        ("transformers.trainer.DEFAULT_CALLBACKS", None),
        ("transformers.training_args.OptimizerNames", str),  # no enumeration any more
    ],
)
def test_a_transformers_that_is_not_known_is_refused_with_a_sentence(name, found, monkeypatch):
    unregister()
    with monkeypatch.context() as changed:
        changed.delattr(name) if found is None else changed.setattr(name, found)
        with pytest.raises(RuntimeError, match=r"cannot add 'eva' .* transformers \d.*: install transformers>=5.6,<6"):
            register()
    assert "eva" not in list(OptimizerNames)


def test_saved_arguments_load_where_eva_is_not_registered(tmp_path):
    torch.save(stock_arguments(tmp_path, optim="eva"), tmp_path / "training_args.bin")
    code = (
        "import sys, torch; sys.modules['hf_eva'] = None; "
        f"print(torch.load({str(tmp_path / 'training_args.bin')!r}, weights_only=False).optim)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "eva"
