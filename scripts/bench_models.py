"""The models of the benchmark at their true shapes, with random weights, and what fits into memory beside them."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import psutil
import torch
from bench_rules import OPTIMIZERS, state_bytes
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
    ViTConfig,
    ViTForImageClassification,
)

FITS = 0.85  # share of the memory that is free which parameters, gradients and states may take


@dataclass(frozen=True)
class Architecture:
    """
    Args:
        config (`type`): Its defaults are the published sizes of the model, where `settings` says nothing else.
        layers (`int`): Blocks of the whole model.
    """

    model: type[PreTrainedModel]
    config: type[PretrainedConfig]
    layers: int
    source: str
    settings: dict[str, Any] = field(default_factory=dict)

    def build(
        self, layers: int | None = None, device: str = "meta", dtype: torch.dtype = torch.float32
    ) -> PreTrainedModel:
        """A model of which only the number of blocks differs; on the meta device it takes no memory."""
        config = self.config(**{**self.settings, "num_hidden_layers": layers or self.layers})
        with torch.device(device):
            return self.model(config).to(dtype).train()


def _llama(width: int, heads: int) -> Architecture:
    """The proportions of TinyLlama 1.1B: 22 blocks, heads of 64, one key and value head for eight, untied output."""
    settings = {
        "hidden_size": width,
        "intermediate_size": width * 11 // 4,
        "num_attention_heads": heads,
        "num_key_value_heads": max(1, heads // 8),
        "vocab_size": 32000 * width // 2048,
    }
    source = f"LlamaConfig in the proportions of TinyLlama 1.1B, width {width}"
    return Architecture(LlamaForCausalLM, LlamaConfig, 22, source, settings)


MODELS = {
    "bert": Architecture(BertForSequenceClassification, BertConfig, 12, "BERT-base, BertConfig()"),
    "gpt2": Architecture(GPT2LMHeadModel, GPT2Config, 12, "GPT-2 124M, GPT2Config()"),
    "vit": Architecture(ViTForImageClassification, ViTConfig, 12, "ViT-B/16, ViTConfig()", {"num_labels": 1000}),
    "bert-mini": Architecture(
        BertForSequenceClassification,
        BertConfig,
        4,
        "BERT-mini, BertConfig() at width 256",
        {"hidden_size": 256, "num_attention_heads": 4, "intermediate_size": 1024},
    ),
    "gpt2-mini": Architecture(
        GPT2LMHeadModel, GPT2Config, 4, "GPT2Config() at width 256", {"n_embd": 256, "n_head": 4, "vocab_size": 8192}
    ),
    "vit-tiny": Architecture(
        ViTForImageClassification,
        ViTConfig,
        12,
        "ViT-Ti/16, ViTConfig() at width 192",
        {"hidden_size": 192, "num_attention_heads": 3, "intermediate_size": 768, "num_labels": 1000},
    ),
    "llama-10m": _llama(192, 3),
    "llama-40m": _llama(384, 6),
    "llama-130m": _llama(704, 11),
    "llama-380m": _llama(1216, 19),
    "llama-1b": _llama(2048, 32),
}


def share(model: PreTrainedModel) -> PreTrainedModel:
    """The same parameters, with the same gradients, in modules of their own, which have hooks of their own."""
    return copy.deepcopy(model, {id(tensor): tensor for tensor in [*model.parameters(), *model.buffers()]})


def batch_of(model: PreTrainedModel, size: int, tokens: int) -> dict[str, Tensor]:
    """Random inputs with labels; an image model decides itself how many tokens an image has."""
    config, device = model.config, model.device
    if model.main_input_name == "pixel_values":
        shape = size, config.num_channels, config.image_size, config.image_size
        inputs = torch.randn(shape, device=device, dtype=model.dtype)
    else:
        inputs = torch.randint(0, config.vocab_size, (size, tokens), device=device)
    is_causal = type(model).__name__.endswith("LMHeadModel") or type(model).__name__.endswith("CausalLM")
    labels = inputs if is_causal else torch.randint(0, config.num_labels, (size,), device=device)
    return {model.main_input_name: inputs, "labels": labels}


def tokens_of(model: PreTrainedModel, tokens: int) -> int:
    """The tokens of a text, or those that an image has."""
    if model.main_input_name != "pixel_values":
        return tokens
    return (model.config.image_size // model.config.patch_size) ** 2 + 1


def count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def free_memory(device: str) -> int:
    return torch.cuda.mem_get_info(device)[0] if device.startswith("cuda") else psutil.virtual_memory().available


def fitting(
    architecture: Architecture, names: Sequence[str], dtype: torch.dtype, limit: float, most: int | None = None
) -> tuple[int, list[list[str]]]:
    """
    Returns the most blocks, up to `most`, with which parameters, gradients, the state of the first optimizer and that
    of any other take at most `limit` bytes, and the optimizers in groups that fit, each led by the first.
    """
    for layers in range(min(most or architecture.layers, architecture.layers), 0, -1):
        model = architecture.build(layers, dtype=dtype)
        states = {name: state_bytes(OPTIMIZERS[name].peer, model, OPTIMIZERS[name].options) for name in names}
        first, *others = names
        room = limit - 2 * count(model) * dtype.itemsize - states[first]
        if room >= max((states[name] for name in others), default=0):
            break
    else:
        raise ValueError(
            f"one block of {architecture.source} with {first} and any of {', '.join(others) or 'no other'} needs more "
            f"than {limit / 2**30:.1f} GiB, {FITS:.0%} of what is free: choose a smaller model or fewer --optimizers"
        )
    groups: list[list[str]] = [[]]
    left = room
    for name in others:
        if states[name] > left:
            groups, left = [*groups, []], room
        groups[-1].append(name)
        left -= states[name]
    return layers, [[first, *group] for group in groups]
