"""What a sweep records of its trials, also of one that cannot be; with a real tracker and without a cluster."""

import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from gate import gate

from dabnn.errors import DabError, InvalidInputError
from dabnn.run_folder import RunFolder
from dabnn.run_store import StoreError
from jobs.ledger import Ledger, trial_folder
from jobs.record import record_end
from jobs.sweep_end import conclude
from jobs.train import printing_progress
from jobs.trials import TrialRecorder
from orchestrator import tracking
from orchestrator.config import load_config, to_dict, with_overrides
from orchestrator.job import Job
from orchestrator.mlflow_client import connected

SWEEP = [
    "name=sweep", "model.name=bincifar", "model.num_classes=10", "data.train=shards", "train.epochs=4",
    "search.space.schedule.warmup_epochs={float: [0, 2]}",
]  # fmt: skip


@pytest.fixture(scope="module")
def uri() -> Iterator[str]:
    with tempfile.TemporaryDirectory(prefix="dab-") as folder, pytest.MonkeyPatch.context() as patch:
        patch.setenv("DAB_HOME", folder)
        yield tracking.ensure_tracking()
        tracking.tracking_down()


@pytest.fixture
def job(uri: str, tmp_path: Path) -> Job:
    config = load_config(None, SWEEP)
    run_id = tracking.create_run(uri, "dab", "sweep", params={}, tags={})
    return Job("sweep", run_id, "sweep", str(tmp_path), uri, "dab", 1, to_dict(config))


class Sweep:
    """A sweep as its driver has it: the book, and what tells MLflow."""

    def __init__(self, job: Job) -> None:
        config = job.parsed_config()
        assert config.search is not None
        job.save()
        self.job, self.search = job, config.search
        self.ledger = Ledger(job, config, config.search, lambda _: None)
        self.recorder = TrialRecorder(job, config.search, self.ledger)

    def start(self) -> tuple[int, RunFolder]:
        point = self.ledger.next()
        assert point is not None
        self.recorder.started(point.number, point.values)
        return point.number, trial_folder(self.job, point.number)

    def end(self, number: int, error: str = "") -> None:
        self.recorder.ended(number, self.ledger.ended(number, error))

    def run(self, *scores: float) -> None:
        """Start trials that reach these scores, and let all of them end."""
        begun = [self.start() for _ in scores]
        for (number, folder), score in zip(begun, scores, strict=True):
            folder.append_metrics(1, {"val_top1": score})
            folder.write_result({"status": "finished", "message": "", "weights_sha256": f"{number:064x}"})
            self.end(number)

    def close(self) -> dict[str, Any]:
        self.recorder.close()
        return conclude(self.job, self.search, self.ledger.study, self.ledger.run_of)


def runs_of(job: Job, uri: str) -> dict[str, tracking.RunRecord]:
    return {run.name: run for run in tracking.find_runs(uri, parent=job.run_id)}


def test_a_trial_leaves_its_configuration_as_a_file(job: Job) -> None:
    sweep = Sweep(job)
    number, folder = sweep.start()
    sweep.recorder.close()
    config = load_config(folder.root / "config.yaml")
    values = sweep.ledger.study.trials()[number].values
    assert (config.schedule.warmup_epochs, config.train.epochs, config.search) == (
        values["schedule.warmup_epochs"], 4, None,
    )  # fmt: skip


def test_trials_that_begin_and_end_while_the_tracker_is_away_are_recorded_when_it_is_back(job: Job) -> None:
    uri = job.tracking_uri
    with gate(uri) as door:
        door.is_open = False
        sweep = Sweep(replace(job, tracking_uri=door.uri))
        sweep.run(50.0, 70.0, 60.0)
        door.is_open = True
        sweep.recorder.close()
        result = sweep.close()
    runs = runs_of(job, uri)
    assert {name: (run.status, run.metrics["val_top1"]) for name, run in runs.items()} == {
        "sweep-t01": ("finished", 50.0), "sweep-t02": ("finished", 70.0), "sweep-t03": ("finished", 60.0),
    }  # fmt: skip
    assert {"packed_bytes", "bit_ops"} < set(runs["sweep-t01"].metrics)
    assert runs["sweep-t03"].tags["dab.trial"] == "2"
    assert (result["status"], result["best"]) == ("finished", runs["sweep-t02"].run_id)
    assert Job.load(trial_folder(job, 1).root).run_id == runs["sweep-t02"].run_id
    parent = tracking.find_run(uri, job.run_id)
    assert (parent.metrics["val_top1"], parent.tags["dab.best_run"]) == (70.0, runs["sweep-t02"].run_id)


def test_a_sweep_leaves_its_result_in_words_and_a_report_with_its_run(job: Job) -> None:
    sweep = Sweep(job)
    sweep.run(50.0, 70.0)
    sweep.close()
    parent = tracking.find_run(job.tracking_uri, job.run_id)
    assert parent.tags["mlflow.note.content"].startswith("The best of 2 finished trials is sweep-t02: ")
    with connected(job.tracking_uri) as client:
        names = [item.path for item in client.list_artifacts(job.run_id, "report")]
    assert [name for name in names if name.endswith(".html")]


