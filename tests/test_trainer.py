"""EvaTrainer and EvaTrainingArguments: flags, optimizer, logs, resumption."""

from __future__ import annotations

import dataclasses
from contextlib import suppress

import pytest
import torch
from tiny_training import arguments, data, model, stock_arguments
from transformers import GPT2Config, GPT2LMHeadModel, HfArgumentParser, Trainer

from hf_eva import Eva, EvaConfig, EvaTrainer, EvaTrainerMixin, EvaTrainingArguments


def eva_of(trainer: Trainer) -> Eva:
    return getattr(trainer.optimizer, "optimizer", trainer.optimizer)


def test_every_field_of_the_config_is_a_flag_with_help():
    flags = {action.dest: action for action in HfArgumentParser(EvaTrainingArguments)._actions}
    for name, text in EvaConfig.help().items():
        assert flags[f"eva_{name}"].help.startswith(text)


def test_flags_reach_the_config(tmp_path):
    changed = {
        "variant": "eva_s",
        "curvature": "factored",
        "rank": 3,
        "exponent": 0.25,
        "damping": 0.5,
        "damping_mode": "absolute",
        "decay": 0.5,
        "refresh_interval": 7,
        "g_scale": "mean",
        "mask_padding": False,
        "token_fraction": 0.25,
        "base": "sgd",
        "momentum": 0.5,
        "nesterov": False,
        "kl_mode": "clip",
        "kl_clip": 0.5,
    }
    needs_adamw = {"momentum_dtype": "bfloat16"}
    assert changed.keys() | needs_adamw.keys() == {f.name for f in dataclasses.fields(EvaConfig)}
    for fields in (changed, needs_adamw):
        command = [part for name, value in fields.items() for part in (f"--eva_{name}", str(value))]
        (args,) = HfArgumentParser(EvaTrainingArguments).parse_args_into_dataclasses(
            ["--output_dir", str(tmp_path), "--use_cpu", *command]
        )
        assert args.eva_config == EvaConfig(**fields)


def test_options_add_up_and_flags_come_last(tmp_path):
    args = arguments(tmp_path, eva_preset="paper_eva_f", optim_args="damping=0.5, decay=0.1", eva_decay=0.2)
    assert args.eva_config == EvaConfig.paper("eva_f", damping=0.5, decay=0.2)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"eva_rank": 0}, r"rank must be in \[1, inf\), got 0"),
        ({"eva_damping": -1.0}, r"damping must be in \(0, inf\), got -1.0"),
        ({"eva_variant": "evas"}, "variant must be one of 'eva', 'eva_f', 'eva_s', 'none', got 'evas'"),
        ({"optim_args": "dampin=0.1"}, "Unknown Eva option 'dampin': did you mean 'damping'"),
        ({"optim_args": "damping"}, "Cannot read the optimizer option 'damping'"),
        ({"optim": "evaa"}, "evaa is not a valid OptimizerNames"),
    ],
)
def test_a_bad_option_is_refused_by_the_arguments(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        arguments(tmp_path, **changes)


def test_arguments_survive_replace_dict_and_pickle(tmp_path):
    args = arguments(tmp_path, eva_damping=0.5)
    assert dataclasses.replace(args, learning_rate=1.0).eva_config == args.eva_config
    assert args.to_dict()["optim"] == "eva"
    torch.save(args, tmp_path / "training_args.bin")
    assert torch.load(tmp_path / "training_args.bin", weights_only=False).eva_config == args.eva_config
    assert args.set_optimizer("eva", learning_rate=0.5).optim == "eva"
    assert args.set_optimizer("adamw_torch").eva_config is None


@pytest.mark.parametrize("preset", ["recipe", "paper_eva", "paper_eva_f", "paper_eva_s"])
def test_training_lowers_the_loss(tmp_path, preset):
    rate = 3e-3 if preset == "recipe" else 0.02
    trainer = EvaTrainer(
        model(), arguments(tmp_path, eva_preset=preset, max_steps=30, learning_rate=rate), train_dataset=data()
    )
    trainer.train()
    losses = [log["loss"] for log in trainer.state.log_history if "loss" in log]
    assert losses[-1] < losses[0]


def test_the_optimizer_follows_the_arguments(tmp_path):
    args = arguments(tmp_path, weight_decay=0.1, adam_beta2=0.9, eva_exclude=["classifier"], eva_damping=0.5)
    trainer = EvaTrainer(model(), args, train_dataset=data())
    optimizer = trainer.create_optimizer()
    assert isinstance(optimizer, Eva)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.0]
    assert {(group["lr"], group["betas"]) for group in optimizer.param_groups} == {(1e-3, (0.9, 0.9))}
    assert optimizer.config == args.eva_config
    assert "classifier" not in {layer.name for layer in optimizer.layers}


