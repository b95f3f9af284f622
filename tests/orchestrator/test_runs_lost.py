"""Runs whose cluster is away, or does not know their job, and submissions that go wrong half way; a real tracker."""

import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from dabnn.errors import DabError, InvalidInputError
from dabnn.run_folder import RunFolder
from orchestrator import runs, submit, tracking
from orchestrator.config import load_config, to_dict
from orchestrator.job import Job
from orchestrator.sent_runs import SentRun, remember, target_of
from orchestrator.target import Target, Token, resolve_target

EXAMPLE = Path(__file__).parents[2] / "examples" / "digits.yaml"
GONE = "http://127.0.0.1:1"
OTHER = "http://127.0.0.1:2"


@pytest.fixture(scope="module", autouse=True)
def own_home() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="dab-") as folder, pytest.MonkeyPatch.context() as patch:
        patch.setenv("DAB_HOME", folder)
        patch.setenv("HOME", folder)
        yield Path(folder)


@pytest.fixture(scope="module")
def uri(own_home: Path) -> Iterator[str]:
    yield tracking.ensure_tracking()
    tracking.tracking_down()


@pytest.fixture
def send_job(uri: str, tmp_path: Path) -> Callable[..., Job]:
    """Make a run as a submission leaves it; with tags of one's own."""

    def make(status: tracking.Status = "running", **tags: str) -> Job:
        run_id = tracking.create_run(uri, "test", tmp_path.name, params={}, tags={})
        config = to_dict(load_config(EXAMPLE, ["data.train=digits"]))
        folder = str(tmp_path / run_id)
        job = Job("train", run_id, "run", folder, uri, "test", 1, config, "gone", GONE)
        job.save()
        named = {"dab.folder": folder, "dab.job_id": job.job_id, "dab.jobs_url": GONE}
        tracking.set_tags(uri, run_id, named | {f"dab.{key}": value for key, value in tags.items()})
        tracking.set_status(uri, run_id, status)
        return job

    return make


@pytest.fixture
def resumed(monkeypatch: pytest.MonkeyPatch) -> list[Job]:
    """What `resume` hands over, to clusters that take everything."""
    found: list[Job] = []
    monkeypatch.setattr(runs, "expect", lambda *_, **__: None)
    monkeypatch.setattr(runs, "ensure_services", lambda uri, _, target: (target, uri))
    monkeypatch.setattr(runs, "reach", lambda _: None)
    monkeypatch.setattr(runs, "check_size", lambda *_: None)
    monkeypatch.setattr(runs, "submit_job", lambda job, *_: found.append(job))
    return found


def has_job(monkeypatch: pytest.MonkeyPatch, *states: str | None) -> None:
    """Have every cluster say this of every job, one answer after the other."""
    answers = list(states)
    monkeypatch.setattr(runs, "job_status", lambda *_: answers.pop(0) if len(answers) > 1 else answers[0])


@pytest.mark.parametrize("how", [{"address": OTHER}, {"is_forced": True}])
def test_a_run_whose_cluster_is_gone_goes_on_elsewhere_or_where_one_insists(
    uri: str, send_job: Callable[..., Job], resumed: list[Job], how: dict[str, Any]
) -> None:
    job = send_job()
    for wrong in ({}, {"address": GONE}):
        with pytest.raises(InvalidInputError, match="Its cluster does not answer; if it is gone for good"):
            runs.resume(uri, job.run_id, **wrong)
    runs.resume(uri, job.run_id, **how)
    assert [(each.attempt, each.jobs_url) for each in resumed] == [(2, how.get("address", GONE))]
    assert tracking.find_run(uri, job.run_id).status == "queued"


