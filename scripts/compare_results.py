"""The results of a comparison: two CSV files that only grow, written by one process."""

import math
import os
from dataclasses import astuple, fields

import pandas as pd
from compare_config import Run

STATUSES = ("ok", "diverged", "failed")
KEY = ["digest", "lr", "steps", "seed"]
# The status stands last: a line that was cut off has none.
COLUMNS = [*(f.name for f in fields(Run)), "step", "eval_loss", "metric", "train_loss", "status"]
ATTEMPTS = 2  # of a run that fails
PLACE = ["machine", "device", "versions", "task", "baseline"]
TIME_COLUMNS = [
    *PLACE,
    "digest",
    "optimizer",
    "step_seconds",
    "ratio",
    "ratio_low",
    "ratio_high",
    "optimizer_share",
    "state_bytes",
    "peak_bytes",
    "status",
]
TEXT = ("optimizer", "digest", "status", *PLACE)


def append(path: str, table: pd.DataFrame) -> None:
    """Adds whole lines to the end of a CSV file, and makes sure that they are on the disk."""
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(path, "a+b") as file:
        is_new = file.tell() == 0
        if not is_new:
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":  # a line that was cut off stays alone
                file.write(b"\n")
        file.write(table.to_csv(index=False, header=is_new, lineterminator="\n").encode())
        file.flush()
        os.fsync(file.fileno())


def read_runs(path: str) -> pd.DataFrame:
    """Returns the rows of all whole runs, those that failed included."""
    table = _read(path, COLUMNS)
    table = table.dropna(subset=["lr", "steps", "seed", "step"]).astype({"steps": int, "seed": int, "step": int})
    is_whole = table.groupby([*KEY, "status"])["step"].transform("max") == table["steps"]
    table = table[is_whole]
    repeated = table.duplicated([*KEY, "status", "step"], keep="last") & (table["status"] != "failed")
    return table[~repeated]


def read_times(path: str) -> pd.DataFrame:
    return _read(path, TIME_COLUMNS)


def _read(path: str, columns: list[str]) -> pd.DataFrame:
    """Returns the lines of a file that are whole."""
    if not os.path.exists(path):
        return pd.DataFrame({column: pd.Series(dtype=str if column in TEXT else float) for column in columns})
    table = pd.read_csv(path, dtype=str, on_bad_lines="skip", keep_default_na=False)
    if list(table.columns) != columns:
        raise ValueError(f"{path} has the columns {', '.join(table.columns)}, not {', '.join(columns)}: move it away")
    table = table[table["status"].isin(STATUSES)].copy()
    for column in columns:
        if column not in TEXT:
            table[column] = pd.to_numeric(table[column], errors="coerce")
    return table


class Results:
    """What is known of every run, from the file and from this session."""

    def __init__(self, path: str) -> None:
        self.path = path
        self._curves: dict[tuple, pd.Series] = {}
        self._failures: dict[tuple, int] = {}
        self._failed_now: set[tuple] = set()
        runs = read_runs(path)
        for (*key, status), rows in runs.groupby([*KEY, "status"]):
            self._note(tuple(key), status, rows)

    def _note(self, key: tuple, status: str, rows: pd.DataFrame) -> None:
        if status == "failed":
            self._failures[key] = self._failures.get(key, 0) + int((rows["step"] == rows["steps"]).sum())
        else:
            self._curves[key] = rows.set_index("step")["eval_loss"]

    def add(self, run: Run, status: str, rows: list[dict[str, float]]) -> None:
        head = dict(zip(COLUMNS, astuple(run), strict=False))
        table = pd.DataFrame([{**head, **row, "status": status} for row in rows], columns=COLUMNS)
        append(self.path, table)
        self._note(run.key, status, table)
        if status == "failed":
            self._failed_now.add(run.key)

    def is_settled(self, run: Run) -> bool:
        """Whether the run is done: finished, failed in this session, or failed too often."""
        failed = run.key in self._failed_now or self._failures.get(run.key, 0) >= ATTEMPTS
        return run.key in self._curves or failed

    def curve(self, run: Run) -> pd.Series:
        """Evaluation loss by step of a settled run; infinite at the end where the training diverged or failed."""
        return self._curves.get(run.key, pd.Series([math.inf], index=[run.steps]))

    def loss(self, run: Run) -> float:
        """The final evaluation loss of a settled run; infinite where the training diverged or failed."""
        return float(self.curve(run).iloc[-1])
