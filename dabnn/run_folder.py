"""The folder of one run: what the loop writes there and what others read or ask through it.

    checkpoints/    see `dabnn.checkpoints`
    metrics.jsonl   one line a finished epoch; replayed epochs stand twice with equal values, the first one counts
    progress.json   newest step, loss and rate, replaced about once a second
    attempts.jsonl  one line a start of the loop
    control.json    written by whoever wants the run to stop; the loop takes a checkpoint and ends
    result.json     how the last attempt ended
    inspect/        steps that were not finite, see `dabnn.diagnose`

The folder is the durable record; trackers follow it. It leaves out everything about clusters.
"""

import json
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class RunFolder:
    """Paths and small files of one run under `root`."""

    root: Path

    @property
    def checkpoints(self) -> Path:
        """Folder of the checkpoints."""
        return self.root / "checkpoints"

    @property
    def metrics_file(self) -> Path:
        """JSON lines, one a finished epoch."""
        return self.root / "metrics.jsonl"

    @property
    def inspect(self) -> Path:
        """Folder of the steps that were not finite."""
        return self.root / "inspect"

    @property
    def control_file(self) -> Path:
        """Exists while a stop is asked for."""
        return self.root / "control.json"

    def append_metrics(self, step: int, metrics: dict[str, float]) -> None:
        """Append one line to `metrics.jsonl`; `step` is the number of finished epochs."""
        _append_line(self.metrics_file, {"step": step, "metrics": metrics, "wall_time": time.time()})

    def metrics(self) -> list[dict[str, Any]]:
        """Return the metrics of every finished epoch in order, replayed epochs once."""
        by_step: dict[int, dict[str, Any]] = {}
        for line in _read_lines(self.metrics_file):
            by_step.setdefault(line["step"], line)
        return [by_step[step] for step in sorted(by_step)]

    def begin_attempt(self, start_step: int, world_size: int) -> int:
        """Record a start of the loop and return its number, counted from 1."""
        number = len(self.attempts()) + 1
        entry = {"attempt": number, "start_step": start_step, "world_size": world_size, "time": time.time()}
        _append_line(self.root / "attempts.jsonl", entry)
        return number

    def attempts(self) -> list[dict[str, Any]]:
        """Return every recorded start of the loop."""
        return _read_lines(self.root / "attempts.jsonl")

    def request_stop(self) -> None:
        """Ask the loop to take a checkpoint and end."""
        self.root.mkdir(parents=True, exist_ok=True)
        write_json(self.control_file, {"action": "stop", "time": time.time()})

    def clear_stop(self) -> None:
        """Withdraw a stop, so that the run can be resumed."""
        self.control_file.unlink(missing_ok=True)

    def is_stop_requested(self) -> bool:
        """Whether a stop is asked for."""
        return self.control_file.exists()

    def write_progress(self, progress: dict[str, Any]) -> None:
        """Replace `progress.json`."""
        write_json(self.root / "progress.json", progress)

    def progress(self) -> dict[str, Any]:
        """Return the newest progress, or an empty dictionary."""
        return read_json(self.root / "progress.json")

    def write_result(self, result: dict[str, Any]) -> None:
        """Replace `result.json`."""
        self.root.mkdir(parents=True, exist_ok=True)
        write_json(self.root / "result.json", result)

    def result(self) -> dict[str, Any]:
        """Return how the last attempt ended, or an empty dictionary."""
        return read_json(self.root / "result.json")

    def forget_result(self) -> None:
        """Remove `result.json`, so that a new attempt cannot be mistaken for the last."""
        (self.root / "result.json").unlink(missing_ok=True)


def headline(metrics: Mapping[str, float]) -> dict[str, float]:
    """Return the metrics that a person is shown: those of the run, without those of single layers and the digest."""
    return {key: value for key, value in metrics.items() if "/" not in key and key != "sample_order"}


def write_json(path: Path, value: Any, *, durable: bool = False) -> None:
    """Write `value` as JSON to `path` in one step: a reader sees the old file or the new one.

    With `durable` the text is on the disk before the name points to it, so a crash of the machine leaves one of both.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with temporary.open("w") as file:
            json.dump(value, file)
            file.flush()
            if durable:
                os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def read_json(path: Path) -> dict[str, Any]:
    """Return the JSON mapping in `path`, or an empty one when there is no such file."""
    try:
        return dict(json.loads(path.read_text()))
    except FileNotFoundError:
        return {}


def _append_line(path: Path, value: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    torn = path.exists() and path.stat().st_size > 0 and not path.read_bytes().endswith(b"\n")
    with path.open("a") as file:
        # A writer killed in mid-line leaves a torn line: it must not swallow the next one.
        file.write(("\n" if torn else "") + json.dumps(value) + "\n")


def _read_lines(path: Path) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    entries = []
    for line in path.read_text().splitlines():
        try:
            entries.append(json.loads(line))
        except json.JSONDecodeError:
            continue  # torn by a kill; the epoch was replayed and stands again below
    return entries
