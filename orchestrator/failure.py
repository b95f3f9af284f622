"""What to do when something ends an attempt of a run: a pure function from the failure and those before it.

`decide` knows nothing of Ray, files or clocks. What acts on its decisions is in `jobs`: `jobs.group` over Ray Train for
failures of workers and nodes, and `jobs.supervise`, for the loss of the program that drives a run. What a restart
would meet again (a damaged sample, a loss that is not finite) is no failure here: the training loop ends itself with
a result. The rules are in docs/failures.md.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from enum import StrEnum
from typing import Any

HUNG = 75  # exit code of a driver that trained itself and hung
PASSING = 76  # of one that met what another may well not meet
_SHORTEST_WAIT_S, _LONGEST_WAIT_S = 1.0, 30.0


class Kind(StrEnum):
    """What ended an attempt."""

    WORKER_LOST = "worker lost"
    NODE_LOST = "node lost"
    DRIVER_LOST = "driver lost"
    HANG = "hang"
    OUT_OF_MEMORY = "out of memory"
    GPU_OUT_OF_MEMORY = "GPU out of memory"
    CONNECTION_LOST = "connection lost"
    NOT_STARTED = "not started"
    PREEMPTED = "preempted"
    ERROR = "error"

    @property
    def is_counted(self) -> bool:
        """Whether it counts towards `cluster.max_failures` at all times: who only waits for a place has not failed."""
        return self not in (Kind.PREEMPTED, Kind.NOT_STARTED)


class Action(StrEnum):
    """What is done about it."""

    RETRY = "retry"
    GIVE_UP = "give up"
    STOP = "stop"


@dataclass(frozen=True)
class Failure:
    """What ended an attempt.

    Attributes:
        kind: What happened.
        why: What is known of the cause, in words.
        step: Optimizer steps that the run had reached.
        start_step: Those that it began the attempt with.
        attempt: Number of the attempt, from 1; 0 when none had begun.
        node: Address of the machine; empty where it is not one of them.
        rank: Rank of the worker; None where it is not one of them.
        is_drained: Whether a machine was about to be taken away.
    """

    kind: Kind
    why: str
    step: int
    start_step: int = 0
    attempt: int = 0
    node: str = ""
    rank: int | None = None
    is_drained: bool = False

    def to_event(self) -> dict[str, Any]:
        """Return it as a line of `events.jsonl`; `from_event` is the inverse."""
        values = asdict(self)
        return {"what": str(values.pop("kind"))} | values

    @classmethod
    def from_event(cls, event: Mapping[str, Any]) -> "Failure | None":
        """Return the failure that a line of `events.jsonl` tells of, or None where it tells of something else."""
        if event.get("what") not in list(Kind):
            return None
        known = {field.name for field in fields(cls)}
        values = {key: value for key, value in event.items() if key in known}
        return cls(kind=Kind(event["what"]), **values)


@dataclass(frozen=True)
class Limits:
    """What a run allows.

    Attributes:
        max_failures: Restarts before it counts as failed; waits for a place are not counted.
        is_stopping: Whether somebody asked for its end.
        advice: What to do about too little memory, in words.
    """

    max_failures: int
    is_stopping: bool = False
    advice: str = ""


@dataclass(frozen=True)
class Decision:
    """What to do.

    Attributes:
        action: What to do.
        reason: Why, in words.
        wait_s: Seconds to let pass before.
    """

    action: Action
    reason: str
    wait_s: float = 0.0


def decide(failure: Failure, history: Sequence[Failure], limits: Limits) -> Decision:
    """Return what to do about a failure.

    Args:
        failure: What just happened.
        history: What happened before since the run was submitted or resumed, oldest first.
        limits: What the run allows.
    """
    if limits.is_stopping:
        return Decision(Action.STOP, "a stop was asked for, so it is not started again")
    wait_s = _wait_s(failure, history)
    if failure.kind is Kind.NOT_STARTED:
        reason = "another place is looked for; this does not count as a failure"
        return Decision(Action.RETRY, reason, max(_SHORTEST_WAIT_S, wait_s))
    if not _is_counted(failure, history):
        return Decision(
            Action.RETRY, "its place is wanted for something else; this does not count as a failure", wait_s
        )
    if reason := _hopeless(failure, history, limits):
        return Decision(Action.GIVE_UP, reason)
    num_used = sum(_is_counted(before, history[:number]) for number, before in enumerate(history))
    if num_used >= limits.max_failures:
        return Decision(Action.GIVE_UP, _used_up(limits.max_failures))
    return Decision(Action.RETRY, f"restart {num_used + 1} of {limits.max_failures}", wait_s)


def _is_counted(failure: Failure, history: Sequence[Failure]) -> bool:
    """Whether it counts: who is told to end again and again without a step in between is not wanted back, but sick."""
    before = history[-1] if history else None
    is_again = before is not None and before.kind is failure.kind and failure.step <= before.step
    return failure.kind.is_counted or (failure.kind is Kind.PREEMPTED and is_again and not failure.is_drained)


def _hopeless(failure: Failure, history: Sequence[Failure], limits: Limits) -> str:
    """Return why a restart would end the same way, or nothing.

    An error or too little memory that comes twice without a step in between comes again. Too little memory of a GPU in
    the first step does so at once: what a step needs does not change, and nothing else was there to be freed.
    """
    advice = f" {limits.advice}" if limits.advice else ""
    before = history[-1] if history else None
    is_again = before is not None and before.kind is failure.kind and failure.step <= before.step
    if failure.kind is Kind.GPU_OUT_OF_MEMORY and (is_again or failure.step <= failure.start_step + 1):
        return f"a restart would need as much memory.{advice}"
    if failure.kind is Kind.OUT_OF_MEMORY and is_again:
        return f"it ran out of memory twice without a step in between.{advice}"
    if failure.kind is Kind.ERROR and is_again and before is not None and before.why == failure.why:
        return "the same error came twice without a step in between, so it would come again"
    return ""


def _used_up(max_failures: int) -> str:
    if max_failures == 0:
        return "cluster.max_failures=0 allows no restart"
    times = "restart" if max_failures == 1 else "restarts"
    return f"{max_failures} {times} are used up (cluster.max_failures)"


def _wait_s(failure: Failure, history: Sequence[Failure]) -> float:
    """Return 0 after progress, otherwise 1, 2, 4, ... up to 30 s, so that a sick machine is not hammered."""
    num_idle, step = 0, failure.step
    for before in reversed(history):
        if before.step < step:
            break
        num_idle += 1
    return min(_LONGEST_WAIT_S, 2.0 ** (num_idle - 1)) if num_idle else 0.0
