"""How the tests of the scripts start a command, and write what it reads."""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PYTHON = (sys.executable,)
TORCHRUN_2 = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")
ACCELERATE = (sys.executable, "-m", "accelerate.commands.launch")
QUIET = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}


def launch(*command: object) -> subprocess.CompletedProcess:
    """Runs a command, made of a launcher and its arguments, on one thread for each process and without a network."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, **QUIET, "PYTHONPATH": path}
    words = [str(word) for word in command]
    return subprocess.run(words, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=300)


def write(folder: Path, settings: dict) -> str:
    """A file with the settings of a comparison."""
    path = folder / "tiny.yaml"
    path.write_text(json.dumps(settings))  # which is YAML
    return str(path)
