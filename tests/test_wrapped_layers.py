"""Layers that are more than they seem: adapted, quantized, tied, computed from others, moved, copied."""

import copy
import warnings
from collections import defaultdict

import pytest
import torch
from helpers import CONFIGS, assert_equal, assert_near, data, every_config, losses, mlp
from torch import nn
from zoo import ZOO, Batch, sentences

from hf_eva import base, create_eva_optimizer, plan
from hf_eva.adamw_step import EMBEDDING_FACTOR
from hf_eva.capture import Capture

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
    capture = Capture(model, plan(model).layers, True)
    model(**batch()).loss.backward()
    tokens = int(batch()["attention_mask"].sum())
    for layer, found in zip(capture.layers, capture.collect(), strict=True):
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


class PackedLinear(nn.Linear):
    """Two weights of four bits in each byte, as bitsandbytes keeps them."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__(layer.in_features, layer.out_features)
        self.bias = layer.bias
        self.scale = layer.weight.detach().abs().max() / 7
        levels = (layer.weight.detach() / self.scale).round().to(torch.int8).add(8).to(torch.uint8)
        self.weight = nn.Parameter(levels[:, ::2] * 16 + levels[:, 1::2], requires_grad=False)

    def dense(self) -> torch.Tensor:
        return (
            torch.stack([self.weight // 16, self.weight % 16], -1).flatten(1).to(self.scale.dtype).sub(8) * self.scale
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, self.dense(), self.bias)


def in_four_bits(model):
    for module in list(model.modules()):
        for name, child in module.named_children():
            if type(child) is nn.Linear and name in ("query", "value"):
                setattr(module, name, PackedLinear(child))
    return model


def in_eight_bits(model):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        quantization = pytest.importorskip("torchao.quantization")
        wanted = lambda module, name: name.endswith(("query", "value"))  # noqa: E731
        quantization.quantize_(model, quantization.Int8WeightOnlyConfig(), filter_fn=wanted)
    return model


def dense_twin(model):
    """The same weights, not quantized."""
    twin = ZOO["bert"].build()
    with torch.no_grad():
        for name, module in twin.named_modules():
            if name.endswith(("query", "value")):
                packed = model.get_submodule(name)
                weight = packed.dense() if isinstance(packed, PackedLinear) else packed.weight.dequantize()
                module.weight.copy_(weight)
    return twin


@pytest.mark.parametrize(
    "config", [CONFIGS[name] for name in ("eva", "eva_f", "eva_s")], ids=["eva", "eva_f", "eva_s"]
)
@pytest.mark.parametrize("quantize", [in_eight_bits, in_four_bits])
def test_adapters_on_a_quantized_base_train_as_on_a_dense_one(config, quantize):
    peft = pytest.importorskip("peft")
    base = quantize(ZOO["bert"].build())
    dense = adapted(dense_twin(base))
    torch.manual_seed(0)
    settings = peft.LoraConfig(r=2, target_modules=["query", "value"], task_type="SEQ_CLS")
    settings._register_custom_module({PackedLinear: peft.tuners.lora.Linear})
    model = peft.get_peft_model(base, settings)
    frozen = copy.deepcopy(model.state_dict())
    twin = train(dense, config)
    optimizer = train(model, config)
    assert [layer.name for layer in optimizer.layers] == [layer.name for layer in twin.layers]
    trained = {name: value for name, value in model.named_parameters() if value.requires_grad}
    assert_near(trained, {n: v for n, v in dense.named_parameters() if v.requires_grad}, 1e-4)
    for name, value in model.state_dict().items():
        if name not in trained and value.dtype == torch.uint8:
            assert torch.equal(value, frozen[name])


@pytest.mark.parametrize("quantize", [in_eight_bits, in_four_bits])
def test_the_plan_says_why_quantized_layers_are_out(quantize):
    rows = {row.name: row.reason for row in plan(quantize(ZOO["bert"].build())).rows}
    reason = rows["bert.encoder.layer.0.attention.self.query"]
    assert reason == "frozen" if quantize is in_eight_bits else "subclass" in reason


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
        base.row_adamw_([embedding], [base.mean_squares(embedding)], defaultdict(dict), group, EMBEDDING_FACTOR)
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


def steps(model, optimizer, count=2):
    for seed in range(count):
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
def test_a_model_may_change_its_precision_while_it_is_trained(config):
    model = mlp(dtype=torch.float32)
    optimizer = create_eva_optimizer(model, lr=0.01, config=config)
    steps(model, optimizer)
    model.to(torch.float64)
    steps(model, optimizer)
    assert all(value.isfinite().all() for value in model.parameters())


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
