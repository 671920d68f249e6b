"""
The rules that turn gradients or preconditioned directions into new weights, on lists of tensors.

Where a rule is given `sound`, a 0-dim tensor of booleans that is False, nothing changes.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw
from torch.optim.sgd import sgd

from .shards import local, zeros_of_rows
from .soundness import replace_unless_

State = MutableMapping[Tensor, dict[str, Tensor]]

BLOCK = 2**18  # elements, of which a cache holds a few times as many
BLOCK_ELSEWHERE = 2**24  # of what is computed in a higher precision than it is kept in, and needs room for that
FUSED_DEVICES = ("cpu", "cuda", "mps", "xpu")  # that torch's fused rules know


def can_fuse(params: Iterable[Tensor | dict[str, Any]]) -> bool:
    """
    Whether torch's fused AdamW and SGD serve all parameters, or groups of them: on a CPU, in low precision, AdamW
    loses digits and torch 2.13's SGD computes something else.
    """
    groups = (entry["params"] if isinstance(entry, dict) else [entry] for entry in params)
    tensors = [tensor for group in groups for tensor in ([group] if isinstance(group, Tensor) else group)]
    precise = all(tensor.dtype in (torch.float32, torch.float64) for tensor in tensors if tensor.device.type == "cpu")
    return precise and all(tensor.device.type in FUSED_DEVICES and tensor.is_floating_point() for tensor in tensors)


def longer(group: Mapping[str, Any], factor: float) -> dict[str, Any]:
    """The options of a group for steps that are `factor` times as long, with the same decoupled weight decay."""
    return {**group, "lr": group["lr"] * factor, "weight_decay": group["weight_decay"] / factor}


def adamw_(parameters: Sequence[Tensor], state: State, group: Mapping[str, Any], sound: Tensor | None = None) -> None:
    """One step of `torch.optim.AdamW`, through its functional form and with its state, for parameters with `.grad`."""
    for parameter in parameters:
        entry = state[parameter]
        if "exp_avg" not in entry:
            # Where and in which precision AdamW counts its steps: on the device only for the fused kernel.
            on_device = {"dtype": torch.float32, "device": parameter.device}
            entry["step"] = torch.zeros((), **(on_device if group["fused"] else {"dtype": _step_dtype()}))
            entry["exp_avg"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
            entry["exp_avg_sq"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
    entries = [state[parameter] for parameter in parameters]
    beta1, beta2 = group["betas"]
    # Steps that are counted on the host go on: to undo one, the host would have to wait for the device.
    kept = [t for p, entry in zip(parameters, entries, strict=True) for t in entry.values() if t.device == p.device]
    with _undone_unless(sound, group["fused"], [*parameters, *kept]) as found_inf:
        adamw(
            [local(parameter) for parameter in parameters],
            [_grad(parameter) for parameter in parameters],
            [local(entry["exp_avg"]) for entry in entries],
            [local(entry["exp_avg_sq"]) for entry in entries],
            [],
            [entry["step"] for entry in entries],
            foreach=group["foreach"],
            fused=group["fused"],
            found_inf=found_inf,
            amsgrad=False,
            beta1=beta1,
            beta2=beta2,
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )


def row_adamw_(
    parameters: Sequence[Tensor],
    squares: Sequence[Tensor],
    state: State,
    group: Mapping[str, Any],
    sound: Tensor | None = None,
    momentum_dtype: torch.dtype | None = None,
) -> None:
    """
    AdamW with one second moment per row, the mean over its entries; for embeddings, whose rows are the parameters of
    one token each. `squares` are the [`mean_squares`] of the gradients' whole rows, and `momentum_dtype` is what the
    first moment is kept in, by default that of the parameter.
    """
    beta1, beta2 = group["betas"]
    for parameter, square in zip(parameters, squares, strict=True):
        entry = state[parameter]
        if "exp_avg" not in entry:
            precise = torch.promote_types(parameter.dtype, torch.float32)
            entry["step"] = torch.zeros((), dtype=precise, device=parameter.device)
            entry["exp_avg"] = torch.zeros_like(parameter, dtype=momentum_dtype, memory_format=torch.preserve_format)
            entry["exp_avg_sq"] = zeros_of_rows(parameter, precise)
        here = None if sound is None else sound.to(parameter.device)
        entry["step"] += 1 if here is None else here
        start1, start2 = 1 - beta1 ** entry["step"], 1 - beta2 ** entry["step"]
        # An average of itself stays as it is, to the last bit.
        second = local(entry["exp_avg_sq"])
        second.lerp_(replace_unless_(here, square.to(second.dtype), second), 1 - beta2)
        scales = replace_unless_(here, ((second / start2).sqrt().add_(group["eps"]) * start1).reciprocal_(), 0.0)
        tensors = local(parameter), _grad(parameter), local(entry["exp_avg"]), scales
        size = _block_size(*tensors[1:3])
        per_block = len(parameter) if size is None else max(1, size // parameter.shape[1])
        for weight, grad, first, scale in zip(*(t.split(per_block) for t in tensors), strict=True):
            update = _averaged_(first, replace_unless_(here, grad, first), 1 - beta1)
            decoupled_([weight], [update], [scale], group["lr"], group["weight_decay"], here)


def mean_squares(parameter: Tensor) -> Tensor:
    """
    The mean square of each row that this process holds of a gradient `(n, d)`, of shape `(n, 1)`; where it holds some
    columns of it, their share of that mean.
    """
    rows = _grad(parameter)
    norms: Tensor = torch.linalg.vector_norm(
        rows, dim=1, keepdim=True, dtype=torch.promote_types(rows.dtype, torch.float32)
    )
    return norms.square() / parameter.shape[1]


def sgd_(
    parameters: Sequence[Tensor],
    state: State,
    group: Mapping[str, Any],
    momentum: float,
    nesterov: bool,
    sound: Tensor | None = None,
) -> None:
    """One step of `torch.optim.SGD`, through its functional form and with its state, for parameters with `.grad`."""
    buffers = [sgd_buffer(parameter, state) if momentum else None for parameter in parameters]
    # The fused one takes no sparse gradient.
    fused = group["fused"] and not any(_grad(parameter).is_sparse for parameter in parameters)
    kept = [buffer for buffer in buffers if buffer is not None]
    with _undone_unless(sound, fused, [*parameters, *kept]) as found_inf:
        sgd(
            [local(parameter) for parameter in parameters],
            [_grad(parameter) for parameter in parameters],
            [None if buffer is None else local(buffer) for buffer in buffers],
            foreach=group["foreach"],
            fused=fused,
            found_inf=found_inf,
            weight_decay=group["weight_decay"],
            momentum=momentum,
            lr=group["lr"],
            dampening=0.0,
            nesterov=nesterov,
            maximize=False,
        )


def directed_sgd_(
    matrices: Sequence[Tensor],
    left: Tensor,
    right: Tensor,
    scale: Tensor,
    group: Mapping[str, Any],
    momentum: float,
    nesterov: bool,
) -> None:
    """
    One step of `torch.optim.SGD` along `scale · G + left @ right`, which is never written down, with a 0-dim `scale`.
    `matrices` are the weight, `G` and where there is one the momentum, contiguous and of one precision.
    """
    lr, weight_decay = group["lr"], group["weight_decay"]
    # In blocks of rows: what an operation reads, those before it have brought into the cache.
    rows = max(1, BLOCK // max(1, right.shape[1]))
    for columns, weight, grad, *buffers in zip(*(t.split(rows) for t in (left, *matrices)), strict=True):
        for buffer in buffers:
            buffer.addmm_(columns, right, beta=momentum).addcmul_(grad, scale)
            if weight_decay:
                buffer.add_(weight, alpha=weight_decay)
        if nesterov or not buffers:
            weight.addmm_(columns, right, beta=1 - lr * weight_decay, alpha=-lr).addcmul_(grad, scale, value=-lr)
        for buffer in buffers:
            weight.add_(buffer, alpha=-lr * (momentum if nesterov else 1))


def direct_(grad: Tensor, left: Tensor, right: Tensor, scale: Tensor) -> None:
    """`G ← scale · G + left @ right`, for a `G` of any precision and layout in memory."""
    precise = grad.to(left.dtype).contiguous()
    precise.flatten(1).mul_(scale).addmm_(left, right)
    if precise is not grad:
        grad.copy_(precise)


def sgd_buffer(parameter: Tensor, state: State) -> Tensor:
    """The momentum of SGD, in the precision of the parameter."""
    entry = state[parameter]
    if entry.get("momentum_buffer") is None:
        entry["momentum_buffer"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
    return entry["momentum_buffer"]


@contextmanager
def _undone_unless(sound: Tensor | None, fused: bool | None, tensors: Sequence[Tensor]) -> Iterator[Tensor | None]:
    """Yields what makes torch's fused rules skip a step; that of others is undone, at the price of a copy."""
    if sound is None or fused:
        yield None if sound is None else sound.logical_not().float()
        return
    parts = [local(tensor) for tensor in tensors]
    before = [part.clone() for part in parts]
    yield None
    for tensor, old in zip(parts, before, strict=True):
        torch.where(sound.to(tensor.device), tensor, old, out=tensor)


