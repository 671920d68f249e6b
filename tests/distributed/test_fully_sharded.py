"""Models whose weights are sharded by `fully_shard` train as one process without it, and what they send is counted."""

from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
import world
from helpers import CONFIGS, FAMILIES, assert_equal, assert_near, convnet, data, difference, losses, mlp
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from hf_eva import EvaConfig, create_eva_optimizer

pytestmark = pytest.mark.distributed
STEPS = 5
CONFIGS = {**CONFIGS, "paper_rescale": EvaConfig.paper("eva", kl_mode="rescale")}
MODELS = {
    "mlp": mlp,
    "convnet": convnet,
    "gpt2": lambda: FAMILIES["gpt2"].build().double(),
    "bert": lambda: FAMILIES["bert"].build().double(),
}


def shard(model, mesh):
    """Each child by itself and what is left with the whole, as a transformer's blocks are."""
    blocks = [m for m in model.modules() if isinstance(m, nn.ModuleList)] or [model]
    for block in blocks:
        for child in block.children():
            if any(True for _ in child.parameters()):
                fully_shard(child, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def loss_of(name, model, rank, processes):
    if name in FAMILIES:
        batch = FAMILIES[name].batch
        size = 8 // processes
        return model(**{key: value[rank * size : (rank + 1) * size] for key, value in batch.items()}).loss
    x, y = data(model)[0]
    size = 4 // processes
    return losses([(x[rank * size : (rank + 1) * size], y[rank * size : (rank + 1) * size])])[0](model)


def train(name, config, rank=0, processes=1, mesh=None, steps=STEPS):
    torch.manual_seed(0)
    model = MODELS[name]()
    if mesh is not None:
        shard(model, mesh)
    optimizer = create_eva_optimizer(model, lr=0.01, weight_decay=0.1, config=config)
    counts = []
    for _ in range(steps):
        loss_of(name, model, rank, processes).backward()
        with patch.object(dist, "all_reduce", wraps=dist.all_reduce) as sent:
            optimizer.step()
        counts.append(sent.call_count)
        optimizer.zero_grad()
    weights = {n: p.full_tensor() if isinstance(p, DTensor) else p for n, p in model.named_parameters()}
    return {"weights": {n: w.detach() for n, w in weights.items()}, "counts": counts}


def train_all(rank, processes, cases):
    mesh = init_device_mesh("cpu", (processes,))
    return {f"{name}/{config}": train(name, CONFIGS[config], rank, processes, mesh) for name, config in cases}


if __name__ == "__main__":
    import sys
    import time

    n = int(sys.argv[1])
    cases = [(m, c) for m in MODELS for c in CONFIGS]
    begin = time.time()
    found = world.run(train_all, n, n, cases)
    print("took", time.time() - begin)
    for m, c in cases:
        first = found[0][f"{m}/{c}"]
        print(m, c, difference(first["weights"], train(m, CONFIGS[c])["weights"]), first["counts"])
