"""What the hooks gather: the right sums, each token once, in the right window, and nothing of anybody else's."""

import copy
import gc
import io
import itertools

import pytest
import torch
import torch.nn.functional as F
from helpers import FAMILIES, albert, assert_equal, assert_near, convnet, data, every_config, losses, mlp
from reference import observe
from torch import nn
from torch._dynamo.utils import counters
from torch.utils.checkpoint import checkpoint

from hf_eva import EvaConfig, create_eva_optimizer, plan
from hf_eva.capture import Capture


def attach(model, with_output_gradients=True) -> Capture:
    return Capture(model, plan(model).layers, with_output_gradients)


def gathered(capture) -> dict[str, torch.Tensor]:
    """All statistics of the window, by layer and name."""
    return {
        f"{layer.name} {name}": value.clone()
        for layer, statistics in zip(capture.layers, capture.collect(), strict=True)
        for name, value in vars(statistics).items()
    }


def expected(model, *functions) -> dict[str, torch.Tensor]:
    """The same from all inputs and output gradients."""
    found = {}
    layers = {layer.name: layer.module for layer in plan(model).layers}
    _, inputs, outputs = observe(model, layers, functions)
    for name in layers:
        X, D = inputs[name], outputs[name]
        found |= {f"{name} tokens": torch.tensor(float(len(X))), f"{name} a": X.mean(0), f"{name} g": D.sum(0)}
        found |= {f"{name} a_square": X.square().sum() / len(X), f"{name} g_square": len(X) * D.square().sum()}
    return found


def hooks(model) -> int:
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


# The sums ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("build", [mlp, convnet])
@pytest.mark.parametrize("micro_batches", [1, 4])
def test_the_statistics_are_those_of_all_tokens(build, micro_batches):
    model = build()
    functions = losses(data(model, micro_batches))
    wanted = expected(model, *functions)
    capture = attach(model)
    for loss in functions:
        loss(model).backward()
    assert_near(gathered(capture), wanted, 1e-12)


def test_g_is_the_gradient_of_the_bias(family):
    model = family.build().double()
    batch = {k: v.double() if v.is_floating_point() else v for k, v in family.batch.items()}
    capture = attach(model)
    for _ in range(2):
        model(**batch).loss.backward()
    found = gathered(capture)
    for layer in capture.layers:
        assert_near([found[f"{layer.name} g"]], [layer.bias.grad], 1e-14)


def test_sixteen_at_once_are_four_times_four():
    model = mlp()
    x, y = torch.randn(16, 3, 6, dtype=torch.float64), torch.randn(16, 3, 4, dtype=torch.float64)
    capture = attach(model)
    F.mse_loss(model(x), y).backward()
    whole = gathered(capture)
    for part in zip(x.chunk(4), y.chunk(4), strict=True):
        (F.mse_loss(model(part[0]), part[1]) / 4).backward()
    assert_near(gathered(capture), whole, 1e-12)


def test_without_output_gradients_only_inputs_are_summed():
    model = mlp()
    (loss,) = losses(data(model))
    wanted = expected(model, loss)
    capture = attach(model, with_output_gradients=False)
    loss(model).backward()
    found = gathered(capture)
    inputs = [name for name in found if not name.endswith((" g", " g_square"))]
    assert_near({name: found[name] for name in inputs}, {name: wanted[name] for name in inputs}, 1e-12)
    assert all(value.abs().sum() == 0 for name, value in found.items() if name not in inputs)


def test_low_precision_models_are_summed_in_float32():
    model = nn.Sequential(nn.Linear(2, 2)).to(torch.bfloat16)
    capture = attach(model)
    model(torch.ones(1000, 2, dtype=torch.bfloat16)).sum().backward()
    found = gathered(capture)
    assert {value.dtype for value in found.values()} == {torch.float32}
    assert found["0 tokens"] == 1000 and found["0 a"].tolist() == [1, 1] and found["0 g"].tolist() == [1000, 1000]


def test_autocast_changes_no_count():
    model = mlp(dtype=torch.float32)
    capture = attach(model)
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(torch.ones(64, 3, 6)).float().mean()
    loss.backward()
    found = gathered(capture)
    assert found["0 tokens"] == 192 and found["0 a"].tolist() == [1.0] * 6
    assert_near([found["5 g"]], [model[5].bias.grad], 1e-2)


