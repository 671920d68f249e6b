"""
The optimizers that Eva is compared with, each made for a Hugging Face model in one call.

Where a package of the field has an optimizer, it is that one. Methods for matrices get exactly the layers that Eva
preconditions, and AdamW with the same learning rate gets all other parameters, so that a comparison is about the rule.
"""

from __future__ import annotations

import inspect
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch
from kfac import KFAC
from onednn import matmul
from published import PublishedEva
from recipe import near_miss
from torch import Tensor, nn

from hf_eva import EvaConfig, create_eva_optimizer, plan

Build = Callable[..., torch.optim.Optimizer]


@dataclass(frozen=True)
class Peer:
    """An optimizer of the comparison.

    Args:
        build (`Callable`): Makes it from the model, the learning rate, AdamW's weight decay and the number of steps;
            further keyword arguments are the options of [`build`].
        lr_ratio (`float`): Where a search of the learning rate starts, as a multiple of AdamW's.
        source (`str`): The class that it is, with what differs from the defaults of that class.
        interval (`int`): Steps after which its work repeats, if no option says; see [`interval_of`].
        schedule (`str`): `"task"`, or `"constant"` where the method replaces the schedule of the learning rate.
    """

    build: Build
    lr_ratio: float
    source: str
    interval: int = 1
    schedule: str = "task"


def build(
    name: str, model: nn.Module, lr: float, weight_decay: float, total_steps: int, options: dict | None = None
) -> torch.optim.Optimizer:
    """Makes the peer `name` for all trainable parameters of a model.

    Args:
        weight_decay (`float`): AdamW's. Each peer gets `weight_decay / lr_ratio`, with which a step shrinks the
            weights as one of AdamW does; biases and the parameters of norms get none.
        options (`dict`): Fields of `EvaConfig` for the Eva family, arguments of the peer's class for the others.

    Raises:
        `ValueError`: there is no such peer or option.
        `ImportError`: a package is missing; the message holds the `pip install` command.
    """
    if name not in PEERS:
        raise ValueError(f"unknown optimizer {name!r}{near_miss(name, list(PEERS)) or ', only ' + ', '.join(PEERS)}")
    return PEERS[name].build(model, lr, weight_decay, total_steps, **(options or {}))


def interval_of(name: str, options: dict[str, Any]) -> int:
    """Steps after which the work of a peer repeats: a fair timing covers whole intervals."""
    return int(options.get("refresh_interval", PEERS[name].interval))


class Combined(torch.optim.Optimizer):
    """Several optimizers, each for parameters of its own, as one: with all their groups and one state."""

    def __init__(self, parts: Sequence[torch.optim.Optimizer]) -> None:
        self.parts = list(parts)
        super().__init__([group for part in parts for group in part.param_groups], {})
        self._share()

    def _share(self) -> None:
        """Groups and state become the same objects here and in the parts, so that a scheduler reaches both."""
        self.param_groups = [group for part in self.parts for group in part.param_groups]
        self.state = defaultdict(dict, {p: entry for part in self.parts for p, entry in part.state.items()})
        for part in self.parts:
            part.state = self.state

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        loss = _evaluate(closure)
        for part in self.parts:
            part.step()
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        groups = iter(state_dict["param_groups"])
        for part in self.parts:
            own = [next(groups) for _ in part.param_groups]
            indices = {index for group in own for index in group["params"]}
            state = {index: entry for index, entry in state_dict["state"].items() if index in indices}
            part.load_state_dict({"state": state, "param_groups": own})
        self._share()


def _evaluate(closure: Callable[[], float] | None) -> float | None:
    with torch.enable_grad():
        return closure() if closure is not None else None


