"""The one comparison of all tests, the tiny models that they train, and how they train them."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from reference_step import observe
from torch import Tensor, nn

from hf_eva import EvaConfig, plan, subspaces
from hf_eva.capture import Capture
from hf_eva.layers import Wanted

# Every variant of the recipe and of the published family, for tests that concern them all.
CONFIGS = {
    "eva": EvaConfig(variant="eva"),
    "eva_f": EvaConfig(variant="eva_f"),
    "eva_s": EvaConfig(rank=1),
    "rank_3": EvaConfig(rank=3),
    "paper_eva": EvaConfig.paper("eva"),
    "paper_eva_f": EvaConfig.paper("eva_f"),
    "paper_eva_s": EvaConfig.paper("eva_s"),
}
every_config = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
RECIPES = {name: config for name, config in CONFIGS.items() if config.base == "adamw"}
every_recipe = pytest.mark.parametrize("config", RECIPES.values(), ids=RECIPES.keys())
STEPS = 5  # of a training that is compared with another

Tensors = Mapping[str, Tensor] | list[Tensor] | nn.Module


def difference(actual: Tensors, expected: Tensors) -> tuple[float, float]:
    """The largest and the mean absolute difference of all entries."""
    one, other = _named(actual), _named(expected)
    assert one.keys() == other.keys(), one.keys() ^ other.keys()
    assert all(one[name].shape == other[name].shape for name in one)
    gaps = torch.cat([(one[name].double() - other[name].double()).abs().flatten() for name in one])
    return gaps.max().item(), gaps.mean().item()


def assert_near(actual: Tensors, expected: Tensors, largest: float, mean: float | None = None) -> None:
    """Judges by the largest difference and by the mean: a lost factor shows in the mean of many small entries."""
    found = difference(actual, expected)
    allowed = largest, largest / 4 if mean is None else mean
    assert found[0] <= allowed[0] and found[1] <= allowed[1], f"differences (largest, mean) {found} exceed {allowed}"


def assert_equal(actual: Tensors, expected: Tensors) -> None:
    """Bit for bit."""
    assert_near(actual, expected, 0.0)
    one, other = _named(actual), _named(expected)
    assert [t.dtype for t in one.values()] == [t.dtype for t in other.values()]


def _named(tensors: Tensors) -> dict[str, Tensor]:
    if isinstance(tensors, nn.Module):
        return {name: parameter.detach() for name, parameter in tensors.named_parameters()}
    return dict(tensors) if isinstance(tensors, Mapping) else {str(i): t for i, t in enumerate(tensors)}


# Models of torch -----------------------------------------------------------------------------------------------------


def mlp(bias: bool = True, dtype: torch.dtype = torch.float64) -> nn.Sequential:
    """Three linear layers with a norm, whose parameters stay with the base rule."""
    layers = [
        nn.Linear(6, 5, bias),
        nn.LayerNorm(5),
        nn.Tanh(),
        nn.Linear(5, 7, bias),
        nn.Tanh(),
        nn.Linear(7, 4, bias),
    ]
    return nn.Sequential(*layers).to(dtype)


def convnet(bias: bool = True, dtype: torch.dtype = torch.float64) -> nn.Sequential:
    first = nn.Conv2d(2, 4, 3, stride=2, padding=1, bias=bias)
    second = nn.Conv2d(4, 5, 2, padding="same", padding_mode="reflect", dilation=2, bias=bias)
    return nn.Sequential(first, nn.Tanh(), second, nn.Tanh(), nn.Flatten(), nn.Linear(80, 4, bias)).to(dtype)


class Branches(nn.Module):
    """
    Two networks side by side; one is narrower than the rank. (In one network its neighbours would have gradients of
    fewer directions than the rank, and the reference would disagree about the directions that are rounding.)
    """

    def __init__(self):
        super().__init__()
        self.wide = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4))
        self.narrow = nn.Linear(3, 3)
        self.double()

    def forward(self, x):
        return self.wide(x) + F.pad(self.narrow(x[..., :3]), (0, 1))

    def __getitem__(self, index):
        return self.wide[index]


def data(model: nn.Module, micro_batches: int = 1, seed: int = 0) -> list[tuple[Tensor, Tensor]]:
    """
    Inputs and targets that fit `mlp` (batches of 4 × 3 tokens) or `convnet` (4 images). They are not centred: mean
    inputs and mean output gradients have to matter.
    """
    generator = torch.Generator().manual_seed(seed)
    dtype = next(model.parameters()).dtype
    shapes = ((4, 2, 7, 7), (4, 4)) if isinstance(model[0], nn.Conv2d) else ((4, 3, 6), (4, 3, 4))
    return [
        tuple((torch.randn(shape, generator=generator, dtype=torch.float64) + 2).to(dtype) for shape in shapes)
        for _ in range(micro_batches)
    ]


def losses(batches: list[tuple[Tensor, Tensor]], scale: float = 1.0) -> list[Callable[[nn.Module], Tensor]]:
    """One function of the model per micro-batch; their sum is the mean loss, times `scale`."""
    return [lambda model, x=x, y=y: scale * F.mse_loss(model(x), y) / len(batches) for x, y in batches]


def train(model, optimizer, steps=STEPS, micro_batches=1, first=0, scale=1.0):
    for step in range(first, first + steps):
        for loss in losses(data(model, micro_batches, seed=step), scale):
            loss(model).backward()
        optimizer.step()
        model.zero_grad()


# Models of transformers ----------------------------------------------------------------------------------------------


def bert(**changes):
    from transformers import BertConfig, BertForSequenceClassification

    sizes = {"vocab_size": 32, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    sizes |= {"intermediate_size": 24, "max_position_embeddings": 16, "num_labels": 3}
    return BertForSequenceClassification(
        BertConfig(**sizes, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, **changes)
    )


def gpt2(**changes):
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes = {"vocab_size": 32, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 16}
    sizes |= {"bos_token_id": 0, "eos_token_id": 0}
    return GPT2LMHeadModel(GPT2Config(**sizes, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, **changes))


def vit(**changes):
    from transformers import ViTConfig, ViTForImageClassification

    sizes = {"image_size": 8, "patch_size": 4, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    return ViTForImageClassification(ViTConfig(**sizes, intermediate_size=24, num_labels=3, **changes))


def albert(**changes):
    from transformers import AlbertConfig, AlbertForSequenceClassification

    sizes = {"vocab_size": 32, "embedding_size": 8, "hidden_size": 16, "num_hidden_layers": 3, "num_labels": 3}
    sizes |= {"num_attention_heads": 2, "intermediate_size": 24, "max_position_embeddings": 16}
    return AlbertForSequenceClassification(AlbertConfig(**sizes, classifier_dropout_prob=0.0, **changes))


def _text(labels: Tensor | None) -> dict[str, Tensor]:
    ids = torch.randint(1, 32, (8, 10), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids if labels is None else labels}


def _images(labels: Tensor) -> dict[str, Tensor]:
    return {"pixel_values": torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(0)), "labels": labels}


@dataclass(frozen=True)
class Family:
    """A tiny random model of transformers, a batch for it, and what `plan` should find in it."""

    build: Callable[..., nn.Module]
    batch: dict[str, Tensor]
    layers: int
    base_layers: int  # of the model in its usual size


CLASSES = torch.arange(8) % 3
FAMILIES = {
    "bert": Family(bert, _text(CLASSES), layers=14, base_layers=74),
    "gpt2": Family(gpt2, _text(None), layers=8, base_layers=48),
    "vit": Family(vit, _images(CLASSES), layers=14, base_layers=74),
}


# What is gathered and what the reference needs -----------------------------------------------------------------------


def linear_names(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)]


def guess(dimension: int, rank: int) -> torch.Tensor:
    return subspaces.initial_basis(dimension, rank, torch.zeros((), dtype=torch.float64))


def attach(model, with_output_gradients=True, share=1.0) -> Capture:
    return Capture(model, plan(model).layers, Wanted(with_output_gradients, True, share))


def gathered(capture) -> dict[str, torch.Tensor]:
    """All statistics of the window, by layer and name."""
    return {
        f"{layer.name} {name}": value.clone()
        for layer, statistics in zip(capture.layers, capture.collect()(), strict=True)
        for name, value in vars(statistics).items()
    }


def expected(model, *functions) -> dict[str, torch.Tensor]:
    """The same from all inputs and output gradients."""
    found = {}
    layers = {layer.name: layer.module for layer in plan(model).layers}
    _, inputs, outputs = observe(model, layers, functions)
    for name in layers:
        X, D = inputs[name], outputs[name]
        found |= {f"{name} tokens": torch.tensor(float(len(X))), f"{name} a": X.mean(0), f"{name} g": D.sum(0)}
        found |= {f"{name} a_square": X.square().sum() / len(X), f"{name} g_square": len(X) * D.square().sum()}
    return found


def hooks(model) -> int:
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())
