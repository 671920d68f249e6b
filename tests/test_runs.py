"""What is read from the folder of a run."""

from __future__ import annotations

import math

import pytest
import torch
from histories import LAYERS, write_optimizer, write_run

from hf_eva import EvaConfig, create_eva_optimizer
from hf_eva.runs import Run, compare


def test_seconds_add_up_the_steps_and_reach_beyond_the_last_log(tmp_path):
    run = Run.read(write_run(tmp_path / "run"))
    assert run.seconds([0, 1, 5, 10, 12]) == pytest.approx([0, 0.5, 2.5, 5, 6])


def test_seconds_of_uneven_logs_count_the_steps_between_them():
    history = [{"step": 2, "loss": 1.0, "step_seconds": 1.0}, {"step": 6, "loss": 1.0, "step_seconds": 0.25}]
    assert Run("", history).seconds([1, 2, 4, 6]) == pytest.approx([1, 2, 2.5, 3])


def test_the_stock_trainer_leaves_its_runtime_without_evaluations(tmp_path):
    run = Run.read(write_run(tmp_path / "run", step_seconds=None))
    assert run.seconds([5, 10]) == pytest.approx([2.5, 5])  # 9 seconds less two evaluations of 2
    assert Run("", [{"step": 3, "loss": 1.0}]).seconds([3]) is None


def test_a_series_keeps_the_last_value_of_a_step():
    history = [{"step": 1, "eval_loss": 2.0}, {"step": 2, "eval_loss": 1.5}, {"step": 2, "eval_loss": 1.0}]
    assert Run("", history).series("eval_loss") == ([1, 2], [2.0, 1.0])


def test_the_time_to_the_last_loss_of_a_baseline(tmp_path):
    baseline = write_run(tmp_path / "adamw", (0.9, 0.5), facts={"optimizer": "adamw_torch"})
    faster = Run.read(write_run(tmp_path / "eva", (0.7, 0.5, 0.45, 0.4, 0.3), step_seconds=0.75))
    found = compare(faster, Run.read(baseline))
    assert (found["baseline"], found["baseline_optimizer"], found["loss"]) == ("adamw", "adamw_torch", 0.5)
    assert (found["steps"], found["seconds"], found["baseline_seconds"]) == (4, 3.0, 5.0)
    assert found["ratio"] == pytest.approx(0.6)


def test_a_target_that_is_not_reached_and_a_run_that_was_not_evaluated(tmp_path):
    slow, fast = (Run.read(write_run(tmp_path / name, (loss,))) for name, loss in (("slow", 0.5), ("fast", 0.1)))
    found = compare(slow, fast)
    assert found["steps"] is found["seconds"] is found["ratio"] is None
    assert found["best_loss"] == 0.5
    with pytest.raises(ValueError, match="no evaluation loss"):
        compare(slow, Run.read(write_run(tmp_path / "none", ())))


def test_strengths_are_ordered_as_the_model_or_by_number(tmp_path):
    named = {"layers": dict(enumerate(reversed(LAYERS)))}
    for facts, order in ((None, (LAYERS[2], *LAYERS[:2])), (named, LAYERS[::-1])):
        strengths = Run.read(write_run(tmp_path / str(bool(facts)), strengths=True, facts=facts)).strengths()
        assert strengths.layers == order
        assert strengths.steps == tuple(range(1, 11))
        assert strengths.values[0] == pytest.approx([0.02 * step for step in range(1, 11)])
    assert Run.read(write_run(tmp_path / "without")).strengths() is None


def test_a_layer_without_a_strength_at_a_step_is_unknown_there():
    history = [{"step": 1, "eva_strength/a": 0.1}, {"step": 2, "eva_strength/a": 0.2, "eva_strength/b": 0.3}]
    strengths = Run("", history).strengths()
    assert math.isnan(strengths.values[1][0]) and strengths.values[1][1] == 0.3


def test_spectra_are_shares_of_the_newest_checkpoint_of_this_run(tmp_path):
    folder = write_run(tmp_path / "run", spectra=True, facts={"layers": {"1": "classifier"}})
    inputs, outputs = Run.read(folder).spectra()
    assert (inputs.layer, inputs.side, outputs.side) == ("classifier", "inputs", "outputs")
    assert inputs.shares == pytest.approx((0.5, 0.2))
    assert outputs.shares == pytest.approx((0.3, 0.1))


def test_a_checkpoint_is_a_run_as_well(tmp_path):
    folder = write_run(tmp_path / "run" / "checkpoint-10", facts=None)
    (tmp_path / "run" / "eva_run.json").write_text('{"layers": {"1": "classifier"}}')
    write_optimizer(folder / "inner")
    (folder / "inner" / "optimizer.pt").rename(folder / "optimizer.pt")
    assert {spectrum.layer for spectrum in Run.read(folder).spectra()} == {"classifier"}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (None, "there is no .*trainer_state.json: name the output folder"),
        ("{", "is not JSON"),
        ("[]", "holds list where a dictionary is expected"),
        ("{}", "has no log_history"),
        ('{"log_history": []}', "holds no loss"),
    ],
)
def test_a_folder_that_is_no_run_is_refused(text, expected, tmp_path):
    if text is not None:
        (tmp_path / "trainer_state.json").write_text(text)
    with pytest.raises(ValueError, match=expected):
        Run.read(tmp_path)


def test_the_shares_are_those_of_the_singular_values_of_the_gradient(tmp_path):
    layer = torch.nn.Linear(6, 4, bias=False)
    optimizer = create_eva_optimizer(layer, config=EvaConfig(rank=3))
    gradient = torch.randn(4, 6)
    layer.weight.grad = gradient.clone()
    optimizer.step()
    folder = write_run(tmp_path / "run", facts={"layers": {"0": "only"}})
    (folder / "checkpoint-10").mkdir()
    torch.save(optimizer.state_dict(), folder / "checkpoint-10" / "optimizer.pt")
    squares = torch.linalg.svdvals(gradient).square()
    for spectrum in Run.read(folder).spectra():
        # One step does not yet find the smallest direction.
        assert spectrum.shares[:2] == pytest.approx((squares / squares.sum())[:2].tolist(), rel=0.02)
