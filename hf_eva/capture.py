"""
Statistics of inputs and output gradients, gathered while the model runs.

A forward hook sums what a layer receives and leaves a hook on the layer's output; when the backward pass comes by,
that one adds the sums, and those of the output gradient, to one flat buffer. Committing in the backward pass is what
makes the count exact: evaluation, generation and the repeated forward passes of gradient checkpointing never reach it,
and a module that is called twice is counted twice, as in `.grad`.

A window is what one optimizer step sees: any number of micro-batches. It ends in `Eva.step`; a window that is thrown
away without a step (an overflow under fp16) ends when the next forward pass finds all gradients cleared.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from . import traced
from .collectives import begin_sum_
from .layers import Layer, LayerKind, Sample, Wanted, working_dtype
from .masks import MaskScope, scopes_of
from .shards import is_distributed
from .traced import anchor_of

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Statistics:
    """
    Means of one layer over the tokens of a window and over all processes; `g` is a sum over tokens, like `bias.grad`.

    `tokens` is the number of tokens; 0 says that the layer was not used. `a_square` is the mean of `‖x‖²` and
    `g_square` is `N Σ‖δ‖²`, the traces of the two factors. Without output gradients `g` is empty and `g_square` 0, and
    so are both squares where none are wanted.
    """

    tokens: Tensor
    a: Tensor
    a_square: Tensor
    g: Tensor
    g_square: Tensor


class Capture:
    """
    Hooks on `layers` and the flat buffer they add to. Hooks reach this object through a weak reference, so that they
    go when it goes. With `mask_padding`, positions that the model's `attention_mask` calls padding do not count. While
    it `rests`, layers gather nothing, but for those in compiled graphs, whose sums [`Capture.start_window`] drops.

    Raises:
        ValueError: another live `Capture` is attached to one of the layers, or one is in parts by a tensor-parallel
            plan.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Sequence[Layer],
        wanted: Wanted,
        mask_padding: bool = True,
    ) -> None:
        self.layers, self.wanted = list(layers), wanted
        self.called: set[int] = set()  # layers whose hook has fired in training; read for a warning only
        self.rests = False
        self._buffer: Tensor | None = None
        self._place: tuple[torch.dtype, torch.device] | None = None
        self._sizes: list[list[int]] = []
        # Parts that `fully_shard` has made are put together for a forward pass.
        parts = int(any(hasattr(module, "set_requires_gradient_sync") for module in model.modules()))
        for layer in self.layers:
            if sum(not p.is_replicate() for p in getattr(layer.weight, "placements", ())) > parts:
                raise ValueError(_of_parts(layer))
            self._sizes.append(layer.sizes_of_sums(wanted))  # in the order of Statistics
            if any(isinstance(hook, _Hook) and hook.capture() for hook in layer.module._forward_hooks.values()):
                raise ValueError(
                    f"Layer {layer.name!r} already feeds another Eva optimizer: call detach() on that one first."
                )
        self._read: tuple[weakref.ref[Tensor], tuple[Any, ...], Tensor] | None = None
        self._starts = [0, *accumulate(map(sum, self._sizes))]
        handles: list[RemovableHandle] = []
        self.models, self.scopes = scopes_of(model, [layer.name for layer in self.layers])
        self.mask_padding, self.committed, self.warned, self.saw_float16 = mask_padding, False, False, False
        for name, scope in self.models.items():
            if mask_padding or not name:
                hook = _Hook(self, _before_model, _before_traced_model, scope)
                handles.append(model.get_submodule(name).register_forward_pre_hook(hook, with_kwargs=True))
        for index, layer in enumerate(self.layers):
            # First of all hooks: another may replace the output, and wanted is what the layer itself computed.
            hook = _Hook(self, _after_layer, _after_traced_layer, index)
            handles.append(layer.module.register_forward_hook(hook, prepend=True, with_kwargs=True))
        self._finalizer = weakref.finalize(self, _remove, handles)
        self.anchors: list[Tensor] = []
        self._allocated(self.layers[0].weight.device)

    def detach(self) -> None:
        """Remove all hooks from the model."""
        self._finalizer()

    def has_gradients(self, model: nn.Module) -> bool:
        """
        Whether gradients are waiting for a step. Of a sharded model they may be out of sight, in parameters that exist
        between two collectives only: its windows end in `Eva.step` and `Eva.zero_grad` alone.
        """
        is_sharded = hasattr(model, "set_requires_gradient_sync")
        return is_sharded or any(layer.weight.grad is not None for layer in self.layers)

    def start_window(self) -> None:
        """Forget what was gathered since the last step."""
        if self._buffer is not None and self._place == self._wanted_place():
            self._buffer.zero_()
        else:
            self._buffer = None
            self._allocated(self.layers[0].weight.device)

    def collect(self, scaler: Any = None) -> Callable[[], list[Statistics]]:
        """
        End the window, and where several processes train begin the one all-reduce of its sums, also in a process that
        called no layer: the others wait for it.

        A backward pass cannot begin it: none knows that it is the last before a step, or that a layer is not called
        once more, and what was sent could not be added to. Between it and the step gradients are clipped at most.

        Args:
            scaler (`GradScaler`, *optional*): what has multiplied the loss, and with it all output gradients.

        Returns:
            `Callable`: to be called once, before the next forward pass. It waits for the sums, begins a new window and
            returns the statistics, one entry per layer.

        Raises:
            RuntimeError: output gradients came in float16, and nothing tells what they were multiplied with.
        """
        if self.saw_float16 and scaler is None:
            raise RuntimeError(
                "Output gradients in float16 are multiplied by a loss scale, which their statistics must not be. Hand "
                "the scaler to the optimizer, as in create_eva_optimizer(..., grad_scaler=accelerator.scaler), or "
                "torch.amp.GradScaler(enabled=False) where there is none; EvaTrainer does so by itself. Or train in "
                "bfloat16, or take a variant that does not look at output gradients: 'eva_s' or 'eva_f'."
            )
        buffer = self._buffer
        assert buffer is not None
        if self._place != (wanted := self._wanted_place()):  # the model was moved, and then called in a compiled graph
            buffer = buffer.to(*wanted[::-1])
        return partial(self._receive, buffer, scaler, *begin_sum_(buffer))

    def _receive(self, buffer: Tensor, scaler: Any, processes: int, work: Any) -> list[Statistics]:
        # What the scaler makes of 1: it tells its scale by itself only to a host that waits for it.
        scale = 1.0 if scaler is None else scaler.scale(torch.ones((), dtype=buffer.dtype, device=buffer.device))
        if work is not None:
            work.wait()
        statistics = []
        for start, sizes in zip(self._starts, self._sizes, strict=False):
            tokens, a, a_square, g, g_square = buffer.narrow(0, start, sum(sizes)).split(sizes)
            count = tokens.clamp_min(1)
            # A process's gradients belong to its own mean loss; the loss of all is the mean over processes.
            g, g_square = g / processes / scale, count * (g_square / processes**2 / scale / scale)
            statistics.append(Statistics(tokens[0].clone(), a / count, (a_square / count).sum(), g, g_square.sum()))
        self.start_window()
        return statistics

    def input_sums(self, index: int, module: nn.Module, x: Tensor, rows: Tensor | str, sample: Sample) -> Tensor:
        """
        The sums of an input, in the order of [`Statistics`]. What the layer before has received as well, as query, key
        and value do, is read once.
        """
        kind, dtype = sample.kind, working_dtype(self.layers[index].weight)
        scope, key = self.scopes[index], None
        # A kind with sums of its own may make them differently for each module. Inference tensors count no changes.
        if type(kind).input_sums is LayerKind.input_sums and not x.is_inference():
            key = x._version, dtype, scope, scope.number, isinstance(rows, str)
            if self._read is not None and self._read[0]() is x and self._read[1] == key:
                return self._read[2]
        sums = sample.input_sums(module, x, dtype, None if isinstance(rows, str) else rows)
        self._read = None if key is None else (weakref.ref(x), key, sums)
        return sums

    def slot(self, index: int, device: torch.device) -> Tensor:
        """The part of the buffer that belongs to a layer."""
        return self._allocated(device).narrow(0, self._starts[index], sum(self._sizes[index]))

    def _allocated(self, device: torch.device) -> Tensor:
        """The buffer; allocated anew before the first call, because models are moved between the two."""
        if not self.called and self._buffer is not None:
            is_there = self._buffer.device == device and self._place == self._wanted_place()
            self._buffer = self._buffer if is_there else None
        if self._buffer is None:
            self._place = self._wanted_place()
            self._buffer = torch.zeros(sum(map(sum, self._sizes)), dtype=self._place[0], device=device)
            slots = self._buffer.split([sum(sizes) for sizes in self._sizes])
            self.anchors = [anchor_of(s, partial(_note, weakref.ref(self), i)) for i, s in enumerate(slots)]
        return self._buffer

    def _wanted_place(self) -> tuple[torch.dtype, torch.device]:
        """Where the buffer belongs: the highest precision of all layers, and the device of the first."""
        dtypes = (working_dtype(layer.weight) for layer in self.layers)
        return max(dtypes, key=lambda dtype: dtype.itemsize), self.layers[0].weight.device