def test_a_run_is_not_given_up_for_a_cluster_that_does_not_answer_either(
    uri: str, send_job: Callable[..., Job], resumed: list[Job], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(_: Target) -> None:
        raise DabError("away")

    monkeypatch.setattr(runs, "reach", refuse)
    job = send_job()
    with pytest.raises(DabError, match="away"):
        runs.resume(uri, job.run_id, address=OTHER)
    assert not resumed
    assert tracking.find_run(uri, job.run_id).status == "running"


def test_a_living_run_is_resumed_nowhere_else(
    uri: str, send_job: Callable[..., Job], resumed: list[Job], monkeypatch: pytest.MonkeyPatch
) -> None:
    has_job(monkeypatch, "RUNNING")
    job = send_job()
    for how in ({"address": OTHER}, {"is_forced": True}):
        with pytest.raises(InvalidInputError, match="Stop it first"):
            runs.resume(uri, job.run_id, **how)
    assert not resumed


def test_a_run_whose_cluster_is_gone_is_stopped_at_once_and_says_so(uri: str, send_job: Callable[..., Job]) -> None:
    job = send_job()
    with pytest.raises(DabError, match="--now` records it as stopped all the same"):
        runs.stop(uri, job.run_id, grace_s=0)
    stopped = runs.stop(uri, job.run_id, now=True)
    assert stopped.status == "stopped"
    assert stopped.message.startswith("given up: the cluster 127.0.0.1:1 does not answer")


def test_a_job_that_outlives_its_run_is_waited_for_before_the_next_attempt(
    uri: str, send_job: Callable[..., Job], resumed: list[Job], monkeypatch: pytest.MonkeyPatch
) -> None:
    job = send_job("failed")
    has_job(monkeypatch, "RUNNING")
    monkeypatch.setattr(runs, "_EXIT_S", 0.5)
    with pytest.raises(InvalidInputError, match=rf"its job {job.job_id} still runs"):
        runs.resume(uri, job.run_id)
    ended: list[str] = []
    monkeypatch.setattr(runs, "stop_job", lambda _, job_id, __: ended.append(job_id))
    assert runs.stop(uri, job.run_id, now=True).status == "stopped"
    assert ended == [job.job_id]
    has_job(monkeypatch, "RUNNING", "RUNNING", "SUCCEEDED")
    runs.resume(uri, job.run_id)
    assert len(resumed) == 1


def test_a_job_that_its_cluster_does_not_know_is_on_its_way_for_two_minutes(
    uri: str, send_job: Callable[..., Job], monkeypatch: pytest.MonkeyPatch
) -> None:
    has_job(monkeypatch, None)
    now = time.time()
    assert runs.status(uri, send_job("queued", sent_at=f"{now:.0f}").run_id).status == "queued"
    assert runs.status(uri, send_job("queued", sent_at=f"{now - 200:.0f}").run_id).status == "failed"
    assert runs.status(uri, send_job("queued").run_id).status == "failed"


def test_a_cluster_that_refuses_is_told_from_one_that_is_away(
    uri: str, send_job: Callable[..., Job], resumed: list[Job], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise InvalidInputError("token: wrong")

    monkeypatch.setattr(runs, "job_status", refuse)
    job = send_job()
    assert runs.status(uri, job.run_id).message.startswith("its cluster asks for a token")
    with pytest.raises(InvalidInputError, match="is running; only a stopped"):
        runs.resume(uri, job.run_id, is_forced=True)


def test_no_token_goes_to_an_address_that_only_the_tracker_names(
    uri: str, send_job: Callable[..., Job], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_AUTH_TOKEN", "a" * 64)
    record = tracking.find_run(uri, send_job(jobs_url="http://evil:8265").run_id)
    assert target_of(record).token is None
    assert resolve_target("http://evil:8265").token == Token(variable="RAY_AUTH_TOKEN")  # its user named it
    remember(SentRun("ab", "run", uri, "evil:8265", "http://evil:8265"))
    assert target_of(record).token == Token(variable="RAY_AUTH_TOKEN")


def test_an_address_that_only_the_tracker_names_is_not_known_for_a_resume_there(
    uri: str, send_job: Callable[..., Job], resumed: list[Job], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_AUTH_TOKEN", "a" * 64)
    has_job(monkeypatch, "FAILED")
    job = send_job("failed", jobs_url="http://sly:8265")
    runs.resume(uri, job.run_id)
    assert len(resumed) == 1
    assert target_of(tracking.find_run(uri, job.run_id)).token is None


@pytest.mark.parametrize(
    ("error", "state", "expected"),
    [
        (DabError("no answer"), "RUNNING", "queued"),
        (DabError("no answer"), None, "failed"),
        (DabError("Job with submission_id a already exists."), "RUNNING", "queued"),
        (KeyboardInterrupt(), "RUNNING", "failed"),
    ],
)
def test_a_job_that_the_cluster_took_is_not_failed_for_a_lost_answer(
    uri: str,
    send_job: Callable[..., Job],
    monkeypatch: pytest.MonkeyPatch,
    error: BaseException,
    state: str | None,
    expected: str,
) -> None:
    def fail(*_: object) -> None:
        raise error

    ended: list[str] = []
    monkeypatch.setattr(submit, "send", fail)
    monkeypatch.setattr(submit, "parcel_of", lambda *_: (None, ""))
    monkeypatch.setattr(submit, "job_status", lambda *_: state)
    monkeypatch.setattr(submit, "stop_job", lambda _, job_id: ended.append(job_id))
    job = send_job("queued")
    target: Any = Target("gone", GONE, None)
    if state == "RUNNING" and str(error) == "no answer":
        submit.submit_job(job, target, object())  # type: ignore[arg-type]
    else:
        with pytest.raises((DabError, KeyboardInterrupt)):
            submit.submit_job(job, target, object())  # type: ignore[arg-type]
    record = tracking.find_run(uri, job.run_id)
    assert record.status == expected
    assert time.time() - float(record.tags["dab.sent_at"]) < 60
    assert ended == ([job.job_id] if isinstance(error, KeyboardInterrupt) else [])


def test_a_run_that_ends_half_made_says_why(uri: str, digits: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ready = submit.plan(load_config(EXAMPLE, [f"data.train={digits}", "name=half"]), sweep=False)

    def refuse(*_: object) -> None:
        raise DabError("storage: full")

    monkeypatch.setattr(RunFolder, "leave", refuse)
    with pytest.raises(DabError, match="storage: full"):
        submit._create_run(ready, uri, "train", Target("gone", GONE, None))
    record = tracking.find_run(uri, "half")
    assert (record.status, record.tags["dab.message"]) == ("failed", "the job could not be submitted: storage: full")
