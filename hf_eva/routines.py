"""
Computations on one stack of layers that wait for others, so that what all stacks ask for is done at once.

A *routine* is a generator: it yields what it needs and is sent that. It may ask for sums over processes, where each of
them holds a part of its matrices (see [`shards`]), and for small mathematics, whose operations cost their start and
not their size, so that those of all stacks should be one (see [`at_once`]). [`together`] runs routines side by side.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Hashable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

T = TypeVar("T")
Tensors: TypeAlias = Sequence[Tensor]


class Sum(NamedTuple):
    """Tensors to be summed over the processes along one dimension of a mesh."""

    mesh: DeviceMesh
    dimension: int
    tensors: Tensors


class Call(NamedTuple):
    """Arguments `(n, …)` of a function that treats each of the n by itself, and returns one or more `(n, …)`."""

    function: Callable[..., Tensor | Tensors]
    arguments: Tensors
    options: tuple[tuple[str, Hashable], ...]


Request: TypeAlias = Sum | Sequence[Call]
Routine: TypeAlias = Generator[Request, Any, T]


def at_once(function: Callable[..., Any], *arguments: Tensors, **options: Hashable) -> Routine[list[Any]]:
    """
    The results of a function for one or several lists of arguments, tensors `(n, …)`, each of whose n it treats by
    itself. It is called once for all lists, of all routines, whose tensors have the same shapes but for n.
    """
    found: list[Any] = yield [Call(function, tensors, tuple(options.items())) for tensors in arguments]
    return found


def together(routines: Iterable[Routine[T]]) -> list[T]:
    """
    Run routines to their ends and return their results. Each is advanced until it waits, in order, so that one that
    never waits ends before the next begins. Then all that wait are answered: sums by one all-reduce for each group,
    device and precision, calls by one for each function and shape.
    """
    results: dict[int, T] = {}
    waiting: dict[int, tuple[Routine[T], Request]] = {}

    def advance(index: int, routine: Routine[T], answer: Any) -> None:
        try:
            waiting[index] = routine, routine.send(answer)
        except StopIteration as end:
            results[index] = end.value

    for index, routine in enumerate(routines):
        advance(index, routine, None)
    while waiting:
        answered, waiting = waiting, {}
        requests = {index: request for index, (_, request) in answered.items()}
        answers = _sums({index: request for index, request in requests.items() if isinstance(request, Sum)})
        answers |= _calls({index: request for index, request in requests.items() if not isinstance(request, Sum)})
        for index, (routine, _) in answered.items():
            advance(index, routine, answers[index])
    return [results[index] for index in sorted(results)]


def _calls(requests: dict[int, Sequence[Call]]) -> dict[int, list[Any]]:
    """What functions return."""
    kinds = {index: [_kind(call) for call in calls] for index, calls in requests.items()}
    alike: dict[Hashable, list[Call]] = {}
    for index, calls in requests.items():
        for kind, call in zip(kinds[index], calls, strict=True):
            alike.setdefault(kind, []).append(call)
    with _on_one_thread():
        found = {kind: iter(_called(calls)) for kind, calls in alike.items()}
    return {index: [next(found[kind]) for kind in of_calls] for index, of_calls in kinds.items()}


@contextmanager
def _on_one_thread() -> Iterator[None]:
    """
    What is small has been done before a second thread is there. LAPACK asks for one all the same, for every matrix:
    eigenvectors of 32 x 32 took ten times as long where threads that wait sleep.
    """
    threads = torch.get_num_threads()
    if threads == 1 or not torch.backends.openmp.is_available():  # other pools of threads keep their size
        yield
        return
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _kind(call: Call) -> Hashable:
    tensors = tuple((tensor.shape[1:], tensor.dtype, tensor.device) for tensor in call.arguments)
    return call.function, call.options, tensors


def _called(calls: Sequence[Call]) -> list[Any]:
    """The results of calls of one kind."""
    function, arguments, options = calls[0]
    if len(calls) == 1:
        return [function(*arguments, **dict(options))]
    joined = [torch.cat(tensors) for tensors in zip(*(call.arguments for call in calls), strict=True)]
    counts = [len(call.arguments[0]) for call in calls]
    result = function(*joined, **dict(options))
    if isinstance(result, Tensor):
        return list(result.split(counts))
    return list(zip(*(tensor.split(counts) for tensor in result), strict=True))


def _sums(requests: dict[int, Sum]) -> dict[int, Any]:
    """Sums over processes, in as few all-reduces as there can be."""
    buffers: dict[Hashable, list[Tensor]] = {}
    for request in requests.values():
        for tensor in request.tensors:
            buffers.setdefault(_group(request, tensor), []).append(tensor)
    found = {key: iter(_summed(key[0], key[1], tensors)) for key, tensors in buffers.items()}  # type: ignore[index]
    return {
        index: [next(found[_group(request, tensor)]) for tensor in request.tensors]
        for index, request in requests.items()
    }


def _group(request: Sum, tensor: Tensor) -> Hashable:
    return request.mesh, request.dimension, tensor.dtype, tensor.device


def _summed(mesh: DeviceMesh, dimension: int, tensors: Sequence[Tensor]) -> list[Tensor]:
    flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
    # What was offloaded to the host is summed where the processes are connected.
    there = flat.to(mesh.device_type) if flat.device.type != mesh.device_type else flat
    dist.all_reduce(there, group=mesh.get_group(dimension))
    parts = there.to(flat.device).split([tensor.numel() for tensor in tensors])
    return [part.view(tensor.shape) for part, tensor in zip(parts, tensors, strict=True)]
