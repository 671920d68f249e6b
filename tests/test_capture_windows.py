"""Between which steps the hooks gather, and for how long they stay: the right window, and nobody else's model."""

import copy
import gc
import io
from unittest.mock import Mock

import pytest
import torch
from helpers import assert_equal, assert_near, attach, data, every_config, expected, gathered, hooks, losses, mlp

from hf_eva import EvaConfig, create_eva_optimizer
from hf_eva.collectives import begin_sum_

# Windows -------------------------------------------------------------------------------------------------------------


def test_a_window_ends_with_the_step():
    model = mlp()
    optimizer = create_eva_optimizer(model, lr=0.0, config=EvaConfig(variant="eva", decay=1.0))
    for step in range(3):
        (loss,) = losses(data(model, seed=step))
        wanted = expected(model, loss)
        loss(model).backward()
        optimizer.step()
        model.zero_grad()
        assert_near([optimizer.state[model[0].weight]["eva_a"]], [wanted["0 a"]], 1e-12)


@pytest.mark.parametrize("compiles", [False, True])
def test_between_two_refreshes_the_hooks_rest(compiles, monkeypatch):
    sent = Mock(wraps=begin_sum_)
    monkeypatch.setattr("hf_eva.capture.begin_sum_", sent)
    model = mlp()
    config = EvaConfig(variant="eva", decay=1.0, refresh_interval=4)
    optimizer = create_eva_optimizer(model, lr=0.0, config=config)
    torch.compiler.reset()
    called = torch.compile(model, backend="aot_eager", fullgraph=True) if compiles else model
    wanted, found, gathers = [], [], []
    for step, sums in enumerate([1, 2, 3, 3, 4, 4]):
        (loss,) = losses(data(model, seed=step))
        wanted.append(expected(model, loss)["0 a"])
        loss(called).backward()
        gathers.append(bool(optimizer._capture._buffer.any()))
        optimizer.step()
        optimizer.zero_grad()
        found.append(optimizer.state[model[0].weight]["eva_a"].clone())
        assert sent.call_count == sums
    assert_near(found, [wanted[step] for step in (0, 1, 2, 2, 4, 4)], 1e-12)
    assert gathers == [True, True, True, compiles, True, compiles]  # a graph is the same at every step


@pytest.mark.parametrize("clear", ["model", "optimizer"])
def test_a_window_without_a_step_does_not_leak(clear):
    """As after an overflow under fp16, where `step` is skipped."""
    model = mlp()
    optimizer = create_eva_optimizer(model, lr=0.0, config=EvaConfig(variant="eva", decay=1.0))
    first, second, third = losses(data(model, 3, seed=1))
    wanted = expected(model, second, third)
    first(model).backward()
    (model if clear == "model" else optimizer).zero_grad()
    second(model).backward()
    third(model).backward()
    optimizer.step()
    state = optimizer.state[model[0].weight]
    assert_near([state["eva_a"], state["eva_g"]], [wanted["0 a"], wanted["0 g"]], 1e-12)


def test_a_window_ends_with_a_step_that_fails(monkeypatch):
    model = mlp()
    optimizer = create_eva_optimizer(model, lr=0.0, config=EvaConfig(variant="eva", decay=1.0))
    first, second = losses(data(model, 2))
    wanted = expected(model, second)
    first(model).backward()
    with monkeypatch.context() as patch, pytest.raises(torch.OutOfMemoryError):
        patch.setattr(torch, "_foreach_norm", Mock(side_effect=torch.OutOfMemoryError))
        optimizer.step()
    model.zero_grad()
    second(model).backward()
    optimizer.step()
    assert_near([optimizer.state[model[0].weight]["eva_a"]], [wanted["0 a"]], 1e-12)


def test_an_evaluation_between_micro_batches_does_not_end_the_window():
    model = mlp()
    functions = losses(data(model, 2))
    wanted = expected(model, *functions)
    capture = attach(model)
    for loss in functions:
        loss(model).backward()
        model.eval()
        with torch.no_grad():
            loss(model)
        model.train()
    assert_near(gathered(capture), wanted, 1e-12)


