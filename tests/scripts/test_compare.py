"""`scripts/compare.py`, from its YAML file to the report."""

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
import compare_runs
import matplotlib.image
import pandas as pd
import pytest
import torch
from compare_config import read_config
from compare_results import Results, append, read_runs
from compare_search import search
from running import QUIET, ROOT, write

STAGES = ("tune", "run", "sweep")


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
def start(tmp_path, monkeypatch, settings):
    """Runs a comparison without processes of its own, and returns its runs."""
    monkeypatch.setattr(compare, "ProcessPoolExecutor", Inline)

    def main(*arguments: str, **changes) -> pd.DataFrame:
        path = write(tmp_path, {**settings, **changes})
        compare.main([path, "--workers", "1", "--threads", "1", "--output", str(tmp_path), *arguments])
        return read_runs(str(tmp_path / "tiny" / "runs.csv"))

    return main


def keys(runs: pd.DataFrame) -> list[tuple]:
    ends = runs[runs["step"] == runs["steps"]]
    return list(ends[["digest", "lr", "steps", "seed"]].itertuples(index=False, name=None))


# The whole way -------------------------------------------------------------------------------------------------------


def test_from_a_file_to_a_report_and_no_run_twice(start, tmp_path, monkeypatch):
    runs = start()
    assert set(runs["optimizer"]) == {"adamw", "eva"}
    assert len(keys(runs)) == len(set(keys(runs)))
    whole = runs[(runs["steps"] == 6) & (runs["status"] == "ok")]
    steps = {of_search: set(some["step"]) for of_search, some in whole.groupby(whole["seed"] == 100)}
    assert steps == {False: {3, 6}, True: {6}}  # of a search, the end alone counts
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
    short = (resumed["optimizer"] == "eva") & (resumed["steps"] < 6)  # run where the whole one meets the target soon
    assert counts["adamw"] == 3 + 2 + 1 and counts["eva"] == 3 + 2 + 1 + (2 if short.any() else 0)
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
    path = write(tmp_path, {**settings, "seeds": list(range(12))})  # so many that there is time to end it
    command = [sys.executable, ROOT / "scripts" / "compare.py", path, "--output", tmp_path]
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


def test_all_optimizers_get_equally_many_learning_rates(start, tmp_path, settings):
    start("--stages", "tune")
    config = read_config(write(tmp_path, settings))
    results = Results(str(tmp_path / "tiny" / "runs.csv"))
    for optimizer in config.optimizers:
        missing, rates = search(config, results, "images", optimizer)
        assert not missing and len(rates) == 3


def test_what_is_appended_after_a_torn_line_is_whole(tmp_path):
    path = str(tmp_path / "deep" / "table.csv")
    append(path, pd.DataFrame({"a": [1], "b": [2]}))
    with open(path, "a") as file:
        file.write("3")
    append(path, pd.DataFrame({"a": [4], "b": [5]}))
    assert Path(path).read_text() == "a,b\n1,2\n3\n4,5\n"


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
