"""Every hyperparameter of Eva, once: default, range, help text, and the ways to read it from outside."""

from __future__ import annotations

import dataclasses
import difflib
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args, get_type_hints

Variant = Literal["eva", "eva_f", "eva_s", "none"]
Curvature = Literal["joint", "factored"]
DampingMode = Literal["relative", "absolute"]
GScale = Literal["sum", "mean"]
Base = Literal["adamw", "sgd"]
KLMode = Literal["clip", "rescale", "none"]
MomentumDtype = Literal["float32", "bfloat16"]


def _hyperparameter(
    default: Any,
    help: str,
    *,
    above: float | None = None,
    minimum: float | None = None,
    below: float | None = None,
    maximum: float | None = None,
) -> Any:
    bounds = {"above": above, "minimum": minimum, "below": below, "maximum": maximum}
    return field(default=default, metadata={"help": help, "bounds": bounds})


@dataclass(frozen=True)
class EvaConfig:
    """
    The hyperparameters of [`Eva`]. `EvaConfig()` is the recipe for transformers; [`EvaConfig.paper`] is the published
    algorithm. Learning rate, weight decay and the AdamW coefficients of the remaining parameters are arguments of the
    optimizer, as in `torch.optim.AdamW`. `EvaConfig.help()` maps each field to its help text.

    Raises:
        ValueError: a value is outside its range (the message states the range), or two values exclude each other.
    """

    variant: Variant = _hyperparameter(
        "eva_s",
        "Which statistics precondition a layer: 'eva' takes its inputs and output gradients, 'eva_f' its inputs only, "
        "'eva_s' its weight gradient only (no hooks), 'none' switches preconditioning off.",
    )
    curvature: Curvature = _hyperparameter(
        "factored",
        "'factored' damps the input side and the output side each by itself; 'joint' is the published form, one "
        "rank-one matrix per layer.",
    )
    rank: int = _hyperparameter(
        16,
        "Vectors kept per side of a layer, for variant 'eva_s' with curvature 'factored'; all others keep one.",
        minimum=1,
    )
    exponent: float = _hyperparameter(
        0.5,
        "Power of the inverse of each factor, curvature 'factored' only. With variant 'eva_s' and base 'adamw' this "
        "is for a layer whose gradients are noise: where they agree it is down to half of that, and up to one and a "
        "half times that where each takes back what those before it have asked for.",
        above=0.0,
        maximum=1.0,
    )
    damping: float = _hyperparameter(0.03, "Damping added to the curvature, in the unit of `damping_mode`.", above=0.0)
    damping_mode: DampingMode = _hyperparameter(
        "relative",
        "'relative' multiplies the damping by the size of the layer's curvature, so that it means the same under "
        "every loss scale and batch size; 'absolute' uses it as it is.",
    )
    decay: float = _hyperparameter(
        0.2, "Weight of the newest statistics in their running averages.", above=0.0, maximum=1.0
    )
    refresh_interval: int = _hyperparameter(
        1,
        "Steps from one refresh of the curvature to the next, after the first three, which always refresh it. In "
        "between, gradients are preconditioned with what is known, for less time.",
        minimum=1,
    )
    g_scale: GScale = _hyperparameter(
        "sum",
        "Scale of the output-gradient vector: its 'sum' over the tokens of a batch, or their 'mean' as in the "
        "authors' code. Matters with absolute damping only.",
    )
    mask_padding: bool = _hyperparameter(
        True,
        "Leave positions that a batch's `attention_mask` calls padding out of the means of inputs. Matters for "
        "variants 'eva' and 'eva_f' only.",
    )
    token_fraction: float = _hyperparameter(
        1.0,
        "Share of the examples in a micro-batch whose tokens the means of inputs and of output gradients are gathered "
        "from, for less time: its first ones, at least one. Matters for variants 'eva' and 'eva_f' only.",
        above=0.0,
        maximum=1.0,
    )
    base: Base = _hyperparameter(
        "adamw",
        "Rule that consumes the direction. 'adamw': momentum is preconditioned and scaled to four times the size of "
        "an AdamW update, weight decay is decoupled, all other parameters get AdamW. 'sgd': the gradient is "
        "preconditioned and every parameter gets SGD with momentum.",
    )
    momentum: float = _hyperparameter(0.9, "Momentum of the base rule.", minimum=0.0, below=1.0)
    nesterov: bool = _hyperparameter(True, "Use Nesterov momentum.")
    momentum_dtype: MomentumDtype = _hyperparameter(
        "float32",
        "Precision in which momentum is kept between steps, base 'adamw' only: 'bfloat16' halves the bytes of that of "
        "preconditioned layers and of embeddings. A step computes with it in the precision of the statistics, float32 "
        "or that of wider weights, and all other state stays as it is.",
    )
    kl_mode: KLMode = _hyperparameter(
        "none",
        "Size control over all preconditioned layers together, base 'sgd' only: 'clip' bounds the step by `kl_clip`, "
        "'rescale' restores the norm of the raw gradient, 'none' leaves the size alone.",
    )
    kl_clip: float = _hyperparameter(0.001, "Bound on the step in kl_mode 'clip'.", above=0.0)

    def __post_init__(self) -> None:
        types = get_type_hints(type(self))
        for f in dataclasses.fields(self):
            object.__setattr__(self, f.name, _parse(f.name, getattr(self, f.name), types[f.name]))
            _check_bounds(f.name, getattr(self, f.name), f.metadata["bounds"])
        keeps_one = self.variant != "eva_s" or self.curvature != "factored"
        if keeps_one and self.rank == type(self).rank:  # the default of the recipe, which nobody asked for here
            object.__setattr__(self, "rank", 1)
        if self.rank > 1 and keeps_one:
            raise ValueError(
                f"rank={self.rank} needs variant='eva_s' and curvature='factored', but variant={self.variant!r} with "
                f"curvature={self.curvature!r} keeps one vector per side: set rank=1 or change those two."
            )
        if self.base == "adamw" and self.kl_mode != "none":
            raise ValueError(
                f"kl_mode={self.kl_mode!r} needs base='sgd': base='adamw' already scales each layer by the size of an "
                "AdamW update."
            )
        if self.momentum_dtype != "float32" and (self.base != "adamw" or self.variant == "none"):
            raise ValueError(
                f"momentum_dtype={self.momentum_dtype!r} needs base='adamw' and preconditioning, but "
                f"base={self.base!r} with variant={self.variant!r} keeps momentum as torch.optim does, in the "
                "precision of the weights."
            )
        if self.nesterov and self.momentum == 0.0:
            raise ValueError("nesterov=True needs momentum above 0: set nesterov=False or a momentum in (0, 1).")

    @classmethod
    def paper(
        cls,
        variant: Literal["eva", "eva_f", "eva_s"] = "eva",
        *,
        damping: float = 0.03,
        decay: float = 0.95,
        kl_clip: float | None = None,
        momentum: float = 0.9,
        **changes: Any,
    ) -> EvaConfig:
        """
        The published algorithm (Zhang, Shi and Li, ICLR 2023, arXiv 2308.02123) with the authors' scales.

        Args:
            variant (`str`, defaults to `"eva"`): `"eva"`, `"eva_f"` (FOOF) or `"eva_s"` (Shampoo).
            damping (`float`, defaults to 0.03): the paper's γ.
            decay (`float`, defaults to 0.95): the paper's ξ, the weight of the *new* value in a running average.
            kl_clip (`float`, *optional*): the paper's κ. Defaults to 0.001, and for `"eva_s"`, which restores the
                gradient's norm layer by layer, to no clip.
            momentum (`float`, defaults to 0.9): momentum of SGD.
            changes: any other field of [`EvaConfig`].
        """
        if variant not in ("eva", "eva_f", "eva_s"):
            raise ValueError(f"The published variants are 'eva', 'eva_f' and 'eva_s', got {variant!r}.")
        clips = kl_clip is not None or variant != "eva_s"
        published = {
            "variant": variant,
            "curvature": "joint",
            "rank": 1,
            "damping": damping,
            "damping_mode": "absolute",
            "decay": decay,
            "g_scale": "mean",
            "base": "sgd",
            "momentum": momentum,
            "nesterov": False,
            "kl_mode": "clip" if clips else "none",
            "kl_clip": 0.001 if kl_clip is None else kl_clip,
        }
        return cls(**{**published, **changes})

    @classmethod
    def from_options(cls, options: Mapping[str, Any]) -> EvaConfig:
        """
        Build a config from named options, whose values may be strings (`{"rank": "8"}`). The extra option `preset`,
        one of `"recipe"`, `"paper_eva"`, `"paper_eva_f"` and `"paper_eva_s"`, gives the values of all other fields.

        Raises:
            ValueError: an option is unknown (near misses and all valid names are listed) or its value unusable.
        """
        options = dict(options)
        preset = options.pop("preset", None) or "recipe"
        if preset not in PRESETS:
            raise ValueError(f"Unknown preset {preset!r}: expected one of {', '.join(map(repr, PRESETS))}.")
        names = [f.name for f in dataclasses.fields(cls)]
        for name in options:
            if name not in names:
                near = difflib.get_close_matches(name, names, n=1)
                hint = f"did you mean {near[0]!r}? " if near else ""
                raise ValueError(f"Unknown Eva option {name!r}: {hint}valid options are preset, {', '.join(names)}.")
        if preset == "recipe":
            return cls(**options)
        variant = preset.removeprefix("paper_")
        if options.pop("variant", variant) != variant:
            raise ValueError(
                f"preset {preset!r} fixes the variant: leave it out, or choose the preset of that variant."
            )
        # paper() looks at its arguments (its KL clip depends on the variant), so they are parsed first.
        types = get_type_hints(cls)
        changes = {name: _parse(name, value, types[name]) for name, value in options.items()}
        return cls.paper(variant, **changes)  # type: ignore[arg-type]

    @classmethod
    def from_string(cls, text: str) -> EvaConfig:
        """Build a config from `"rank=8,damping=0.03"`; see [`EvaConfig.from_options`]."""
        return cls.from_options(parse_options(text))

    def to_dict(self) -> dict[str, str | int | float | bool]:
        """All fields as plain values; `EvaConfig(**config.to_dict()) == config`."""
        return dataclasses.asdict(self)

    def changes(self) -> dict[str, str | int | float | bool]:
        """The fields that differ from the default recipe, as plain values."""
        default = EvaConfig().to_dict()
        return {name: value for name, value in self.to_dict().items() if value != default[name]}

    @classmethod
    def help(cls) -> dict[str, str]:
        """The help text of every field."""
        return {f.name: f.metadata["help"] for f in dataclasses.fields(cls)}

    @property
    def needs_inputs(self) -> bool:
        """Whether the inputs of the layers have to be captured in the forward pass."""
        return self.variant in ("eva", "eva_f")

    @property
    def needs_output_gradients(self) -> bool:
        """Whether the output gradients of the layers have to be captured in the backward pass."""
        return self.variant == "eva"

    @property
    def needs_traces(self) -> bool:
        """Whether the mean squared norms of what is captured are needed beside the mean vectors."""
        return self.needs_inputs and self.curvature == "factored"

    @property
    def needs_products_only(self) -> bool:
        """Whether nothing but products of gradients with vectors is needed to precondition them."""
        return self.base == "sgd" and self.curvature == "joint"

    @property
    def divides_by_damping(self) -> bool:
        """Whether directions are divided by the damping after the formulas, which leave that to their caller."""
        return self.curvature == "joint" and self.needs_inputs and self.damping_mode == "absolute"

    @property
    def includes_bias(self) -> bool:
        """Whether a layer's bias is preconditioned together with its weight, as its last column."""
        return self.base == "sgd" and self.curvature == "joint" and self.needs_inputs


