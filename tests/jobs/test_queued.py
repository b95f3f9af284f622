"""How a job waits for its turn, without a cluster; with one: `test_remote.py`."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dabnn.errors import DabError, InvalidInputError
from jobs import queued
from orchestrator import submit
from orchestrator.capacity import Needs, Node
from orchestrator.config import load_config, to_dict
from orchestrator.job import Job
from orchestrator.queue import VARIABLE, Turn, Waiting
from orchestrator.reach import Reached
from orchestrator.target import Target

EXAMPLE = Path(__file__).parents[2] / "examples" / "digits.yaml"


@pytest.fixture
def wait(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[str]]:
    """Run the program with these answers to whose turn it is; returns what it did, in order."""

    def run(*answers: Turn | DabError, num_workers: int = 2, connect: Callable[[], None] | None = None) -> list[str]:
        did: list[str] = []
        left = list(answers)

        def turn_now(_: Waiting) -> Turn:
            answer = left.pop(0)
            did.append("asked")
            if isinstance(answer, DabError):
                raise answer
            return answer

        def execute(_: str, arguments: list[str]) -> None:
            did.append(" ".join(arguments[1:]))

        needs = Needs(num_workers, num_workers, {"CPU": 1.0}, "pack", {})
        monkeypatch.setenv(VARIABLE, Waiting("job", needs, may_outgrow=False).to_json())
        monkeypatch.setattr(queued, "turn_now", turn_now)
        monkeypatch.setattr(queued, "_POLL_S", 0.0)
        monkeypatch.setattr(queued, "connect", connect or (lambda: did.append("connected")))
        monkeypatch.setattr(queued.ray, "shutdown", lambda: did.append("gone"))
        monkeypatch.setattr(os, "execv", execute)
        queued.main("jobs.supervise")
        return did

    return run


@pytest.mark.parametrize("num_workers", [0, 2])
def test_others_see_that_a_run_had_its_turn_before_its_program_starts(
    wait: Callable[..., list[str]], num_workers: int
) -> None:
    did = wait(Turn("wait", "full"), DabError("away"), Turn("start"), num_workers=num_workers)
    assert did == ["asked", "asked", "asked", "connected", "gone", "-m jobs.supervise"]


def test_a_cluster_that_refuses_to_say_whose_turn_it_is_keeps_nobody_waiting(wait: Callable[..., list[str]]) -> None:
    assert wait(InvalidInputError("token: wrong")) == ["asked", "connected", "gone", "-m jobs.supervise"]


def test_a_run_starts_also_where_its_turn_cannot_be_shown(wait: Callable[..., list[str]]) -> None:
    def refuse() -> None:
        raise ConnectionError

    assert wait(Turn("start"), connect=refuse) == ["asked", "-m jobs.supervise"]


def test_whose_turn_it_is_is_decided_on_the_cluster_where_several_may_ask_at_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("orchestrator.queue.jobs", lambda _: [])
    config: dict[str, Any] = to_dict(load_config(EXAMPLE, ["data.train=digits"]))
    job = Job("train", "ab" * 16, "run", "/runs/ab", "http://mlflow", "test", 1, config)
    reached = Reached("2", "one", (Node("n", {"CPU": 8.0}, {}),))
    entrypoints = []
    for target in (Target("lab", "http://a:1", None), Target("embedded", "http://127.0.0.1:1", None)):
        parcel, reason = submit.parcel_of(job, target, reached)
        assert not reason
        entrypoints.append(parcel.entrypoint.partition("-m ")[2])
    assert entrypoints == ["jobs.queued jobs.supervise", "jobs.supervise"]
