"""`Eva`, a `torch.optim.Optimizer` for all parameters of a model: the order of a step, and its state."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from typing import Any, overload

import torch
from torch import Tensor, nn

from . import base, formula
from .capture import Capture, Statistics
from .config import EvaConfig
from .layers import Layer, working_dtype
from .selection import Plan, statistics_shapes

logger = logging.getLogger(__name__)

# Steps in which a layer's first gradient is looked for, because a look costs time: LoRA's A gets its first one at the
# second step, beside a B of zeros. Where it comes later, subspaces are found by the running averages alone.
SEARCH_STEPS = 3


class Eva(torch.optim.Optimizer):
    """
    Second-order training with vectors instead of matrices (Zhang, Shi and Li, ICLR 2023, arXiv 2308.02123).

    The weights of the planned layers get a preconditioned update, all other parameters the plain base rule: AdamW with
    the default config, SGD with momentum under [`EvaConfig.paper`]. Usually made by [`create_eva_optimizer`].

    Args:
        params (iterable of parameters or of parameter groups): all parameters to train, as for `torch.optim.AdamW`.
        lr (`float`, defaults to 1e-3): learning rate, of the size that suits AdamW (or SGD, with base `"sgd"`).
        betas, eps, weight_decay: as in `torch.optim.AdamW`. `betas` and `eps` concern AdamW's parameters only; weight
            decay is decoupled with base `"adamw"` and coupled, after preconditioning, with base `"sgd"`.
        plan ([`Plan`]): the layers to precondition, from [`plan`].
        config ([`EvaConfig`], *optional*): defaults to the recipe, `EvaConfig()`.
        foreach, fused (`bool`, *optional*): implementation of the base rule, as in `torch.optim.AdamW`.

    Raises:
        ValueError: a value is out of range, or a planned weight is not among `params`.
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
        self._capture: Capture | None = None
        if self.layers and self.config.needs_inputs:
            self._capture = Capture(plan.model, self.layers, self.config.needs_output_gradients)
        self._warned: set[int] = set()
        self._steps = 0

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

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """
        One optimization step from the gradients in `.grad`, which it overwrites for the planned layers.

        Args:
            closure (callable, *optional*): reevaluates the model and returns the loss.

        Raises:
            RuntimeError: a planned layer has a sparse gradient, or one that is sharded over processes.
        """
        self._steps += 1
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        layers, updates, weights = self._observe()
        if self.config.base == "sgd":
            self._sgd_step(layers, updates)
        else:
            self._adamw_step(layers, updates, weights)
        return loss

    def _adamw_step(self, layers: Sequence[Layer], updates: Sequence[Tensor], weights: Sequence[Tensor]) -> None:
        """Momentum, preconditioned and scaled to AdamW's size, for the layers; AdamW for everything else."""
        if layers:
            momenta = [self._momentum(layer) for layer in layers]
            base.momentum_(updates, momenta, self.config.momentum, self.config.nesterov)
            self._precondition(layers, updates, [None] * len(layers))
            scales = self._row_scales(layers, updates, momenta, weights)
            groups = self._groups()
            for layer, update, scale in zip(layers, updates, scales, strict=True):
                rows, group = layer.kind.rows(scale, update.ndim), groups[id(layer.weight)]
                base.decoupled_(layer.weight, update, rows, group["lr"], group["weight_decay"])
        planned = {id(layer.weight) for layer in layers}
        for group in self.param_groups:
            others = [p for p in group["params"] if p.grad is not None and id(p) not in planned]
            if others:
                base.adamw_(others, self.state, group)

    def _row_scales(
        self, layers: Sequence[Layer], updates: Sequence[Tensor], momenta: Sequence[Tensor], weights: Sequence[Tensor]
    ) -> list[Tensor]:
        """What the rows of each update are multiplied with, see [`formula.row_scales`]."""
        states = [self.state[layer.weight] for layer in layers]
        updates = [layer.kind.matrix(update) for layer, update in zip(layers, updates, strict=True)]
        momenta = [layer.kind.matrix(buffer) for layer, buffer in zip(layers, momenta, strict=True)]
        squares, products = formula.row_sums(updates, momenta)
        shares = [state["eva_rows"] for state in states]
        formula.update_averages_(shares, formula.row_shares(squares), weights)
        return formula.row_scales(
            squares,
            products,
            shares,
            momenta,
            [state["eva_square"] for state in states],
            [self._correction(state, nesterov=False) for state in states],
        )

    def _correction(self, state: dict[str, Tensor], nesterov: bool) -> Tensor:
        """What a momentum that started from zero is divided by, as in Adam; Nesterov's is one step ahead."""
        return 1 - self.config.momentum ** (state["eva_updates"] + nesterov)

    def _sgd_step(self, layers: Sequence[Layer], updates: Sequence[Tensor]) -> None:
        """Preconditioned gradients for the layers, one control of their size, then SGD for all parameters."""
        config = self.config
        weights = [layer.weight for layer in layers]
        biases = [_with_gradient(layer.bias) if config.includes_bias else None for layer in layers]
        bias_updates = [None if bias is None else _working_gradient(bias) for bias in biases]
        all_updates = [*updates, *(update for update in bias_updates if update is not None)]

        norms = torch._foreach_norm(all_updates) if layers and config.kl_mode == "rescale" else []
        inner = self._precondition(layers, updates, bias_updates)
        if layers and config.kl_mode == "clip":
            groups = self._groups()
            lrs = [groups[id(weight)]["lr"] for weight in weights]
            torch._foreach_mul_(all_updates, formula.kl_factor(inner, lrs, config.kl_clip))
        elif layers and config.kl_mode == "rescale":
            torch._foreach_mul_(all_updates, formula.rescale_factor(norms, torch._foreach_norm(all_updates)))
        for parameter, update in zip([*weights, *(b for b in biases if b is not None)], all_updates, strict=True):
            if parameter.grad is not None and parameter.grad is not update:  # computed on a copy in higher precision
                parameter.grad.copy_(update)
        for group in self.param_groups:
            present = [parameter for parameter in group["params"] if parameter.grad is not None]
            if present:
                base.sgd_(present, self.state, group, config.momentum, config.nesterov)

    def _groups(self) -> dict[int, dict[str, Any]]:
        """The group of each parameter, by the parameter's id."""
        return {id(parameter): group for group in self.param_groups for parameter in group["params"]}

    def _observe(self) -> tuple[list[Layer], list[Tensor], list[Tensor]]:
        """
        Bring the running averages up to date; returns the layers that this step preconditions, their gradients, and
        the weights of this step in their averages.
        """
        statistics = self._capture.collect() if self._capture is not None else [None] * len(self.layers)
        layers, gradients, weights = [], [], []
        for index, (layer, values) in enumerate(zip(self.layers, statistics, strict=True)):
            grad = layer.weight.grad
            if grad is None:
                continue
            if grad.is_sparse or hasattr(grad, "device_mesh"):
                kind = "sparse" if grad.is_sparse else "sharded"
                raise RuntimeError(
                    f"Layer {layer.name!r} has a {kind} gradient, which Eva cannot precondition: exclude the layer "
                    "from the plan, or train with dense gradients on every process, as under DDP."
                )
            gradient = _working_gradient(layer.weight)
            square = torch.linalg.vector_norm(gradient).square()
            valid = (square > 0) & square.isfinite()
            if values is None:
                weight = self._observe_gradient(layer, gradient, valid)
            else:
                weight = self._observe_tokens(layer, values, valid)
                if not self._was_called(index, layer):
                    continue
            state = self.state[layer.weight]
            if "eva_square" in state:
                formula.update_averages_([state["eva_square"]], [square], [weight])
            layers.append(layer)
            gradients.append(gradient)
            weights.append(weight)
        return layers, gradients, weights

    def _observe_tokens(self, layer: Layer, values: Statistics, valid: Tensor) -> Tensor:
        """Variants `"eva"` and `"eva_f"`: average the mean vectors and the traces."""
        state = self._statistics(layer)
        valid = valid & (values.tokens > 0) & values.a_square.isfinite() & values.g_square.isfinite()
        weight = self._average_weight(state, valid)
        new = {"eva_a": values.a, "eva_a_square": values.a_square}
        if self.config.needs_output_gradients:
            g_scale = values.tokens.clamp_min(1).reciprocal() if self.config.g_scale == "mean" else 1.0
            new |= {"eva_g": values.g * g_scale, "eva_g_square": values.g_square * g_scale**2}
        formula.update_averages_([state[key] for key in new], list(new.values()), [weight] * len(new))
        return weight

    def _observe_gradient(self, layer: Layer, gradient: Tensor, valid: Tensor) -> Tensor:
        """Variant `"eva_s"`: average the means over axes, or track the subspaces of `Gᵀ G` and `G Gᵀ`."""
        state = self._statistics(layer)
        is_first = valid & (state["eva_updates"] == 0)
        weight = self._average_weight(state, valid)
        if self.config.curvature == "joint":
            means = formula.axis_means(gradient)
            averages = [state[f"eva_v{i}"] for i in range(len(means))]
            formula.update_averages_(averages, means, [weight] * len(means))
            return weight
        matrix, bases = layer.kind.matrix(gradient), [state["eva_g"], state["eva_a"]]
        if self._steps <= SEARCH_STEPS:
            formula.find_bases_(matrix, bases, is_first)
        formula.update_bases_(bases, formula.gram_images(matrix, *bases), [weight, weight])
        return weight

    def _precondition(
        self, layers: Sequence[Layer], grads: Sequence[Tensor], biases: Sequence[Tensor | None]
    ) -> list[Tensor]:
        """Turn gradients into directions, in place; returns `⟨P, G⟩` per layer where a KL clip needs it."""
        config = self.config
        relative = config.damping_mode == "relative"
        states = [self.state[layer.weight] for layer in layers]
        matrices = [layer.kind.matrix(grad) for layer, grad in zip(layers, grads, strict=True)]
        if config.curvature == "factored":
            outputs = [self._factor(layer, "eva_g") for layer in layers]
            inputs = [self._factor(layer, "eva_a") for layer in layers]
            before = [matrix.clone() for matrix in matrices] if config.kl_mode == "clip" else []
            is_momentum = config.base == "adamw" and config.variant == "eva_s"
            corrections = [self._correction(state, config.nesterov) for state in states] if is_momentum else None
            formula.factored_(matrices, outputs, inputs, config.exponent, corrections)
            return [torch.sum(p * g) for p, g in zip(matrices, before, strict=False)]
        if config.variant == "eva":
            a, g = [state["eva_a"] for state in states], [state["eva_g"] for state in states]
            return formula.eva_(matrices, biases, a, g, config.damping, relative)
        if config.variant == "eva_f":
            return formula.eva_f_(matrices, biases, [state["eva_a"] for state in states], config.damping, relative)
        vectors = [[state[f"eva_v{i}"] for i in range(g.ndim)] for state, g in zip(states, grads, strict=True)]
        return formula.eva_s_(grads, vectors, config.damping, relative)

    def _factor(self, layer: Layer, side: str) -> tuple[Tensor, Tensor, Tensor] | None:
        """One side's factor, see [`formula.factor_levels`], or `None` where the variant has no such side."""
        state = self.state[layer.weight]
        if side not in state:
            return None
        if self.config.variant == "eva_s":
            basis, trace = state[side], state["eva_square"]
        else:  # the mean vector m as the one eigenvector, with eigenvalue ‖m‖²
            basis = (state[side] * torch.linalg.vector_norm(state[side])).unsqueeze(1)
            trace = state[f"{side}_square"]
        config = self.config
        return formula.factor_levels(basis, trace, config.damping, config.damping_mode == "relative")

    def _average_weight(self, state: dict[str, Tensor], valid: Tensor) -> Tensor:
        """Weight of a layer's n-th valid value: `decay`, but at least `1/n`; 0 for an invalid one."""
        updates = state["eva_updates"]
        weight = (updates + 1).reciprocal().clamp_min(self.config.decay) * valid
        updates.add_(valid)
        return weight

    def _statistics(self, layer: Layer) -> dict[str, Tensor]:
        """A layer's state with all its statistics: zeros, and random bases, before the first gradient."""
        state = self.state[layer.weight]
        for key, shape in statistics_shapes(layer, self.config).items():
            if key not in state:
                like = self._zeros(layer, shape)
                state[key] = formula.initial_basis(*shape, like) if len(shape) == 2 else like
        return state

    def _momentum(self, layer: Layer) -> Tensor:
        state = self.state[layer.weight]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = self._zeros(layer, layer.weight.shape)
        return state["momentum_buffer"]

    def _zeros(self, layer: Layer, shape: Sequence[int]) -> Tensor:
        return torch.zeros(shape, dtype=working_dtype(layer.weight), device=layer.weight.device)

    def _was_called(self, index: int, layer: Layer) -> bool:
        """Whether there are statistics for a layer: some models use a weight without calling its module."""
        assert self._capture is not None
        # The read of a device value happens only where this process never called the layer: another one may have.
        if index in self._capture.called or bool(self.state[layer.weight]["eva_updates"] > 0):
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
        As in `torch.optim.Optimizer`, but statistics and momentum keep their precision in a low-precision model.

        Raises:
            ValueError: the state was saved with other layers or another config; the message lists the differences.
        """
        indices = [index for group in state_dict["param_groups"] for index in group["params"]]
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        saved = {id(p): state_dict["state"].get(i, {}) for p, i in zip(parameters, indices, strict=False)}
        differences = [text for layer in self.layers if (text := self._difference(layer, saved.get(id(layer.weight))))]
        if differences:
            more = f", and {len(differences) - 3} more" if len(differences) > 3 else ""
            raise ValueError(
                f"The saved state does not fit the planned layers and their config: {'; '.join(differences[:3])}"
                f"{more}. Resume with the settings of the saved run, or start without its optimizer state."
            )
        super().load_state_dict(state_dict)
        for layer in self.layers:
            for key, value in saved[id(layer.weight)].items():
                # torch casts floating state to the parameter's dtype, which would lose bits under bf16. It leaves the
                # count of steps alone, which AdamW wants on the CPU.
                if key != "step":
                    self.state[layer.weight][key] = value.to(device=layer.weight.device, copy=True)
        if self._capture is not None:
            self._capture.start_window()

    def _difference(self, layer: Layer, saved: dict[str, Tensor] | None) -> str:
        """How the saved state of a layer differs from what this optimizer keeps; nothing saved yet fits as well."""
        found = {key: tuple(value.shape) for key, value in (saved or {}).items() if key.startswith("eva_")}
        expected = statistics_shapes(layer, self.config)
        if not saved or found == expected:
            return ""
        return f"{layer.name} has {_listed(found) or 'no statistics'} where {_listed(expected)} is expected"

    def __getstate__(self) -> dict[str, Any]:
        raise TypeError(
            "Eva cannot be copied or pickled, because it belongs to the layers of one model: keep its state_dict() "
            "and load it into a new optimizer, made by create_eva_optimizer."
        )

    def __repr__(self) -> str:
        return f"{super().__repr__()[:-1]}\nlayers: {len(self.layers)}\nconfig: {self.config}\n)"


def _working_gradient(parameter: Tensor) -> Tensor:
    """The gradient itself in float32 or float64, a float32 copy of it in a lower precision; contiguous."""
    grad = parameter.grad
    assert grad is not None
    if not grad.is_contiguous():  # a convolution in channels-last memory; its matrix must be a view
        grad = parameter.grad = grad.contiguous()
    return grad.to(working_dtype(grad))


def _with_gradient(parameter: nn.Parameter | None) -> nn.Parameter | None:
    return parameter if parameter is not None and parameter.grad is not None else None


def _listed(shapes: dict[str, tuple[int, ...]]) -> str:
    return ", ".join(f"{key}{list(shape)}" for key, shape in sorted(shapes.items()) if shape)