# Each token once -----------------------------------------------------------------------------------------------------


class Checkpointed(nn.Module):
    """An `mlp` that runs its middle again in the backward pass."""

    def __init__(self, model, use_reentrant):
        super().__init__()
        self.model, self.use_reentrant = model, use_reentrant

    def forward(self, x):
        h = self.model[0](x)
        h = checkpoint(self.model[1:4], h, use_reentrant=self.use_reentrant)
        return checkpoint(self.model[4:], h, use_reentrant=self.use_reentrant)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointing_counts_once(use_reentrant):
    model = mlp()
    functions = losses(data(model, 2))
    wanted = expected(model, *functions)
    checkpointed = Checkpointed(model, use_reentrant)
    capture = Capture(checkpointed, plan(model).layers, True)
    for loss in functions:
        loss(checkpointed).backward()
    assert_near(gathered(capture), wanted, 1e-12)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointing_around_the_whole_model_counts_once(use_reentrant):
    """The second forward pass of the model runs inside the backward pass, when some layers have been counted."""
    model = mlp()
    (x, y), *_ = data(model)
    wanted = expected(model, *losses([(x, y)]))
    capture = attach(model)
    F.mse_loss(checkpoint(model, x.requires_grad_(), use_reentrant=use_reentrant), y).backward()
    assert_near(gathered(capture), wanted, 1e-12)


@pytest.mark.parametrize(("name", "use_reentrant"), [*itertools.product(FAMILIES, [True, False]), ("albert", None)])
def test_checkpointing_in_transformers_counts_once(name, use_reentrant):
    pytest.importorskip("transformers")
    batch = FAMILIES["bert" if name == "albert" else name].batch
    model = albert() if name == "albert" else FAMILIES[name].build()
    if use_reentrant is not None:
        model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
        model.train()
    capture = attach(model)
    model(**batch).loss.backward()
    found = gathered(capture)
    text = "input_ids" in batch
    for layer in capture.layers:
        per_row = found[f"{layer.name} tokens"].item() / 8
        assert_near([found[f"{layer.name} g"]], [layer.bias.grad], 1e-6)
        calls = 3 if ".albert_layers." in layer.name else 1  # one layer, used three times
        row = (
            1 if "classifier" in layer.name or "pooler" in layer.name else 10 if text else 5 - ("patch" in layer.name)
        )
        assert per_row == calls * row, layer.name


def test_a_module_that_is_called_twice_counts_twice():
    layer = nn.Linear(5, 5).double()
    model = nn.Sequential(layer, nn.Tanh(), layer)
    loss = lambda model: model(torch.ones(3, 5, dtype=torch.float64)).square().sum()  # noqa: E731
    wanted = expected(model, loss)
    capture = attach(model)
    loss(model).backward()
    found = gathered(capture)
    assert_near(found, wanted, 1e-12)
    assert found["0 tokens"] == 6


def test_two_backward_passes_count_twice_as_in_the_gradient():
    model = mlp()
    (loss,) = losses(data(model))
    wanted = expected(model, loss, loss)
    capture = attach(model)
    value = loss(model)
    value.backward(retain_graph=True)
    value.backward()
    assert_near(gathered(capture), wanted, 1e-12)


def test_what_is_not_trained_on_does_not_count():
    model = mlp()
    (loss,) = losses(data(model))
    wanted = expected(model, loss)
    capture = attach(model)
    noise = torch.randn(9, 6, dtype=torch.float64)
    loss(model).backward()
    with torch.no_grad():
        model(noise)
    with torch.inference_mode():
        model(noise)
    model.eval()
    model(noise)  # with gradients, but no backward pass
    model.train()
    assert_near(gathered(capture), wanted, 1e-12)


def test_training_in_evaluation_mode_counts():
    model = mlp().eval()
    (loss,) = losses(data(model))
    wanted = expected(model, loss)
    capture = attach(model)
    loss(model).backward()
    assert_near(gathered(capture), wanted, 1e-12)


