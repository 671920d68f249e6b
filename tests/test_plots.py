"""Pictures of runs: what is on them, and whether it can be read."""

from __future__ import annotations

from pathlib import Path

import pytest
from histories import write_run

from hf_eva.runs import Run, Spectrum

pytest.importorskip("matplotlib")

import matplotlib.image
from matplotlib.colors import to_rgb

from hf_eva.plots import _DARK_COLOURS, COLOURS, _spectra, plot_runs


def svg(*runs: Run, folder: Path, **options: object) -> str:
    return plot_runs(list(runs), folder / "drawn.svg", **options)[0].read_text()


def luminance(colour: str) -> float:
    """The relative luminance of WCAG 2."""
    red, green, blue = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in to_rgb(colour))
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


@pytest.mark.parametrize(("colours", "ground"), [(COLOURS, "#ffffff"), (_DARK_COLOURS, "#0d1117")])
def test_every_line_stands_out_from_its_ground(colours, ground):
    for colour in colours:
        low, high = sorted((luminance(colour), luminance(ground)))
        assert (high + 0.05) / (low + 0.05) >= 3, colour


@pytest.mark.parametrize(("theme", "ground"), [("light", 1.0), ("dark", 0.05)])
def test_a_picture_is_opaque_in_both_themes(theme, ground, tmp_path):
    run = Run.read(write_run(tmp_path / "bert", strengths=True, spectra=True, eval_accuracy=0.8))
    written = plot_runs([run], tmp_path / "loss.png", theme)
    assert [path.name for path in written] == ["loss.png", "loss-strength.png", "loss-spectra.png"]
    for path in written:
        pixels = matplotlib.image.imread(path)
        assert pixels.shape[1] > 1000 and pixels[..., -1].min() == 1
        assert pixels[0, 0, 0] == pytest.approx(ground, abs=0.01)
        assert pixels[..., :3].std() > 0.05


def test_several_runs_share_the_panels_and_are_told_apart(tmp_path):
    runs = [
        Run.read(write_run(tmp_path / name, eval_accuracy=0.8, eval_majority_class=0.5)) for name in ("eva", "adamw")
    ]
    drawn = svg(*runs, folder=tmp_path, target=0.5)
    for run in runs:
        assert f"<!-- {run.name}: training -->" in drawn and f"<!-- {run.name}: evaluation -->" in drawn
    assert drawn.count("<!-- majority class -->") == drawn.count("<!-- target -->") == 1
    for label in (
        "training (optimizer steps)",
        "training without evaluations (seconds)",
        "loss (cross-entropy, nats)",
    ):
        assert f"<!-- {label} -->" in drawn
    assert "<!-- evaluation accuracy (0 to 1) -->" in drawn


def test_a_panel_without_data_is_left_out(tmp_path):
    drawn = svg(Run("gpt2", [{"step": step, "loss": 1 / step} for step in (1, 2)]), folder=tmp_path)
    assert "loss (cross-entropy, nats)" in drawn
    assert "0 to 1" not in drawn and "seconds" not in drawn


def test_the_layers_of_each_run_get_pictures_with_named_axes(tmp_path):
    runs = [Run.read(write_run(tmp_path / name, strengths=True, spectra=True)) for name in ("one", "two")]
    written = plot_runs(runs, tmp_path / "both.svg")
    assert [path.stem for path in written[1:]] == [
        f"both-{kind}-{n}" for n in (1, 2) for kind in ("strength", "spectra")
    ]
    strength, spectra = (path.read_text() for path in written[1:3])
    assert "strength: 1 − cos(update, momentum)" in strength and "encoder.layer.10.dense" in strength
    assert "inputs: 70% in all" in spectra and "share of the mean squared gradient (0 to 1)" in spectra


def test_a_deep_model_names_some_of_its_layers(tmp_path):
    history = [{"step": s, "loss": 1.0} | {f"eva_strength/m.{i}.w": 0.1 for i in range(100)} for s in (1, 2)]
    _, strength = plot_runs([Run("deep", history)], tmp_path / "deep.svg")
    drawn = strength.read_text()
    assert "one in 4 named" in drawn and "<!-- 96.w -->" in drawn and "<!-- 97.w -->" not in drawn


def test_rounding_does_not_press_the_lines_of_spectra_together():
    spectra = [Spectrum("classifier", side, (0.9, 0.1, 1e-12)) for side in ("inputs", "outputs")]
    low, high = _spectra(spectra, "", "light").axes[0].get_ylim()
    assert 1e-7 < low < 0.1 and high == 1


def test_the_same_run_gives_the_same_file(tmp_path):
    run = Run.read(write_run(tmp_path / "run"))
    assert svg(run, folder=tmp_path) == svg(run, folder=tmp_path)


def test_an_unknown_ending_is_refused_before_anything_is_written(tmp_path):
    with pytest.raises(ValueError, match=r"its ending must be one of .*png.*svg"):
        plot_runs([Run("a", [{"step": 1, "loss": 1.0}])], tmp_path / "loss.bmp")
    assert not list(tmp_path.iterdir())