def test_target_modules_choose_the_layers(tmp_path):
    trainer = EvaTrainer(model(), arguments(tmp_path, optim_target_modules=["query"]), train_dataset=data())
    assert [layer.name for layer in trainer.create_optimizer().layers] == ["bert.encoder.layer.0.attention.self.query"]


def test_other_optimizers_work_as_in_trainer(tmp_path):
    weights = []
    for cls, make in ((EvaTrainer, arguments), (Trainer, stock_arguments)):
        trainer = cls(model(), make(tmp_path, optim="adamw_torch"), train_dataset=data())
        trainer.train()
        assert not isinstance(eva_of(trainer), Eva)
        weights.append(trainer.model.state_dict())
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_the_mixin_serves_any_trainer(tmp_path):
    class Custom(Trainer):
        pass

    class WithEva(EvaTrainerMixin, Custom):
        pass

    trainer = WithEva(model(), arguments(tmp_path), train_dataset=data())
    trainer.train()
    assert isinstance(eva_of(trainer), Eva)


@pytest.mark.parametrize("variant", ["eva_s", "eva"])
def test_an_interrupted_training_resumes_bit_for_bit(tmp_path, variant):
    settings = {"eva_variant": variant, "save_strategy": "steps", "save_steps": 3, "max_steps": 8}
    whole = EvaTrainer(model(), arguments(tmp_path / "whole", **settings), train_dataset=data())
    whole.train()

    class Interrupt(Exception):
        pass

    def training_step(*args, **kwargs):
        if stopped.state.global_step == 5:
            raise Interrupt
        return type(stopped).training_step(stopped, *args, **kwargs)

    stopped = EvaTrainer(model(), arguments(tmp_path / "stopped", **settings), train_dataset=data())
    stopped.training_step = training_step
    with suppress(Interrupt):
        stopped.train()
    resumed = EvaTrainer(model(), arguments(tmp_path / "stopped", **settings), train_dataset=data())
    resumed.train(resume_from_checkpoint=True)

    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, resumed.model.state_dict()[name]), name
    before, after = eva_of(whole).state_dict()["state"], eva_of(resumed).state_dict()["state"]
    for index, state in before.items():
        for key, value in state.items():
            assert torch.equal(value, after[index][key]), (index, key)
    assert resumed.eva_callback.times.steps == 8  # the steps before the interruption count


def test_accumulated_batches_are_one_batch(tmp_path):
    """A BERT computes its mean loss without counting the items of the whole batch."""
    norms = []
    for batch, accumulated in ((8, 1), (2, 4)):
        args = arguments(
            tmp_path,
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=accumulated,
            max_steps=2,
            logging_steps=1,
            eva_variant="eva",
        )
        quiet = model().apply(lambda module: setattr(module, "p", 0.0) if hasattr(module, "p") else None)
        trainer = EvaTrainer(quiet, args, train_dataset=data())
        trainer.train()
        norms.append([(log["grad_norm"], log["loss"]) for log in trainer.state.log_history if "loss" in log])
    assert torch.allclose(torch.tensor(norms[0]), torch.tensor(norms[1]), rtol=1e-4)


