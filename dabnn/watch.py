"""What a rank notices about itself: that it hangs, that its machine is wanted back, that it is told to end.

The loop runs in a thread of its own, so that another can look at it. When no step was taken for `hang_s` seconds the
stacks of all threads are left with the run, and the loop is given up. SIGTERM and a notice that the machine will be
taken away make the loop take a checkpoint: see `dabnn.observer.Watch`. Both are looked at once a step at the cost of
reading a variable. Leaves out where a notice comes from, and what is done about a failure: see `jobs`.
"""

import faulthandler
import logging
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from dabnn.data.remote import is_url
from dabnn.errors import DabError
from dabnn.observer import Wish
from dabnn.run_folder import RunFolder
from dabnn.spec import TrainSpec

STACKS = "stacks"  # folder of a run where hanging ranks leave what they were doing
_POLL_S = 0.5
_START_S = 300.0  # how long an attempt may take to its first step, when hang_s is less
_OTHERS_S = 3.0  # between saving the own stacks and failing, so that the other ranks save theirs
_MARGIN_S = 10.0  # before a node is taken away; a checkpoint and the end of a step fit in
_TERM_GRACE_S = 30.0
_STORAGE_S = 5.0  # how long a storage that may be what hangs has for the stacks

_told_to_end = threading.Event()
_log = logging.getLogger(__name__)


def hang_limit_s(hang_s: float, spec: TrainSpec) -> float:
    """Return how long the loop may take no step: data behind a URL may be waited for besides."""
    waits = any(is_url(place) for place in (spec.data.train, spec.data.val))
    return hang_s + (spec.data.retry_s if waits else 0.0)


class HangError(DabError):
    """No step was taken for `cluster.hang_s` seconds."""


@dataclass(frozen=True)
class Notice:
    """A machine of the run will be taken away.

    Attributes:
        nodes: Ids of the nodes.
        deadline: When, in seconds since 1970; None where that is not known.
    """

    nodes: tuple[str, ...]
    deadline: float | None


def no_notice() -> Notice | None:
    """Return that nothing is known, where nobody would tell."""
    return None


class WorkerWatch:
    """Watches the loop of one rank; a `dabnn.observer.Watch`.

    Args:
        folder: The run's folder.
        rank: Of this worker.
        node: Address of its machine.
        hang_s: Seconds without a step after which it counts as hanging.
        notice: Says whether a machine of the run will be taken away.
    """

    def __init__(
        self,
        folder: RunFolder,
        rank: int,
        node: str,
        *,
        hang_s: float,
        notice: Callable[[], Notice | None] = no_notice,
    ) -> None:
        self._folder, self._rank, self._node, self._hang_s, self._notice = folder, rank, node, hang_s, notice
        self._is_first = True
        self._step, self._heard, self._looked = 0, time.monotonic(), time.monotonic()
        self._known: Notice | None = None
        self._is_leaving = False
        self._term_at: float | None = None

    def alive(self, step: int) -> None:
        """Take a sign of life of the loop."""
        self._step, self._heard, self._is_first = step, time.monotonic(), False

    def wish(self) -> Wish:
        """Return what the loop shall do now."""
        if _told_to_end.is_set():
            if not self._is_leaving:
                self._is_leaving = True
                self._note("notice", f"rank {self._rank} was told to end (SIGTERM)", "a checkpoint is taken")
            return Wish.LEAVE
        notice = self._notice()
        if notice is None:
            return Wish.GO_ON
        left_s = 0.0 if notice.deadline is None else notice.deadline - time.time()
        if notice != self._known:
            self._known = notice
            if self._rank == 0:
                when = "soon" if notice.deadline is None else f"in {left_s:.0f} s"
                nodes = ", ".join(node[:8] for node in notice.nodes)
                self._note("notice", f"node {nodes} is taken away {when}", "a checkpoint is taken")
            return Wish.SAVE if left_s > 2 * _MARGIN_S else Wish.LEAVE
        return Wish.LEAVE if left_s < _MARGIN_S else Wish.GO_ON

    def check(self) -> None:
        """Look at the loop, from another thread.

        Raises:
            HangError: It hangs, or does not end although it was told to.
        """
        now = time.monotonic()
        gap, self._looked = now - self._looked, now
        if gap > 10 * _POLL_S:  # the whole process stood still, not the loop
            self._heard += gap
        limit = max(self._hang_s, _START_S) if self._is_first else self._hang_s
        silent_s = now - self._heard
        if silent_s > limit:
            place = self.tell_stacks()
            time.sleep(_OTHERS_S)
            where = "before its first step" if self._is_first else f"after step {self._step}"
            raise HangError(
                f"cluster.hang_s: rank {self._rank} on {self._node} took no step for {silent_s:.0f} s {where}, more "
                f"than {limit:.0f} s. What it was doing is in {place}."
            )
        if not _told_to_end.is_set() or self._is_leaving:  # the loop knows; its checkpoint may have a long way
            return
        self._term_at = self._term_at or now
        if now - max(self._term_at, self._heard) > _TERM_GRACE_S:
            raise HangError(f"rank {self._rank} was told to end and took no step in {_TERM_GRACE_S:.0f} s")

    def tell_stacks(self) -> str:
        """Leave the stacks of all threads of this process with the run, else in its log; return where.

        What hangs may be the storage of the run, so nobody waits for that long.
        """
        with tempfile.TemporaryFile("w+") as file:
            faulthandler.dump_traceback(file, all_threads=True)
            file.seek(0)
            stacks = file.read()
        left: list[str] = []
        thread = threading.Thread(target=self._leave_stacks, args=(stacks, left), name="stacks", daemon=True)
        thread.start()
        thread.join(_STORAGE_S)
        if left:
            return left[0]
        sys.stderr.write(stacks)
        sys.stderr.flush()
        return "the log of its process"

    def _leave_stacks(self, stacks: str, left: list[str]) -> None:
        try:
            name = f"{STACKS}/attempt-{len(self._folder.attempts())}-rank-{self._rank}.txt"
            self._folder.leave(name, stacks)
            left.append(self._folder.place_of(name))
        except (OSError, DabError) as error:
            _log.warning("%s: %s cannot be written (%s)", self._folder.location, STACKS, error)

    def _note(self, what: str, why: str, action: str) -> None:
        event = {"what": what, "why": why, "action": action, "step": self._step, "rank": self._rank}
        try:
            self._folder.append_event(event | {"attempt": len(self._folder.attempts()), "node": self._node})
        except (OSError, DabError) as error:  # what cannot be noted is done all the same
            _log.warning("%s: events.jsonl cannot be written (%s)", self._folder.location, error)


def watched(loop: Callable[[], None], watch: WorkerWatch) -> None:
    """Run `loop` in a thread of its own to its end, and look at it twice a second.

    Raises:
        HangError: It hangs; the thread is left behind, to be ended with its process.
        BaseException: What `loop` raised.
    """
    errors: list[BaseException] = []

    def target() -> None:
        try:
            loop()
        except BaseException as error:  # noqa: BLE001 - carried to the thread that waits, which raises it
            errors.append(error)

    thread = threading.Thread(target=target, name="training", daemon=True)
    thread.start()
    while thread.is_alive():
        thread.join(_POLL_S)
        if thread.is_alive():
            watch.check()
    for error in errors:
        raise error


def heed_sigterm() -> None:
    """Have SIGTERM ask the loop of this process for a checkpoint and its end; to be called in the main thread."""
    signal.signal(signal.SIGTERM, lambda *_: _told_to_end.set())
