"""
The command line `hf-eva`: what Eva would do with a model, the card and the pictures of a run, the state of a machine.

Exit codes: 0 done, 1 a package is missing or `doctor` found a problem, 2 the input was wrong, 130 interrupted.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from . import __version__
from .config import EvaConfig, parse_options
from .selection import Plan, plan

# What installs a package that a command needs, by the name under which it is imported.
_EXTRAS = {"matplotlib": "plot"} | dict.fromkeys(
    ("accelerate", "huggingface_hub", "jinja2", "psutil", "transformers", "yaml"), "trainer"
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line, `sys.argv` by default, and return its exit code."""
    args = _parser().parse_args(argv)
    try:
        code: int = args.command(args)
        sys.stdout.flush()
    except ModuleNotFoundError as error:
        extra = _EXTRAS.get((error.name or "").partition(".")[0])
        if extra is None:
            raise
        return _failed(args, f"this needs {error.name}, which is not installed: pip install 'hf-eva[{extra}]'", 1)
    except BrokenPipeError:
        # The reader, such as `head`, has seen enough; Python would complain once more at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        return 130
    except (ValueError, OSError) as error:
        return _failed(args, str(error), 2)
    return code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="hf-eva", description="Second-order training for Transformers.")
    parser.add_argument("--version", action="version", version=f"hf-eva {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def add(name: str, command: Any, text: str, example: str) -> argparse.ArgumentParser:
        added: argparse.ArgumentParser = commands.add_parser(
            name,
            help=text,
            description=text[0].upper() + text[1:] + ".",
            epilog=f"example: hf-eva {example}",
        )
        added.set_defaults(command=command, name=name)
        return added

    one = add("plan", _plan, "tell which layers of a model would be preconditioned, without its weights", "plan gpt2")
    one.add_argument("model", metavar="MODEL", help="name on the Hub, folder, or configuration file")
    one.add_argument("--model_class", help="class of transformers to build (default: that of the configuration)")
    one.add_argument("--revision", help="branch, tag or commit on the Hub")
    one.add_argument("--optim_args", default="", metavar="K=V,…", help="settings of Eva, as in the Trainer: rank=8")
    one.add_argument("--include", nargs="+", metavar="NAME", help="precondition these layers only")
    one.add_argument("--exclude", nargs="+", metavar="NAME", help="do not precondition these layers")
    one.add_argument("--json", action="store_true", help="print JSON, with one entry for each layer")

    one = add("card", _card, "write the section 'Training time' of a run's model card", "card runs/bert")
    one.add_argument("run", metavar="RUN", type=Path, help="output folder of the run")
    one.add_argument("--baseline_run", metavar="RUN", type=Path, help="run whose last evaluation loss is the target")
    one.add_argument("--dataset", help="name of the data, for the results in the metadata")
    one.add_argument("--task", help="task on the Hub, such as text-classification, for the same")
    one.add_argument("--json", action="store_true", help="print the facts of the card as JSON")

    one = add("plot", _plot, "draw runs: loss, strength of preconditioning, spectra", "plot runs/bert runs/bert-adamw")
    one.add_argument("runs", nargs="+", metavar="RUN", type=Path, help="output folder of a run, or a checkpoint")
    one.add_argument("--output", type=Path, help="file to write, .png or .svg (default: loss.png of the first run)")
    one.add_argument("--dark", action="store_true", help="light lines on a dark ground")
    one.add_argument("--json", action="store_true", help="print the files written as JSON")

    one = add("doctor", _doctor, "tell versions, devices and what will be used", "doctor")
    one.add_argument("--json", action="store_true", help="print JSON")
    return parser


def _failed(args: argparse.Namespace, reason: str, code: int) -> int:
    print(f"hf-eva {args.name}: error: {' '.join(reason.split())}", file=sys.stderr)
    return code


def _print_json(value: Any) -> None:
    print(json.dumps(value, indent=2, ensure_ascii=False))


# plan ----------------------------------------------------------------------------------------------------------------


def _plan(args: argparse.Namespace) -> int:
    config = EvaConfig.from_options(parse_options(args.optim_args))
    include = "all-linear" if args.include == ["all-linear"] else args.include
    found = plan(_model_without_weights(args.model, args.model_class, args.revision), include, args.exclude, config)
    if args.json:
        _print_json(_plan_values(args.model, found))
    else:
        print(found)
    return 0


def _model_without_weights(name: str, model_class: str | None, revision: str | None) -> Any:
    """The model that a configuration describes, on the meta device: its shapes, and no memory."""
    import torch
    import transformers

    if Path(name).is_dir() and not (Path(name) / "config.json").is_file():
        raise ValueError(
            f"there is no config.json in {name}: name a model on the Hub, a folder or a configuration file"
        )
    try:
        config = transformers.AutoConfig.from_pretrained(name, revision=revision or "main")
    except (OSError, ValueError) as error:
        reason = str(error).strip().partition("\n")[0].rstrip(":")  # the lines below it give general advice
        raise ValueError(f"no configuration could be read from {name!r}: {reason}") from error
    wanted = model_class or next(iter(config.architectures or ()), "AutoModel")
    cls = getattr(transformers, wanted, None)
    if cls is None:
        raise ValueError(
            f"transformers {transformers.__version__} has no class {wanted!r}: choose one by --model_class"
        )
    with torch.device("meta"):
        model = cls.from_config(config) if hasattr(cls, "from_config") else cls(config)
    dtype = getattr(config, "dtype", None)
    return model.to(dtype) if isinstance(dtype, torch.dtype) else model


def _plan_values(name: str, found: Plan) -> dict[str, Any]:
    return {
        "model": name,
        "class": type(found.model).__name__,
        "preconditioned_layers": len(found.layers),
        "preconditioned_parameters": sum(layer.weight.numel() for layer in found.layers),
        "trainable_parameters": sum(p.numel() for p in found.model.parameters() if p.requires_grad),
        "state_bytes": found.state_bytes,
        "adamw_bytes": found.adamw_bytes,
        "layers": [
            {
                "name": row.name,
                "kind": row.kind,
                "shape": row.shape,
                "preconditioned": not row.reason,
                "reason": row.reason or None,
                "state_bytes": row.state_bytes,
                "adamw_bytes": row.adamw_bytes,
            }
            for row in found.rows
        ],
    }


# card and plot -------------------------------------------------------------------------------------------------------


def _card(args: argparse.Namespace) -> int:
    from .facts import save_facts, saved_facts
    from .model_card import write_training_section
    from .runs import Run

    run, facts = Run.read(args.run), saved_facts(args.run)
    baseline = Run.read(args.baseline_run) if args.baseline_run else None
    path = write_training_section(run, facts, baseline, {"dataset": args.dataset, "tasks": args.task})
    save_facts(facts, args.run)
    if args.json:
        _print_json(facts)
    else:
        print(path)
    return 0


def _plot(args: argparse.Namespace) -> int:
    from .plots import plot_runs
    from .runs import Run

    output = args.output or args.runs[0] / "loss.png"
    written = plot_runs([Run.read(folder) for folder in args.runs], output, "dark" if args.dark else "light")
    if args.json:
        _print_json([str(path) for path in written])
    else:
        print(*written, sep="\n")
    return 0


# doctor --------------------------------------------------------------------------------------------------------------


def _doctor(args: argparse.Namespace) -> int:
    from .doctor import examine, report

    found = examine()
    if args.json:
        _print_json(found)
    else:
        print(report(found))
    return 0 if found["ok"] else 1
