"""What the README says of the settings is what they are."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

from hf_eva import EvaConfig

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_table_of_settings_is_the_config():
    recipe, paper = EvaConfig(), EvaConfig.paper("eva")
    for field in dataclasses.fields(EvaConfig):
        name = field.name
        row = f"| `{name}` | `{getattr(recipe, name)}` | `{getattr(paper, name)}` | {EvaConfig.help()[name]} |"
        assert row in README


def test_every_file_it_names_is_there():
    named = re.findall(r"\b((?:configs|scripts|tests)/[\w./-]+)", README)
    assert named
    missing = [name for name in named if not (ROOT / name).exists()]
    assert not missing
