"""The files in `configs/accelerate` start as many processes as their names say."""

import re
import socket

import pytest
import yaml
from running import ACCELERATE, ROOT, launch

CONFIGS = ROOT / "configs" / "accelerate"
PROBE = """
from transformers import TrainingArguments

args = TrainingArguments(output_dir="unused", use_cpu=True)
print(f"process {args.process_index} of {args.world_size} on {args.device.type}", flush=True)
"""


@pytest.mark.distributed
@pytest.mark.parametrize("count", [1, 2])
def test_a_cpu_config_starts_that_many_processes_which_know_each_other(count, tmp_path):
    config = CONFIGS / f"cpu_{count}.yaml"
    assert yaml.safe_load(config.read_text())["num_processes"] == count
    (tmp_path / "probe.py").write_text(PROBE)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    done = launch(*ACCELERATE, "--config_file", config, "--main_process_port", port, tmp_path / "probe.py")
    assert done.returncode == 0, done.stderr
    started = re.findall(r"process (\d+) of (\d+) on cpu", done.stdout)
    assert sorted(started) == [(str(index), str(count)) for index in range(count)]
