# /// script
# dependencies = ["hf-eva[embedded]"]
# ///
r"""
Compare optimizers: every one gets the same search of its learning rate, then the same schedules, seeds and tasks.

    python scripts/compare.py configs/compare/cpu.yaml
    python scripts/compare.py configs/compare/cpu.yaml --quick
    python scripts/compare.py configs/compare/cpu.yaml --stages tune run --tasks gpt2 --optimizers adamw eva

Curves over steps come from runs in parallel, seconds from a timing of their own on a machine that does nothing else.
Results are kept in OUTPUT/NAME; what is already there is not run again, even if the code of an optimizer has changed:
then delete its rows.
"""

import argparse
import math
import multiprocessing
import os
import statistics
import sys
import textwrap
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from importlib.metadata import version
from typing import Any, NoReturn

import pandas as pd
import psutil
import torch
from compare_config import Config, Run, check_names, read_config
from compare_outcomes import crossing
from compare_results import PLACE, TIME_COLUMNS, Results, append, read_times
from compare_runs import BadSettings, Job, start_fast_worker, start_worker, train
from compare_search import search, tuned
from compare_timing import MEMORY_ENVIRONMENT, measure_memory, measure_times
from finetune import BAD_INPUT
from report import write_report
from tqdm import tqdm

from hf_eva.hardware import cpu_name

BUSY = 20  # percent of the processors
STAGES = ("tune", "run", "sweep", "time", "report")


def wanted(config: Config, results: Results, stages: list[str], pairs: list[tuple[str, str]]) -> list[Run]:
    """Returns the runs that are missing and can start, most urgent first."""
    searches, reported, sweeps = [], [], []
    for task, optimizer in pairs:
        missing, _ = search(config, results, task, optimizer)
        if "tune" in stages:
            searches += missing
        if (rate := tuned(config, results, task, optimizer)) is None:
            continue
        if "run" in stages:
            reported += reported_runs(config, results, task, optimizer, rate)
        if "sweep" in stages and config.sweep and optimizer in config.sweep.optimizers:
            seed, steps = config.tuning_seeds(task)[0], config.steps(task)
            sweeps += [config.run(task, optimizer, rate * factor, steps, seed) for factor in config.sweep.factors]
    runs = {run.key: run for run in [*searches, *reported, *sweeps]}
    return [run for run in runs.values() if not results.is_settled(run)]


def reported_runs(config: Config, results: Results, task: str, optimizer: str, rate: float) -> list[Run]:
    """
    Returns the runs on the reported seeds: the whole schedule, ever shorter ones as long as the one before meets the
    target within their steps, and ever longer ones until one meets it, where the whole one does not and a goal depends
    on the optimizer.
    """

    def at(name: str, rate: float, length: float) -> list[Run]:
        return [config.run(task, name, rate, config.steps(task, length), seed) for seed in config.seeds]

    baseline = tuned(config, results, task, config.baseline)
    targets = at(config.baseline, baseline, 1.0) if baseline else []

    def met(length: float) -> float | None:
        """After how many steps the mean over the seeds meets the target; `None` while it is not known."""
        runs = at(optimizer, rate, length)
        if not targets or not all(results.is_settled(run) for run in [*runs, *targets]):
            return None
        curve = pd.concat(map(results.curve, runs), axis=1).fillna(math.inf).mean(axis=1)  # nothing after a divergence
        return crossing(curve, statistics.fmean(map(results.loss, targets)))

    lengths, steps = [1.0], met(1.0)
    if steps == math.inf and (optimizer == config.subject or task in config.goals.get(optimizer, {})):
        for length in sorted(length for length in config.lengths if length > 1):
            lengths.append(length)
            if met(length) != math.inf:
                break
    for length in sorted((length for length in config.lengths if length < 1), reverse=True):
        if steps is None or steps > config.steps(task, length):
            break
        lengths.append(length)
        steps = met(length)
    return [run for length in lengths for run in at(optimizer, rate, length)]


def count(config: Config, stages: list[str], pairs: list[tuple[str, str]]) -> int:
    """How many runs there are in all, those that are not known yet included."""
    each = {
        "tune": sum(config.tuning.budget * len(config.tuning_seeds(task)) for task, _ in pairs),
        "run": len(pairs) * len(config.lengths) * len(config.seeds),
    }
    swept = [pair for pair in pairs if config.sweep and pair[1] in config.sweep.optimizers]
    total = sum(each.get(stage, 0) for stage in stages)
    return total + ("sweep" in stages) * len(swept) * len(config.sweep.factors if config.sweep else [])


def job_of(config: Config, run: Run) -> Job:
    entry, task = config.entries[run.optimizer], config.workloads[run.task]
    evaluations = config.evaluations if run.seed in config.seeds else 1  # of a search, the end alone counts
    return Job(tuple(task.arguments), entry.peer, entry.options, run.lr, run.steps, run.seed, evaluations)


