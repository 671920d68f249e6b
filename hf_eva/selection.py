"""Which layers of a model are preconditioned, and for each other layer the reason why not."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import groupby

import torch
from torch import nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from .config import EvaConfig
from .layers import Layer, LayerKind, Wanted, kind_of, working_dtype
from .shards import is_distributed

Filter = str | Sequence[str]


@dataclass(frozen=True)
class PlanRow:
    """One module that owns weights. `reason` is empty where its weight is preconditioned."""

    name: str
    kind: str
    shape: tuple[int, ...]
    reason: str
    state_bytes: int
    adamw_bytes: int


@dataclass(frozen=True)
class Plan:
    """
    What [`plan`] found: `layers` are preconditioned, `rows` describe every module that owns parameters or quantized
    weights. Printing it gives a table in which the repeated layers of a stack share a line. `sent_bytes` is what each
    of several processes sends in a step beside the gradients, in one all-reduce: 0 where no inputs are looked at.
    """

    model: nn.Module
    layers: tuple[Layer, ...]
    rows: tuple[PlanRow, ...]
    sent_bytes: int = 0

    @property
    def state_bytes(self) -> int:
        """Bytes of optimizer state of the whole model."""
        return sum(row.state_bytes for row in self.rows)

    @property
    def adamw_bytes(self) -> int:
        """Bytes of state that `torch.optim.AdamW` keeps for the same parameters."""
        return sum(row.adamw_bytes for row in self.rows)

    def summary(self) -> str:
        """
        One sentence: how many layers, what share of the trainable parameters, the state against AdamW's, and what is
        sent.
        """
        weights = sum(layer.weight.numel() for layer in self.layers)
        trainable = sum(p.numel() for p in self.model.parameters() if p.requires_grad)
        return (
            f"{len(self.layers)} layers preconditioned, {_ratio(weights, trainable)} of {trainable:,} trainable "
            f"parameters; optimizer state {_megabytes(self.state_bytes)}, "
            f"{_ratio(self.state_bytes, self.adamw_bytes)} of AdamW's {_megabytes(self.adamw_bytes)}"
            + (f"; {_megabytes(self.sent_bytes)} sent in a step of several processes" if self.sent_bytes else "")
        )

    def __str__(self) -> str:
        table = [("layer", "kind", "shape", "preconditioned", "state", "of AdamW's")]
        for rows in _stacked(self.rows):
            first, count = rows[0], len(rows)
            state, adamw = sum(row.state_bytes for row in rows), sum(row.adamw_bytes for row in rows)
            table.append(
                (
                    _joined_name([row.name for row in rows]) + (f"  (×{count})" if count > 1 else ""),
                    first.kind,
                    "×".join(map(str, first.shape)),
                    f"no: {first.reason}" if first.reason else "yes",
                    _megabytes(state) if state else "-",
                    _ratio(state, adamw) if state else "-",
                )
            )
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        lines = [
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in table
        ]
        return "\n".join([lines[0], "  ".join("-" * width for width in widths), *lines[1:], self.summary()])


def plan(
    model: nn.Module,
    include: Filter | None = None,
    exclude: Filter | None = None,
    config: EvaConfig | None = None,
) -> Plan:
    """
    Choose the layers to precondition, by structure and not by name.

    In: `nn.Linear`, GPT-2's `Conv1D` and ungrouped `nn.Conv2d` whose weight is trained, LoRA's matrices among them.
    Out: embeddings, norms, output embeddings (tied or not), frozen and quantized weights, subclasses of the three.

    Args:
        model (`nn.Module`): the model; it may be on the meta device.
        include (`str` or list of `str`, *optional*): the only modules to precondition, in the sense of Trainer's
            `optim_target_modules`: a string is a regular expression for the whole module name, each entry of a list a
            name, a part of one or a regular expression, and `"all-linear"` stands for every linear layer. What is
            named here is taken even where it is an untied output embedding.
        exclude (`str` or list of `str`, *optional*): modules to leave out, in the same sense.
        config (`EvaConfig`, *optional*): decides the bytes of state in the table.

    Raises:
        ValueError: a filter matches no linear layer (near misses are named), or no layer is left to precondition.
    """
    config = config or EvaConfig()
    modules = {name: module for name, module in model.named_modules(remove_duplicate=True) if name or _owned(module)}
    candidates = {name: kind for name, module in modules.items() if (kind := kind_of(module)) is not None}
    included = _matcher(include, candidates, "include")
    excluded = _matcher(exclude, candidates, "exclude")
    shared = _shared_weights(modules)
    outputs = set() if include is not None else _output_embeddings(model)

    layers, rows, counted = [], [], set[int]()
    embeddings = {id(module.weight) for module in embeddings_of(model, config)}
    for name, module in modules.items():
        owned, packed = _owned(module), _quantized(module)
        if not owned and packed is None:
            continue
        kind = candidates.get(name)
        if packed is not None:
            reason = f"quantized ({str(packed.dtype).removeprefix('torch.')})"
        elif kind is None:
            reason = _not_linear(module)
        elif id(module) in outputs:
            reason = "output embedding"
        else:
            reason = _not_taken(name, module, kind, shared, included, excluded)
        if config.variant == "none" and not reason:
            reason = "variant 'none' switches preconditioning off"
        layer = None
        if kind is not None and not reason:
            layer = Layer(name, module, kind)
            layers.append(layer)
        fresh = {id(p): p for p in owned.values() if p.requires_grad and id(p) not in counted}
        counted.update(fresh)
        weight = packed if packed is not None else owned.get("weight", next(iter(owned.values())))
        rows.append(
            PlanRow(
                name=name or "(model)",
                kind=kind.name if kind else type(module).__name__,
                shape=layer.shape if layer else tuple(weight.shape),
                reason=reason,
                state_bytes=sum(_state_bytes(p, layer, config, id(p) in embeddings) for p in fresh.values()),
                adamw_bytes=sum(_adamw_bytes(p) for p in fresh.values()),
            )
        )
    if not layers and config.variant != "none":
        reasons = "; ".join(sorted({row.reason for row in rows})) or "it has no parameters"
        advice = "for other models use torch.optim.AdamW"
        if "quantized" in reasons:
            advice = "on quantized weights train adapters, such as PEFT's LoRA"
        raise ValueError(
            f"{type(model).__name__} has no layer to precondition ({reasons}). Eva needs a trainable nn.Linear, "
            f"Conv1D or Conv2d; {advice}."
        )
    if layers:
        layers[-1] = replace(layers[-1], reach=reach_of(layers[-1], modules))
    return Plan(model, tuple(layers), tuple(rows), _sent_bytes(layers, config))


def reach_of(last: Layer, modules: Mapping[str, nn.Module]) -> float:
    """
    How many times as long as others the steps of the last layer are: `sqrt(d_in / d_out)`, at least 1, where it is the
    head of a model, linear and in no list of blocks. So its update is as large, as a whole, as that of a square layer
    with the same inputs. A head of few classes whose entries move as those of other layers lags behind its model,
    which goes meanwhile where a random head tells it to.
    """
    parents = [last.name[: dot.start()] for dot in re.finditer(r"\.", last.name)]
    if last.kind.name == "Conv2d" or any(isinstance(modules[name], nn.ModuleList) for name in parents):
        return 1.0
    d_out, d_in = last.shape
    return max(1.0, math.sqrt(d_in / d_out))


def embeddings_of(model: nn.Module, config: EvaConfig) -> list[nn.Embedding]:
    """The modules whose weight keeps one second moment per row, see [`base.row_adamw_`]; none where Eva is off."""
    if not _has_embeddings(config):
        return []
    return [module for module in model.modules() if isinstance(module, nn.Embedding)]


def tables_of(model: nn.Module, config: EvaConfig) -> list[tuple[nn.Module, str]]:
    """
    Embeddings that modules hold themselves and add to every row of a batch, such as a ViT's `position_embeddings`
    and `cls_token`, of shape `(1, n, d)`: the modules, and the names of the parameters. None where Eva is off.
    """
    if not _has_embeddings(config):
        return []
    return [
        (module, name)
        for module in model.modules()
        for name, parameter in module.named_parameters(recurse=False)
        if parameter.ndim > 2 and len(parameter) == 1 and re.search("emb|token", name)
    ]


def _has_embeddings(config: EvaConfig) -> bool:
    """Whether embeddings get another step than AdamW's."""
    return config.base == "adamw" and config.variant != "none"


