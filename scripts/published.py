"""
The arithmetic of the published Eva as its authors run it: layer by layer, with five numbers read back per layer.

It follows the formulas of Zhang, Shi and Li, "Eva: Practical Second-order Optimization with Kronecker-vectorized
Approximation", ICLR 2023 (arXiv 2308.02123), and the order of operations of the authors' code, which decides what a
step costs: a copy of every gradient with its bias as the last column, a matrix `g aᵀ` of the size of the gradient, and
a host that waits for each layer. It gives the updates of `EvaConfig.paper("eva")`, in whose terms it is documented.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from kfac import tokens, watch
from torch import Tensor

from hf_eva.layers import Layer


class PublishedEva(torch.optim.SGD):
    """
    Args:
        params: all parameters, as for `torch.optim.SGD`, which consumes the preconditioned gradients.
        layers (sequence of `Layer`): those whose weights and biases are preconditioned; one micro-batch per step.
        lr, momentum, weight_decay: as in `torch.optim.SGD`.
        damping, decay, kl_clip: the paper's γ, ξ and κ, see `EvaConfig.paper`.
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        layers: Sequence[Layer],
        lr: float = 1e-3,
        weight_decay: float = 0.0,
        momentum: float = 0.9,
        damping: float = 0.03,
        decay: float = 0.95,
        kl_clip: float = 0.001,
    ) -> None:
        super().__init__(params, lr=lr, momentum=momentum, weight_decay=weight_decay)
        self.layers, self.damping, self.decay, self.kl_clip = list(layers), damping, decay, kl_clip
        watch(self, layers)

    def due(self, weight: Tensor) -> bool:
        return True

    @torch.no_grad()
    def observe(self, layer: Layer, x: Tensor, grad: Tensor) -> None:
        """Moves a layer's running averages towards the means over the tokens of a micro-batch."""
        inputs, outputs = tokens(layer, x, grad)
        a, g = inputs.mean(0), outputs.mean(0)
        if layer.bias is not None:
            a = torch.cat([a, a.new_ones(1)])
        state = self.state[layer.weight]
        for key, new in (("mean_input", a), ("mean_output_gradient", g)):
            if key in state:
                state[key].mul_(1 - self.decay).add_(new, alpha=self.decay)
            else:
                state[key] = new

    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._precondition()
        super().step()
        return loss

    @torch.no_grad()
    def _precondition(self) -> None:
        lr, size, touched = self.param_groups[0]["lr"], 0.0, []
        for layer in self.layers:
            state, grads = self.state[layer.weight], _gradients(layer)
            if not grads or "mean_input" not in state:
                continue
            a, g = state["mean_input"], state["mean_output_gradient"]
            matrix = torch.cat(grads, 1) if len(grads) > 1 else grads[0]
            curvature = a.dot(a).item() * g.dot(g).item()
            projection = g.dot(matrix.mv(a)).item()
            update = torch.outer(g, a)
            update *= -projection / (self.damping + curvature)
            update += matrix
            update /= self.damping
            columns = update.split([grad.shape[1] for grad in grads], 1)
            for grad, new in zip(grads, columns, strict=True):
                size += (new * grad * lr**2).sum().item()
                grad.copy_(new)
            touched += grads
        if size:
            factor = min(1.0, math.sqrt(self.kl_clip / abs(size)))
            for grad in touched:
                grad *= factor


def _gradients(layer: Layer) -> list[Tensor]:
    """Views of the gradients of a weight `(d_out, d_in)` and, where there is one, its bias `(d_out, 1)`."""
    if layer.weight.grad is None:
        return []
    bias = [] if layer.bias is None else [layer.bias.grad.unsqueeze(1)]
    return [layer.kind.matrix(layer.weight.grad), *bias]
