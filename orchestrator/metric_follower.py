"""Metrics files followed into MLflow while a run writes them.

The file is the durable record, a line of JSON a report: `{"step": 3, "metrics": {"loss": 0.5}, "wall_time": 1.7e9}`. A
thread sends what appears and remembers beside the file how far it came, so a server that is away, or a follower that is
killed, costs nothing but time.

Nothing arrives twice. MLflow keeps one of equal points (key, time, step, value), and what is sent for a line is a
function of the file up to that line: the same line sent again, by this follower whose answer was lost or by another, is
the same points. A step that a restarted run writes again, at another time, is sent once, as it was first written.
"""

import contextlib
import hashlib
import itertools
import json
import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from dabnn.errors import DabError, InvalidInputError
from dabnn.run_folder import RunFolder
from orchestrator.home import read_record, write_private
from orchestrator.mlflow_client import is_reachable, is_refusal, unchecked_client

if TYPE_CHECKING:
    from mlflow.entities import Metric

_log = logging.getLogger(__name__)

_MAX_DELAY_S = 30.0
_MAX_METRICS_PER_CALL = 1000  # MLflow refuses more
_MAX_LINES_PER_CALL = 200
_REACH_TIMEOUT_S = 5.0
_SEAM_BYTES = 256  # compared, so that a file that was put back to an earlier state is noticed


@dataclass
class _Tail:
    """How far one file is sent.

    Attributes:
        path: Metrics file; it need not exist yet.
        run_id: MLflow run.
        offset: Bytes of the file that are dealt with; always the beginning of a line.
        last_steps: Per metric the last step sent. A run that restarts from a checkpoint writes steps again.
        seam: Digest of the last bytes before `offset`.
        is_refused: The server wants nothing for this run: it was deleted there.
        folder: The run's, brought up to date before its file is read; None where the file is read as it lies.
        is_whole: The run has ended: when what is there is sent, nothing more is.
    """

    path: Path
    run_id: str
    offset: int = 0
    last_steps: dict[str, int] = field(default_factory=dict)
    seam: str = ""
    is_refused: bool = False
    folder: RunFolder | None = None
    is_whole: bool = False

    @property
    def state_path(self) -> Path:
        """Where a later follower finds how far this one came."""
        return self.path.with_name(f"{self.path.name}.sent")

    def restore(self) -> None:
        state = read_record(self.state_path)
        if state is not None and state.get("run_id") == self.run_id:
            self.offset, self.last_steps = int(state["offset"]), dict(state["last_steps"])
            self.seam = str(state.get("seam", ""))

    def commit(self, offset: int, last_steps: dict[str, int]) -> None:
        with self.path.open("rb") as file:
            self.offset, self.last_steps, self.seam = offset, last_steps, _seam(file, offset)
        state = {"run_id": self.run_id, "offset": offset, "last_steps": last_steps, "seam": self.seam}
        write_private(self.state_path, json.dumps(state))

    def lines(self, limit: int | None) -> list[bytes]:
        """Return whole lines after `offset`; one that is still being written is left for later."""
        if self.folder is not None:
            with contextlib.suppress(DabError):  # its store refuses: the loop tells of that
                self.folder.refresh()
        try:
            with self.path.open("rb") as file:
                if file.seek(0, 2) < self.offset or (self.seam and _seam(file, self.offset) != self.seam):
                    self.offset = 0  # the file was begun anew; `last_steps` keeps what was sent from being sent again
                file.seek(self.offset)
                lines = list(itertools.islice(file, limit))
        except FileNotFoundError:
            return []
        return lines[:-1] if lines and not lines[-1].endswith(b"\n") else lines


