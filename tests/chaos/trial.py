"""One run in the lab: submitted, watched from outside, hit by a fault, and looked at when it is over."""

import contextlib
import json
import os
import sqlite3
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil
from lab import ROOT, Lab, is_alive, wait_until

from dabnn.checkpoints import list_checkpoints
from dabnn.run_folder import RunFolder

CONFIG = ROOT / "examples" / "digits.yaml"
WORKER, CONTROLLER = "ray::RayTrainWorker", "ray::TrainController"
# Ray starts it with the first training job and keeps it as long as the cluster: it belongs to no run.
SHARED = "ray::_AutoscalingCoordinatorActor"
DRIVER, SUPERVISOR = "-m jobs.train", "-m jobs.supervise"
_TIMES = ("epoch_s", "images_per_s")  # what no two runs share
_LIMIT_S = 400.0
_REPORTS_S = 3.0
_CALM = ("submitted", "resumed")


@dataclass(frozen=True)
class Outcome:
    """One row of the table.

    Attributes:
        fault: What was done.
        detected_after_s: Until the program had noticed, as its record of events says; None where it noted nothing.
        recovered_after_s: The longest time without a step from then on; 0 where training never paused.
        steps_lost: Steps that were taken and had to be taken again.
        attempts: Starts of the training loop.
        remark: What else there is to know.
    """

    fault: str
    detected_after_s: float | None
    recovered_after_s: float
    steps_lost: int
    attempts: int
    remark: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Return it as plain values."""
        return asdict(self)


@dataclass(frozen=True)
class Trial:
    """A run in a lab.

    Attributes:
        lab: Where it runs.
        run_id: Its id.
        folder: Its folder.
    """

    lab: Lab
    run_id: str
    folder: RunFolder

    @property
    def working(self) -> RunFolder:
        """Where rank 0 works: the run's folder, or, where that lies behind a URL, one on the disk of its machine."""
        place = Path("disks", "*", "home", "storage-cache", f"{self.run_id}-*", "work", "progress.json")
        found = self.lab.network.base.glob(str(place))
        newest = max(found, key=lambda path: path.stat().st_mtime, default=None)
        return self.folder if newest is None else RunFolder(newest.parent)

    @property
    def step(self) -> int:
        """The newest step that is known of, at most a second old while it trains."""
        return int(self.working.progress().get("step", 0))

    @property
    def attempts(self) -> int:
        """Starts of the training loop."""
        return len(self.working.attempts())

    def is_over(self) -> bool:
        """Whether the loop has left a result."""
        return bool(self.folder.result())

    def wait_for_step(self, step: int, timeout_s: float = _LIMIT_S) -> None:
        """Wait until the run has taken `step` steps."""
        wait_until(lambda: self.step >= step or self.is_over(), timeout_s, what=f"step {step}")
        assert not self.is_over(), f"ended before step {step}: {self.folder.result().get('message')}"

    def events(self) -> list[dict[str, Any]]:
        """Return what was noticed about the run."""
        file = self.folder.root / "events.jsonl"
        return [json.loads(line) for line in file.read_text().splitlines() if line] if file.exists() else []

    def workers(self, *names: str) -> list[psutil.Process]:
        """Return its workers, on the named machines or on all."""
        return self._own(WORKER, *names)

    def one(self, title: str) -> psutil.Process:
        """Return its only process with this title."""
        (found,) = [each for each in self._own(title) if not each.cmdline()[0].endswith("sh")]
        return found

    def processes(self) -> list[psutil.Process]:
        """Return all processes of its jobs."""
        return self._own("")

    def _own(self, title: str, *names: str) -> list[psutil.Process]:
        found = []
        for process in self.lab.find(title, *names):
            with contextlib.suppress(psutil.Error):
                is_own = self.run_id in process.environ().get("DAB_JOB", "")
                if is_own and not " ".join(process.cmdline()).startswith(SHARED):
                    found.append(process)
        return found

    def status(self) -> dict[str, Any]:
        """Return what `dab status` says."""
        done = self.lab.dab("status", self.run_id)
        assert done.returncode == 0, done.stderr
        return dict(json.loads(done.stdout))

    def finish(self, timeout_s: float = _LIMIT_S) -> dict[str, Any]:
        """Wait for the end of the run and of its job, and return the status, which must be that it has finished."""
        wait_until(self.is_over, timeout_s, what="the end of the run")
        result = self.folder.result()
        assert result["status"] == "finished", result["message"]
        status: dict[str, Any] = wait_until(
            lambda: (seen := self.status())["status"] not in ("queued", "running") and seen,
            90,
            1.0,
            what="its end seen",
        )
        assert status["status"] == "finished", status["message"]
        return status

    def lose_and_resume(self, act: Callable[[], object]) -> float:
        """Do something after which only a person can help; continue with `dab resume` once `dab status` says failed.

        Returns:
            When it did.
        """
        act()
        wait_until(lambda: self.status()["status"] == "failed", 120, 1.0, what="its loss seen by dab status")
        seen_at = time.time()
        self.resume()
        return seen_at

    def resume(self) -> None:
        """Continue it with `dab resume`."""
        done = self.lab.dab("resume", self.run_id, "--detach")
        assert done.returncode == 0, done.stderr


