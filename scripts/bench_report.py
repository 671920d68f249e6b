"""The record of a benchmark of steps: tables with the targets, as text and as CSV."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import groupby
from typing import Any

import pandas as pd
from bench_rules import PRODUCTS
from report import number

BARE = "parameters and gradients"  # the row of the peak memory without an optimizer
GRADIENTS = "gradients"  # the row of what DDP sends anyway
FLAT = 1.2  # times the least cost per parameter
SCALING = "llama-"  # models of the same proportions and of different sizes
# Part, optimizer, the one that it is compared with, bound on a GPU and on a CPU.
RATIOS = [
    ("step", "paper_eva", "sgd_foreach", 1.25, 1.25),
    ("step", "paper_eva_f", "sgd_foreach", 1.25, 1.25),
    ("step", "eva", "adamw", 1.5, 2.0),
    ("whole", "eva", "adamw", 1.05, 1.05),
    ("capture", "eva_f", "no capture", 1.02, 1.02),
    ("capture", "eva", "no capture", 1.02, 1.02),
    ("step", "paper_eva", "published_eva", 1 / 5, 1 / 3),
    *(("step", "eva", other, 1.0, 1.0) for other in ("muon", "soap", "shampoo", "kfac")),
]
WHERE = {"whole": ("bert", "32 × 128"), "capture": ("bert", "32 × 128")}  # of these parts, what has targets
STATE = 0.6  # of the bytes that AdamW keeps
NOTES = """
Each time is the median over the rounds, each ratio the median of the ratios to the baseline in the same round, with
its quartiles. Counted: bytes that all operations of a step read and write if no cache helps, and GB/s is what that
makes of the time, also as a share of the bandwidth, which a cache can exceed. Least: bytes that the rule cannot do
without, by the formulas of `scripts/bench_rules.py`, and the time that they take at that bandwidth. Products: what
products of matrices multiply and add, and the time of that at the speed above; it adds to the least time, unless
memory is read meanwhile. Calls: kernels on a GPU, operations on memory on a CPU. Host reads: on a CPU they include
AdamW's own counts of steps, which live on the host. What repeats after some steps is spread over them.

