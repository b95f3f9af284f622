"""A job that waits for its turn and then becomes the program that it was submitted for: `python -m jobs.queued MODULE`.

Which turn that is, is decided in `orchestrator.queue`. While it waits it has no connection to Ray, which is how others
see that it waits, and it holds little memory. A Jobs API that refuses, or does not answer for minutes, is no reason to
wait for ever: the order is advisory, and Ray itself holds a run whose workers find no room.
"""

import os
import random
import sys
import time
from contextlib import suppress

import ray

from dabnn.errors import DabError, InvalidInputError
from jobs.connect import connect
from orchestrator.queue import VARIABLE, Waiting, turn_now

_POLL_S = 5.0
_SAY_AGAIN_S = 300.0
_UNANSWERED = 24


def main(module: str) -> None:
    """Wait, then replace this process by `module`."""
    waiting = Waiting.from_json(os.environ[VARIABLE])
    said, said_at, unanswered = "", 0.0, 0
    while unanswered < _UNANSWERED:
        try:
            turn = turn_now(waiting)
        except DabError as error:
            unanswered += _UNANSWERED if isinstance(error, InvalidInputError) else 1
            reason = str(error)
        else:
            if turn.action == "start":
                break
            reason, unanswered = f"queued: {turn.reason}", 0
        if reason != said or time.monotonic() - said_at > _SAY_AGAIN_S:
            sys.stdout.write(reason + "\n")
            sys.stdout.flush()
            said, said_at = reason, time.monotonic()
        time.sleep(_POLL_S * random.uniform(0.8, 1.2))
    with suppress(ConnectionError, RuntimeError):  # its program tries again, and is started again
        connect()  # so that others see at once that it has had its turn; its program does seconds later, or never
        ray.shutdown()
    os.execv(sys.executable, [sys.executable, "-m", module])  # noqa: S606 - no shell is wanted


if __name__ == "__main__":
    main(sys.argv[1])
