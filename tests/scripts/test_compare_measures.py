"""How `scripts/compare.py` searches learning rates, and what it measures."""

import math
import time
from collections.abc import Sequence

import compare
import compare_outcomes
import compare_search
import compare_timing
import pandas as pd
import peers
import pytest
import torch
from compare_config import read_config
from compare_results import Results, read_runs
from compare_search import next_exponents, search
from running import write

# The search ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("best", "budget", "expected"),
    [
        (0, 5, [0, -1, 1, -0.5, 0.5]),
        (0.4, 6, [0, -1, 1, 0.5, -0.5, 0.25]),
        (2, 5, [0, -1, 1, 2, 3]),
        (-9, 5, [0, -1, 1, -2, -3]),
        (3, 2, [0, -1]),
    ],
)
def test_the_search_spends_its_budget_where_the_loss_is_low(best, budget, expected):
    scores = {}
    while exponents := next_exponents(scores, budget):
        scores |= {exponent: abs(exponent - best) for exponent in exponents}
    assert list(scores) == expected


def test_where_nothing_converges_the_search_goes_down():
    assert next_exponents({0.0: math.inf, -1.0: math.inf, 1.0: math.inf}, 5) == [-2.0]


# What is measured ----------------------------------------------------------------------------------------------------


def test_a_slow_optimizer_is_told_from_a_fast_one(settings, tmp_path, monkeypatch):
    class Slow(torch.optim.SGD):
        def step(self, closure=None):
            super().step(closure)
            time.sleep(0.05)

    slow = peers.Peer(lambda model, lr, *_: Slow(model.parameters(), lr=lr), 1.0, "a test", interval=3)
    monkeypatch.setitem(peers.PEERS, "slow", slow)
    config = read_config(write(tmp_path, {**settings, "optimizers": {**settings["optimizers"], "slow": {}}}))
    jobs = {name: compare.job_of(config, config.run("images", name, 1e-3, 6, 0)) for name in ("adamw", "slow")}
    measured = compare_timing.measure_times(jobs, "adamw", rounds=2, steps=2)
    assert measured["slow"]["step_seconds"] > 0.05 > measured["adamw"]["step_seconds"]
    assert measured["slow"]["ratio"] > 1.5 and measured["slow"]["optimizer_share"] > 0.5


def test_state_is_counted_however_deep_and_once():
    class Box:
        def __init__(self, tensor):
            self.inside = [tensor]

    model = torch.nn.Linear(4, 4)
    optimizer = torch.optim.SGD(model.parameters(), lr=1)
    root, weight = torch.zeros(100), model.weight
    optimizer.state[weight] = {"a": (root, root[:10]), "b": Box(torch.zeros(7, 3)), "c": model, "d": weight}
    assert compare_timing.state_bytes(optimizer, model) == 4 * 121


def test_a_crossing_lies_between_two_evaluations():
    curve = pd.Series([4.0, 3.0, 1.0, 2.0], index=[10, 20, 30, 40])
    assert compare_outcomes.crossing(curve, 2.0) == 25
    assert compare_outcomes.crossing(curve, 5.0) == 10
    assert compare_outcomes.crossing(curve, 0.5) == math.inf
    assert compare_outcomes.crossing(pd.Series([math.inf, 1.0], index=[10, 20]), 1.5) == 20
    assert compare_outcomes.crossing(curve, math.nan) == math.inf


