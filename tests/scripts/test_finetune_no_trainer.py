"""`scripts/finetune_no_trainer.py`, in one process and in two, in one go and resumed."""

import shutil
from pathlib import Path

import finetune_no_trainer
import pytest
import torch
from datasets import ClassLabel, Dataset, DatasetDict
from running import ACCELERATE, ROOT, launch
from safetensors.torch import load_file
from transformers import AutoTokenizer, BertConfig, BertModel

SCRIPT = ROOT / "scripts" / "finetune_no_trainer.py"
TWO = ("--config_file", ROOT / "configs" / "accelerate" / "cpu_2.yaml")


@pytest.fixture(scope="module")
def tiny_run(files, tmp_path_factory) -> list[str]:
    """The arguments of a run of two epochs: a small BERT, its tokenizer and a small data set, all in folders."""
    folder = tmp_path_factory.mktemp("no_trainer")
    tokenizer = AutoTokenizer.from_pretrained(files / "tokenizer")
    tokenizer.save_pretrained(folder / "model")
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    BertModel(BertConfig(**sizes, vocab_size=len(tokenizer), pad_token_id=0)).save_pretrained(folder / "model")
    rows = Dataset.from_csv(str(files / "rows.csv")).cast_column("label", ClassLabel(names=["awful", "lovely"]))
    for name, split in DatasetDict(train=rows.select(range(48)), validation=rows.select(range(48, 60))).items():
        (folder / "data").mkdir(exist_ok=True)
        split.to_parquet(folder / "data" / f"{name}.parquet")
    settings = {"model_name_or_path": folder / "model", "dataset_name": folder / "data", "max_seq_length": 16}
    more = {"batch_size": 8, "learning_rate": 3e-3, "eva_options": "rank=2,damping=0.1"}
    return [word for name, value in {**settings, **more}.items() for word in (f"--{name}", str(value))]


def table(output: str) -> list[list[float]]:
    """The rows without their times."""
    lines = output.splitlines()
    head = next(number for number, line in enumerate(lines) if line.split()[:2] == ["epoch", "steps"])
    return [[float(number) for number in line.split()[:-2]] for line in lines[head + 1 :]]


def test_a_run_prints_a_table_and_resumes_bit_for_bit(tiny_run, tmp_path, capsys):
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    finetune_no_trainer.main([*tiny_run, "--output_dir", str(whole)])
    output = capsys.readouterr().out
    rows = table(output)
    assert "layers preconditioned" in output
    assert [row[:2] for row in rows] == [[1, 6], [2, 12]]
    assert all(0 <= accuracy <= 1 and 0 < strength < 1 for _, _, _, _, accuracy, strength in rows)
    assert {path.name for path in whole.iterdir()} >= {"checkpoints", "config.json", "model.safetensors"}

    shutil.copytree(whole / "checkpoints" / "checkpoint_0", resumed / "checkpoints" / "checkpoint_0")
    finetune_no_trainer.main([*tiny_run, "--output_dir", str(resumed), "--resume"])
    assert table(capsys.readouterr().out) == rows[1:]
    before, after = (load_file(folder / "model.safetensors") for folder in (whole, resumed))
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_a_tracker_gets_the_rows_and_what_eva_does_in_each_layer(tiny_run, tmp_path):
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    finetune_no_trainer.main([*tiny_run, "--output_dir", str(tmp_path), "--log_with", "tensorboard"])
    shown = events.EventAccumulator(str(tmp_path / "eva"))
    shown.Reload()
    tags = set(shown.Tags()["scalars"])
    assert {"train loss", "accuracy", "eva_strength", "eva_update_size", "optimizer_milliseconds"} <= tags
    assert "eva_strength/bert.encoder.layer.0.output.dense" in tags
    assert [event.step for event in shown.Scalars("eva_strength")] == [6, 12]


@pytest.mark.slow
@pytest.mark.distributed
def test_two_processes_share_the_rows_print_once_and_resume(tiny_run, tmp_path):
    done = launch(*ACCELERATE, *TWO, SCRIPT, *tiny_run, "--output_dir", tmp_path, "--num_epochs", "1")
    assert done.returncode == 0, done.stderr
    assert [row[:2] for row in table(done.stdout)] == [[1, 3]]
    done = launch(*ACCELERATE, *TWO, SCRIPT, *tiny_run, "--output_dir", tmp_path, "--num_epochs", "2", "--resume")
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
def test_bad_input_is_a_sentence(added, expected, tiny_run, tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        finetune_no_trainer.main([*tiny_run, "--output_dir", str(tmp_path), *added])
    assert ended.value.code == 2
    assert expected in capsys.readouterr().err


def test_a_folder_with_a_run_is_left_alone(tiny_run, tmp_path, capsys):
    Path(tmp_path, "checkpoints").mkdir()
    with pytest.raises(SystemExit):
        finetune_no_trainer.main([*tiny_run, "--output_dir", str(tmp_path)])
    assert "holds a run: continue it with --resume" in capsys.readouterr().err
