"""What the hooks gather: the right sums, and each token once."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from helpers import FAMILIES, albert, assert_near, attach, convnet, data, expected, gathered, losses, mlp, train
from torch import nn
from torch.utils.checkpoint import checkpoint

import hf_eva
from hf_eva import EvaConfig, create_eva_optimizer, plan
from hf_eva.capture import Capture
from hf_eva.layers import LayerKind, Wanted

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


@pytest.mark.parametrize("build", [mlp, convnet])
@pytest.mark.parametrize("compiles", [False, True])
@pytest.mark.parametrize(("share", "number"), [(0.5, 2), (0.3, 2), (0.1, 1)])
def test_the_first_examples_may_stand_for_all(build, compiles, share, number):
    model = build()
    x, y = data(model)[0]
    wanted = expected(model, lambda model: F.mse_loss(model(x[:number]), y[:number]) * number / 4)
    times = {"tokens": 4 / number, "g": 4 / number, "g_square": (4 / number) ** 2}
    wanted = {name: value * times.get(name.rpartition(" ")[2], 1) for name, value in wanted.items()}
    capture = attach(model, share=share)
    torch.compiler.reset()
    called = torch.compile(model, backend="aot_eager", fullgraph=True) if compiles else model
    F.mse_loss(called(x), y).backward()
    assert_near(gathered(capture), wanted, 1e-12)


def test_the_first_examples_have_their_own_padding():
    pytest.importorskip("transformers")
    model, batch = FAMILIES["bert"].build().double().eval(), FAMILIES["bert"].batch
    mask = torch.ones_like(batch["input_ids"])
    mask[0, 3:], mask[-1, 1:] = 0, 0
    batch, found = batch | {"attention_mask": mask}, []
    for share, number in ((0.5, len(mask)), (1.0, len(mask) // 2)):
        capture = attach(model, with_output_gradients=False, share=share)
        model(**{key: value[:number] for key, value in batch.items()}).loss.backward()
        found.append(gathered(capture))
        capture.detach()
    wanted = {name: value * (2 if name.endswith("tokens") else 1) for name, value in found[1].items()}
    assert_near(found[0], wanted, 1e-12)


def test_a_single_example_stands_for_itself():
    model = mlp()
    x, y = data(model)[0]
    for batch, target in ((x[:1], y[:1]), (x[0, 0], y[0, 0])):
        wanted = expected(model, lambda model, x=batch, y=target: F.mse_loss(model(x), y))
        capture = attach(model, share=0.5)
        F.mse_loss(model(batch), target).backward()
        assert_near(gathered(capture), wanted, 1e-12)
        capture.detach()


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


@pytest.mark.parametrize(
    ("config", "numbers"),
    [
        (EvaConfig(variant="eva"), 18 + 16 + 3 * 3),
        (EvaConfig(variant="eva_f"), 18 + 3 * 2),
        (EvaConfig.paper("eva"), 18 + 16 + 3),  # no traces
        (EvaConfig.paper("eva_f"), 18 + 3),
    ],
)
def test_a_step_sends_what_its_variant_needs_at_once(config, numbers, monkeypatch):
    sent = []
    monkeypatch.setattr(hf_eva.capture, "begin_sum_", lambda buffer: sent.append(len(buffer)) or (1, None))
    model = mlp()
    optimizer = create_eva_optimizer(model, config=config)
    for _ in range(2):
        train(model, optimizer, steps=1, micro_batches=3)
    assert sent == [numbers] * 2


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


# Each input once -----------------------------------------------------------------------------------------------------


@pytest.fixture
def reads(monkeypatch):
    """The shapes of all inputs that sums were made of."""
    found, original = [], LayerKind.input_sums

    def input_sums(self, module, x, *args):
        found.append(tuple(x.shape))
        return original(self, module, x, *args)

    monkeypatch.setattr(LayerKind, "input_sums", input_sums)
    return found


def test_query_key_and_value_read_their_input_once(reads):
    pytest.importorskip("transformers")
    model, batch = FAMILIES["bert"].build().double(), FAMILIES["bert"].batch
    batch["attention_mask"] = torch.ones_like(batch["attention_mask"])
    loss = lambda model: model(**batch).loss  # noqa: E731
    wanted = expected(model, loss)
    capture = attach(model)
    reads.clear()
    loss(model).backward()
    assert len(capture.layers) == 14 and len(reads) == 10
    assert_near(gathered(capture), wanted, 1e-12)


class Twice(nn.Module):
    """Two layers with one input, or in between made anew or changed."""

    def __init__(self, between=lambda x: x):
        super().__init__()
        self.first, self.second, self.between = nn.Linear(6, 4), nn.Linear(6, 4), between

    def forward(self, x, attention_mask=None):
        return self.first(x) + self.second(self.between(x))


@pytest.mark.parametrize(("between", "number"), [(lambda x: x, 1), (lambda x: x.clone(), 2), (lambda x: x.add_(1), 2)])
def test_what_has_changed_is_read_again(between, number, reads):
    model, x = Twice(between), torch.randn(4, 3, 6)
    before = x.clone()
    capture = attach(model)
    with torch.autocast("cpu", torch.bfloat16):  # whose graph keeps copies of inputs, so that these may change
        loss = model(x).float().square().sum()
    loss.backward()
    found = gathered(capture)
    assert len(reads) == number
    assert_near([found["first a"], found["second a"]], [one.flatten(0, 1).mean(0) for one in (before, x)], 1e-6)


def test_one_input_under_two_masks_is_read_twice(reads):
    model, x = Twice().double(), torch.randn(2, 3, 6, dtype=torch.float64)
    masks = torch.tensor([[1, 1, 1], [1, 0, 0]]), torch.tensor([[1, 0, 0], [0, 0, 0]])
    capture = attach(model)
    for mask in masks:
        model(x, attention_mask=mask).sum().backward()
    found = gathered(capture)
    assert len(reads) == 2 and found["first tokens"] == found["second tokens"] == 5
    kept = torch.cat([x[mask.bool()] for mask in masks])
    assert_near([found["first a"], found["second a"]], [kept.mean(0)] * 2, 1e-12)


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
    capture = Capture(checkpointed, plan(model).layers, Wanted(True, True, 1.0))
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