def submit(lab: Lab, name: str, data: Path, *changes: str, storage: Path | None = None) -> Trial:
    """Send a run of a small network on the digits to the lab and return it, queued.

    Args:
        lab: Where.
        name: Name of the run.
        data: The digits.
        changes: Other settings than the usual.
        storage: Where its folder is seen from outside, if it is not the usual place.
    """
    values = [f"name={name}", f"data.train={data}", *SETTINGS, *changes]
    options = [part for value in values for part in ("--set", value)]
    done = lab.dab("submit", CONFIG, *options, "--detach", "--address", "lab")
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    return Trial(lab, answer["run_id"], RunFolder((storage or lab.shared / "runs") / answer["run_id"]))


# Epochs of 12 steps, each about half a second on two idle cores, and checkpoints in mid-epoch.
EPOCHS = 10
SETTINGS = (
    "data.batch_size=128", "model.width=0.0625", f"train.epochs={EPOCHS}", "train.checkpoint.every_steps=5",
    "cluster.placement=spread", "cluster.max_failures=3",
)  # fmt: skip


def plain_run(lab: Lab, data: Path, name: str, *changes: str) -> RunFolder:
    """Train without Ray and without a cluster, two processes on the desk."""
    from orchestrator.config import load_config
    from orchestrator.resolve import resolve, train_spec

    values = [f"data.train={data}", *SETTINGS, *changes]
    spec = lab.shared / f"{name}.json"
    spec.write_text(json.dumps(train_spec(resolve(load_config(CONFIG, values), str)).to_dict()))
    folder = RunFolder(lab.shared / name)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    env = lab.env() | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)}
    lab.machines["desk"].run([*command, "-m", "dabnn.train", str(spec), str(folder.root)], env=env, timeout_s=300)
    assert folder.result()["status"] == "finished"
    return folder


def measure(
    trial: Trial, fault: str, act: Callable[[], float | None], *, restarts: bool | None = True, remark: str = ""
) -> Outcome:
    """Do something to a run, wait until it trains again after that, and return what it cost.

    Args:
        trial: The run.
        fault: What is done, in words.
        act: Does it; may return when the program had noticed, for what leaves no event.
        restarts: Whether this must end the attempt, must not, or may (None).
        remark: What else there is to know.
    """
    watch = _Watch(trial)
    with ThreadPoolExecutor(1) as pool:
        doing = pool.submit(act)
        watch.until(doing.done)
        noticed = doing.result()
    done_at = time.time()
    watch.until(lambda: watch.trained_at > done_at and not (restarts and trial.attempts == watch.number))
    if restarts is not None:
        assert (trial.attempts > watch.number) == restarts, f"attempt {trial.attempts} after {watch.number}"
    told = [event["time"] for event in trial.events() if event["time"] >= watch.begun and event["what"] not in _CALM]
    times = [*told, *([] if noticed is None else [noticed])]
    detected = min(times) - watch.begun if times else None
    return Outcome(fault, detected, watch.pause_s, watch.steps_lost, trial.attempts, remark)


class _Watch:
    """What is seen of a run from the moment of a fault on.

    Attributes:
        number: Attempts at that moment.
        begun: That moment.
        trained_at: When the newest step that is known of was told.
    """

    def __init__(self, trial: Trial) -> None:
        self.trial, self.number, self.begun = trial, trial.attempts, time.time()
        self.trained_at = 0.0
        self._pause_s = 0.0
        self._reached = {self.number: trial.step}

    def until(self, condition: Callable[[], bool]) -> None:
        """Look at the run ten times a second until a condition holds."""
        deadline = time.time() + _LIMIT_S
        while not condition():
            self._look()
            over = self.trial.folder.result()
            assert not over or over["status"] != "failed", f"failed: {over['message']}"
            assert time.time() < deadline, f"training has not gone on within {_LIMIT_S:.0f} s"
            if over:
                return
            time.sleep(0.1)

    def _look(self) -> None:
        number, progress = self.trial.attempts, self.trial.working.progress()
        if not progress:
            return
        began_at = self.trial.working.attempts()[-1]["time"]
        if progress["time"] > began_at:
            self._reached[number] = max(self._reached.get(number, 0), progress["step"])
            self.trained_at = progress["time"]
        since = max(self.begun, self.trained_at)
        self._pause_s = max(self._pause_s, time.time() - since)

    @property
    def pause_s(self) -> float:
        """The longest time without a step; 0 where there was none longer than two reports of progress."""
        return self._pause_s if self._pause_s > _REPORTS_S else 0.0

    @property
    def steps_lost(self) -> int:
        """Steps that had to be taken again in all attempts since."""
        starts = {each["attempt"]: each["start_step"] for each in self.trial.working.attempts()}
        return sum(max(0, step - starts[number + 1]) for number, step in self._reached.items() if number + 1 in starts)


