"""The notebooks run from the first cell to the last, and train what they say."""

import pytest
from documents import ROOT

nbclient = pytest.importorskip("nbclient")
nbformat = pytest.importorskip("nbformat")
pytest.importorskip("ipykernel")

# What has to be true of a notebook's names at its end.
ENDS = {
    "bert": "assert after < 0.8 * before and log.optimizer_share.between(0, 1).all()",
    "gpt2": "assert after < 0.8 * before and isinstance(optimizer.optimizer, __import__('hf_eva').Eva)",
    "vit": "final = [run[-1][1] for run in runs.values()]; assert max(final[2:]) < min(final[:2])",
}


def test_every_notebook_is_run():
    assert {path.stem for path in (ROOT / "notebooks").glob("*.ipynb")} == set(ENDS)


@pytest.mark.slow
@pytest.mark.parametrize("name", ENDS)
def test_a_notebook_runs(name, tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    notebook = nbformat.read(ROOT / "notebooks" / f"{name}.ipynb", as_version=4)
    notebook.cells.append(nbformat.v4.new_code_cell(ENDS[name]))
    nbclient.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()
