"""
Matrices of which each process holds some of the rows, or of the columns.

Only gradients, momenta and weights are in parts. Vectors and bases are whole on every process, so that what the
formulas need of the others are sums over a whole axis of products with their parts, which [`routines`] wait for. Where
nothing is in parts, there is nothing to sum.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from .routines import Routine, Sum

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


@dataclass(frozen=True)
class Axis:
    """
    The `size` entries from `start` of an axis with `whole` entries, or where `mesh` is `None` all of them. The
    `dimensions` of the mesh have cut it, one after the other.
    """

    whole: int
    start: int
    size: int
    mesh: DeviceMesh | None = None
    dimensions: tuple[int, ...] = ()

    def take(self, tensor: Tensor) -> Tensor:
        """The part that belongs here, a view, of a tensor `(n, whole, …)`."""
        return tensor if self.mesh is None else tensor.narrow(1, self.start, self.size)

    def spread(self, tensor: Tensor) -> Tensor:
        """A part `(n, size, …)` among zeros, `(n, whole, …)`: the sum over processes is the whole tensor."""
        if self.mesh is None:
            return tensor
        spread = tensor.new_zeros(len(tensor), self.whole, *tensor.shape[2:])
        self.take(spread).copy_(tensor)
        return spread

    def sum(self, *tensors: Tensor) -> Routine[Sequence[Tensor]]:
        """Sums over this axis, where each process has summed over its part."""
        sums: Sequence[Tensor] = tensors
        for dimension in self.dimensions:
            assert self.mesh is not None
            sums = yield Sum(self.mesh, dimension, sums)
        return sums


class Part(NamedTuple):
    """Which rows and columns of a matrix `(d_out, d_in)` this process holds."""

    rows: Axis
    columns: Axis

    def sum(self, *tensors: Tensor) -> Routine[Sequence[Tensor]]:
        """Sums over all entries."""
        return (yield from self.rows.sum(*(yield from self.columns.sum(*tensors))))

    def norms(self, norms: Tensor) -> Routine[Tensor]:
        """Norms over all entries, from those over the part."""
        if self.rows.mesh is None and self.columns.mesh is None:
            return norms
        (squares,) = yield from self.sum(norms.square())
        return squares.sqrt()


def whole_axis(size: int) -> Axis:
    return Axis(size, 0, size)


WHOLE = Part(whole_axis(0), whole_axis(0))  # of whatever size


def axes_of(tensor: Tensor) -> tuple[Axis, ...]:
    """The part of each axis of a tensor that this process holds, if [`refusal`] has no reason; of a plain one all."""
    if not is_distributed(tensor):
        return tuple(map(whole_axis, tensor.shape))
    mesh: DeviceMesh = tensor.device_mesh  # type: ignore[attr-defined]
    axes = []
    for axis, whole in enumerate(tensor.shape):
        dimensions, start, size = _cuts(tensor, axis), 0, whole
        for dimension in dimensions:
            most = -(-size // mesh.size(dimension))
            before = min(size, most * mesh.get_local_rank(dimension))
            start, size = start + before, min(most, size - before)
        axes.append(Axis(whole, start, size, mesh if dimensions else None, dimensions))
    return tuple(axes)


def refusal(weight: Tensor, gradient: Tensor) -> str:
    """Why a weight and its gradient are distributed in a way that is not known here, or an empty string."""
    if weight.ndim < 2:
        return "its weight is flat, as under FSDP1"
    if not is_distributed(weight) and not is_distributed(gradient):
        return ""
    if not is_distributed(weight) or not is_distributed(gradient):
        return "of weight and gradient only one is a DTensor"
    mine, its = weight.placements, gradient.placements  # type: ignore[attr-defined]
    is_known = all(placement.is_replicate() or getattr(placement, "dim", 2) < 2 for placement in mine)
    if mine != its or not is_known or _is_striped(weight):
        return f"the placements of its weight are {mine} and of its gradient {its}"
    return ""


def _cuts(tensor: Tensor, axis: int) -> tuple[int, ...]:
    """
    The dimensions of the mesh that cut an axis, in the order in which they do. What `fully_shard` cuts on top of a
    tensor-parallel plan has a split factor: later dimensions come first.
    """
    order: list[int] = []
    for dimension, placement in reversed(list(enumerate(tensor.placements))):  # type: ignore[attr-defined]
        if tensor.device_mesh.size(dimension) > 1 and getattr(placement, "dim", None) == axis:  # type: ignore[attr-defined]
            order.insert(len(order) if hasattr(placement, "split_factor") else 0, dimension)
    return tuple(order)


def _is_striped(tensor: Tensor) -> bool:
    """Whether a process holds stripes of an axis: the split factor of a cut is no count of what was cut before."""
    mesh: DeviceMesh = tensor.device_mesh  # type: ignore[attr-defined]
    for dimension, placement in enumerate(tensor.placements):  # type: ignore[attr-defined]
        if hasattr(placement, "split_factor") and mesh.size(dimension) > 1:
            later = [mesh.size(other) for other in _cuts(tensor, placement.dim) if other > dimension]
            if placement.split_factor != math.prod(later):
                return True
    return False


def align_(parameters: Iterable[Tensor]) -> None:
    """
    Place gradients as their parameters are. Tensor-parallel plans leave those of embeddings whole on every process
    beside weights in parts.

    Raises:
        RuntimeError: a gradient is a DTensor and its parameter is none.
    """
    for parameter in parameters:
        gradient = parameter.grad
        if gradient is None or not is_distributed(gradient):
            continue
        if not is_distributed(parameter):
            raise RuntimeError(
                f"A parameter of shape {tuple(parameter.shape)} is no DTensor, but its gradient is one, placed as "
                f"{gradient.placements}: distribute the parameter, too, with `distribute_tensor` or a plan that "  # type: ignore[attr-defined]
                "names its module."
            )
        if gradient.placements != parameter.placements:  # type: ignore[attr-defined]
            parameter.grad = gradient.redistribute(parameter.device_mesh, parameter.placements)  # type: ignore[attr-defined]


def is_distributed(tensor: Tensor) -> bool:
    """Whether it is a `DTensor`, whose import takes a second that only those who have one should pay for."""
    return hasattr(tensor, "device_mesh")


def local(tensor: Tensor) -> Tensor:
    """The part of a tensor that this process holds, in the same memory."""
    part: Tensor = tensor.to_local() if is_distributed(tensor) else tensor  # type: ignore[attr-defined]
    return part


def zeros_of_rows(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Zeros `(n, 1)`, distributed as the rows of a tensor `(n, d)`: what a row is cut into has all of them."""
    rows = local(tensor).new_zeros(len(local(tensor)), 1, dtype=dtype)
    if not is_distributed(tensor):
        return rows
    from torch.distributed.tensor import DTensor, Replicate

    placements = [Replicate() if getattr(p, "dim", None) == 1 else p for p in tensor.placements]  # type: ignore[attr-defined]
    mesh: DeviceMesh = tensor.device_mesh  # type: ignore[attr-defined]
    return DTensor.from_local(
        rows, mesh, placements, run_check=False, shape=torch.Size([len(tensor), 1]), stride=(1, 1)
    )


def whole_sum(tensor: Tensor, value: Tensor) -> Routine[Tensor]:
    """The sum over all processes that hold parts of a tensor, in whatever way."""
    for dimension, placement in enumerate(getattr(tensor, "placements", ())):
        mesh: DeviceMesh = tensor.device_mesh  # type: ignore[attr-defined]
        if not placement.is_replicate() and mesh.size(dimension) > 1:
            (value,) = yield Sum(mesh, dimension, (value,))
    return value
