"""Padding is not seen: neither how much of it there is, nor where it stands, nor what it holds."""

import logging
from dataclasses import replace

import pytest
import torch
from harness import ALL, HOOKED, Run, assert_same, longer, packed, train, whole
from helpers import assert_near, attach
from torch import nn
from torch.utils.checkpoint import checkpoint
from zoo import ZOO, next_tokens, sentences

from hf_eva import EvaConfig, create_eva_optimizer

TEXT = [name for name, animal in ZOO.items() if "input_ids" in animal.batch([[2, 3, 4]])]
ANYWHERE = ("gpt2", "llama", "opt", "qwen2", "mixtral", "t5")  # can be told the positions, or need none
PACKABLE = ("llama", "qwen2", "mixtral")  # read from positions where a sentence begins
hooked = pytest.mark.parametrize("config", HOOKED.values(), ids=HOOKED)


@pytest.mark.parametrize("config", ALL.values(), ids=ALL)
@pytest.mark.parametrize("name", TEXT)
def test_more_padding_changes_nothing(name, config):
    assert_same(train(ZOO[name], config, longer(13)), train(ZOO[name], config, whole), config=config)


@pytest.mark.parametrize("config", ALL.values(), ids=ALL)
@pytest.mark.parametrize("name", ANYWHERE)
def test_padding_on_the_left_changes_nothing(name, config):
    assert_same(train(ZOO[name], config, longer(13, "left")), train(ZOO[name], config, whole), config=config)


@pytest.mark.parametrize("config", ALL.values(), ids=ALL)
@pytest.mark.parametrize("name", PACKABLE)
def test_sentences_packed_into_one_row_need_no_mask(name, config):
    assert_same(train(ZOO[name], config, packed), train(ZOO[name], config, whole), config=config)


@hooked
def test_padding_counts_where_that_is_wanted(config):
    config = replace(config, mask_padding=False)
    one, other = (train(ZOO["bert"], config, way) for way in (longer(13), whole))
    assert_near(one.norms[:1], other.norms[:1], 1e-12)
    with pytest.raises(AssertionError):
        assert_near(one.statistics, other.statistics, 1e-3)


@pytest.mark.parametrize("kwargs", [{"use_reentrant": True}, {"use_reentrant": False}], ids=str)
@pytest.mark.parametrize("name", ["bert", "llama", "t5"])
def test_checkpointing_remembers_the_padding(name, kwargs):
    def run(checkpointed: bool) -> Run:
        model = ZOO[name].build()
        if checkpointed:
            model.gradient_checkpointing_enable(kwargs)
        return train(ZOO[name], HOOKED["eva"], whole, model=model)

    assert_same(run(True), run(False))


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointing_over_several_forward_passes_warns_where_it_forgets(use_reentrant, caplog):
    """As in contrastive training: the batch of the first forward pass is gone when its layers run again."""

    def statistics(model):
        capture = attach(model)
        losses = [model(**ZOO["bert"].batch(sentences(seed=seed))).loss for seed in (0, 1)]
        sum(losses).backward()
        return {layer.name: found.a for layer, found in zip(capture.layers, capture.collect()(), strict=True)}

    model = ZOO["bert"].build().double()
    expected = statistics(model)
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    model.train()
    with caplog.at_level(logging.WARNING, logger="hf_eva"):
        found = statistics(model)
    told = [record.getMessage() for record in caplog.records if record.name.startswith("hf_eva")]
    if use_reentrant:
        assert len(told) == 1 and "Reentrant gradient checkpointing" in told[0]
    else:
        assert not told
        assert_near(found, expected, 1e-12)


# What a mask says ----------------------------------------------------------------------------------------------------