class _Hook:
    """A hook that knows its capture by weak reference; a copied or unpickled model gets one that does nothing."""

    def __init__(self, capture: Capture, function: Callable[..., Any], traced: Callable[..., Any], *args: Any) -> None:
        self.capture = weakref.ref(capture)
        self.function, self.traced, self.args = function, traced, args

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        capture = self.capture()
        if capture is None or not torch.is_grad_enabled():
            return None
        function = self.traced if torch.compiler.is_compiling() else self.function
        return function(capture, *self.args, *args)

    def __reduce__(self) -> tuple[Any, ...]:
        return _unhooked, ()


def _unhooked() -> Any:
    return _no_operation


def _no_operation(*args: Any, **kwargs: Any) -> None:
    return None


def _before_model(
    capture: Capture, scope: MaskScope, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> None:
    # Inside a backward pass (checkpointing around the whole model) gradients can be missing without a new window.
    if scope.parent is None and not _in_backward() and not capture.has_gradients(module):
        capture.start_window()
    if capture.committed:
        capture.committed = False
        for other in capture.models.values():
            other.start()
    if capture.mask_padding:
        scope.enter(args, kwargs)


def _after_layer(capture: Capture, index: int, module: nn.Module, args: Any, kwargs: Any, output: Tensor) -> None:
    if capture.rests or not output.requires_grad:
        return
    layer, scope = capture.layers[index], capture.scopes[index]
    if is_distributed(layer.weight):
        raise RuntimeError(_of_parts(layer))
    x = args[0] if args else next(iter(kwargs.values()))
    # Reentrant checkpointing calls the layer again when its model may have been called with another batch.
    is_unclear = _in_backward() and scope.is_ambiguous
    rows = "all" if is_unclear else scope.rows(index, x)
    if isinstance(rows, str) and rows == "none":
        return
    sample = capture.wanted.sample(layer.kind, x)
    with torch.no_grad():
        sums = capture.input_sums(index, module, x, rows, sample)
    slot = capture.slot(index, output.device)
    capture.called.add(index)
    # On the tensor that holds the values: an in-place operation gives a view another gradient, but not its base.
    holder = output._base if output._is_view() and output._base is not None else output
    holder.register_hook(partial(_commit, weakref.ref(capture), index, sums, sample, slot, is_unclear))


def _of_parts(layer: Layer) -> str:
    return (
        f"Layer {layer.name!r} computes with a weight in parts, placed as {layer.weight.placements}, as tensor-"  # type: ignore[attr-defined]
        "parallel plans have it. What it receives and gives is in parts, too, which statistics of inputs and "
        "output gradients do not know: take variant 'eva_s', as the recipe does, or train with DDP or FSDP2."
    )


def _commit(
    reference: weakref.ref[Capture],
    index: int,
    sums: Tensor,
    sample: Sample,
    slot: Tensor,
    is_unclear: bool,
    grad: Tensor,
) -> None:
    """Add the sums of an input, and those of the output gradient where they are wanted, to a layer's slot."""
    capture = reference()
    if capture is None:
        return
    capture.committed = True
    if is_unclear and not capture.warned:
        capture.warned = True
        logger.warning(
            "Reentrant gradient checkpointing over several forward passes hides which positions of layer %r are "
            "padding: all of them count. Use `use_reentrant=False`.",
            capture.layers[index].name,
        )
    with torch.no_grad():
        inputs, outputs = slot.split([len(sums), len(slot) - len(sums)])
        inputs.add_(sums.to(inputs.device))
        if capture.wanted.output_gradients:
            capture.saw_float16 |= grad.dtype == torch.float16
            outputs.add_(sample.output_gradient_sums(grad, sums.dtype).to(outputs.device))


def _before_traced_model(
    capture: Capture, scope: MaskScope, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> None:
    traced.before_model(scope, capture.mask_padding, args, kwargs)


def _after_traced_layer(
    capture: Capture, index: int, module: nn.Module, args: Any, kwargs: Any, output: Tensor
) -> Tensor | None:
    if not output.requires_grad:
        return None
    if capture.wanted.output_gradients and output.dtype == torch.float16:
        capture.saw_float16 = True
    kind, anchor, scope = capture.layers[index].kind, capture.anchors[index], capture.scopes[index]
    return traced.after_layer(kind, anchor, scope, index, capture.wanted, module, args, kwargs, output)


def _note(reference: weakref.ref[Capture], index: int) -> None:
    """That a layer has been called in a compiled graph."""
    if (capture := reference()) is not None:
        capture.called.add(index)
        for scope in capture.models.values():
            scope.forget()


def _in_backward() -> bool:
    return torch._C._current_graph_task_id() != -1


def _remove(handles: list[RemovableHandle]) -> None:
    for handle in handles:
        handle.remove()
