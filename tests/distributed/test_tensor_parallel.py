"""Models whose weights are in parts by the tensor-parallel plans of transformers, or by those of torch."""

import os
from functools import partial

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import world
from helpers import CONFIGS, assert_equal, assert_near, data, losses, mlp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from zoo import _DECODER, _build, next_tokens, sentences

from hf_eva import create_eva_optimizer

pytestmark = pytest.mark.distributed
SIZES = {**_DECODER, "num_key_value_heads": 2}
# Biases in parts; norms of heads, whose gradients are summed; outputs that are gathered; a head that is an embedding.
MODELS = {
    "qwen2": lambda: _build("Qwen2", "CausalLM", **SIZES),
    "qwen3": lambda: _build("Qwen3", "CausalLM", **SIZES, head_dim=8),
    "phi3": lambda: _build("Phi3", "CausalLM", **SIZES),
    "tied": lambda: _build("Llama", "CausalLM", **SIZES, tie_word_embeddings=True),
}
CASES = [*((name, "rank_3") for name in MODELS), ("qwen2", "eva_s"), ("qwen2", "paper_eva_s")]
# Each process has some of the columns of the embedding, and so some of the entries of every row.
COLUMNS = {"model.embed_tokens": "embedding_colwise"}
STEPS, SAVED = 3, 2


def load(folder, **options):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64, **options)


def train(model, config, loss, saved=None):
    """
    The weights after some steps, whole. With a folder only the first, which are `saved`, or where they are the others.
    """
    optimizer = create_eva_optimizer(model, lr=0.01, weight_decay=0.1, config=CONFIGS[config])
    is_second = saved is not None and os.path.exists(f"{saved}/.metadata")
    if is_second:
        weights, state = get_state_dict(model, optimizer)
        dcp.load({"model": weights, "optimizer": state}, checkpoint_id=saved)
        set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=state)
    for step in range(SAVED if is_second else 0, SAVED if saved and not is_second else STEPS):
        loss(model, step).backward()
        optimizer.step()
        model.zero_grad()
    if saved and not is_second:
        weights, state = get_state_dict(model, optimizer)
        dcp.save({"model": weights, "optimizer": state}, checkpoint_id=saved)
    return {
        n: (p.full_tensor() if isinstance(p, DTensor) else p).detach().clone() for n, p in model.named_parameters()
    }


def loss_of_text(model, step, part=0, parts=1):
    """The mean over all tokens of a batch; of one of its parts, this part's share of it, times their number."""
    batch = next_tokens(sentences(seed=step))
    labels = batch["labels"][part::parts]
    share = (labels[:, 1:] >= 0).sum() / (batch["labels"][:, 1:] >= 0).sum()
    return model(**{name: values[part::parts] for name, values in batch.items()}).loss * share * parts


def loss_of_numbers(model, step):
    return losses(data(mlp(), seed=step))[0](model)  # of the same widths


def numbers():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 4)).double()


def refusal(model, config):
    with pytest.raises(ValueError) as error:
        create_eva_optimizer(model, config=CONFIGS[config])
    return str(error.value)


def in_two(rank, folder):
    from transformers.distributed import DistributedConfig

    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    plan = DistributedConfig(tp_size=2)
    found = {}
    for name, config in CASES:
        model = load(f"{folder}/{name}", distributed_config=plan)
        placed = {p.placements for p in model.parameters() if isinstance(p, DTensor)}
        assert {(Shard(0),), (Shard(1),)} <= placed
        found[f"{name}/{config}"] = train(model, config, loss_of_text)
    columns = load(f"{folder}/qwen2", distributed_config=DistributedConfig(tp_size=2, tp_plan=COLUMNS))
    assert columns.get_input_embeddings().weight.placements == (Shard(1),)
    found["columns"] = train(columns, "rank_3", loss_of_text)
    styles = {"2": ColwiseParallel(), "4": RowwiseParallel()}
    own = parallelize_module(numbers(), init_device_mesh("cpu", (2,)), styles)
    found["torch"] = train(own, "rank_3", loss_of_numbers)
    found["hooks"] = refusal(load(f"{folder}/qwen2", distributed_config=plan), "eva")
    stripes = {"model.layers.*.mlp.gate_up_proj": "packed_colwise", "model.layers.*.mlp.down_proj": "rowwise"}
    packed = DistributedConfig(tp_size=2, tp_plan=stripes)
    found["packed"] = refusal(load(f"{folder}/phi3", distributed_config=packed), "rank_3")
    # A number that is not finite in one process's part alone.
    model = load(f"{folder}/qwen2", distributed_config=plan)
    optimizer = create_eva_optimizer(model)
    loss_of_text(model, 0).backward()
    before = {n: (p.to_local() if isinstance(p, DTensor) else p).detach().clone() for n, p in model.named_parameters()}
    if rank == 1:
        model.lm_head.weight.grad.to_local()[0] = torch.inf
    optimizer.step()
    after = {n: p.to_local() if isinstance(p, DTensor) else p for n, p in model.named_parameters()}
    assert_equal(after, before)
    dist.barrier()
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    for name, build in MODELS.items():
        build().double().save_pretrained(folder / name)
    return folder


