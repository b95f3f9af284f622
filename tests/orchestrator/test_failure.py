"""What is decided about failures: a table of histories, without a cluster."""

import pytest

from orchestrator.failure import Action, Failure, Kind, Limits, decide

LIMITS = Limits(max_failures=3)


def lost(step: int = 100, kind: Kind = Kind.WORKER_LOST, **values: object) -> Failure:
    return Failure(**{"kind": kind, "why": "it ended", "step": step, "start_step": 90, "attempt": 1} | values)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "kind",
    [kind for kind in Kind if kind.is_counted and kind is not Kind.GPU_OUT_OF_MEMORY],
    ids=lambda kind: kind.name,
)
def test_the_first_failure_of_any_kind_is_tried_again_at_once_and_counted(kind: Kind) -> None:
    decision = decide(lost(kind=kind), [], LIMITS)
    assert (decision.action, decision.reason, decision.wait_s) == (Action.RETRY, "restart 1 of 3", 0)


def test_restarts_end_when_they_are_used_up() -> None:
    history = [lost(step) for step in (100, 200, 300)]
    assert decide(lost(400), history[:2], LIMITS).action is Action.RETRY
    decision = decide(lost(400), history, LIMITS)
    assert decision.action is Action.GIVE_UP
    assert decision.reason == "3 restarts are used up (cluster.max_failures)"
    assert decide(lost(), [], Limits(max_failures=0)).reason == "cluster.max_failures=0 allows no restart"


def test_a_place_that_is_taken_away_never_counts() -> None:
    history = [lost(step, Kind.PREEMPTED) for step in range(100, 2000, 100)]
    assert decide(lost(2000, Kind.PREEMPTED), history, Limits(max_failures=0)).action is Action.RETRY
    assert decide(lost(2000), history, LIMITS).reason == "restart 1 of 3"


def test_who_is_told_to_end_again_and_again_without_a_step_is_given_up_unless_machines_are_taken_away() -> None:
    told, drained = lost(100, Kind.PREEMPTED), lost(100, Kind.PREEMPTED, is_drained=True)
    limits = Limits(max_failures=2)
    decisions = [decide(told, [told] * number, limits) for number in range(4)]
    assert [decision.action for decision in decisions] == [Action.RETRY] * 3 + [Action.GIVE_UP]
    assert [decision.wait_s for decision in decisions[:3]] == [0, 1, 2]
    assert decisions[3].reason == "2 restarts are used up (cluster.max_failures)"
    assert decide(drained, [drained] * 9, limits).action is Action.RETRY
    assert decide(lost(101, Kind.PREEMPTED), [told] * 3, limits).action is Action.RETRY


def test_a_run_that_lost_the_race_for_its_places_waits_and_is_never_given_up() -> None:
    history = [lost(0, Kind.NOT_STARTED) for _ in range(50)]
    waits = [decide(history[0], history[:number], Limits(max_failures=0)) for number in range(8)]
    assert {decision.action for decision in waits} == {Action.RETRY}
    assert [decision.wait_s for decision in waits] == [1, 1, 2, 4, 8, 16, 30, 30]
    assert decide(lost(0), history, LIMITS).reason == "restart 1 of 3"


def test_nothing_is_started_again_when_a_stop_was_asked_for() -> None:
    stopping = Limits(max_failures=3, is_stopping=True)
    assert {decide(lost(kind=kind), [], stopping).action for kind in Kind} == {Action.STOP}


def test_the_same_error_twice_without_a_step_between_is_given_up() -> None:
    first = lost(120, Kind.ERROR, why="rank 0: ValueError: no")
    assert decide(first, [first], LIMITS).action is Action.GIVE_UP
    assert decide(lost(121, Kind.ERROR, why=first.why), [first], LIMITS).action is Action.RETRY
    assert decide(lost(120, Kind.ERROR, why="another"), [first], LIMITS).action is Action.RETRY
    assert decide(lost(120), [lost(120)], LIMITS).action is Action.RETRY  # whoever kills may kill twice


def test_too_little_memory_of_a_gpu_in_the_first_step_is_given_up_with_advice() -> None:
    limits = Limits(max_failures=3, advice="Try data.batch_size=32.")
    at_once = lost(90, Kind.GPU_OUT_OF_MEMORY)
    decision = decide(at_once, [], limits)
    assert (decision.action, decision.reason) == (
        Action.GIVE_UP, "a restart would need as much memory. Try data.batch_size=32.",
    )  # fmt: skip
    later = lost(500, Kind.GPU_OUT_OF_MEMORY)
    assert decide(later, [], limits).action is Action.RETRY
    assert decide(later, [later], limits).action is Action.GIVE_UP


def test_too_little_memory_of_a_machine_is_given_up_the_second_time_without_a_step() -> None:
    failure = lost(100, Kind.OUT_OF_MEMORY)
    assert decide(failure, [], LIMITS).action is Action.RETRY
    assert decide(failure, [failure], LIMITS).reason.startswith("it ran out of memory twice")
    assert decide(lost(101, Kind.OUT_OF_MEMORY), [failure], LIMITS).action is Action.RETRY


def test_failures_without_progress_wait_longer_each_time() -> None:
    many = Limits(max_failures=99)
    waits = [decide(lost(100), [lost(100)] * number, many).wait_s for number in range(8)]
    assert waits == [0, 1, 2, 4, 8, 16, 30, 30]
    assert decide(lost(101), [lost(100)] * 8, many).wait_s == 0


def test_a_failure_survives_the_file_that_it_is_noted_in() -> None:
    failure = lost(kind=Kind.NODE_LOST, node="10.0.0.3", rank=2)
    event = failure.to_event() | {"time": 1.0, "action": "retry", "reason": "restart 1 of 3"}
    assert event["what"] == "node lost"
    assert Failure.from_event(event) == failure
    assert Failure.from_event({"what": "resumed", "time": 1.0}) is None
