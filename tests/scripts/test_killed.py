"""A run that dies in the middle of things goes on from its last whole checkpoint and ends with the same bytes."""

import signal

import finetune
import pytest
import torch
from running import PYTHON, ROOT, launch

pytestmark = pytest.mark.slow

TASK = "sequence-classification"
# What to patch, so that the process dies in the fourth step, or while it writes the checkpoint after it.
DEATHS = {
    "between two operations of a step": """
from hf_eva import base
step, calls = base.decoupled_, []
def decoupled_(*args):
    calls.append(step(*args))
    if len(calls) == 3 * PER_STEP + PER_STEP // 2:
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
import os, signal, sys, torch
sys.path.insert(0, {str(ROOT / "scripts")!r})
import finetune
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
