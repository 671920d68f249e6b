"""
Which checkpoints are whole: a run that is killed while it writes one leaves some of its files, or half of one.

Whole is a checkpoint with the file that is written last, when all processes have written theirs: `trainer_state.json`
of [`EvaTrainer`], the mark of [`save_state`], or `.metadata` of `torch.distributed.checkpoint`.
"""

from __future__ import annotations

import logging
import re
import shutil
from pathlib import Path
from typing import Any

from .collectives import is_main_process
from .runs import STATE_FILE, read_state

logger = logging.getLogger(__name__)

MARK = "eva_whole"
_LAST_FILES = (MARK, ".metadata")
_NAME = re.compile(r"checkpoint[-_](\d+)")


def last_checkpoint(folder: str | Path) -> str | None:
    """
    The newest whole checkpoint, if any, of those called `checkpoint-<number>` or `checkpoint_<number>` in a folder:
    the output folder of a Trainer, or `checkpoints` in the project of an `Accelerator`. A warning, of the main
    process, names newer ones that are not whole, and what they lack.
    """
    skipped = []
    newest = None
    for path in _newest_first(folder):
        if not (lack := _lack_of(path)):
            newest = path
            break
        skipped.append(f"{path.name} ({lack})")
    if skipped and is_main_process():
        logger.warning(
            "Left out in %s, because the run ended while it wrote them: %s. %s",
            folder,
            ", ".join(skipped),
            f"The last whole checkpoint is {newest.name}." if newest else "No checkpoint there is whole.",
        )
    return str(newest) if newest else None


def save_state(accelerator: Any, output_dir: str | None = None, **options: Any) -> str:
    """
    `accelerator.save_state`, with a mark in the checkpoint once every process has written its files. Call it on all
    processes.

    Args:
        accelerator (`accelerate.Accelerator`): what has prepared model and optimizer.
        output_dir (`str`, *optional*): the folder of the checkpoint; needed without automatic names of checkpoints.
        options: further arguments of `accelerator.save_state`.

    Returns:
        `str`: the folder of the checkpoint.
    """
    makes_mark = accelerator.is_main_process
    if accelerator.project_configuration.save_on_each_node:
        makes_mark = accelerator.is_local_main_process
    if output_dir is not None:
        # One that is written over is not whole from the first file on.
        if makes_mark:
            Path(output_dir, MARK).unlink(missing_ok=True)
        accelerator.wait_for_everyone()
    folder = str(accelerator.save_state(output_dir, **options))
    accelerator.wait_for_everyone()
    if makes_mark:
        Path(folder, MARK).touch()
    return folder


def load_state(accelerator: Any, **options: Any) -> str | None:
    """
    `accelerator.load_state` of the newest checkpoint by [`save_state`] in the project that is whole. Newer ones, which
    a warning names, are moved to the folder `interrupted` of the project: `accelerator.save_state` would stumble over
    them. Call it on all processes.

    Args:
        accelerator (`accelerate.Accelerator`): one with automatic names of checkpoints.
        options: further arguments of `accelerator.load_state`.

    Returns:
        `str`: the folder of the checkpoint; `None` where none is whole: then nothing is loaded.

    Raises:
        ValueError: the accelerator does not name its checkpoints by itself.
    """
    if not accelerator.project_configuration.automatic_checkpoint_naming:
        raise ValueError(
            "load_state looks for checkpoints with automatic names: make the Accelerator with "
            "ProjectConfiguration(folder, automatic_checkpoint_naming=True), or load a folder of your choice with "
            "accelerator.load_state(last_checkpoint(folder))."
        )
    folder = Path(accelerator.project_dir, "checkpoints")
    last = last_checkpoint(folder)
    accelerator.wait_for_everyone()  # until all have looked
    if accelerator.is_local_main_process:
        for path in _newest_first(folder):
            if str(path) == last:
                break
            place = Path(accelerator.project_dir, "interrupted", path.name)
            shutil.rmtree(place, ignore_errors=True)
            place.parent.mkdir(exist_ok=True)
            path.rename(place)
    if last is not None:
        accelerator.load_state(last, **options)
    accelerator.wait_for_everyone()
    return last


def _newest_first(folder: str | Path) -> list[Path]:
    found = {path: match for path in Path(folder).glob("checkpoint*") if (match := _NAME.fullmatch(path.name))}
    return sorted(found, key=lambda path: int(found[path][1]), reverse=True)


def _lack_of(path: Path) -> str:
    """What a checkpoint lacks to be whole, or an empty string."""
    if any((path / name).is_file() for name in _LAST_FILES):
        return ""
    if not (path / STATE_FILE).is_file():
        return f"neither {STATE_FILE} nor {' nor '.join(_LAST_FILES)}"
    try:
        read_state(path)
    except ValueError:
        return f"{STATE_FILE} is cut off"
    return ""
