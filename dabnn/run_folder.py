"""The folder of one run: what the loop writes there and what others read or ask through it.

    checkpoints/    see `dabnn.checkpoints`
    metrics.jsonl   one line a finished epoch; replayed epochs stand twice with equal values, the first one counts
    system.jsonl    the load of rank 0's machine, a line a sample; nothing reads it but trackers
    progress.json   newest step, loss and rate, replaced about once a second
    attempts.jsonl  one line a start of the loop
    control.json    written by whoever wants the run to stop; the loop takes a checkpoint and ends
    result.json     how the last attempt ended
    events.jsonl    one line for each thing that went wrong, and what was done; see `RunFolder.append_event`
    inspect/        steps that were not finite, see `dabnn.diagnose`

The folder is the durable record; trackers follow it. It may lie behind a URL: then `root` is a copy of its small files,
brought up to date when they are read, and writing goes to the store. It leaves out everything about clusters.
"""

import errno
import json
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dabnn.data.location import Location
from dabnn.data.remote import is_url
from dabnn.run_copy import CHECKPOINTS, RunCopy


@dataclass(frozen=True)
class RunFolder:
    """Paths and small files of one run.

    Attributes:
        root: The folder, or the copy of one behind a URL.
        copy: Keeps the copy; None where `root` is the folder itself.
    """

    root: Path
    copy: RunCopy | None = field(default=None, compare=False)

    @classmethod
    def of(cls, location: str | Path) -> "RunFolder":
        """Return the folder at a path or URL; nothing is asked of a server yet.

        Raises:
            InvalidInputError: No run can be kept behind this URL.
        """
        text = str(location)
        if isinstance(location, Path) or not is_url(text):
            return cls(Path(location))
        if text.startswith("file://"):
            return cls(Location.of(text).path)
        copy = RunCopy.of(text)
        return cls(copy.root, copy)

    @property
    def location(self) -> str:
        """Path or URL of the folder."""
        return str(self.root) if self.copy is None else self.copy.store.url

    def place_of(self, name: str) -> str:
        """Return the path or URL of a file in it."""
        return str(self.root / name) if self.copy is None else self.copy.store.child(name)

    def child(self, name: str) -> "RunFolder":
        """Return the folder of that name in it: of a trial in that of its sweep."""
        return RunFolder(self.root / name) if self.copy is None else RunFolder.of(self.copy.store.child(name))

    def children(self, name: str) -> list["RunFolder"]:
        """Return the folders that lie in the folder of that name, in order."""
        if self.copy is None:
            return [RunFolder(path) for path in sorted((self.root / name).glob("*")) if path.is_dir()]
        return [self.child(f"{name}/{entry}") for entry in self.copy.folders(name)]

    def fresh(self) -> "RunFolder":
        """Bring the copy of a folder behind a URL up to date, and return this.

        Raises:
            StoreError: The store refuses, or does not answer for 20 s.
        """
        if self.copy is not None:
            self.copy.fetch()
        return self

    def refresh(self) -> None:
        """Bring the copy up to date if it was not in the last second and the store answers."""
        if self.copy is not None:
            self.copy.refresh()

    def leave(self, name: str, text: str) -> None:
        """Write a small file of the run in one step, whatever its folder is; an existing one is replaced.

        Raises:
            OSError: It cannot be written.
            StoreError: The store does not take it.
        """
        if self.copy is not None:
            self.copy.write(name, text.encode())
            return
        path = self.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        _write_text(path, text)

    def leave_json(self, name: str, value: Any) -> None:
        """Write a small file of JSON; see `leave`."""
        self.leave(name, json.dumps(value))

    def load_json(self, name: str) -> dict[str, Any]:
        """Return the JSON mapping in a file of the run, or an empty one when there is no such file.

        Raises:
            StoreError: The store refuses, or does not answer for 20 s.
        """
        text = self.load_text(name)
        return {} if text is None else dict(json.loads(text))

    def load_text(self, name: str) -> str | None:
        """Return a small file of the run, or None when there is no such file.

        Raises:
            StoreError: The store refuses, or does not answer for 20 s.
        """
        if self.copy is not None:
            data = self.copy.read(name)
            return None if data is None else data.decode()
        try:
            return (self.root / name).read_text()
        except FileNotFoundError:
            return None

    def remove(self, name: str) -> None:
        """Remove a small file of the run, where there is one.

        Raises:
            StoreError: The store refuses, or does not answer for 20 s.
        """
        (self.root / name).unlink(missing_ok=True)
        if self.copy is not None:
            self.copy.remove(name)

    @property
    def checkpoints(self) -> Path:
        """Folder of the checkpoints; behind a URL, of the copies of their commit files."""
        return self.root / CHECKPOINTS

    @property
    def metrics_file(self) -> Path:
        """JSON lines, one a finished epoch."""
        return self.root / "metrics.jsonl"

    @property
    def system_file(self) -> Path:
        """Load of the machine of rank 0."""
        return self.root / "system.jsonl"

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
        line = {"step": step, "metrics": metrics, "wall_time": time.time()}
        _append_line(self.metrics_file, line, durable=True)  # the checkpoint after it says that it is there

    def append_system(self, step: int, metrics: dict[str, float]) -> None:
        """Append one line to `system.jsonl`; `step` is the age of the run in seconds.

        Raises:
            OSError: It cannot be written, or the folder is not there.
        """
        line = {"step": step, "metrics": metrics, "wall_time": time.time()}
        with self.system_file.open("a") as file:
            file.write(json.dumps(line) + "\n")

    def metrics(self) -> list[dict[str, Any]]:
        """Return the metrics of every finished epoch in order, replayed epochs once."""
        self.refresh()
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
        self.refresh()
        return _read_lines(self.root / "attempts.jsonl")

    def append_event(self, event: Mapping[str, Any]) -> None:
        """Append what happened to `events.jsonl`; behind a URL each call from outside makes a file of its own.

        Raises:
            OSError: It cannot be written.
            StoreError: The store does not take it.
        """
        line = dict(event) | {"time": event.get("time", time.time())}
        if self.copy is None:
            _append_line(self.root / "events.jsonl", line)
            return
        # An object cannot be appended to, and the loop's own file is replaced as a whole.
        self.copy.write(f"events-{time.time_ns()}-{os.getpid()}.jsonl", (json.dumps(line) + "\n").encode())

    def events(self) -> list[dict[str, Any]]:
        """Return everything that was noted with `append_event`, by whomever, in the order of time."""
        self.refresh()
        lines = [line for path in self.root.glob("events*.jsonl") for line in _read_lines(path)]
        return sorted(lines, key=lambda line: float(line.get("time", 0)))

    def request_stop(self) -> None:
        """Ask the loop to take a checkpoint and end."""
        self.leave_json(self.control_file.name, {"action": "stop", "time": time.time()})

    def clear_stop(self) -> None:
        """Withdraw a stop, so that the run can be resumed."""
        self.remove(self.control_file.name)

    def is_stop_requested(self) -> bool:
        """Whether a stop is asked for."""
        self.refresh()
        return self.control_file.exists()

    def write_progress(self, progress: dict[str, Any]) -> None:
        """Replace `progress.json`."""
        self.leave_json("progress.json", progress)

    def progress(self) -> dict[str, Any]:
        """Return the newest progress, or an empty dictionary."""
        self.refresh()
        return read_json(self.root / "progress.json")

    def write_result(self, result: dict[str, Any]) -> None:
        """Replace `result.json`."""
        self.leave_json("result.json", result)

    def result(self) -> dict[str, Any]:
        """Return how the last attempt ended, or an empty dictionary."""
        self.refresh()
        return read_json(self.root / "result.json")

    def forget_result(self) -> None:
        """Remove `result.json`, so that a new attempt cannot be mistaken for the last."""
        self.remove("result.json")


