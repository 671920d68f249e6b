"""`scripts/peers.py` makes every optimizer of the comparison, and `scripts/kfac.py` two of them."""

import io
import math
import sys

import kfac
import peers
import pytest
import torch
from helpers import FAMILIES, assert_equal, assert_near, convnet, data, gpt2, mlp
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from transformers import Trainer, TrainerCallback, TrainingArguments

import hf_eva

pytest.importorskip("pytorch_optimizer")

LR, WEIGHT_DECAY = 1e-4, 0.01
every_peer = pytest.mark.parametrize("name", peers.PEERS)


def make(name, model, **options):
    optimizer = peers.build(name, model, LR * peers.PEERS[name].lr_ratio, WEIGHT_DECAY, 20, options)
    if hasattr(optimizer, "train"):
        optimizer.train()
    return optimizer


def train(model, optimizer, batch, steps):
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@every_peer
def test_a_peer_trains_every_parameter_once(name, family):
    torch.manual_seed(0)  # of dropout
    model = family.build()
    before = [p.detach().clone() for p in model.parameters()]
    optimizer = make(name, model)
    grouped = [id(p) for group in optimizer.param_groups for p in group["params"]]
    assert sorted(grouped) == sorted(id(p) for p in model.parameters())
    losses = train(model, optimizer, family.batch, 8)
    assert min(losses[1:]) < losses[0]
    used = [p.grad is not None for p in model.parameters()]
    assert [not torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True)] == used


@every_peer
def test_groups_decay_as_in_the_trainer_and_follow_a_scheduler(name):
    peer = peers.PEERS[name]
    optimizer = make(name, FAMILIES["bert"].build())
    scheduler = LambdaLR(optimizer, lambda step: 0.5**step)
    optimizer.step()
    scheduler.step()
    for group in optimizer.param_groups:
        assert group["lr"] == pytest.approx(LR * peer.lr_ratio / 2)
        decays = {WEIGHT_DECAY / peer.lr_ratio if p.ndim >= 2 else 0.0 for p in group["params"]}
        assert decays == {group["weight_decay"]}


@every_peer
def test_a_saved_state_goes_on_where_it_was(name):
    family = FAMILIES["gpt2"]
    model, other = family.build(), family.build()
    optimizer = make(name, model)
    train(model, optimizer, family.batch, 2)
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    other.load_state_dict(model.state_dict())
    resumed = make(name, other)
    resumed.load_state_dict(torch.load(file, weights_only=True))  # as Trainer loads it
    assert train(model, optimizer, family.batch, 10) == train(other, resumed, family.batch, 10)
    assert_equal(other, model)


@pytest.mark.parametrize("name", ["muon", "soap", "shampoo", "kfac", "foof"])
def test_a_matrix_method_takes_the_layers_of_the_plan(name, family):
    model = family.build()
    optimizer = make(name, model)
    optimizer.load_state_dict(optimizer.state_dict())  # as accelerate does
    matrices, others = optimizer.parts
    planned = [layer.weight for layer in hf_eva.plan(model).layers if layer.weight.ndim == 2 or name != "muon"]
    assert [id(p) for group in matrices.param_groups for p in group["params"]] == [id(p) for p in planned]
    assert type(others) is torch.optim.AdamW
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    before = [p.detach().clone() for p in model.parameters()]
    train(model, optimizer, family.batch, 2)
    assert_equal([p.detach() for p in model.parameters()], before)
    assert matrices.state is optimizer.state is others.state and len(optimizer.state) == sum(
        p.grad is not None for p in model.parameters()
    )


@pytest.mark.parametrize("name", ["kfac", "schedulefree"])
def test_the_trainer_takes_a_peer(name, tmp_path):
    family = FAMILIES["gpt2"]
    model = family.build()
    optimizer = make(name, model)
    modes = []

    class Mode(TrainerCallback):
        def on_optimizer_step(self, *args, **kwargs):
            modes.append(optimizer.param_groups[0].get("train_mode"))

        on_evaluate = on_optimizer_step

    settings = {"per_device_train_batch_size": 2, "lr_scheduler_type": "linear", "report_to": "none", "use_cpu": True}
    args = TrainingArguments(tmp_path, max_steps=3, eval_strategy="steps", eval_steps=2, **settings)
    rows = [{key: tensor[i] for key, tensor in family.batch.items()} for i in range(8)]
    Trainer(model, args, None, rows, rows, optimizers=(optimizer, None), callbacks=[Mode()]).train()
    assert {group["lr"] for group in optimizer.param_groups} == {0.0}
    if name == "schedulefree":  # the Trainer tells it when to train, and when the average is wanted
        assert modes[:4] == [True, True, False, True]


def test_options_reach_the_optimizer():
    model = FAMILIES["vit"].build()
    assert make("eva", model, rank=8).config.rank == 8
    assert make("paper_eva", model, damping=0.1).config == hf_eva.EvaConfig.paper("eva", damping=0.1)
    assert make("soap", model, precondition_frequency=5).param_groups[0]["precondition_frequency"] == 5
    assert make("kfac", model, damping=1.0).param_groups[0]["damping"] == 1.0
    assert make("lion", model, betas=(0.95, 0.98)).param_groups[0]["betas"] == (0.95, 0.98)


