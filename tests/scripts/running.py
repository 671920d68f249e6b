"""How the tests of the scripts start a command, and write what it reads."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parents[2]
PYTHON = (sys.executable,)
TORCHRUN_2 = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")
ACCELERATE = (sys.executable, "-m", "accelerate.commands.launch")
QUIET = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
LONGEST = 300.0  # seconds


def launch(*command: object) -> subprocess.CompletedProcess:
    """
    Runs a command, made of a launcher and its arguments, on one thread for each process and without a network. Where
    it hangs, all of its processes end, and each says where it was.
    """
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, **QUIET, "PYTHONFAULTHANDLER": "1", "PYTHONPATH": path}
    words = [str(word) for word in command]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(words, env=environment, cwd=ROOT, **pipes) as process:
        try:
            said = process.communicate(timeout=LONGEST)
        except subprocess.TimeoutExpired:
            first = psutil.Process(process.pid)
            for one in (*first.children(recursive=True), first):
                one.send_signal(signal.SIGABRT)
            said = process.communicate()
            raise TimeoutError("\n".join([f"no end after {LONGEST:.0f} seconds: {words}", *said])) from None
    return subprocess.CompletedProcess(words, process.returncode, *said)


def write(folder: Path, settings: dict) -> str:
    """A file with the settings of a comparison."""
    path = folder / "tiny.yaml"
    path.write_text(json.dumps(settings))  # which is YAML
    return str(path)
