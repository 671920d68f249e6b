"""`scripts/finetune_no_trainer.py`, in one process and in two, in one go and resumed."""

import shutil
from pathlib import Path

import finetune_no_trainer
import pytest
import torch
from running import ACCELERATE, ROOT, launch
from safetensors.torch import load_file

SCRIPT = ROOT / "scripts" / "finetune_no_trainer.py"
TWO = ("--config_file", ROOT / "configs" / "accelerate" / "cpu_2.yaml")


def table(output: str) -> list[list[float]]:
    """The rows without their times."""
    lines = output.splitlines()
    head = next(number for number, line in enumerate(lines) if line.split()[:2] == ["epoch", "steps"])
    return [[float(number) for number in line.split()[:-2]] for line in lines[head + 1 :]]


def test_a_run_prints_a_table_and_resumes_bit_for_bit(tiny_loop, tmp_path, capsys):
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    finetune_no_trainer.main([*tiny_loop, "--output_dir", str(whole)])
    output = capsys.readouterr().out
    rows = table(output)
    assert "layers preconditioned" in output
    assert [row[:2] for row in rows] == [[1, 6], [2, 12]]
    assert all(0 <= accuracy <= 1 and 0 < strength < 1 for _, _, _, _, accuracy, strength in rows)
    assert {path.name for path in whole.iterdir()} >= {"checkpoints", "config.json", "model.safetensors"}

    shutil.copytree(whole / "checkpoints" / "checkpoint_0", resumed / "checkpoints" / "checkpoint_0")
    finetune_no_trainer.main([*tiny_loop, "--output_dir", str(resumed), "--resume"])
    assert table(capsys.readouterr().out) == rows[1:]
    before, after = (load_file(folder / "model.safetensors") for folder in (whole, resumed))
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_a_tracker_gets_the_rows_and_what_eva_does_in_each_layer(tiny_loop, tmp_path):
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    finetune_no_trainer.main([*tiny_loop, "--output_dir", str(tmp_path), "--log_with", "tensorboard"])
    shown = events.EventAccumulator(str(tmp_path / "eva"))
    shown.Reload()
    tags = set(shown.Tags()["scalars"])
    assert {"train loss", "accuracy", "eva_strength", "eva_update_size", "optimizer_milliseconds"} <= tags
    assert "eva_strength/bert.encoder.layer.0.output.dense" in tags
    assert [event.step for event in shown.Scalars("eva_strength")] == [6, 12]


@pytest.mark.slow
@pytest.mark.distributed
def test_two_processes_share_the_rows_print_once_and_resume(tiny_loop, tmp_path):
    done = launch(*ACCELERATE, *TWO, SCRIPT, *tiny_loop, "--output_dir", tmp_path, "--num_epochs", "1")
    assert done.returncode == 0, done.stderr
    assert [row[:2] for row in table(done.stdout)] == [[1, 3]]
    done = launch(*ACCELERATE, *TWO, SCRIPT, *tiny_loop, "--output_dir", tmp_path, "--num_epochs", "2", "--resume")
    assert done.returncode == 0, done.stderr
    assert [row[:2] for row in table(done.stdout)] == [[2, 6]]


@pytest.mark.parametrize(
    ("added", "expected"),
    [
        (["--resume"], "holds no checkpoint to resume from"),
        (["--eva_options", "dampin=1"], "--eva_options dampin=1: Unknown Eva option 'dampin': did you mean 'damping'"),
        (["--eva_options", "rank"], "--eva_options rank: rank must be a whole number, got ''"),
    ],
)
def test_bad_input_is_a_sentence(added, expected, tiny_loop, tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        finetune_no_trainer.main([*tiny_loop, "--output_dir", str(tmp_path), *added])
    assert ended.value.code == 2
    assert expected in capsys.readouterr().err


def test_a_folder_with_a_run_is_left_alone(tiny_loop, tmp_path, capsys):
    Path(tmp_path, "checkpoints").mkdir()
    with pytest.raises(SystemExit):
        finetune_no_trainer.main([*tiny_loop, "--output_dir", str(tmp_path)])
    assert "holds a run: continue it with --resume" in capsys.readouterr().err
