"""The wish for more workers: left in the run's folder by who drives the run, heard by rank 0 between two steps.

A run that trains on fewer workers than it wants is asked to save a checkpoint and leave when there is room for more,
so that nothing is computed twice. The wish has a file of its own: a stop that somebody asks for meanwhile counts.
"""

import threading
import time
from contextlib import suppress

from dabnn.errors import DabError
from dabnn.observer import Watch, Wish
from dabnn.run_folder import RunFolder

FILE = "resize.json"
_POLL_S = 2.0


def leave_wish(folder: RunFolder) -> None:
    """Ask the loop to save a checkpoint and leave."""
    folder.leave_json(FILE, {"time": time.time()})


def forget_wish(folder: RunFolder) -> None:
    """Withdraw the wish, so that the next attempt does not hear it; where a store is away, the one after that."""
    with suppress(DabError, OSError):
        folder.remove(FILE)


class GrowthWatch:
    """Hears the wish for more workers besides what another watch hears; a `dabnn.observer.Watch`.

    Args:
        folder: The run's folder, looked at by a thread of its own.
        inner: The other watch.
    """

    def __init__(self, folder: RunFolder, inner: Watch) -> None:
        self._folder, self._inner = folder, inner
        self._is_wished = threading.Event()
        threading.Thread(target=self._listen, name="growth", daemon=True).start()

    def wish(self) -> Wish:
        """Return what the loop shall do now."""
        return Wish.LEAVE if self._is_wished.is_set() else self._inner.wish()

    def alive(self, step: int) -> None:
        """Take a sign of life of the loop."""
        self._inner.alive(step)

    def _listen(self) -> None:
        while not self._is_wished.wait(_POLL_S):
            with suppress(DabError, OSError):  # a store that is away is asked again
                if self._folder.load_json(FILE):
                    self._is_wished.set()
