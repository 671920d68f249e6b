"""`Eva`, a `torch.optim.Optimizer` for all parameters of a model: the order of a step, and its state."""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, overload

import torch
from torch import Tensor

from . import base, formula
from .capture import Capture, Statistics
from .config import EvaConfig
from .layers import Layer, working_dtype
from .selection import Plan, embeddings_of, statistics_shapes
from .soundness import Watch, can_read, replace_unless_, squared_norms_of
from .stacks import Scratch, Stack, stacks_of
from .state import follow_, refuse_unsound

logger = logging.getLogger(__name__)

# Steps in which a layer's first gradient is looked for, because a look costs time: LoRA's A gets its first one at the
# second step, beside a B of zeros. Where it comes later, subspaces are found by the running averages alone.
SEARCH_STEPS = 3

# Times the learning rate, for embeddings: beside layers whose steps reach further where curvature turns them, those of
# AdamW are short.
EMBEDDING_FACTOR = 2.0

_LEAST_MOMENTUM = 1e-300  # whose logarithm is finite


@dataclasses.dataclass
class _Seen:
    """
    What a step knows of the n layers of a stack after it has seen their gradients.

    `weights` and `updates` are this step's weight in running averages and the number of steps that count in them, of
    shape `(n,)`; `squares` is the average `‖G‖²`, where one is kept. `vectors` (curvature `"joint"`) and `factors`
    (`"factored"`, see [`formula.factor_levels`]) are the curvature.
    """

    weights: Tensor
    updates: Tensor
    squares: Tensor
    vectors: list[Tensor] = dataclasses.field(default_factory=list)
    factors: dict[str, tuple[Tensor, Tensor, Tensor]] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass
class _Look:
    """
    What a first look at all gradients tells: `squares` are `‖G‖²` by the id of the parameter, 0-dim, or for embeddings
    the mean squares of rows, `(rows, 1)`. `sound` says on the device whether there is a step; `None` where there is.
    """

    squares: dict[int, Tensor] = dataclasses.field(default_factory=dict)
    sound: Tensor | None = None


