"""The layer kinds: each is a Linear over tokens, so its sums are those of the rows that the reference makes."""

import pytest
import torch
import torch.nn.functional as F
from helpers import assert_equal, assert_near
from hypothesis import given, settings
from hypothesis import strategies as st
from reference_step import output_tokens, tokens
from torch import nn

from hf_eva import layers as rooms
from hf_eva.layers import Layer, kind_of

CONVOLUTIONS = [
    {"kernel_size": 3},
    {"kernel_size": (3, 2), "stride": (2, 1), "padding": (2, 1)},
    {"kernel_size": 3, "padding": "same", "dilation": 2},
    {"kernel_size": (2, 4), "padding": "same"},
    {"kernel_size": 3, "padding": "valid", "stride": 3},
    {"kernel_size": 3, "padding": 1, "padding_mode": "reflect", "stride": 2},
    {"kernel_size": 3, "padding": (2, 1), "padding_mode": "circular"},
    {"kernel_size": 2, "padding": "same", "padding_mode": "replicate"},
]


def layers():
    yield "linear", nn.Linear(5, 3), (4, 5)
    yield "linear, one token", nn.Linear(5, 3), (5,)
    yield "linear, sequences", nn.Linear(5, 3, bias=False), (2, 4, 5)
    yield "linear, images", nn.Linear(5, 3), (2, 3, 4, 5)
    for options in CONVOLUTIONS:
        yield f"conv2d {options}", nn.Conv2d(2, 3, **options), (4, 2, 8, 7)
    yield "conv2d, one image", nn.Conv2d(2, 3, 3), (2, 8, 7)


def sums_of(rows):
    return torch.cat([rows.sum(0), rows.square().sum().view(1)])


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@pytest.mark.parametrize(("module", "shape"), [pytest.param(*case, id=name) for name, *case in layers()])
def test_the_sums_of_a_call(module, shape):
    module = module.double()
    kind = kind_of(module)
    x = torch.randn(shape, dtype=torch.float64)
    y = module(x)
    delta = torch.randn_like(y)
    batched = isinstance(module, nn.Conv2d) and x.ndim == 3
    X = tokens(module, x.unsqueeze(0) if batched else x)
    D = output_tokens(module, delta.unsqueeze(0) if batched else delta)

    found = kind.input_sums(module, x, torch.float64), kind.output_gradient_sums(delta, torch.float64)
    assert found[0][0] == len(X) == len(D)
    assert_near(found, [torch.cat([torch.tensor([len(X)]), sums_of(X)]), sums_of(D)], 1e-12)
    without = kind.input_sums(module, x, torch.float64, with_square=False)
    assert_equal([without], [found[0][:-1]])
    assert_equal([kind.output_gradient_sums(delta, torch.float64, with_square=False)], [found[1][:-1]])

    # The module is the Linear over these rows, and its gradient as a matrix is the sum of their outer products.
    assert kind.shape(module) == (D.shape[1], X.shape[1])
    assert_near(
        [output_tokens(module, y.unsqueeze(0) if batched else y)],
        [F.linear(X, kind.matrix(module.weight), module.bias)],
        1e-12,
    )
    (grad,) = torch.autograd.grad(y, module.weight, delta)
    assert_near([kind.matrix(grad)], [D.T @ X], 1e-12)


MEMORY = {
    "contiguous": lambda *shape: torch.randn(shape),
    "every other": lambda *shape: torch.randn(*shape[:-1], 2 * shape[-1])[..., ::2],
    "transposed": lambda *shape: torch.randn(shape[::-1]).permute(*reversed(range(len(shape)))),
    "expanded": lambda *shape: torch.randn(shape[-1]).expand(shape),
}


@given(
    layout=st.lists(st.integers(0, 4), max_size=3),
    width=st.integers(1, 5),
    memory=st.sampled_from(sorted(MEMORY)),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16]),
    is_masked=st.booleans(),
)
@settings(max_examples=100, deadline=None)
def test_sums_of_batches_of_any_layout(layout, width, memory, dtype, is_masked):
    module, x = nn.Linear(width, 3), MEMORY[memory](*layout, width).to(dtype)
    kind, rows, working = kind_of(module), x.double().reshape(-1, width), torch.promote_types(dtype, torch.float32)
    real = torch.rand(len(rows)) > 0.5 if is_masked else None
    wanted = rows if real is None else rows[real]
    found = kind.input_sums(module, x, working, real)
    assert found[0] == len(wanted) and found.dtype == working
    allowed = 1e-12 if dtype == torch.float64 else 1e-3
    assert_near([found[1:], kind.output_gradient_sums(x, working)], [sums_of(wanted), sums_of(rows)], allowed)
    assert_equal([kind.input_sums(module, x, working, real, False)], [found[:-1]])


