"""The book of a sweep: which trial comes next, and how each one ended.

The study remembers points and ends, the folders of the trials hold what they did; here they are kept in step. A driver
that was killed at any moment is followed by one that reads the same book: a trial that ended counts once, one that did
not goes on under its number.

    study.jsonl        the points and what came of them, see `orchestrator.study`
    trials/0007/       a run folder a trial
        trial.json     number, name, values, run_id, and what is known of its network
        latency.json   what the trial measured before it trained, where that was asked for
    spent.json         seconds that the sweep took so far
"""

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

from dabnn.run_folder import RunFolder, headline
from jobs.early_stop import Epoch
from jobs.preflight import wait_for_store
from jobs.record import leave_result
from orchestrator.config import Config
from orchestrator.config_search import OF_NETWORK, Search
from orchestrator.job import Job
from orchestrator.search import network_metrics
from orchestrator.start_points import start_points
from orchestrator.study import FILE, Point, Study

TRIAL_FILE, LATENCY_FILE = "trial.json", "latency.json"
STOPPED_EARLY = "stopped early"
_SPENT_FILE = "spent.json"


def trial_folder(job: Job, number: int) -> RunFolder:
    """Return the folder of a trial, under the sweep's."""
    return job.run_folder.child(f"trials/{number:04d}")


def trial_name(job: Job, number: int) -> str:
    """Return how people name a trial."""
    return f"{job.name}-t{number + 1:02d}"


