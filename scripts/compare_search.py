"""The search of a learning rate, the same for every optimizer, replayed from the results there are."""

import math
import statistics

from compare_config import Config, Run
from compare_results import Results


def next_exponents(scores: dict[float, float], budget: int) -> list[float]:
    """
    Returns which exponents of the grid to try next: the centre and its neighbours, then onwards beyond the best while
    it lies at an end, then ever finer around it; nothing once the budget is spent.

    Args:
        scores (`dict[float, float]`): Loss by exponent, of all that were tried so far.
        budget (`int`): How many may be tried in all.
    """
    left = budget - len(scores)
    if left <= 0:
        return []
    if not scores:
        return [0.0, -1.0, 1.0][:left]
    tried = sorted(scores)
    best = min(tried, key=lambda exponent: (scores[exponent], exponent))  # where nothing converges: downwards
    if best in (tried[0], tried[-1]):
        return [best - 1 if best == tried[0] else best + 1]
    place, spacing = tried.index(best), 0.5
    while best - spacing in scores and best + spacing in scores:
        spacing /= 2
    sides = sorted((-1, 1), key=lambda side: scores[tried[place + side]])  # the better neighbour's side first
    return [best + side * spacing for side in sides if best + side * spacing not in scores][:left]


def search(config: Config, results: Results, task: str, optimizer: str) -> tuple[list[Run], dict[float, float]]:
    """Replays the search of a learning rate: the runs that it waits for, if any, and the loss by learning rate."""
    tuning, start, steps = config.tuning, config.start(task, optimizer), config.steps(task)
    seeds = config.tuning_seeds(task)
    scores: dict[float, float] = {}
    rates: dict[float, float] = {}
    while exponents := next_exponents(scores, tuning.budget):
        missing = []
        for exponent in exponents:
            rate = start * tuning.factor**exponent
            runs = [config.run(task, optimizer, rate, steps, seed) for seed in seeds]
            missing += [run for run in runs if not results.is_settled(run)]
            loss = statistics.fmean(results.loss(run) for run in runs)
            scores[exponent] = loss if math.isfinite(loss) else math.inf
            rates[runs[0].lr] = scores[exponent]
        if missing:
            return missing, {}
    return [], rates


def tuned(config: Config, results: Results, task: str, optimizer: str) -> float | None:
    """The learning rate of the lowest loss; `None` while the search goes on, or where none converged."""
    _, rates = search(config, results, task, optimizer)
    best = min(rates, key=lambda rate: (rates[rate], rate), default=None)
    return best if best is not None and math.isfinite(rates[best]) else None
