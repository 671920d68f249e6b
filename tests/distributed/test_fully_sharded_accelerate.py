"""`accelerator.prepare` with FSDP2: a loop that clips, saves and resumes is one process without shards."""

import os
import signal
import socket

import pytest
import torch
import world
from helpers import CONFIGS, FAMILIES, assert_equal, assert_near
from torch.distributed.checkpoint import FileSystemWriter
from torch.distributed.tensor import DTensor

from hf_eva import create_eva_optimizer
from hf_eva.checkpoints import last_checkpoint, load_state, save_state

pytestmark = pytest.mark.distributed
STEPS, SAVED = 4, 2
NAMES = ("rank_3", "paper_eva")


def loss_of(model, part, parts):
    return model(**{key: value.chunk(parts)[part] for key, value in FAMILIES["gpt2"].batch.items()}).loss


def build(name):
    torch.manual_seed(0)
    model = FAMILIES["gpt2"].build().double()
    return model, create_eva_optimizer(model, lr=0.01, weight_decay=0.1, config=CONFIGS[name])


def train(name, rank, accelerator, folder):
    model, optimizer = accelerator.prepare(*build(name))
    for step in range(STEPS):
        if step == SAVED:
            accelerator.save_state(folder)
            for parameter in model.parameters():
                parameter.detach().to_local().mul_(0.5)
            accelerator.load_state(folder)
        accelerator.backward(loss_of(model, rank, 2))
        accelerator.clip_grad_norm_(model.parameters(), 0.1)
        optimizer.step()
        optimizer.zero_grad()
    assert all(isinstance(parameter, DTensor) for parameter in model.parameters())
    accelerator.free_memory()
    return {n: p.full_tensor().detach() for n, p in model.named_parameters()}


def sharding(rank, port, folder=None):
    """An accelerator whose `prepare` shards with FSDP2, on a CPU."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    from accelerate import Accelerator, FullyShardedDataParallelPlugin, PartialState
    from accelerate.state import AcceleratorState
    from accelerate.utils import DistributedType, ProjectConfiguration

    project = ProjectConfiguration(folder, automatic_checkpoint_naming=folder is not None)
    accelerator = Accelerator(cpu=True, project_config=project)
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=["GPT2Block"],
        state_dict_type="SHARDED_STATE_DICT",
    )
    # What Accelerate does by itself on accelerators only.
    for shared in (PartialState._shared_state, AcceleratorState._shared_state):
        shared |= {"distributed_type": DistributedType.FSDP, "fsdp_plugin": plugin}
    return accelerator


def train_all(rank, port, folder):
    accelerator = sharding(rank, port)
    return {name: train(name, rank, accelerator, f"{folder}/{name}") for name in NAMES}


def free_port():
    pytest.importorskip("accelerate")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@pytest.fixture(scope="module")
def of_two_processes(tmp_path_factory):
    return world.run(train_all, 2, free_port(), str(tmp_path_factory.mktemp("state")), limit=300.0)


@pytest.mark.parametrize("name", NAMES)
def test_two_sharded_processes_train_as_one(name, of_two_processes):
    first, second = (found[name] for found in of_two_processes)
    assert_equal(first, second)
    model, optimizer = build(name)
    for _ in range(STEPS):
        loss_of(model, 0, 1).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        optimizer.step()
        optimizer.zero_grad()
    assert_near(first, model, 1e-10)


def save_often(rank, port, folder, dies):
    """Saves after each step and goes on from what is there. With `dies`, one process dies in the second checkpoint."""
    accelerator = sharding(rank, port, folder)
    model, optimizer = accelerator.prepare(*build("rank_3"))
    last = load_state(accelerator)
    write = FileSystemWriter.write_data

    def write_data(self, *args):
        if "checkpoint_1/optimizer" in str(self.path):
            os.kill(os.getpid(), signal.SIGKILL)
        return write(self, *args)

    if dies and rank == 1:
        FileSystemWriter.write_data = write_data
    for step in range(int(last[-1]) + 1 if last else 0, STEPS):
        accelerator.backward(loss_of(model, rank, 2))
        optimizer.step()
        optimizer.zero_grad()
        accelerator.project_configuration.iteration = step
        save_state(accelerator)
    state = {str(i): optimizer.state[p] for i, p in enumerate(model.parameters())}
    state = {f"{i}/{key}": value for i, values in state.items() for key, value in values.items()}
    found = {**dict(model.named_parameters()), **state}
    return {n: (t.full_tensor() if isinstance(t, DTensor) else t).detach() for n, t in found.items()}


@pytest.mark.slow
def test_a_process_that_dies_between_the_files_of_shards(tmp_path, caplog):
    whole, run = str(tmp_path / "whole"), str(tmp_path / "run")
    expected, _ = world.run(save_often, 2, free_port(), whole, False)
    with pytest.raises(torch.multiprocessing.ProcessExitedException, match="SIGKILL"):
        world.run(save_often, 2, free_port(), run, True)
    assert (tmp_path / "run" / "checkpoints" / "checkpoint_1" / "pytorch_model_fsdp_0" / ".metadata").exists()
    assert last_checkpoint(tmp_path / "run" / "checkpoints").endswith("checkpoint_0")
    assert "checkpoint_1 (neither" in caplog.text
    for found in world.run(save_often, 2, free_port(), run, False):
        assert_equal(found, expected)
