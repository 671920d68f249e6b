"""`scripts/bench_step.py`: its counts, its formulas, its baseline and its record; no time is asserted."""

import bench_measure
import bench_models
import bench_report
import bench_rules
import bench_step
import bench_wire
import pandas as pd
import peers
import pytest
import torch
from bench_models import Architecture
from bench_rules import OPTIMIZERS
from compare_timing import state_bytes
from helpers import assert_near, convnet, data, gpt2, losses, mlp
from torch import nn
from transformers import BertConfig, BertForSequenceClassification

import hf_eva

pytest.importorskip("bitsandbytes")
pytest.importorskip("pytorch_optimizer")

SIZES = {"vocab_size": 64, "hidden_size": 64, "num_attention_heads": 2, "intermediate_size": 128}
TINY = Architecture(BertForSequenceClassification, BertConfig, 2, "a tiny BERT", {**SIZES, "num_labels": 3})


@pytest.fixture
def tiny(monkeypatch):
    monkeypatch.setitem(bench_models.MODELS, "tiny", TINY)


@pytest.fixture(scope="module")
def sides():
    """Every optimizer after some steps, with its counts, on one tiny model."""
    found = bench_measure.make_sides(list(OPTIMIZERS), TINY.build(device="cpu"), 1)
    return {side.name: side for side in found}


# The baseline --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("build", [mlp, lambda: mlp(bias=False), convnet, lambda: gpt2().double()])
def test_the_published_arithmetic_gives_the_published_preset(build):
    torch.manual_seed(0)
    models = [build(), build()]
    models[1].load_state_dict(models[0].state_dict())
    # Large enough for the KL clip to bind at some steps, and for the vectors to matter.
    options = {"damping": 0.1, "kl_clip": 1e-4}
    pair = [
        peers.build(name, model, 1e-2, 0.01, 10, options)
        for name, model in zip(("published_eva", "paper_eva"), models, strict=True)
    ]
    start = [p.detach().clone() for p in models[0].parameters()]
    for step in range(5):
        for model, optimizer in zip(models, pair, strict=True):
            if isinstance(model, nn.Sequential):
                loss = losses(data(model, seed=step))[0](model)
            else:
                ids = torch.arange(12).view(2, 6) * (step + 1) % 32
                loss = model(input_ids=ids, labels=ids).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    assert_near(models[0], models[1], 1e-12)
    moved = [(p.detach() - old).abs().max().item() for p, old in zip(models[0].parameters(), start, strict=True)]
    assert max(moved) > 1e-4


# Counts and formulas -------------------------------------------------------------------------------------------------


def test_counts_are_those_of_the_operations():
    one, other = torch.ones(8, 16), torch.ones(8, 16)
    size = one.numel() * 4
    for work, passes, calls, reads in (
        (lambda: one.add_(other), 3, 1, 0),
        (lambda: one + other, 3, 1, 0),
        (lambda: one.copy_(other), 2, 1, 0),
        (lambda: one.zero_(), 1, 1, 0),
        (lambda: torch.add(one, other, out=torch.empty(8, 16)), 3, 1, 0),
        (lambda: one.T.view(-1, 8)[:4].detach(), 0, 0, 0),
        (lambda: one.copy_(torch.ones(16).expand(8, 16)), 1 + 2 / 8, 2, 0),
        (lambda: torch._foreach_mul_([one, other], 2.0), 4, 1, 0),
        (lambda: one[0, 0].item(), 0, 0, 1),
        (lambda: bool(one[0, 0]), 0, 0, 1),
    ):
        with bench_measure.counting("cpu") as counts:
            work()
        assert (counts.bytes, counts.calls, counts.host_reads) == (passes * size, calls, reads)
    square = torch.ones(16, 16)
    for work in (
        lambda: one @ square,
        lambda: one.addmm_(one, square),
        lambda: torch.baddbmm(one, one[None], square[None]),
        lambda: torch.ops.mkldnn._linear_pointwise(one, square, None, "none", [], ""),
    ):
        with bench_measure.counting("cpu") as counts:
            work()
        assert counts.flops == 2 * 8 * 16 * 16


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_formulas_of_bytes_agree_with_what_is_counted_and_kept(sides, name):
    side, chosen = sides[name], OPTIMIZERS[name]
    least = bench_rules.least_bytes(chosen.peer, side.model, chosen.options)
    if name in ("adamw", "sgd"):
        assert side.counts.bytes == pytest.approx(least, rel=1e-3)
    else:
        assert side.counts.bytes >= least * 0.999
    kept = bench_rules.state_bytes(chosen.peer, TINY.build(), chosen.options)
    # An optimizer of 8 bits keeps small tensors, and scales and tables, in 32.
    assert state_bytes(side.optimizer, side.model) == pytest.approx(kept, rel=0.2 if "8bit" in name else 2e-3)


