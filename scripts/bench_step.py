# /// script
# dependencies = ["hf-eva[compare]"]
# ///
r"""
What a step costs: Eva and the optimizers of the field at the true shapes of BERT-base, GPT-2, ViT-B/16 and a Llama.

    python scripts/bench_step.py
    python scripts/bench_step.py --models bert --parts whole capture --sizes 8x128 32x128 --optimizers adamw eva
    python scripts/bench_step.py --parts step --models llama-10m llama-130m llama-1b --optimizers eva

Parts: `step` times the optimizer alone, on gradients of a small batch and without its hooks; `products` the same, on
one block, of those whose steps are products and decompositions of matrices; `whole` times forward, backward, clipping
and step at each of --sizes; `capture` times forward and backward with and without the hooks of the variants that have
some; `memory` is the peak of parameters, gradients and optimizer, each in a process of its own; `wire` times the one
all-reduce of the statistics in gloo processes, and says by a model fitted to that what more processes would need. Each
has models, optimizers and sizes of its own unless they are given. All optimizers of a model take turns on one set of
parameters. Where memory is short, the model keeps fewer of its blocks, of the same shapes. Times need a machine that
does nothing else.
"""

from __future__ import annotations

import argparse
import gc
import os
import shlex
import statistics
import sys
from collections.abc import Iterator
from typing import Any

import torch
from bench_measure import (
    Side,
    bandwidth,
    make_side,
    make_sides,
    measure_memory,
    product_rate,
    time_capture,
    time_steps,
    time_training,
)
from bench_models import FITS, MODELS, Architecture, batch_of, count, fitting, free_memory, tokens_of
from bench_report import BARE, GRADIENTS, report, write_csv
from bench_rules import OPTIMIZERS, PRODUCTS, least_bytes
from bench_wire import LADDER, MEASURED, MODELLED, VARIANTS, fit, statistics_bytes, time_all_reduces
from compare import Workers, environment, machine
from compare_timing import MEMORY_ENVIRONMENT, ratios, state_bytes
from transformers import PreTrainedModel
from transformers.utils import logging

from hf_eva import plan

LIGHT = [name for name in OPTIMIZERS if name not in PRODUCTS]
# Of each part: models, optimizers and sizes; all of them together take a quarter of an hour on two cores.
PARTS: dict[str, tuple[list[str], list[str], list[tuple[int, int]]]] = {
    "step": (["bert", "gpt2", "vit"], LIGHT, []),
    "products": (["bert"], ["adamw", "eva", *PRODUCTS], []),
    "whole": (["bert"], ["adamw", "eva"], [(8, 128), (32, 128)]),
    "capture": (["bert", "gpt2-mini", "vit-tiny"], ["eva"], [(8, 32), (8, 128), (32, 128)]),
    "memory": (["bert"], ["adamw", "adamw_8bit", "sgd", "eva", "eva_bf16"], []),
    "wire": (["bert"], ["eva"], []),
}
WHOLE_FITS = 0.6  # where activations need room, too
Row = dict[str, Any]


def measure(part: str, name: str, optimizers: list[str], sizes: list[tuple[int, int]], args: Any) -> Iterator[Row]:
    """Yields a row for each measurement of a part on a model."""
    dtype, device, most = getattr(torch, args.dtype), args.device, args.layers
    limit = free_memory(device) * (WHOLE_FITS if part in ("whole", "capture") else FITS)
    if part == "wire":  # which needs no memory
        layers = min(most or MODELS[name].layers, MODELS[name].layers)
    elif part == "memory":  # each by itself, and all on the same model
        layers = min(fitting(MODELS[name], [one], dtype, limit, most)[0] for one in optimizers)
    else:
        names = optimizers[:1] if part == "capture" else optimizers
        layers, groups = fitting(MODELS[name], names, dtype, limit, most or (1 if part == "products" else None))
    place = {"part": part, "model": name}
    place |= {"blocks": layers, "of_blocks": MODELS[name].layers, "parameters": count(MODELS[name].build(layers))}
    print(f"{part}: {name} with {layers} of {MODELS[name].layers} blocks", file=sys.stderr)
    if part == "memory":
        rows = memory_rows(MODELS[name], layers, dtype, optimizers, args)
    elif part == "wire":
        rows = wire_rows(MODELS[name].build(layers), args)
    else:
        model = MODELS[name].build(layers, device, dtype)
        if part == "whole":
            rows = whole_rows(model, groups, unlike(model, sizes), args)
        else:
            rows = (
                capture_rows(model, unlike(model, sizes), args)
                if part == "capture"
                else step_rows(model, groups, args)
            )
    for row in rows:
        yield {**place, **row}
    gc.collect()