class Eva(torch.optim.Optimizer):
    """
    Second-order training with vectors instead of matrices (Zhang, Shi and Li, ICLR 2023, arXiv 2308.02123).

    The weights of the planned layers get a preconditioned update, all other parameters the plain base rule: AdamW with
    the default config (embeddings with one second moment per row and twice the learning rate), SGD with momentum under
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
        if foreach is None and fused is None and (self.config.base == "adamw" or self.config.variant != "none"):
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
        self._embeddings = embeddings_of(plan.model, self.config)
        self.grad_scaler = grad_scaler
        self._capture: Capture | None = None
        if self.layers and self.config.needs_inputs:
            self._capture = Capture(
                plan.model, self.layers, self.config.needs_output_gradients, self.config.mask_padding
            )
        self._warned: set[int] = set()
        self._watch = Watch(partial(_name_in, plan))
        self._steps = 0
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

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """
        One optimization step from the gradients in `.grad`, which it may overwrite for the planned layers.

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
        device = next(parameter.device for group in self.param_groups for parameter in group["params"])
        with torch.autocast(device.type, enabled=False):  # of a loop that steps inside its context
            self._step()
        return loss

    def _step(self) -> None:
        statistics = self._capture.collect(self.grad_scaler) if self._capture is not None else None
        stacks = self._stacks(statistics)
        look = self._look(stacks, statistics)
        if look.sound is not None and can_read(look.sound):
            if not look.sound.numpy():
                return
            look.sound = None
        if self.config.base == "sgd":
            self._sgd_step(stacks, statistics, look)
        else:
            self._adamw_step(stacks, statistics, look)

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
            if gradient.is_sparse or hasattr(gradient, "device_mesh"):
                kind = "sparse" if gradient.is_sparse else "sharded"
                raise RuntimeError(
                    f"Layer {layer.name!r} has a {kind} gradient, which Eva cannot precondition: exclude the layer "
                    "from the plan, or train with dense gradients on every process, as under DDP."
                )
            if statistics is None or self._was_called(index, layer, statistics[index]):
                has_bias = self.config.includes_bias and layer.bias is not None and layer.bias.grad is not None
                ready.append((index, layer, groups[id(layer.weight)], has_bias))
        # Stacks are kept as long as nothing that they were made from changes.
        key = [
            (index, id(layer.weight), layer.weight.dtype, layer.weight.device, id(group), has_bias)
            for index, layer, group, has_bias in ready
        ]
        if key != self._stacked[0]:
            self._stacked = key, stacks_of(ready)
            own = {id(layer.weight) for layer in self.layers} | self._embeddings
            follow_(self.state, self.param_groups, own, self.config.base == "sgd")
        return self._stacked[1]

    def _look(self, stacks: Sequence[Stack], statistics: Sequence[Statistics] | None) -> _Look:
        """Judge all gradients and statistics; not without preconditioning, where nothing is to differ from torch."""
        present = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        if self.config.variant == "none" or not present:
            return _Look()
        others = [parameter for parameter in present if id(parameter) not in self._embeddings]
        rows = {id(p): base.mean_squares(p.grad) for p in present if id(p) in self._embeddings}
        found = zip(others, squared_norms_of([parameter.grad for parameter in others]), strict=True)
        squares = {id(parameter): square for parameter, square in found}
        numbers = [(p, rows[id(p)].sum() if id(p) in rows else squares[id(p)]) for p in present]
        if statistics is not None:
            used = [pair for stack in stacks for pair in zip(stack.weights, stack.indices, strict=True)]
            numbers += [(weight, statistics[index].a_square) for weight, index in used]
            numbers += [(weight, statistics[index].g_square) for weight, index in used]
        return _Look(squares | rows, self._watch.judge(numbers))

    def _adamw_step(self, stacks: Sequence[Stack], statistics: Sequence[Statistics] | None, look: _Look) -> None:
        """Momentum, preconditioned and scaled to AdamW's size, for the layers; AdamW for everything else."""
        config = self.config
        for stack in stacks:
            gradients = stack.gradients(self._scratch)
            sound = None if look.sound is None else look.sound.to(gradients.device)
            seen = self._observe(stack, gradients, statistics, look)
            buffers = [self._momentum(layer) for layer in stack.layers]
            base.momentum_(gradients.unbind(), buffers, config.momentum, config.nesterov, sound)
            scales = replace_unless_(sound, self._precondition_and_scale_(stack, gradients, seen), 0.0)
            lr, weight_decay = stack.group["lr"], stack.group["weight_decay"]
            for layer, update, scale in zip(stack.layers, gradients.unbind(), scales.unbind(), strict=True):
                base.decoupled_(layer.weight, update, layer.kind.rows(scale, update.ndim), lr, weight_decay, sound)
        planned = {id(layer.weight) for stack in stacks for layer in stack.layers}
        for group in self.param_groups:
            others = [p for p in group["params"] if p.grad is not None and id(p) not in planned]
            embeddings = [parameter for parameter in others if id(parameter) in self._embeddings]
            squares = [look.squares[id(parameter)] for parameter in embeddings]
            base.row_adamw_(embeddings, squares, self.state, group, EMBEDDING_FACTOR, look.sound)
            if len(embeddings) < len(others):
                base.adamw_([p for p in others if id(p) not in self._embeddings], self.state, group, look.sound)

    def _precondition_and_scale_(self, stack: Stack, momenta: Tensor, seen: _Seen) -> Tensor:
        """Turn momenta into updates, in place; returns what their rows are multiplied with, of shape `(n, d_out)`."""
        matrices = stack.kind.matrices(momenta)
        # What a momentum that started from zero is divided by, as in Adam; Nesterov's is one step ahead.
        steps = seen.updates + self.config.nesterov
        starts = -torch.expm1(steps * math.log(max(self.config.momentum, _LEAST_MOMENTUM)))
        correction = self._correction(stack, matrices, None, seen, starts)
        row_squares = formula.squared_row_norms(matrices)
        squares, products = correction.squares(row_squares), correction.products(row_squares)
        correction.apply_(matrices)
        shares = self._average(stack, "eva_rows", formula.row_shares(squares), seen.weights)
        norms, numel = row_squares.sum(1).sqrt(), matrices[0].numel()
        weight_norms = torch.stack(torch._foreach_norm([layer.weight for layer in stack.layers])).to(norms.dtype)
        largest = formula.largest_sizes(weight_norms, numel, stack.group["lr"])
        return formula.row_scales(squares, products, shares, norms, numel, seen.squares, starts, largest)

    def _sgd_step(self, stacks: Sequence[Stack], statistics: Sequence[Statistics] | None, look: _Look) -> None:
        """Preconditioned gradients for the layers, one control of their size, then SGD for all parameters."""
        config = self.config
        updates: list[Tensor] = []
        inner: list[Tensor] = []
        before: list[Tensor] = []
        for stack in stacks:
            gradients, biases = stack.gradients(self._scratch), stack.bias_gradients()
            seen = self._observe(stack, gradients, statistics, look)
            if config.kl_mode == "rescale":
                before += torch._foreach_norm([gradients, *([] if biases is None else [biases])])
            inner.append(self._precondition_(stack, gradients, biases, seen))
            updates += stack.write_gradients(gradients, biases)
        factor = self._size_factor(stacks, inner, before, updates)
        if updates and factor is not None:
            torch._foreach_mul_(updates, factor)
        for group in self.param_groups:
            present = [parameter for parameter in group["params"] if parameter.grad is not None]
            if present:
                base.sgd_(present, self.state, group, config.momentum, config.nesterov, look.sound)

    def _size_factor(
        self, stacks: Sequence[Stack], inner: Sequence[Tensor], before: Sequence[Tensor], updates: Sequence[Tensor]
    ) -> Tensor | float | None:
        """What all directions together are multiplied with, see [`formula.eva_`] for the share of the damping."""
        config = self.config
        if config.kl_mode == "rescale" and updates:
            return formula.rescale_factor(before, torch._foreach_norm(list(updates)))
        is_divided = config.curvature == "joint" and config.needs_inputs and config.damping_mode == "absolute"
        scale = 1 / config.damping if is_divided else 1.0
        if config.kl_mode == "clip" and updates:
            return scale * formula.kl_factor(
                [values * scale for values in inner], [stack.group["lr"] for stack in stacks], config.kl_clip
            )
        return scale if is_divided else None

    def _observe(self, stack: Stack, gradients: Tensor, statistics: Sequence[Statistics] | None, look: _Look) -> _Seen:
        """Bring the running averages up to date."""
        for layer in stack.layers:
            self._create_state(layer)
        squares = torch.stack([look.squares[id(weight)] for weight in stack.weights])
        valid = squares > 0 if look.sound is None else (squares > 0) & look.sound.to(squares.device)
        if statistics is None:
            return self._observe_gradients(stack, gradients, squares, valid)
        return self._observe_tokens(stack, [statistics[index] for index in stack.indices], squares, valid)

    def _observe_tokens(self, stack: Stack, statistics: Sequence[Statistics], squares: Tensor, valid: Tensor) -> _Seen:
        """Variants `"eva"` and `"eva_f"`: average the mean vectors and the traces."""
        tokens, a, a_squares, g, g_squares = (
            torch.stack([getattr(values, f.name) for values in statistics]) for f in dataclasses.fields(Statistics)
        )
        seen = self._count(stack, squares, valid & (tokens > 0))
        new = {"eva_a": a, "eva_a_square": a_squares}
        if self.config.needs_output_gradients:
            scales = tokens.clamp_min(1).reciprocal() if self.config.g_scale == "mean" else torch.ones_like(tokens)
            new |= {"eva_g": g * scales.unsqueeze(1), "eva_g_square": g_squares * scales.square()}
        averages = {key: self._average(stack, key, values, seen.weights) for key, values in new.items()}
        if self.config.curvature == "factored":
            for key in ("eva_g", "eva_a"):
                if key in averages:  # the mean vector m as the one eigenvector, with eigenvalue ‖m‖²
                    traces = averages[f"{key}_square"]
                    values = torch.linalg.vector_norm(averages[key], dim=1) * formula.inverse(traces)
                    seen.factors[key] = self._factors((averages[key] * values.unsqueeze(1)).unsqueeze(2), traces)
        seen.vectors = [averages[key] for key in ("eva_a", "eva_g") if key in averages]
        return seen

    def _observe_gradients(self, stack: Stack, gradients: Tensor, squares: Tensor, valid: Tensor) -> _Seen:
        """
        Variant `"eva_s"`: average the means over axes, or track the subspaces of `Gᵀ G` and `G Gᵀ`, in units of the
        average `‖G‖²`.
        """
        seen = self._count(stack, squares, valid)
        if self.config.curvature == "joint":
            means = enumerate(formula.axis_means(gradients))
            seen.vectors = [self._average(stack, f"eva_v{axis}", mean, seen.weights) for axis, mean in means]
            return seen
        matrices = stack.kind.matrices(gradients)
        output, input = stack.read(self.state, "eva_g"), stack.read(self.state, "eva_a")
        if self._steps <= SEARCH_STEPS:
            output, input = formula.find_bases(matrices, output, input, valid & (seen.updates == 1), squares)
        lengths = formula.inverse(squares)
        units = (formula.orthogonal_columns(basis, lengths) for basis in (output, input))
        images = formula.gram_images(matrices, *units)
        # The average that `‖G‖²` gets, in its new units.
        weights = (seen.weights * squares * formula.inverse(seen.squares)).where(valid, 0.0)
        output, input = formula.subspace_step(output, input, images, weights)
        for key, bases in (("eva_g", output), ("eva_a", input)):
            stack.write(self.state, key, bases)
            seen.factors[key] = self._factors(bases, seen.squares)
        return seen

    def _factors(self, bases: Tensor, traces: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return formula.factor_levels(bases, traces, self.config.damping, self.config.damping_mode == "relative")

    def _precondition_(self, stack: Stack, gradients: Tensor, biases: Tensor | None, seen: _Seen) -> Tensor:
        """Turn gradients into directions, in place; returns `⟨P, G⟩` per layer."""
        matrices = stack.kind.matrices(gradients)
        squares = formula.squared_norms(gradients)
        correction = self._correction(stack, matrices, biases, seen, None)
        bias_squares = 0.0 if biases is None else formula.squared_norms(biases)
        inner = squares + bias_squares + (correction.columns * correction.images).sum((1, 2))
        correction.apply_(matrices, biases)
        if self.config.variant == "eva_s" and self.config.curvature == "joint":
            inner = inner * formula.restore_norms_(gradients, squares)
        return inner

    def _correction(
        self, stack: Stack, matrices: Tensor, biases: Tensor | None, seen: _Seen, starts: Tensor | None
    ) -> formula.Correction:
        """What preconditions gradients, or momenta with their `starts`, as variant and curvature have it."""
        config = self.config
        relative = config.damping_mode == "relative"
        if config.curvature == "factored":
            output, input = seen.factors.get("eva_g"), seen.factors.get("eva_a")
            corrections = None
            if starts is not None and config.variant == "eva_s":
                corrections = starts * seen.squares.sqrt()
            return formula.factored(matrices, output, input, config.exponent, corrections)
        if config.variant == "eva_s":
            vectors = seen.vectors[::-1] if stack.kind.is_transposed else seen.vectors
            return formula.eva_s(matrices, vectors, config.damping, relative)
        if config.variant == "eva_f":
            return formula.eva_f(matrices, biases, seen.vectors[0], config.damping, relative)
        a, g = seen.vectors
        return formula.eva(matrices, biases, a, g, config.damping, relative)

    def _average(self, stack: Stack, key: str, values: Tensor, weights: Tensor) -> Tensor:
        averages = formula.averaged(stack.read(self.state, key), values, weights)
        stack.write(self.state, key, averages)
        return averages

    def _count(self, stack: Stack, squares: Tensor, valid: Tensor) -> _Seen:
        """
        Count the steps of each layer with a valid gradient, whose n-th weighs `decay` but at least `1/n` in averages,
        and average `‖G‖²` where it is kept.
        """
        updates = stack.read(self.state, "eva_updates") + valid
        stack.write(self.state, "eva_updates", updates)
        weights = updates.reciprocal().clamp_min(self.config.decay).where(valid, 0.0)
        if "eva_square" in self.state[stack.layers[0].weight]:
            squares = self._average(stack, "eva_square", squares, weights)
        return _Seen(weights, updates, squares)

    def _create_state(self, layer: Layer) -> None:
        """All statistics of a layer that has none yet: zeros, and random bases."""
        state = self.state[layer.weight]
        if "eva_updates" not in state:
            for key, shape in statistics_shapes(layer, self.config).items():
                like = self._zeros(layer, shape)
                state[key] = formula.initial_basis(*shape, like) if len(shape) == 2 else like

    def _momentum(self, layer: Layer) -> Tensor:
        state = self.state[layer.weight]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = self._zeros(layer, layer.weight.shape)
        return state["momentum_buffer"]

    def _zeros(self, layer: Layer, shape: Sequence[int]) -> Tensor:
        return torch.zeros(shape, dtype=working_dtype(layer.weight), device=layer.weight.device)

    def _was_called(self, index: int, layer: Layer, statistics: Statistics) -> bool:
        """Whether there are statistics for a layer: some models use a weight without calling its module."""
        assert self._capture is not None
        if index in self._capture.called:
            return True
        # The read of a device value happens only where this process never called the layer: another one may have.
        updates = self.state[layer.weight].get("eva_updates", 0)
        if bool((statistics.tokens > 0) | (updates > 0)):
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
            ValueError: the state was saved with other layers or another config; the message lists the differences. Or
                it holds numbers that are not finite.
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
        refuse_unsound({p: saved[id(p)] for p in parameters if id(p) in saved}, partial(_name_in, self.plan))
        super().load_state_dict(state_dict)
        planned = {id(layer.weight) for layer in self.layers}
        for parameter in parameters:
            if id(parameter) in planned or id(parameter) in self._embeddings:
                for key, value in saved[id(parameter)].items():
                    # torch casts floating state to the parameter's dtype, which would lose bits under bf16. It leaves
                    # the count of steps alone, which AdamW wants on the CPU.
                    if key != "step":
                        self.state[parameter][key] = value.to(device=parameter.device, copy=True)
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


def _name_in(plan: Plan, parameter: Tensor) -> str:
    """What a reader calls a parameter: the layer whose weight it is, otherwise its own name."""
    names = {id(own): name for name, own in plan.model.named_parameters()}
    names |= {id(layer.weight): layer.name for layer in plan.layers}
    return names.get(id(parameter), "a parameter outside the model")


def _listed(shapes: dict[str, tuple[int, ...]]) -> str:
    return ", ".join(f"{key}{list(shape)}" for key, shape in sorted(shapes.items()) if shape)
