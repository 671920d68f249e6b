"""Pictures of runs: the loss over steps and time, and what the optimizer did in each layer. They need matplotlib."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import matplotlib
from matplotlib.backend_bases import FigureCanvasBase
from matplotlib.collections import LineCollection
from matplotlib.colors import LinearSegmentedColormap, Normalize
from matplotlib.figure import Figure

from .runs import Run, Spectrum, Strengths

Theme = Literal["light", "dark"]

# Of Okabe and Ito, and of Tol where those are too pale for a page: told apart without red and green, three to one
# against the ground. A marker of its own tells each run apart where there is no colour at all.
COLOURS = ["#0072B2", "#D55E00", "#009E73", "#AA3377", "#997700", "#332288"]
_DARK_COLOURS = ["#56B4E9", "#E69F00", "#2BC49A", "#F08CC0", "#F0E442", "#BBBBBB"]
_MARKERS = ["o", "s", "^", "D", "v", "P"]
_METRICS = {"eval_accuracy": "accuracy", "eval_f1": "F1"}  # the first that a run has is drawn
_NEUTRAL = "#808080"
_LOSS = "loss (cross-entropy, nats)"
_STEPS = "training (optimizer steps)"
_MAP = "cividis"  # rises evenly in lightness, and reads alike with every kind of colour vision
_LEAST_SHARE = 1e-6  # what is below is rounding, and would press all other lines together
_MOST_NAMES = 30  # rows of a heat map that can each carry a legible name


def plot_runs(
    runs: Sequence[Run],
    output: str | Path,
    theme: Theme = "light",
    target: float | None = None,
    layers: bool = True,
) -> list[Path]:
    """
    Draw one run, or several side by side, and return the files written: `output` with the losses and, for every run
    that holds what they need, `<output>-strength` and `<output>-spectra` with what the optimizer did in each layer.

    Args:
        runs (list of [`Run`]): what to draw.
        output (`str` or `Path`): file to write; its ending, such as `.png` or `.svg`, sets the format.
        theme (`str`, defaults to `"light"`): `"light"` or `"dark"`. The ground is opaque in both.
        target (`float`, *optional*): a loss to mark with a line.
        layers (`bool`, defaults to `True`): draw what was done in each layer, too, and not the losses alone.

    Raises:
        ValueError: the ending names no format of a picture.
        OSError: a file cannot be written.
    """
    output = Path(output)
    formats = FigureCanvasBase.get_supported_filetypes()
    if output.suffix[1:].lower() not in formats:
        raise ValueError(f"cannot write {output}: its ending must be one of {', '.join(sorted(formats))}")
    with matplotlib.rc_context(_style(theme)):
        written = [_save(_losses(runs, COLOURS if theme == "light" else _DARK_COLOURS, target), output)]
        for number, run in enumerate(runs if layers else (), start=1):
            title, suffix = (run.name, f"-{number}") if len(runs) > 1 else ("", "")
            if strengths := run.strengths():
                figure = _heat_map(strengths, title)
                written.append(_save(figure, output.with_stem(f"{output.stem}-strength{suffix}")))
            if spectra := run.spectra():
                figure = _spectra(spectra, title, theme)
                written.append(_save(figure, output.with_stem(f"{output.stem}-spectra{suffix}")))
    return written


def _style(theme: Theme) -> Any:
    ground, ink, lines = ("#ffffff", "#222222", "#dddddd") if theme == "light" else ("#0d1117", "#e6edf3", "#30363d")
    inked = ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color")
    return {
        **dict.fromkeys(inked, ink),
        **dict.fromkeys(("figure.facecolor", "axes.facecolor", "savefig.facecolor"), ground),
        "axes.grid": True,
        "axes.spines.right": False,
        "axes.spines.top": False,
        "figure.dpi": 150,
        "font.size": 10,
        "grid.color": lines,
        "grid.linewidth": 0.6,
        "legend.frameon": False,
        "svg.fonttype": "path",
        # The same run gives the same file.
        "svg.hashsalt": "hf_eva",
    }


def _save(figure: Figure, path: Path) -> Path:
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)
    return path


# Losses --------------------------------------------------------------------------------------------------------------


def _losses(runs: Sequence[Run], colours: Sequence[str], target: float | None) -> Figure:
    metric = next((key for key in _METRICS if any(run.series(key)[0] for run in runs)), "")
    timed = all(run.seconds([1]) is not None for run in runs)
    panels = ["steps", *(["seconds"] if timed else []), *(["metric"] if metric else [])]
    figure = Figure(figsize=(0.6 + 3.4 * len(panels), 3.6), layout="constrained")
    axes = dict(zip(panels, figure.subplots(1, len(panels), squeeze=False)[0], strict=True))
    for index, run in enumerate(runs):
        prefix = f"{run.name}: " if len(runs) > 1 else ""
        colour = colours[index % len(colours)]
        # One evaluation alone is a point: a line would not show it.
        marked = {"marker": _MARKERS[index % len(_MARKERS)], "markersize": 5, "linewidth": 1.8, "linestyle": "--"}
        for panel, key, label, style in (
            ("steps", "loss", "training", {"linewidth": 1.2, "alpha": 0.75}),
            ("steps", "eval_loss", "evaluation", marked),
            ("seconds", "loss", "training", {"linewidth": 1.2, "alpha": 0.75}),
            ("seconds", "eval_loss", "evaluation", marked),
            ("metric", metric, "evaluation", marked),
        ):
            steps, values = run.series(key)
            if panel in axes and steps:
                xs = run.seconds(steps) if panel == "seconds" else steps
                axes[panel].plot(xs or [], values, color=colour, label=prefix + label, **style)
        _, majority = run.series("eval_majority_class")
        if majority and metric:
            axes["metric"].axhline(majority[-1], label="majority class", color=_NEUTRAL, linestyle=":")

    for name, panel_axes in axes.items():
        if target is not None and name != "metric":
            panel_axes.axhline(target, label="target", color=_NEUTRAL, linestyle="-.", linewidth=1)
        panel_axes.set_ylabel(f"evaluation {_METRICS[metric]} (0 to 1)" if name == "metric" else _LOSS)
        panel_axes.set_xlabel("training without evaluations (seconds)" if name == "seconds" else _STEPS)
        panel_axes.locator_params(axis="x", nbins=6, integer=name != "seconds")
        panel_axes.set_xlim(left=0)
    if timed:  # the same values as beside it
        axes["seconds"].set_ylim(axes["steps"].get_ylim())
        axes["seconds"].tick_params(labelleft=False)
        axes["seconds"].set_ylabel("")
    _legend(figure)
    return figure


def _legend(figure: Figure) -> None:
    found = [axes.get_legend_handles_labels() for axes in figure.axes]
    unique = {label: handle for handles, labels in found for label, handle in zip(labels, handles, strict=True)}
    # Training above evaluation where there are several runs; long names, as of folders, get a line each.
    wished = len(unique) if len(unique) <= 4 else -(-len(unique) // 2)
    columns = max(1, min(wished, 110 // max(len(label) + 8 for label in unique)))
    figure.legend(list(unique.values()), list(unique), loc="outside upper center", ncols=columns)


# Layers --------------------------------------------------------------------------------------------------------------


def _heat_map(strengths: Strengths, title: str) -> Figure:
    count = len(strengths.layers)
    every = -(-count // _MOST_NAMES)
    figure = Figure(figsize=(7.2, max(3.0, 1.4 + 0.16 * -(-count // every))), layout="constrained")
    axes = figure.subplots()
    # A column reaches from the log before to its own: what was logged concerns the steps since then.
    mesh = axes.pcolormesh(
        [0, *strengths.steps], range(count + 1), strengths.values, cmap=_MAP, vmin=0, rasterized=True
    )
    axes.grid(visible=False)
    axes.invert_yaxis()
    axes.set_yticks(
        [row + 0.5 for row in range(0, count, every)], _shortened(strengths.layers)[::every], fontsize="small"
    )
    axes.set_ylabel("layer (from input to output)" + (f", one in {every} named" if every > 1 else ""))
    axes.set_xlabel(_STEPS)
    axes.locator_params(axis="x", integer=True)
    axes.set_title(title, fontsize="medium")
    figure.colorbar(mesh, ax=axes, pad=0.02, label="strength: 1 − cos(update, momentum)\n(0 is first-order)")
    return figure


def _spectra(spectra: Sequence[Spectrum], title: str, theme: Theme) -> Figure:
    figure = Figure(figsize=(7.8, 3.8), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    layers = list(dict.fromkeys(spectrum.layer for spectrum in spectra))
    longest = max(len(spectrum.shares) for spectrum in spectra)
    present = [share for spectrum in spectra for share in spectrum.shares if share > 0] or [1.0]
    # The end of the map that would vanish in the ground is left out.
    first, last = (0, 200) if theme == "light" else (90, 255)
    shades = LinearSegmentedColormap.from_list("layers", [matplotlib.colormaps[_MAP](i) for i in range(first, last)])
    for panel, side in zip(panels, ("inputs", "outputs"), strict=True):
        shown = [spectrum for spectrum in spectra if spectrum.side == side]
        lines = LineCollection(
            [list(enumerate(spectrum.shares, start=1)) for spectrum in shown],
            cmap=shades,
            norm=Normalize(0, max(len(layers) - 1, 1)),
            array=[layers.index(spectrum.layer) for spectrum in shown],
            linewidths=1.1,
        )
        panel.add_collection(lines)
        panel.set_yscale("log")
        # An estimate beyond the whole is an error of the optimizer's, and has to be seen.
        panel.set_ylim(max(_LEAST_SHARE, min(present) / 1.5), 1.0 if max(present) < 1.01 else 1.5 * max(present))
        panel.set_xlim(1, max(2, longest))
        panel.set_xticks(sorted({1, *range(max(1, longest // 4), longest + 1, max(1, longest // 4))}))
        panel.set_xlabel(f"direction of the {side}, by size")
        held = sorted(sum(spectrum.shares) for spectrum in shown)
        median = f"{side}: {held[len(held) // 2]:.0%} in all, median of {len(held)} layers"
        panel.set_title(median if held else f"{side}: none", fontsize="medium")
    panels[0].set_ylabel("share of the mean squared gradient (0 to 1)")
    bar = figure.colorbar(lines, ax=panels, ticks=[0, max(len(layers) - 1, 1)], pad=0.02)
    bar.set_ticklabels(["first", "last"])
    bar.set_label("layer (from input to output)", labelpad=-12)
    figure.suptitle(title, fontsize="large")
    return figure


def _shortened(layers: Sequence[str]) -> list[str]:
    """The names without the parts that all of them begin with."""
    split = [layer.split(".") for layer in layers]
    while len(split) > 1 and all(len(parts) > 1 for parts in split) and len({parts[0] for parts in split}) == 1:
        split = [parts[1:] for parts in split]
    return [".".join(parts) for parts in split]
