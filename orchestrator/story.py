"""What happened to a run, in sentences: the starts of its loop and the lines of its `events.jsonl`, in order.

`dab status` shows all of it, the log of the job each sentence when it happens.
"""

import time
from collections.abc import Callable, Mapping
from typing import Any

from dabnn.errors import DabError
from dabnn.run_folder import RunFolder
from orchestrator.failure import Action, Decision, Failure, Kind

_NEXT = {
    Action.RETRY: "it goes on from the last checkpoint",
    Action.GIVE_UP: "it is given up",
    Action.STOP: "it stays stopped",
}
_BEGINNINGS = ("submitted", "resumed")
_WHAT = {
    Kind.WORKER_LOST: "a worker was lost",
    Kind.NODE_LOST: "a machine was lost",
    Kind.DRIVER_LOST: "the program that drives the run was lost",
    Kind.HANG: "training hung",
    Kind.OUT_OF_MEMORY: "memory ran out",
    Kind.GPU_OUT_OF_MEMORY: "GPU memory ran out",
    Kind.CONNECTION_LOST: "workers lost each other",
    Kind.NOT_STARTED: "the workers found no place",
    Kind.PREEMPTED: "a place was taken away",
    Kind.ERROR: "a worker failed",
}


def recorded(folder: RunFolder) -> list[Failure]:
    """Return the failures since the run was submitted or last resumed, oldest first."""
    failures: list[Failure] = []
    for event in folder.events():
        if event.get("what") in _BEGINNINGS:
            failures = []
        failure = Failure.from_event(event)
        if failure is not None:
            failures.append(failure)
    return failures


def begun(folder: RunFolder) -> int:
    """Return how many attempts began since the run was submitted or last resumed."""
    before = [int(event.get("attempt", 0)) for event in folder.events() if event.get("what") in _BEGINNINGS]
    return len(folder.attempts()) - (before[-1] if before else 0)


def reached(folder: RunFolder) -> tuple[int, int, int]:
    """Return how many attempts began, with which step the last one did, and which step the run has reached."""
    attempts, progress = folder.attempts(), folder.progress()
    start_step = int(attempts[-1]["start_step"]) if attempts else 0
    saved = max((int(path.stem.removeprefix("step-")) for path in folder.checkpoints.glob("step-*.json")), default=0)
    return len(attempts), start_step, max(start_step, saved, int(progress.get("step", 0)))


def note(folder: RunFolder, failure: Failure, decision: Decision, tell: Callable[[str], None]) -> None:
    """Leave a failure and what was decided in the run's folder, and tell it in words."""
    event = failure.to_event() | {"action": str(decision.action), "reason": decision.reason}
    try:
        folder.append_event(event)
    except (OSError, DabError) as error:
        tell(f"{folder.location}: events.jsonl cannot be written ({error})")
    tell(sentence(event))


def message(failure: Failure, decision: Decision) -> str:
    """Return the message of a run that is not tried again: what happened, and why that was the last time."""
    return f"{failure.why.rstrip('.')}; {decision.reason.rstrip('.')}."


def sentence(event: Mapping[str, Any]) -> str:
    """Return a line of `events.jsonl` in words, without its time."""
    what, why, action = str(event.get("what", "")), str(event.get("why", "")), event.get("action")
    begin = _WHAT[Kind(what)] if what in list(Kind) else what
    step = f" at step {event['step']}" if event.get("step") else ""
    text = f"{begin}{step}: {why.rstrip('.')}" if why else f"{begin}{step}"
    follows = _NEXT[Action(action)] if action in list(Action) else str(action or "")
    reason = f" ({event['reason']})" if event.get("reason") else ""
    return f"{text}; {follows}{reason}" if follows else text


def story(folder: RunFolder) -> list[str]:
    """Return what happened to a run, a sentence each, with its time of day, oldest first.

    A run that was never disturbed has no story.
    """
    events, attempts = folder.events(), folder.attempts()
    if not events and len(attempts) < 2:
        return []
    told = [(float(event.get("time", 0)), sentence(event)) for event in events]
    for attempt in attempts:
        began_at = float(attempt["time"])
        reached = [int(event.get("step", 0)) for event in events if float(event.get("time", 0)) < began_at]
        told.append((began_at, _began(attempt, max(reached, default=0))))
    return [f"{time.strftime('%Y-%m-%d %H:%M:%S', time.localtime(at))} {text}" for at, text in sorted(told)]


def _began(attempt: Mapping[str, Any], reached: int) -> str:
    number, step, size = attempt["attempt"], attempt["start_step"], attempt["world_size"]
    workers = f"{size} worker{'s' if size > 1 else ''}"
    again = f"; about {reached - step} steps are done again" if reached > step else ""
    return f"attempt {number} began at step {step} with {workers}{again}"
