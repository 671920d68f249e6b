"""Renders the results of a comparison: tables in REPORT.md, and a plot for every task."""

import math
import os
import re
from collections.abc import Sequence

import numpy as np
import pandas as pd
from compare_config import Config
from compare_outcomes import Outcome, Outcomes, half_width, own_time, read_outcomes, swept
from compare_results import Results, read_runs, read_times
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from peers import PEERS
from scipy import stats

from hf_eva.plots import COLOURS

NEAR = 1.05  # times the baseline's best loss still counts as near it
LONGEST = 2.0  # trainings of the baseline that the plot over time shows
INTRODUCTION = """
Target: the mean evaluation loss of the tuned {baseline} at the end of its whole schedule. Time to target: steps to
target × time per step, in units of the whole training of {baseline}. The mean over the seeds has to meet the target,
and the schedule that does so after the fewest steps counts, out of {lengths} of the full length; from that on, a
shorter one is run where the one before gets that low within its steps, a longer one where it does not and a goal
depends on it. ± is half a 95 % interval over the seeds; p is Welch's test of the final loss against {baseline}; seeds
are those that meet the target each by itself; state and memory are those of the optimizer alone and of the whole step.
† marks a learning rate at the end of those that were tried.
"""


def write_report(config: Config, results: Results, output: str, source: str) -> str:
    """Writes the section of this comparison into REPORT.md, leaves those of others alone, and returns its path."""
    folder = os.path.join(output, config.name)
    runs, times = read_runs(results.path), read_times(os.path.join(folder, "times.csv"))
    parts = [f"## {config.name}\n"]
    found = {task: read_outcomes(config, results, runs, times, task) for task in config.tasks}
    found = {task: outcomes for task, outcomes in found.items() if outcomes.baseline or outcomes.all}
    if waiting := [task for task in config.tasks if task not in found]:
        parts.append(f"Without results so far: {', '.join(waiting)}.\n")
    lengths = ", ".join(f"{length:g}" for length in config.lengths)
    parts.append(INTRODUCTION.format(baseline=config.baseline, lengths=lengths))
    parts.append(summary(config, found))
    for task, outcomes in found.items():
        parts.append(task_section(config, task, outcomes))
        if any(one.curves for one in outcomes.all.values()):
            os.makedirs(folder, exist_ok=True)
            plot_task(config, task, outcomes, os.path.join(folder, f"{task}.png"))
            parts.append(f"![{task}: evaluation loss over steps and over time]({config.name}/{task}.png)\n")
    if config.sweep:
        parts.append(robustness(config, results, found))
    parts.append(conditions(config, times, source))

    os.makedirs(output, exist_ok=True)
    path = os.path.join(output, "REPORT.md")
    text = "# Comparison of optimizers\n"
    if os.path.exists(path):
        with open(path, encoding="utf-8") as file:
            text = file.read()
    begin, end = f"<!-- begin {config.name} -->", f"<!-- end {config.name} -->"
    section = "\n".join([begin, *parts, end])
    pattern = re.compile(f"{re.escape(begin)}.*{re.escape(end)}", re.DOTALL)
    text = pattern.sub(lambda _: section, text) if pattern.search(text) else f"{text.rstrip()}\n\n{section}\n"
    with open(path, "w", encoding="utf-8") as file:
        file.write(text)
    return path


# Tables --------------------------------------------------------------------------------------------------------------