class Workers:
    """Processes that take one job each, so that one that dies takes no other's job with it."""

    def __init__(self, number: int, environment: dict[str, str], start: Callable[[], None] = start_worker) -> None:
        self._environment, self._start_worker = environment, start
        self._free = [self._start() for _ in range(number)]
        self._busy: dict[Future, tuple[ProcessPoolExecutor, Any]] = {}

    def _start(self) -> ProcessPoolExecutor:
        return ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), self._start_worker)

    @property
    def is_free(self) -> bool:
        return bool(self._free)

    @property
    def tags(self) -> list:
        """What the jobs under way were submitted as."""
        return [tag for _, tag in self._busy.values()]

    def submit(self, tag: Any, function: Callable, *arguments: Any) -> None:
        executor = self._free.pop()
        with set_environment(self._environment):  # a process inherits it when it starts, at its first job
            self._busy[executor.submit(function, *arguments)] = executor, tag

    def finished(self) -> Iterator[tuple[Any, Future]]:
        """Waits for at least one job."""
        done, _ = wait(self._busy, return_when=FIRST_COMPLETED)
        for future in done:
            executor, tag = self._busy.pop(future)
            if isinstance(future.exception(), BrokenProcessPool):
                executor.shutdown(wait=False)
                executor = self._start()
            self._free.append(executor)
            yield tag, future

    def map(self, function: Callable, arguments: dict[Any, tuple]) -> Iterator[tuple[Any, Any]]:
        """The results by tag, as they come, without those of jobs that failed, which are reported."""
        todo = list(arguments.items())
        while todo or self._busy:
            while todo and self._free:
                tag, values = todo.pop(0)
                self.submit(tag, function, *values)
            for tag, future in self.finished():
                if error := future.exception():
                    print(f"{tag}: {function.__name__} failed, {_reason(error, set())}", file=sys.stderr)
                else:
                    yield tag, future.result()

    def __enter__(self) -> "Workers":
        return self

    def __exit__(self, kind: Any, *_: Any) -> None:
        if kind is not None:  # a training that nobody waits for
            for process in multiprocessing.active_children():
                process.terminate()
        for executor in [*self._free, *(executor for executor, _ in self._busy.values())]:
            executor.shutdown(wait=True, cancel_futures=True)


@contextmanager
def set_environment(variables: dict[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def environment(threads: int) -> dict[str, str]:
    return {"OMP_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false"}


def run_all(config: Config, results: Results, stages: list[str], pairs: list[tuple[str, str]], workers: int) -> None:
    """Runs all that is missing, in parallel; every whole run is kept, whatever happens to the next."""
    total = count(config, stages, pairs)
    todo = wanted(config, results, stages, pairs)
    if not todo:
        return
    bar = tqdm(total=total, desc=config.name, unit="run", smoothing=0.05, dynamic_ncols=True)
    best: dict[str, tuple[float, str]] = {}
    told: set[str] = set()
    with bar, Workers(workers, environment(1), start_fast_worker) as pool:
        while todo or pool.tags:
            under_way = {run.key for run in pool.tags}
            for run in todo:
                if pool.is_free and run.key not in under_way:
                    pool.submit(run, train, job_of(config, run))
            for run, future in pool.finished():
                if isinstance(future.exception(), BadSettings):
                    kind, reason = future.exception().args
                    raise ValueError(f"{kind}.{run.task if kind == 'tasks' else run.optimizer}: {reason}")
                name = f"{run.task}, {run.optimizer}, lr {run.lr:g}, {run.steps} steps, seed {run.seed}"
                if error := future.exception():
                    status, rows = "failed", [{"step": run.steps}]
                    bar.write(f"{name}: failed, {_reason(error, told)}", file=sys.stderr)
                else:
                    status, rows = future.result()
                results.add(run, status, rows)
                if status == "ok":
                    best[run.task] = min(best.get(run.task, (math.inf, "")), (rows[-1]["eval_loss"], run.optimizer))
                bar.update()
                bar.set_postfix_str(", ".join(f"{task} {loss:.4g} {who}" for task, (loss, who) in best.items()))
            todo = wanted(config, results, stages, pairs)
        bar.total = bar.n  # what was there already, or was wanted twice, is not run
        bar.refresh()


def time_all(config: Config, results: Results, pairs: list[tuple[str, str]], args: argparse.Namespace) -> None:
    """Times what has no times from a machine like this one, always beside the baseline, and measures its memory."""
    threads = args.threads
    path = os.path.join(os.path.dirname(results.path), "times.csv")
    if (busy := psutil.cpu_percent(interval=1)) > BUSY:
        print(f"other work takes {busy:.0f}% of this machine: times need a quiet one", file=sys.stderr)
    for task in dict.fromkeys(task for task, _ in pairs):
        place = {**machine(threads), "task": task, "baseline": config.digest(task, config.baseline)}
        jobs = {}
        for name in dict.fromkeys([config.baseline, *(name for other, name in pairs if other == task)]):
            rate = tuned(config, results, task, name) or config.start(task, name)
            jobs[name] = job_of(config, config.run(task, name, rate, config.steps(task), config.tuning_seeds(task)[0]))
        table = read_times(path)
        known = set(table[(table[PLACE] == pd.Series(place)).all(axis=1)]["digest"])
        missing = {name: job for name, job in jobs.items() if args.retime or config.digest(task, name) not in known}
        if not missing:
            continue
        print(f"{task}: timing {', '.join(missing)}", file=sys.stderr)
        with Workers(1, environment(threads)) as pool:
            side_by_side = {config.baseline: jobs[config.baseline], **missing}
            pace = config.timing.rounds, config.timing.steps
            measured = dict(pool.map(measure_times, {task: (side_by_side, config.baseline, *pace)}))
        times = measured.get(task, {})
        timed = {name: (job,) for name, job in missing.items() if name in times}
        with Workers(min(args.workers, len(missing)), {**environment(1), **MEMORY_ENVIRONMENT}) as pool:
            memory = dict(pool.map(measure_memory, timed))
        for name in timed:
            row = {"digest": config.digest(task, name), "optimizer": name, **times[name], **memory.get(name, {})}
            append(path, pd.DataFrame([{**place, **row, "status": "ok"}], columns=TIME_COLUMNS))


def machine(threads: int) -> dict[str, str]:
    is_gpu = torch.cuda.is_available()
    return {
        "machine": cpu_name(),
        "device": torch.cuda.get_device_name() if is_gpu else f"{threads} CPU thread{'s' if threads > 1 else ''}",
        "versions": ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "hf-eva")),
    }


