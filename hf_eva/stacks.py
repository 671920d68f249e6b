"""Layers of equal shape, taken together: an operation on a stack costs little more than one on a single layer."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, MutableMapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .layers import Layer, LayerKind, working_dtype

# Weights in a stack, at most, by device: on a CPU a stack and its momentum should stay in the caches, on other devices
# a stack should fill the machine. A layer that is larger is a stack by itself.
MOST_WEIGHTS = {"cpu": 2**20}
MOST_WEIGHTS_ELSEWHERE = 2**24

State = MutableMapping[Tensor, dict[str, Tensor]]


@dataclass(frozen=True)
class Stack:
    """Layers of one kind, shape, precision, device and parameter group, all of them with a bias or all without."""

    layers: tuple[Layer, ...]
    indices: tuple[int, ...]  # among all planned layers
    group: dict[str, Any] = field(repr=False)  # that the weights are in
    has_bias: bool = False  # that is preconditioned, too

    @property
    def kind(self) -> LayerKind:
        return self.layers[0].kind

    @property
    def weights(self) -> list[Tensor]:
        return [layer.weight for layer in self.layers]

    def gradients(self, scratch: Scratch) -> Tensor:
        """
        The gradients as `(n, *weight.shape)` in working precision: a view of the gradient of a single layer where it
        can be one, otherwise a copy in `scratch`, valid until the next.
        """
        gradients = [layer.weight.grad for layer in self.layers if layer.weight.grad is not None]
        first, dtype = gradients[0], working_dtype(gradients[0])
        # A convolution in channels-last memory is not contiguous. Its gradient has to stay as it is: fused rules take
        # for granted that it lies in memory as the weight does.
        if len(gradients) == 1 and first.dtype == dtype and first.is_contiguous():
            return first.unsqueeze(0)
        stack = scratch.take((len(gradients), *first.shape), dtype, first.device)
        if first.dtype == dtype:
            return torch.stack(gradients, out=stack)
        torch._foreach_copy_(list(stack.unbind()), gradients)
        return stack

    def bias_gradients(self) -> Tensor | None:
        """A copy `(n, d_out)` of the gradients of preconditioned biases in working precision; `None` without them."""
        if not self.has_bias:
            return None
        biases = [layer.bias.grad for layer in self.layers if layer.bias is not None]
        stack = torch.stack([gradient for gradient in biases if gradient is not None])
        return stack.to(working_dtype(stack))

    def write_gradients(self, gradients: Tensor, biases: Tensor | None) -> list[Tensor]:
        """The way back, for rules that read `.grad`; returns all these `.grad`."""
        parameters = [layer.weight for layer in self.layers]
        values = list(gradients.unbind())
        if biases is not None:
            parameters += [layer.bias for layer in self.layers if layer.bias is not None]
            values += biases.unbind()
        targets = [parameter.grad for parameter in parameters if parameter.grad is not None]
        for target, value in zip(targets, values, strict=True):
            if target.data_ptr() != value.data_ptr():
                target.copy_(value)
        return targets

    def read(self, state: State, key: str) -> Tensor:
        """One statistic of all layers, `(n, *shape)`."""
        return torch.stack([state[layer.weight][key] for layer in self.layers])

    def write(self, state: State, key: str, values: Tensor) -> None:
        torch._foreach_copy_([state[layer.weight][key] for layer in self.layers], list(values.unbind()))


class Scratch:
    """One buffer for each device and precision, as large as the largest stack, which all stacks use in turns."""

    def __init__(self) -> None:
        self._buffers: dict[tuple[torch.dtype, torch.device], Tensor] = {}

    def take(self, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
        size = math.prod(shape)
        buffer = self._buffers.get((dtype, device))
        if buffer is None or len(buffer) < size:
            buffer = self._buffers[dtype, device] = torch.empty(size, dtype=dtype, device=device)
        return buffer[:size].view(*shape)


def stacks_of(layers: Iterable[tuple[int, Layer, dict[str, Any], bool]]) -> list[Stack]:
    """
    Put layers into as few stacks as there can be.

    Args:
        layers: for each its index, the layer, the parameter group of its weight and whether its bias takes part.
    """
    alike = defaultdict(list)
    for index, layer, group, has_bias in layers:
        weight = layer.weight
        key = (layer.kind.name, weight.shape, weight.dtype, weight.device, id(group), has_bias)
        alike[key].append((index, layer, group, has_bias))
    stacks = []
    for (_, shape, _, device, _, has_bias), members in alike.items():
        most = max(1, MOST_WEIGHTS.get(device.type, MOST_WEIGHTS_ELSEWHERE) // max(1, math.prod(shape)))
        for start in range(0, len(members), most):
            part = members[start : start + most]
            stacks.append(Stack(tuple(m[1] for m in part), tuple(m[0] for m in part), part[0][2], has_bias))
    return stacks
