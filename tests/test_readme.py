"""What the README says: the settings are what they are, its code runs, and its commands are understood."""

from __future__ import annotations

import dataclasses
import re
import shlex
import subprocess

import pytest
from documents import ROOT, code_blocks, run_blocks, without_blocks

from hf_eva import EvaConfig, cli

README = ROOT / "README.md"
TEXT = README.read_text(encoding="utf-8")


def test_the_table_of_settings_is_the_config():
    recipe, paper = EvaConfig(), EvaConfig.paper("eva")
    for field in dataclasses.fields(EvaConfig):
        name = field.name
        row = f"| `{name}` | `{getattr(recipe, name)}` | `{getattr(paper, name)}` | {EvaConfig.help()[name]} |"
        assert row in TEXT


def test_every_file_it_names_is_there():
    named = re.findall(r"\b((?:configs|docs|notebooks|scripts|tests)/[\w./-]+)", TEXT)
    assert named
    missing = [name for name in named if not (ROOT / name).exists()]
    assert not missing


def test_each_row_of_the_compatibility_table_names_its_test():
    table = TEXT.partition("| works | tested by |\n| --- | --- |\n")[2].partition("\n\n")[0]
    rows = re.findall(r"^\| (.+) \| (.+) \|$", table, re.MULTILINE)
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert len(rows) > 5
    for works, tests in rows:
        named = re.findall(r"`(.+?)`", tests)
        assert named, works
        for name in named:
            if name.startswith("make "):
                assert f"\n{name.removeprefix('make ')}: " in makefile, name
                continue
            files = [ROOT / name] if name.endswith(".py") else list((ROOT / name).glob("test_*.py"))
            assert files and all(re.search(r"^def test_", file.read_text(), re.MULTILINE) for file in files), name


def test_its_python_runs(tmp_path, monkeypatch):
    pytest.importorskip("trl")
    from tiny_training import data, model
    from torch.utils.data import DataLoader

    import hf_eva

    monkeypatch.chdir(tmp_path)
    rows = data(16)
    # What a reader has already; everything else has to be in the README.
    names = {"model": model(), "train_dataset": rows, "loader": DataLoader(rows, batch_size=8)}
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    try:
        run_blocks(README, names)
    finally:
        hf_eva.unregister()
    assert names["trainer"].state.global_step > 0
    assert names["args"].optim == "eva" and isinstance(names["optimizer"].optimizer, hf_eva.Eva)
    assert names["MySFTConfig"](str(tmp_path), use_cpu=True, bf16=False).eva_config == EvaConfig()


def commands() -> list[str]:
    """All commands of the README but installations, a line each."""
    text = "".join(code_blocks(README, "bash")).replace("\\\n", " ")
    inline = re.findall(r"`([^`]+)`", without_blocks(README).replace("\n", " "))
    text += "\n".join(code for code in inline if re.match(r"(make|scripts/\S+\.py) ", code))
    lines = [re.sub(r" #.*", "", line).strip() for line in text.splitlines()]
    return [" ".join(line.split()) for line in lines if line and "pip install" not in line]


def parse_script(script: str, arguments: list[str]) -> None:
    """Let a script's own parser read its arguments; the scripts of transformers share that of the Trainer."""
    if script == "scripts/finetune.py":
        import finetune
        from compare_config import KINDS

        finetune.parse_arguments(KINDS, arguments, "")
    elif script == "scripts/compare.py":
        import compare

        compare.parse(arguments)
    else:
        assert script.startswith("run_") or script == "SCRIPT", script
        from transformers import HfArgumentParser, TrainingArguments

        import hf_eva

        hf_eva.register()
        try:
            HfArgumentParser(TrainingArguments).parse_args_into_dataclasses(arguments)
        finally:
            hf_eva.unregister()


def parse(words: list[str]) -> None:
    program, *rest = [word for word in words if word not in ("...", "…")]
    if program == "make":
        subprocess.run(["make", "-n", *rest], cwd=ROOT, check=True, capture_output=True, timeout=60)
    elif program == "hf-eva":
        cli._parser().parse_args(rest)
    elif program in ("accelerate", "torchrun"):
        if program == "accelerate":
            from accelerate.commands.launch import launch_command_parser

            assert rest.pop(0) == "launch"
            args = launch_command_parser().parse_args(rest)
            assert args.config_file is None or (ROOT / args.config_file).exists()
        else:
            from torch.distributed.run import get_args_parser

            args = get_args_parser().parse_args(rest)
        if args.module:
            parse(["python", "-m", args.training_script, *args.training_script_args])
        else:
            parse_script(args.training_script, args.training_script_args)
    elif rest[:2] == ["-m", "hf_eva"]:
        parse_script(rest[2], rest[3:])
    else:
        script, *arguments = rest if program == "python" else [program, *rest]
        parse_script(script, arguments)


@pytest.mark.parametrize("command", commands())
def test_its_commands_are_understood(command, monkeypatch):
    pytest.importorskip("datasets")
    monkeypatch.chdir(ROOT)
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    parse(shlex.split(command))