def parse_options(text: str) -> dict[str, str]:
    """
    Read `"rank=8,damping=0.03"`, the form of Trainer's `optim_args`, into a dictionary of strings.

    Raises:
        ValueError: a part is not of the form `name=value`.
    """
    options = {}
    for part in filter(None, (part.strip() for part in text.split(","))):
        name, equals, value = part.partition("=")
        if not equals or not value.strip():
            raise ValueError(f"Cannot read the optimizer option {part!r}: expected 'name=value,name=value'.")
        options[name.strip()] = value.strip()
    return options


PRESETS = ("recipe", "paper_eva", "paper_eva_f", "paper_eva_s")


def _parse(name: str, value: Any, kind: Any) -> Any:
    """`value` as the type of a field; strings come from command lines and `optim_args`."""
    choices = get_args(kind)
    if choices:
        if value in choices:
            return value
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}.")
    if kind is bool:
        known = {True: True, False: False, "true": True, "false": False, "1": True, "0": False}
        key = value.lower() if isinstance(value, str) else value
        if key in known:
            return known[key]
        raise ValueError(f"{name} must be true or false, got {value!r}.")
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if isinstance(value, bool) or not math.isfinite(number) or (kind is int and number != int(number)):
        raise ValueError(f"{name} must be {'a whole number' if kind is int else 'a number'}, got {value!r}.")
    return kind(number)


def _check_bounds(name: str, value: Any, bounds: Mapping[str, float | None]) -> None:
    above, minimum, below, maximum = (bounds[key] for key in ("above", "minimum", "below", "maximum"))
    low = f"({above:g}" if above is not None else f"[{minimum:g}" if minimum is not None else "(-inf"
    high = f"{below:g})" if below is not None else f"{maximum:g}]" if maximum is not None else "inf)"
    inside = (
        (above is None or value > above)
        and (minimum is None or value >= minimum)
        and (below is None or value < below)
        and (maximum is None or value <= maximum)
    )
    if not inside:
        raise ValueError(f"{name} must be in {low}, {high}, got {value!r}.")
