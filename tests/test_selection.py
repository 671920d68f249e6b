"""`plan`: which layers are preconditioned, why the others are not, and what the table says."""

import math
import re
from unittest.mock import patch

import pytest
import torch
from helpers import FAMILIES, bert, every_config, gpt2, mlp
from torch import nn
from torch.testing._internal.two_tensor import TwoTensor

from hf_eva import EvaConfig, capture, create_eva_optimizer, plan
from hf_eva.selection import tables_of


def taken(model, *args, **kwargs) -> set[str]:
    return {layer.name for layer in plan(model, *args, **kwargs).layers}


def reasons(model, *args, **kwargs) -> dict[str, str]:
    return {row.name: row.reason for row in plan(model, *args, **kwargs).rows}


# Models of transformers ----------------------------------------------------------------------------------------------


def test_the_layers_of_each_family(family):
    found = plan(family.build())
    assert len(found.layers) == family.layers
    for row in found.rows:
        if "norm" in row.name.lower() or ".ln_" in row.name:
            assert row.reason == "norm"
        if "embeddings." in row.name and row.kind == "Embedding":
            assert row.reason == "embedding"


@pytest.mark.parametrize("name", FAMILIES)
def test_the_layers_of_models_in_their_usual_size(name):
    transformers = pytest.importorskip("transformers")
    classes = {"bert": "BertForSequenceClassification", "gpt2": "GPT2LMHeadModel", "vit": "ViTForImageClassification"}
    model_class = getattr(transformers, classes[name])
    with torch.device("meta"):
        model = model_class(model_class.config_class())
    found = plan(model)
    assert len(found.layers) == FAMILIES[name].base_layers
    assert found.state_bytes < found.adamw_bytes
    assert "×12" in str(found)
    tables = {table for _, table in tables_of(model, EvaConfig())}
    assert tables == ({"cls_token", "position_embeddings"} if name == "vit" else set())
    assert not tables_of(model, EvaConfig(variant="none")) and not tables_of(model, EvaConfig.paper("eva"))


def test_output_embeddings_are_left_out():
    assert reasons(gpt2())["lm_head"] == "output embedding"
    untied = gpt2(tie_word_embeddings=False)
    assert reasons(untied)["lm_head"] == "output embedding"
    assert "lm_head" in taken(untied, include=["lm_head"])
    assert "lm_head" in taken(untied, include="all-linear")
    with pytest.raises(ValueError, match="shares its weight"):
        plan(gpt2(), include=["lm_head"])


@pytest.mark.parametrize("tied", [True, False])
def test_the_decoder_of_a_masked_model_is_left_out(tied):
    transformers = pytest.importorskip("transformers")
    model = transformers.BertForMaskedLM(bert(tie_word_embeddings=tied).config)
    assert reasons(model)["cls.predictions.decoder"] == "output embedding"
    assert "cls.predictions.transform.dense" in taken(model)
    wrapped = nn.ModuleDict({"inner": model})
    assert reasons(wrapped)["inner.cls.predictions.decoder"] == "output embedding"


@pytest.mark.parametrize(
    "wanted",
    [
        ["attention"],
        ["bert.encoder.layer.0.output.dense", "query"],
        [r".*\.1\..*dense", "no such layer"],
        r".*attention.*",
        r"bert\.encoder\.layer\.\d\.output\.dense",
        "classifier",
        ["classifier"],
        ["class"],
    ],
    ids=str,
)
def test_filters_mean_what_they_mean_to_the_trainer(wanted):
    check = pytest.importorskip("transformers.trainer_utils").check_target_module_exists
    model = bert()
    linear = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    expected = {name for name in linear if check(wanted, name)}
    assert expected and taken(model, include=wanted) == expected
    if expected != linear:
        assert taken(model, exclude=wanted) == linear - expected


