"""The state of a training: how it follows a model that moves, and what of a saved one is not taken."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .config import EvaConfig
from .layers import Layer, working_dtype
from .selection import momentum_dtype, statistics_shapes

State = Mapping[Any, dict[str, Any]]


def follow_(state: State, groups: Iterable[Mapping[str, Any]], momenta: Mapping[int, str], config: EvaConfig) -> None:
    """
    Bring all state to the devices and the precision that the parameters and the config have now.

    Args:
        momenta: for the ids of parameters with statistics of their own, which are kept in working precision, the key
            of their momentum. The state of all others is torch's.
    """
    low = momentum_dtype(config)
    for group in groups:
        for parameter in group["params"]:
            own = momenta.get(id(parameter))
            for key, value in state.get(parameter, {}).items():
                is_torchs = own is None or (config.base == "sgd" and key == "momentum_buffer")
                dtype = parameter.dtype if is_torchs or key == "exp_avg" else working_dtype(parameter)
                if key != "step":
                    dtype = low if low and key == own else dtype
                    state[parameter][key] = value.to(parameter.device, dtype)
                elif own is not None or group["fused"]:  # otherwise torch counts on the host
                    state[parameter][key] = value.to(parameter.device)


def refuse_other(layers: Sequence[Layer], config: EvaConfig, saved: Mapping[int, dict[str, Tensor]]) -> None:
    """
    Raises:
        ValueError: a state, by the ids of weights, was saved with other layers or another config; the message lists
            the differences.
    """
    differences = [text for layer in layers if (text := _difference(layer, config, saved.get(id(layer.weight))))]
    if differences:
        more = f", and {len(differences) - 3} more" if len(differences) > 3 else ""
        raise ValueError(
            f"The saved state does not fit the planned layers and their config: {'; '.join(differences[:3])}"
            f"{more}. Resume with the settings of the saved run, or start without its optimizer state."
        )


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


def _difference(layer: Layer, config: EvaConfig, saved: dict[str, Tensor] | None) -> str:
    """How the saved state of a layer differs from what an optimizer keeps; nothing saved yet fits as well."""
    found = {key: tuple(value.shape) for key, value in (saved or {}).items() if key.startswith("eva_")}
    expected = statistics_shapes(layer, config)
    if not saved or found == expected:
        return ""
    return f"{layer.name} has {_listed(found) or 'no statistics'} where {_listed(expected)} is expected"


def _listed(shapes: dict[str, tuple[int, ...]]) -> str:
    return ", ".join(f"{key}{list(shape)}" for key, shape in sorted(shapes.items()) if shape)
