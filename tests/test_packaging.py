"""What is shipped: the wheel and the source archive, what they hold, and what they need in order to run."""

import configparser
import importlib.metadata
import os
import re
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

yaml = pytest.importorskip("yaml")

ROOT = Path(__file__).resolve().parent.parent
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))

# A whole training with what torch alone offers: three kinds of parameters, a checkpoint, and a loss that falls.
TRAIN = """
import os
import tempfile

import torch

import hf_eva
from hf_eva import Eva, EvaConfig, create_eva_optimizer, plan

torch.manual_seed(0)
model = torch.nn.Sequential(
    torch.nn.Embedding(11, 8), torch.nn.Flatten(), torch.nn.Linear(32, 16), torch.nn.LayerNorm(16), torch.nn.Tanh(),
    torch.nn.Linear(16, 16), torch.nn.Tanh(), torch.nn.Linear(16, 2),
)
assert str(plan(model))
x, y = torch.randint(0, 11, (64, 4)), torch.randint(0, 2, (64,))
optimizer = create_eva_optimizer(model, lr=1e-2, weight_decay=0.01, config=EvaConfig())
assert isinstance(optimizer, Eva) and isinstance(optimizer, torch.optim.Optimizer)
losses = []
for _ in range(60):
    loss = torch.nn.functional.cross_entropy(model(x), y)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    losses.append(float(loss))
assert losses[-1] < 0.7 * losses[0], losses
path = os.path.join(tempfile.mkdtemp(), "optimizer.pt")
torch.save(optimizer.state_dict(), path)
optimizer.load_state_dict(torch.load(path, weights_only=True))

print("HOME", hf_eva.__file__)
"""


def run(*command: str | Path, **more: object) -> subprocess.CompletedProcess[str]:
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, timeout=600, **more)  # type: ignore[call-overload]
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done


@pytest.fixture(scope="module")
def archives(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The wheel and the source archive, built by the tools of this environment, without a network."""
    for tool in ("build", "hatchling"):
        if not any(importlib.metadata.distributions(name=tool)):
            pytest.skip(f"{tool} is not installed: pip install -e '.[dev]'")
    if not (ROOT / "README.md").exists() or not (ROOT / "hf_eva" / "__init__.py").exists():
        pytest.skip("README.md or hf_eva/__init__.py is not there")
    out = tmp_path_factory.mktemp("dist")
    # From a neighbouring folder: in this one, a folder named build would pass for the module.
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", out, ROOT, cwd=out)
    (wheel,), (sdist,) = out.glob("*.whl"), out.glob("*.tar.gz")
    return wheel, sdist


def source_version() -> str:
    text = (ROOT / "hf_eva" / "__init__.py").read_text(encoding="utf-8")
    match = re.search(r'^__version__(?:: \w+)? = "([^"]+)"$', text, re.MULTILINE)
    assert match, "hf_eva/__init__.py holds no line __version__ = ..."
    return match[1]


def test_wheel_holds_the_package_and_nothing_else(archives: tuple[Path, Path]) -> None:
    names = zipfile.ZipFile(archives[0]).namelist()
    version = source_version()
    assert "hf_eva/py.typed" in names
    assert f"hf_eva-{version}.dist-info/licenses/LICENSE" in names
    assert {name.split("/")[0] for name in names} == {"hf_eva", f"hf_eva-{version}.dist-info"}
    sources = {
        str(path.relative_to(ROOT))
        for path in (ROOT / "hf_eva").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert sources == {name for name in names if name.startswith("hf_eva/")}
    assert any(name.startswith("hf_eva/templates/") for name in names)


def test_wheel_says_what_it_needs(archives: tuple[Path, Path]) -> None:
    wheel = zipfile.ZipFile(archives[0])
    info = f"hf_eva-{source_version()}.dist-info"
    lines = wheel.read(f"{info}/METADATA").decode().split("\n\n")[0].splitlines()
    assert "Name: hf-eva" in lines
    assert f"Version: {source_version()}" in lines
    assert "License-Expression: Apache-2.0" in lines
    assert "Requires-Python: >=3.11" in lines
    needs = [line.partition(": ")[2] for line in lines if line.startswith("Requires-Dist: ")]
    assert [Requirement(need).name for need in needs if "extra ==" not in need] == ["torch"]
    entry_points = configparser.ConfigParser()
    entry_points.read_string(wheel.read(f"{info}/entry_points.txt").decode())
    assert dict(entry_points["console_scripts"]) == {"hf-eva": "hf_eva.cli:main"}


def test_source_archive_can_run_the_tests(archives: tuple[Path, Path]) -> None:
    with tarfile.open(archives[1]) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"LICENSE", "README.md", "CHANGELOG.md", "CITATION.cff", "pyproject.toml", "Makefile"} <= names
    assert {"hf_eva/py.typed", "tests/test_packaging.py"} <= names
    assert not [name for name in names if re.search(r"(^|/)(\.venv[^/]*|runs|dist|__pycache__)/", name)]


def torch_alone() -> list[Path]:
    """The files and folders, beside this interpreter's other packages, that torch and what it requires are made of."""
    waiting, seen, tops = ["torch"], set(), set()
    while waiting:
        name = waiting.pop()
        if name in seen:
            continue
        seen.add(name)
        distribution = importlib.metadata.distribution(name)
        # torch also requires a build tool, which brings a hook that runs at every start: it can stay away.
        requirements = [Requirement(text) for text in distribution.requires or []]
        waiting += [
            need.name
            for need in requirements
            if need.name != "setuptools" and (need.marker is None or need.marker.evaluate({"extra": ""}))
        ]
        for file in distribution.files or []:
            if file.parts[0] not in ("..", "__pycache__"):
                tops.add(Path(str(distribution.locate_file(file.parts[0]))))
    return sorted(tops)


def test_torch_alone_is_enough(archives: tuple[Path, Path], tmp_path: Path) -> None:
    home = tmp_path / "env"
    venv.create(home, with_pip=False, symlinks=os.name != "nt")
    scheme = {"base": str(home), "platbase": str(home)}
    python = Path(sysconfig.get_path("scripts", vars=scheme, scheme="venv"), Path(sys.executable).name)
    site = Path(sysconfig.get_path("purelib", vars=scheme, scheme="venv"))
    for path in torch_alone():
        (site / path.name).symlink_to(path, target_is_directory=path.is_dir())
    zipfile.ZipFile(archives[0]).extractall(site)  # all there is to installing a wheel of Python files alone

    clean = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "COV_"))}
    for name in ("transformers", "accelerate", "datasets", "huggingface_hub", "yaml"):
        code = f"import importlib.util as u; raise SystemExit(u.find_spec({name!r}) is not None)"
        run(python, "-c", code, cwd=tmp_path, env=clean)
    done = run(python, "-W", "ignore", "-c", TRAIN, cwd=tmp_path, env=clean)
    assert f"HOME {site}" in done.stdout

    # A name of the trainer side says which package is missing.
    ask = "import hf_eva\ntry:\n    hf_eva.EvaTrainer\nexcept ImportError as error:\n    print('SAID', error)"
    said = run(python, "-W", "ignore", "-c", ask, cwd=tmp_path, env=clean).stdout
    assert re.search(r"SAID .*(transformers|hf-eva\[trainer\])", said), said