def test_what_is_unknown_or_missing_is_named(monkeypatch):
    model = FAMILIES["vit"].build()
    with pytest.raises(ValueError, match="unknown optimizer 'shampo', did you mean 'shampoo'"):
        peers.build("shampo", model, LR, 0.0, 10)
    with pytest.raises(
        ValueError, match="unknown option 'precondition_freq' of SOAP, did you mean 'precondition_freq"
    ):
        make("soap", model, precondition_freq=5)
    with pytest.raises(ValueError, match="did you mean 'rank'"):
        make("eva", model, ranks=5)
    monkeypatch.setitem(sys.modules, "pytorch_optimizer", None)
    with pytest.raises(ImportError, match="pip install pytorch_optimizer"):
        make("soap", model)


# The rules themselves ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["muon", "soap", "shampoo"])
def test_turned_gradients_give_a_turned_update(name):
    """What tells these methods from Adam: they know no axes. The size of Shampoo's update is Adam's."""
    turns = [torch.linalg.qr(torch.randn(12, 12, dtype=torch.float64))[0] for _ in range(2)]
    gradients = [torch.randn(12, 12, dtype=torch.float64) for _ in range(15)]
    updates = []
    for left, right in (turns, [torch.eye(12, dtype=torch.float64)] * 2):
        model = nn.Sequential(nn.Linear(12, 12, bias=False, dtype=torch.float64))
        optimizer = peers.build(name, model, 1e-3, 0.0, 20)
        for gradient in gradients:
            model[0].weight.grad = left @ gradient @ right.T
            before = model[0].weight.detach().clone()
            optimizer.step()
        update = model[0].weight.detach() - before
        updates.append(update / update.norm())
    assert_near([updates[0]], [turns[0] @ updates[1] @ turns[1].T], 1e-4)


@pytest.mark.parametrize("shape", [(32, 32), (16, 64), (64, 16)])
def test_muon_makes_singular_values_alike_as_that_of_torch(shape):
    gradient = torch.randn(shape)
    ours, theirs = (nn.Parameter(torch.zeros(shape)) for _ in range(2))
    for p, muon in ((ours, peers.Muon), (theirs, torch.optim.Muon)):
        p.grad = gradient.clone()
        muon([p], lr=1.0, weight_decay=0.0, adjust_lr_fn="match_rms_adamw").step()
    values = torch.linalg.svdvals(ours.detach()) / (0.2 * math.sqrt(max(shape)))
    assert values.min() > 0.65 and values.max() < 1.25
    assert torch.linalg.norm(ours - theirs) < 0.02 * torch.linalg.norm(theirs)  # of which bfloat16 is the cause


def moments(model, optimizer, loss):
    """Per layer: the sums of a backward pass in float64, as `tokens` pairs them."""
    seen = {}
    optimizer.observe = lambda layer, x, grad: seen.update({layer.name: kfac.tokens(layer, x, grad)})
    loss(model).backward()
    return seen


@pytest.mark.parametrize("kind", ["linear", "convolution", "conv1d"])
@pytest.mark.parametrize("output_side", [True, False], ids=["kfac", "foof"])
def test_kfac_solves_with_the_dense_matrix(kind, output_side):
    if kind == "conv1d":
        model = gpt2().double()
        batch = FAMILIES["gpt2"].batch

        def loss(model):
            return model(**batch).loss
    else:
        model = mlp() if kind == "linear" else convnet()
        x, y = data(model)[0]

        def loss(model):
            return nn.functional.mse_loss(model(x), y)

    layers = hf_eva.plan(model).layers
    optimizer = kfac.KFAC(layers, lr=1.0, momentum=0.0, damping=0.2, output_side=output_side)
    seen = moments(model, optimizer, loss)
    del optimizer.observe
    before = {layer.name: layer.weight.detach().clone() for layer in layers}
    model.zero_grad()
    loss(model).backward()
    for layer in layers:
        inputs, outputs = seen[layer.name]
        gradient = layer.kind.matrix(layer.weight.grad)
        assert_near([outputs.T @ inputs], [gradient], 1e-12)  # so tokens and positions belong together
    gradients = {layer.name: layer.kind.matrix(layer.weight.grad).clone() for layer in layers}
    optimizer.step()
    for layer in layers:
        sides = [side.T @ side / len(side) for side in seen[layer.name]]
        a, b = (m + 0.2 * m.trace() / len(m) * torch.eye(len(m), dtype=m.dtype) for m in sides)
        gradient = gradients[layer.name]
        dense = torch.kron(b if output_side else torch.eye(len(b), dtype=b.dtype), a)
        solution = torch.linalg.solve(dense, gradient.flatten())
        expected = 0.2 * math.sqrt(gradient.numel()) * solution / solution.norm()
        step = layer.kind.matrix(before[layer.name] - layer.weight.detach())
        assert_near([step.flatten()], [expected], 1e-8)


def test_kfac_observes_training_alone_and_once_in_an_interval():
    model = mlp()
    x, y = data(model)[0]
    optimizer = kfac.KFAC(hf_eva.plan(model).layers, interval=2)
    with torch.no_grad():
        model(x)
    assert not optimizer.sums
    observed = []
    for _ in range(6):
        nn.functional.mse_loss(model(x), y).backward()
        observed.append(len(optimizer.sums))
        optimizer.step()
    assert observed == [3, 3, 3, 0, 3, 0]
    hooks = [layer.module._forward_hooks for layer in optimizer.layers.values()]
    del optimizer
    assert not any(hooks)
