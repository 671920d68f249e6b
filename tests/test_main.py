"""`python -m hf_eva SCRIPT`."""

from __future__ import annotations

import subprocess
import sys

import pytest

SCRIPT = """
import sys
from neighbour import ANSWER
from transformers import HfArgumentParser, TrainingArguments
(args,) = HfArgumentParser(TrainingArguments).parse_args_into_dataclasses()
print(__name__, sys.argv, args.optim, ANSWER)
sys.exit(7)
"""


def run(*command: str, cwd) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "hf_eva", *command], capture_output=True, text=True, cwd=cwd)


def test_a_script_runs_as_itself_and_knows_the_name(tmp_path):
    (tmp_path / "scripts").mkdir()
    (tmp_path / "scripts" / "script.py").write_text(SCRIPT)
    (tmp_path / "scripts" / "neighbour.py").write_text("ANSWER = 42")
    arguments = ["--output_dir", "out", "--use_cpu", "--optim", "eva"]
    result = run("scripts/script.py", *arguments, cwd=tmp_path)
    assert result.returncode == 7, result.stderr
    assert result.stdout.strip() == f"__main__ {['scripts/script.py', *arguments]} eva 42"


@pytest.mark.parametrize(("command", "code"), [((), 2), (("--help",), 0), (("missing.py",), 2)])
def test_without_a_script_it_says_how_to_use_it(tmp_path, command, code):
    result = run(*command, cwd=tmp_path)
    assert result.returncode == code
    assert "usage: python -m hf_eva SCRIPT" in result.stdout + result.stderr
