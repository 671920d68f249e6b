"""
Numbers that go wrong: which gradients no step is taken from, and how that is told.

One bad number in a gradient makes a step of all parameters worthless: what else came from the same forward and
backward pass may be finite and still be wrong. So a step is taken as a whole or not at all. The device decides: no
host waits for the answer, masks keep what must not change, and the warning comes when the answer arrives by itself.
"""

from __future__ import annotations

import logging
from collections import defaultdict, deque
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

logger = logging.getLogger(__name__)

LARGE = 2**16  # numbers, of which one norm takes longer than those of rows
LARGEST = 1e-6  # of the largest number that a precision holds: products of squares need room


def is_sound(squares: Tensor) -> Tensor:
    """Whether tensors with these squared norms are finite, and so is what a step makes of them."""
    return squares < torch.finfo(squares.dtype).max * LARGEST  # False for NaN


def can_read(tensor: Tensor) -> bool:
    """Whether the host has nothing to wait for when it reads a tensor."""
    return tensor.device.type == "cpu"


def squared_norms_of(gradients: Sequence[Tensor]) -> list[Tensor]:
    """`‖G‖²` of gradients or weights of any shape, as 0-dim tensors in working precision (float32 or float64)."""
    alike = defaultdict(list)
    for index, gradient in enumerate(gradients):
        values = gradient.coalesce().values() if gradient.is_sparse else gradient
        alike[values.device, torch.promote_types(values.dtype, torch.float32)].append((index, values))
    found: dict[int, Tensor] = {}
    for (_, dtype), members in alike.items():
        norms = torch._foreach_norm([_with_its_norm(values, dtype) for _, values in members], 2, dtype)
        squares = torch.stack(norms).square().unbind()
        found |= {index: square for (index, _), square in zip(members, squares, strict=True)}
    return [found[index] for index in range(len(gradients))]


def _with_its_norm(values: Tensor, dtype: torch.dtype) -> Tensor:
    """
    The norms of rows for what is large on a CPU: unlike the norm of a whole tensor, they are computed by all threads,
    and are sums of few numbers, whose rounding does not show.
    """
    if values.device.type != "cpu" or values.numel() < LARGE or values.ndim < 2 or not values.is_contiguous():
        return values
    rows: Tensor = torch.linalg.vector_norm(values.flatten(1), dim=1, dtype=dtype)
    return rows


def replace_unless_(sound: Tensor | None, new: Tensor, old: Tensor | float) -> Tensor:
    """Turn `new` into `old` where the 0-dim `sound` is False; `None` stands for True, here and in all rules."""
    return new if sound is None else new.copy_(torch.where(sound, new, old))


class Watch:
    """
    Judges the numbers that a step is made of, and says once of each parameter that its numbers forbade one.

    Args:
        name_of (callable): the name of a parameter for the reader, asked for only when there is something to say.
    """

    def __init__(self, name_of: Callable[[Tensor], str]) -> None:
        self._name_of = name_of
        self._told: set[str] = set()
        # What is on its way from a device: parameters, flags in pinned memory, and the event that says they are there.
        self._waiting: deque[tuple[list[Tensor], Tensor, Any]] = deque()

    def judge(self, squares: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
        """Whether all squared norms, 0-dim and each with its parameter, are sound, as a 0-dim tensor on a device."""
        alike = defaultdict(list)
        for parameter, square in squares:
            alike[square.device, square.dtype].append((parameter, square))
        verdicts = []
        for members in alike.values():
            flags = is_sound(torch.stack([square for _, square in members]))
            self._note([parameter for parameter, _ in members], flags)
            verdicts.append(flags.all())
        return torch.stack([verdict.to(verdicts[0].device) for verdict in verdicts]).all()

    def _note(self, parameters: list[Tensor], flags: Tensor) -> None:
        """Tell what flags say, or where they have yet to arrive, what earlier ones do."""
        if can_read(flags):
            self._tell(parameters, flags)
            return
        self._waiting.append((parameters, *_sent(flags)))
        while self._waiting and self._waiting[0][2].query():
            self._tell(*self._waiting.popleft()[:2])

    def _tell(self, parameters: list[Tensor], flags: Tensor) -> None:
        sound = flags.tolist()
        if all(sound):
            return
        found = [self._name_of(parameter) for parameter, flag in zip(parameters, sound, strict=True) if not flag]
        names = [name for name in dict.fromkeys(found) if name not in self._told]
        self._told.update(names)
        if names:
            more = f" and {len(names) - 8} more" if len(names) > 8 else ""
            logger.warning(
                "NaN, Inf or numbers whose squares overflow in the gradients or inputs of %s%s: such a step is "
                "skipped, and all weights, momentum and statistics stay as they were. If it goes on, lower the "
                "learning rate, clip gradients or look for such numbers in the data.",
                ", ".join(map(repr, names[:8])),
                more,
            )


def _sent(flags: Tensor) -> tuple[Tensor, Any]:
    """Flags on their way to the host, and the event that says that they have arrived."""
    copy = torch.empty(flags.shape, dtype=flags.dtype, pin_memory=True)
    copy.copy_(flags, non_blocking=True)
    event = torch.Event(flags.device)
    event.record()
    return copy, event