def _reason(error: BaseException, known: set[str]) -> str:
    """The error in a line and, unless it is among the `known`, to which it is added, its traceback."""
    if isinstance(error, BrokenProcessPool):
        return "its process died"
    reason, lines = f"{type(error).__name__}: {textwrap.shorten(str(error), 300)}", ""
    if reason not in known:
        lines = "\n" + "".join(traceback.format_exception(error))
    known.add(reason)
    return reason + lines


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", metavar="CONFIG.yaml", help="What to compare, see configs/compare.")
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=STAGES, help="What to do (default: all).")
    parser.add_argument("--tasks", nargs="+", metavar="TASK", help="Only these tasks.")
    parser.add_argument("--optimizers", nargs="+", metavar="NAME", help="Only these optimizers.")
    parser.add_argument("--quick", action="store_true", help="Two optimizers, two seeds, no search: whether it holds.")
    cores = os.cpu_count() or 1
    workers = 1 if torch.accelerator.is_available() else cores
    parser.add_argument("--workers", type=int, default=workers, help="Runs at a time, one thread each (%(default)s).")
    parser.add_argument("--threads", type=int, default=cores, help="Threads of the timed runs (%(default)s).")
    parser.add_argument("--retime", action="store_true", help="Time again what has times: the code has changed.")
    parser.add_argument("--output", default="benchmarks", metavar="DIR", help="Where results go (%(default)s).")
    return parser.parse_args(argv)


def stop(error: Exception) -> NoReturn:
    print(f"compare.py: error: {textwrap.shorten(str(error), 1000)}", file=sys.stderr)
    sys.exit(2)


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    try:
        config = read_config(args.config)
        config = config.quick() if args.quick else config
        for flag in ("workers", "threads"):
            if getattr(args, flag) < 1:
                raise ValueError(f"--{flag} must be at least 1, got {getattr(args, flag)}")
        check_names("--tasks", args.tasks or [], list(config.tasks))
        check_names("--optimizers", args.optimizers or [], list(config.optimizers))
        results = Results(os.path.join(args.output, config.name, "runs.csv"))
    except BAD_INPUT as error:
        stop(error)
    pairs = [
        (task, name)
        for task in args.tasks or config.tasks
        for name in config.contenders(task)
        if name in (args.optimizers or config.optimizers)
    ]
    try:
        run_all(config, results, args.stages, pairs, args.workers)
        if "time" in args.stages:
            time_all(config, results, pairs, args)
        if "report" in args.stages:
            print(write_report(config, results, args.output, args.config))
    except BAD_INPUT as error:
        stop(error)
    except KeyboardInterrupt:
        print("\ninterrupted: the whole runs are kept, the same command goes on from there", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