def momentum_(
    gradients: Sequence[Tensor],
    buffers: Sequence[Tensor],
    momentum: float,
    nesterov: bool,
    sound: Tensor | None = None,
) -> None:
    """
    `M ← β M + (1 − β) G`, then `G ← M`, or with Nesterov `G ← β M + (1 − β) G`; for contiguous tensors. Buffers may
    have a lower precision than gradients, which everything is computed in.
    """
    pairs = list(zip(gradients, buffers, strict=True))
    for gradient, buffer in pairs:
        replace_unless_(sound, gradient, buffer)  # an average of itself stays as it is, to the last bit
    if all(gradient.dtype == buffer.dtype for gradient, buffer in pairs) and _are_small(gradients):
        torch._foreach_lerp_(list(buffers), list(gradients), 1 - momentum)
        if nesterov:
            torch._foreach_lerp_(list(gradients), list(buffers), momentum)
        else:
            torch._foreach_copy_(list(gradients), list(buffers))
        return
    for pair in pairs:
        size = _block_size(*pair) or max(1, pair[0].numel())
        for gradient, buffer in zip(*(tensor.view(-1).split(size) for tensor in pair), strict=True):
            average = _averaged_(buffer, gradient, 1 - momentum)
            if nesterov:
                gradient.lerp_(average, momentum)
            else:
                gradient.copy_(average)