def headline(metrics: Mapping[str, float]) -> dict[str, float]:
    """Return the metrics that a person is shown: those of the run, without those of single layers and the digest."""
    return {key: value for key, value in metrics.items() if "/" not in key and key != "sample_order"}


def write_json(path: Path, value: Any, *, durable: bool = False) -> None:
    """Write `value` as JSON to `path` in one step: a reader sees the old file or the new one.

    With `durable` the text is on the disk before the name points to it, and so is the name when this returns: a crash
    of the machine leaves the old file or the new one, and the new one after the return.
    """
    _write_text(path, json.dumps(value), durable=durable)


def _write_text(path: Path, text: str, *, durable: bool = False) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with temporary.open("w") as file:
            file.write(text)
            file.flush()
            if durable:
                os.fsync(file.fileno())
        temporary.replace(path)
        if durable:
            sync_folder(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def sync_folder(folder: Path) -> None:
    """Wait until the names in a folder are on the disk, or with the server of a network folder."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some network folders cannot, and need not
            raise
    finally:
        os.close(descriptor)


def read_json(path: Path) -> dict[str, Any]:
    """Return the JSON mapping in `path`, or an empty one when there is no such file."""
    try:
        return dict(json.loads(path.read_text()))
    except FileNotFoundError:
        return {}


def _append_line(path: Path, value: dict[str, Any], *, durable: bool = False) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    torn = path.exists() and path.stat().st_size > 0 and not path.read_bytes().endswith(b"\n")
    with path.open("a") as file:
        # A writer killed in mid-line leaves a torn line: it must not swallow the next one.
        file.write(("\n" if torn else "") + json.dumps(value) + "\n")
        file.flush()
        if durable:
            os.fsync(file.fileno())


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