def test_conv1d_stores_the_transpose():
    conv1d = pytest.importorskip("transformers.pytorch_utils").Conv1D(3, 5).double()
    kind = kind_of(conv1d)
    x = torch.randn(2, 4, 5, dtype=torch.float64)
    y = conv1d(x)
    delta = torch.randn_like(y)
    assert kind.name == "Conv1D" and kind.shape(conv1d) == (3, 5)
    (grad,) = torch.autograd.grad(y, conv1d.weight, delta)
    matrix = kind.matrix(grad)
    assert_near([matrix], [delta.flatten(0, 1).T @ x.flatten(0, 1)], 1e-12)
    assert matrix.data_ptr() == grad.data_ptr()  # a view: what is written to the matrix reaches the gradient
    assert_near([y], [F.linear(x, kind.matrix(conv1d.weight), conv1d.bias)], 1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("module", "shape"), [(nn.Linear(5, 3), (512, 5)), (nn.Conv2d(1, 2, 2), (64, 1, 8, 8))])
def test_sums_are_taken_in_float32(module, shape, dtype):
    """In bfloat16 a sum of ones ends at 256; in float16 a sum of squares of 300 is infinite."""
    kind, x = kind_of(module), torch.full(shape, 300.0, dtype=dtype)
    X = tokens(module, x.double())
    found = kind.input_sums(module, x, torch.float32)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found[1:].double(), sums_of(X))
    found = kind.output_gradient_sums(torch.ones_like(module(x.float()), dtype=dtype), torch.float32)
    assert found.dtype == torch.float32
    assert found[:-1].unique().item() == len(X) and found[-1].item() == pytest.approx(len(X) * len(found[:-1]))


class Custom(nn.Linear):
    pass


@pytest.mark.parametrize(
    "module", [Custom(2, 2), nn.Bilinear(2, 2, 2), nn.Conv1d(2, 2, 1), nn.ConvTranspose2d(2, 2, 1), nn.LazyLinear(2)]
)
def test_other_modules_have_no_kind(module):
    assert kind_of(module) is None


def test_grouped_convolutions_are_unsupported():
    module = nn.Conv2d(4, 4, 3, groups=2)
    assert "groups=2" in kind_of(module).unsupported(module)
    assert kind_of(nn.Conv2d(4, 4, 3)).unsupported(nn.Conv2d(4, 4, 3)) is None


def test_a_layer_asks_its_module():
    module = nn.Linear(5, 3)
    layer = Layer("name", module, kind_of(module))
    assert layer.shape == (3, 5) and layer.bias is module.bias
    module.weight = nn.Parameter(torch.zeros(3, 5))  # as sharding does
    assert layer.weight is module.weight
    module.bias.requires_grad_(False)
    assert layer.bias is None
    assert Layer("name", nn.Linear(5, 3, bias=False), kind_of(module)).bias is None


@pytest.mark.parametrize("is_masked", [False, True])
def test_sums_in_higher_precision_copy_no_input(is_masked, monkeypatch):
    """Under autocast inputs and output gradients come in bfloat16, of which torch's reductions make a copy first."""
    monkeypatch.setattr(rooms, "BLOCK", 2**10)
    module = nn.Linear(64, 3)
    x = (torch.randn(1000, 64) + 1).bfloat16()
    real = torch.arange(1000) % 3 > 0 if is_masked else None
    kind, wanted = kind_of(module), (x if real is None else x[real]).double()
    with torch.profiler.profile(profile_memory=True) as profiled:
        count, total, square = kind.input_sums(module, x, torch.float32, real).split([1, 64, 1])
    allocated = [event.cpu_memory_usage for event in profiled.events() if event.name.startswith("aten::empty")]
    assert 0 < max(allocated) <= 2**10 * 4
    assert count == len(wanted)
    assert_near([total / count, square / count], [wanted.mean(0), wanted.square().sum(1).mean().view(1)], 1e-4)
    if real is None:
        assert_near([kind.output_gradient_sums(x, torch.float32)], [sums_of(wanted)], 0.1)
