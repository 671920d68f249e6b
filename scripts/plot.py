"""
Plot training loss, evaluation loss and evaluation metric of one run, or of several side by side:

    python scripts/plot.py runs/bert
    python scripts/plot.py runs/bert runs/bert-adamw --output comparison.svg

Reads `trainer_state.json` of every folder. The ending of the output, `RUN_DIR/loss.png` by default, sets its format.
"""

import argparse
import json
import os
import sys

from matplotlib.figure import Figure

COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9"]  # Okabe and Ito: colour-blind-safe
METRICS = {"eval_accuracy": "accuracy", "eval_f1": "F1"}  # the first that a run has is drawn


def read_history(run_dir: str) -> list[dict]:
    """Returns what the Trainer logged in `run_dir`; raises `ValueError` when there is nothing to draw."""
    path = os.path.join(run_dir, "trainer_state.json")
    if not os.path.isfile(path):
        raise ValueError(f"there is no {path}: name the output folder of a run, or one of its checkpoints")
    with open(path, encoding="utf-8") as file:
        history = json.load(file)["log_history"]
    if not any("loss" in entry or "eval_loss" in entry for entry in history):
        raise ValueError(f"{path} holds no loss: log with --logging_steps below the number of steps")
    return history


def series(history: list[dict], key: str) -> tuple[list[int], list[float]]:
    """The steps at which `key` was logged, and its values there."""
    points = [(entry["step"], entry[key]) for entry in history if key in entry]
    return [step for step, _ in points], [value for _, value in points]


def plot_runs(run_dirs: list[str], output: str) -> str:
    """Draws the runs into the file `output` and returns its name."""
    histories = {os.path.normpath(run_dir): read_history(run_dir) for run_dir in run_dirs}
    metric = next((key for key in METRICS if any(series(history, key)[0] for history in histories.values())), None)
    figure = Figure(figsize=(9.6 if metric else 5.6, 4.0), dpi=150, layout="constrained", facecolor="white")
    loss_axes, *metric_axes = figure.subplots(1, 2 if metric else 1, sharex=True, squeeze=False)[0]

    for index, (name, history) in enumerate(histories.items()):
        colour = COLOURS[index % len(COLOURS)]
        prefix = f"{name}: " if len(histories) > 1 else ""
        loss_axes.plot(*series(history, "loss"), color=colour, linewidth=1.2, alpha=0.75, label=f"{prefix}training")
        evaluated = {"color": colour, "linewidth": 1.8, "linestyle": "--", "marker": "o", "markersize": 5}
        loss_axes.plot(*series(history, "eval_loss"), **evaluated, label=f"{prefix}evaluation")
        for axes in metric_axes if series(history, metric)[0] else ():
            axes.plot(*series(history, metric), **evaluated, label=f"{prefix}evaluation")
            _, majority = series(history, "eval_majority_class")
            if majority:
                axes.axhline(majority[-1], color="#555555", linewidth=1, linestyle=":", label="majority class")

    loss_axes.set_ylabel("loss (cross-entropy, nats)")
    for axes in metric_axes:
        axes.set_ylabel(f"evaluation {METRICS[metric]} (0 to 1)")
    for axes in figure.axes:
        axes.set_xlabel("training (optimizer steps)")
        axes.set_xlim(left=0)
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(color="#dddddd", linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
        handles, labels = axes.get_legend_handles_labels()
        unique = dict(zip(labels, handles, strict=True))  # several runs on one data set share the majority line
        axes.legend(unique.values(), unique.keys(), frameon=False)
    figure.savefig(output)
    return output


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run_dirs", nargs="+", metavar="RUN_DIR", help="Output folder of a run.")
    parser.add_argument("--output", help="PNG, SVG or PDF file to write (default: RUN_DIR/loss.png of the first run).")
    args = parser.parse_args()
    try:
        print(plot_runs(args.run_dirs, args.output or os.path.join(args.run_dirs[0], "loss.png")))
    except (ValueError, OSError) as error:
        print(f"plot.py: error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
