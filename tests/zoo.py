"""
Tiny random models of transformers and batches for them: the three families and models that the package was not written
for. No dropout, so that one batch has one gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import transformers
from torch import Tensor, nn

VOCABULARY = 32
PAD = 1  # RoBERTa and OPT count positions by it
Batch = dict[str, Tensor]


def _build(prefix: str, head: str, **sizes: Any) -> nn.Module:
    torch.manual_seed(0)
    config = getattr(transformers, f"{prefix}Config")(**sizes)
    return getattr(transformers, f"{prefix}For{head}" if head != "LMHeadModel" else f"{prefix}{head}")(config)


_ENCODER = {"vocab_size": VOCABULARY, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
_ENCODER |= {"intermediate_size": 24, "max_position_embeddings": 32, "num_labels": 3, "pad_token_id": PAD}
_ENCODER |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
_DECODER = {"vocab_size": VOCABULARY, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
_DECODER |= {"num_key_value_heads": 1, "intermediate_size": 24, "max_position_embeddings": 32, "pad_token_id": PAD}
_DECODER |= {"bos_token_id": 0, "eos_token_id": 0}
_IMAGES = {"image_size": 8, "patch_size": 4, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
_IMAGES |= {"intermediate_size": 24}


def _gpt2() -> nn.Module:
    sizes = {"vocab_size": VOCABULARY, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32}
    sizes |= {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": PAD}
    return _build("GPT2", "LMHeadModel", **sizes, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)


def _distilbert() -> nn.Module:
    sizes = {"vocab_size": VOCABULARY, "dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 24, "num_labels": 3}
    sizes |= {"max_position_embeddings": 32, "pad_token_id": PAD}
    return _build(
        "DistilBert", "SequenceClassification", **sizes, dropout=0.0, attention_dropout=0.0, seq_classif_dropout=0.0
    )


def _deberta() -> nn.Module:
    relative = {"relative_attention": True, "position_buckets": 6, "pos_att_type": ["p2c", "c2p"]}
    relative |= {"share_att_key": True, "norm_rel_ebd": "layer_norm", "position_biased_input": False}
    return _build("DebertaV2", "SequenceClassification", **_ENCODER, **relative)


def _opt() -> nn.Module:
    sizes = {"vocab_size": VOCABULARY, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    sizes |= {"ffn_dim": 24, "max_position_embeddings": 32, "word_embed_proj_dim": 16, "pad_token_id": PAD}
    return _build("OPT", "CausalLM", **sizes, dropout=0.0, bos_token_id=0, eos_token_id=0)


def _t5() -> nn.Module:
    sizes = {"vocab_size": VOCABULARY, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2}
    return _build("T5", "ConditionalGeneration", **sizes, dropout_rate=0.0, pad_token_id=PAD, decoder_start_token_id=0)


def _clip() -> nn.Module:
    torch.manual_seed(0)
    config = transformers.CLIPConfig(vision_config=_IMAGES, num_labels=3)
    return transformers.CLIPForImageClassification(config)


# Batches -------------------------------------------------------------------------------------------------------------


def sentences(count: int = 8, seed: int = 0) -> list[list[int]]:
    """Sentences of 3 to 9 tokens."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(3, 10, (count,), generator=generator)
    lengths[0] = 9
    return [torch.randint(2, VOCABULARY, (length,), generator=generator).tolist() for length in lengths.tolist()]


def padded(texts: Sequence[Sequence[int]], length: int | None = None, side: str = "right", fill: int = PAD) -> Tensor:
    width = max(map(len, texts)) if length is None else length
    rows = []
    for text in texts:
        gap = [fill] * (width - len(text))
        rows.append([*text, *gap] if side == "right" else [*gap, *text])
    return torch.tensor(rows)


def _inputs(texts: Sequence[Sequence[int]], length: int | None, side: str) -> Batch:
    ones = [[1] * len(text) for text in texts]
    return {"input_ids": padded(texts, length, side), "attention_mask": padded(ones, length, side, fill=0)}


def text_classes(texts: Sequence[Sequence[int]], length: int | None = None, side: str = "right") -> Batch:
    return {**_inputs(texts, length, side), "labels": torch.tensor([sum(text) % 3 for text in texts])}


def next_tokens(texts: Sequence[Sequence[int]], length: int | None = None, side: str = "right") -> Batch:
    batch = _inputs(texts, length, side)
    if side == "left":
        batch["position_ids"] = (batch["attention_mask"].cumsum(1) - 1).clamp(min=0)
    said = [[-100, *text[1:]] for text in texts]  # nothing stands before the first token, unless padding does
    return {**batch, "labels": padded(said, length, side, fill=-100)}


def answers(texts: Sequence[Sequence[int]], length: int | None = None, side: str = "right") -> Batch:
    """What an encoder reads and, in the labels, what a decoder is to say: the same, without the first two tokens."""
    spoken = [text[2:] for text in texts]
    width = None if length is None else length - 2
    return {**_inputs(texts, length, side), "labels": padded(spoken, width, fill=-100)}


def images(texts: Sequence[Sequence[int]], length: int | None = None, side: str = "right") -> Batch:
    pixels = [torch.randn(3, 8, 8, generator=torch.Generator().manual_seed(sum(text))) for text in texts]
    return {"pixel_values": torch.stack(pixels), "labels": torch.tensor([sum(text) % 3 for text in texts])}


@dataclass(frozen=True)
class Animal:
    """A model and what makes a batch for it of sentences."""

    build: Callable[[], nn.Module]
    batch: Callable[..., Batch]

    def targets(self, batch: Batch) -> Tensor:
        """The label of each row of logits, -100 where there is none."""
        labels = batch["labels"]
        return nn.functional.pad(labels[:, 1:], (0, 1), value=-100) if self.batch is next_tokens else labels

    def loss(self, model: nn.Module, batch: Batch, total: Tensor) -> Tensor:
        """The share of a micro-batch in the mean loss over `total` labels, in the precision of the model."""
        logits = model(**batch).logits.flatten(0, -2)
        return nn.functional.cross_entropy(logits, self.targets(batch).flatten(), reduction="sum") / total


_classifier = partial(partial, _build, head="SequenceClassification")
_causal = partial(partial, _build, head="CausalLM")


def _mixtral() -> nn.Module:
    model = _build("Mixtral", "CausalLM", **_DECODER, num_local_experts=2, num_experts_per_tok=2)
    model.config._experts_implementation = "eager"  # the others know no float64
    return model


ZOO = {
    "bert": Animal(_classifier("Bert", **_ENCODER), text_classes),
    "gpt2": Animal(_gpt2, next_tokens),
    "vit": Animal(partial(_build, "ViT", "ImageClassification", **_IMAGES, num_labels=3), images),
    "distilbert": Animal(_distilbert, text_classes),
    "deberta": Animal(_deberta, text_classes),
    "roberta": Animal(_classifier("Roberta", **_ENCODER), text_classes),
    "opt": Animal(_opt, next_tokens),
    "llama": Animal(_causal("Llama", **_DECODER), next_tokens),
    "qwen2": Animal(_causal("Qwen2", **_DECODER), next_tokens),
    "mixtral": Animal(_mixtral, next_tokens),
    "t5": Animal(_t5, answers),
    "clip": Animal(_clip, images),
}