def newton_schulz(matrix: Tensor, coefficients: tuple[float, float, float], steps: int, eps: float) -> Tensor:
    """Brings all singular values near 1 by the quintic iteration of Muon, in the precision of the matrix."""
    tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.T if tall else matrix
    x = x / torch.linalg.vector_norm(x).clamp_min(eps)
    a, b, c = coefficients
    rows, columns = x.shape
    if columns > 1.5 * rows:
        # The same polynomials of S = X Xᵀ, multiplied together before they meet the much larger X.
        s, product = matmul(x, x.T), None
        for step in range(steps):
            factor = matmul(s, s).mul_(c).add_(s, alpha=b)
            factor.diagonal().add_(a)
            product = factor if product is None else matmul(factor, product)
            if step < steps - 1:
                s = matmul(factor, matmul(s, factor))
        x = x if product is None else matmul(product, x)
    else:
        for _ in range(steps):
            s = matmul(x, x.T)
            factor = matmul(s, s).mul_(c).add_(s, alpha=b)
            factor.diagonal().add_(a)
            x = matmul(factor, x)
    return x.T if tall else x


class Muon(torch.optim.Muon):
    """`torch.optim.Muon`, whose bfloat16 few CPUs compute with: there, float32 takes a fifth of the time or less."""

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        if any(p.device.type != "cpu" for group in self.param_groups for p in group["params"]):
            return super().step(closure)
        loss = _evaluate(closure)
        for group in self.param_groups:
            for p in (p for p in group["params"] if p.grad is not None):
                state, momentum = self.state[p], group["momentum"]
                if "momentum_buffer" not in state:
                    state["momentum_buffer"] = torch.zeros_like(p)
                buffer = state["momentum_buffer"].lerp_(p.grad, 1 - momentum)
                update = (p.grad.lerp(buffer, momentum) if group["nesterov"] else buffer).float()
                update = newton_schulz(update, group["ns_coefficients"], group["ns_steps"], group["eps"])
                matched = group["adjust_lr_fn"] == "match_rms_adamw"
                scale = 0.2 * math.sqrt(max(p.shape)) if matched else math.sqrt(max(1, p.shape[0] / p.shape[1]))
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.add_(update, alpha=-group["lr"] * scale)
        return loss