def _averaged_(average: Tensor, value: Tensor, weight: float) -> Tensor:
    """`average ← (1 − weight) average + weight value`; returned is what the average was before it was rounded."""
    if average.dtype == value.dtype:
        return average.lerp_(value, weight)
    dtype = torch.promote_types(average.dtype, value.dtype)
    precise = average.to(dtype, copy=True).lerp_(value.to(dtype), weight)
    average.copy_(precise)
    return precise


def _block_size(value: Tensor, average: Tensor) -> int | None:
    """Elements that are averaged at a time; `None` for all of them, and then both have one precision."""
    if value.device.type == "cpu":
        return BLOCK
    return None if value.dtype == average.dtype else BLOCK_ELSEWHERE


def decoupled_(
    parameters: Sequence[Tensor],
    updates: Sequence[Tensor],
    scales: Sequence[Tensor],
    lr: float,
    weight_decay: float,
    sound: Tensor | None = None,
) -> None:
    """`W ← (1 − lr · weight_decay) W − lr · scales · P`, for scales that broadcast, and are 0 where not `sound`."""
    every = list(zip(parameters, updates, scales, strict=True))
    for some in [every] if _are_small(parameters) else [[one] for one in every]:
        weights, directions, factors = zip(*some, strict=True)
        if sound is None:
            if weight_decay:
                torch._foreach_mul_(weights, 1 - lr * weight_decay)
        elif weight_decay:  # no factor: close to 1, it would lose its digits in low precision
            steps = [sound.to(weight.dtype) for weight in weights]
            torch._foreach_addcmul_(weights, weights, steps, value=-lr * weight_decay)
        torch._foreach_addcmul_(weights, directions, factors, value=-lr)


def _are_small(tensors: Sequence[Tensor]) -> bool:
    """
    Whether one operation after the other should be done on all tensors: on a CPU, those that are large are taken one
    by one, so that the second operation finds in the cache what it needs.
    """
    return tensors[0].device.type != "cpu" or sum(tensor.numel() for tensor in tensors) <= BLOCK


def _grad(parameter: Tensor) -> Tensor:
    assert parameter.grad is not None
    return local(parameter.grad)


def _step_dtype() -> torch.dtype:
    return torch.float64 if torch.get_default_dtype() == torch.float64 else torch.float32
