"""A run that dies in the middle of things goes on from its last whole checkpoint and ends with the same bytes."""

import signal
from pathlib import Path

import finetune
import finetune_no_trainer
import pytest
import torch
from running import PYTHON, ROOT, TORCHRUN_2, launch

pytestmark = pytest.mark.slow

TASK = "sequence-classification"
# What to patch, so that the process dies in the fourth step, or while it writes the checkpoint after it.
DEATHS = {
    "between two operations of a step": """
from hf_eva import base
step, weights = base.decoupled_, []
def decoupled_(parameters, *args):
    step(parameters, *args)
    weights.extend(parameters)
    if len(weights) >= 3 * PER_STEP + PER_STEP // 2:
        die()
base.decoupled_ = decoupled_
""",
    "between two steps": """
from transformers import Trainer
forward = Trainer.training_step
def training_step(self, *args, **kwargs):
    if self.state.global_step == 3:
        die()
    return forward(self, *args, **kwargs)
Trainer.training_step = training_step
""",
    "half of the optimizer's file": """
write = torch.save
def save(value, path, *args, **kwargs):
    write(value, path, *args, **kwargs)
    if "checkpoint-4" in str(path) and "optimizer" in str(path):
        os.truncate(path, os.path.getsize(path) // 2)
        die()
torch.save = save
""",
    "half of the last file": """
from transformers import TrainerState
write = TrainerState.save_to_json
def save_to_json(self, path):
    write(self, path)
    if "checkpoint-4" in path:
        os.truncate(path, os.path.getsize(path) // 2)
        die()
TrainerState.save_to_json = save_to_json
""",
}
BEGIN = f"""
import os, signal, sys, time, torch
sys.path.insert(0, {str(ROOT / "scripts")!r})
import finetune, finetune_no_trainer
die = lambda: os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.fixture(scope="module")
def command(tiny):
    return [*tiny(TASK), "--max_steps", "6", "--save_steps", "2", "--eva_rank", "2"]


@pytest.fixture(scope="module")
def whole(command, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole") / "run"
    finetune.main([*command, "--output_dir", str(folder)])
    return folder


@pytest.mark.parametrize("death", DEATHS)
def test_a_killed_run_ends_with_the_same_bytes(death, command, whole, tmp_path):
    command = [*command, "--output_dir", str(tmp_path / "run")]
    states = torch.load(whole / "checkpoint-6" / "optimizer.pt")["state"].values()
    layers = sum(state.get("momentum_buffer", state.get("exp_avg")).ndim > 1 for state in states)
    begin = f"{BEGIN}\ntorch.set_num_threads({torch.get_num_threads()})"  # on which the last bit of a sum depends
    script = f"{begin}\nPER_STEP = {layers}\n{DEATHS[death]}\nfinetune.main(sys.argv[1:])"
    done = launch(*PYTHON, "-c", script, *command)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert (tmp_path / "run" / "checkpoint-4").exists() == death.startswith("half")
    finetune.main([*command, "--resume_from_checkpoint", "last"])
    run = tmp_path / "run"
    for name in ("model.safetensors", "checkpoint-6/model.safetensors", "checkpoint-4/model.safetensors"):
        assert (run / name).read_bytes() == (whole / name).read_bytes(), name
    for name in ("optimizer.pt", "scheduler.pt"):
        one, other = (torch.load(folder / "checkpoint-6" / name) for folder in (run, whole))
        torch.testing.assert_close(one, other, rtol=0, atol=0)


# Loops of Accelerate's, and several processes ------------------------------------------------------------------------

# One of two processes dies before it has written its file, when the other one has written all of its own.
BEFORE_THE_SECOND = """
write = torch.save
def save(value, path, *args, **kwargs):
    if NAME in str(path):
        time.sleep(3)
        die()
    write(value, path, *args, **kwargs)