@pytest.fixture
def outcomes(settings, tmp_path):
    """Outcomes of made-up curves of Eva, where AdamW ends at 1.0 after 6 steps, and of the schedules to run."""

    def make(
        eva: dict[int, list[float]], asked: set[int], lengths: Sequence[float] = (2, 1, 0.5)
    ) -> compare_outcomes.Outcomes:
        config = read_config(write(tmp_path, {**settings, "lengths": list(lengths)}))
        results = Results(str(tmp_path / "made" / "runs.csv"))
        for optimizer in ("adamw", "eva"):
            while missing := search(config, results, "images", optimizer)[0]:
                for run in missing:
                    results.add(run, "ok", [{"step": 6, "eval_loss": run.lr}])
            lr = min(search(config, results, "images", optimizer)[1])
            for steps, losses in {"adamw": {6: [3.0, 2.0, 1.0]}, "eva": eva}[optimizer].items():
                curve = pd.DataFrame({"step": [steps // 3, 2 * steps // 3, steps], "eval_loss": losses, "metric": 0.5})
                for seed, shift in ((0, -0.1), (1, 0.1)):
                    rows = curve.assign(eval_loss=curve["eval_loss"] + shift).to_dict("records")
                    results.add(config.run("images", optimizer, lr, steps, seed), "ok", rows)
        place = {"machine": "m", "device": "d", "versions": "v", "task": "images"}
        digests = {name: config.digest("images", name) for name in ("adamw", "eva")}
        times = pd.DataFrame(
            [
                {**place, "baseline": digests["adamw"], "digest": digests[name], "optimizer": name, "ratio": ratio}
                for name, ratio in (("adamw", 1.0), ("eva", 1.5))
            ]
        )
        rate = compare_search.tuned(config, results, "images", "eva")
        assert {run.steps for run in compare.reported_runs(config, results, "images", "eva", rate)} == asked
        return compare_outcomes.read_outcomes(config, results, read_runs(results.path), times, "images")

    return make


def test_a_task_may_be_searched_on_more_seeds(settings, tmp_path):
    settings["tasks"]["images"]["tuning_seeds"] = [100, 101]
    config, results = read_config(write(tmp_path, settings)), Results(str(tmp_path / "made" / "runs.csv"))
    while missing := search(config, results, "images", "eva")[0]:
        for run in missing:  # on the first seed alone the lowest rate would win
            results.add(run, "ok", [{"step": 6, "eval_loss": run.lr if run.seed == 100 else 2 / run.lr}])
    rates = search(config, results, "images", "eva")[1]
    assert compare_search.tuned(config, results, "images", "eva") > min(rates)
    assert config.quick().tuning_seeds("images") == config.seeds[:1]


def test_the_schedule_that_meets_the_target_first_counts(outcomes):
    found = outcomes({6: [1.1, 0.8, 0.5], 3: [2.0, 1.2, 0.8]}, {6, 3})
    assert found.target == pytest.approx(1.0)
    eva, adamw = found.all["eva"], found.all["adamw"]
    assert (eva.length, eva.steps) == (0.5, pytest.approx(2.5))
    assert eva.seed_steps == pytest.approx([2.25, 2.75])
    assert compare_outcomes.own_time(eva, found) == pytest.approx(2.5 / 6 * 1.5)
    assert (adamw.steps, compare_outcomes.own_time(adamw, found)) == (6, 1)


def test_a_target_that_is_not_met(outcomes):
    found = outcomes({6: [3.0, 2.0, 1.05]}, {6, 12})
    assert not found.all["eva"].is_met
    assert found.all["eva"].seed_steps == [pytest.approx(6 - 2 * 0.05 / 0.95), math.inf]


def test_a_longer_schedule_may_meet_a_target_that_the_whole_one_does_not(outcomes):
    found = outcomes({6: [3.0, 2.0, 1.05], 12: [3.0, 1.5, 0.5]}, {6, 12})
    assert (found.all["eva"].length, found.all["eva"].steps) == (2, pytest.approx(10))


SOON, LATE, NEVER = [1.1, 0.8, 0.5], [3.0, 2.0, 0.5], [3.0, 2.0, 1.5]  # the target is met after 0.44 or 0.89 of it


@pytest.mark.parametrize(
    ("eva", "asked"),
    [
        ({6: SOON}, {6, 3}),
        ({6: LATE}, {6}),
        ({6: SOON, 3: NEVER}, {6, 3}),
        ({6: SOON, 3: LATE}, {6, 3}),
        ({6: SOON, 3: SOON}, {6, 3, 2}),
        ({6: NEVER}, {6, 12}),
        ({6: NEVER, 12: LATE}, {6, 12}),
        ({6: NEVER, 12: NEVER}, {6, 12, 24}),
    ],
)
def test_no_schedule_is_run_beyond_the_one_that_decides(outcomes, eva, asked):
    outcomes(eva, asked, lengths=(4, 2, 1, 0.5, 1 / 3))
