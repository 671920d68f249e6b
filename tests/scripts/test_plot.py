"""`scripts/plot.py` draws what the Trainer logged."""

import json
from pathlib import Path

import matplotlib.image
import plot
import pytest


@pytest.fixture
def run(tmp_path):
    """Makes the folder of a run: ten training losses, two evaluations."""

    def make(name: str, **evaluation: float) -> Path:
        history = [{"step": step, "loss": 1 / step} for step in range(1, 11)]
        history += [{"step": step, "eval_loss": 1.2 / step, **evaluation} for step in (5, 10)]
        folder = tmp_path / name
        folder.mkdir()
        (folder / "trainer_state.json").write_text(json.dumps({"log_history": history}))
        return folder

    return make


def test_one_run_becomes_an_opaque_picture_in_its_folder(run, monkeypatch, capsys):
    folder = run("bert", eval_accuracy=0.8, eval_majority_class=0.5)
    monkeypatch.setattr("sys.argv", ["plot.py", str(folder)])
    plot.main()
    assert capsys.readouterr().out.strip() == str(folder / "loss.png")
    pixels = matplotlib.image.imread(folder / "loss.png")
    assert pixels.shape[1] > 1000 and pixels[..., -1].min() == 1  # legible on any page
    assert pixels[..., :3].std() > 0.05


def test_several_runs_share_the_panels_and_are_told_apart(run, tmp_path):
    folders = [str(run(name, eval_accuracy=0.8, eval_majority_class=0.5)) for name in ("eva", "adamw")]
    output = plot.plot_runs(folders, str(tmp_path / "both.svg"))
    drawn = Path(output).read_text()
    for name in folders:
        assert f"<!-- {name}: training -->" in drawn and f"<!-- {name}: evaluation -->" in drawn
    assert drawn.count("<!-- majority class -->") == 1
    assert "<!-- training (optimizer steps) -->" in drawn and "<!-- evaluation accuracy (0 to 1) -->" in drawn


def test_a_language_model_has_one_panel(run, tmp_path):
    drawn = Path(plot.plot_runs([str(run("gpt2"))], str(tmp_path / "one.svg"))).read_text()
    assert "loss (cross-entropy, nats)" in drawn and "0 to 1" not in drawn


@pytest.mark.parametrize(("state", "expected"), [(None, "there is no"), ({"log_history": []}, "holds no loss")])
def test_a_folder_without_a_history_ends_with_one_sentence(state, expected, tmp_path, monkeypatch, capsys):
    if state:
        (tmp_path / "trainer_state.json").write_text(json.dumps(state))
    monkeypatch.setattr("sys.argv", ["plot.py", str(tmp_path)])
    with pytest.raises(SystemExit) as ended:
        plot.main()
    assert ended.value.code == 2
    assert expected in capsys.readouterr().err