def statistics_shapes(layer: Layer, config: EvaConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of each running statistic that the optimizer keeps for a layer; matrices are bases."""
    d_out, d_in = layer.shape
    shapes: dict[str, tuple[int, ...]] = {"eva_updates": ()}
    if config.needs_inputs:
        vectors: dict[str, tuple[int, ...]] = {"eva_a": (d_in,)}
        if config.needs_output_gradients:
            vectors["eva_g"] = (d_out,)
        shapes |= vectors | {f"{key}_square": () for key in vectors if config.needs_traces}
    elif config.curvature == "joint":
        shapes |= {f"eva_v{axis}": (size,) for axis, size in enumerate(layer.weight.shape)}
    else:
        shapes |= {"eva_a": (d_in, min(config.rank, d_in)), "eva_g": (d_out, min(config.rank, d_out))}
    if config.base == "adamw":
        shapes |= {"eva_rows": (d_out,)}
    has_subspaces = config.variant == "eva_s" and config.curvature == "factored"
    if config.base == "adamw" and has_subspaces:
        shapes |= {"eva_agreement": (2,), "eva_momentum_square": ()}
    if config.base == "adamw" or has_subspaces:
        shapes |= {"eva_square": ()}
    return shapes


def momentum_dtype(config: EvaConfig) -> torch.dtype | None:
    """
    What the momentum of planned layers and the first moment of embeddings are kept in; `None` where the first is in
    working precision and the second in that of its parameter.
    """
    return torch.bfloat16 if config.momentum_dtype == "bfloat16" else None


def _owned(module: nn.Module) -> dict[str, nn.Parameter]:
    return dict(module.named_parameters(recurse=False))


def _quantized(module: nn.Module) -> torch.Tensor | None:
    """Weights in fewer bits than a float has, in a module of any class: a parameter, or as in GPTQ a buffer."""
    buffers = [b for name, b in module.named_buffers(recurse=False) if name.endswith("weight") and b.ndim > 1]
    for tensor in (*_owned(module).values(), *buffers):
        if tensor.dtype.itemsize < 2 or not (tensor.is_floating_point() or tensor.is_complex()):
            return tensor
    return None


def _not_linear(module: nn.Module) -> str:
    if isinstance(module, nn.Embedding | nn.EmbeddingBag):
        return "embedding"
    if "norm" in type(module).__name__.lower():
        return "norm"
    if isinstance(module, nn.Linear | nn.Conv2d):
        return f"{type(module).__name__} is a subclass of a layer that is known"
    return "not a linear layer"


def _not_taken(
    name: str,
    module: nn.Module,
    kind: LayerKind,
    shared: dict[int, list[str]],
    included: Callable[[str], bool],
    excluded: Callable[[str], bool],
) -> str:
    weight = module.weight
    if not isinstance(weight, nn.Parameter):
        return "its weight is computed from other parameters"
    if weight.ndim < 2:
        return "its weight is flat, as under FSDP1: use FSDP2"
    if weight.is_complex():
        return f"complex ({str(weight.dtype).removeprefix('torch.')})"
    # What packs numbers in a dtype that it calls its own, as torchao's quantized tensors do.
    if is_traceable_wrapper_subclass(weight) and not is_distributed(weight):
        return f"its weight is a {type(weight).__name__}"
    if not weight.requires_grad:
        return "frozen"
    others = [other for other in shared[id(weight)] if other != name]
    if others:
        return f"shares its weight with {others[0]}"
    if excluded(name):
        return "excluded"
    if not included(name):
        return "not included"
    return kind.unsupported(module) or ""


def _shared_weights(modules: dict[str, nn.Module]) -> dict[int, list[str]]:
    """The names of the modules that own each parameter, by the parameter's id: two owners mean tied weights."""
    owners: dict[int, list[str]] = {}
    for name, module in modules.items():
        for _, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            owners.setdefault(id(parameter), []).append(name)
    return owners


def _output_embeddings(model: nn.Module) -> set[int]:
    """The ids of the modules that models call their output embeddings; a wrapper may answer like its inner model."""
    found = set()
    for module in model.modules():
        get_output_embeddings = getattr(module, "get_output_embeddings", None)
        if callable(get_output_embeddings):
            with suppress(NotImplementedError):  # what models without a vocabulary may answer
                found.add(id(get_output_embeddings()))
    return found


def _matcher(wanted: Filter | None, candidates: dict[str, LayerKind], role: str) -> Callable[[str], bool]:
    """The filter as a predicate on module names, checked against the layers that there are."""
    if wanted is None:
        return lambda name: role == "include"
    if isinstance(wanted, str) and wanted.replace("_", "-") == "all-linear":
        return lambda name: True
    patterns = [wanted] if isinstance(wanted, str) else list(wanted)
    try:
        compiled = [re.compile(pattern) for pattern in patterns]
    except re.error as error:
        raise ValueError(f"{role}={wanted!r} is not a regular expression: {error}.") from None

    def matches(name: str) -> bool:
        by_part = not isinstance(wanted, str) and any(pattern in name for pattern in patterns)
        return by_part or any(pattern.fullmatch(name) for pattern in compiled)

    if not any(map(matches, candidates)):
        near = [
            name
            for pattern in patterns
            for name in candidates
            if difflib.get_close_matches(pattern, [name, name.rpartition(".")[2]], n=1)
        ]
        examples = (near or list(candidates))[:3]
        raise ValueError(
            f"{role}={wanted!r} matches no linear layer of the model"
            + (f": {'near misses are' if near else 'there are'} {', '.join(examples)}." if examples else ".")
        )
    return matches


def _adamw_bytes(parameter: nn.Parameter) -> int:
    return 2 * parameter.numel() * parameter.element_size()


def _state_bytes(parameter: nn.Parameter, layer: Layer | None, config: EvaConfig, is_embedding: bool) -> int:
    """Bytes of the tensors that [`Eva`] keeps for a parameter; scalars are not counted, as in `_adamw_bytes`."""
    copy = parameter.numel() * parameter.element_size()
    low = momentum_dtype(config)
    if is_embedding and not (layer and parameter is layer.weight):
        momentum = parameter.numel() * (low or parameter.dtype).itemsize
        return momentum + len(parameter) * working_dtype(parameter).itemsize
    if layer is None or parameter is not layer.weight:
        return 2 * copy if config.base == "adamw" else copy * (config.momentum > 0)
    size = working_dtype(parameter).itemsize
    momentum = copy * (config.momentum > 0)
    if config.base == "adamw":
        momentum = parameter.numel() * (low.itemsize if low else size)
    return momentum + size * sum(math.prod(shape) for shape in statistics_shapes(layer, config).values() if shape)


def _sent_bytes(layers: Sequence[Layer], config: EvaConfig) -> int:
    if not layers or not config.needs_inputs:
        return 0
    numbers = sum(sum(layer.sizes_of_sums(Wanted.by(config))) for layer in layers)
    return numbers * max(working_dtype(layer.weight).itemsize for layer in layers)


def _stacked(rows: Sequence[PlanRow]) -> Iterator[list[PlanRow]]:
    """Rows that differ in the numbers of their names only, together, in the order of the first of each."""
    order: dict[tuple[object, ...], int] = {}
    for row in rows:
        order.setdefault(_stack_key(row), len(order))
    ordered = sorted(rows, key=lambda row: order[_stack_key(row)])
    for _, group in groupby(ordered, key=_stack_key):
        yield list(group)


def _stack_key(row: PlanRow) -> tuple[object, ...]:
    return re.sub(r"\d+", "#", row.name), row.kind, row.shape, row.reason


def _joined_name(names: Sequence[str]) -> str:
    """`layer.0.query`, `layer.1.query`, … as `layer.{0-1}.query`."""
    columns = zip(*(re.split(r"(\d+)", name) for name in names), strict=True)
    return "".join(
        column[0] if len(set(column)) == 1 else f"{{{min(map(int, column))}-{max(map(int, column))}}}"
        for column in columns
    )


def _ratio(part: int, whole: int) -> str:
    return f"{part / whole:.0%}" if whole else "-"


def _megabytes(size: int) -> str:
    return f"{size / 2**20:.1f} MiB" if size >= 2**20 else f"{size / 2**10:.1f} KiB"