@pytest.mark.parametrize("name", ["gpt2", "t5"])
def test_generation_between_micro_batches_changes_nothing(name):
    """Nor does it leave its own masks and shapes behind."""
    zoo = pytest.importorskip("zoo")
    found = []
    for generates in (False, True):
        model = zoo.ZOO[name].build().double()
        capture = attach(model)
        for seed in range(2):
            model(**zoo.ZOO[name].batch(zoo.sentences(seed=seed))).loss.backward()
            if generates:
                batch = zoo.ZOO[name].batch(zoo.sentences(3, seed=9), side="left")
                inputs = {key: batch[key] for key in ("input_ids", "attention_mask")}
                model.generate(**inputs, max_new_tokens=3, do_sample=False)
        found.append(gathered(capture))
    assert_equal(*found)


def test_two_forward_passes_before_one_backward_pass_are_one_window():
    model = mlp()
    functions = losses(data(model, 2))
    wanted = expected(model, *functions)
    capture = attach(model)
    sum(loss(model) for loss in functions).backward()
    assert_near(gathered(capture), wanted, 1e-12)


def test_loading_a_state_ends_the_window():
    model = mlp()
    optimizer = create_eva_optimizer(model, lr=0.0, config=EvaConfig(variant="eva", decay=1.0))
    first, second = losses(data(model, 2))
    wanted = expected(model, second)
    first(model).backward()
    optimizer.load_state_dict(optimizer.state_dict())
    second(model).backward()
    optimizer.step()
    assert_near([optimizer.state[model[0].weight]["eva_a"]], [wanted["0 a"]], 1e-12)


# Attaching and detaching ---------------------------------------------------------------------------------------------


@every_config
def test_hooks_are_there_only_where_inputs_are_needed(config):
    model = mlp()
    optimizer = create_eva_optimizer(model, config=config)
    assert hooks(model) == (4 if config.variant in ("eva", "eva_f") else 0)
    optimizer.detach()
    optimizer.detach()
    assert hooks(model) == 0


def test_hooks_go_with_their_optimizer():
    model = mlp()
    optimizer = create_eva_optimizer(model, config=EvaConfig(variant="eva"))
    assert hooks(model) == 4
    del optimizer
    gc.collect()
    assert hooks(model) == 0


def test_a_backward_pass_outlives_the_optimizer():
    model = mlp()
    optimizer = create_eva_optimizer(model, config=EvaConfig(variant="eva"))
    loss = losses(data(model))[0](model)
    del optimizer
    gc.collect()
    loss.backward()
    assert model[0].weight.grad is not None


def test_a_detached_optimizer_has_the_base_rule():
    model = mlp()
    optimizer = create_eva_optimizer(model, lr=0.01, config=EvaConfig(variant="eva"))
    optimizer.detach()
    other = mlp()
    other.load_state_dict(model.state_dict())
    adamw = torch.optim.AdamW(other.parameters(), lr=0.01, weight_decay=0.0, fused=True)
    for one, rule in ((model, optimizer), (other, adamw)):
        for step in range(3):
            losses(data(one, seed=step))[0](one).backward()
            rule.step()
            rule.zero_grad()
    assert_equal(model, other)


def test_a_second_optimizer_is_refused():
    model = mlp()
    first = create_eva_optimizer(model, config=EvaConfig(variant="eva"))
    with pytest.raises(ValueError, match=r"Layer '0' already feeds another Eva optimizer: call detach\(\)"):
        create_eva_optimizer(model, config=EvaConfig(variant="eva_f"))
    assert hooks(model) == 4  # and leaves no hook behind
    first.detach()
    create_eva_optimizer(model, config=EvaConfig(variant="eva_f"))


@pytest.mark.parametrize("duplicate", ["copy", "pickle"])
def test_a_copied_model_feeds_nobody(duplicate):
    model = mlp()
    optimizer = create_eva_optimizer(model, lr=0.0, config=EvaConfig(variant="eva", decay=1.0))
    if duplicate == "copy":
        other = copy.deepcopy(model)
    else:
        saved = io.BytesIO()
        torch.save(model, saved)
        saved.seek(0)
        other = torch.load(saved, weights_only=False)
    first, second = losses(data(model, 2))
    wanted = expected(model, first)
    first(model).backward()
    second(other).backward()
    optimizer.step()
    assert_near([optimizer.state[model[0].weight]["eva_a"]], [wanted["0 a"]], 1e-12)
    mine = create_eva_optimizer(other, config=EvaConfig(variant="eva"))  # and it can have an optimizer of its own
    second(other).backward()
    mine.step()
    assert mine.state[other[0].weight]["eva_updates"] == 1
