"""Two processes of a Trainer are one with the same global batch: it does not matter which of them has a label."""

import os
import socket

import pytest
import torch
import world
from helpers import assert_equal, assert_near
from torch.distributed.tensor import DTensor
from zoo import ZOO, sentences

pytestmark = pytest.mark.distributed
NAMES = ("bert", "llama", "vit")
TEXTS = [*sentences(8, seed=0), *sentences(8, seed=1)]
# Name, optimizer and average_tokens_across_devices, without which each process takes the mean of its own labels.
CASES = [*((name, optim, True) for name in NAMES for optim in ("eva", "adamw_torch")), ("bert", "eva", False)]
SHARDED = [("bert", "eva", True), ("llama", "eva", True)]
BLOCKS = {"bert": "BertLayer", "llama": "LlamaDecoderLayer"}


def shard(trainer, block):
    """Switch FSDP2 on, as Accelerate does by itself on accelerators only."""
    from accelerate import FullyShardedDataParallelPlugin, PartialState
    from accelerate.state import AcceleratorState
    from accelerate.utils import DistributedType

    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2, auto_wrap_policy="transformer_based_wrap", transformer_cls_names_to_wrap=[block]
    )
    for shared in (PartialState._shared_state, AcceleratorState._shared_state):
        shared |= {"distributed_type": DistributedType.FSDP, "fsdp_plugin": plugin}
    trainer.is_fsdp_enabled = True


def train(case, folder, batch, accumulated, sharded=False):
    """
    Two steps of eight sentences in all; returns weights, losses and gradient norms, the strengths of the last step and
    the loss in evaluation.
    """
    from hf_eva import EvaTrainer, EvaTrainingArguments

    name, optim, average = case

    def collate(texts):
        return {key: v.double() if v.is_floating_point() else v for key, v in ZOO[name].batch(texts).items()}

    args = EvaTrainingArguments(
        output_dir=folder,
        use_cpu=True,
        max_steps=2,
        per_device_train_batch_size=batch,
        per_device_eval_batch_size=batch,
        gradient_accumulation_steps=accumulated,
        average_tokens_across_devices=average,
        learning_rate=1e-2,
        adam_epsilon=1e-3,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
        optim=optim,
        **({"eva_variant": "eva", "eva_damping": 1.0} if optim == "eva" else {}),
    )
    trainer = EvaTrainer(ZOO[name].build().double(), args, train_dataset=TEXTS, data_collator=collate)
    if sharded:
        shard(trainer, BLOCKS[name])
    trainer.train()
    parameters = dict(trainer.model.named_parameters())
    assert all(isinstance(parameter, DTensor) == sharded for parameter in parameters.values())
    weights = {key: (p.full_tensor() if sharded else p).detach() for key, p in parameters.items()}
    logs = [log for log in trainer.state.log_history if "loss" in log]
    assert len(logs) == 2
    told = {key: torch.tensor(value) for key, value in logs[-1].items() if key.startswith("eva_strength")}
    assert bool(told) == (optim == "eva")
    logs = torch.tensor([[log["loss"], log["grad_norm"]] for log in logs])
    evaluated = trainer.evaluate(TEXTS)["eval_loss"]
    return {"weights": weights, "logs": logs, "told": told, "evaluation": torch.tensor(evaluated)}


def train_all(rank, port, folder):
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "ACCELERATE_USE_CPU": "true"}
    found = {"/".join(map(str, case)): train(case, folder, 2, 2) for case in CASES}
    return found | {f"sharded/{case[0]}": train(case, folder, 2, 2, sharded=True) for case in SHARDED}


@pytest.fixture(scope="module")
def of_two_processes(tmp_path_factory):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return world.run(train_all, 2, port, str(tmp_path_factory.mktemp("two")), limit=300.0)


@pytest.mark.parametrize("case", CASES, ids=lambda case: "/".join(map(str, case)))
def test_two_processes_train_as_one(case, of_two_processes, tmp_path):
    first, second = (found["/".join(map(str, case))] for found in of_two_processes)
    assert_equal(first["weights"], second["weights"])
    expected = train(case, str(tmp_path), 8, 1)
    assert_near([first["logs"]], [expected["logs"]], 1e-5)
    assert_near(first["weights"], expected["weights"], 1e-5)
    if case[1] == "eva":
        assert_equal(first["told"], second["told"])
        assert_near(first["told"], expected["told"], 1e-5)
    if case[0] != "llama":  # an evaluation is a mean over batches, whose numbers of words differ
        assert_near([first["evaluation"]], [expected["evaluation"]], 1e-5)


@pytest.mark.parametrize("case", SHARDED, ids=lambda case: case[0])
def test_two_processes_with_sharded_weights_train_as_one(case, of_two_processes, tmp_path):
    first, second = (found[f"sharded/{case[0]}"] for found in of_two_processes)
    assert_equal(first["weights"], second["weights"])
    expected = train(case, str(tmp_path), 8, 1)
    assert_near([first["logs"]], [expected["logs"]], 1e-5)
    assert_near(first["weights"], expected["weights"], 1e-5)
    assert_near(first["told"], expected["told"], 1e-5)
