"""
Models that `fully_shard` has sharded train as one process does without it, send a constant number of sums, and are
saved on some processes and resumed on others.
"""

import copy
from contextlib import nullcontext

import pytest
import torch
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
import world
from helpers import CONFIGS, FAMILIES, assert_equal, assert_near, convnet, data, mlp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor.debug import CommDebugMode

from hf_eva import EvaConfig, create_eva_optimizer

pytestmark = pytest.mark.distributed
STEPS = 5
CONFIGS = {
    **CONFIGS,
    "paper_rescale": EvaConfig.paper("eva", kl_mode="rescale"),
    "bfloat16": EvaConfig(rank=3, momentum_dtype="bfloat16"),
}
RESUMED = ("eva", "paper_eva", "rank_3", "bfloat16")
MODELS = {
    "mlp": mlp,
    "deep": lambda: nn.Sequential(mlp(), nn.Linear(4, 6).double(), mlp(), nn.Linear(4, 6).double(), mlp()),
    "narrow": lambda: nn.Sequential(nn.Linear(6, 3), nn.Tanh(), nn.Linear(3, 1)).double(),  # fewer rows than processes
    "convnet": convnet,
    "gpt2": lambda: FAMILIES["gpt2"].build().double(),  # weights stored transposed: shards are columns
}
CASES = [
    *((name, config) for name in ("mlp", "gpt2") for config in CONFIGS),
    *((name, config) for name in ("narrow", "convnet") for config in ("eva", "rank_3", "paper_eva_s")),
    ("deep", "rank_3"),
]


def by_columns(parameter):
    """All matrices but square ones."""
    return Shard(1 if parameter.ndim == 2 and parameter.shape[0] != parameter.shape[1] else 0)


FP32_SUMS = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
# What `fully_shard` may be asked for beside its defaults, and how near the twin is that holds all weights.
OPTIONS = {
    "mixed precision": ({"mp_policy": FP32_SUMS}, torch.float32, 1e-4),
    "offloaded": ({"offload_policy": CPUOffloadPolicy(pin_memory=False)}, torch.float64, 1e-10),
    "by columns": ({"shard_placement_fn": by_columns}, torch.float64, 1e-10),
    "checkpointed": ({}, torch.float64, 1e-10),
}


def whole(tensor):
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


def shard(model, **options):
    """Each block by itself, the rest with the whole."""
    for block in next((m for m in model.modules() if isinstance(m, nn.ModuleList)), model).children():
        if any(True for _ in block.parameters()):
            fully_shard(block, **options)
    return fully_shard(model, **options)


def build(name, config, mesh):
    torch.manual_seed(0)
    model = MODELS[name]()
    if mesh is not None:
        shard(model, mesh=mesh)
    return model, create_eva_optimizer(model, lr=0.01, weight_decay=0.1, config=CONFIGS[config])


def loss_of(name, model, part, parts):
    """The mean loss of one of equal parts of a batch."""
    if name in FAMILIES:
        batch = {key: value.chunk(parts)[part] for key, value in FAMILIES[name].batch.items()}
        return model(**batch).loss
    x, y = (tensor.chunk(parts)[part] for tensor in data(mlp() if name != "convnet" else convnet())[0])
    output = model(x)
    return F.mse_loss(output, y) if output.shape == y.shape else output.square().mean()


def train(name, config, rank=0, processes=1, mesh=None, steps=STEPS, state=None, micro_batches=1):
    """The weights, and how often the last step has sent something; `state` is a folder to resume from."""
    model, optimizer = build(name, config, mesh)
    if state is not None:
        resume(model, optimizer, state)
    for step in range(steps):
        for i in range(micro_batches):
            if mesh is not None:
                model.set_requires_gradient_sync(i == micro_batches - 1)
            (loss_of(name, model, rank * micro_batches + i, processes * micro_batches) / micro_batches).backward()
        with CommDebugMode() if step == steps - 1 else nullcontext() as sent:
            optimizer.step()
        model.zero_grad()
    assert {str(kind) for kind in sent.get_comm_counts()} <= {"c10d.allreduce_"}
    weights = {n: whole(p) for n, p in model.named_parameters()}
    return model, optimizer, {"weights": weights, "sums": sent.get_total_counts(), "told": optimizer.diagnostics()}


def weights_of(*args, **options):
    return train(*args, **options)[2]["weights"]


def resume(model, optimizer, folder):
    weights, state = get_state_dict(model, optimizer)
    dcp.load({"model": weights, "optimizer": state}, checkpoint_id=folder)
    set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=state)


def beside_a_twin(name, rank, processes, mesh):
    """Train a sharded model beside one that gets its gradients whole; returns the weights of both."""
    options, dtype, _ = OPTIONS.get(name, ({}, torch.float64, 1e-10))
    torch.manual_seed(0)
    model = FAMILIES["gpt2"].build().to(dtype)
    twin = copy.deepcopy(model)
    if name == "checkpointed":
        model.gradient_checkpointing_enable()
    shard(model, mesh=mesh, **options)
    optimizers = [create_eva_optimizer(m, lr=0.01, weight_decay=0.1, config=CONFIGS["rank_3"]) for m in (model, twin)]
    for _ in range(4):
        loss_of("gpt2", model, rank, processes).backward()
        for parameter, other in zip(model.parameters(), twin.parameters(), strict=True):
            other.grad = whole(parameter.grad)
        for optimizer in optimizers:
            optimizer.step()
        model.zero_grad()
    return [{n: whole(p) for n, p in m.named_parameters()} for m in (model, twin)]


