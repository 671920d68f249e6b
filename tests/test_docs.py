"""The documentation: its code runs, its links lead somewhere, and it builds without a warning."""

import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from documents import ROOT, anchors, code_blocks, links, run_blocks

from hf_eva import layers

PAGES = sorted((ROOT / "docs").glob("*.md"))
WRITTEN = [ROOT / "README.md", ROOT / "CHANGELOG.md", *PAGES, *sorted((ROOT / "benchmarks").glob("*.md"))]


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("page", [page for page in PAGES if code_blocks(page, "python")], ids=name)
def test_the_code_of_a_page_runs(page, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(layers, "KINDS", list(layers.KINDS))  # one page adds to it
    run_blocks(page)


@pytest.mark.parametrize("page", WRITTEN, ids=name)
def test_links_lead_somewhere(page):
    dead = []
    for target in links(page):
        file, _, anchor = target.partition("#")
        found = (page.parent / file).resolve() if file else page
        # The names of the reference are made by its tool, which checks them below.
        if not found.exists() or (anchor and not anchor.startswith("hf_eva.") and anchor not in anchors(found)):
            dead.append(target)
    assert not dead


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The built documentation, and what the tool said."""
    pytest.importorskip("zensical")
    home = tmp_path_factory.mktemp("project")
    shutil.copy(ROOT / "zensical.toml", home)
    for folder in ("docs", "hf_eva", "scripts"):
        shutil.copytree(ROOT / folder, home / folder, ignore=shutil.ignore_patterns("__pycache__"))
    command = [sys.executable, "-m", "zensical", "build", "--strict", "--clean"]
    done = subprocess.run(command, cwd=home, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return home / "build" / "docs", done.stdout + done.stderr


def test_it_builds_without_a_warning(site):
    folder, said = site
    assert "griffe" not in said.lower() and "warning" not in said.lower(), said
    assert {page.stem for page in PAGES} <= {page.stem for page in folder.glob("*.html")}


def test_the_reference_shows_docstrings_and_defaults(site):
    text = (site[0] / "reference.html").read_text(encoding="utf-8")
    assert "Vectors kept per side of a layer" in text  # from the metadata of a field
    assert 'href="#hf_eva.EvaConfig.paper"' in text  # from [`EvaConfig.paper`]
    assert "[<code>" not in text and "_hyperparameter" not in text


def test_every_page_is_in_the_contents():
    def files(entry):
        inner = entry.values() if isinstance(entry, dict) else entry
        return [entry] if isinstance(entry, str) else [file for part in inner for file in files(part)]

    contents = tomllib.loads((ROOT / "zensical.toml").read_text(encoding="utf-8"))["project"]["nav"]
    assert sorted(files(contents)) == [page.name for page in PAGES]
