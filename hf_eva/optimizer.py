"""`Eva`, a `torch.optim.Optimizer` for all parameters of a model: the order of a step, and the way of its state."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, overload

import torch
from torch import Tensor

from . import base
from .adamw_step import adamw_step
from .capture import Capture, Statistics
from .config import EvaConfig
from .curvature import is_refreshed
from .diagnostics import LastStep
from .layers import Layer, Wanted
from .selection import Plan, embeddings_of, tables_of
from .sgd_step import sgd_step
from .shards import align_, refusal
from .soundness import Watch, can_read
from .stacks import Scratch, Stack, stacks_of
from .state import follow_, refuse_other, refuse_unsound
from .step import Step, sizes_of

logger = logging.getLogger(__name__)


class Eva(torch.optim.Optimizer):
    """
    Second-order training with vectors instead of matrices (Zhang, Shi and Li, ICLR 2023, arXiv 2308.02123).

    The weights of the planned layers get a preconditioned update, all other parameters the plain base rule: AdamW with
    the default config (embeddings with one second moment per row and longer steps), SGD with momentum under
    [`EvaConfig.paper`]. Usually made by [`create_eva_optimizer`].

    Args:
        params (iterable of parameters or of parameter groups): all parameters to train, as for `torch.optim.AdamW`.
        lr (`float`, defaults to 1e-3): learning rate, of the size that suits AdamW (or SGD, with base `"sgd"`).
        betas, eps, weight_decay: as in `torch.optim.AdamW`. `betas` and `eps` concern AdamW's parameters only; weight
            decay is decoupled with base `"adamw"` and coupled, after preconditioning, with base `"sgd"`.
        plan ([`Plan`]): the layers to precondition, from [`plan`].
        config ([`EvaConfig`], *optional*): defaults to the recipe, `EvaConfig()`.
        foreach, fused (`bool`, *optional*): implementation of the base rule, as in `torch.optim.AdamW`. Defaults to
            the fused one wherever there is one.
        grad_scaler (`torch.amp.GradScaler`, *optional*): what scales the loss under fp16. Needed by variant `"eva"`
            only, whose statistics of output gradients are taken before they are unscaled.

    A step is taken as a whole or not at all: where a gradient, or a statistic that a step would use, is not finite, or
    its square is not, weights, momentum and statistics of all parameters stay as they are, and a warning names the
    parameter once. Not with variant `"none"`, which is torch's optimizer.

    Raises:
        ValueError: a value is out of range, a planned weight is not among `params`, or one is distributed in a way
            that is not known.
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        plan: Plan,
        config: EvaConfig | None = None,
        foreach: bool | None = None,
        fused: bool | None = None,
        grad_scaler: torch.amp.GradScaler | None = None,
    ) -> None:
        for name, value, valid, expected in (
            ("lr", lr, isinstance(lr, float | int) and lr >= 0, "a number in [0, inf)"),
            ("betas", betas, len(betas) == 2 and all(0 <= beta < 1 for beta in betas), "two numbers in [0, 1)"),
            ("eps", eps, eps >= 0, "in [0, inf)"),
            ("weight_decay", weight_decay, weight_decay >= 0, "in [0, inf)"),
            ("fused", fused, not (fused and foreach), "left out or False where foreach is True"),
        ):
            if not valid:
                raise ValueError(f"{name} must be {expected}, got {value!r}.")
        self.config = config or EvaConfig()
        params = list(params)  # type: ignore[assignment]
        # Without layers SGD is torch's, bit for bit, whose default is another implementation.
        is_open = foreach is None and fused is None
        self._picks_rule = is_open and (self.config.base == "adamw" or self.config.variant != "none")
        if self._picks_rule:
            fused = base.can_fuse(params) or None
        options = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, {**options, "foreach": foreach, "fused": fused})
        self.plan = plan
        self.layers = plan.layers if self.config.variant != "none" else ()
        known = {id(parameter) for group in self.param_groups for parameter in group["params"]}
        for layer in self.layers:
            if id(layer.weight) not in known:
                raise ValueError(
                    f"The plan preconditions {layer.name!r}, whose weight is not among the parameters of the "
                    "optimizer: give all parameters of the planned model, or exclude that layer from the plan."
                )
            if sentence := _refusal_of(layer, layer.weight):
                raise ValueError(sentence)
        self._embeddings = embeddings_of(plan.model, self.config)
        self._tables = tables_of(plan.model, self.config)
        self.grad_scaler = grad_scaler
        self._capture: Capture | None = None
        if self.layers and self.config.needs_inputs:
            self._capture = Capture(plan.model, self.layers, Wanted.by(self.config), self.config.mask_padding)
        self._warned: set[int] = set()
        self._watch = Watch(partial(_name_in, plan))
        self._steps, self._is_rehearsal = 0, False
        self._last: LastStep | None = None
        self._scratch = Scratch()
        self._stacked: tuple[list[tuple[Any, ...]], list[Stack]] = [], []

    def detach(self) -> None:
        """Remove the hooks from the model. Where there were any, all layers get the plain base rule from then on."""
        if self._capture is not None:
            self._capture.detach()
            self._capture, self.layers = None, ()

    def zero_grad(self, set_to_none: bool = True) -> None:
        super().zero_grad(set_to_none)
        if self._capture is not None:
            self._capture.start_window()

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    # Not compiled, also where `torch.compile` is called on it: most of a step is a few large products, and what the
    # compiler makes of the rest takes minutes to build and has other results.
    @torch.no_grad()
    @torch._disable_dynamo  # type: ignore[attr-defined]
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """
        One optimization step from the gradients in `.grad`, which it may overwrite for the planned layers.

        Args:
            closure (callable, *optional*): reevaluates the model and returns the loss.

        Raises:
            RuntimeError: a planned layer has a sparse gradient, got another weight since the optimizer was made, or is
                distributed in a way that is not known here.
        """
        self._steps += 1
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        device = next(parameter.device for group in self.param_groups for parameter in group["params"])
        # A loop may step inside its autocast.
        with torch.autocast(device.type, enabled=False), _products_in_full():
            self._step()
        return loss

    def _step(self) -> None:
        refreshes, receive = is_refreshed(self._steps, self.config), None
        if self._capture is not None and refreshes:
            receive = self._capture.collect(self.grad_scaler)
        elif self._capture is not None:
            self._capture.start_window()
        self._rest()
        self._last = LastStep()
        try:  # while the sums over processes are on their way
            align_(parameter for group in self.param_groups for parameter in group["params"])
            by_rows = self._by_rows
            sizes = sizes_of(self.param_groups, by_rows) if self.config.variant != "none" else {}
        finally:  # what fails leaves no half of a window behind
            statistics = receive() if receive is not None else None
        # A step before any forward pass: by it torch.distributed.checkpoint makes an optimizer create its state. The
        # read of device values happens only where this process has called no layer: another one may have.
        self._is_rehearsal = (
            statistics is not None
            and self._capture is not None
            and not self._capture.called
            and not any(bool(values.tokens > 0) for values in statistics)
        )
        step = Step(
            config=self.config,
            state=self.state,
            groups=self.param_groups,
            stacks=self._stacks(statistics),
            statistics=statistics,
            refreshes=refreshes,
            by_rows=by_rows,
            tables={id(getattr(module, name)) for module, name in self._tables},
            sizes=sizes,
            number=self._steps,
            scratch=self._scratch,
            last=self._last,
        )
        step.look(self._watch)
        if step.sound is not None and can_read(step.sound):
            if not step.sound.tolist():
                return
            step.sound = None
        if self.config.base == "sgd":
            sgd_step(step)
        else:
            adamw_step(step)

    def diagnostics(self, layers: bool = True) -> dict[str, float]:
        """
        What the last step did, measured now and read in one copy from the device: a step that nobody asks about does
        no more work. Empty before the first step and with variant `"none"`. What is not known or not finite is left
        out of:

        - `eva_strength/<layer>`: 1 − cos of the angle between a layer's update and the momentum that it was made from
          (between direction and gradient with base `"sgd"`), in [0, 2]; 0 is first-order.
        - `eva_strength`: its mean over the layers.
        - `eva_update_size`: root mean square of the entries of all these updates, before the learning rate.
        - `eva_kl_factor` or `eva_rescale_factor`: the factor of `kl_mode` `"clip"` or `"rescale"`.
        - `eva_curvature_inputs`, `eva_curvature_outputs`: the largest eigenvalue of a layer's factor (of a vector its
          squared norm), median over the layers.
        - `eva_fallback_layers`: how many planned layers got no preconditioned update: they were not called, or their
          gradient was missing, zero or not finite.

        Args:
            layers (`bool`, defaults to `True`): whether to give the strength of each layer, too.
        """
        if self.config.variant == "none" or self._last is None:
            return {}
        return self._last.measure(self.state, self.config, len(self.plan.layers), layers)

    def _rest(self) -> None:
        """Let the hooks rest until the next step, if that refreshes nothing."""
        if self._capture is not None:
            self._capture.rests = not is_refreshed(self._steps + 1, self.config)

    def _stacks(self, statistics: Sequence[Statistics] | None) -> list[Stack]:
        """The layers that this step preconditions, in stacks."""
        groups = {id(parameter): group for group in self.param_groups for parameter in group["params"]}
        ready = []
        for index, layer in enumerate(self.layers):
            if id(layer.weight) not in groups:
                raise RuntimeError(
                    f"Layer {layer.name!r} has got another weight since the optimizer was made, which nothing trains: "
                    "make the optimizer after the model has its weights (`to_empty` and assignments replace them)."
                )
            gradient = layer.weight.grad
            if gradient is None:
                continue
            if gradient.is_sparse:
                raise RuntimeError(
                    f"Layer {layer.name!r} has a sparse gradient, which Eva cannot precondition: exclude the layer "
                    "from the plan, or train with dense gradients."
                )
            if sentence := _refusal_of(layer, gradient):
                raise RuntimeError(sentence)
            if self._capture is None or self._was_called(index, layer, statistics):
                has_bias = self.config.includes_bias and layer.bias is not None and layer.bias.grad is not None
                ready.append((index, layer, groups[id(layer.weight)], has_bias))
        # Stacks are kept as long as nothing that they were made from changes.
        key = [
            (index, id(layer.weight), layer.weight.dtype, layer.weight.device, id(group), has_bias)
            for index, layer, group, has_bias in ready
        ]
        if key != self._stacked[0]:
            self._stacked = key, stacks_of(ready, sys.maxsize if self.config.needs_products_only else None)
            self._follow()
        return self._stacked[1]

    def _follow(self) -> None:
        """Bring the state, and the choice of the base rule's implementation, to where the parameters are now."""
        if self._picks_rule:
            fused = base.can_fuse(self.param_groups) or None
            for group in self.param_groups:
                group["fused"] = fused
        if not self.layers:
            return
        momenta = {id(layer.weight): "momentum_buffer" for layer in self.layers}
        follow_(self.state, self.param_groups, momenta | dict.fromkeys(self._by_rows, "exp_avg"), self.config)

    @property
    def _by_rows(self) -> set[int]:
        """The ids of the weights of `nn.Embedding`."""
        return {id(module.weight) for module in self._embeddings}

    def _was_called(self, index: int, layer: Layer, statistics: Sequence[Statistics] | None) -> bool:
        """Whether there are statistics for a layer: some models use a weight without calling its module."""
        assert self._capture is not None
        if statistics is None:  # those of the last refresh
            return "eva_updates" in self.state.get(layer.weight, {})
        if index in self._capture.called or self._is_rehearsal:
            return True
        # The read of a device value happens only where this process never called the layer: another one may have.
        updates = self.state[layer.weight].get("eva_updates", 0)
        if bool((statistics[index].tokens > 0) | (updates > 0)):
            return True
        if index not in self._warned:
            self._warned.add(index)
            logger.warning(
                "The model uses the weight of layer %r without calling the layer, so that there are no statistics of "
                "its inputs: it gets the plain base rule. Exclude it, or use variant 'eva_s'.",
                layer.name,
            )
        return False

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """
        As in `torch.optim.Optimizer`, but statistics keep their precision in a low-precision model, and momentum has
        that of the config.

        Raises:
            ValueError: the state was saved with other layers or another config; the message lists the differences. Or
                it holds numbers that are not finite.
        """
        indices = [index for group in state_dict["param_groups"] for index in group["params"]]
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        saved = {id(p): state_dict["state"].get(i, {}) for p, i in zip(parameters, indices, strict=False)}
        refuse_other(self.layers, self.config, saved)
        refuse_unsound({p: saved[id(p)] for p in parameters if id(p) in saved}, partial(_name_in, self.plan))
        super().load_state_dict(state_dict)
        by_rows = self._by_rows
        precise = by_rows | {id(layer.weight) for layer in self.layers}
        for parameter in parameters:
            if id(parameter) in precise:
                for key, value in saved[id(parameter)].items():
                    # torch casts floating state to the parameter's dtype, which would lose bits under bf16, and the
                    # count of steps as AdamW wants it.
                    if key != "step" or id(parameter) in by_rows:
                        self.state[parameter][key] = value.to(device=parameter.device, copy=True)
        self._follow()
        # One by one: counts of layers on different devices cannot be compared there.
        self._steps = max((int(entry.get("eva_updates", 0)) for entry in self.state.values()), default=0)
        self._rest()
        if self._capture is not None:
            self._capture.start_window()

    def __getstate__(self) -> dict[str, Any]:
        raise TypeError(
            "Eva cannot be copied or pickled, because it belongs to the layers of one model: keep its state_dict() "
            "and load it into a new optimizer, made by create_eva_optimizer."
        )

    def __repr__(self) -> str:
        return f"{super().__repr__()[:-1]}\nlayers: {len(self.layers)}\nconfig: {self.config}\n)"