def markdown(rows: list[dict[str, str]]) -> str:
    if not rows:
        return "No results yet.\n"
    lines = [rows[0].keys(), ["---"] * len(rows[0]), *(row.values() for row in rows)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def number(value: float, digits: int = 3, unit: str = "") -> str:
    return f"{value:#.{digits}g}".rstrip(".") + unit if math.isfinite(value) else "–"


def with_interval(values: Sequence[float], digits: int = 4) -> str:
    if len(values) == 0:
        return "–"
    half = half_width(values)
    return number(float(np.mean(values)), digits) + (f" ± {half:.2g}" if math.isfinite(half) else "")


def task_section(config: Config, task: str, outcomes: Outcomes) -> str:
    rows = [task_row(name, one, outcomes) for name, one in outcomes.all.items()]
    lines = [f"### {task}\n", markdown(rows)]
    if untuned := [name for name in config.contenders(task) if name not in outcomes.all]:
        lines.append(f"Without a learning rate that converges, or not searched yet: {', '.join(untuned)}.\n")
    baseline = outcomes.baseline
    if baseline and baseline.earliest[1] < outcomes.full:
        length, steps = baseline.earliest
        share = f"{steps / outcomes.full:.0%}"
        lines.append(
            f"{config.baseline} itself first meets the target after {steps:.0f} steps, {share} of its whole schedule, "
            f"with a schedule of {length:g} of the full length.\n"
        )
    return "\n".join(lines)


def task_row(name: str, one: Outcome, outcomes: Outcomes) -> dict[str, str]:
    baseline, final = outcomes.baseline, one.final
    diverged, p = int(np.isinf(final).sum()), math.nan
    if baseline and one is not baseline and not diverged and min(len(final), len(baseline.final)) > 1:
        p = stats.ttest_ind(final, baseline.final, equal_var=False).pvalue
    reached = [steps for steps in one.seed_steps if math.isfinite(steps)]
    half = half_width(reached)
    steps = time = "not reached" if one.curves else "–"
    if one.is_met:
        around, around_time = (f" ± {value:.2g}" for value in (half, half / outcomes.full * one.ratio))
        steps = f"{one.steps:.0f}" + (around if math.isfinite(half) else "")
        time = number(own_time(one, outcomes)) + (around_time if math.isfinite(half * one.ratio) else "")
    row = {
        "optimizer": name,
        "learning rate": f"{one.lr:.3g}{' †' if one.is_edge else ''}",
        "final loss": f"{diverged} of {len(final)} diverged" if diverged else with_interval(final),
        "p": number(p, 2),
        one.metric_name: with_interval(one.metric, 3),
        "time per step": number(one.ratio, 3, "×"),
        "of it optimizer": f"{one.timed('optimizer_share'):.0%}" if math.isfinite(one.ratio) else "–",
        "steps to target": steps,
        "time to target": time,
        "schedule": f"{one.length:g}" if one.is_met else "–",
        "seeds": f"{len(reached)}/{len(one.seed_steps)}" if one.seed_steps else "–",
        "state": number(one.timed("state_bytes") / baseline.timed("state_bytes"), 3, "×") if baseline else "–",
        "peak memory": number(one.timed("peak_bytes") / 2**20, 4, " MiB"),
    }
    if one.is_gpu:  # there, nothing else takes part in the time of a step
        row["ms per step"] = number(one.timed("step_seconds") * 1000)
    return row


def summary(config: Config, found: dict[str, Outcomes]) -> str:
    def relative(task: str, other: str) -> str:
        outcomes = found[task]
        ours, theirs = outcomes.all.get(config.subject), outcomes.all.get(other)
        if ours is None or theirs is None or not ours.curves or not theirs.curves:
            return "–"
        # Where the other never gets there, its longest schedule is the least that it would have taken.
        least = max(theirs.curves) * theirs.ratio
        ratio = own_time(ours, outcomes) / (own_time(theirs, outcomes) if theirs.is_met else least)
        cell = "not reached" if not ours.is_met else number(ratio) if theirs.is_met else f"< {number(ratio)}"
        if goal := config.goals.get(other, {}).get(task):
            verdict = "open" if math.isnan(ratio) else "met" if ratio <= goal else "not met"
            cell += f" (goal {goal:g}: {verdict})"
        return cell

    rows = [
        {"compared with": other, **{task: relative(task, other) for task in found}}
        for other in config.optimizers
        if other != config.subject and any(other in outcomes.all for outcomes in found.values())
    ]
    return f"### Time to target of {config.subject}, as a multiple of the other's\n\n{markdown(rows)}"


def robustness(config: Config, results: Results, found: dict[str, Outcomes]) -> str:
    rows = []
    for task, outcomes in found.items():
        losses = {name: swept(config, results, task, name, outcomes) for name in config.sweep.optimizers}
        best = min(losses.get(config.baseline, {}).values(), default=math.inf)
        if not math.isfinite(best) and outcomes.baseline:
            best = outcomes.baseline.tuning_loss
        for name, by_rate in losses.items():
            near = [rate for rate, loss in by_rate.items() if loss <= NEAR * best and math.isfinite(loss)]
            rows.append(
                {
                    "task": task,
                    "optimizer": name,
                    "learning rates": f"{min(by_rate):.2g} to {max(by_rate):.2g}" if by_rate else "–",
                    "best loss": number(min(by_rate.values(), default=math.inf), 4),
                    "near the baseline's best": f"{min(near):.2g} to {max(near):.2g}" if near else "none",
                    "width": f"{max(near) / min(near):.3g}×" if near else "–",
                    "diverged": f"{sum(map(math.isinf, by_rate.values()))} of {len(by_rate)}",
                }
            )
    what = f"Near: a final loss of at most {NEAR:g} times the best of {config.baseline}; one seed, the whole schedule."
    return f"### Robustness to the learning rate\n\n{what}\n\n{markdown(rows)}"


def conditions(config: Config, times: pd.DataFrame, source: str) -> str:
    tuning, known = (
        config.tuning,
        {config.digest(task, name) for task in config.tasks for name in config.contenders(task)},
    )
    places = times[times["digest"].isin(known)][["machine", "device", "versions"]].drop_duplicates()
    by_task = {task: ", ".join(map(str, config.tuning_seeds(task))) for task in config.tasks}
    usual = ", ".join(map(str, tuning.seeds))
    seeds = [usual, *(f"on {task} {own}" for task, own in by_task.items() if own != usual)]
    lines = [
        f"- `python scripts/compare.py {source}`",
        f"- learning rates: {tuning.budget} tried for every optimizer and task, on a grid of factor {tuning.factor:g} "
        f"refined around the best, by the mean final loss over the seeds {'; '.join(seeds)}",
        f"- results: seeds {', '.join(map(str, config.seeds))}, {config.evaluations} evaluations in each run",
        f"- times: median of {config.timing.rounds} rounds, all optimizers of a task in turns in one process; memory: "
        "each optimizer by itself",
        *(f"- timed on {place.machine}, {place.device}, {place.versions}" for place in places.itertuples()),
    ]
    for name, entry in config.entries.items():
        options = "".join(f", {key} {value}" for key, value in entry.options.items())
        lines.append(f"- {name}: {PEERS[entry.peer].source}{options}")
    return "### How it was measured\n\n" + "\n".join(lines) + "\n"


# Plots ---------------------------------------------------------------------------------------------------------------


def plot_task(config: Config, task: str, outcomes: Outcomes, path: str) -> None:
    """Draws the loss over the steps of the whole schedule, and over time with the schedule that the tables count."""
    highlighted = config.highlight or list(config.optimizers)[: len(COLOURS)]
    figure = Figure(figsize=(11.5, 4.4), dpi=150, layout="constrained", facecolor="white")
    by_steps, by_time = figure.subplots(1, 2, sharey=True)
    drawn = sorted(outcomes.all.items(), key=lambda item: item[0] in highlighted)  # the coloured ones on top
    colours = dict(zip(highlighted, COLOURS, strict=False))
    for name, one in drawn:
        label = name if name in colours else "others"
        if 1.0 in one.curves:
            _draw(by_steps, one.curves[1.0], 1.0, label, colours.get(name))
        if one.length in one.curves and math.isfinite(one.ratio):
            _draw(by_time, one.curves[one.length], one.ratio / outcomes.full, label, colours.get(name))
    for axes in (by_steps, by_time):
        if math.isfinite(outcomes.target):
            axes.axhline(outcomes.target, color="#333333", linewidth=1.2, linestyle=":", label="target")
        axes.grid(color="#dddddd", linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_xlim(left=0)
    by_steps.set_ylabel("evaluation loss (nats)")
    by_steps.set_title("the whole schedule", fontsize=10)
    by_steps.set_xlabel("optimizer steps")
    by_time.set_title("the schedule that meets the target first", fontsize=10)
    by_time.set_xlabel(f"time (whole trainings of {config.baseline})")
    if by_time.get_xlim()[1] > LONGEST:
        by_time.set_xlim(right=LONGEST)
    _limit(by_steps, [curve for one in outcomes.all.values() for curve in one.curves.values()], outcomes.target)
    handles, labels = by_steps.get_legend_handles_labels()
    unique = dict(zip(labels, handles, strict=True))
    order = [label for label in (*colours, "others", "target") if label in unique]
    by_steps.legend([unique[label] for label in order], order, frameon=False, fontsize=9)
    figure.suptitle(task, fontsize=12)
    figure.savefig(path)


def _draw(axes: Axes, curve: pd.DataFrame, scale: float, label: str, colour: str | None) -> None:
    """The mean over the seeds and, in colour, the band from the lowest to the highest of them."""
    curve = curve[np.isfinite(curve).all(axis=1)]
    steps = curve.index.to_numpy() * scale
    if colour is None:
        axes.plot(steps, curve.mean(axis=1), color="#bbbbbb", linewidth=0.9, label=label, zorder=1)
        return
    axes.fill_between(steps, curve.min(axis=1), curve.max(axis=1), color=colour, alpha=0.15, linewidth=0)
    axes.plot(steps, curve.mean(axis=1), color=colour, linewidth=1.8, label=label, zorder=3)


def _limit(axes: Axes, curves: list[pd.DataFrame], target: float) -> None:
    """Leaves out what lies far above the losses at the first evaluations, as before a divergence."""
    finite = [value for curve in curves for value in curve.to_numpy().ravel() if math.isfinite(value)]
    starts = [value for curve in curves for value in curve.iloc[0] if math.isfinite(value)]
    if not finite:
        return
    low, high = min(finite), float(np.median(starts))
    margin = 0.05 * (high - low)
    if high > low:
        axes.set_ylim(low - margin, high + margin)