@pytest.mark.parametrize("wanted", ["all-linear", "all_linear"])
def test_all_linear(wanted):
    model = bert()
    assert taken(model, include=wanted) == {n for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    with pytest.raises(ValueError, match="no layer to precondition"):
        plan(model, exclude=wanted)


def test_filters_combine():
    names = taken(bert(), include=["attention"], exclude=["query", "layer.1"])
    assert names == {f"bert.encoder.layer.0.attention.{n}" for n in ("self.key", "self.value", "output.dense")}
    assert reasons(bert(), include=["attention"], exclude=["query"])["classifier"] == "not included"
    assert reasons(bert(), exclude=["query"])["bert.encoder.layer.0.attention.self.query"] == "excluded"


@pytest.mark.parametrize(
    ("filters", "message"),
    [
        ({"include": ["qury"]}, r"include=\['qury'\] matches no linear layer.*near misses are .*query"),
        ({"exclude": "clasifier"}, "exclude='clasifier' matches no linear layer.*near misses are classifier"),
        ({"include": "xyz"}, "matches no linear layer of the model: there are bert.encoder"),
        ({"include": "LayerNorm"}, "matches no linear layer"),
        ({"include": "*"}, "is not a regular expression: nothing to repeat"),
    ],
)
def test_a_filter_that_matches_nothing_is_refused(filters, message):
    with pytest.raises(ValueError, match=message):
        plan(bert(), **filters)


def test_adapters_are_taken_and_their_frozen_base_is_not():
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["query", "value"], task_type="SEQ_CLS")
    model = peft.get_peft_model(bert(), config)
    why = reasons(model)
    names = {name for name, reason in why.items() if not reason}
    adapters = {name for name in names if "lora_" in name}
    assert len(adapters) == 8 and names - adapters == {"base_model.model.classifier.modules_to_save.default"}
    assert why["base_model.model.bert.encoder.layer.0.attention.self.query.base_layer"] == "frozen"

    optimizer = create_eva_optimizer(model, lr=0.03, config=EvaConfig(variant="eva"))
    losses = []
    for _ in range(10):
        loss = model(**FAMILIES["bert"].batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


# Single modules ------------------------------------------------------------------------------------------------------


class Custom(nn.Linear):
    pass


def packed(kind: type[nn.Module], name: str, weight: torch.Tensor, as_buffer: bool = False) -> nn.Module:
    """A module whose weights a library has packed, in the way of that library."""
    module = kind(4, 4) if kind is nn.Linear else kind()
    if as_buffer:
        module.register_buffer(name, weight)
    else:
        setattr(module, name, nn.Parameter(weight, requires_grad=weight.is_floating_point()))
    return module


def integers(dtype: torch.dtype) -> torch.Tensor:
    return torch.zeros(4, 2, dtype=dtype)


def frozen():
    return nn.Linear(4, 4).requires_grad_(False)


def weight_norm():
    return nn.utils.parametrizations.weight_norm(nn.Linear(4, 4))


@pytest.mark.parametrize(
    ("build", "name", "reason"),
    [
        (lambda: Custom(4, 4), "other", "Custom is a subclass of a layer that is known"),
        (lambda: packed(nn.Linear, "weight", integers(torch.uint8)), "other", "quantized (uint8)"),  # bitsandbytes
        (lambda: packed(nn.Module, "W_q", integers(torch.uint8)), "other", "quantized (uint8)"),  # HQQ
        (lambda: packed(nn.Module, "qweight", integers(torch.int32), True), "other", "quantized (int32)"),  # GPTQ
        (
            lambda: packed(nn.Linear, "weight", TwoTensor(torch.ones(4, 4), torch.ones(4, 4))),
            "other",
            "its weight is a TwoTensor",
        ),
        (lambda: nn.Linear(4, 4, dtype=torch.complex64), "other", "complex (complex64)"),
        (frozen, "other", "frozen"),
        (lambda: nn.Linear(4, 4).to(torch.float8_e4m3fn), "other", "quantized (float8_e4m3fn)"),
        (weight_norm, "other", "ParametrizedLinear is a subclass of a layer that is known"),
        (weight_norm, "other.parametrizations.weight", "not a linear layer"),
        (lambda: nn.MultiheadAttention(4, 2), "other.out_proj", "NonDynamicallyQuantizableLinear is a subclass"),
        (lambda: nn.MultiheadAttention(4, 2), "other", "not a linear layer"),
        (lambda: nn.Conv2d(4, 4, 3, groups=2), "other", "grouped convolution (groups=2)"),
        (lambda: nn.Conv1d(4, 4, 3), "other", "not a linear layer"),
        (lambda: nn.Embedding(4, 4), "other", "embedding"),
        (lambda: nn.LayerNorm(4), "other", "norm"),
        (lambda: nn.RMSNorm(4), "other", "norm"),
        (lambda: nn.BatchNorm2d(4), "other", "norm"),
        (lambda: nn.GroupNorm(2, 4), "other", "norm"),
        (lambda: nn.LSTM(4, 4), "other", "not a linear layer"),
    ],
)
def test_what_is_left_out_has_a_reason(build, name, reason):
    model = nn.ModuleDict({"linear": nn.Linear(2, 4), "other": build()})
    why = reasons(model)
    assert why["linear"] == "" and why[name].startswith(reason)


@pytest.mark.filterwarnings("ignore:.*weight_norm.*is deprecated")
def test_a_computed_weight_is_left_out():
    model = nn.Sequential(nn.Linear(2, 4), nn.utils.weight_norm(nn.Linear(4, 4)))
    assert reasons(model)["1"] == "its weight is computed from other parameters"


def test_shared_weights_are_left_out():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4))
    model[2].weight = model[0].weight
    assert reasons(model) == {"0": "shares its weight with 2", "1": "", "2": "shares its weight with 0"}


def test_one_module_under_two_names_is_one_layer():
    layer = nn.Linear(4, 4)
    assert taken(nn.Sequential(layer, nn.Tanh(), layer)) == {"0"}


def test_a_model_may_be_one_layer():
    model = nn.Linear(4, 4)
    assert taken(model) == {""}
    assert "(model)" in str(plan(model))
    optimizer = create_eva_optimizer(model, config=EvaConfig(variant="eva"))
    model(torch.randn(2, 4)).sum().backward()
    optimizer.step()


