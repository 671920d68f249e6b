"""Nothing is left behind: no memory over many steps, no hook, and no cycle that keeps a model alive."""

import gc
import weakref
from collections import Counter

import pytest
import torch
from helpers import CONFIGS, FAMILIES, assert_equal, assert_near, data, every_config, losses, mlp
from torch import nn
from torch.utils.checkpoint import checkpoint

from hf_eva import create_eva_optimizer

hooked = pytest.mark.parametrize("config", [CONFIGS["eva"], CONFIGS["eva_f"]], ids=["eva", "eva_f"])


def train(optimizer, loss, steps=1):
    for _ in range(steps):
        loss().backward()
        optimizer.step()
        optimizer.zero_grad()


def step(model, optimizer, seed=0):
    (loss,) = losses(data(model, seed=seed))
    train(optimizer, lambda: loss(model))


def hooks(model) -> int:
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


def living() -> Counter:
    """All objects that the garbage collector knows, by type, and the bytes of all tensors."""
    gc.collect()
    objects = gc.get_objects()
    found = Counter(type(thing).__qualname__ for thing in objects)
    # By exact type: a compiler's tensors, which other tests may have left, have no bytes.
    found["bytes"] = sum(thing.nbytes for thing in objects if type(thing) in (torch.Tensor, nn.Parameter))
    return found


@every_config
def test_memory_is_flat_over_a_thousand_steps(config):
    model = nn.Sequential(nn.Linear(3, 2), nn.Tanh())
    optimizer = create_eva_optimizer(model, lr=1e-3, config=config)
    x = torch.randn(5, 3)

    def loss():
        return model(x).square().mean()

    train(optimizer, loss, 10)
    before = living()
    train(optimizer, loss, 1000)
    after = living()
    grown = {name: after[name] - before[name] for name in after if after[name] > before[name] + 100}
    assert not grown


@pytest.mark.parametrize("name", FAMILIES)
def test_memory_is_flat_in_transformers(name):
    """Masks and what a decoder reads are kept from one forward pass to the next, and no longer."""
    pytest.importorskip("transformers")
    model, batch = FAMILIES[name].build(), FAMILIES[name].batch
    optimizer = create_eva_optimizer(model, config=CONFIGS["eva"])

    def loss():
        return model(**batch).loss

    train(optimizer, loss, 3)
    before = living()
    train(optimizer, loss, 20)
    after = living()
    assert after["bytes"] <= before["bytes"] and after["Tensor"] <= before["Tensor"]


@hooked
def test_forward_passes_without_a_step_leave_nothing(config):
    model = mlp()
    optimizer = create_eva_optimizer(model, config=config)
    step(model, optimizer)
    (loss,) = losses(data(model))
    loss(model)
    before = living()
    for _ in range(50):
        loss(model)  # with gradients, but no backward pass
        with torch.no_grad():
            loss(model)
    assert living()["Tensor"] <= before["Tensor"]


@every_config
def test_nothing_keeps_a_model_alive(config):
    """Not even until the next collection of cycles: memory on a GPU is wanted back at once."""
    model = mlp()
    optimizer = create_eva_optimizer(model, config=config)
    step(model, optimizer)
    dead = [weakref.ref(thing) for thing in (model, optimizer, model[0].weight, model[0])]
    gc.collect()
    gc.disable()
    try:
        del optimizer
        del model
        assert [thing() for thing in dead] == [None] * len(dead)
    finally:
        gc.enable()


@every_config
def test_the_optimizer_dies_before_the_model_and_takes_its_hooks_along(config):
    model = mlp()
    optimizer = create_eva_optimizer(model, config=config)
    step(model, optimizer)
    dead = weakref.ref(optimizer)
    del optimizer
    assert dead() is None and hooks(model) == 0


@hooked
def test_the_optimizer_outlives_a_pending_graph(config):
    """A loss that somebody keeps holds neither the optimizer nor its state."""
    model = mlp()
    optimizer = create_eva_optimizer(model, config=config)
    loss = losses(data(model))[0](model)
    dead = weakref.ref(optimizer)
    del optimizer
    assert dead() is None
    loss.backward()


@hooked
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointing_keeps_nothing(config, use_reentrant):
    model = mlp()
    optimizer = create_eva_optimizer(model, config=config)
    (x, _), *_ = data(model)
    x.requires_grad_()

    def loss():
        return checkpoint(model, x, use_reentrant=use_reentrant).square().mean()

    train(optimizer, loss, 3)
    before = living()
    train(optimizer, loss, 20)
    assert living()["Tensor"] <= before["Tensor"]


@every_config
def test_two_trainings_in_one_process_do_not_meet(config):
    """In turns, micro-batch by micro-batch, as alone."""

    def start():
        torch.manual_seed(0)
        model = mlp()
        return model, create_eva_optimizer(model, lr=0.01, config=config)

    alone = []
    for first in (0, 100):
        alone.append(start())
        for seed in range(first, first + 4):
            step(*alone[-1], seed)
    together = [start(), start()]
    for turn in range(4):
        for (model, _), first in zip(together, (0, 100), strict=True):
            losses(data(model, seed=first + turn))[0](model).backward()
        for _, optimizer in together:
            optimizer.step()
            optimizer.zero_grad()
    for one, other in zip(alone, together, strict=True):
        assert_equal(one[0], other[0])


@hooked
def test_two_optimizers_of_one_model_take_turns_after_detach(config):
    """Each with layers of its own hands; the second starts afresh."""
    model, expected = mlp(), mlp()
    expected.load_state_dict(model.state_dict())
    first = create_eva_optimizer(model, lr=0.0, config=config)
    step(model, first)
    first.detach()
    assert hooks(model) == 0
    for one in (model, expected):
        optimizer = create_eva_optimizer(one, lr=0.01, config=config)
        step(one, optimizer, seed=1)
    assert_near(model, expected, 0.0)