def step_rows(model: PreTrainedModel, groups: list[list[str]], args: argparse.Namespace) -> Iterator[Row]:
    parameters, adamw_bytes = count(model), plan(model).adamw_bytes
    for number, group in enumerate(groups):
        sides = make_sides(group, model, args.steps)
        before, products = bandwidth(args.device), product_rate(args.device)
        time_steps(sides, args.rounds, args.steps, args.patience)
        highest, products = max(before, bandwidth(args.device)), max(products, product_rate(args.device))
        for side in sides[number > 0 :]:  # the first of a later group was there before
            row = timed(side, sides[0])
            kept = state_bytes(side.optimizer, side.model)
            yield {
                **row,
                "ns_per_parameter": row["seconds"] / parameters * 1e9,
                "counted_bytes": side.counts.bytes,
                "least_bytes": least_bytes(OPTIMIZERS[side.name].peer, side.model, OPTIMIZERS[side.name].options),
                "bandwidth": highest,
                "flops": side.counts.flops,
                "product_rate": products,
                "calls": side.counts.calls,
                "host_reads": side.counts.host_reads,
                "state_bytes": kept,
                "state_ratio": kept / adamw_bytes,
            }


def whole_rows(
    model: PreTrainedModel, groups: list[list[str]], sizes: list[tuple[int, int]], args: argparse.Namespace
) -> Iterator[Row]:
    for number, group in enumerate(groups):
        sides = [make_side(name, model) for name in group]
        for size in sizes:
            for side in sides:
                side.seconds, side.spent = [], 0.0
            batch = batch_of(model, *size)
            time_training(sides, batch, args.rounds, args.steps, args.patience, args.autocast)
            yield from ({"size": label(model, size), **timed(side, sides[0])} for side in sides[number > 0 :])


def capture_rows(model: PreTrainedModel, sizes: list[tuple[int, int]], args: argparse.Namespace) -> Iterator[Row]:
    for size in sizes:
        batch = batch_of(model, *size)
        sides = time_capture(model, batch, args.rounds, args.steps, args.patience, args.autocast)
        yield from ({"size": label(model, size), **timed(side, sides[0])} for side in sides)


def memory_rows(
    model: Architecture, layers: int, dtype: torch.dtype, optimizers: list[str], args: argparse.Namespace
) -> Iterator[Row]:
    variables = {**environment(args.threads), **MEMORY_ENVIRONMENT}
    if args.device == "cpu":
        variables["CUDA_VISIBLE_DEVICES"] = ""
    jobs = {one or BARE: (model, layers, dtype, args.device, one) for one in (None, *optimizers)}
    with Workers(1, variables) as pool:
        yield from ({"optimizer": one, **found} for one, found in pool.map(measure_memory, jobs))


def wire_rows(model: PreTrainedModel, args: argparse.Namespace) -> Iterator[Row]:
    sizes = {variant: statistics_bytes(model, variant) for variant in VARIANTS}
    measured = time_all_reduces([*LADDER, *sizes.values()], args.rounds)
    ring = fit(measured)
    everything = sizes | {GRADIENTS: sum(p.numel() * p.element_size() for p in model.parameters())}
    for name, size in everything.items():
        for processes in (*MEASURED, *MODELLED):
            row = {"optimizer": name, "processes": processes, "bytes": size, "sent_bytes": ring.sent(size, processes)}
            row |= {"seconds": measured.get((size, processes)), "model_seconds": ring.seconds(size, processes)}
            row |= {"latency": ring.latency, "bandwidth": ring.bandwidth, "error": ring.error}
            yield {**row, "of_gradients": size / everything[GRADIENTS]}


