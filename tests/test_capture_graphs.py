"""What the hooks leave as it is: a model that works in place, its graph, and what `torch.compile` makes of it."""

import copy

import pytest
import torch
import torch.nn.functional as F
from helpers import assert_equal, assert_near, attach, data, expected, gathered, losses, mlp
from torch import nn
from torch._dynamo.utils import counters

from hf_eva import EvaConfig, create_eva_optimizer


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
