"""The newest whole checkpoint is found, whatever a killed run has left of others, and a user is told."""

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from hf_eva import create_eva_optimizer
from hf_eva.checkpoints import last_checkpoint, load_state, save_state

STATE = json.dumps({"log_history": []})
LACKS = "neither trainer_state.json nor eva_whole nor .metadata"


def written(folder: Path, **files: str) -> None:
    """Checkpoints that hold one file each."""
    for name, file in files.items():
        path = folder / name.replace("__", "-")
        path.mkdir(parents=True)
        (path / file).write_text(STATE)


@pytest.mark.parametrize("last", ["trainer_state.json", "eva_whole", ".metadata"])
def test_the_newest_with_the_file_that_is_written_last(last, tmp_path, caplog):
    written(tmp_path, checkpoint__2=last, checkpoint__10=last, checkpoint__9=last, other__11=last)
    assert last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-10")
    assert not caplog.records


def test_one_warning_names_what_was_skipped_and_why(tmp_path, caplog):
    written(tmp_path, checkpoint_1="eva_whole", checkpoint_2="optimizer.bin", checkpoint_3="trainer_state.json")
    (tmp_path / "checkpoint_3" / "trainer_state.json").write_text(STATE[:5])
    assert last_checkpoint(tmp_path) == str(tmp_path / "checkpoint_1")
    assert [record.getMessage() for record in caplog.records] == [
        f"Left out in {tmp_path}, because the run ended while it wrote them: checkpoint_3 (trainer_state.json is cut "
        f"off), checkpoint_2 ({LACKS}). The last whole checkpoint is checkpoint_1."
    ]


def test_none_is_whole(tmp_path, caplog):
    assert last_checkpoint(tmp_path / "nowhere") is None and not caplog.records
    written(tmp_path, checkpoint_0="optimizer.bin")
    assert last_checkpoint(tmp_path) is None
    assert "No checkpoint there is whole" in caplog.text


def test_only_the_main_process_warns(tmp_path, caplog, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    written(tmp_path, checkpoint_0="optimizer.bin")
    assert last_checkpoint(tmp_path) is None and not caplog.records


@pytest.fixture
def loop(tmp_path):
    """An accelerator with automatic names, and what it has prepared."""
    accelerate = pytest.importorskip("accelerate")
    settings = accelerate.utils.ProjectConfiguration(str(tmp_path), automatic_checkpoint_naming=True, total_limit=2)
    accelerator = accelerate.Accelerator(cpu=True, project_config=settings)
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    model, optimizer = accelerator.prepare(model, create_eva_optimizer(model))
    yield accelerator, model, optimizer
    accelerator.free_memory()


def fill(model, value):
    nn.init.constant_(model[0].weight, value)


def test_a_state_that_was_interrupted_is_put_aside(loop, tmp_path, monkeypatch):
    accelerator, model, _ = loop
    fill(model, 1.0)
    assert save_state(accelerator) == str(tmp_path / "checkpoints" / "checkpoint_0")

    def dies(*args, **options):
        raise KeyboardInterrupt

    fill(model, 2.0)
    with monkeypatch.context() as killed, pytest.raises(KeyboardInterrupt):
        killed.setattr(torch, "save", dies)
        save_state(accelerator)
    assert (tmp_path / "checkpoints" / "checkpoint_1" / "model.safetensors").exists()

    assert load_state(accelerator) == str(tmp_path / "checkpoints" / "checkpoint_0")
    assert (model[0].weight == 1).all()
    assert [path.name for path in (tmp_path / "interrupted").iterdir()] == ["checkpoint_1"]
    accelerator.project_configuration.iteration = 1
    fill(model, 3.0)
    save_state(accelerator)
    fill(model, 4.0)
    assert load_state(accelerator) == str(tmp_path / "checkpoints" / "checkpoint_1")
    assert (model[0].weight == 3).all()


def test_nothing_is_loaded_where_nothing_is_whole(loop, tmp_path):
    accelerator, model, _ = loop
    accelerator.save_state()  # without a mark: it is kept
    fill(model, 5.0)
    assert load_state(accelerator) is None
    assert (model[0].weight == 5).all()
    assert (tmp_path / "interrupted" / "checkpoint_0" / "optimizer.bin").exists()


def test_a_state_that_is_written_over_is_not_whole_until_it_is_written(loop, tmp_path, monkeypatch):
    accelerator, *_ = loop
    settings = accelerator.project_configuration
    monkeypatch.setattr(settings, "automatic_checkpoint_naming", False)
    folder = str(tmp_path / "checkpoint_7")
    assert save_state(accelerator, folder) == folder == last_checkpoint(tmp_path)
    monkeypatch.setattr(type(accelerator), "save_state", lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        save_state(accelerator, folder)
    assert last_checkpoint(tmp_path) is None
    with pytest.raises(ValueError, match="automatic_checkpoint_naming=True"):
        load_state(accelerator)