Capture: forward and backward with the hooks of a variant, and the share that these add; eva_quarter looks at a quarter
of each batch (`token_fraction`). Variant eva_s, the recipe, has none. Memory: the most that parameters, gradients, the
optimizer and its step took together, in a process of its own.
"""
WIRE = """
Wire: one all-reduce per step sums the statistics over processes; the recipe sends none, and gradients stand beside it
as what DDP sends anyway. Measured with gloo between processes of this machine, which share its cores. The model is a
ring: 2 (p - 1) messages of 1/p of the buffer, at the latency and the bandwidth above for every number of processes and
between any two of them, with nothing else on the wire and nothing hidden behind the backward pass.
"""


def report(rows: list[dict[str, Any]], place: dict[str, str]) -> str:
    parts = ["# What a step costs\n", "".join(f"- {key}: {value}\n" for key, value in place.items())]
    for (part, model), found in groupby(rows, key=lambda row: (row["part"], row["model"])):
        found = list(found)
        first = found[0]
        reduced = f", {first['blocks']} of {first['of_blocks']} blocks" * (first["blocks"] < first["of_blocks"])
        parts.append(f"## {part}: {model}, {first['parameters'] / 1e6:.1f} M parameters{reduced}\n")
        if part == "wire":
            parts.append(
                f"Fitted: {first['latency'] * 1e6:.0f} µs a message and {first['bandwidth'] / 1e9:.2f} GB/s, with a "
                f"median error of {first['error']:.0%}.\n"
            )
        elif "bandwidth" in first:
            parts.append(
                f"Copied or scaled, a large tensor is read and written at {first['bandwidth'] / 1e9:.1f} GB/s; "
                f"gradients in the cache are multiplied with a basis at {first['product_rate'] / 1e9:.0f} GFLOP/s.\n"
            )
        parts.append(table([cells(row, found) for row in found]))
    judged = list(targets(rows, "CPU" not in place["device"]))
    if judged:
        parts += ["## Targets\n", table(judged)]
    if any(row["part"] == "wire" for row in rows):
        parts.append(WIRE.lstrip())
    return "\n".join([*parts, NOTES.strip(), ""])


def cells(row: dict[str, Any], rows: list[dict[str, Any]]) -> dict[str, str]:
    """A row as text, with its units."""
    if row["part"] == "memory":
        peaks = {one["optimizer"]: one["peak_bytes"] for one in rows}
        bare, adamw = (peaks.get(name, math.nan) for name in (BARE, "adamw"))
        return {
            "": row["optimizer"],
            "peak": number(row["peak_bytes"] / 2**20, 4, " MiB"),
            "of adamw's": number(row["peak_bytes"] / adamw, 3, "×"),
            "beyond the gradients": number((row["peak_bytes"] - bare) / 2**20, 4, " MiB"),
            "state": number(row["state_bytes"] / 2**20, 4, " MiB"),
        }
    if row["part"] == "wire":
        measured, model = row["seconds"], row["model_seconds"]
        return {
            "": row["optimizer"],
            "processes": str(row["processes"]),
            "each sends": number(row["sent_bytes"] / 2**20, 3, " MiB"),
            "ms": "–" if measured is None else number(measured * 1000),
            "ms by the model": number(model * 1000),
            "bytes of the gradients'": f"{row['of_gradients']:.2%}",
        }
    text = {
        **({"batch × tokens": row["size"]} if "size" in row else {}),
        "": row["optimizer"],
        "ms": number(row["seconds"] * 1000, 4),
        f"of {row['baseline']}": number(row["ratio"], 3, "×"),
        "quartiles": f"{number(row['ratio_low'])} to {number(row['ratio_high'])}",
        "rounds": str(row["rounds"]),
    }
    if row["part"] == "capture":
        text["share"] = f"{row['ratio'] - 1:+.1%}"
    if "counted_bytes" in row:
        rate = row["counted_bytes"] / row["seconds"]
        text |= {
            "ns/parameter": number(row["ns_per_parameter"]),
            "counted": number(row["counted_bytes"] / 1e9, 3, " GB"),
            "GB/s": number(rate / 1e9),
            "of bandwidth": f"{rate / row['bandwidth']:.0%}",
            "least": number(row["least_bytes"] / 1e9, 3, " GB"),
            "least ms": number(row["least_bytes"] / row["bandwidth"] * 1000),
            "products": number(row["flops"] / 1e9, 3, " GFLOP"),
            "products ms": number(row["flops"] / row["product_rate"] * 1000),
            "calls": f"{row['calls']:.0f}",
            "host reads": f"{row['host_reads']:.0f}",
            "state": number(row["state_bytes"] / 2**20, 4, " MiB"),
            "of AdamW's": number(row["state_ratio"], 3, "×"),
        }
    return text


def table(rows: list[dict[str, str]]) -> str:
    """Markdown whose columns stand below each other."""
    lines = [list(rows[0]), *(list(row.values()) for row in rows)]
    widths = [max(3, *map(len, column)) for column in zip(*lines, strict=True)]
    lines.insert(1, ["-" * width for width in widths])
    return "".join(
        f"| {' | '.join(cell.ljust(width) for cell, width in zip(line, widths, strict=True))} |\n" for line in lines
    )


def targets(rows: list[dict[str, Any]], is_gpu: bool) -> Iterator[dict[str, str]]:
    """Whatever of the targets these rows can judge."""
    timed = [row for row in rows if "ratio" in row]
    places: dict[tuple[Any, ...], dict[str, float]] = {}
    for row in timed:
        key = row["part"], row["model"], row.get("size")
        places.setdefault(key, {})[row["optimizer"]] = row["ratio"]
    for (part, model, size), ratio in places.items():
        if WHERE.get(part, (model, size)) != (model, size):
            continue
        for wanted, name, other, on_gpu, on_cpu in RATIOS:
            # One block says little of what is bound by memory.
            if (wanted == part or (part == "products" and other in PRODUCTS)) and name in ratio and other in ratio:
                what = f"time of {name} against {other}"
                where = f"{part}, {model}" + f", {size}" * bool(size)
                yield judged(what, where, ratio[name] / ratio[other], on_gpu if is_gpu else on_cpu)
    steps = [row for row in rows if row["part"] == "step"]
    for row in steps:
        if row["optimizer"] == "eva":
            yield judged("bytes of state of eva against AdamW", row["model"], row["state_ratio"], STATE)
    for name in dict.fromkeys(row["optimizer"] for row in steps):
        costs = [r["ns_per_parameter"] for r in steps if r["optimizer"] == name and r["model"].startswith(SCALING)]
        if name.startswith(("eva", "paper")) and len(costs) > 1:
            what = f"time of {name} per parameter, most against least"
            yield judged(what, f"{len(costs)} sizes", max(costs) / min(costs), FLAT)


def judged(what: str, where: str, found: float, bound: float) -> dict[str, str]:
    cells = {"found": number(found, 3, "×"), "target": f"≤ {number(bound, 3, '×')}"}
    return {"": what, "where": where, **cells, "verdict": "met" if found <= bound else "not met"}


def write_csv(rows: list[dict[str, Any]], place: dict[str, str], path: str) -> None:
    pd.DataFrame([{**place, **row} for row in rows]).to_csv(path, index=False)
