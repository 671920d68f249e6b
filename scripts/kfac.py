"""
K-FAC and FOOF with dense factors, for the layers that `hf_eva.plan` selects.

K-FAC (Martens and Grosse 2015, arXiv 1503.05671) multiplies a layer's gradient by the inverses of `A = E[x xᵀ]` and
`B = E[δ δᵀ]`, the second moments of its inputs and of the gradients at its outputs (the empirical Fisher); FOOF
(Benzing 2022, arXiv 2201.12250) by the inverse of `A` only. The rest is the rule of Muon: momentum is preconditioned,
the update gets the size of AdamW's and weight decay is decoupled, so that AdamW's learning rate carries over.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from onednn import matmul
from torch import Tensor, nn

from hf_eva.layers import Layer

ADAMW_RMS = 0.2  # root mean square of an AdamW update (Liu et al. 2025, arXiv 2502.16982, section 2.2)
SIDES = ("input", "output")
TINY = 1e-30


class KFAC(torch.optim.Optimizer):
    """
    Args:
        layers (sequence of `Layer`): the Linear, Conv1D and Conv2d layers whose weights it trains.
        lr, weight_decay: as in `torch.optim.AdamW`.
        momentum (`float`, defaults to 0.95): Nesterov momentum of the gradient.
        decay (`float`, defaults to 0.8): of the running averages of the factors, once per interval.
        damping (`float`, defaults to 0.3): added to the eigenvalues of a factor, in units of their mean. It is
            Tikhonov damping with the π of Martens and Grosse (section 6.3), relative to the size of `A ⊗ B`.
        interval (`int`, defaults to 10): steps from one observation and inversion of the factors to the next. Each of
            the first `interval` steps does it, because the first batches say little.
        output_side (`bool`, defaults to `True`): `False` is FOOF.
    """

    def __init__(
        self,
        layers: Sequence[Layer],
        lr: float = 1e-3,
        weight_decay: float = 0.0,
        momentum: float = 0.95,
        decay: float = 0.8,
        damping: float = 0.3,
        interval: int = 10,
        output_side: bool = True,
    ) -> None:
        options = {"lr": lr, "weight_decay": weight_decay, "momentum": momentum, "decay": decay, "damping": damping}
        options |= {"interval": interval, "output_side": output_side}
        super().__init__([layer.weight for layer in layers], options)
        self.layers = {layer.weight: layer for layer in layers}
        self.sums: dict[Tensor, list[Tensor | int]] = {}  # over the tokens of a step: their number, Σ x xᵀ, Σ δ δᵀ
        watch(self, layers)

    def due(self, weight: Tensor) -> bool:
        """Whether the next step observes and inverts the factors of a weight."""
        step, interval = self.state[weight].get("step", 0), self.param_groups[0]["interval"]
        return step < interval or step % interval == 0

    @torch.no_grad()
    def observe(self, layer: Layer, x: Tensor, grad: Tensor) -> None:
        """Add what a layer received, and the gradient at its output, to the sums; all tokens count, padding too."""
        inputs, outputs = tokens(layer, x, grad)
        sides = [inputs, outputs] if self.param_groups[0]["output_side"] else [inputs]
        sums = [len(inputs), *(matmul(side.T, side) for side in sides)]
        previous = self.sums.get(layer.weight, [0] * len(sums))
        self.sums[layer.weight] = [old + new for old, new in zip(previous, sums, strict=True)]

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is None:
                    continue
                state, layer = self.state[weight], self.layers[weight]
                if weight in self.sums:
                    self._invert(weight, group["decay"], group["damping"])
                state["step"] = state.get("step", 0) + 1
                if "momentum_buffer" not in state:
                    state["momentum_buffer"] = torch.zeros_like(weight)
                buffer = state["momentum_buffer"].lerp_(weight.grad, 1 - group["momentum"])
                update = layer.kind.matrix(weight.grad.lerp(buffer, group["momentum"]))
                if "input_inverse" in state:
                    update = matmul(update, state["input_inverse"])
                if "output_inverse" in state:
                    update = matmul(state["output_inverse"], update)
                scale = ADAMW_RMS * math.sqrt(weight.numel()) / torch.linalg.vector_norm(update).clamp_min(TINY)
                weight.mul_(1 - group["lr"] * group["weight_decay"])
                layer.kind.matrix(weight).addcmul_(update, scale, value=-group["lr"])
        self.sums.clear()
        return loss

    def _invert(self, weight: Tensor, decay: float, damping: float) -> None:
        state, (count, *sums) = self.state[weight], self.sums[weight]
        for side, total in zip(SIDES, sums, strict=False):
            average = state.setdefault(f"{side}_factor", total / count)
            average.lerp_(total / count, 1 - decay)
            damped = average.clone()
            damped.diagonal().add_(damping * average.diagonal().mean() + TINY)
            # Without a check: a run that diverges shows it by its loss.
            state[f"{side}_inverse"] = torch.cholesky_inverse(torch.linalg.cholesky_ex(damped).L)


def watch(optimizer: torch.optim.Optimizer, layers: Sequence[Layer]) -> None:
    """
    Call `optimizer.observe(layer, input, output gradient)` in the backward pass, which evaluation never reaches, for
    every weight that is `due`; hooks go when the optimizer goes.
    """
    hook = partial(_after_layer, weakref.ref(optimizer))
    handles = [layer.module.register_forward_hook(partial(hook, layer)) for layer in layers]
    weakref.finalize(optimizer, lambda: [handle.remove() for handle in handles])


def _after_layer(
    reference: weakref.ref, layer: Layer, module: nn.Module, args: tuple[Tensor, ...], output: Tensor
) -> None:
    optimizer = reference()
    if optimizer is not None and output.requires_grad and optimizer.due(layer.weight):
        x = args[0].detach()
        output.register_hook(lambda grad: optimizer.observe(layer, x, grad))


def tokens(layer: Layer, x: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    """Inputs `(tokens, d_in)` and output gradients `(tokens, d_out)`; the tokens of a convolution are its patches."""
    if layer.kind.name == "Conv2d":
        module = layer.module
        mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
        padded = F.pad(x, module._reversed_padding_repeated_twice, mode=mode)
        patches = F.unfold(padded, module.kernel_size, dilation=module.dilation, stride=module.stride)
        x, grad = patches.transpose(1, 2), grad.flatten(2).transpose(1, 2)
    dtype = layer.weight.dtype
    return x.reshape(-1, x.shape[-1]).to(dtype), grad.reshape(-1, grad.shape[-1]).to(dtype)
