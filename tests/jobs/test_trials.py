"""What a sweep records of its trials, also of one that cannot be; with a real tracker and without a cluster."""

import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from dabnn.errors import InvalidInputError
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
