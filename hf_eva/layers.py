"""
The kinds of layer that can be preconditioned, and the few questions that the algorithm asks of each.

A new kind is one subclass of [`LayerKind`] and one entry in [`KINDS`]: `KINDS.append(MyKind())`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .base import BLOCK
from .config import EvaConfig


class LayerKind:
    """How a module computes `y = W x + b` over tokens. Subclasses override what differs from `nn.Linear`."""

    name = "Linear"
    is_transposed = False  # whether the weight is stored as (d_in, d_out)
    axes_of_batch = 2  # of an input with several examples, at least

    def matches(self, module: nn.Module) -> bool:
        """Whether this kind describes the module. Exact classes only: a subclass may compute something else."""
        return _class(module) is nn.Linear

    def unsupported(self, module: nn.Module) -> str | None:
        """Why a matching module cannot be preconditioned, or `None`."""
        return None

    def shape(self, module: nn.Module) -> tuple[int, int]:
        """`(d_out, d_in)`, bias not counted."""
        rows, columns = _weight(module).shape
        return rows, columns

    def matrices(self, stack: Tensor) -> Tensor:
        """A view `(n, d_out, d_in)` of a contiguous stack of n tensors that are laid out as the module's weight."""
        return stack

    def matrix(self, tensor: Tensor) -> Tensor:
        """A view `(d_out, d_in)` of a tensor that is laid out as the module's weight."""
        return self.matrices(tensor.unsqueeze(0))[0]

    def rows(self, vector: Tensor, ndim: int) -> Tensor:
        """A view of a vector `(d_out,)` that broadcasts over a tensor of `ndim` axes laid out as the weight."""
        return vector.view(-1, *[1] * (ndim - 1))

    def input_sums(
        self,
        module: nn.Module,
        x: Tensor,
        dtype: torch.dtype,
        real: Tensor | None = None,
        with_square: bool = True,
    ) -> Tensor:
        """
        The number of tokens, `Σ x` of shape `(d_in,)` and, if wanted, `Σ ‖x‖²` of an input as the module receives it,
        one after the other. `real` says with booleans `(tokens,)` which tokens count.
        """
        rows = x.reshape(-1, x.shape[-1])
        tokens = _count(len(rows), x.device, dtype) if real is None else real.sum(dtype=dtype)
        return torch.cat([tokens.view(1), _row_sums(rows, dtype, real, with_square)])

    def output_gradient_sums(self, grad: Tensor, dtype: torch.dtype, with_square: bool = True) -> Tensor:
        """`Σ δ` of shape `(d_out,)` and, if wanted, `Σ ‖δ‖²` of the gradient at the module's output."""
        return _row_sums(grad.reshape(-1, grad.shape[-1]), dtype, with_square=with_square)


class Conv1DKind(LayerKind):
    """GPT-2's `Conv1D`: a Linear that stores its weight transposed, `(d_in, d_out)`."""

    name = "Conv1D"
    is_transposed = True

    def matches(self, module: nn.Module) -> bool:
        # Named, not imported: the optimizer must work where transformers is not installed.
        known = _class(module)
        return (known.__module__, known.__qualname__) == ("transformers.pytorch_utils", "Conv1D")

    def shape(self, module: nn.Module) -> tuple[int, int]:
        columns, rows = _weight(module).shape
        return rows, columns

    def matrices(self, stack: Tensor) -> Tensor:
        return stack.mT

    def rows(self, vector: Tensor, ndim: int) -> Tensor:
        return vector