torch.save = save
"""
HALF_OF_A_FILE = """
write = torch.save
def save(value, path, *args, **kwargs):
    write(value, path, *args, **kwargs)
    if NAME in str(path):
        path.truncate(path.tell() // 2) if hasattr(path, "truncate") else os.truncate(path, os.path.getsize(path) // 2)
        die()
torch.save = save
"""
BEFORE_THE_MARK = """
import pathlib
touch = pathlib.Path.touch
def save(path):
    die() if NAME in str(path) else touch(path)
pathlib.Path.touch = save
"""


def assert_same_files(one: Path, other: Path, names: list[str]) -> None:
    """Weights by their bytes, what was pickled by its values."""
    for name in names:
        if name.endswith(".safetensors"):
            assert (one / name).read_bytes() == (other / name).read_bytes(), name
        else:
            values = [torch.load(folder / name, weights_only=False) for folder in (one, other)]
            torch.testing.assert_close(*[_tensors(value) for value in values], rtol=0, atol=0, msg=name)


def _tensors(value):
    """Of states of generators what can be compared."""
    if isinstance(value, dict):
        return {key: _tensors(part) for key, part in value.items() if not isinstance(part, tuple)}
    return value


@pytest.mark.parametrize(
    ("death", "name"),
    [(HALF_OF_A_FILE, "checkpoint_1/optimizer"), (BEFORE_THE_MARK, "checkpoint_1")],
    ids=["half of the optimizer's file", "before the mark"],
)
def test_a_killed_loop_ends_with_the_same_bytes(death, name, tiny_loop, tmp_path, caplog):
    whole, run = tmp_path / "whole", tmp_path / "run"
    command = [*tiny_loop, "--num_epochs", "3", "--output_dir"]
    finetune_no_trainer.main([*command, str(whole)])
    begin = f"{BEGIN}\ntorch.set_num_threads({torch.get_num_threads()})\nNAME = {name!r}"
    done = launch(*PYTHON, "-c", f"{begin}\n{death}\nfinetune_no_trainer.main(sys.argv[1:])", *command, run)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert (run / "checkpoints" / "checkpoint_1").exists()
    finetune_no_trainer.main([*command, str(run), "--resume"])
    said = [record.getMessage() for record in caplog.records if record.name == "hf_eva.checkpoints"]
    assert len(said) == 1 and "checkpoint_1 (neither" in said[0] and "last whole checkpoint is checkpoint_0" in said[0]
    assert_same_files(run, whole, ["model.safetensors"])
    states = ["model.safetensors", "optimizer.bin", "custom_checkpoint_0.pkl", "random_states_0.pkl"]
    for number in (1, 2):
        assert_same_files(*(folder / "checkpoints" / f"checkpoint_{number}" for folder in (run, whole)), states)


def test_a_loop_that_is_killed_in_its_first_checkpoint_starts_again(tiny_loop, tmp_path, caplog):
    (tmp_path / "checkpoints" / "checkpoint_0").mkdir(parents=True)
    finetune_no_trainer.main([*tiny_loop, "--num_epochs", "1", "--output_dir", str(tmp_path), "--resume"])
    assert "No checkpoint there is whole" in caplog.text
    assert (tmp_path / "checkpoints" / "checkpoint_0" / "optimizer.bin").exists()


SUFFIXES = {".safetensors", ".bin", ".pt", ".pth", ".pkl"}
TWO = {
    "the loop": ("finetune_no_trainer", "--num_epochs 3", "checkpoints/checkpoint_1/random_states_1", "--resume"),
    "the Trainer": (
        "finetune",
        "--max_steps 6 --save_steps 2",
        "checkpoint-4/rng_state_1",
        "--resume_from_checkpoint last",
    ),
}


@pytest.mark.distributed
@pytest.mark.parametrize("kind", TWO)
def test_two_processes_of_which_one_dies_between_their_files(kind, tiny_loop, tiny, tmp_path):
    module, more, name, resume = TWO[kind]
    command = [*(tiny_loop if module == "finetune_no_trainer" else tiny(TASK)), *more.split(), "--output_dir"]
    dies = tmp_path / "dies.py"
    dies.write_text(f"{BEGIN}\nNAME = {name!r}\n{BEFORE_THE_SECOND}\n{module}.main()")
    script = ROOT / "scripts" / f"{module}.py"
    run, whole = tmp_path / "run", tmp_path / "whole"
    done = launch(*TORCHRUN_2, script, *command, whole)
    assert done.returncode == 0, done.stderr
    assert launch(*TORCHRUN_2, dies, *command, run).returncode != 0
    written = (run / name).parent
    assert {path.stem for path in written.iterdir()} & {"random_states_0", "rng_state_0"}
    done = launch(*TORCHRUN_2, script, *command, run, *resume.split())
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("Left out in") == 1 and f"{written.name} (neither" in done.stderr
    assert_same_files(run, whole, ["model.safetensors"])
    for folder in (written, max(written.parent.glob("checkpoint[-_]*"))):
        names = [path.name for path in folder.iterdir() if path.suffix in SUFFIXES and path.stem != "training_args"]
        assert len(names) >= 5
        assert_same_files(folder, whole / folder.relative_to(run), names)
