"""
Which positions of a layer's input are real tokens and which are padding, by the `attention_mask` of the batch.

A model may hold other models, each with a mask of its own: the towers of CLIP, the encoder and the decoder of T5. A
layer belongs to the innermost one, whatever the shapes of its inputs have in common with masks of others.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from typing import Any, Literal, TypeGuard

import torch
from torch import Tensor, nn


class MaskScope:
    """
    One model, the outermost or one inside it, and the mask that its last forward pass was given: 2-dim and 0 at
    padding, of any other value elsewhere (packed sequences are numbered), in front of, between or behind the tokens.

    A model that was called without one has no padding. What is not 2-dim, such as the additive masks that models make
    for their layers, says nothing about padding; then the mask of the surrounding model holds.
    """

    def __init__(self, model: nn.Module, parent: MaskScope | None) -> None:
        self.names = list(inspect.signature(model.forward).parameters)
        self.parent = parent
        self.start()
        self.number = 0  # of the last forward pass
        self._readers: set[int] = set()  # layers that have read positions of the batch in this forward pass
        self._mask: Tensor | None = None
        self._memory: tuple[int, tuple[int, ...]] | Tensor | None = None
        self._memory_mask: Tensor | None = None

    def start(self) -> None:
        """No forward pass is waiting for its backward pass."""
        self._calls, self._was_masked = 0, False

    @property
    def is_ambiguous(self) -> bool:
        """Whether several forward passes wait for their backward passes, and padding may differ between them."""
        return self._calls > 1 and self._was_masked

    def forget(self) -> None:
        """Let go of what an encoder has made."""
        self._memory = None

    def enter(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Take the mask from the arguments of a forward pass."""
        given = {**dict(zip(self.names, args, strict=False)), **kwargs}
        is_whole = "decoder_attention_mask" in self.names  # its encoder and its decoder are models of their own
        mask = given.get("decoder_attention_mask" if is_whole else "attention_mask")
        states = given.get("encoder_hidden_states")
        if _is_mask(mask):
            self._mask = mask.ne(0)
        elif is_whole and _is_mask(labels := given.get("labels")):
            self._mask = labels.ne(-100)  # a decoder that reads shifted labels is rarely given a mask
        elif self.parent is not None and (mask is not None or is_whole or states is not None):
            self._mask = self.parent._mask
        else:
            self._mask = None
        # A decoder's cross-attention also reads what the encoder has made, with the padding of that.
        mask = given.get("encoder_attention_mask")
        self._memory = _identity(states) if isinstance(states, Tensor) else None
        self._memory_mask = mask.ne(0) if _is_mask(mask) else None
        self._readers = set()
        if not torch.compiler.is_compiling():  # in graphs nothing is reentrant
            self.number += 1
            self._calls += 1
            self._was_masked |= self._mask is not None or self._memory_mask is not None

    def rows(self, layer: int, x: Tensor) -> Tensor | Literal["all", "none"]:
        """
        Which rows `(…, d)` of an input of a layer count: booleans in the order of the rows, or all or none of them.

        Where the rows are no positions of the batch, as in a pooled input, they count, unless the layer has also read
        the positions: embeddings of distances, which DeBERTa sends through its attention beside each micro-batch, have
        nothing to do with its size. (A single sentence with as many tokens as there are distances looks like them.)
        """
        if _is_same(x, self._memory):
            mask = self._memory_mask
        elif self._mask is None:
            return "all"
        elif x.shape[:-1] == self._mask.shape or (x.ndim == 2 and len(x) == self._mask.numel()):
            mask = self._mask
            self._readers.add(layer)
        else:
            return "none" if layer in self._readers else "all"
        return "all" if mask is None else mask.reshape(-1).to(x.device)


def scopes_of(model: nn.Module, layers: Iterable[str]) -> tuple[dict[str, MaskScope], list[MaskScope]]:
    """The models inside a model by name, outermost first, and for each layer, by name, the innermost around it."""
    scopes: dict[str, MaskScope] = {}

    def around(name: str) -> MaskScope | None:
        while name and (name := name.rpartition(".")[0]) not in scopes:
            pass
        return scopes.get(name)

    for name, module in model.named_modules():
        if not name or hasattr(module, "main_input_name"):  # what each model of transformers has
            scopes[name] = MaskScope(module, around(name) if name else None)
    return scopes, [around(name) or scopes[""] for name in layers]


def _is_mask(value: Any) -> TypeGuard[Tensor]:
    return isinstance(value, Tensor) and value.ndim == 2


def _identity(tensor: Tensor) -> Tensor | tuple[int, tuple[int, ...]]:
    # Not the object, except in a compiled graph: recomputation in a backward pass gives detached ones.
    return tensor if torch.compiler.is_compiling() else (tensor.data_ptr(), tuple(tensor.shape))


def _is_same(tensor: Tensor, known: Tensor | tuple[int, tuple[int, ...]] | None) -> bool:
    return tensor is known if torch.compiler.is_compiling() else known is not None and _identity(tensor) == known