class Conv2dKind(LayerKind):
    """`nn.Conv2d` as a Linear over patches; its tokens are the output positions."""

    name = "Conv2d"
    axes_of_batch = 4

    def matches(self, module: nn.Module) -> bool:
        return _class(module) is nn.Conv2d

    def unsupported(self, module: nn.Module) -> str | None:
        assert isinstance(module, nn.Conv2d)
        return f"grouped convolution (groups={module.groups})" if module.groups != 1 else None

    def shape(self, module: nn.Module) -> tuple[int, int]:
        channels, *patch = _weight(module).shape
        return channels, math.prod(patch)

    def matrices(self, stack: Tensor) -> Tensor:
        return stack.view(*stack.shape[:2], math.prod(stack.shape[2:]))  # a process may hold no row

    def input_sums(
        self,
        module: nn.Module,
        x: Tensor,
        dtype: torch.dtype,
        real: Tensor | None = None,
        with_square: bool = True,
    ) -> Tensor:
        assert isinstance(module, nn.Conv2d)
        if x.ndim == 3:
            x = x.unsqueeze(0)
        # Taking patches is linear, so the batch is summed first and only one image has to be unfolded.
        sums, positions = self._patch_sums(module, x.sum(0, keepdim=True, dtype=dtype))
        found = [_count(x.shape[0] * positions, x.device, dtype).view(1), sums]
        if with_square:
            norms = torch.linalg.vector_norm(x, dim=0, keepdim=True, dtype=dtype)
            found.append(self._patch_sums(module, norms.square())[0].sum().view(1))
        return torch.cat(found)

    def _patch_sums(self, module: nn.Conv2d, image: Tensor) -> tuple[Tensor, int]:
        mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
        padded = F.pad(image, self._padding(module), mode=mode)
        patches = F.unfold(padded, module.kernel_size, dilation=module.dilation, stride=module.stride)
        return patches.sum(-1).squeeze(0), patches.shape[-1]

    @staticmethod
    def _padding(module: nn.Conv2d) -> list[int]:
        """The module's padding in the order of `F.pad`: last axis first, before and after."""
        if module.padding == "valid":
            return [0, 0, 0, 0]
        if module.padding == "same":
            totals = [d * (k - 1) for d, k in zip(module.dilation, module.kernel_size, strict=True)]
            return [side for total in reversed(totals) for side in (total // 2, total - total // 2)]
        assert not isinstance(module.padding, str)
        return [int(side) for side in reversed(module.padding) for _ in range(2)]

    def output_gradient_sums(self, grad: Tensor, dtype: torch.dtype, with_square: bool = True) -> Tensor:
        all_but_channels = (0, 2, 3) if grad.ndim == 4 else (1, 2)
        sums = grad.sum(all_but_channels, dtype=dtype)
        return torch.cat([sums, _square(grad, dtype)]) if with_square else sums


KINDS: list[LayerKind] = [LayerKind(), Conv1DKind(), Conv2dKind()]


def kind_of(module: nn.Module) -> LayerKind | None:
    """The kind that describes a module, or `None`."""
    return next((kind for kind in KINDS if kind.matches(module)), None)


@dataclass(frozen=True, eq=False)
class Layer:
    """A module that is preconditioned. Its parameters are asked for at each use, because sharding replaces them."""

    name: str
    module: nn.Module
    kind: LayerKind
    reach: float = 1.0  # how many times as long as others its steps are, see `selection.reach_of`

    @property
    def weight(self) -> nn.Parameter:
        weight = self.module.weight
        if not isinstance(weight, nn.Parameter):
            raise RuntimeError(
                f"Layer {self.name!r} has no weight of its own any more: a parametrization computes it. Make the "
                "optimizer after the parametrization, or exclude the layer."
            )
        return weight

    @property
    def bias(self) -> nn.Parameter | None:
        bias = getattr(self.module, "bias", None)
        return bias if isinstance(bias, nn.Parameter) and bias.requires_grad else None

    @property
    def shape(self) -> tuple[int, int]:
        """`(d_out, d_in)`."""
        return self.kind.shape(self.module)

    def sizes_of_sums(self, wanted: Wanted) -> list[int]:
        """How many numbers are summed in a window: tokens, inputs, their squares, output gradients, their squares."""
        d_out, d_in = self.shape
        square = int(wanted.squares)
        return [1, d_in, square, *((d_out, square) if wanted.output_gradients else (0, 0))]


class Wanted(NamedTuple):
    """
    Which sums are gathered: also those of output gradients, also those of squares, and of which share of the examples
    in a batch: the first ones, at least one, each of whose tokens then stands for several.
    """

    output_gradients: bool
    squares: bool
    share: float

    @classmethod
    def by(cls, config: EvaConfig) -> Wanted:
        return cls(config.needs_output_gradients, config.needs_traces, config.token_fraction)

    def sample(self, kind: LayerKind, x: Tensor) -> Sample:
        """What is gathered of one call of a layer, with this input."""
        if self.share == 1 or x.ndim < kind.axes_of_batch or len(x) == 0:
            return Sample(kind, self.squares, 1, 1)
        return Sample(kind, self.squares, math.ceil(len(x) * self.share), len(x))


class Sample(NamedTuple):
    """The sums of [`LayerKind`], over the `first` examples `of` so many, as if they were all."""

    kind: LayerKind
    squares: bool
    first: int
    of: int

    def input_sums(self, module: nn.Module, x: Tensor, dtype: torch.dtype, real: Tensor | None) -> Tensor:
        real = None if real is None else self._part(real)
        return self._scaled(self.kind.input_sums(module, self._part(x), dtype, real, self.squares))

    def output_gradient_sums(self, grad: Tensor, dtype: torch.dtype) -> Tensor:
        return self._scaled(self.kind.output_gradient_sums(self._part(grad), dtype, self.squares))

    def _part(self, batch: Tensor) -> Tensor:
        """Of a batch by examples or, one after the other, by their tokens."""
        return batch if self.first == self.of else batch[: len(batch) * self.first // self.of]

    def _scaled(self, sums: Tensor) -> Tensor:
        return sums if self.first == self.of else sums * (self.of / self.first)


def working_dtype(tensor: Tensor) -> torch.dtype:
    """The precision of statistics, momentum and directions: that of the tensor, but never lower than float32."""
    return torch.promote_types(tensor.dtype, torch.float32)


def _class(module: nn.Module) -> type:
    """A module's class, which `fully_shard` replaces by a mixture of FSDP's and its own."""
    kind = type(module)
    return kind.__bases__[1] if kind.__bases__[0].__name__ == "FSDPModule" else kind


def _weight(module: nn.Module) -> Tensor:
    return cast(Tensor, module.weight)


def _count(tokens: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    return torch.full((), tokens, device=device, dtype=dtype)


def _row_sums(rows: Tensor, dtype: torch.dtype, real: Tensor | None = None, with_square: bool = True) -> Tensor:
    """The sum `(d,)` of rows `(n, d)` and, if wanted, `Σ ‖row‖²`, in one precision; of those only that are `real`."""
    if rows.device.type != "cpu" or (rows.dtype == dtype and real is None):
        chosen = rows if real is None else _chosen(rows, real)
        sums = chosen.sum(0, dtype=dtype)
        return torch.cat([sums, _square(chosen, dtype)]) if with_square else sums
    # On a CPU a reduction in higher precision begins with a copy of everything, and so does a choice of rows: in parts
    # that the caches hold, it needs no memory and a quarter of the time.
    size = max(1, BLOCK // rows.shape[1])
    found = []
    for start in range(0, max(1, len(rows)), size):
        part = rows[start : start + size].to(dtype)
        if real is not None:
            part = _chosen(part, real[start : start + size])
        found.append(_row_sums(part, dtype, with_square=with_square))
    return torch.stack(found).sum(0)


def _chosen(rows: Tensor, real: Tensor) -> Tensor:
    return torch.where(real.unsqueeze(1), rows, 0)  # no product: padding may hold anything, also NaN


def _square(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    norm: Tensor = torch.linalg.vector_norm(tensor, dtype=dtype)
    return norm.square().view(1)
