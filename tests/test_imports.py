"""The house and its arrows: a room imports only from rooms above its line, and the core knows no Hugging Face."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "hf_eva"

# Ground floor first. A file or folder of hf_eva/ is one room.
ROOMS = (
    "config",
    "products",
    "routines",
    "shards",
    "soundness",
    "base",
    "formula",
    "subspaces",
    "factors",
    "layers",
    "stacks",
    "selection",
    "state",
    "collectives",
    "masks",
    "traced",
    "capture",
    "diagnostics",
    "step",
    "curvature",
    "adamw_step",
    "sgd_step",
    "optimizer",
    "factory",
    "loss_scale",
    "hardware",
    "runs",
    "checkpoints",
    "plots",
    "facts",
    "callbacks",
    "registration",
    "model_card",
    "trainer",
    "doctor",
    "cli",
    "__main__",
)
CORE = ROOMS[: ROOMS.index("plots")]
UPSTAIRS = {"accelerate", "datasets", "evaluate", "huggingface_hub", "jinja2", "matplotlib", "peft", "transformers"}
CORE_NAMES = ("Eva", "EvaConfig", "create_eva_optimizer", "plan")
TRAINER_NAMES = ("EvaTrainer", "EvaTrainerMixin", "EvaTrainingArguments", "EvaTrainingArgumentsMixin", "register")

FILES = sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")
built = pytest.mark.skipif(not (PACKAGE / "__init__.py").exists(), reason="hf_eva/__init__.py is not there")


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported(source: str, package: str) -> Iterator[tuple[int, str]]:
    """Yields the line and the absolute name of all that `source`, a module of `package`, imports, at any depth."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")
            base = [*parents[: len(parents) - node.level + 1]] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            yield from ((node.lineno, f"{module}.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            called = getattr(node.func, "attr", getattr(node.func, "id", ""))
            name = str(node.args[0].value)
            if called in ("import_module", "__import__"):
                yield node.lineno, f"{package}{name}" if name.startswith(".") else name


def forbidden(room: str, name: str) -> str | None:
    """The reason why `room` may not import `name`, or None."""
    top, *rest = name.split(".")
    if top != "hf_eva":
        known = {"matplotlib"} if room == "plots" else set() if room in CORE else UPSTAIRS
        return f"{room} does not know {top}" if top in UPSTAIRS - known else None
    target = rest[0] if rest else "__init__"
    if target == room or target == "__version__" or room == ROOMS[-1]:
        return None
    if target not in ROOMS:
        return "a room imports from another room, not from the public face"
    return None if ROOMS.index(target) < ROOMS.index(room) else f"{target} is not above the line of {room}"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_every_arrow_points_down(path: Path) -> None:
    room = room_of(path)
    assert room in ROOMS, f"{room} has no line in the table of rooms: give it one, in the order of who may import whom"
    package = ".".join(path.relative_to(ROOT).parts[:-1])
    wrong = [
        f"{path.name}:{line} imports {name}: {reason}"
        for line, name in imported(path.read_text(encoding="utf-8"), package)
        if (reason := forbidden(room, name))
    ]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    ("room", "source", "allowed"),
    [
        ("optimizer", "from hf_eva.formula import direction", True),
        ("optimizer", "from .formula import direction", True),
        ("optimizer", "from . import formula", True),
        ("optimizer", "import hf_eva.factory", False),
        ("optimizer", "from .factory import create_eva_optimizer", False),
        ("optimizer", "from . import factory", False),
        ("optimizer", "def f():\n    from hf_eva import trainer", False),
        ("optimizer", "from hf_eva import Eva", False),
        ("optimizer", "from hf_eva import __version__", True),
        ("optimizer", "import hf_eva", False),
        ("formula", "import torch", True),
        ("factory", "from transformers import Trainer", False),
        ("factory", "import importlib\nimportlib.import_module('transformers.trainer')", False),
        ("runs", "import matplotlib", False),
        ("plots", "from matplotlib.figure import Figure", True),
        ("plots", "from transformers import Trainer", False),
        ("registration", "from transformers import Trainer", True),
        ("registration", "from hf_eva.trainer import EvaTrainer", False),
        ("trainer", "from .registration import register", True),
        ("__main__", "from hf_eva import register", True),
    ],
)
def test_the_walk_knows_a_wrong_arrow(room: str, source: str, allowed: bool) -> None:
    reasons = [forbidden(room, name) for _, name in imported(source, "hf_eva")]
    assert (not any(reasons)) == allowed, reasons


def loaded_after(code: str) -> set[str]:
    """The packages that a new interpreter has loaded after `code`."""
    tail = "; import sys; print('LOADED', *{name.partition('.')[0] for name in sys.modules})"
    done = subprocess.run([sys.executable, "-c", code + tail], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    line = re.search(r"^LOADED (.*)$", done.stdout, re.MULTILINE)
    assert line, done.stdout
    return set(line[1].split())


@built
def test_the_core_loads_nothing_of_hugging_face() -> None:
    loaded = loaded_after(f"import hf_eva; from hf_eva import {', '.join(CORE_NAMES)}")
    assert "torch" in loaded
    assert not loaded & UPSTAIRS


@built
@pytest.mark.parametrize("code", ["from hf_eva import EvaTrainer", "import hf_eva; hf_eva.register()"])
def test_the_trainer_side_is_loaded_on_demand(code: str) -> None:
    pytest.importorskip("transformers")
    assert "transformers" in loaded_after(code)


@built
def test_the_public_face_is_whole() -> None:
    pytest.importorskip("transformers")
    import hf_eva

    assert set(CORE_NAMES + TRAINER_NAMES) <= set(hf_eva.__all__)
    assert set(hf_eva.__all__) <= set(dir(hf_eva))
    missing = [name for name in hf_eva.__all__ if not hasattr(hf_eva, name)]
    assert not missing
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = hf_eva.no_such_name


def text_files() -> list[Path]:
    """What is, or is about to be, under version control; without git, all but hidden and generated folders."""
    listing = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        check=False,
    )
    if listing.returncode == 0:
        paths = [ROOT / name for name in listing.stdout.decode().split("\0") if name]
    else:
        generated = {"build", "dist", "runs", "__pycache__"}
        paths = [
            path
            for path in ROOT.rglob("*")
            if not any(part in generated or part.startswith(".") for part in path.relative_to(ROOT).parts)
        ]
    return [path for path in paths if path.is_file() and b"\0" not in path.read_bytes()[:8192]]


def test_no_file_names_a_place_on_somebodys_machine() -> None:
    homes = "|".join(("work", "root", "home", "Users"))
    place = re.compile(rf"(?<![\w.$}}~-])/(?:{homes})/\w")
    found = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()[:100]}"
        for path in text_files()
        for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), start=1)
        if place.search(line)
    ]
    assert not found, "\n".join(found)
