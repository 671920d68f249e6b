"""Docstrings in the form of Hugging Face, for the API reference: references, types in backticks, help texts."""

from __future__ import annotations

import ast
import re
from contextlib import suppress
from typing import Any

import griffe

REFERENCE = re.compile(r"\[`([\w.]+)`\](?![(\[])")
TYPE = re.compile(r"^( +[\w, ]+ \()(.+)(\):)", re.MULTILINE)  # of an argument: the reference sets it in code itself


class HuggingFaceDocstrings(griffe.Extension):
    """Makes links of references; where nothing has the name, or it has no page, a strict build refuses the link."""

    def on_attribute(self, *, attr: griffe.Attribute, **kwargs: Any) -> None:
        """A field of a dataclass shows its default, with its help text as docstring."""
        if attr.docstring is not None or not isinstance(attr.value, griffe.ExprCall):
            return
        with suppress(ValueError, KeyError):  # its text is no literal, or there is none
            call = ast.parse(str(attr.value), mode="eval").body
            given = dict(enumerate(call.args)) | {keyword.arg: keyword.value for keyword in call.keywords}
            text = ast.literal_eval(given[1]) if 1 in given else ast.literal_eval(given["metadata"])["help"]
            attr.docstring = griffe.Docstring(text, parent=attr)
            attr.value = ast.unparse(given.get(0, given.get("default")))

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

        text = TYPE.sub(lambda found: found[1] + re.sub(r"[`*[\]]", "", found[2]) + found[3], obj.docstring.value)
        obj.docstring.value = REFERENCE.sub(link, text)