class MetricFollower:
    """A thread that sends the metrics files of runs to an MLflow server as they grow.

    It never raises into the program that trains: a server that is away is asked again, at least every 30 s, after one
    warning.
    """

    def __init__(self, uri: str, *, poll_s: float = 0.5) -> None:
        import mlflow.tracking  # noqa: F401 - in the thread, beside the imports of others, it ended in a deadlock

        self._uri = uri
        self._poll_s = poll_s
        self._tails: list[_Tail] = []
        self._closing = threading.Event()
        self._deadline = float("inf")
        self._is_away = False
        self._owed: deque[Callable[[], None]] = deque()
        self._thread = threading.Thread(target=self._run, name="dab-metrics", daemon=True)
        self._thread.start()

    def follow(self, place: Path | RunFolder, run_id: str) -> None:
        """Follow a metrics file, or those of a run, from where a follower before came to; none need exist yet."""
        if isinstance(place, Path):
            tails = [_Tail(place, run_id)]
        else:  # the first brings the folder up to date for both
            tails = [_Tail(place.metrics_file, run_id, folder=place), _Tail(place.system_file, run_id)]
        for tail in tails:
            with contextlib.suppress(OSError):  # then lines are sent twice, which does no harm
                tail.restore()
        self._tails += tails

    def rest(self, run_id: str) -> None:
        """Send what is there of a run that has ended, and ask its store for no more."""
        for tail in self._tails:
            if tail.run_id == run_id:
                tail.folder, tail.is_whole = None, True

    def owe(self, call: Callable[[], None]) -> None:
        """Make a call to the server as soon as it answers, in the order in which calls are owed, before any metrics.

        Args:
            call: Raises DabError where the server is away; it is then repeated. What the server refuses is dropped.
        """
        self._owed.append(call)

    def settle(self, stall_s: float) -> None:
        """Wait until every call that is owed was made, or none was for `stall_s`."""
        left, since = len(self._owed), time.monotonic()
        while self._owed and time.monotonic() - since < stall_s:
            time.sleep(min(0.1, self._poll_s))
            if len(self._owed) < left:
                left, since = len(self._owed), time.monotonic()

    def close(self, timeout_s: float) -> int:
        """Send what can be sent within `timeout_s`, stop, and return the number of lines that could not be sent.

        A later follower of the same file sends them.
        """
        self._deadline = time.monotonic() + timeout_s
        self._closing.set()
        self._thread.join(timeout_s)
        return sum(len(tail.lines(None)) for tail in self._tails)

    def _run(self) -> None:
        delay_s = self._poll_s
        while True:
            is_closing = self._closing.is_set()  # before sending: what was written before close() is then seen
            is_done = self._send_guarded()
            if is_closing:
                if is_done or time.monotonic() > self._deadline:
                    return
                time.sleep(min(1.0, self._poll_s))
            else:
                delay_s = self._poll_s if is_done else min(2 * delay_s, _MAX_DELAY_S)
                self._closing.wait(delay_s)

    def _send_guarded(self) -> bool:
        try:
            return self._send_all()
        except Exception:  # noqa: BLE001 - the thread must live on: whatever it was, the run's folder keeps the record
            _log.exception("metrics could not be sent to %s; this is tried again", self._uri)
            return False

    def _send_all(self) -> bool:
        """Send all whole lines of all files; return whether that succeeded. A run that fails holds up no other."""
        from mlflow.exceptions import MlflowException

        is_done = True
        try:
            self._make_owed_calls()
        except (DabError, OSError) as error:  # metrics go on: the store of the server's files alone may be away
            self._warn_away(error)
            is_done = False
        for tail in list(self._tails):
            try:
                while not tail.is_refused and (lines := tail.lines(_MAX_LINES_PER_CALL)):
                    self._send(tail, lines)
                if tail.is_whole:
                    self._tails.remove(tail)
            except ConnectionError as error:
                self._warn_away(error)
                return False
            except (MlflowException, OSError) as error:
                if isinstance(error, OSError) or not is_refusal(error):
                    self._warn_away(error)
                    is_done = False
                    continue
                tail.is_refused = True
                _log.warning("MLflow takes no metrics of run %s (%s); they stay in %s", tail.run_id, error, tail.path)
        return is_done

    def _make_owed_calls(self) -> None:
        while self._owed:
            try:
                self._owed[0]()
            except InvalidInputError as error:
                _log.warning("%s (not tried again)", error)
            except (DabError, OSError):
                raise
            except Exception:  # noqa: BLE001 - a bug in one call must not hold up the others
                _log.exception("a call to %s failed; it is not tried again", self._uri)
            self._owed.popleft()

    def _send(self, tail: _Tail, lines: list[bytes]) -> None:
        last_steps = dict(tail.last_steps)
        metrics = [metric for line in lines for metric in _new_metrics(line, last_steps, tail.path)]
        if not is_reachable(self._uri, timeout_s=_REACH_TIMEOUT_S):
            raise ConnectionError("no answer")
        client = unchecked_client(self._uri)
        for begin in range(0, len(metrics), _MAX_METRICS_PER_CALL):
            client.log_batch(tail.run_id, metrics=metrics[begin : begin + _MAX_METRICS_PER_CALL])
        tail.commit(tail.offset + sum(map(len, lines)), last_steps)
        if self._is_away:
            _log.warning("MLflow at %s answers again; metrics are sent", self._uri)
            self._is_away = False

    def _warn_away(self, error: Exception) -> None:
        if not self._is_away:
            _log.warning("MLflow at %s is away (%s); metrics are kept on disk and sent later", self._uri, error)
            self._is_away = True


def has_unsent(path: Path, run_id: str) -> bool:
    """Return whether a metrics file holds lines that no follower has sent."""
    tail = _Tail(path, run_id)
    try:
        tail.restore()
        return bool(tail.lines(1))
    except OSError:
        return False


def _seam(file: BinaryIO, offset: int) -> str:
    """Return the digest of the last bytes before `offset`."""
    begin = max(0, offset - _SEAM_BYTES)
    file.seek(begin)
    return hashlib.sha256(file.read(offset - begin)).hexdigest()[:16]


def _new_metrics(line: bytes, last_steps: dict[str, int], path: Path) -> list["Metric"]:
    """Return what a line adds, and note its step in `last_steps`."""
    from mlflow.entities import Metric

    try:
        report: dict[str, Any] = json.loads(line)
        step, timestamp_ms = int(report["step"]), round(report["wall_time"] * 1000)
        values = {key: float(value) for key, value in report["metrics"].items()}
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        _log.warning("%s: a line is no report of metrics (%s: %s); it is left out", path, type(error).__name__, error)
        return []
    fresh = {key: value for key, value in values.items() if step > last_steps.get(key, step - 1)}
    last_steps.update(dict.fromkeys(fresh, step))
    return [Metric(key, value, timestamp_ms, step) for key, value in fresh.items()]