class Ledger:
    """The book of one sweep, held by its driver alone.

    Args:
        job: The sweep.
        config: Its configuration.
        search: The search in it.
        say: Told what a person should know.

    Raises:
        InvalidInputError: The book is of another space, algorithm, seed or other objectives; says what changed.
        DabError: No point of the space meets the constraints on the network, or the storage does not answer.
    """

    def __init__(self, job: Job, config: Config, search: Search, say: Callable[[str], None]) -> None:
        self._job, self._config, self._search, self._say = job, config, search, say
        self._folder = job.run_folder.fresh()
        self._begun, self._starts = time.monotonic(), dict[int, float]()
        self._lock = threading.Lock()  # the thread that talks to MLflow takes down runs
        self._spent = self._folder.load_json(_SPENT_FILE) or {"seconds": 0.0, "gpu_seconds": 0.0}
        self.study = self._open()
        self._waiting = deque(self._unfinished())
        if not self._waiting and (first := self._asked()) is not None:
            self._waiting.append(first)

    def next(self) -> Point | None:
        """Return the next trial, its folder made; None when no further one is to start."""
        if self._folder.is_stop_requested():
            return None
        if over := self._over_budget():
            self._say(over)
            return None
        point = self._waiting.popleft() if self._waiting else self._asked()
        if point is None:
            return None
        self._describe(point.number, point.values, self.study.trials()[point.number].metrics)
        self._starts[point.number] = time.monotonic()
        return point

    def ended(self, number: int, error: str = "") -> dict[str, Any]:
        """Take down how a trial ended, and return it as its folder has it.

        Args:
            number: The trial.
            error: Why it failed, where it could not say so itself.
        """
        folder = trial_folder(self._job, number)
        wait_for_store(folder, self._config.train.checkpoint.retry_s, self._say)
        left = folder.fresh().result()
        if error and left.get("status") not in ("finished", "failed"):
            left = {"status": "failed", "message": error}
            leave_result(folder, left)
        elif not left:
            left = {"status": "finished", "message": STOPPED_EARLY}
            leave_result(folder, left)
        self._tell(number, folder, left)
        self._spend(number)
        return left

    def history(self) -> Iterator[Epoch]:
        """Yield what trials that have ended recorded, while this driver or another one ran."""
        for trial in self.study.trials():
            if trial.state != "running":
                for line in trial_folder(self._job, trial.number).metrics():
                    yield Epoch(line["wall_time"], trial.number, line["step"], line["metrics"])

    def name_run(self, number: int, run_id: str) -> None:
        """Take down which MLflow run a trial has."""
        folder = trial_folder(self._job, number)
        with self._lock:
            folder.leave_json(TRIAL_FILE, folder.load_json(TRIAL_FILE) | {"run_id": run_id})

    def run_of(self, number: int) -> str | None:
        """Return which MLflow run a trial has, if it has one."""
        return trial_folder(self._job, number).load_json(TRIAL_FILE).get("run_id")

    def static_of(self, number: int) -> dict[str, float]:
        """Return what is known of a trial's network: packed_bytes, bit_ops, latency_ms where it was measured."""
        return dict(trial_folder(self._job, number).load_json(TRIAL_FILE).get("static", {}))

    def _open(self) -> Study:
        path = self._folder.root / FILE
        if self._folder.copy is not None:  # the copy of a store's files is replaced by what the store has
            path = Path(mkdtemp(prefix="dab-study-")) / FILE
            path.write_text(self._folder.load_text(FILE) or "")
        self._path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        start: list[dict[str, Any]] = []
        if self._search.start_from and not (path.is_file() and path.stat().st_size):
            start = start_points(RunFolder.of(self._search.start_from), self._search)
        static = partial(network_metrics, self._config)
        study = Study.open(path, self._search, self._config.seed, start=start, static=static)
        self._keep()
        return study

    def _keep(self) -> None:
        if self._folder.copy is not None:
            self._folder.leave(FILE, self._path.read_text())

    def _asked(self) -> Point | None:
        point = self.study.ask()
        if point is not None:
            self._keep()
        return point

    def _unfinished(self) -> Iterator[Point]:
        """Yield the points whose trials go on; those that ended before it was taken down are taken down."""
        for point in self.study.again():
            folder = trial_folder(self._job, point.number).fresh()
            folder.clear_stop()
            left = folder.result()
            if left.get("status") in ("finished", "failed"):
                self._tell(point.number, folder, left)
                continue
            folder.forget_result()
            yield point

    def _tell(self, number: int, folder: RunFolder, left: dict[str, Any]) -> None:
        if left["status"] == "failed":
            self.study.tell(number, None, reason=left.get("message", ""))
        elif left["status"] == "finished":
            lines, latency = folder.metrics(), folder.load_json(LATENCY_FILE)
            if latency:
                self._describe(number, folder.load_json(TRIAL_FILE)["values"], latency)
            told = headline(lines[-1]["metrics"]) | self._objectives(lines[-1]["metrics"]) if lines else {}
            epoch = {"epoch": float(lines[-1]["step"])} if lines else {}
            measured = {key: float(value) for key, value in latency.items() if key == "latency_ms"}
            is_pruned = left.get("message") == STOPPED_EARLY
            self.study.tell(number, told | epoch | measured, is_pruned=is_pruned)
        self._keep()

    def _objectives(self, metrics: dict[str, float]) -> dict[str, float]:
        names = [each.metric for each in self._search.objectives] + [each.metric for each in self._search.limits]
        return {name: metrics[name] for name in names if name in metrics}

    def _describe(self, number: int, values: dict[str, Any], more: dict[str, Any]) -> None:
        folder = trial_folder(self._job, number)
        known = {key: more[key] for key in OF_NETWORK if key in more}
        told = {"number": number, "name": trial_name(self._job, number), "values": values, "run_id": None}
        with self._lock:
            before = folder.load_json(TRIAL_FILE)
            folder.leave_json(TRIAL_FILE, told | before | {"static": before.get("static", {}) | known})

    def _over_budget(self) -> str:
        """Return which budget is used up, in words, or an empty text."""
        minutes, hours = self._search.max_minutes, self._search.max_gpu_hours
        seconds = self._spent["seconds"] + time.monotonic() - self._begun
        if minutes is not None and seconds >= 60 * minutes:
            return f"search.max_minutes: {minutes:g} are over; no further trial starts"
        if hours is not None and self._spent["gpu_seconds"] >= 3600 * hours:
            return f"search.max_gpu_hours: {hours:g} are used; no further trial starts"
        return ""

    def _spend(self, number: int) -> None:
        now, cluster = time.monotonic(), self._config.cluster
        took_s = now - self._starts.pop(number, now)
        self._spent["seconds"] += now - self._begun
        self._spent["gpu_seconds"] += took_s * cluster.gpus_per_worker * cluster.num_processes
        self._begun = now
        self._folder.leave_json(_SPENT_FILE, self._spent)
        count = sum(trial.state != "running" for trial in self.study.trials())
        self._folder.write_progress({"step": count, "num_trials": self._search.num_trials})