def test_the_loss_of_a_model_that_counts_items_is_left_alone(tmp_path):
    gpt2 = GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=16, n_head=2, vocab_size=50, n_positions=8))
    assert EvaTrainer(gpt2, arguments(tmp_path)).model_accepts_loss_kwargs
    peft = pytest.importorskip("peft")
    adapted = peft.get_peft_model(gpt2, peft.LoraConfig(task_type="CAUSAL_LM", fan_in_fan_out=True))
    assert EvaTrainer(adapted, arguments(tmp_path)).model_accepts_loss_kwargs
    assert not EvaTrainer(model(), arguments(tmp_path)).model_accepts_loss_kwargs


def test_unsupported_setups_are_refused_with_a_sentence(tmp_path):
    args = arguments(tmp_path)
    args._n_gpu = 2
    with pytest.raises(ValueError, match=r"does not run under nn\.DataParallel.*accelerate launch"):
        EvaTrainer(model(), args).create_optimizer()
    trainer = EvaTrainer(model(), arguments(tmp_path))
    for changes, message in (
        ({"deepspeed": "settings"}, "does not run under DeepSpeed"),
        ({"fsdp": True, "fsdp_config": {"version": 1}}, "does not run under FSDP1.*use FSDP2"),
    ):
        args = arguments(tmp_path)
        vars(args).update(changes)
        with pytest.raises(ValueError, match=message):
            trainer.get_optimizer_cls_and_kwargs(args, model())
    args.fsdp_config = {"version": 2}
    assert trainer.get_optimizer_cls_and_kwargs(args, model())[0] is Eva


@pytest.mark.parametrize("variant", ["eva_s", "eva"])
def test_lora_matrices_are_trained_and_the_base_is_not(tmp_path, variant):
    peft = pytest.importorskip("peft")
    lora = peft.LoraConfig(r=4, target_modules=["query", "value"], task_type="SEQ_CLS")
    adapted = peft.get_peft_model(model(), lora)
    before = {name: value.clone() for name, value in adapted.state_dict().items()}
    args = arguments(tmp_path, eva_variant=variant, max_steps=30, learning_rate=1e-2)
    trainer = EvaTrainer(adapted, args, train_dataset=data())
    trainer.train()
    planned = {layer.name for layer in eva_of(trainer).layers}
    assert {name for name in planned if "lora_A" in name} and {name for name in planned if "lora_B" in name}
    changed = {name for name, value in adapted.state_dict().items() if not torch.equal(value, before[name])}
    trained = {name for name, parameter in adapted.named_parameters() if parameter.requires_grad}
    assert changed == trained and all("lora_" in name or "classifier.modules_to_save" in name for name in trained)
    losses = [log["loss"] for log in trainer.state.log_history if "loss" in log]
    assert losses[-1] < losses[0]


def test_one_model_can_be_trained_by_one_trainer_after_another(tmp_path):
    once = model()
    for _ in range(2):
        trainer = EvaTrainer(once, arguments(tmp_path, eva_variant="eva"), train_dataset=data())
        trainer.train()


@pytest.mark.parametrize("variant", ["eva_s", "eva"])
def test_hyperparameters_are_searched_for(tmp_path, variant):
    pytest.importorskip("optuna")
    seen = []

    class Searched(EvaTrainer):
        def create_optimizer(self, *args):
            optimizer = super().create_optimizer(*args)
            seen.append((optimizer.config.damping, optimizer.config.decay, optimizer.config.nesterov))
            return optimizer

    def space(trial):
        return {
            "eva_damping": trial.suggest_float("eva_damping", 1e-3, 1.0, log=True),
            "eva_decay": trial.suggest_categorical("eva_decay", [0.05, 0.5]),
            "eva_nesterov": trial.suggest_categorical("eva_nesterov", [True, False]),
        }

    args = arguments(tmp_path, eva_variant=variant, eva_decay=0.1, eval_strategy="steps", eval_steps=3)
    trainer = Searched(model_init=model, args=args, train_dataset=data(), eval_dataset=data())
    best = trainer.hyperparameter_search(space, n_trials=3, backend="optuna", direction="minimize")
    assert len(set(seen)) == 3
    assert tuple(best.hyperparameters.values()) in seen
    with pytest.raises(ValueError, match=r"damping must be in \(0, inf\), got -1.0"):
        trainer.hyperparameter_search(lambda trial: {"eva_damping": -1.0}, n_trials=1, backend="optuna")