def test_what_a_killed_driver_did_not_tell_is_told_by_the_next_one(job: Job) -> None:
    first = Sweep(replace(job, tracking_uri="http://127.0.0.1:9"))  # it never got to tell MLflow anything
    first.run(50.0)
    second = Sweep(job)
    second.recorder.catch_up(second.ledger.study.trials())
    second.run(60.0)
    second.recorder.close()
    runs = runs_of(job, job.tracking_uri)
    assert {name: (run.status, run.metrics["val_top1"]) for name, run in runs.items()} == {
        "sweep-t01": ("finished", 50.0), "sweep-t02": ("finished", 60.0),
    }  # fmt: skip
    third = Sweep(job)
    third.recorder.catch_up(third.ledger.study.trials())
    third.recorder.close()
    assert runs_of(job, job.tracking_uri) == runs


def test_a_tracker_that_stays_away_changes_neither_pace_nor_result_of_a_sweep(
    job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("jobs.trials.FLUSH_TIMEOUT_S", 0.5)
    sweep = Sweep(replace(job, tracking_uri="http://127.0.0.1:9"))
    asked = threading.current_thread()
    monkeypatch.setattr(tracking, "create_run", lambda *_, **__: away(threading.current_thread() is not asked))
    sweep.run(50.0, 70.0)
    result = sweep.close()
    assert (result["status"], result["message"]) == ("finished", "best trial sweep-t02")
    assert (result["metrics"]["val_top1"], result["best"]) == (70.0, None)


def test_a_sweep_whose_trials_all_fail_ends_with_the_first_error(job: Job) -> None:
    sweep = Sweep(job)
    for message in ("loss is not finite", "another"):
        number, folder = sweep.start()
        folder.write_result({"status": "failed", "message": message})
        sweep.end(number)
    result = sweep.close()
    assert result["status"] == "failed"
    assert result["message"] == "every trial failed; the first, sweep-t01: loss is not finite."


def test_a_sweep_without_a_trial_that_keeps_the_limits_names_the_closest(job: Job) -> None:
    config = with_overrides(job.parsed_config(), {"search.constraints": ["val_top1 >= 90"]})
    sweep = Sweep(replace(job, config=to_dict(config)))
    sweep.run(50.0, 70.0)
    result = sweep.close()
    assert result["status"] == "failed"
    assert result["message"] == "no trial keeps val_top1 >= 90; the closest, sweep-t02, has val_top1 70."


def away(is_another_thread: bool) -> None:
    assert is_another_thread
    raise DabError("away")


def test_an_end_that_the_tracker_heard_in_part_is_left_open_for_dab_status(
    job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tracking, "log_json", lambda *_: away(True))
    record_end(job, {"status": "finished", "message": "done"})
    assert tracking.find_run(job.tracking_uri, job.run_id).status == "queued"
    monkeypatch.undo()
    record_end(job, {"status": "finished", "message": "done"})
    record = tracking.find_run(job.tracking_uri, job.run_id)
    assert (record.status, record.tags["dab.message"]) == ("finished", "done")


def test_progress_is_printed_on_after_a_store_has_refused(capsys: pytest.CaptureFixture[str]) -> None:
    line = {"step": 1, "metrics": dict.fromkeys(("train_loss", "val_loss", "val_top1", "images_per_s"), 1.0)}
    answers: list[list[dict[str, Any]] | None] = [None, [], None, [line]]

    def metrics() -> list[dict[str, Any]]:
        found = answers.pop(0) if len(answers) > 1 else answers[0]
        if found is None:
            raise StoreError("refused")
        return found

    folder: Any = SimpleNamespace(metrics=metrics, progress=dict)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("jobs.train.PROGRESS_POLL_S", 0.01)
        with printing_progress(folder):
            time.sleep(0.5)
    assert capsys.readouterr().out.count("epoch 1: train loss") == 1


def test_a_point_that_cannot_be_fails_its_trial_and_not_the_sweep(job: Job) -> None:
    sweep = Sweep(job)
    assert sweep.ledger.next() is not None
    sweep.recorder.started(0, {"schedule.warmup_epochs": 9.0})  # as a point of an older version might be
    folder = trial_folder(job, 0)
    folder.write_result({"status": "failed", "message": "schedule.warmup_epochs: 9.0 is all of"})
    sweep.end(0)
    sweep.recorder.close()
    (run,) = tracking.find_runs(job.tracking_uri, parent=job.run_id)
    assert (run.status, run.params["schedule.warmup_epochs"]) == ("failed", "9.0")
    assert run.tags["dab.message"].startswith("schedule.warmup_epochs: 9.0")
    with pytest.raises(InvalidInputError, match="no run was submitted"):
        Job.load(folder.root)


def test_a_trial_whose_description_cannot_be_written_does_not_end_the_sweep(job: Job) -> None:
    sweep = Sweep(job)
    (trial_folder(job, 0).root / "job.json").mkdir(parents=True)
    sweep.start()
    sweep.recorder.close()
    (run,) = tracking.find_runs(job.tracking_uri, parent=job.run_id)
    assert run.name == "sweep-t01"
