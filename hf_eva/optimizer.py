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
from .diagnostics import LastStep, correction_sums, row_sums
from .layers import Layer, working_dtype
from .selection import Plan, embeddings_of, statistics_shapes
from .shards import Routine, axes_of, local, refusal, together, whole_sum
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
        self._steps, self._is_rehearsal = 0, False
        self._last = LastStep()
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
        self._last = LastStep()
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
        # A step before any forward pass: by it torch.distributed.checkpoint makes an optimizer create its state. The
        # read of device values happens only where this process has called no layer: another one may have.
        self._is_rehearsal = (
            self._capture is not None
            and not self._capture.called
            and not any(bool(values.tokens > 0) for values in statistics or ())
        )
        stacks = self._stacks(statistics)
        look = self._look(stacks, statistics)
        if look.sound is not None and can_read(look.sound):
            if not look.sound.tolist():
                return
            look.sound = None
        if self.config.base == "sgd":
            self._sgd_step(stacks, statistics, look)
        else:
            self._adamw_step(stacks, statistics, look)

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
        if self.config.variant == "none" or not self._steps:
            return {}
        return self._last.measure(self.state, self.config, len(self.plan.layers), layers)

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
            if reason := refusal(layer.weight, gradient):
                raise RuntimeError(
                    f"Layer {layer.name!r} is distributed in a way that Eva does not know ({reason}): shard each axis "
                    "of the weight at most once, as `fully_shard` does by itself, or exclude the layer from the plan."
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
            own = {id(layer.weight) for layer in self.layers} | self._by_rows
            follow_(self.state, self.param_groups, own, self.config.base == "sgd")
        return self._stacked[1]

    @property
    def _by_rows(self) -> set[int]:
        """The ids of the weights of embeddings."""
        return {id(module.weight) for module in self._embeddings}

    def _look(self, stacks: Sequence[Stack], statistics: Sequence[Statistics] | None) -> _Look:
        """Judge all gradients and statistics; not without preconditioning, where nothing is to differ from torch."""
        present = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        if self.config.variant == "none" or not present:
            return _Look()
        by_rows = self._by_rows
        others = [parameter for parameter in present if id(parameter) not in by_rows]
        rows = {id(p): base.mean_squares(p) for p in present if id(p) in by_rows}
        found = zip(others, squared_norms_of([local(parameter.grad) for parameter in others]), strict=True)
        squares = {id(parameter): square for parameter, square in found}
        numbers = [(p, rows[id(p)].sum() if id(p) in rows else squares[id(p)]) for p in present]
        sums = together(whole_sum(axes_of(parameter), square) for parameter, square in numbers)
        numbers = [(parameter, total) for (parameter, _), total in zip(numbers, sums, strict=True)]
        squares = {id(parameter): total for parameter, total in numbers}
        if statistics is not None:
            used = [pair for stack in stacks for pair in zip(stack.weights, stack.indices, strict=True)]
            numbers += [(weight, statistics[index].a_square) for weight, index in used]
            numbers += [(weight, statistics[index].g_square) for weight, index in used]
        return _Look(squares | rows, self._watch.judge(numbers))

    def _adamw_step(self, stacks: Sequence[Stack], statistics: Sequence[Statistics] | None, look: _Look) -> None:
        """Momentum, preconditioned and scaled to AdamW's size, for the layers; AdamW for everything else."""
        together(self._adamw_stack(stack, statistics, look) for stack in stacks)
        planned, by_rows = {id(weight) for stack in stacks for weight in stack.weights}, self._by_rows
        for group in self.param_groups:
            others = [p for p in group["params"] if p.grad is not None and id(p) not in planned]
            embeddings = [parameter for parameter in others if id(parameter) in by_rows]
            squares = [look.squares[id(parameter)] for parameter in embeddings]
            base.row_adamw_(embeddings, squares, self.state, group, EMBEDDING_FACTOR, look.sound)
            if len(embeddings) < len(others):
                base.adamw_([p for p in others if id(p) not in by_rows], self.state, group, look.sound)

    def _adamw_stack(self, stack: Stack, statistics: Sequence[Statistics] | None, look: _Look) -> Routine[None]:
        config = self.config
        gradients = stack.gradients(self._scratch)
        sound = None if look.sound is None else look.sound.to(gradients.device)
        seen = yield from self._observe(stack, gradients, statistics, look)
        momenta = [local(self._momentum(layer)) for layer in stack.layers]
        base.momentum_(gradients.unbind(), momenta, config.momentum, config.nesterov, sound)
        scales = replace_unless_(sound, (yield from self._precondition_and_scale_(stack, gradients, seen)), 0.0)
        lr, weight_decay = stack.group["lr"], stack.group["weight_decay"]
        for layer, update, scale in zip(stack.layers, gradients.unbind(), scales.unbind(), strict=True):
            rows = layer.kind.rows(scale, update.ndim)
            base.decoupled_(local(layer.weight), update, rows, lr, weight_decay, sound)

    def _precondition_and_scale_(self, stack: Stack, momenta: Tensor, seen: _Seen) -> Routine[Tensor]:
        """Turn momenta into updates, in place; returns what their rows are multiplied with, of shape `(n, d_out)`."""
        matrices, (of_rows, of_columns) = stack.kind.matrices(momenta), stack.part
        # What a momentum that started from zero is divided by, as in Adam; Nesterov's is one step ahead.
        steps = seen.updates + self.config.nesterov
        starts = -torch.expm1(steps * math.log(max(self.config.momentum, _LEAST_MOMENTUM)))
        correction = yield from self._correction(stack, matrices, None, seen, starts)
        weights = torch.stack(torch._foreach_norm([local(layer.weight) for layer in stack.layers])).to(momenta.dtype)
        row_squares, weights, grams = yield from of_columns.sum(
            formula.squared_row_norms(matrices), weights.square(), correction.grams()
        )
        squares, products = correction.squares(row_squares, grams), correction.products(row_squares)
        correction.apply_(matrices)
        squares, products, row_squares, weights = yield from of_rows.sum(
            *map(of_rows.spread, (squares, products, row_squares)), weights
        )
        shares = self._average(stack, "eva_rows", formula.row_shares(squares), seen.weights)
        norms, numel = row_squares.sum(1).sqrt(), stack.layers[0].weight.numel()
        largest = formula.largest_sizes(weights.sqrt(), numel, stack.group["lr"])
        scales = formula.row_scales(squares, products, shares, norms, numel, seen.squares, starts, largest)
        self._last.keep(stack, row_sums, row_squares, products, squares, scales)
        return of_rows.take(scales)

    def _sgd_step(self, stacks: Sequence[Stack], statistics: Sequence[Statistics] | None, look: _Look) -> None:
        """Preconditioned gradients for the layers, one control of their size, then SGD for all parameters."""
        config = self.config
        done = together(self._sgd_stack(stack, statistics, look) for stack in stacks)
        updates = [update for stack_updates, _, _ in done for update in stack_updates]
        norms = [norms for _, _, norms in done if norms]
        factor = self._last.factor = self._size_factor(stacks, [inner for _, inner, _ in done], norms)
        if updates and factor is not None:
            torch._foreach_mul_(updates, factor)
        for group in self.param_groups:
            present = [parameter for parameter in group["params"] if parameter.grad is not None]
            if present:
                base.sgd_(present, self.state, group, config.momentum, config.nesterov, look.sound)

    def _sgd_stack(
        self, stack: Stack, statistics: Sequence[Statistics] | None, look: _Look
    ) -> Routine[tuple[list[Tensor], Tensor, tuple[Tensor, Tensor] | None]]:
        """The gradients that hold the directions, `⟨P, G⟩` per layer, and where they are wanted `‖G‖` and `‖P‖`."""
        gradients, biases = stack.gradients(self._scratch), (yield from stack.bias_gradients())
        seen = yield from self._observe(stack, gradients, statistics, look)
        inner, norms = yield from self._precondition_(stack, gradients, biases, seen)
        return stack.write_gradients(gradients, biases), inner, norms

    def _size_factor(
        self, stacks: Sequence[Stack], inner: Sequence[Tensor], norms: Sequence[tuple[Tensor, Tensor]]
    ) -> Tensor | float | None:
        """What all directions together are multiplied with, see [`formula.eva`] for the share of the damping."""
        config = self.config
        if config.kl_mode == "rescale" and stacks:
            return formula.rescale_factor(*zip(*norms, strict=True))
        scale = 1 / config.damping if config.divides_by_damping else 1.0
        if config.kl_mode == "clip" and stacks:
            return scale * formula.kl_factor(
                [values * scale for values in inner], [stack.group["lr"] for stack in stacks], config.kl_clip
            )
        return scale if config.divides_by_damping else None

    def _observe(
        self, stack: Stack, gradients: Tensor, statistics: Sequence[Statistics] | None, look: _Look
    ) -> Routine[_Seen]:
        """Bring the running averages up to date."""
        for layer in stack.layers:
            self._create_state(layer)
        squares = torch.stack([look.squares[id(weight)] for weight in stack.weights])
        valid = squares > 0 if look.sound is None else (squares > 0) & look.sound.to(squares.device)
        if statistics is None:
            return (yield from self._observe_gradients(stack, gradients, squares, valid))
        return self._observe_tokens(stack, [statistics[index] for index in stack.indices], squares, valid)

    def _observe_tokens(self, stack: Stack, statistics: Sequence[Statistics], squares: Tensor, valid: Tensor) -> _Seen:
        """Variants `"eva"` and `"eva_f"`: average the mean vectors and the traces."""
        tokens, a, a_squares, g, g_squares = (
            torch.stack([getattr(values, f.name) for values in statistics]) for f in dataclasses.fields(Statistics)
        )
        valid = valid & (tokens > 0)
        seen = self._count(stack, squares, valid)
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

    def _observe_gradients(self, stack: Stack, gradients: Tensor, squares: Tensor, valid: Tensor) -> Routine[_Seen]:
        """
        Variant `"eva_s"`: average the means over axes, or track the subspaces of `Gᵀ G` and `G Gᵀ`, in units of the
        average `‖G‖²`.
        """
        seen = self._count(stack, squares, valid)
        if self.config.curvature == "joint":
            means = yield from formula.axis_means(gradients, stack.axes)
            named = {f"eva_v{axis}": mean for axis, mean in enumerate(means)}
            seen.vectors = [self._average(stack, key, mean, seen.weights) for key, mean in named.items()]
            return seen
        matrices = stack.kind.matrices(gradients)
        output, input = stack.read(self.state, "eva_g"), stack.read(self.state, "eva_a")
        if self._steps <= SEARCH_STEPS:
            first = valid & (seen.updates == 1)
            output, input = yield from formula.find_bases(matrices, output, input, first, squares, stack.part)
        # The average that `‖G‖²` gets, in its new units.
        weights = (seen.weights * squares * formula.inverse(seen.squares)).where(valid, 0.0)
        output, input = yield from formula.subspace_step(matrices, output, input, weights, squares, stack.part)
        for key, bases in (("eva_g", output), ("eva_a", input)):
            stack.write(self.state, key, bases)
            seen.factors[key] = self._factors(bases, seen.squares)
        return seen

    def _factors(self, bases: Tensor, traces: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return formula.factor_levels(bases, traces, self.config.damping, self.config.damping_mode == "relative")

    def _precondition_(
        self, stack: Stack, gradients: Tensor, biases: Tensor | None, seen: _Seen
    ) -> Routine[tuple[Tensor, tuple[Tensor, Tensor] | None]]:
        """Turn gradients into directions, in place; returns `⟨P, G⟩` per layer and, to rescale, `‖G‖` and `‖P‖`."""
        matrices, rescales = stack.kind.matrices(gradients), self.config.kl_mode == "rescale"
        before = (yield from stack.norms(gradients, biases)) if rescales else None
        squares = formula.squared_norms(gradients)
        correction = yield from self._correction(stack, matrices, biases, seen, None)
        (squares,) = yield from stack.part.columns.sum(squares)
        whole = squares if biases is None else squares + formula.squared_norms(biases)
        inner = whole + (correction.columns * correction.images).sum((1, 2))
        inner, squares = yield from stack.part.rows.sum(inner, squares)
        correction.apply_(matrices, biases)
        keeps_norms = self.config.variant == "eva_s" and self.config.curvature == "joint"
        if stack.is_whole:  # of parts, these sums would have to be sent in every step
            self._last.keep(stack, correction_sums, correction, whole, biases is not None, keeps_norms)
        if keeps_norms:
            inner = inner * (yield from formula.restore_norms_(gradients, squares, stack.part))
        return inner, None if before is None else (before, (yield from stack.norms(gradients, biases)))

    def _correction(
        self, stack: Stack, matrices: Tensor, biases: Tensor | None, seen: _Seen, starts: Tensor | None
    ) -> Routine[formula.Correction]:
        """What preconditions gradients, or momenta with their `starts`, as variant and curvature have it."""
        config = self.config
        relative = config.damping_mode == "relative"
        if config.curvature == "factored":
            output, input = seen.factors.get("eva_g"), seen.factors.get("eva_a")
            corrections = None
            if starts is not None and config.variant == "eva_s":
                corrections = starts * seen.squares.sqrt()
            return formula.factored(matrices, output, input, config.exponent, corrections, stack.part)
        if config.variant == "eva_s":
            vectors = seen.vectors[::-1] if stack.kind.is_transposed else seen.vectors
            return formula.eva_s(matrices, vectors, config.damping, relative, stack.part)
        if config.variant == "eva_f":
            return formula.eva_f(matrices, biases, seen.vectors[0], config.damping, relative, stack.part)
        a, g = seen.vectors
        return formula.eva(matrices, biases, a, g, config.damping, relative, stack.part)

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
            weight = layer.weight
            state["momentum_buffer"] = torch.zeros_like(
                weight, dtype=working_dtype(weight), memory_format=torch.contiguous_format
            )
        return state["momentum_buffer"]

    def _zeros(self, layer: Layer, shape: Sequence[int]) -> Tensor:
        return torch.zeros(shape, dtype=working_dtype(layer.weight), device=layer.weight.device)

    def _was_called(self, index: int, layer: Layer, statistics: Statistics) -> bool:
        """Whether there are statistics for a layer: some models use a weight without calling its module."""
        assert self._capture is not None
        if index in self._capture.called or self._is_rehearsal:
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
        by_rows = self._by_rows
        precise = by_rows | {id(layer.weight) for layer in self.layers}
        for parameter in parameters:
            if id(parameter) in precise:
                for key, value in saved[id(parameter)].items():
                    # torch casts floating state to the parameter's dtype, which would lose bits under bf16, and the
                    # count of steps as AdamW wants it.
                    if key != "step" or id(parameter) in by_rows:
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