@pytest.mark.parametrize("model", [nn.Embedding(4, 4), nn.Sequential(nn.LayerNorm(4)), nn.Tanh(), frozen()])
def test_a_model_without_a_layer_is_refused(model):
    with pytest.raises(ValueError, match=r"has no layer to precondition \(.*use torch.optim.AdamW"):
        plan(model)


def reaches(model, **filters):
    return {layer.name: layer.reach for layer in plan(model, **filters).layers if layer.reach != 1}


def test_a_head_steps_as_far_as_a_square_layer_with_its_inputs():
    assert reaches(bert()) == {"classifier": math.sqrt(16 / 3)}
    assert not reaches(bert(), exclude="classifier") and not reaches(gpt2())
    assert reaches(mlp()) == {"5": math.sqrt(7 / 4)}
    blocks = nn.ModuleList([nn.Sequential(nn.Linear(2, 8), nn.Linear(8, 2))])
    assert reaches(nn.Sequential(blocks, nn.Linear(8, 2))) == {"1": 2.0} and not reaches(nn.Sequential(blocks))
    assert not reaches(nn.Sequential(nn.Linear(8, 2), nn.Linear(2, 8)))
    assert not reaches(nn.Sequential(nn.Linear(2, 8), nn.Conv2d(8, 2, 1)))


def test_switched_off_there_is_no_layer():
    found = plan(mlp(), config=EvaConfig(variant="none"))
    assert found.layers == () and found.state_bytes == found.adamw_bytes


# Table and bytes -----------------------------------------------------------------------------------------------------


def test_the_table():
    text = str(plan(bert()))
    lines = text.splitlines()
    head = re.split(r" {2,}", lines[0])
    assert head == ["layer", "kind", "shape", "preconditioned", "state", "of AdamW's"]
    cells = {re.split(r" {2,}", line)[0]: re.split(r" {2,}", line)[1:] for line in lines[2:-1]}
    assert cells["bert.encoder.layer.{0-1}.intermediate.dense"][:4] == ["(×2)", "Linear", "24×16", "yes"]
    assert cells["bert.embeddings.word_embeddings"][2] == "no: embedding"
    assert lines[-1].startswith("14 layers preconditioned, ") and "of AdamW's" in lines[-1]
    assert text == str(plan(bert()))


def kept_bytes(optimizer, parameters):
    return sum(
        value.numel() * value.element_size()
        for parameter in parameters
        for value in optimizer.state.get(parameter, {}).values()
        if value.ndim > 0
    )


@every_config
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("changes", [{}, {"momentum": 0.0, "nesterov": False}], ids=["momentum", "no momentum"])
def test_the_bytes_of_the_plan_are_those_of_the_optimizer(config, dtype, changes):
    config = EvaConfig(**{**config.to_dict(), **changes})
    narrow = nn.Linear(4, 2), nn.Linear(2, 6)  # narrower than the rank
    model = nn.Sequential(nn.Conv2d(2, 3, 3, padding=1), nn.GroupNorm(3, 3), nn.Flatten(2), *narrow, mlp()).to(dtype)
    found = plan(model, config=config)
    optimizer = create_eva_optimizer(model, config=config)
    for _ in range(2):
        model(torch.randn(4, 2, 2, 2, dtype=dtype)).square().sum().backward()
        optimizer.step()
    for row in found.rows:
        own = model.get_submodule(row.name).parameters(recurse=False)
        assert row.state_bytes == kept_bytes(optimizer, own), row
    adamw = torch.optim.AdamW(model.parameters())
    adamw.step()
    assert found.adamw_bytes == kept_bytes(adamw, model.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_bytes_of_momentum_in_low_precision(dtype):
    model, config = gpt2().to(dtype), EvaConfig(momentum_dtype="bfloat16")
    found = plan(model, config=config)
    optimizer = create_eva_optimizer(model, config=config)
    model(**FAMILIES["gpt2"].batch).loss.backward()
    optimizer.step()
    assert found.state_bytes == kept_bytes(optimizer, model.parameters())
    assert found.state_bytes < plan(model).state_bytes or dtype == torch.bfloat16


@every_config
def test_the_bytes_that_are_sent_are_those_of_the_buffer(config):
    model = mlp()
    found = plan(model, config=config)
    assert bool(found.sent_bytes) == config.needs_inputs == ("sent in a step" in found.summary())
    if config.needs_inputs:
        with patch.object(capture, "begin_sum_", side_effect=lambda buffer: sent.append(buffer.nbytes) or (1, None)):
            sent = []
            create_eva_optimizer(model, config=config).step()
        assert sent == [found.sent_bytes]


def test_tied_weights_are_counted_once():
    model = gpt2()
    trainable = sum(parameter.numel() for parameter in model.parameters())
    assert plan(model).adamw_bytes == 8 * trainable
    assert f"of {trainable:,} trainable parameters" in plan(model).summary()
