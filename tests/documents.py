"""What the tests of README, docs/ and notebooks/ read of a Markdown file."""

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def code_blocks(path: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", path.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)


def without_blocks(path: Path) -> str:
    return re.sub(r"^```.*?^```$", "", path.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)


def links(path: Path) -> list[str]:
    """The targets of all links and pictures that lead to a place in this repository."""
    text = re.sub(r"``.+?``|`[^`\n]+`", "code", without_blocks(path))
    targets = re.findall(r"\]\(<?([^)\s>]+)", text) + re.findall(r'(?:src|href)="([^"]+)"', text)
    return [target for target in targets if not re.match(r"\w+:", target)]


def anchors(path: Path) -> set[str]:
    """What the headings of a file are called in links to them, on GitHub and in the rendered documentation."""
    headings = re.findall(r"^#+ (.+)$", without_blocks(path), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


def run_blocks(path: Path, names: dict[str, object] | None = None) -> None:
    """Run all Python of a file in one namespace, as a reader would who copies block after block."""
    names = {} if names is None else names
    text = path.read_text(encoding="utf-8")
    for block in code_blocks(path, "python"):
        line = text[: text.index(block)].count("\n")  # so that a traceback names the line of the page
        exec(compile("\n" * line + block, str(path), "exec"), names)