@pytest.fixture(scope="module")
def of_two_processes(folder):
    pytest.importorskip("transformers.distributed", reason="this release of transformers has other plans")
    return world.run(in_two, 2, str(folder), limit=500.0)


@pytest.mark.parametrize(("name", "config"), CASES)
def test_plans_of_transformers_train_as_one_process_does(name, config, of_two_processes, folder):
    first, second = (found[f"{name}/{config}"] for found in of_two_processes)
    assert_equal(first, second)
    assert_near(first, train(load(folder / name), config, loss_of_text), 1e-9)


def test_embeddings_in_columns_train_as_one_process_does(of_two_processes, folder):
    first, second = (found["columns"] for found in of_two_processes)
    assert_equal(first, second)
    assert_near(first, train(load(folder / "qwen2"), "rank_3", loss_of_text), 1e-9)


def test_plans_of_torch_train_as_one_process_does(of_two_processes):
    first, second = (found["torch"] for found in of_two_processes)
    assert_equal(first, second)
    assert_near(first, train(numbers(), "rank_3", loss_of_numbers), 1e-9)


def test_what_is_not_known_is_refused_with_a_sentence(of_two_processes):
    hooks, packed = (of_two_processes[0][name] for name in ("hooks", "packed"))
    assert "q_proj' computes with a weight in parts" in hooks and "take variant 'eva_s'" in hooks
    assert "gate_up_proj' is distributed in a way that Eva does not know" in packed and "exclude the layer" in packed


# Plans beside data parallelism ---------------------------------------------------------------------------------------

BOTH = "shards, embedding in columns"
TWO_BY_TWO = {
    "shards": {"tp_size": 2, "fsdp_size": 2},
    BOTH: {"tp_size": 2, "fsdp_size": 2, "tp_plan": COLUMNS},
    "replicas": {"tp_size": 2, "dp_replicate_size": 2},
}
CASES_OF_FOUR = [
    *(("qwen2", config, "shards") for config in ("rank_3", "paper_eva_s")),
    ("qwen2", "rank_3", BOTH),
    ("qwen2", "rank_3", "replicas"),
    ("tied", "rank_3", "shards"),
]


def loss_of_halves(model, step):
    return sum(loss_of_text(model, step, part, 2) for part in range(2)) / 2


def in_four(rank, folder):
    from transformers.distributed import DistributedConfig

    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "4"}
    half = partial(loss_of_text, part=rank // 2, parts=2)
    found = {}
    for name, config, layout in CASES_OF_FOUR:
        model = load(f"{folder}/{name}", distributed_config=DistributedConfig(**TWO_BY_TWO[layout]))
        assert any(len(p.placements) > 1 and not p.placements[-2].is_replicate() for p in model.parameters())
        found[f"{name}/{config}/{layout}"] = train(model, config, half)
    load_again = partial(load, f"{folder}/qwen2", distributed_config=DistributedConfig(**TWO_BY_TWO[BOTH]))
    found["hooks"] = refusal(load_again(), "eva")
    train(load_again(), "rank_3", half, f"{folder}/saved")
    found["resumed"] = train(load_again(), "rank_3", half, f"{folder}/saved")
    return found


@pytest.fixture(scope="module")
def of_four_processes(folder):
    pytest.importorskip("transformers.distributed", reason="this release of transformers has other plans")
    return world.run(in_four, 4, str(folder), limit=600.0)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "config", "layout"), CASES_OF_FOUR)
def test_plans_beside_data_parallelism_train_as_one_process_does(name, config, layout, of_four_processes, folder):
    first, *others = (found[f"{name}/{config}/{layout}"] for found in of_four_processes)
    for other in others:
        assert_equal(first, other)
    assert_near(first, train(load(folder / name), config, loss_of_halves), 1e-9)


@pytest.mark.slow
def test_hooks_beside_data_parallelism_are_refused(of_four_processes):
    assert "take variant 'eva_s'" in of_four_processes[0]["hooks"]


@pytest.mark.slow
def test_their_checkpoint_resumes_on_four_processes_and_on_one(of_four_processes, folder):
    expected = train(load(folder / "qwen2"), "rank_3", loss_of_halves)
    assert_near(of_four_processes[0]["resumed"], expected, 1e-9)
    assert_near(train(load(folder / "qwen2"), "rank_3", loss_of_halves, str(folder / "saved")), expected, 1e-9)
