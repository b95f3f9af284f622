"""The story of a run in words, from the files in its folder."""

from pathlib import Path

from dabnn.run_folder import RunFolder
from orchestrator.failure import Failure, Kind, Limits, decide
from orchestrator.story import begun, message, note, recorded, sentence, story

LOST = Failure(
    Kind.WORKER_LOST, "the process of rank 1 on 10.0.0.3 ended without a word, as if killed", 123, 100, 1, "10.0.0.3", 1
)


def test_a_failure_is_noted_once_and_told_as_a_sentence(tmp_path: Path) -> None:
    folder, said = RunFolder(tmp_path), list[str]()
    note(folder, LOST, decide(LOST, [], Limits(max_failures=3)), said.append)
    assert said == [f"a worker was lost at step 123: {LOST.why}; it goes on from the last checkpoint (restart 1 of 3)"]
    assert recorded(folder) == [LOST]


def test_failures_are_counted_since_the_run_was_resumed(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    decision = decide(LOST, [], Limits(max_failures=3))
    for _ in range(2):
        note(folder, LOST, decision, lambda _: None)
    folder.append_event({"what": "resumed", "attempt": 2})
    assert recorded(folder) == []
    note(folder, LOST, decision, lambda _: None)
    assert recorded(folder) == [LOST]


def test_attempts_are_counted_since_the_run_was_resumed_whichever_driver_began_them(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.append_event({"what": "submitted", "attempt": 0})
    assert begun(folder) == 0
    folder.begin_attempt(0, 2)
    folder.append_event({"what": "driver lost", "attempt": 1})
    assert begun(folder) == 1
    folder.append_event({"what": "resumed", "attempt": 1})
    assert begun(folder) == 0


def test_the_story_holds_starts_and_failures_in_order(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.append_event({"what": "submitted", "attempt": 0})
    folder.begin_attempt(0, 2)
    note(folder, LOST, decide(LOST, [], Limits(max_failures=3)), lambda _: None)
    folder.begin_attempt(120, 2)
    told = [line[20:] for line in story(folder)]
    assert told[0] == "submitted"
    assert told[1] == "attempt 1 began at step 0 with 2 workers"
    assert told[2].startswith("a worker was lost at step 123")
    assert told[3] == "attempt 2 began at step 120 with 2 workers; about 3 steps are done again"


def test_the_message_of_a_run_that_is_given_up_says_what_and_why() -> None:
    decision = decide(LOST, [], Limits(max_failures=0))
    assert message(LOST, decision) == f"{LOST.why}; cluster.max_failures=0 allows no restart."


def test_what_is_no_failure_is_told_as_it_stands() -> None:
    event = {"what": "notice", "why": "rank 0 was told to end (SIGTERM)", "action": "a checkpoint is taken", "step": 7}
    assert sentence(event) == "notice at step 7: rank 0 was told to end (SIGTERM); a checkpoint is taken"