def comparable(lines: list[dict[str, Any]]) -> dict[int, dict[str, float]]:
    """Return the metrics of each epoch that runs of one configuration share, the order of the samples included."""
    return {
        line["step"]: {key: value for key, value in line["metrics"].items() if key not in _TIMES} for line in lines
    }  # fmt: skip


def problems(trial: Trial, undisturbed: RunFolder) -> list[str]:
    """Return in which ways a run that is over differs from one that nothing happened to, and what it left behind."""
    found = []
    if trial.folder.result()["weights_sha256"] != undisturbed.result()["weights_sha256"]:
        found.append("other final weights")
    expected = comparable(undisturbed.metrics())
    if comparable(trial.folder.metrics()) != expected:
        found.append(f"other metrics in its folder: {_difference(comparable(trial.folder.metrics()), expected)}")
    found += [f"tracker: {each}" for each in _tracker_problems(trial, expected)]
    found += left_behind(trial)
    return found


def order_problems(trial: Trial, undisturbed: RunFolder) -> list[str]:
    """Return what `problems` finds, for a run on a changing number of workers: weights differ, samples may not."""

    def orders(folder: RunFolder) -> dict[int, dict[str, float]]:
        return {line["step"]: {"sample_order": line["metrics"]["sample_order"]} for line in folder.metrics()}

    found = [] if orders(trial.folder) == orders(undisturbed) else ["other samples, or in another order"]
    found += [f"tracker: {each}" for each in _tracker_problems(trial, orders(undisturbed))]
    return found + left_behind(trial)


def _difference(own: dict[int, dict[str, float]], other: dict[int, dict[str, float]]) -> str:
    if own.keys() != other.keys():
        return f"epochs {sorted(own.keys() ^ other.keys())}"
    told = []
    for epoch, values in own.items():
        keys = sorted(key for key in values.keys() | other[epoch].keys() if values.get(key) != other[epoch].get(key))
        told += [f"epoch {epoch}: {', '.join(keys[:4])}"] if keys else []
    return "; ".join(told[:4])


def _tracker_problems(trial: Trial, expected: dict[int, dict[str, float]]) -> list[str]:
    rows = tracked(trial)
    found = []
    seen = [(key, step) for key, step, _ in rows]
    doubled = sorted({place for place in seen if seen.count(place) > 1})
    if doubled:
        found.append(f"{len(doubled)} points doubled, such as {doubled[0]}")
    points = {(key, step): value for key, step, value in rows if key not in _TIMES}
    wanted = {(key, step): value for step, values in expected.items() for key, value in values.items()}
    if missing := sorted(wanted.keys() - points.keys()):
        found.append(f"{len(missing)} points missing, such as {missing[0]}")
    if wrong := sorted(place for place in wanted.keys() & points.keys() if wanted[place] != points[place]):
        found.append(f"{len(wrong)} points with another value, such as {wrong[0]}")
    times = [(key, step) for key in _TIMES for step in expected]
    if lacking := [place for place in times if place not in set(seen)]:
        found.append(f"{len(lacking)} points missing, such as {lacking[0]}")
    return found


def tracked(trial: Trial) -> list[tuple[str, int, float]]:
    """Return every point of the run in the tracker's database: metric, step, value."""
    with contextlib.closing(sqlite3.connect(f"file:{trial.lab.database}?mode=ro", uri=True)) as database:
        rows = database.execute("select key, step, value from metrics where run_uuid = ?", (trial.run_id,)).fetchall()
    return [(key, int(step), float(value)) for key, step, value in rows if not key.startswith("system/")]


def left_behind(trial: Trial) -> list[str]:
    """Return what a run that is over has left where nothing should be, after giving it time to go away."""
    found: list[str] = []
    with contextlib.suppress(AssertionError):
        wait_until(lambda: not [each for each in trial.processes() if is_alive(each)], 60, 0.5)
    found += [f"process {' '.join(each.cmdline())[:80]}" for each in trial.processes() if is_alive(each)]
    found += [f"placement group {group['placement_group_id']}" for group in trial.lab.placement_groups()]
    kept = list_checkpoints(trial.folder.checkpoints)
    wanted = {each.name for each in kept} | {each.commit.name for each in kept}
    here = {path.name for path in trial.folder.checkpoints.glob("*")}
    found += [f"file {name}" for name in sorted(here - wanted)]
    return found
