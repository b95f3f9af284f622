"""Fetches coming shards into the cache, in threads, while the ones before them are read."""

import logging
import os
import threading
from collections import deque
from collections.abc import Sequence
from typing import NamedTuple

from dabnn.data.manifest import Shard
from dabnn.data.remote import StoppedError
from dabnn.data.shard_cache import ShardCache
from dabnn.errors import DabError

_NUM_THREADS = 4
_LOOK_AGAIN_S = 0.2

_log = logging.getLogger(__name__)


class Wanted(NamedTuple):
    """A shard that will be read: its entry, the URL of the tar file, and that of its index unless that is local."""

    shard: Shard
    url: str
    index_url: str | None


class _Crew:
    """The threads of one process and what they still have to fetch."""

    def __init__(self, cache: ShardCache) -> None:
        self.pid = os.getpid()
        self.stop = threading.Event()
        self._cache = cache
        self._change = threading.Condition()
        self._waiting: deque[Wanted] = deque()
        self._threads: list[threading.Thread] = []

    def want(self, coming: Sequence[Wanted]) -> None:
        with self._change:
            self._waiting = deque(coming)
            missing = min(len(coming), _NUM_THREADS) - len(self._threads)
            for _ in range(missing):
                # A daemon: the process may end in the middle of a fetch, and the next one goes on with it.
                thread = threading.Thread(target=self._work, name="dab-prefetch", daemon=True)
                self._threads.append(thread)
                thread.start()
            self._change.notify_all()

    def close(self) -> None:
        self.stop.set()
        with self._change:
            self._waiting.clear()
            self._change.notify_all()

    def _next(self) -> Wanted | None:
        with self._change:
            while not self._waiting:
                if self.stop.is_set():
                    return None
                self._change.wait()
            return self._waiting.popleft()

    def _work(self) -> None:
        while (wanted := self._next()) is not None:
            try:
                is_there = self._cache.fetch(wanted.url, wanted.shard, self.stop)
                if wanted.index_url is not None:
                    self._cache.index(wanted.index_url, wanted.shard, self.stop)
            except StoppedError:
                return
            except (DabError, OSError) as error:
                # Whoever reads the shard meets the same and says so.
                _log.debug("not fetched ahead: %s", error)
                continue
            if not is_there:
                self._look_again(wanted)

    def _look_again(self, wanted: Wanted) -> None:
        """Another process is fetching it, or there is no room yet: later, behind the others."""
        with self._change:
            is_last = not self._waiting
            self._waiting.append(wanted)
        if is_last:
            self.stop.wait(_LOOK_AGAIN_S)


class Prefetcher:
    """Fetches what comes next; a copy in another process starts threads of its own.

    Args:
        cache: Where shards go.
    """

    def __init__(self, cache: ShardCache) -> None:
        self._cache = cache
        self._crew: _Crew | None = None

    def want(self, coming: Sequence[Wanted]) -> None:
        """Says which shards come next, in order, instead of what was said before; returns at once.

        Only as many are fetched as half the cache holds, so that they do not push out those in use.
        """
        room = self._cache.max_bytes // 2
        chosen = []
        for wanted in coming:
            room -= wanted.shard.num_bytes
            if room < 0:
                break
            chosen.append(wanted)
        missing = [wanted for wanted in chosen if not self._cache.holds(wanted.shard)]
        if self._crew is None or self._crew.pid != os.getpid():
            if not missing:
                return
            self._crew = _Crew(self._cache)
        self._crew.want(missing)

    def close(self) -> None:
        """Ends the threads, at the latest when the piece that they are reading has come."""
        if self._crew is not None and self._crew.pid == os.getpid():
            self._crew.close()
        self._crew = None

    def __getstate__(self) -> dict[str, object]:
        return {"_cache": self._cache, "_crew": None}
