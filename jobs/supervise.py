"""The entrypoint of a job: `python -m jobs.supervise` starts `jobs.train` or `jobs.sweep`, and again when it is lost.

A driver that was killed has left no result. As long as `cluster.max_failures` allows it another one is started, which
finds the newest checkpoint, or the book of the sweep; when the job itself is ended (`dab stop --now`, or this process
is killed) the driver ends with it. Imports neither ray nor torch: it only waits, for as long as the run goes on, in
40 MB.
"""

import ctypes
import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from typing import Any

from dabnn.errors import DabError
from dabnn.memory import advice, kernel_kills
from dabnn.run_folder import RunFolder
from dabnn.watch import STACKS
from orchestrator.failure import HUNG, PASSING, Action, Decision, Failure, Kind, Limits, decide
from orchestrator.job import VARIABLE
from orchestrator.story import message, note, reached, recorded

_PROGRAMS = {"train": "jobs.train", "sweep": "jobs.sweep"}
_PR_SET_PDEATHSIG = 1


def main() -> int:
    """Run the driver to the end of the run; return its exit code, or 1 when it is given up."""
    job = json.loads(os.environ[VARIABLE])
    folder = RunFolder.of(job["folder"])
    driver = _Driver(_PROGRAMS[job["kind"]])
    _begin(folder, job)
    while not driver.is_ending:
        with suppress(OSError, DabError):
            folder.forget_result()
        kills = kernel_kills()
        code = driver.run()
        if code == 0 or driver.is_ending or folder.result():
            return code
        failure = _lost(folder, code, is_memory_short=kernel_kills() > kills)
        decision = decide(failure, recorded(folder), _limits(folder, job))
        note(folder, failure, decision, _say)
        if decision.action in (Action.GIVE_UP, Action.STOP):
            _leave_result(folder, failure, decision)
            return 1
        time.sleep(decision.wait_s)
    return 1


class _Driver:
    """The program that drives the run, one process after the other.

    Attributes:
        is_ending: Whether the job is to end: no other is started.
    """

    def __init__(self, program: str) -> None:
        self.is_ending, self._program = False, program
        self._process: subprocess.Popen[bytes] | None = None
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._end)

    def run(self) -> int:
        """Run it to its end and return its exit code, negative for a signal."""
        self._process = subprocess.Popen([sys.executable, "-m", self._program], preexec_fn=_end_with_parent)
        return self._process.wait()

    def _end(self, number: int, _frame: object) -> None:
        if self.is_ending:  # Ray signals every process of the job, and this one hands on what it gets
            return
        self.is_ending = True
        if self._process is not None:
            self._process.send_signal(number)


def _begin(folder: RunFolder, job: dict[str, Any]) -> None:
    what = "submitted" if job["attempt"] == 1 else "resumed"
    try:
        folder.append_event({"what": what, "attempt": len(folder.attempts())})
    except (OSError, DabError) as error:
        _say(f"{folder.location}: events.jsonl cannot be written ({error})")


def _end_with_parent() -> None:
    """Have the kernel end the driver when this process is killed: nobody would know of it."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _lost(folder: RunFolder, code: int, *, is_memory_short: bool) -> Failure:
    """Return what is known of a driver's end; with `cluster.num_workers=0` it trained itself."""
    attempts, start_step, step = reached(folder)
    if code == HUNG:
        kind, why = Kind.HANG, f"no step was taken; what it was doing is in {folder.place_of(STACKS)} or its log"
    elif code == PASSING:
        kind, why = Kind.ERROR, "training was interrupted; its log says by what"
    elif code == -signal.SIGKILL and is_memory_short:
        kind, why = Kind.OUT_OF_MEMORY, "the system ended its driver, because the machine ran out of memory"
    elif code < 0:
        kind, why = Kind.DRIVER_LOST, f"its driver died ({signal.Signals(-code).name})"
    else:
        kind, why = Kind.ERROR, f"its driver died (exit code {code})"
    return Failure(
        kind,
        why,
        step=step,
        start_step=start_step,
        attempt=attempts,
    )


def _limits(folder: RunFolder, job: dict[str, Any]) -> Limits:
    values = job["config"]
    return Limits(
        max_failures=values["cluster"]["max_failures"],
        is_stopping=folder.is_stop_requested(),
        advice=advice(values["data"]["batch_size"], max(1, values["cluster"]["num_workers"])),
    )


def _leave_result(folder: RunFolder, failure: Failure, decision: Decision) -> None:
    status = "failed" if decision.action is Action.GIVE_UP else "stopped"
    text = f"{message(failure, decision)} `dab resume` continues from the last checkpoint."
    result = {"status": status, "message": text, "step": failure.step, "epoch": folder.progress().get("epoch", 0)}
    try:
        folder.write_result(result)
    except (OSError, DabError) as error:
        _say(f"{folder.location}: the result cannot be written ({error}): {result}")


def _say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
