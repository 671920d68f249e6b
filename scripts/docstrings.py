"""Docstrings in the form of Hugging Face, for the API reference: references `[`Name`]`, and types in backticks."""

from __future__ import annotations

import re
from typing import Any

import griffe

REFERENCE = re.compile(r"\[`([\w.]+)`\](?![(\[])")
TYPE = re.compile(r"^( +[\w, ]+ \()(.+)(\):)", re.MULTILINE)  # of an argument: the reference sets it in code itself


class HuggingFaceDocstrings(griffe.Extension):
    """Makes links of references; where nothing has the name, or it has no page, a strict build refuses the link."""

    def on_object(self, *, obj: griffe.Object, loader: griffe.GriffeLoader, **kwargs: Any) -> None:
        if obj.docstring is None:
            return

        def link(match: re.Match[str]) -> str:
            first, *rest = match[1].split(".")
            try:
                path = ".".join([obj.module.resolve(first), *rest])
                has_text = loader.modules_collection[path].has_docstring
            except (griffe.NameResolutionError, KeyError):
                path, has_text = match[1], True
            return f"[`{match[1]}`][{path}]" if has_text else f"`{match[1]}`"

        text = TYPE.sub(lambda found: found[1] + found[2].replace("`", "") + found[3], obj.docstring.value)
        obj.docstring.value = REFERENCE.sub(link, text)
