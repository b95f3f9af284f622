"""What ended an attempt or a driver, as it is told and decided about; without a cluster."""

import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
from program import ROOT
from ray.train.v2.api.exceptions import WorkerGroupError

from dabnn.errors import PassingError
from dabnn.observer import LeavingError
from dabnn.run_folder import RunFolder
from dabnn.watch import HangError
from jobs import sweep
from jobs.failures import Judge
from jobs.launch import train_here
from jobs.supervise import _lost
from jobs.trials import trial_folder
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
def test_what_another_try_may_not_meet_is_left_to_tune(
    error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(config: Config, folder: RunFolder) -> None:
        raise error

    monkeypatch.setattr(sweep, "_train_trial", fail)
    monkeypatch.setattr(sweep.tune, "get_context", lambda: SimpleNamespace(get_trial_id=lambda: "a"))
    job = Job("sweep", "7f3a", "sweep", str(tmp_path), "", "dab", 1, to_dict(CONFIG))
    with pytest.raises(type(error)):
        sweep._run_trial({}, job)
    assert trial_folder(job, "a").result() == {}
