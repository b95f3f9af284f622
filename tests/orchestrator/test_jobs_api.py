"""What is made of answers of the Jobs API that come late, in part or not at all; real ones are in `tests/jobs`."""

from collections.abc import Iterator
from typing import Any

import pytest

from dabnn.errors import DabError
from orchestrator import jobs_api, probe
from orchestrator.jobs_api import CONNECT_S, follow_job, insisting, stop_job
from orchestrator.probe import Request
from orchestrator.target import Target

LAB = Target("lab", "http://127.0.0.1:1", None)
LOG = "one\ntwo\nthree\n"


@pytest.fixture(autouse=True)
def hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jobs_api, "_RETRY_S", 0.0)
    monkeypatch.setattr(jobs_api, "_POLL_S", 0.01)
    monkeypatch.setattr(jobs_api, "_AGAIN_S", (0.0, 0.0, 0.0))


def lose(*_: object) -> Any:
    raise jobs_api._ConnectionLostError("no answer")


def say(monkeypatch: pytest.MonkeyPatch, name: str, *answers: Any) -> None:
    """Have a function of `jobs_api` answer so, one after the other and the last for ever; errors are raised."""
    left = list(answers)

    def answer(*_: object) -> Any:
        found = left.pop(0) if len(left) > 1 else left[0]
        if isinstance(found, Exception):
            raise found
        return found

    monkeypatch.setattr(jobs_api, name, answer)


@pytest.mark.parametrize("how", ["refused", "closed"])
def test_a_log_is_shown_where_a_proxy_passes_no_streams(monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    def refused(*_: object) -> Iterator[str]:
        yield from ([] if how == "closed" else lose())

    monkeypatch.setattr(jobs_api, "_tail", refused)
    say(monkeypatch, "has_ended", False, False, False, False, False, True)
    say(monkeypatch, "job_log", LOG[:4], LOG[:4], LOG[:8], LOG)
    notes: list[str] = []
    assert "".join(follow_job(LAB, "job", notes.append)) == LOG
    expected = ["the connection is lost (no answer); the job goes on, trying again", "the cluster lab answers again"]
    assert notes == (expected if how == "refused" else [])


def test_a_log_goes_on_after_a_stream_that_broke(monkeypatch: pytest.MonkeyPatch) -> None:
    streams = iter([LOG[:4], LOG[4:8]])

    def tail(*_: object) -> Iterator[str]:
        yield next(streams)
        lose()

    monkeypatch.setattr(jobs_api, "_tail", tail)
    say(monkeypatch, "has_ended", False, False, True)
    say(monkeypatch, "job_log", LOG)
    notes: list[str] = []
    assert list(follow_job(LAB, "job", notes.append)) == ["one\n", "two\n", "three\n"]
    assert len(notes) == 4


def test_a_job_that_does_not_end_is_not_waited_for_without_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jobs_api, "_END_S", 0.1)
    monkeypatch.setattr(jobs_api, "job_client", lambda _: type("Client", (), {"stop_job": lambda *_: None})())
    say(monkeypatch, "job_status", "PENDING")
    with pytest.raises(DabError, match="job job was told to end and has not within 0 s"):
        stop_job(LAB, "job")
    away = jobs_api._ConnectionLostError("no answer")
    say(monkeypatch, "job_status", "RUNNING", away, away, "STOPPED")
    stop_job(LAB, "job")


def test_a_cluster_that_misses_a_question_is_asked_again_and_not_for_ever() -> None:
    answers: list[Any] = [lose, lose, lose, lambda: "here"]
    assert insisting(lambda: answers.pop(0)()) == "here"
    with pytest.raises(DabError, match="no answer"):
        insisting(lose)
    assert CONNECT_S > 1.3  # a lost packet is sent again after a second


def test_a_probe_survives_a_lost_answer_and_gives_up_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    answers: list[Any] = [lose, lambda *_: False, lose, lambda *_: True]
    monkeypatch.setattr(probe, "has_ended", lambda *_: answers.pop(0)())
    monkeypatch.setattr(probe, "job_log", lambda *_: LOG)
    request = Request((), "/runs", "marker", "text", "")
    assert probe._run(LAB, request, lambda *_: None, lambda _: None) == LOG
    monkeypatch.setattr(probe, "_LIMIT_S", 0.0)
    monkeypatch.setattr(probe, "has_ended", lambda *_: False)
    monkeypatch.setattr(probe, "stop_job", lose)
    with pytest.raises(DabError, match="its nodes did not answer within 0 s"):
        probe._run(LAB, request, lambda *_: None, lambda _: None)