@contextmanager
def _products_in_full() -> Iterator[None]:
    """
    Products of float32 as they are, where a training lets those of its model be rounded, to TF32 or to bfloat16: bases
    are found from inner products of vectors that are nearly dependent. With 16 columns, none would be faster for it.
    """
    if not hasattr(torch.backends, "fp32_precision"):  # before torch 2.9
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("highest")
        try:
            yield
        finally:
            torch.set_float32_matmul_precision(before)
        return
    kinds = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)  # type: ignore[attr-defined]
    allowed = [(kind, kind.fp32_precision) for kind in kinds]
    rounding = [(kind, precision) for kind, precision in allowed if precision not in ("none", "ieee")]
    try:
        for kind, _ in rounding:
            kind.fp32_precision = "ieee"
        yield
    finally:
        for kind, precision in rounding:
            kind.fp32_precision = precision


def _refusal_of(layer: Layer, gradient: Tensor) -> str:
    """Why a layer cannot be stepped as it is distributed, or an empty string."""
    if not (reason := refusal(layer.weight, gradient)):
        return ""
    return (
        f"Layer {layer.name!r} is distributed in a way that Eva does not know ({reason}): shard its weight by rows or "
        "columns, as `fully_shard` and most tensor-parallel plans do, or exclude the layer from the plan."
    )


def _name_in(plan: Plan, parameter: Tensor) -> str:
    """What a reader calls a parameter: the layer whose weight it is, otherwise its own name."""
    names = {id(own): name for name, own in plan.model.named_parameters()}
    names |= {id(layer.weight): layer.name for layer in plan.layers}
    return names.get(id(parameter), "a parameter outside the model")