def timed(side: Side, baseline: Side) -> Row:
    measured = {"seconds": statistics.median(side.seconds), **ratios(side.seconds, baseline.seconds)}
    return {"optimizer": side.name, "baseline": baseline.name, **measured, "rounds": len(side.seconds)}


def label(model: PreTrainedModel, size: tuple[int, int]) -> str:
    return f"{size[0]} × {tokens_of(model, size[1])}"


def unlike(model: PreTrainedModel, sizes: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """The sizes that differ for a model: an image has its own number of tokens."""
    return list({label(model, size): size for size in sizes}.values())


def size_of(text: str) -> tuple[int, int]:
    batch, cross, tokens = text.partition("x")
    if not cross or not batch.isdigit() or not tokens.isdigit() or not int(batch) * int(tokens):
        raise argparse.ArgumentTypeError(f"expected BATCHxTOKENS such as 32x128, got {text!r}")
    return int(batch), int(tokens)


def positive(text: str) -> int:
    if not text.isdigit() or not int(text):
        raise argparse.ArgumentTypeError(f"expected a whole number above 0, got {text!r}")
    return int(text)


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--models", nargs="+", choices=MODELS, metavar="MODEL", help=f"Out of {', '.join(MODELS)}.")
    add("--optimizers", nargs="+", choices=OPTIMIZERS, metavar="NAME",
        help=f"Out of {', '.join(OPTIMIZERS)}. Ratios are to adamw, or else to the first.")  # fmt: skip
    add("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="What to measure (default: all).")
    add("--sizes", nargs="+", type=size_of, metavar="BATCHxTOKENS",
        help="Batches of the whole step and of the capture; an image has its own tokens.")  # fmt: skip
    add("--rounds", type=positive, default=5, help="Turns of each optimizer (%(default)s).")
    add("--steps", type=positive, default=1, help="Steps of a turn, rounded up to whole intervals (%(default)s).")
    add("--patience", type=float, default=20, metavar="SECONDS",
        help="After which an optimizer has no further turn; the first it always has (%(default)s).")  # fmt: skip
    add("--layers", type=positive, metavar="N", help="Blocks of each model (default: all that fit into memory).")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    add("--device", choices=["cpu", "cuda"], default=device, help="Where to measure (%(default)s).")
    add("--dtype", choices=["float32", "bfloat16"], default="float32", help="Of the parameters (%(default)s).")
    add("--autocast", action="store_true", help="Forward passes of whole and capture under bfloat16 autocast.")
    add("--threads", type=positive, default=os.cpu_count() or 1, help="Of the CPU (%(default)s).")
    add("--output", nargs="+", default=[], metavar="FILE", help="Where to write the record: .md, .csv or both.")
    args = parser.parse_args(argv)
    if wrong := [path for path in args.output if not path.endswith((".md", ".csv"))]:
        parser.error(f"--output takes files that end in .md or .csv, got {wrong[0]!r}")
    if args.optimizers:
        args.optimizers.sort(key=lambda name: name != "adamw")  # the baseline first, where it takes part
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    command = shlex.join(["python", "scripts/bench_step.py", *(sys.argv[1:] if argv is None else argv)])
    logging.set_verbosity_error()
    torch.set_num_threads(args.threads)
    place = {"command": command, **machine(args.threads), "dtype": args.dtype + " under autocast" * args.autocast}
    if args.device == "cpu" and torch.cuda.is_available():
        place["device"] = f"{args.threads} CPU threads"
    rows = []
    for part, name in [(one, name) for one in args.parts for name in args.models or PARTS[one][0]]:
        _, optimizers, sizes = PARTS[part]
        try:
            rows += measure(part, name, args.optimizers or optimizers, args.sizes or sizes, args)
        except ValueError as error:
            sys.exit(f"bench_step.py: error: {error}")
        except KeyboardInterrupt:
            print("\ninterrupted: what is measured so far follows", file=sys.stderr)
            break
    text = report(rows, place)
    print(text)
    for path in args.output:
        os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
        if path.endswith(".csv"):
            write_csv(rows, place, path)
        else:
            with open(path, "w", encoding="utf-8") as file:
                file.write(text)


if __name__ == "__main__":
    main()
