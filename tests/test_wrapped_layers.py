"""Layers that are more than they seem: adapted, quantized, tied, computed from others, moved, copied."""

import copy
import warnings
from collections import defaultdict
from contextlib import nullcontext

import pytest
import torch
from helpers import CONFIGS, assert_equal, assert_near, attach, data, every_config, losses, mlp
from torch import nn
from zoo import ZOO, Batch, sentences

from hf_eva import base, create_eva_optimizer, plan
from hf_eva.adamw_step import EMBEDDING_FACTOR
from hf_eva.capture import Capture
from hf_eva.soundness import Watch

VARIANTS = {name: CONFIGS[name] for name in ("eva", "eva_f", "rank_3")}
every_variant = pytest.mark.parametrize("config", VARIANTS.values(), ids=VARIANTS)


def batch(seed: int = 0) -> Batch:
    return ZOO["bert"].batch(sentences(seed=seed))


def train(model, config, steps=3, lr=1e-2, batches=batch):
    """Returns the optimizer, which holds the hooks."""
    optimizer = create_eva_optimizer(model, lr=lr, weight_decay=0.1, config=config)
    for step in range(steps):
        model(**batches(step)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return optimizer


def adapted(model, **changes):
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    settings = {"r": 2, "target_modules": ["query", "value"], "task_type": "SEQ_CLS", "lora_dropout": 0.0}
    return peft.get_peft_model(model, peft.LoraConfig(**settings | changes))


# Adapters ------------------------------------------------------------------------------------------------------------


@every_variant
@pytest.mark.parametrize("changes", [{}, {"use_dora": True}, {"use_rslora": True, "bias": "lora_only"}], ids=str)
def test_adapters_are_preconditioned_and_their_base_is_untouched(config, changes):
    model = adapted(ZOO["bert"].build(), **changes)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    optimizer = train(model, config)
    changed = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    assert changed == {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    planned = {layer.name for layer in optimizer.layers}
    matrices = {name.removesuffix(".weight") for name in changed if "lora_A" in name or "lora_B" in name}
    assert len(matrices) == 8 and matrices <= planned
    for layer in optimizer.layers:
        assert (
            optimizer.state[layer.weight]["eva_updates"] >= 2
        )  # the first gradient of A, beside a B of zeros, is zero
    assert all(parameter.isfinite().all() for parameter in model.parameters())


@pytest.mark.parametrize("use_dora", [False, True])
def test_adapters_see_each_token_once(use_dora):
    """DoRA also sends unit vectors through its adapters, to measure the weight. No gradient comes back from those."""
    model = adapted(ZOO["bert"].build().double(), use_dora=use_dora)
    capture = attach(model)
    model(**batch()).loss.backward()
    tokens = int(batch()["attention_mask"].sum())
    for layer, found in zip(capture.layers, capture.collect()(), strict=True):
        if "lora" in layer.name:
            assert found.tokens == tokens
            if "lora_B" in layer.name:  # a sum over tokens of output gradients, as the bias would have had
                assert found.g.any()


@every_variant
def test_modules_to_save_are_trained_and_their_originals_are_not(config):
    model = adapted(ZOO["bert"].build(), modules_to_save=["classifier", "pooler"])
    originals = {name: parameter.clone() for name, parameter in model.named_parameters() if "original" in name}
    optimizer = train(model, config)
    planned = {layer.name for layer in optimizer.layers}
    assert {name for name in planned if "modules_to_save" in name} and not any("original" in name for name in planned)
    assert originals
    assert_equal({name: parameter for name, parameter in model.named_parameters() if name in originals}, originals)


def test_the_adapter_that_is_not_active_is_left_alone():
    peft = pytest.importorskip("peft")
    model = adapted(ZOO["bert"].build())
    model.add_adapter("other", peft.LoraConfig(r=3, target_modules=["query"], task_type="SEQ_CLS"))
    model.set_adapter("default")
    other = {name: value.clone() for name, value in model.named_parameters() if ".other." in name}
    optimizer = train(model, VARIANTS["eva"])
    assert not any("other" in layer.name for layer in optimizer.layers)
    assert_equal({name: value for name, value in model.named_parameters() if name in other}, other)


# Quantized bases -----------------------------------------------------------------------------------------------------

BITS = {
    "int8": {"load_in_8bit": True},
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "fp4 twice": {"load_in_4bit": True, "bnb_4bit_use_double_quant": True},
}
every_quantization = pytest.mark.parametrize("bits", BITS)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bert")
    ZOO["bert"].build().save_pretrained(folder)
    return folder


def quantized(folder, bits, skipped=("classifier",)):
    pytest.importorskip("bitsandbytes")
    from transformers import AutoModelForSequenceClassification, BitsAndBytesConfig

    config = BitsAndBytesConfig(**BITS[bits], llm_int8_skip_modules=list(skipped))
    still = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    model = AutoModelForSequenceClassification.from_pretrained(folder, quantization_config=config, **still)
    return model.train()  # otherwise bitsandbytes packs the weights anew on some CPUs, and not of every shape


def trained(model):
    return {name: value for name, value in model.named_parameters() if value.requires_grad}


def assert_is_frozen(model, before):
    """All but the trained weights, and what tells how to read those in few bits."""
    frozen = before.keys() - trained(model).keys()
    assert any(value.dtype.itemsize == 1 for value in before.values())
    after = model.state_dict()
    assert all(torch.equal(after[name], before[name]) for name in frozen)


# With DoRA on int8, PEFT takes the scales from the base: its second forward pass fails, whatever the optimizer.
@pytest.mark.parametrize(("bits", "use_dora"), [*((bits, False) for bits in BITS), ("nf4", True)])
@every_variant
def test_adapters_on_a_quantized_base_train_as_on_a_dense_one(folder, bits, config, use_dora):
    bases = quantized(folder, bits), quantized(folder, bits).dequantize()
    model, dense = (adapted(base, use_dora=use_dora) for base in bases)
    before = copy.deepcopy(model.state_dict())
    optimizer, twin = train(model, config), train(dense, config)
    assert [layer.name for layer in optimizer.layers] == [layer.name for layer in twin.layers]
    assert {type(layer.module) for layer in optimizer.layers} == {nn.Linear}
    largest, mean = (1e-2, 1e-3) if bits == "int8" else (1e-6, 1e-7)  # it keeps 8 bits of what a layer receives, too
    assert_near(trained(model), trained(dense), largest, mean)
    assert_is_frozen(model, before)
    assert len(optimizer.layers) == 9 and all(optimizer.state[weight] for weight in trained(model).values())


@every_quantization
def test_the_plan_says_why_quantized_layers_are_out(folder, bits):
    rows = {row.name.removeprefix("base_model.model."): row for row in plan(adapted(quantized(folder, bits))).rows}
    layer = "bert.encoder.layer.0.attention.self.query"
    assert rows[f"{layer}.base_layer"].reason == f"quantized ({'int8' if bits == 'int8' else 'uint8'})"
    assert rows[f"{layer}.base_layer"].state_bytes == 0
    assert not rows[f"{layer}.lora_A.default"].reason
    with pytest.raises(
        ValueError, match=r"no layer to precondition \(.*quantized.*train adapters, such as PEFT's LoRA"
    ):
        plan(quantized(folder, bits, skipped=()))


@pytest.mark.parametrize(("bits", "variant"), [("int8", "eva"), ("nf4", "eva_s")])
def test_a_trainer_resumes_on_a_quantized_base_bit_for_bit(folder, tmp_path, bits, variant):
    pytest.importorskip("accelerate")
    from hf_eva import EvaTrainer, EvaTrainingArguments

    rows = [{name: values[i] for name, values in batch().items()} for i in range(8)]
    runs = {}
    for name, stop in (("whole", None), ("stopped", 2), ("stopped", None)):
        settings = {"max_steps": stop or 4, "save_steps": 2, "per_device_train_batch_size": 4, "report_to": "none"}
        settings |= {"bf16": bits == "nf4", "gradient_checkpointing": bits == "int8"}
        args = EvaTrainingArguments(str(tmp_path / name), use_cpu=True, eva_variant=variant, **settings)
        args.lr_scheduler_type = "constant"
        model = adapted(quantized(folder, bits))
        before = copy.deepcopy(model.state_dict())
        trainer = runs[name] = EvaTrainer(model, args, train_dataset=rows)
        trainer.train(resume_from_checkpoint=any((tmp_path / name).glob("checkpoint-*")))
        assert_is_frozen(model, before)
    for name, weight in trained(runs["whole"].model).items():
        assert torch.equal(weight, trained(runs["stopped"].model)[name]), name
    states = [run.optimizer.optimizer.state_dict()["state"] for run in runs.values()]
    assert states[0].keys() == states[1].keys()
    for index, entry in states[0].items():
        assert_equal(entry, states[1][index])


def test_a_trainer_refuses_a_quantized_base_without_adapters(folder, tmp_path):
    pytest.importorskip("accelerate")
    from hf_eva import EvaTrainer, EvaTrainingArguments

    with pytest.raises(ValueError, match="attach trainable adapters"):
        EvaTrainer(quantized(folder, "nf4"), EvaTrainingArguments(str(tmp_path), use_cpu=True, report_to="none"))


# Shared and computed weights -----------------------------------------------------------------------------------------


@every_variant
@pytest.mark.parametrize("name", ["gpt2", "t5", "opt"])
def test_tied_embeddings_stay_tied_and_get_their_rule(name, config):
    animal = ZOO[name]
    model = animal.build()
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight
    expected = copy.deepcopy(model)
    batches = lambda seed: animal.batch(sentences(seed=seed))  # noqa: E731
    train(model, config, 1, batches=batches)
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight
    expected(**batches(0)).loss.backward()
    embedding = expected.get_input_embeddings().weight
    group = {"lr": 1e-2, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.1}
    with torch.no_grad():
        far = base.longer(group, EMBEDDING_FACTOR)
        base.row_adamw_([embedding], [base.mean_squares(embedding)], defaultdict(dict), far)
    assert_near([model.get_input_embeddings().weight], [embedding], 1e-6)


def computed():
    """Weights that are computed from other parameters, in the three ways of torch, before a plain layer."""
    norms = nn.utils.parametrizations
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        old = nn.utils.weight_norm(nn.Linear(5, 5))
    layers = [norms.weight_norm(nn.Linear(6, 5)), old, norms.orthogonal(nn.Linear(5, 5)), nn.Linear(5, 4)]
    return nn.Sequential(*layers).double()


@every_config
def test_computed_weights_get_the_base_rule(config):
    torch.manual_seed(0)
    model = computed()
    torch.manual_seed(0)
    expected = computed()
    optimizer = create_eva_optimizer(model, lr=0.01, config=config)
    assert [layer.name for layer in optimizer.layers] == ["3"]
    others = [value for name, value in expected.named_parameters() if not name.startswith("3")]
    rule = torch.optim.AdamW(others, lr=0.01, weight_decay=0.0)
    if config.base == "sgd":
        rule = torch.optim.SGD(others, lr=0.01, momentum=config.momentum, nesterov=config.nesterov)
    for one, stepper in ((model, optimizer), (expected, rule)):
        losses(data(one))[0](one).backward()
        stepper.step()
    assert_near(
        {name: value for name, value in model.named_parameters() if not name.startswith("3")},
        {name: value for name, value in expected.named_parameters() if not name.startswith("3")},
        1e-12,
    )


# Moves and copies ----------------------------------------------------------------------------------------------------


def steps(model, optimizer, count=2, first=0):
    for seed in range(first, first + count):
        losses(data(model, seed=seed))[0](model).backward()
        optimizer.step()
        optimizer.zero_grad()


@every_config
def test_a_model_may_change_its_precision_before_it_is_trained(config):
    """Also after a first forward and backward pass, as a check before the training makes them."""
    model = mlp(dtype=torch.float32)
    expected = copy.deepcopy(model).double()
    optimizer = create_eva_optimizer(model, lr=0.01, config=config)
    losses(data(model))[0](model).backward()
    model.zero_grad()
    model.to(torch.float64)
    steps(model, optimizer)
    steps(expected, create_eva_optimizer(expected, lr=0.01, config=config))
    assert_near(model, expected, 1e-12)


@every_config
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_a_model_may_change_its_precision_while_it_is_trained(config, dtype):
    """There and back, as by a new optimizer that has loaded the state: also the base rule suits the precision."""
    model = mlp(dtype=torch.float32)
    settings = {"lr": 0.01, "config": config, "grad_scaler": torch.amp.GradScaler(enabled=False)}
    optimizer = create_eva_optimizer(model, **settings)
    steps(model, optimizer)
    for now, moment in ((dtype, 2), (torch.float32, 4)):
        expected = copy.deepcopy(model).to(now)
        other = create_eva_optimizer(expected, **settings)
        assert other.param_groups[0]["fused"] == ((now.itemsize > 2) or None)
        other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        model.to(now)
        for one, rule in ((model, optimizer), (expected, other)):
            steps(one, rule, first=moment)
            assert rule.param_groups[0]["fused"] == ((now.itemsize > 2) or None)
        assert_equal(model, expected)
        assert all(value.isfinite().all() for state in optimizer.state.values() for value in state.values())


@every_config
@pytest.mark.parametrize("before", [0, 2])
def test_a_model_may_change_its_device(config, before, monkeypatch):
    """The meta device stands for others: it has no number that a host could read, and refuses what lies elsewhere."""
    monkeypatch.setattr(torch, "autocast", lambda *args, **kwargs: nullcontext())
    monkeypatch.setattr("hf_eva.optimizer.can_read", lambda flags: False)
    monkeypatch.setattr(Watch, "_note", lambda *args: None)
    model = nn.Sequential(nn.Embedding(3, 6), *mlp()).double()
    optimizer = create_eva_optimizer(model, config=config)
    torch.__future__.set_swap_module_params_on_conversion(True)  # otherwise parameters are replaced there
    try:
        for device, count in (("cpu", before), ("meta", 2)):
            model.to(device)
            for _ in range(count):
                model(torch.zeros(4, 5, dtype=torch.long, device=device)).square().mean().backward()
                optimizer.step()
                optimizer.zero_grad()
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)
    for parameter, state in optimizer.state.items():
        assert {value.device for key, value in state.items() if key != "step"} == {parameter.device}
    assert all("eva_updates" in optimizer.state[layer.weight] for layer in optimizer.layers)


@pytest.mark.parametrize("replaced", ["by a copy", "by a computed weight"])
def test_a_weight_that_was_replaced_is_named(replaced):
    """`to_empty` of a model on the meta device does it, and a parametrization: nothing would train the new one."""
    model = mlp()
    optimizer = create_eva_optimizer(model)
    if replaced == "by a copy":
        model[0].weight = nn.Parameter(model[0].weight.detach().clone())
    else:
        nn.utils.parametrizations.weight_norm(model[0])
    losses(data(model))[0](model).backward()
    with pytest.raises(RuntimeError, match="Layer '0'"):
        optimizer.step()


@every_variant
def test_copies_and_pickles_of_a_model_in_training_are_models_of_their_own(config, tmp_path):
    """With masks and scopes among their hooks."""
    model = ZOO["t5"].build().double()
    batches = lambda seed: ZOO["t5"].batch(sentences(seed=seed))  # noqa: E731
    optimizer = train(model, config, batches=batches)
    torch.save(model, tmp_path / "model.pt")
    for other in (copy.deepcopy(model), torch.load(tmp_path / "model.pt", weights_only=False)):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Capture, "slot", None)  # what a hook that is not dead would call
            other(**batches(0)).loss.backward()
        other.zero_grad()
        optimizer.detach()  # of the first; the copy has no hooks of its own
        again = train(other, config, 1, batches=batches)
        assert again.layers


@every_config
def test_weights_loaded_in_place_are_trained_on(config):
    model = mlp()
    optimizer = create_eva_optimizer(model, lr=0.01, config=config)
    steps(model, optimizer)
    other = mlp()
    model.load_state_dict(other.state_dict())
    steps(model, optimizer, 1)
    assert not torch.equal(model[0].weight, other[0].weight)
    assert_near(model, other, 0.2)
