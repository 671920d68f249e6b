"""What the results of a comparison say: losses over the seeds, the target, and who meets it when."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import pandas as pd
from compare_config import Config
from compare_results import PLACE, Results
from compare_search import search
from scipy import stats


@dataclass
class Outcome:
    """What an optimizer reached on a task with its tuned learning rate.

    Args:
        tuning_loss (`float`): Final loss on the seeds of the search.
        is_edge (`bool`): Whether the learning rate lies at an end of those that were tried.
        curves (`dict[float, pd.DataFrame]`): Evaluation losses by length of schedule: a row a step, a column a seed.
        metric (`pd.Series`): Of each seed, after the whole schedule.
        times (`pd.Series`): One row of `times.csv`; empty where it was not timed.
        length, steps: The schedule whose mean loss over the seeds meets the target after the fewest steps, and these.
        seed_steps (`list[float]`): After how many steps each seed by itself meets the target with that schedule.
        earliest (`tuple[float, float]`): The first schedule and step that meet the target; the baseline counts with
            its whole schedule, even where it gets there earlier.
    """

    lr: float
    tuning_loss: float
    is_edge: bool
    curves: dict[float, pd.DataFrame]
    metric: pd.Series
    times: pd.Series
    length: float = 1.0
    steps: float = math.inf
    seed_steps: list[float] = field(default_factory=list)
    earliest: tuple[float, float] = (1.0, math.inf)

    @property
    def final(self) -> pd.Series:
        """Loss of each seed after the whole schedule."""
        return self.curves[1.0].iloc[-1] if 1.0 in self.curves else pd.Series(dtype=float)

    @property
    def is_met(self) -> bool:
        return math.isfinite(self.steps)

    @property
    def ratio(self) -> float:
        """Time of a step, as a multiple of the baseline's."""
        return self.timed("ratio")

    @property
    def is_gpu(self) -> bool:
        return "CPU thread" not in self.times.get("device", "CPU thread")

    @property
    def metric_name(self) -> str:
        is_perplexity = len(self.metric) > 0 and np.allclose(self.metric, np.exp(self.final[self.metric.index]))
        return "perplexity" if is_perplexity else "accuracy"

    def timed(self, key: str) -> float:
        return float(self.times.get(key, math.nan))


@dataclass
class Outcomes:
    """All outcomes of a task; `full` is the number of steps of the whole schedule."""

    all: dict[str, Outcome]
    baseline: Outcome | None
    target: float
    full: int


def own_time(one: Outcome, outcomes: Outcomes) -> float:
    """Time to the target, in units of the baseline's whole training."""
    return one.steps / outcomes.full * one.ratio


def crossing(curve: pd.Series, target: float) -> float:
    """Returns the step, interpolated, at which the loss first is as low as the target; infinite where it never is."""
    steps, losses = curve.index.to_numpy(dtype=float), curve.to_numpy(dtype=float)
    below = losses <= target
    if not below.any():
        return math.inf
    first = int(below.argmax())
    if first == 0 or not math.isfinite(losses[first - 1]):
        return steps[first]
    share = (losses[first - 1] - target) / (losses[first - 1] - losses[first])
    return steps[first - 1] + share * (steps[first] - steps[first - 1])


def half_width(values: Sequence[float]) -> float:
    """Half of the 95 % interval of the mean, by Student's t; nan where there is none."""
    if len(values) < 2 or not np.isfinite(values).all():
        return math.nan
    return float(stats.t.ppf(0.975, len(values) - 1) * stats.sem(values))


def read_outcomes(config: Config, results: Results, runs: pd.DataFrame, times: pd.DataFrame, task: str) -> Outcomes:
    """Finds what every optimizer with a tuned learning rate reached on `task`."""
    runs = runs[runs["status"] != "failed"]
    times = latest(times, config.digest(task, config.baseline))
    full, found = config.steps(task), {}
    for name in config.contenders(task):
        _, rates = search(config, results, task, name)
        lr = min(rates, key=lambda rate: (rates[rate], rate), default=math.nan)
        if not math.isfinite(rates.get(lr, math.inf)):
            continue
        digest = config.digest(task, name)
        own = runs[(runs["digest"] == digest) & (runs["lr"] == lr) & runs["seed"].isin(config.seeds)]
        curves = {}
        for length in config.lengths:
            rows = own[own["steps"] == config.steps(task, length)]
            if not rows.empty:
                # After a divergence there are no evaluations, and none of them would meet a target.
                curves[length] = rows.pivot(index="step", columns="seed", values="eval_loss").fillna(math.inf)
        metric = own[(own["steps"] == full) & (own["step"] == full)].set_index("seed")["metric"].dropna()
        timed = times[times["digest"] == digest]
        timed = timed.iloc[-1] if len(timed) else pd.Series(dtype=object)
        found[name] = Outcome(lr, rates[lr], lr in (min(rates), max(rates)), curves, metric, timed)

    baseline = found.get(config.baseline)
    target = float(baseline.final.mean()) if baseline and len(baseline.final) else math.nan
    outcomes = Outcomes(found, baseline, target if math.isfinite(target) else math.nan, full)
    for one in found.values():
        for length, curve in sorted(one.curves.items(), key=lambda item: item[0] != 1):  # the whole one first
            steps = crossing(curve.mean(axis=1), outcomes.target)
            if length == 1 or steps < one.steps:
                one.length, one.steps = length, steps
                one.seed_steps = [crossing(curve[seed], outcomes.target) for seed in curve]
        one.earliest = one.length, one.steps
    if baseline and math.isfinite(outcomes.target):
        baseline.length, baseline.steps, baseline.seed_steps = 1.0, float(full), []
    return outcomes


def latest(times: pd.DataFrame, baseline: str) -> pd.DataFrame:
    """The rows from the machine, and of the versions, with which this task was timed last."""
    times = times[times["baseline"] == baseline]
    if times.empty:
        return times
    return times[(times[PLACE] == times[PLACE].iloc[-1]).all(axis=1)]


def swept(config: Config, results: Results, task: str, name: str, outcomes: Outcomes) -> dict[float, float]:
    """Final losses by learning rate of the sweep of an optimizer, as far as it has been run."""
    if name not in outcomes.all:
        return {}
    rates = [outcomes.all[name].lr * factor for factor in config.sweep.factors]
    seed, steps = config.tuning_seeds(task)[0], config.steps(task)
    runs = [config.run(task, name, rate, steps, seed) for rate in rates]
    return {run.lr: results.loss(run) for run in runs if results.is_settled(run)}
