"""A tiny BERT and a learnable task for it, for the tests of what meets Trainer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import BertConfig, BertForSequenceClassification, TrainingArguments

from hf_eva import EvaTrainingArguments


def model() -> BertForSequenceClassification:
    torch.manual_seed(0)
    config = BertConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64, vocab_size=50
    )
    return BertForSequenceClassification(config)


def data(size: int = 32) -> list[dict[str, Any]]:
    """Sequences whose label says whether their fourth token is in the upper half of the vocabulary."""
    tokens = torch.randint(0, 50, (size, 8), generator=torch.Generator().manual_seed(0))
    return [{"input_ids": row, "labels": int(row[3] >= 25)} for row in tokens]


def arguments(folder: Path, **changes: Any) -> EvaTrainingArguments:
    return EvaTrainingArguments(**_settings(folder, **changes))


def stock_arguments(folder: Path, **changes: Any) -> TrainingArguments:
    return TrainingArguments(**_settings(folder, **changes))


def _settings(folder: Path, **changes: Any) -> dict[str, Any]:
    settings = {
        "output_dir": str(folder),
        "use_cpu": True,
        "max_steps": 6,
        "logging_steps": 2,
        "save_strategy": "no",
        "learning_rate": 1e-3,
        "report_to": "none",
        "disable_tqdm": True,
    }
    return settings | changes
