"""`scripts/compare.py`, from its YAML file to the report."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import compare
import compare_outcomes
import compare_runs
import compare_timing
import matplotlib.image
import pandas as pd
import peers
import pytest
import torch
from compare_config import read_config
from compare_results import Results, append, read_runs
from compare_search import next_exponents, search
from running import QUIET, ROOT

from hf_eva import EvaConfig

CONFIGS = sorted((ROOT / "configs" / "compare").glob("*.yaml"))
STAGES = ("tune", "run", "sweep")
SETTINGS = {
    "name": "tiny",
    "seeds": [0, 1],
    "lengths": [1, 0.5],
    "evaluations": 2,
    "baseline": "adamw",
    "tuning": {"seeds": [100], "budget": 3, "factor": 4},
    "sweep": {"optimizers": ["adamw", "eva"], "factors": [0.25, 1, 1e9]},
    "timing": {"rounds": 2, "steps": 2},
    "highlight": ["eva"],
    "goals": {"adamw": {"images": 100}},
    "optimizers": {"adamw": {}, "eva": {"rank": 2}},
}


class Inline:
    """Stands where the processes are: does its job at once, in this process."""

    def __init__(self, *_) -> None:
        pass

    def submit(self, function, *arguments) -> Future:
        future = Future()
        try:
            future.set_result(function(*arguments))
        except Exception as error:
            future.set_exception(error)
        return future

    def shutdown(self, **_) -> None:
        pass


@pytest.fixture
def settings(tiny) -> dict:
    """A comparison on tiny images."""
    words = iter(tiny("image-classification"))
    task = {key.removeprefix("--"): value for key, value in zip(words, words, strict=True)}
    return {**SETTINGS, "tasks": {"images": {**task, "max_steps": 6, "per_device_train_batch_size": 4}}}


@pytest.fixture
def start(tmp_path, monkeypatch, settings):
    """Runs a comparison without processes of its own, and returns its runs."""
    monkeypatch.setattr(compare, "ProcessPoolExecutor", Inline)

    def main(*arguments: str, **changes) -> pd.DataFrame:
        path = write(tmp_path, {**settings, **changes})
        compare.main([path, "--workers", "1", "--threads", "1", "--output", str(tmp_path), *arguments])
        return read_runs(str(tmp_path / "tiny" / "runs.csv"))

    return main


def write(folder: Path, settings: dict) -> str:
    path = folder / "tiny.yaml"
    path.write_text(json.dumps(settings))  # which is YAML
    return str(path)


def keys(runs: pd.DataFrame) -> list[tuple]:
    ends = runs[runs["step"] == runs["steps"]]
    return list(ends[["digest", "lr", "steps", "seed"]].itertuples(index=False, name=None))


# The whole way -------------------------------------------------------------------------------------------------------


def test_from_a_file_to_a_report_and_no_run_twice(start, tmp_path, monkeypatch):
    runs = start()
    assert set(runs["optimizer"]) == {"adamw", "eva"}
    assert len(keys(runs)) == len(set(keys(runs)))
    whole = runs[(runs["steps"] == 6) & (runs["status"] == "ok")]
    assert set(whole["step"]) == {3, 6}
    report = (tmp_path / "REPORT.md").read_text()
    row = next(line for line in report.splitlines() if line.startswith("| eva | 0."))
    assert len(row.split("|")) == 15
    assert "(goal 100: " in report
    assert "1 of 3" in report  # the sweep at a billion times the learning rate
    assert matplotlib.image.imread(tmp_path / "tiny" / "images.png")[..., :3].std() > 0.05
    times = pd.read_csv(tmp_path / "tiny" / "times.csv").set_index("optimizer")
    assert times.loc["adamw", "ratio"] == 1
    assert (times["step_seconds"] > 0).all() and times["optimizer_share"].between(0, 1).all()
    assert 0 < times.loc["eva", "state_bytes"] < times.loc["adamw", "state_bytes"]
    if sys.platform == "linux":
        assert (times["peak_bytes"] >= 0).all()

    (tmp_path / "REPORT.md").write_text(f"above\n{report}below\n")
    monkeypatch.setattr(Inline, "submit", lambda *_: pytest.fail("ran again"))
    assert start().equals(runs)
    report = (tmp_path / "REPORT.md").read_text()
    assert report.startswith("above") and report.endswith("below\n") and report.count("## tiny") == 1


def test_an_interrupted_comparison_goes_on_where_it_was(start, tmp_path, monkeypatch):
    done = []

    def train(job):
        if len(done) == 4:
            raise KeyboardInterrupt
        done.append(job)
        return real(job)

    real = compare.train
    monkeypatch.setattr(compare, "train", train)
    with pytest.raises(SystemExit) as ended:
        start("--stages", *STAGES)
    assert ended.value.code == 130
    path = tmp_path / "tiny" / "runs.csv"
    kept = read_runs(str(path))
    assert len(keys(kept)) == 4
    with path.open("a") as file:  # as a power cut would leave it
        file.write(path.read_text().splitlines()[-1][:-2])
    monkeypatch.setattr(compare, "train", real)
    resumed = start("--stages", *STAGES)
    assert len(keys(resumed)) == len(set(keys(resumed)))
    counts = resumed[resumed["step"] == resumed["steps"]].groupby("optimizer").size()
    short = (resumed["optimizer"] == "eva") & (resumed["steps"] < 6)  # run where the whole schedule meets the target
    assert counts["adamw"] == 3 + 4 + 1 and counts["eva"] == 3 + 2 + 1 + (2 if short.any() else 0)
    pd.testing.assert_frame_equal(resumed[: len(kept)], kept)


def test_a_run_whose_process_dies_gets_one_more_chance(start, monkeypatch, capsys):
    real, attempts = Inline.submit, []

    def submit(self, function, *arguments):
        job = arguments[0]
        if function is compare_runs.train and job.peer == "eva" and job.seed == 1 and job.steps == 6:
            attempts.append(job)
            future = Future()
            future.set_exception(BrokenProcessPool())
            return future
        return real(self, function, *arguments)

    monkeypatch.setattr(Inline, "submit", submit)
    runs = start("--stages", "tune", "run")
    assert len(attempts) == 1 and (runs["status"] == "failed").sum() == 1
    assert "eva" in (line := capsys.readouterr().err) and "its process died" in line
    for _ in range(2):
        start("--stages", "tune", "run")
    assert len(attempts) == 2


def test_a_training_that_diverges_is_stopped_and_loses(start):
    runs = start("--stages", "tune", optimizers={"adamw": {}, "eva": {}, "sgd": {"lr_ratio": 1e9}})
    sgd = runs[runs["optimizer"] == "sgd"]
    assert set(sgd["status"]) == {"diverged"} and len(keys(sgd)) == 3
    ends = sgd[sgd["step"] == sgd["steps"]]
    assert ends["eval_loss"].map(math.isinf).all()


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"optimizers": {"adamw": {}, "eva": {}, "sgd": {"foreah": 1}}}, "optimizers.sgd: unknown option 'foreah'"),
        ({"train_dir": "gone"}, "tasks.images: there is no gone"),
    ],
)
def test_settings_that_only_a_run_can_refuse(changes, expected, start, settings, capsys):
    if "train_dir" in changes:
        changes = {"tasks": {"images": {**settings["tasks"]["images"], **changes}}}
    with pytest.raises(SystemExit) as ended:
        start(**changes)
    assert ended.value.code == 2
    assert f"compare.py: error: {expected}" in capsys.readouterr().err


@pytest.mark.slow
def test_killed_in_the_middle_no_run_is_done_twice(tmp_path, settings):
    command = [sys.executable, ROOT / "scripts" / "compare.py", write(tmp_path, settings), "--output", tmp_path]
    command += ["--workers", "2", "--stages", "tune", "run", "report"]
    path = tmp_path / "tiny" / "runs.csv"
    environment = {**os.environ, **QUIET}
    for number in (signal.SIGKILL, signal.SIGINT):
        before = path.read_text().count("\n") if path.exists() else 0
        process = subprocess.Popen(command, env=environment, cwd=ROOT, stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + 120
        while not path.exists() or path.read_text().count("\n") == before:
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.05)
        process.send_signal(number)
        assert process.wait(timeout=60) == (-signal.SIGKILL if number == signal.SIGKILL else 130)
    subprocess.run(command, env=environment, cwd=ROOT, check=True, timeout=240)
    runs = keys(read_runs(str(path)))
    assert len(runs) == len(set(runs))
    assert "### images" in (tmp_path / "REPORT.md").read_text()


def test_a_report_of_nothing_says_so(start, tmp_path):
    start("--stages", "report")
    report = (tmp_path / "REPORT.md").read_text()
    assert "No results yet." in report and "Without results so far: images." in report


# What a run is -------------------------------------------------------------------------------------------------------


def test_equal_seeds_see_equal_models_and_batches(settings, tmp_path):
    config = read_config(write(tmp_path, settings))
    seen = []
    for optimizer in ("adamw", "eva"):
        job = compare.job_of(config, config.run("images", optimizer, 1e-9, 3, seed=5))
        trainer = compare_runs.make_trainer(job, str(tmp_path / optimizer))
        weights = torch.cat([p.detach().flatten().clone() for p in trainer.model.parameters()])
        trainer.train()
        seen.append((weights, [log["loss"] for log in trainer.state.log_history if "loss" in log]))
    assert torch.equal(seen[0][0], seen[1][0])
    assert seen[0][1] == pytest.approx(seen[1][1], rel=1e-5)


def test_an_optimizer_that_replaces_the_schedule_gets_a_constant_one(settings, tmp_path):
    config = read_config(write(tmp_path, {**settings, "optimizers": {**settings["optimizers"], "schedulefree": {}}}))
    job = compare.job_of(config, config.run("images", "schedulefree", 1e-3, 3, seed=5))
    assert compare_runs.make_trainer(job, str(tmp_path)).args.lr_scheduler_type == "constant"


def test_the_digest_knows_what_makes_another_run(settings, tmp_path):
    def digest(**changes) -> str:
        return read_config(write(tmp_path, {**settings, **changes})).digest("images", "eva")

    first, task = digest(), settings["tasks"]["images"]
    default, same = {"adamw": {}, "eva": {}}, {"adamw": {}, "eva": {"rank": EvaConfig().rank}}
    assert digest(seeds=[7], lengths=[1], optimizers={"adamw": {}, "eva": {"rank": 2, "lr_ratio": 9}}) == first
    assert digest(tasks={"images": {**task, "learning_rate": 1, "max_steps": 9, "eva_rank": 3}}) == first
    assert digest(optimizers=default) == digest(optimizers=same) != first
    assert digest(tasks={"images": {**task, "weight_decay": 0.5}}) != first
    assert digest(evaluations=5) != first


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


def test_all_optimizers_get_equally_many_learning_rates(start, tmp_path, settings):
    start("--stages", "tune")
    config = read_config(write(tmp_path, settings))
    results = Results(str(tmp_path / "tiny" / "runs.csv"))
    for optimizer in config.optimizers:
        missing, rates = search(config, results, "images", optimizer)
        assert not missing and len(rates) == 3


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
    """The outcomes of made-up curves: AdamW ends at 1.0 after 6 steps, Eva gets there earlier with half the steps."""

    def make(eva: dict[int, list[float]]) -> compare_outcomes.Outcomes:
        config = read_config(write(tmp_path, settings))
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
        return compare_outcomes.read_outcomes(config, results, read_runs(results.path), times, "images")

    return make


def test_the_schedule_that_meets_the_target_first_counts(outcomes):
    found = outcomes({6: [3.0, 1.5, 0.5], 3: [2.0, 1.2, 0.8]})
    assert found.target == pytest.approx(1.0)
    eva, adamw = found.all["eva"], found.all["adamw"]
    assert (eva.length, eva.steps) == (0.5, pytest.approx(2.5))
    assert eva.seed_steps == pytest.approx([2.25, 2.75])
    assert compare_outcomes.own_time(eva, found) == pytest.approx(2.5 / 6 * 1.5)
    assert (adamw.steps, compare_outcomes.own_time(adamw, found)) == (6, 1)


def test_a_target_that_is_not_met(outcomes):
    found = outcomes({6: [3.0, 2.0, 1.05]})
    assert not found.all["eva"].is_met
    assert found.all["eva"].seed_steps == [pytest.approx(6 - 2 * 0.05 / 0.95), math.inf]


# Files ---------------------------------------------------------------------------------------------------------------


def test_what_is_appended_after_a_torn_line_is_whole(tmp_path):
    path = str(tmp_path / "deep" / "table.csv")
    append(path, pd.DataFrame({"a": [1], "b": [2]}))
    with open(path, "a") as file:
        file.write("3")
    append(path, pd.DataFrame({"a": [4], "b": [5]}))
    assert Path(path).read_text() == "a,b\n1,2\n3\n4,5\n"


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_comparison_is_valid(path, monkeypatch):
    monkeypatch.chdir(ROOT)
    config = read_config(str(path))
    assert config.name == path.stem
    assert {config.baseline, "eva"} <= set(config.optimizers)
    assert all(config.digest(task, name) for task in config.tasks for name in config.optimizers)


# Bad input -----------------------------------------------------------------------------------------------------------

BAD_INPUT = {
    "key": ({"seed": [1]}, "unknown key 'seed' in the comparison, did you mean 'seeds'?"),
    "inner key": ({"tuning": {"seeds": [9], "bugdet": 3}}, "unknown key 'bugdet' in tuning, did you mean 'budget'?"),
    "missing": ({"tuning": {"budget": 3}}, "tuning has no 'seeds'"),
    "number": ({"evaluations": "many"}, "evaluations should be of type int, got 'many'"),
    "sign": ({"lengths": [1, -1]}, "lengths should be above 0, got '-1'"),
    "least": ({"timing": {"rounds": 0}}, "timing.rounds should be at least 1, got '0'"),
    "list": ({"seeds": 3}, "seeds should be a list with at least one value, got '3'"),
    "mapping": ({"optimizers": ["adamw"]}, "optimizers should hold lines like `name: ...`, got ['adamw']"),
    "baseline": (
        {"baseline": "adamv"},
        "baseline names 'adamv', which is not in this comparison, did you mean 'adam",
    ),
    "goals": ({"goals": {"adamw": {"image": 0.5}}}, "goals.adamw names 'image'"),
    "seeds": ({"seeds": [1, 100]}, "seed 100 is in seeds and in tuning.seeds"),
    "factor": ({"tuning": {"seeds": [100], "factor": 1}}, "tuning.factor should be above 1, got 1.0"),
    "length": ({"lengths": [0.5]}, "the longest of lengths should be 1"),
    "name": ({"name": "../x"}, "name should be made of letters, digits, - and _, got '../x'"),
    "peer": (
        {"optimizers": {"adamw": {}, "eva": {}, "soup": {}}},
        "optimizers.soup is no known optimizer, did you",
    ),
    "option": ({"optimizers": {"adamw": {}, "eva": {"rnk": 2}}}, "optimizers.eva: "),
    "recipe": ({"tasks": {"images": {"recipe": "gone.yaml"}}}, "there is no recipe gone.yaml"),
    "argument": ({"tasks": {"images": {"tsk": "x"}}}, "unknown key 'tsk' in tasks.images, did you mean 'task'?"),
    "value": ({"tasks": {"images": {"task": "poetry"}}}, "tasks.images: argument --task: invalid choice: 'poetry'"),
    "steps": ({"tasks": {"images": {"task": "causal-lm"}}}, "tasks.images has no max_steps"),
    "flag": (["--tasks", "imges"], "--tasks names 'imges', which is not in this comparison, did you mean 'images'?"),
    "workers": (["--workers", "0"], "--workers must be at least 1, got 0"),
}


@pytest.mark.parametrize(("wrong", "expected"), BAD_INPUT.values(), ids=BAD_INPUT)
def test_bad_input_is_one_sentence(wrong, expected, settings, tmp_path, capsys):
    changes, flags = (wrong, []) if isinstance(wrong, dict) else ({}, wrong)
    with pytest.raises(SystemExit) as ended:
        compare.main([write(tmp_path, {**settings, **changes}), "--output", str(tmp_path / "out"), *flags])
    assert ended.value.code == 2
    (error,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("compare.py: error: ")]
    assert expected in error
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("content", "expected"), [("a: [", "is not YAML"), ("- a", "should hold lines like")])
def test_a_file_that_is_no_comparison(content, expected, tmp_path):
    path = tmp_path / "x.yaml"
    path.write_text(content)
    with pytest.raises(ValueError, match=expected):
        read_config(str(path))
    with pytest.raises(ValueError, match="there is no"):
        read_config(str(tmp_path / "gone.yaml"))