def test_keyword_arguments_are_inputs():
    conv1d = pytest.importorskip("transformers.pytorch_utils").Conv1D

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear, self.conv1d, self.conv2d = nn.Linear(3, 3), conv1d(3, 3), nn.Conv2d(1, 1, 1)

        def forward(self, x):
            return self.conv2d(input=self.conv1d(x=self.linear(input=x)).unsqueeze(1).unsqueeze(1))

    model = Model()
    capture = attach(model)
    model(torch.ones(4, 3)).sum().backward()
    found = gathered(capture)
    assert [found[f"{name} tokens"].item() for name in ("linear", "conv1d", "conv2d")] == [4, 4, 12]


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


# The model and its graph ---------------------------------------------------------------------------------------------


class InPlace(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(6, 5), nn.Linear(5, 5)
        self.double()

    def forward(self, x):
        h = F.relu(self.first(x), inplace=True)
        out = self.second(h)
        out += h
        out[..., 0] *= 2
        return out


@pytest.mark.parametrize("shape", [(4, 6), (4, 3, 6)])
def test_outputs_may_be_changed_in_place(shape):
    model, x = InPlace(), torch.randn(shape, dtype=torch.float64)
    model(x).square().sum().backward()
    gradients = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    capture = attach(model)
    model(x).square().sum().backward()
    assert_equal([parameter.grad for parameter in model.parameters()], gradients)
    found = gathered(capture)
    for name in ("first", "second"):
        assert_near([found[f"{name} g"]], [model.get_submodule(name).bias.grad], 1e-12)


def test_an_output_may_be_kept_by_another_hook():
    """A penalty on activations, whose hook came first: the graph needs the output as it was."""
    model, penalties = mlp(), []
    model[0].register_forward_hook(lambda module, args, output: penalties.append(output.pow(2).mean()))
    capture = attach(model)
    (model(data(model)[0][0]).mean() + penalties[0]).backward()
    assert_near([gathered(capture)["0 g"]], [model[0].bias.grad], 1e-12)


def test_gradients_of_gradients_pass():
    model, plain = mlp(), mlp()
    plain.load_state_dict(model.state_dict())
    capture = attach(model)
    for one in (model, plain):
        x = torch.ones(4, 6, dtype=torch.float64, requires_grad=True)
        (slope,) = torch.autograd.grad(one(x).sum(), x, create_graph=True)
        slope.square().sum().backward()
    assert_near(
        [p.grad for p in model.parameters() if p.grad is not None],
        [p.grad for p in plain.parameters() if p.grad is not None],
        1e-12,
    )
    del capture


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_compiled_model_is_seen(backend):
    model = mlp()
    optimizer = create_eva_optimizer(model, lr=0.0, config=EvaConfig(variant="eva", decay=1.0))
    torch.compiler.reset()
    compiled = torch.compile(model, backend=backend)
    for step in range(2):
        (loss,) = losses(data(model, seed=step))
        wanted = expected(copy.deepcopy(model), loss)
        loss(compiled).backward()
        optimizer.step()
        optimizer.zero_grad()
        state = optimizer.state[model[0].weight]
        assert_near([state["eva_a"], state["eva_g"]], [wanted["0 a"], wanted["0 g"]], 1e-12)


def train_compiled(compiles=(), with_eva=True):
    """The model after some steps, the number of compiled graphs and that of the breaks between them."""
    torch.manual_seed(0)
    model = mlp()
    optimizer = create_eva_optimizer(model, lr=0.01, config=EvaConfig(rank=3))
    torch.compiler.reset()
    counters.clear()
    called = torch.compile(model, backend="aot_eager") if "model" in compiles else model
    step = torch.compile(optimizer.step, backend="aot_eager") if "step" in compiles else optimizer.step
    for _ in range(3):
        losses(data(model))[0](called).backward()
        if with_eva:
            step()
        model.zero_grad()
    return model, counters["stats"].get("unique_graphs", 0), sum(counters["graph_break"].values())


def test_the_recipe_breaks_no_graph_of_a_compiled_model():
    model, *graphs = train_compiled(("model",))
    assert graphs == [*train_compiled(("model",), with_eva=False)[1:]] == [1, 0]
    assert_near(model, train_compiled()[0], 1e-10)


def test_a_step_that_is_to_be_compiled_is_the_same():
    model, graphs, _ = train_compiled(("step",))
    assert graphs == 0
    assert_near(model, train_compiled()[0], 1e-12)


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