def test_a_step_of_eva_waits_for_nothing_and_the_published_one_for_each_layer(sides):
    layers = len(hf_eva.plan(sides["eva"].model).layers)
    assert sides["published_eva"].counts.host_reads == 5 * layers
    for name in (
        "adamw",
        "sgd",
        "eva",
        "eva_bf16",
        "eva_every_4",
        "eva_rank_1",
        "paper_eva",
        "paper_eva_f",
        "paper_eva_s",
    ):
        assert sides[name].counts.host_reads == 0
    assert 1 <= sides["sgd"].counts.calls <= sides["adamw"].counts.calls < sides["published_eva"].counts.calls


def test_work_that_repeats_after_some_steps_is_spread_over_them(sides):
    side = sides["kfac"]
    before = [entry["input_factor"].clone() for entry in side.optimizer.state.values() if "input_factor" in entry]
    assert side.interval == 10 and bench_measure.whole_intervals(side, 3) == 10
    bench_measure.count_steps(side, 10)
    after = [entry["input_factor"] for entry in side.optimizer.state.values() if "input_factor" in entry]
    assert before and not any(torch.equal(one, other) for one, other in zip(before, after, strict=True))


def test_curvature_that_is_refreshed_less_often_costs_less(sides):
    often, seldom = sides["eva"], sides["eva_every_4"]
    assert (often.interval, seldom.interval) == (1, 4)
    assert seldom.counts.flops < 0.8 * often.counts.flops and seldom.counts.calls < 0.9 * often.counts.calls


def test_sides_share_parameters_and_not_hooks(sides):
    first = next(iter(sides.values())).model
    for side in sides.values():
        assert all(one is other for one, other in zip(side.model.parameters(), first.parameters(), strict=True))
    hooks = {name: sum(len(m._forward_hooks) for m in side.model.modules()) for name, side in sides.items()}
    layers = len(hf_eva.plan(first).layers)
    hooked = ("paper_eva", "paper_eva_f", "published_eva", "kfac")
    assert hooks == {name: layers if name in hooked else 0 for name in sides}


def test_one_that_fails_takes_no_other_with_it(monkeypatch, capsys):
    monkeypatch.setitem(OPTIMIZERS, "broken", bench_rules.Optimizer("eva", {"rank": 0}))
    found = bench_measure.make_sides(["broken", "sgd"], TINY.build(device="cpu"), 1)
    assert [side.name for side in found] == ["sgd"]
    assert "broken: not measured, ValueError: rank" in capsys.readouterr().err


# What is measured, and on what ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "millions"), [("bert", 109.5), ("gpt2", 124.4), ("vit", 86.6), ("llama-1b", 1100.0)])
def test_models_have_their_true_sizes(name, millions):
    assert bench_models.count(bench_models.MODELS[name].build()) / 1e6 == pytest.approx(millions, rel=1e-3)


def test_what_does_not_fit_loses_blocks_and_takes_turns_in_groups():
    names = ["adamw", "sgd", "eva", "soap"]
    parameters = bench_models.count(TINY.build(2)) * 4
    states = {name: bench_rules.state_bytes(OPTIMIZERS[name].peer, TINY.build(2), {}) for name in names}
    base = 2 * parameters + states["adamw"]
    everything = base + sum(states[name] for name in names[1:])
    assert bench_models.fitting(TINY, names, torch.float32, everything) == (2, [names])
    assert bench_models.fitting(TINY, names, torch.float32, base + states["soap"], 1) == (1, [names])
    layers, groups = bench_models.fitting(TINY, names, torch.float32, base + states["soap"])
    assert (layers, groups) == (2, [["adamw", "sgd", "eva"], ["adamw", "soap"]])
    layers, _ = bench_models.fitting(TINY, names, torch.float32, base + states["soap"] - 1)
    assert layers == 1
    with pytest.raises(ValueError, match=r"a tiny BERT with adamw and any of sgd, eva, soap needs more than 0\.0 GiB"):
        bench_models.fitting(TINY, names, torch.float32, parameters)


