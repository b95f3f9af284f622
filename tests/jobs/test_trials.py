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
from dabnn.run_store import StoreError
from jobs.record import record_end
from jobs.train import printing_progress
from jobs.trials import TrialRecorder, trial_folder
from orchestrator import tracking
from orchestrator.config import load_config, to_dict
from orchestrator.job import Job

SWEEP = [
    "name=sweep", "model.name=bincifar", "data.train=shards", "train.epochs=4",
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


def trial(trial_id: str, **point: Any) -> SimpleNamespace:
    """What the recorder looks at of Tune's trials."""
    return SimpleNamespace(trial_id=trial_id, config=point, get_error=lambda: "")


def recorder(job: Job) -> TrialRecorder:
    search = job.parsed_config().search
    assert search is not None
    return TrialRecorder(job, search)


def test_a_trial_leaves_its_configuration_as_a_file(job: Job) -> None:
    watching = recorder(job)
    watching.on_trial_start(1, [], trial("a", **{"schedule.warmup_epochs": 1.5}))
    watching.close()
    config = load_config(trial_folder(job, "a").root / "config.yaml")
    assert (config.schedule.warmup_epochs, config.train.epochs, config.search) == (1.5, 4, None)


def run_trials(watching: TrialRecorder, job: Job, **scores: float) -> None:
    """Start trials that reach these scores, and let all of them end."""
    for name, score in scores.items():
        watching.on_trial_start(1, [], trial(name, **{"schedule.warmup_epochs": 1.0}))
        trial_folder(job, name).append_metrics(1, {"val_top1": score})
    for name in scores:
        watching.on_trial_complete(2, [], trial(name))


def test_trials_that_begin_and_end_while_the_tracker_is_away_are_recorded_when_it_is_back(job: Job) -> None:
    with gate(job.tracking_uri) as door:
        door.is_open = False
        watching = recorder(replace(job, tracking_uri=door.uri))
        run_trials(watching, job, a=50.0, b=70.0, c=60.0)
        door.is_open = True
        result = watching.close()
    runs = {run.name: run for run in tracking.find_runs(job.tracking_uri, parent=job.run_id)}
    assert {name: (run.status, run.metrics) for name, run in runs.items()} == {
        "sweep-t01": ("finished", {"val_top1": 50.0}),
        "sweep-t02": ("finished", {"val_top1": 70.0}),
        "sweep-t03": ("finished", {"val_top1": 60.0}),
    }
    assert (result["status"], result["best"]) == ("finished", runs["sweep-t02"].run_id)
    assert Job.load(trial_folder(job, "b").root).run_id == runs["sweep-t02"].run_id
    assert tracking.find_run(job.tracking_uri, job.run_id).metrics == {"val_top1": 70.0}


def test_a_tracker_that_stays_away_changes_neither_pace_nor_result_of_a_sweep(
    job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("jobs.trials.FLUSH_TIMEOUT_S", 0.5)
    watching = recorder(replace(job, tracking_uri="http://127.0.0.1:9"))
    asked = threading.current_thread()
    monkeypatch.setattr(tracking, "create_run", lambda *_, **__: away(threading.current_thread() is not asked))
    run_trials(watching, job, a=50.0, b=70.0)
    result = watching.close()
    assert (result["status"], result["message"], result["metrics"]) == (
        "finished", "best trial sweep-t02", {"val_top1": 70.0},
    )  # fmt: skip
    assert result["best"] is None


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
    watching = recorder(job)
    bad, good = trial("bad", **{"schedule.warmup_epochs": 9.0}), trial("good", **{"schedule.warmup_epochs": 1.0})
    for each in (bad, good):
        watching.on_trial_start(1, [], each)
    trial_folder(job, "bad").write_result({"status": "failed", "message": "schedule.warmup_epochs: 9.0 is all of"})
    watching.on_trial_complete(2, [], bad)
    watching.close()
    runs = {run.name: run for run in tracking.find_runs(job.tracking_uri, parent=job.run_id)}
    assert runs["sweep-t01"].status == "failed"
    assert runs["sweep-t01"].tags["dab.message"].startswith("schedule.warmup_epochs: 9.0")
    assert runs["sweep-t01"].params["schedule.warmup_epochs"] == "9.0"
    assert trial_folder(job, "good").root.joinpath("job.json").is_file()
    with pytest.raises(InvalidInputError, match="no run was submitted"):
        Job.load(trial_folder(job, "bad").root)


def test_a_trial_whose_description_cannot_be_written_does_not_end_the_sweep(job: Job) -> None:
    watching = recorder(job)
    (trial_folder(job, "a").root / "job.json").mkdir(parents=True)
    watching.on_trial_start(1, [], trial("a", **{"schedule.warmup_epochs": 1.5}))
    watching.close()
    (run,) = tracking.find_runs(job.tracking_uri, parent=job.run_id)
    assert run.name == "sweep-t01"
