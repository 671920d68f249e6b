"""Two and four processes train as one with the same global batch, and send what the variant needs and no more."""

import time
from contextlib import nullcontext
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
import world
from helpers import CONFIGS, assert_equal, assert_near, mlp
from torch.nn.parallel import DistributedDataParallel

from hf_eva import create_eva_optimizer

pytestmark = pytest.mark.distributed
STEPS = 4
TOKENS = (5, 11, 0, 3)  # of four micro-batches, of which one is empty: the means have to weigh them


def micro_batches(step):
    generator = torch.Generator().manual_seed(step)
    shapes = [((tokens, 6), (tokens, 4)) for tokens in TOKENS]
    return [tuple(torch.randn(s, generator=generator, dtype=torch.float64) + 2 for s in pair) for pair in shapes]


def train(config, rank=0, processes=1, steps=range(STEPS), saved=None):
    """Some steps of one of several processes, which share the micro-batches; what is left can be `saved` for more."""
    torch.manual_seed(0)
    model = mlp()
    optimizer = create_eva_optimizer(model, lr=0.01, weight_decay=0.1, config=config)
    if saved is not None:
        model.load_state_dict(saved["weights"])
        optimizer.load_state_dict(saved["state"])
    wrapped = model if processes == 1 else DistributedDataParallel(model)
    for step in steps:
        *others, last = micro_batches(step)[rank::processes]
        for x, y in (*others, last):
            with wrapped.no_sync() if processes > 1 and x is not last[0] else nullcontext():
                (processes * F.mse_loss(wrapped(x), y, reduction="sum") / sum(TOKENS)).backward()
        optimizer.step()
        wrapped.zero_grad()
    return {"weights": model.state_dict(), "state": optimizer.state_dict()}


def train_all(rank, processes):
    """For each config what is left, and how often the package has sent something."""
    found = {}
    for name, config in CONFIGS.items():
        with patch.object(dist, "all_reduce", wraps=dist.all_reduce) as sent:
            found[name] = {**train(config, rank, processes), "sent": sent.call_count}
    return found


@pytest.fixture(scope="module", params=[2, 4])
def of_all_processes(request):
    return world.run(train_all, request.param, request.param, limit=300.0)


@pytest.mark.parametrize("name", CONFIGS)
def test_processes_train_as_one(name, of_all_processes):
    first, *others = (found[name]["weights"] for found in of_all_processes)
    for other in others:
        assert_equal(first, other)
    assert_near(first, train(CONFIGS[name])["weights"], 1e-10)


@pytest.mark.parametrize("name", CONFIGS)
def test_what_several_processes_have_saved_resumes_on_one(name, of_all_processes):
    more = train(CONFIGS[name], steps=range(STEPS, STEPS + 2), saved=of_all_processes[-1][name])
    assert_near(more["weights"], train(CONFIGS[name], steps=range(STEPS + 2))["weights"], 1e-10)


@pytest.mark.parametrize("name", CONFIGS)
def test_one_sum_per_step_and_only_where_inputs_are_needed(name, of_all_processes):
    expected = STEPS if CONFIGS[name].needs_inputs else 0
    assert {found[name]["sent"] for found in of_all_processes} == {expected}


def step_late(rank, name):
    """
    What a step does with the sum of its statistics, and its norms, in order. The second process begins its step when
    the first has computed its norms, which one that waited for the sum first would never do.
    """
    torch.manual_seed(0)
    model, events, others = mlp(), [], dist.new_group()
    optimizer = create_eva_optimizer(model, lr=0.01, config=CONFIGS[name])
    wrapped = DistributedDataParallel(model)
    send, norms = dist.all_reduce, torch._foreach_norm

    class Work:
        def __init__(self, *args, **kwargs):
            events.append("sent")
            self.work = send(*args, **kwargs)

        def wait(self):
            events.append("waited")
            return self.work.wait()

    def measure(*args):
        if rank == 0 and events == ["sent"]:
            dist.barrier(group=others)
        events.append("norms")
        return norms(*args)

    x, y = micro_batches(0)[rank]
    F.mse_loss(wrapped(x), y).backward()
    with patch.object(dist, "all_reduce", Work), patch.object(torch, "_foreach_norm", measure):
        if rank == 1:
            dist.barrier(group=others)
        optimizer.step()
    return events, {name: parameter.detach() for name, parameter in model.named_parameters()}


def step_all_late(rank):
    return {name: step_late(rank, name) for name, config in CONFIGS.items() if config.needs_inputs}


def test_the_sum_is_on_its_way_while_norms_are_computed():
    first, second = world.run(step_all_late, 2)
    for name, (events, weights) in first.items():
        assert events[:3] == second[name][0][:3] == ["sent", "norms", "waited"]
        assert events.count("sent") == events.count("waited") == 1
        assert_equal(weights, second[name][1])


class Branches(torch.nn.Module):
    """Two layers, of which a batch uses none, the first or both."""

    def __init__(self):
        super().__init__()
        self.layers = torch.nn.Sequential(*mlp()[:1], torch.nn.Linear(5, 5))
        self.scale = torch.nn.Parameter(torch.ones(1))
        self.double()

    def forward(self, x, used):
        return self.layers[:used](self.scale * x)


USED = ((2, 1), (2, 0), (0, 2), (2, 1))  # layers in each step, by the first batch and by the second


def train_branches(rank, name):
    """One of two processes, or without a rank both of them in one."""
    torch.manual_seed(0)
    model = Branches()
    optimizer = create_eva_optimizer(model, lr=0.01, config=CONFIGS[name])
    wrapped = model if rank is None else DistributedDataParallel(model, find_unused_parameters=True)
    for step, used in enumerate(USED):
        parts = range(2) if rank is None else (rank,)
        for part in parts:
            x = torch.randn(2 + part, 6, generator=torch.Generator().manual_seed(step)).double() + part
            (wrapped(x, used[part]).square().mean() / len(parts)).backward()
        optimizer.step()
        wrapped.zero_grad()
    return model.state_dict()


def train_all_branches(rank):
    return {name: train_branches(rank, name) for name in CONFIGS}


def test_layers_that_one_process_does_not_use():
    first, second = world.run(train_all_branches, 2)
    for name in CONFIGS:
        assert_equal(first[name], second[name])
        assert_near(first[name], train_branches(None, name), 1e-10)


def fail_in_the_second(rank):
    if rank == 1:
        raise RuntimeError("this one")
    dist.barrier()


def hang_in_the_first(rank):
    if rank == 0:
        time.sleep(600)


def test_the_runner_names_who_fails_and_who_hangs():
    with pytest.raises(torch.multiprocessing.ProcessRaisedException, match=r"(?s)Process 1.*this one"):
        world.run(fail_in_the_second, 2)
    with pytest.raises(pytest.fail.Exception, match=r"hang_in_the_first: ranks \[0, 1\] of 2 still run after"):
        world.run(hang_in_the_first, 2, limit=3.0)