def test_patience_ends_the_turns_of_one_that_is_slow():
    slow, fast = (bench_measure.Side(name, None) for name in ("slow", "fast"))
    turns = []
    bench_measure.in_turns([fast, slow], 3, 0.0, lambda side: turns.append(side.name) or 1.0)
    assert turns == ["fast", "slow"]
    fast.spent = slow.spent = 0.0
    turns.clear()
    bench_measure.in_turns([fast, slow], 2, 60.0, lambda side: turns.append(side.name) or 1.0)
    assert turns == ["fast", "slow", "slow", "fast"]


def test_the_record_holds_tables_targets_and_how_it_was_made(tiny, tmp_path, capsys):
    text, csv = tmp_path / "new" / "step.md", tmp_path / "step.csv"
    arguments = ["--models", "tiny", "--optimizers", "eva", "paper_eva", "sgd_foreach", "adamw", "--rounds", "2"]
    arguments += [
        "--parts",
        "step",
        "products",
        "whole",
        "capture",
        "--sizes",
        "2x8",
        "1x4",
        "--steps",
        "1",
        "--layers",
        "1",
    ]
    bench_step.main([*arguments, "--threads", "1", "--device", "cpu", "--output", str(text), str(csv)])
    printed, written = capsys.readouterr().out, text.read_text()
    assert printed.strip() == written.strip()
    assert "command: python scripts/bench_step.py --models tiny" in written and "torch 2" in written
    assert "## step: tiny, 0.1 M parameters, 1 of 2 blocks" in written
    for target in ("paper_eva against sgd_foreach", "eva against adamw", "bytes of state"):
        assert target in written
    assert "eva against no capture" not in written  # has a target at one size, which is none of these
    rows = pd.read_csv(csv)
    assert set(rows["part"]) == {"step", "products", "whole", "capture"} and set(rows["blocks"]) == {1}
    steps = rows[rows["part"] == "step"]
    assert list(steps["optimizer"]) == ["adamw", "eva", "paper_eva", "sgd_foreach"]
    assert (steps["baseline"] == "adamw").all() and steps["ratio"].iloc[0] == 1
    assert (steps[["seconds", "counted_bytes", "least_bytes", "bandwidth", "calls", "state_bytes"]] > 0).all().all()
    whole = rows[rows["part"] == "whole"]
    assert sorted(set(whole["size"])) == ["1 × 4", "2 × 8"] and len(whole) == 8
    assert list(rows[rows["part"] == "capture"]["optimizer"]) == ["no capture", "eva_f", "eva", "eva_quarter"] * 2
    assert "| share" in written


def test_targets_are_judged_by_the_ratios():
    base = {"part": "step", "model": "bert", "state_ratio": 0.55}
    rows = [
        {**base, "optimizer": name, "ratio": ratio, "ns_per_parameter": ratio}
        for name, ratio in (("adamw", 1.0), ("eva", 1.8), ("muon", 9.0), ("paper_eva", 1.0), ("published_eva", 2.0))
    ]
    rows += [
        {**rows[0], "part": "products", "optimizer": name, "ratio": r} for name, r in (("eva", 2.5), ("soap", 2.0))
    ]
    for size in ("8 × 128", "32 × 128"):  # of which the second is the one that targets are for
        rows += [{**row, "part": "whole", "size": size} for row in rows[:2]]
        rows += [{**rows[0], "part": "capture", "size": size, "optimizer": "no capture"}]
        rows += [{**rows[1], "part": "capture", "size": size, "ratio": 1.01}]
    rows += [{**rows[1], "model": f"llama-{size}", "ns_per_parameter": cost} for size, cost in (("a", 1), ("b", 1.3))]

    def verdicts(is_gpu):
        return {(row[""], row["where"]): row["verdict"] for row in bench_report.targets(rows, is_gpu)}

    assert verdicts(False) == {
        ("time of eva against adamw", "step, bert"): "met",
        ("time of eva against muon", "step, bert"): "met",
        ("time of paper_eva against published_eva", "step, bert"): "not met",
        ("time of eva against soap", "products, bert"): "not met",
        ("time of eva against adamw", "whole, bert, 32 × 128"): "not met",
        ("time of eva against no capture", "capture, bert, 32 × 128"): "met",
        ("bytes of state of eva against AdamW", "bert"): "met",
        ("bytes of state of eva against AdamW", "llama-a"): "met",
        ("bytes of state of eva against AdamW", "llama-b"): "met",
        ("time of eva per parameter, most against least", "2 sizes"): "not met",
    }
    assert verdicts(True)["time of eva against adamw", "step, bert"] == "not met"


