"""`accelerator.prepare` with FSDP2: a loop that clips, saves and resumes is one process without shards."""

import os
import socket

import pytest
import torch
import world
from helpers import CONFIGS, FAMILIES, assert_equal, assert_near
from torch.distributed.tensor import DTensor

from hf_eva import create_eva_optimizer

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


def train_all(rank, port, folder):
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    from accelerate import Accelerator, FullyShardedDataParallelPlugin, PartialState
    from accelerate.state import AcceleratorState
    from accelerate.utils import DistributedType

    accelerator = Accelerator(cpu=True)
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=["GPT2Block"],
        state_dict_type="SHARDED_STATE_DICT",
    )
    # What Accelerate does by itself on accelerators only.
    for shared in (PartialState._shared_state, AcceleratorState._shared_state):
        shared |= {"distributed_type": DistributedType.FSDP, "fsdp_plugin": plugin}
    return {name: train(name, rank, accelerator, f"{folder}/{name}") for name in NAMES}


@pytest.fixture(scope="module")
def of_two_processes(tmp_path_factory):
    pytest.importorskip("accelerate")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return world.run(train_all, 2, port, str(tmp_path_factory.mktemp("state")), limit=300.0)


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
