"""
One training, run in one way: what it leaves behind, and the comparison of two of them. A way of running is whatever
makes other micro-batches of the same sentences, or another model that computes the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import torch
from helpers import assert_near
from torch import Tensor, nn
from zoo import Animal, Batch, sentences

from hf_eva import EvaConfig, create_eva_optimizer

Window = list[Batch]  # the micro-batches of one step
Way = Callable[[Animal, list[list[int]]], Window]

# Those that look at inputs, and the default, which looks at gradients only. Damping 1 keeps small differences small.
HOOKED = {name: EvaConfig(variant=name, damping=1.0) for name in ("eva", "eva_f")}
ALL = {**HOOKED, "eva_s": EvaConfig(rank=2, damping=1.0)}


@dataclass
class Run:
    """Losses and gradient norms of all steps, and the statistics and weights after the last."""

    losses: list[Tensor] = field(default_factory=list)
    norms: list[Tensor] = field(default_factory=list)
    statistics: dict[str, Tensor] = field(default_factory=dict)
    weights: dict[str, Tensor] = field(default_factory=dict)

    def end(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> Run:
        """Take what the training has left in the model and its optimizer."""
        names = {parameter: name for name, parameter in model.named_parameters()}
        self.weights = {name: parameter.detach() for parameter, name in names.items()}
        for parameter, state in optimizer.state.items():
            kept = {key: _without_signs(value) for key, value in state.items() if key.startswith("eva_")}
            self.statistics |= {f"{names[parameter]} {key}": value for key, value in kept.items()}
        return self


def assert_same(one: Run, other: Run, largest: float = 1e-9, config: EvaConfig | None = None) -> None:
    """
    By the largest and by the mean difference of everything that a run leaves. With a `config` that keeps bases a few
    may differ by more: bases of layers whose gradients are hardly more than rounding, and what follows from them.
    """
    has_bases = config is not None and config.variant == "eva_s"
    allowed = (1e4 * largest, 100 * largest) if has_bases else (largest,)
    for name in ("losses", "norms", "statistics", "weights"):
        if getattr(one, name) or getattr(other, name):
            assert_near(getattr(one, name), getattr(other, name), *allowed)


def train(
    animal: Animal, config: EvaConfig, way: Way, steps: int = 3, model: nn.Module | None = None, lr: float = 1e-3
) -> Run:
    """Trains the animal's model, in double precision, on other sentences at every step."""
    model = animal.build() if model is None else model
    model = model.double().train()
    optimizer = create_eva_optimizer(model, lr=lr, weight_decay=0.1, config=config)
    run = Run()
    for step in range(steps):
        window = way(animal, sentences(seed=step))
        total = sum(animal.targets(batch).ne(-100).sum() for batch in window)
        loss = torch.zeros((), dtype=torch.float64)
        for batch in window:
            part = animal.loss(model, _double(batch), total)
            part.backward()
            loss += part.detach()
        run.losses.append(loss)
        run.norms.append(torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None]))
        optimizer.step()
        optimizer.zero_grad()
    return run.end(model, optimizer)


def whole(animal: Animal, texts: list[list[int]]) -> Window:
    """All sentences at once, padded to the longest."""
    return [animal.batch(texts)]


def split(*sizes: int) -> Way:
    """Micro-batches of these sizes, each padded by itself."""
    return lambda animal, texts: [animal.batch(part) for part in _parts(texts, sizes)]


def longer(length: int, side: str = "right") -> Way:
    """The same sentences, padded to a length."""
    return lambda animal, texts: [animal.batch(texts, length, side)]


def packed(animal: Animal, texts: list[list[int]]) -> Window:
    """All sentences in one row, one behind the other, as collators that flatten have it: positions tell them apart."""
    batch = {
        "input_ids": [token for text in texts for token in text],
        "position_ids": [position for text in texts for position in range(len(text))],
        "labels": [label for text in texts for label in (-100, *text[1:])],
    }
    batch = {name: torch.tensor([values]) for name, values in batch.items()}
    return [{**batch, "use_cache": torch.tensor(False)}]  # with a cache models take a row for one sentence


def _parts(texts: Sequence[list[int]], sizes: Iterable[int]) -> list[list[list[int]]]:
    rest = list(texts)
    parts = []
    for size in sizes:
        parts.append(rest[:size])
        rest = rest[size:]
    assert not rest
    return parts


def _without_signs(statistic: Tensor) -> Tensor:
    """Of a basis `U diag(ℓ)`, whose columns may have either sign, `U diag(ℓ) Uᵀ`."""
    if statistic.ndim < 2:
        return statistic
    return statistic / torch.linalg.vector_norm(statistic, dim=0).clamp_min(1e-30) @ statistic.T


def _double(batch: Batch) -> Batch:
    return {name: value.double() if value.is_floating_point() else value for name, value in batch.items()}