def test_the_version_is_the_same_everywhere() -> None:
    version = source_version()
    assert str(Version(version)) == version
    assert "version" in PYPROJECT["project"]["dynamic"]
    assert "version" not in PYPROJECT["project"]
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert str(citation["version"]) == version
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert re.search(rf"^## \[{re.escape(version)}\] - (\d{{4}}-\d\d-\d\d|unreleased)$", changelog, re.MULTILINE)


def test_citation_names_the_paper() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert {"cff-version", "message", "title", "authors"} <= set(citation)
    assert citation["license"] == "Apache-2.0" == PYPROJECT["project"]["license"]
    paper = citation["preferred-citation"]
    assert [author["family-names"] for author in paper["authors"]] == ["Zhang", "Shi", "Li"]
    assert paper["year"] == 2023


def test_licence_is_whole() -> None:
    text = (ROOT / "LICENSE").read_text(encoding="utf-8")
    assert "Version 2.0, January 2004" in text
    assert "END OF TERMS AND CONDITIONS" in text


def test_the_lowest_versions_that_are_tested_are_those_that_are_promised() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    match = re.search(r"^LOWEST +\?= (.+)$", makefile, re.MULTILINE)
    assert match
    tested = {name: Version(version) for name, version in (pin.split("==") for pin in match[1].split())}
    extras = PYPROJECT["project"]["optional-dependencies"]
    promised = {}
    for requirement in map(Requirement, extras["trainer"] + extras["peft"]):
        (bound,) = (part.version for part in requirement.specifier if part.operator == ">=")
        promised[requirement.name] = Version(bound)
    assert {name: promised[name] for name in tested} == tested
    assert {"transformers", "accelerate"} <= set(tested)


def test_every_extra_is_part_of_what_the_developers_install() -> None:
    extras = PYPROJECT["project"]["optional-dependencies"]

    def closure(name: str) -> set[str]:
        inner = [Requirement(text) for text in extras[name]]
        return {name}.union(*(closure(extra) for need in inner if need.name == "hf-eva" for extra in need.extras))

    assert closure("dev") == set(extras)