def _groups(parameters: Iterable[Tensor], weight_decay: float) -> list[dict[str, Any]]:
    """As in Trainer and in `create_eva_optimizer`: biases and the parameters of norms do not decay."""
    parameters = list(parameters)
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def _trainable(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def _class(source: str | type, options: dict[str, Any]) -> type[torch.optim.Optimizer]:
    """A class or the one at a path. It has to know the options: some of the packages ignore what they do not know."""
    cls = source
    if isinstance(source, str):
        module, _, name = source.rpartition(".")
        package = module.partition(".")[0]
        try:
            cls = getattr(import_module(module), name)
        except ModuleNotFoundError as error:
            raise ImportError(f"{source} is not installed ({error}): run `pip install {package}`") from error
    given = ("params", "layers", "lr", "weight_decay", "kwargs")
    known = [name for name in inspect.signature(cls).parameters if name not in given]
    for name in options:
        if name not in known:
            hint = near_miss(name, known) or f", only {', '.join(known)}"
            raise ValueError(f"unknown option {name!r} of {cls.__name__}{hint}")
    return cls


def _whole_model(source: str | type, warmup: float = 0.0, **defaults: Any) -> Build:
    """An optimizer for all parameters; `warmup` is a share of all steps, for one that replaces the schedule."""

    def make(model: nn.Module, lr: float, weight_decay: float, total_steps: int, **options: Any):
        if warmup:
            options = {"warmup_steps": max(1, round(warmup * total_steps)), **options}
        options = {**defaults, **options}
        return _class(source, options)(_groups(_trainable(model), weight_decay), lr=lr, **options)

    return make


def _layers(source: str | type, matrices_only: bool = False, **defaults: Any) -> Build:
    """An optimizer for the layers of `hf_eva.plan`, and AdamW for everything else."""

    def make(model: nn.Module, lr: float, weight_decay: float, total_steps: int, **options: Any):
        options = {**defaults, **options}
        cls = _class(source, options)
        layers = [layer for layer in plan(model).layers if layer.weight.ndim == 2 or not matrices_only]
        first = layers if cls is KFAC else [layer.weight for layer in layers]
        parts = [cls(first, lr=lr, weight_decay=weight_decay, **options)]
        taken = {id(layer.weight) for layer in layers}
        others = _groups((p for p in _trainable(model) if id(p) not in taken), weight_decay)
        if others:
            parts.append(torch.optim.AdamW(others, lr=lr, fused=True))
        return Combined(parts)

    return make


def _eva(preset: str) -> Build:
    def make(model: nn.Module, lr: float, weight_decay: float, total_steps: int, **options: Any):
        config = EvaConfig.from_options({"preset": preset, **options})
        return create_eva_optimizer(model, lr, weight_decay, config, fused=True)

    return make


def _published(model: nn.Module, lr: float, weight_decay: float, total_steps: int, **options: Any):
    cls = _class(PublishedEva, options)
    return cls(_groups(_trainable(model), weight_decay), plan(model).layers, lr=lr, **options)


def _peer(make: Build, lr_ratio: float, source: str, **fields: Any) -> Peer:
    def scaled(model: nn.Module, lr: float, weight_decay: float, total_steps: int, **options: Any):
        return make(model, lr, weight_decay / lr_ratio, total_steps, **options)

    return Peer(scaled, lr_ratio, source, **fields)


PEERS = {
    "adamw": _peer(_whole_model("torch.optim.AdamW", fused=True), 1.0, "torch.optim.AdamW, fused"),
    "adamw_8bit": _peer(_whole_model("bitsandbytes.optim.AdamW8bit"), 1.0, "bitsandbytes.optim.AdamW8bit"),
    "sgd": _peer(
        _whole_model("torch.optim.SGD", momentum=0.9, fused=True), 50.0, "torch.optim.SGD, momentum 0.9, fused"
    ),
    "muon": _peer(
        _layers(Muon, matrices_only=True, adjust_lr_fn="match_rms_adamw"),
        2.0,
        "torch.optim.Muon, adjust_lr_fn match_rms_adamw, on a CPU in float32 by oneDNN; AdamW for convolutions too",
    ),
    "soap": _peer(_layers("pytorch_optimizer.SOAP"), 4.0, "pytorch_optimizer.SOAP", interval=10),
    "shampoo": _peer(
        _layers("pytorch_optimizer.DASH", inverse_root_method="eigh"),
        2.0,
        "pytorch_optimizer.DASH, inverse_root_method eigh: Shampoo in blocks, grafted onto Adam",
        interval=10,
    ),
    "kfac": _peer(_layers(KFAC), 4.0, "scripts/kfac.py, K-FAC", interval=10),
    "foof": _peer(_layers(KFAC, output_side=False), 4.0, "scripts/kfac.py, FOOF", interval=10),
    "adafactor": _peer(
        _whole_model("transformers.optimization.Adafactor", scale_parameter=False, relative_step=False),
        1.0,
        "transformers.Adafactor as --optim adafactor has it: scale_parameter and relative_step off",
    ),
    "lion": _peer(_whole_model("pytorch_optimizer.Lion"), 0.2, "pytorch_optimizer.Lion"),
    "schedulefree": _peer(
        _whole_model("pytorch_optimizer.ScheduleFreeAdamW", warmup=0.1),
        2.0,
        "pytorch_optimizer.ScheduleFreeAdamW, warmup over a tenth of the steps",
        schedule="constant",
    ),
    "eva": _peer(_eva("recipe"), 0.5, "hf_eva, EvaConfig()"),
    "paper_eva": _peer(_eva("paper_eva"), 100.0, 'hf_eva, EvaConfig.paper("eva")'),
    "paper_eva_f": _peer(_eva("paper_eva_f"), 30.0, 'hf_eva, EvaConfig.paper("eva_f")'),
    "paper_eva_s": _peer(_eva("paper_eva_s"), 50.0, 'hf_eva, EvaConfig.paper("eva_s")'),
    "published_eva": _peer(
        _published, 100.0, 'scripts/published.py, EvaConfig.paper("eva") as its authors compute it'
    ),
}