def refused(mesh):
    """What is said of an axis of patches that is sharded after the optimizer was made, and before."""
    model = nn.Sequential(nn.Conv2d(2, 2, 2))
    optimizer = create_eva_optimizer(model)
    fully_shard(model, mesh=mesh, shard_placement_fn=lambda p: Shard(2 if p.ndim > 1 else 0))
    with pytest.raises(ValueError) as before:
        create_eva_optimizer(model)
    optimizer.param_groups[0]["params"] = [model[0].weight]  # as Accelerate does it
    model[0].weight.grad = torch.ones_like(model[0].weight)
    with pytest.raises(RuntimeError) as after:
        optimizer.step()
    return [str(before.value), str(after.value)]


def in_two(rank, folder):
    mesh = init_device_mesh("cpu", (2,))
    found = {f"{name}/{config}": train(name, config, rank, 2, mesh)[2] for name, config in CASES}
    for config in RESUMED:
        found[f"accumulated/{config}"] = train("mlp", config, rank, 2, mesh, micro_batches=2)[2]
        model, optimizer, _ = train("gpt2", config, rank, 2, mesh, steps=3)
        weights, state = get_state_dict(model, optimizer)
        dcp.save({"model": weights, "optimizer": state}, checkpoint_id=f"{folder}/{config}")
        found[f"resumed/{config}"] = train("gpt2", config, rank, 2, mesh, 2, f"{folder}/{config}")[2]
    found["refused"] = refused(mesh)
    found["options"] = {name: beside_a_twin(name, rank, 2, mesh) for name in OPTIONS}
    return found


@pytest.fixture(scope="module")
def of_two_processes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    return [*world.run(in_two, 2, str(folder), limit=300.0), folder]


@pytest.mark.parametrize(("name", "config"), CASES)
def test_sharded_processes_train_as_one_without_shards(name, config, of_two_processes):
    first, second, _ = of_two_processes
    assert_equal(first[f"{name}/{config}"]["weights"], second[f"{name}/{config}"]["weights"])
    assert_near(first[f"{name}/{config}"]["weights"], weights_of(name, config), 1e-9)


@pytest.mark.parametrize(("name", "config"), [case for case in CASES if case[0] in ("mlp", "gpt2")])
def test_diagnostics_are_those_of_whole_layers(name, config, of_two_processes):
    first, second, _ = of_two_processes
    told = first[f"{name}/{config}"]["told"]
    assert told == second[f"{name}/{config}"]["told"]
    assert told["eva_fallback_layers"] == 0
    assert told == pytest.approx(train(name, config)[2]["told"], rel=1e-6, abs=1e-9)


def test_the_number_of_sums_does_not_grow_with_the_model(of_two_processes):
    found, _, _ = of_two_processes
    assert found["mlp/rank_3"]["sums"] == found["deep/rank_3"]["sums"] == 6
    assert max(found[f"{name}/{config}"]["sums"] for name, config in CASES) == 8


@pytest.mark.parametrize("config", RESUMED)
def test_micro_batches_that_are_not_summed_over_processes(config, of_two_processes):
    found, _, _ = of_two_processes
    assert_near(found[f"accumulated/{config}"]["weights"], weights_of("mlp", config), 1e-10)


@pytest.mark.parametrize("config", RESUMED)
def test_a_distributed_checkpoint_resumes_on_as_many_processes_and_on_one(config, of_two_processes):
    found, _, folder = of_two_processes
    expected = weights_of("gpt2", config)
    assert_near(found[f"resumed/{config}"]["weights"], expected, 1e-10)
    assert_near(weights_of("gpt2", config, steps=2, state=folder / config), expected, 1e-10)


@pytest.mark.parametrize("option", OPTIONS)
def test_options_of_fully_shard_do_not_change_the_step(option, of_two_processes):
    sharded, twin = of_two_processes[0]["options"][option]
    assert_near(sharded, twin, OPTIONS[option][2], OPTIONS[option][2] / 100)


def in_four(rank, folder):
    mesh = init_device_mesh("cpu", (4,))
    found = {f"{name}/{config}": train(name, config, rank, 4, mesh)[2] for name, config in CASES}
    model, optimizer, _ = train("gpt2", "rank_3", rank, 4, mesh, steps=3)
    weights, state = get_state_dict(model, optimizer)
    dcp.save({"model": weights, "optimizer": state}, checkpoint_id=folder)
    hybrid = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    return found | {
        f"hybrid/{config}": train("gpt2", config, rank, 4, hybrid)[2] for config in ("eva", "rank_3", "paper_eva_s")
    }


def resumed_in_two(rank, folder):
    return weights_of("gpt2", "rank_3", rank, 2, init_device_mesh("cpu", (2,)), 2, folder)


@pytest.mark.slow
def test_four_processes_some_without_rows_and_replicas_of_two(tmp_path):
    found, *others = world.run(in_four, 4, str(tmp_path), limit=600.0)
    expected = {case: weights_of(*case) for case in CASES}
    for (name, config), weights in expected.items():
        assert_near(found[f"{name}/{config}"]["weights"], weights, 1e-9)
    for config in ("eva", "rank_3", "paper_eva_s"):
        assert_near(found[f"hybrid/{config}"]["weights"], expected["gpt2", config], 1e-10)
    for other in others:
        for case, one in found.items():
            assert_equal(one["weights"], other[case]["weights"])
    resumed = *world.run(resumed_in_two, 2, str(tmp_path)), weights_of("gpt2", "rank_3", steps=2, state=tmp_path)
    for one in resumed:  # on two processes and on one
        assert_near(one, expected["gpt2", "rank_3"], 1e-10)


def test_other_ways_to_shard_are_refused_with_a_sentence(of_two_processes):
    for sentence in of_two_processes[0]["refused"]:
        assert "Layer '0' is distributed in a way that Eva does not know" in sentence
