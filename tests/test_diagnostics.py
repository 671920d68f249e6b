"""What an optimizer tells of its last step, against the reference, and what it costs when nobody asks."""

import copy
import math
import statistics

import pytest
import torch
from helpers import CONFIGS, FAMILIES, convnet, data, every_config, guess, linear_names, losses, mlp, train
from reference_step import Reference
from torch.utils._python_dispatch import TorchDispatchMode

from hf_eva import EvaConfig, create_eva_optimizer

LR = 0.05
SIDES = ("inputs", "outputs")
# Between the recipe and the published family, where there is no reference.
MIXED = {
    "joint": EvaConfig(curvature="joint"),
    "joint_eva": EvaConfig(variant="eva", curvature="joint"),
    "sgd": EvaConfig(rank=3, base="sgd", kl_mode="rescale"),
    "sgd_eva": EvaConfig(variant="eva", base="sgd", kl_mode="clip"),
}
ALL = {**CONFIGS, **MIXED}


class Operations(TorchDispatchMode):
    """The names of all operations."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func._schema.name.rpartition("::")[2])
        return func(*args, **(kwargs or {}))


def expected_of(reference: Reference) -> dict[str, float]:
    """The same from the matrices themselves."""
    found, squares, numel = {}, 0.0, 0
    for name, (before, update) in reference.turned.items():
        cosine = (before * update).sum() / (before.norm() * update.norm())
        found[f"eva_strength/{name}"] = 1 - cosine.item()
        squares, numel = squares + update.square().sum().item(), numel + update.numel()
    found["eva_strength"] = statistics.fmean(found.values())
    found["eva_update_size"] = math.sqrt(squares / numel)
    if reference.config.kl_mode != "none":
        found[f"eva_{ {'clip': 'kl', 'rescale': 'rescale'}[reference.config.kl_mode] }_factor"] = reference.nu.item()
    averages, curvature = reference.averages, {side: [] for side in SIDES}
    for name in reference.layers:
        if (name, "v0") in averages:
            squared = [averages[name, f"v{i}"].square().sum().item() for i in range(4) if (name, f"v{i}") in averages]
            curvature["outputs"].append(squared[0])
            curvature["inputs"].append(math.prod(squared[1:]))
            continue
        for side, factor, vector in (("inputs", "F A", "a"), ("outputs", "F B", "g")):
            if reference.config.variant == "eva_s":
                curvature[side].append(torch.linalg.eigvalsh(averages[name, factor])[-1].item())
            elif side == "inputs" or reference.config.variant == "eva":
                a = averages[name, vector]
                is_padded = side == "inputs" and reference.config.includes_bias
                curvature[side].append((a[:-1] if is_padded else a).square().sum().item())
    found |= {f"eva_curvature_{side}": statistics.median(norms) for side, norms in curvature.items() if norms}
    return found | {"eva_fallback_layers": 0}


@pytest.mark.parametrize("build", [mlp, convnet])
@every_config
def test_values_are_those_of_the_matrices(config, build):
    model = build()
    reference = Reference(copy.deepcopy(model), linear_names(model), config, lr=LR, weight_decay=0.1, guess=guess)
    optimizer = create_eva_optimizer(model, lr=LR, weight_decay=0.1, config=config)
    assert optimizer.diagnostics() == {}
    for step in range(3):
        train(model, optimizer, 1, micro_batches=2, first=step)
        reference.step(*losses(data(model, 2, seed=step)))
        found, expected = optimizer.diagnostics(), expected_of(reference)
        assert found == pytest.approx(expected, rel=1e-6, abs=1e-9)
        assert optimizer.diagnostics() == found  # asking changes nothing
    assert not [name for name in optimizer.diagnostics(layers=False) if "/" in name]


@pytest.mark.parametrize("config", MIXED.values(), ids=MIXED.keys())
def test_strengths_and_size_are_those_of_weights_momenta_and_gradients(config):
    model, beta = mlp(), config.momentum
    optimizer = create_eva_optimizer(model, lr=LR, config=config)
    train(model, optimizer, 2)
    losses(data(model, seed=2))[0](model).backward()
    linear = {layer.name: layer.weight for layer in optimizer.layers}
    weights, gradients = (
        {n: x.detach().clone() for n, x in pairs}
        for pairs in (linear.items(), ((n, w.grad) for n, w in linear.items()))
    )
    momenta = {name: optimizer.state[weight]["momentum_buffer"].clone() for name, weight in linear.items()}
    optimizer.step()
    found, updates = optimizer.diagnostics(), []
    for name, weight in linear.items():
        before = gradients[name]
        if config.base == "adamw":
            before = beta * optimizer.state[weight]["momentum_buffer"] + (1 - beta) * before
            updates.append((weights[name] - weight.detach()) / LR)
        else:
            updates.append(optimizer.state[weight]["momentum_buffer"] - beta * momenta[name])
        cosine = torch.nn.functional.cosine_similarity(before.flatten(), updates[-1].flatten(), dim=0)
        assert found[f"eva_strength/{name}"] == pytest.approx(1 - cosine.item(), abs=1e-9)
    whole = torch.cat([update.flatten() for update in updates])
    assert found["eva_update_size"] == pytest.approx(whole.square().mean().sqrt().item())
    if config.base == "sgd":
        all_gradients = torch.cat([gradient.flatten() for gradient in gradients.values()])
        inner = (whole * all_gradients).sum().item()
        if config.kl_mode == "rescale":
            assert whole.norm().item() == pytest.approx(all_gradients.norm().item())
            assert found["eva_rescale_factor"] > 0
        else:  # ⟨νP, G⟩ lr² = ν · size, and ν = sqrt(κ / size)
            assert LR**2 * inner == pytest.approx(config.kl_clip / found["eva_kl_factor"])


@pytest.mark.parametrize("config", ALL.values(), ids=ALL.keys())
def test_a_step_does_no_more_for_those_who_ask_than_for_those_who_do_not(config):
    counted = []
    for asks in (False, True):
        torch.manual_seed(0)
        model = mlp(dtype=torch.float32)
        optimizer = create_eva_optimizer(model, lr=LR, config=config)
        names = []
        for step in range(5):
            losses(data(model, seed=step))[0](model).backward()
            with Operations() as operations:
                optimizer.step()
            names.append(operations.names)
            optimizer.zero_grad()
            if asks:
                assert optimizer.diagnostics()["eva_update_size"] > 0
        counted.append(names)
        # AdamW's count of steps lives on the CPU everywhere but in the fused kernel.
        assert not any("_local_scalar_dense" in step or "nonzero" in step for step in names)
    assert counted[0] == counted[1]


@every_config
def test_asking_reads_once(config, monkeypatch):
    model = mlp()
    optimizer = create_eva_optimizer(model, lr=LR, config=config)
    train(model, optimizer, 1)
    reads = []
    for name in ("item", "tolist", "numpy", "cpu", "__bool__", "__float__", "__int__"):
        read = getattr(torch.Tensor, name)
        monkeypatch.setattr(torch.Tensor, name, lambda *args, n=name, read=read: (reads.append(n), read(*args))[1])
    optimizer.diagnostics()
    assert reads == ["tolist"]


@pytest.mark.parametrize("name", FAMILIES)
def test_transformers_in_low_precision(name):
    """Layers of Conv1D, too, whose weights lie the other way round; rounding does not make a strength negative."""
    pytest.importorskip("transformers")
    model = FAMILIES[name].build().to(torch.bfloat16)
    batch = {key: v.bfloat16() if v.is_floating_point() else v for key, v in FAMILIES[name].batch.items()}
    optimizer = create_eva_optimizer(model, lr=LR)
    for _ in range(3):
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    found = optimizer.diagnostics()
    strengths = [found[f"eva_strength/{layer.name}"] for layer in optimizer.layers]
    assert len(strengths) == FAMILIES[name].layers and all(0 <= value < 1 for value in strengths)
    assert 0 < found["eva_update_size"] <= 4 * 2 and found["eva_fallback_layers"] == 0


@every_config
def test_a_layer_without_an_update_counts_and_has_no_strength(config):
    model = mlp()
    optimizer = create_eva_optimizer(model, lr=LR, config=config)
    train(model, optimizer, 2)
    for loss in losses(data(model)):
        loss(model).backward()
    model[0].weight.grad = None
    model[3].weight.grad.zero_()
    if config.base == "adamw":  # whose momentum goes on where there is no gradient
        optimizer.state[model[3].weight]["momentum_buffer"].zero_()
    optimizer.step()
    found = optimizer.diagnostics()
    assert found["eva_fallback_layers"] == (1 if config.includes_bias else 2)
    assert "eva_strength/0" not in found and "eva_strength/5" in found
    assert all(math.isfinite(value) for value in found.values())


def test_there_is_nothing_to_tell_without_preconditioning():
    model = mlp()
    optimizer = create_eva_optimizer(model, lr=LR, config=EvaConfig(variant="none"))
    train(model, optimizer, 1)
    assert optimizer.diagnostics() == {}
    hooked = create_eva_optimizer(model, lr=LR, config=EvaConfig(variant="eva"))
    train(model, hooked, 1)
    hooked.detach()
    train(model, hooked, 1)
    assert hooked.diagnostics() == {"eva_fallback_layers": 3}
