"""Second-order training for Hugging Face Transformers by changing one flag."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .config import EvaConfig
from .factory import create_eva_optimizer
from .optimizer import Eva
from .selection import Plan, plan

if TYPE_CHECKING:
    from .registration import register, unregister
    from .trainer import EvaTrainer, EvaTrainerMixin, EvaTrainingArguments, EvaTrainingArgumentsMixin

__version__ = "0.1.0"

__all__ = [
    "Eva",
    "EvaConfig",
    "EvaTrainer",
    "EvaTrainerMixin",
    "EvaTrainingArguments",
    "EvaTrainingArgumentsMixin",
    "Plan",
    "create_eva_optimizer",
    "plan",
    "register",
    "unregister",
]

# These need transformers and accelerate, which the optimizer does not: they are imported at their first use.
_LAZY = {
    "EvaTrainer": ".trainer",
    "EvaTrainerMixin": ".trainer",
    "EvaTrainingArguments": ".trainer",
    "EvaTrainingArgumentsMixin": ".trainer",
    "register": ".registration",
    "unregister": ".registration",
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        module = import_module(_LAZY[name], __name__)
    except ModuleNotFoundError as error:
        if error.name not in ("transformers", "accelerate"):
            raise
        raise ImportError(
            f"hf_eva.{name} needs {error.name}, which is not installed: pip install 'hf-eva[trainer]'"
        ) from error
    return getattr(module, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