class Positions(nn.Module):
    """One linear layer on vectors and their mask."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 2).double()

    def forward(self, x, attention_mask=None):
        return self.layer(x)


def means_of(model, *args, **kwargs) -> tuple[float, list[float]]:
    """How many tokens the layer counts, and their mean."""
    capture = attach(model)
    model(*args, **kwargs).nan_to_num().sum().backward()
    (found,) = capture.collect()()
    capture.detach()
    return found.tokens.item(), found.a.tolist()


X = torch.tensor([[1.0, 2, 9], [3, 9, 9]], dtype=torch.float64).unsqueeze(-1).expand(2, 3, 3)


@pytest.mark.parametrize(
    "mask",
    [
        torch.tensor([[1, 1, 0], [1, 0, 0]]),
        torch.tensor([[True, True, False], [True, False, False]]),
        torch.tensor([[1.0, 1.0, 0.0], [1.0, 0.0, 0.0]]),
        torch.tensor([[1, 2, 0], [3, 0, 0]]),  # packed: each sentence has a number
    ],
    ids=["integers", "booleans", "floats", "packed"],
)
def test_a_mask_says_what_counts(mask):
    assert means_of(Positions(), X, attention_mask=mask) == (3, [2.0] * 3)
    assert means_of(Positions(), X, mask) == (3, [2.0] * 3)  # as a positional argument


def test_positions_may_be_flat():
    class Flat(Positions):
        def forward(self, x, attention_mask=None):
            return self.layer(x.flatten(0, 1))

    assert means_of(Flat(), X, attention_mask=(X[..., 0] < 9).long()) == (3, [2.0] * 3)


@pytest.mark.parametrize("mask", [None, torch.zeros(2, 1, 3, 3), torch.ones(2, 5)], ids=["none", "4-dim", "other"])
def test_without_a_mask_that_fits_all_positions_count(mask):
    assert means_of(Positions(), X, attention_mask=mask) == (6, [5.5] * 3)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_padding_may_hold_anything(value):
    mask = X[..., 0] < 9
    x = X.masked_fill(~mask.unsqueeze(-1), value)
    assert means_of(Positions(), x, attention_mask=mask) == (3, [2.0] * 3)


def test_a_batch_of_padding_counts_nothing():
    assert means_of(Positions(), X, attention_mask=torch.zeros(2, 3)) == (0, [0.0] * 3)


def test_the_mask_of_an_earlier_batch_is_forgotten():
    model = Positions()
    capture = attach(model)
    model(X, torch.zeros(2, 3)).sum().backward()
    model(X).sum().backward()
    assert capture.collect()()[0].tokens == 6


def test_an_evaluation_does_not_change_the_mask():
    """Of a forward pass whose layers run again after it, under reentrant checkpointing."""

    class Checkpointed(Positions):
        def forward(self, x, attention_mask=None):
            return checkpoint(self.layer, x, use_reentrant=True)

    model = Checkpointed()
    capture = attach(model)
    out = model(X.clone().requires_grad_(), X[..., 0] < 9)
    with torch.no_grad():
        model(X)
    out.sum().backward()
    assert capture.collect()()[0].tokens == 3


# Models within models ------------------------------------------------------------------------------------------------


def tokens_of(model, batch) -> dict[str, int]:
    capture = attach(model)
    model(**batch).loss.backward()
    return {layer.name: int(found.tokens) for layer, found in zip(capture.layers, capture.collect()(), strict=True)}


@pytest.mark.parametrize("with_mask", [True, False])
def test_encoder_and_decoder_have_masks_of_their_own(with_mask):
    """Also where both are as long, and without a mask for the decoder, whose padding the labels tell."""
    texts = sentences()
    batch = ZOO["t5"].batch(texts, 11)
    batch["labels"] = nn.functional.pad(batch["labels"], (0, 2), value=-100)
    if with_mask:
        batch["decoder_attention_mask"] = batch["labels"].ne(-100).long()
    read, said = int(batch["attention_mask"].sum()), int(batch["labels"].ne(-100).sum())
    assert batch["labels"].shape == batch["input_ids"].shape and read != said
    for name, count in tokens_of(ZOO["t5"].build(), batch).items():
        of_encoder = name.startswith("encoder") or "EncDecAttention.k" in name or "EncDecAttention.v" in name
        assert count == (read if of_encoder else said), name


def test_images_are_not_masked_by_the_text_beside_them():
    """CLIP's towers, with as many patches as there are positions in the text."""
    from transformers import CLIPConfig, CLIPModel

    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
    vision, text = {**sizes, "image_size": 8, "patch_size": 4}, {**sizes, "vocab_size": 32, "eos_token_id": 2}
    model = CLIPModel(CLIPConfig(vision_config=vision, text_config=text, projection_dim=8))
    texts = [[3, 4, 2], [5, 2], [3, 5, 6, 2]]
    inputs = next_tokens(texts, 5)
    del inputs["labels"]
    found = tokens_of(model, {**inputs, "pixel_values": torch.randn(3, 3, 8, 8), "return_loss": True})
    for name, count in found.items():
        if "layers" in name:
            assert count == (3 * 5 if name.startswith("vision") else 3 + 2 + 4), name


def test_adapters_of_peft_see_the_mask():
    peft = pytest.importorskip("peft")
    batch = ZOO["bert"].batch(sentences())
    adapted = peft.get_peft_model(ZOO["bert"].build(), peft.LoraConfig(target_modules=["query"], task_type="SEQ_CLS"))
    found = {name: count for name, count in tokens_of(adapted, batch).items() if "lora" in name}
    assert found and set(found.values()) == {int(batch["attention_mask"].sum())}


def test_masks_are_part_of_the_hooks_that_go():
    model = ZOO["t5"].build()
    optimizer = create_eva_optimizer(model, config=EvaConfig(variant="eva"))
    assert any(module._forward_pre_hooks for module in model.modules())
    optimizer.detach()
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())
