"""What the hooks leave as it is: a model that works in place, and its graph."""

import pytest
import torch
import torch.nn.functional as F
from helpers import assert_equal, assert_near, attach, data, gathered, mlp
from torch import nn


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
