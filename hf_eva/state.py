"""The state of a training: how it follows a model that moves, and what of a saved one is not taken."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from .layers import working_dtype

State = Mapping[Any, dict[str, Any]]


def follow_(state: State, groups: Iterable[Mapping[str, Any]], own: set[int], is_sgd: bool) -> None:
    """
    Bring all state to the devices and the precision that the parameters have now.

    Args:
        own: the ids of parameters with statistics of their own, which are kept in working precision; that of the
            others is torch's.
    """
    for group in groups:
        for parameter in group["params"]:
            for key, value in state.get(parameter, {}).items():
                is_like_weight = id(parameter) not in own or key == "exp_avg" or (is_sgd and key == "momentum_buffer")
                dtype = parameter.dtype if is_like_weight else working_dtype(parameter)
                if key != "step":
                    state[parameter][key] = value.to(parameter.device, dtype)
                elif id(parameter) in own or group["fused"]:  # otherwise torch counts on the host
                    state[parameter][key] = value.to(parameter.device)


def refuse_unsound(state: State, name_of: Callable[[Tensor], str]) -> None:
    """
    Raises:
        ValueError: a saved state holds numbers that are not finite.
    """
    for parameter, entry in state.items():
        for key, value in entry.items():
            local = value.to_local() if hasattr(value, "to_local") else value
            if isinstance(local, Tensor) and not torch.isfinite(local).all():
                raise ValueError(
                    f"The saved {key} of {name_of(parameter)!r} holds numbers that are not finite: load an earlier "
                    "checkpoint, or start without its optimizer state."
                )