# The wire ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", bench_wire.VARIANTS)
def test_the_bytes_of_statistics_are_those_that_are_sent(variant, monkeypatch):
    sent = []
    monkeypatch.setattr("hf_eva.capture.begin_sum_", lambda buffer: sent.append(buffer.nbytes) or (1, None))
    model = gpt2()
    optimizer = hf_eva.create_eva_optimizer(model, config=hf_eva.EvaConfig(variant=variant))
    ids = torch.arange(12).view(2, 6)
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    assert sum(sent) == bench_wire.statistics_bytes(model, variant) and len(sent) == (variant != "eva_s")


@pytest.mark.parametrize("ring", [(2e-5, 1e9), (0.0, 1e9), (1e-4, float("inf"))], ids=str)
def test_the_model_of_a_ring_is_found_again(ring):
    ring = bench_wire.Ring(*ring)
    keys = [(size, processes) for size in bench_wire.LADDER for processes in bench_wire.MEASURED]
    found = bench_wire.fit({key: ring.seconds(*key) for key in keys})
    assert found.latency == pytest.approx(ring.latency, rel=1e-6, abs=1e-12)
    assert 1 / found.bandwidth == pytest.approx(1 / ring.bandwidth, rel=1e-6, abs=1e-16)
    assert found.error < 1e-6
    assert ring.sent(2**20, 2) == 2**20 and ring.sent(2**20, 1024) == pytest.approx(2**21, rel=1e-3)
    assert ring.seconds(0, 64) == 0


@pytest.mark.distributed
def test_the_wire_is_measured_and_modelled(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(bench_step, "LADDER", (2**12, 2**16))
    text, csv = tmp_path / "wire.md", tmp_path / "wire.csv"
    arguments = ["--parts", "wire", "--models", "tiny", "--rounds", "2", "--threads", "1", "--device", "cpu"]
    bench_step.main([*arguments, "--output", str(text), str(csv)])
    rows = pd.read_csv(csv)
    measured = rows[rows["seconds"].notna()]
    assert set(measured["processes"]) == {1, 2, 4} and set(measured["optimizer"]) == {"eva", "eva_f"}
    assert set(rows["processes"]) == {1, 2, 4, 8, 16, 64, 256, 1024}
    assert (rows[rows["optimizer"] == "eva_s"]["sent_bytes"] == 0).all()
    assert (rows[(rows["processes"] > 1) & (rows["bytes"] > 0)]["model_seconds"] > 0).all()
    assert "Fitted: " in text.read_text() and "ring: 2 (p - 1) messages" in text.read_text()


@pytest.mark.slow
def test_peak_memory_is_measured_in_processes_of_their_own(tiny, tmp_path):
    csv = tmp_path / "memory.csv"
    arguments = ["--models", "tiny", "--parts", "memory", "--optimizers", "eva", "adamw", "--device", "cpu"]
    bench_step.main([*arguments, "--threads", "1", "--output", str(csv)])
    rows = pd.read_csv(csv)
    assert list(rows["optimizer"]) == [bench_report.BARE, "adamw", "eva"]
    assert (rows["peak_bytes"] > 0).all()
    adamw, eva = rows["state_bytes"][1:]
    assert rows["state_bytes"][0] == 0 < eva < adamw


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--sizes", "32"], "expected BATCHxTOKENS such as 32x128, got '32'"),
        (["--sizes", "0x8"], "got '0x8'"),
        (["--parts", "speed"], "invalid choice: 'speed'"),
        (["--rounds", "0"], "expected a whole number above 0, got '0'"),
        (["--output", "step.txt"], "files that end in .md or .csv, got 'step.txt'"),
    ],
)
def test_arguments_that_make_no_sense_are_refused(arguments, message, capsys):
    with pytest.raises(SystemExit):
        bench_step.main(arguments)
    assert message in capsys.readouterr().err
