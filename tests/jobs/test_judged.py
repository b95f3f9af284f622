"""What ended an attempt or a driver, as it is told and decided about; without a cluster."""

import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from program import ROOT
from ray.exceptions import RaySystemError
from ray.train.v2._internal.exceptions import WorkerGroupStartupFailedError
from ray.train.v2.api.exceptions import ControllerError, WorkerGroupError

from dabnn.errors import DabError, PassingError
from dabnn.observer import LeavingError
from dabnn.run_folder import RunFolder
from dabnn.watch import HangError
from jobs import failures, launch, sweep
from jobs.failures import Judge
from jobs.group import Group
from jobs.launch import train_here
from jobs.ledger import trial_folder
from jobs.nodes import Seen
from jobs.preflight import Findings
from jobs.supervise import _lost
from orchestrator.capacity import Node
from orchestrator.config import Config, load_config, to_dict
from orchestrator.failure import PASSING, Action, Kind, Limits, decide
from orchestrator.job import Job
from orchestrator.resolve import resolve, train_spec

EXAMPLE = ROOT / "examples" / "digits.yaml"
CONFIG = load_config(None, ["name=judged", "model.name=bincifar", "data.train=shards"])


def test_what_another_attempt_need_not_meet_is_tried_again(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    judge = Judge(folder, CONFIG, lambda _: None)
    failure, decision = judge.judge(WorkerGroupError("", {1: PassingError("a loader process was killed")}))
    assert (failure.kind, failure.why) == (Kind.ERROR, "rank 1: PassingError: a loader process was killed")
    assert decision.action is Action.RETRY
    alone = _lost(folder, PASSING, is_memory_short=False)
    assert decide(alone, [], Limits(max_failures=1)).action is Action.RETRY
    assert alone.why == "training was interrupted; its log says by what"


class Blocked:
    """Hangs when an epoch is finished."""

    def __init__(self) -> None:
        self.gate = threading.Event()

    def epoch_finished(self, epoch: int, metrics: dict[str, float]) -> None:
        self.gate.wait(60)
        raise LeavingError("the test is over")


def test_a_trial_that_trains_in_its_own_process_is_watched_for_hangs(digits: Path, tmp_path: Path) -> None:
    values = [f"data.train={digits}", "data.batch_size=96", "model.width=0.0625", "train.epochs=2", "cluster.hang_s=1"]
    config = resolve(load_config(EXAMPLE, values), lambda name: name)
    blocked = Blocked()
    with pytest.raises(HangError, match="took no step"):
        train_here(train_spec(config), RunFolder(tmp_path), config.cluster, blocked)
    blocked.gate.set()
    for thread in threading.enumerate():
        if thread.name == "training":
            thread.join(60)


@pytest.mark.parametrize("error", [HangError("no step"), PassingError("a loader was killed")])
def test_what_another_try_may_not_meet_is_left_to_tune(error: Exception, tmp_path: Path) -> None:
    def fail(config: Config, folder: RunFolder, observer: object) -> None:
        raise error

    job = Job("sweep", "7f3a", "sweep", str(tmp_path), "", "dab", 1, to_dict(CONFIG))
    folder = trial_folder(job, 0)
    folder.leave_json("trial.json", {"number": 0, "values": {}})
    with pytest.raises(type(error)):
        sweep._run_trial({"number": 0}, job, fail)
    assert folder.result() == {}


@pytest.mark.parametrize(
    ("dead", "kind", "why"),
    [
        (["10.0.0.3"], Kind.NODE_LOST, "the machine 10.0.0.3 is gone, on which a worker started"),
        ([], Kind.WORKER_LOST, "a worker ended while it started"),
    ],
)
def test_a_machine_that_is_lost_while_workers_start_is_named(
    dead: list[str], kind: Kind, why: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(failures, "dead_nodes", lambda _: dead)
    judge = Judge(RunFolder(tmp_path), CONFIG, lambda _: None, ["a"])
    failure = judge.failure_of(ControllerError(WorkerGroupStartupFailedError("at least one")))
    assert (failure.kind, failure.why) == (kind, why)


def test_what_fails_in_the_supervision_is_not_told_as_a_failed_start(tmp_path: Path) -> None:
    judge = Judge(RunFolder(tmp_path), CONFIG, lambda _: None)
    failure = judge.failure_of(ControllerError(RaySystemError("the control plane is away")))
    assert failure.why.startswith("what starts and supervises the workers failed: RaySystemError: ")


def test_only_what_the_kernel_ended_during_an_attempt_is_laid_to_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kills = [3]
    monkeypatch.setattr(failures, "kernel_kills", lambda: kills[0])
    group, workers = Group(str(tmp_path), CONFIG), SimpleNamespace(get_workers=list)
    group.after_worker_group_start(workers)
    kills[0] = 4  # between two starts in place
    group.after_worker_group_start(workers)
    assert group._judge is not None
    assert group._judge._kills == 4


FREE = (Node("a", {"CPU": 1.0}, {}), Node("b", {"CPU": 1.0}, {}))


@pytest.fixture
def attempts(tmp_path: Path, digits: Path) -> launch._Attempts:
    """A run of two workers, of which one has found a place."""
    values = [f"data.train={digits}", "cluster.num_workers=2", "cluster.min_workers=1", "cluster.cpus_per_worker=1"]
    config = resolve(load_config(EXAMPLE, values), lambda name: name)
    return launch._Attempts(train_spec(config), RunFolder(tmp_path), config, "name", "", lambda _: None)


def test_a_run_that_cannot_leave_its_wish_to_grow_leaves_it_later(
    attempts: launch._Attempts, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("_GROW_POLL_S", "_GROW_SETTLE_S", "_GROW_INTERVAL_S"):
        monkeypatch.setattr(launch, name, 0.01)
    asked, answers = threading.Event(), [OSError("away"), RaySystemError("away"), None]

    def look(_: object) -> Seen:
        answer: Any = answers[0]
        if isinstance(answer, RaySystemError):
            answers.pop(0)
            raise answer
        return Seen(FREE, FREE, {})

    def leave(_: RunFolder) -> None:
        assert not asked.is_set()
        answer: Any = answers.pop(0)
        if answer is not None:
            raise answer

    monkeypatch.setattr(launch, "seen", look)
    monkeypatch.setattr(launch, "leave_wish", leave)
    attempts.folder.begin_attempt(0, 1)
    attempts._watch_room(["a"], 0, asked, threading.Event())
    assert asked.is_set()
    assert answers == []


def test_a_sick_node_is_left_out_by_another_driver_too(
    attempts: launch._Attempts, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launch, "look_at", lambda *_: Findings({"b": ["storage: node b"]}, {}))
    nodes = Seen(FREE, FREE, {})
    with pytest.raises(DabError, match="storage: node b"):
        attempts._are_sound(["a", "b"], nodes)
    attempts.folder.begin_attempt(0, 2)
    assert not attempts._are_sound(["a", "b"], nodes)
    assert attempts._shunned() == ["b"]
