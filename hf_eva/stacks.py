"""Layers of equal shape, taken together: an operation on a stack costs little more than one on a single layer."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, MutableMapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from .layers import Layer, LayerKind, working_dtype
from .routines import Routine
from .shards import Axis, Part, axes_of, local

# Weights in a stack, at most, by device: on a CPU a stack and its momentum should stay in the caches, on other devices
# a stack should fill the machine. A layer that is larger is a stack by itself.
MOST_WEIGHTS = {"cpu": 2**22}
MOST_WEIGHTS_ELSEWHERE = 2**24

State = MutableMapping[Tensor, dict[str, Tensor]]


@dataclass(frozen=True)
class Stack:
    """Layers of one kind, shape, reach, precision, device and group, all of them with a bias or all without."""

    layers: tuple[Layer, ...]
    indices: tuple[int, ...]  # among all planned layers
    group: dict[str, Any] = field(repr=False)  # that the weights are in
    has_bias: bool = False  # that is preconditioned, too

    @property
    def kind(self) -> LayerKind:
        return self.layers[0].kind

    @cached_property
    def weights(self) -> list[Tensor]:
        return [layer.weight for layer in self.layers]

    @property
    def reach(self) -> float:
        return self.layers[0].reach

    @cached_property
    def axes(self) -> tuple[Axis, ...]:
        """What this process holds of each axis of the weights as they are stored."""
        return axes_of(self.layers[0].weight)

    @property
    def size(self) -> int:
        """Entries of all weights that this process holds."""
        return len(self.layers) * math.prod(axis.size for axis in self.axes)

    @cached_property
    def bias_axis(self) -> Axis:
        bias = self.layers[0].bias
        assert bias is not None
        return axes_of(bias)[0]

    @cached_property
    def part(self) -> Part:
        """What this process holds of the matrices."""
        first, second = self.axes[:2]
        return Part(second, first) if self.kind.is_transposed else Part(first, second)

    @property
    def is_whole(self) -> bool:
        return all(axis.mesh is None for axis in self.axes)

    def gradients(self, scratch: Scratch) -> Tensor:
        """
        The parts of gradients `(n, *weight.shape)` that this process holds, in working precision: a view of the
        gradient of a single layer where it can be one, otherwise a copy in `scratch`. Of layers that have to wait for
        other processes, it is a copy of their own.
        """
        gradients = [local(layer.weight.grad) for layer in self.layers if layer.weight.grad is not None]
        first, dtype = gradients[0], working_dtype(gradients[0])
        # A convolution in channels-last memory is not contiguous. Its gradient has to stay as it is: fused rules take
        # for granted that it lies in memory as the weight does.
        if len(gradients) == 1 and first.dtype == dtype and first.is_contiguous():
            return first.unsqueeze(0)
        scratch = scratch if self.is_whole else Scratch()
        stack = scratch.take((len(gradients), *first.shape), dtype, first.device)
        if first.dtype == dtype:
            return torch.stack(gradients, out=stack)
        torch._foreach_copy_(list(stack.unbind()), gradients)
        return stack

    def gradients_apart(self) -> list[Tensor]:
        """The same one by one and in their own precision, for products that copy nothing of a weight's size."""
        return [local(weight.grad).contiguous() for weight in self.weights if weight.grad is not None]

    def bias_gradients(self) -> Routine[Tensor | None]:
        """
        A copy `(n, d_out)` of the gradients of preconditioned biases in working precision, of the rows that this
        process holds of the matrices; `None` without them.
        """
        if not self.has_bias:
            return None
        biases = [layer.bias.grad for layer in self.layers if layer.bias is not None]
        stack = torch.stack([local(gradient) for gradient in biases if gradient is not None])
        stack = stack.to(working_dtype(stack))
        if self.bias_axis != self.part.rows:  # one has columns of the weight and entries of the bias
            (stack,) = yield from self.bias_axis.sum(self.bias_axis.spread(stack))
        return stack

    def write_bias_gradients(self, values: Tensor) -> None:
        """The way back, for rules that read `.grad`."""
        values = values if self.bias_axis == self.part.rows else self.bias_axis.take(values)
        biases = [layer.bias.grad for layer in self.layers if layer.bias is not None]
        torch._foreach_copy_([local(grad) for grad in biases if grad is not None], list(values.unbind()))

    def read(self, state: State, key: str) -> Tensor:
        """One statistic of all layers, `(n, *shape)`."""
        return torch.stack([state[weight][key] for weight in self.weights])

    def write(self, state: State, key: str, values: Tensor) -> None:
        torch._foreach_copy_([state[weight][key] for weight in self.weights], list(values.unbind()))


class Scratch:
    """One buffer for each device and precision, which all waves of stacks use in turns."""

    def __init__(self) -> None:
        self._buffers: dict[tuple[torch.dtype, torch.device], Tensor] = {}
        self._taken: dict[tuple[torch.dtype, torch.device], int] = {}
        self._room = 0

    def clear(self, room: int) -> None:
        """Let everything be taken anew, which will be so many elements."""
        self._taken.clear()
        self._room = room

    def take(self, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
        """A tensor of any content, valid until all is taken anew."""
        key, size = (dtype, device), math.prod(shape)
        start, buffer = self._taken.get(key, 0), self._buffers.get(key)
        if buffer is None or len(buffer) < start + size:
            room = max(self._room, start + size)
            buffer = self._buffers[key] = torch.empty(room, dtype=dtype, device=device)
        self._taken[key] = start + size
        return buffer[start : start + size].view(*shape)


def waves_of(stacks: Iterable[Stack]) -> list[list[Stack]]:
    """
    Stacks that are stepped side by side: as many as may be one stack by their size, and all whose layers are in parts,
    because these have copies of their own and wait for each other's sums.
    """
    waves: list[list[Stack]] = []
    parts, room = [], 0
    for stack in stacks:
        if not stack.is_whole:
            parts.append(stack)
            continue
        if not waves or stack.size > room:
            waves.append([])
            room = _most_weights(stack.weights[0].device)
        waves[-1].append(stack)
        room -= stack.size
    return [*waves, parts] if parts else waves


def _most_weights(device: torch.device) -> int:
    return MOST_WEIGHTS.get(device.type, MOST_WEIGHTS_ELSEWHERE)


def stacks_of(layers: Iterable[tuple[int, Layer, dict[str, Any], bool]], most: int | None = None) -> list[Stack]:
    """
    Put layers into as few stacks as there can be.

    Args:
        layers: for each its index, the layer, the parameter group of its weight and whether its bias takes part.
        most: weights in a stack, if not [`MOST_WEIGHTS`].
    """
    alike = defaultdict(list)
    for index, layer, group, has_bias in layers:
        weight = layer.weight
        key = (layer.kind.name, axes_of(weight), weight.dtype, weight.device, id(group), has_bias, layer.reach)
        alike[key].append((index, layer, group, has_bias))
    stacks = []
    for (_, axes, _, device, _, has_bias, _), members in alike.items():
        size = max(1, math.prod(axis.size for axis in axes))
        limit = _most_weights(device) if most is None else most
        count = max(1, limit // size)
        for start in range(0, len(members), count):
            part = members[start : start + count]
            stacks.append(Stack(tuple(m[1] for m in part), tuple(m[0] for m in part), part[0][2], has_bias))
    return stacks
