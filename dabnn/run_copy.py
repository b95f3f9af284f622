"""The small files of a run that lies behind a URL, as they are on this machine: for those who look at a run.

A copy is made of what stands in the run's folder and of the commit files of its checkpoints, never of checkpoints
themselves. Writing goes to the store at once. The loop that trains has a folder of its own: see `dabnn.run_mirror`.
"""

import hashlib
import logging
import os
import tempfile
import threading
import time
from pathlib import Path

from dabnn.data.remote import shown
from dabnn.errors import DabError
from dabnn.run_store import Entry, RunStore, StoreAwayError, check_url, patiently

CHECKPOINTS = "checkpoints"
_SMALL = (".json", ".jsonl", ".yaml")
_FRESH_S = 1.0
_LIMIT_S = 20.0

_log = logging.getLogger(__name__)
_copies: dict[tuple[int, str], "RunCopy"] = {}
_copies_lock = threading.Lock()


def cache_folder() -> Path:
    """Return the folder for copies of runs: under DAB_HOME, or a temporary one where that cannot be written to."""
    folder = Path(os.environ.get("DAB_HOME") or "~/.dab").expanduser().absolute() / "storage-cache"
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if os.access(folder, os.W_OK | os.X_OK):
            return folder
    except OSError:
        pass
    folder = Path(tempfile.gettempdir()) / f"dab-{os.getuid()}" / "storage-cache"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    if folder.stat().st_uid != os.getuid():  # made by somebody else, who could change what is in it
        raise DabError(
            f"DAB_HOME: not writable, and {folder} belongs to another user. Set DAB_HOME to a folder of yours."
        )
    return folder


def local_name(url: str) -> str:
    """Return the name under which a run behind `url` has its folder on this machine."""
    url = url.rstrip("/")
    return f"{url.rpartition('/')[2][:40]}-{hashlib.sha256(url.encode()).hexdigest()[:12]}"


def machine_folder(url: str) -> Path:
    """Return the folder for a run behind `url` on this machine, made if missing; its file `url` says what it is of."""
    folder = cache_folder() / local_name(url)
    if not (folder / "url").exists():
        folder.mkdir(mode=0o700, exist_ok=True)
        (folder / "url").write_text(url.rstrip("/"))
    return folder


class RunCopy:
    """What this machine has of a run behind a URL; make one with `RunCopy.of`."""

    def __init__(self, url: str, root: Path) -> None:
        self.store = RunStore(url)
        self.root = root
        self._known: dict[str, Entry] = {}
        self._looked_at = float("-inf")
        self._lock = threading.Lock()
        self._is_away = False

    @classmethod
    def of(cls, url: str) -> "RunCopy":
        """Return this process's copy of a run behind a URL."""
        check_url(url)
        root = machine_folder(url) / "seen"
        key = (os.getpid(), str(root))
        with _copies_lock:
            if key not in _copies:
                _copies[key] = cls(url.rstrip("/"), root)
            return _copies[key]

    def refresh(self) -> None:
        """Bring the copy up to date unless that was done in the last second; a store that is away changes nothing."""
        if time.monotonic() - self._looked_at < _FRESH_S:
            return
        try:
            self._look()
        except StoreAwayError as error:
            self._looked_at = time.monotonic()
            if not self._is_away:
                _log.warning("storage: %s does not answer (%s); what was seen last counts", self.store, error)
            self._is_away = True

    def fetch(self) -> None:
        """Bring the copy up to date.

        Raises:
            StoreError: The store refuses, or does not answer for 20 s.
        """
        patiently(self._look, shown(self.store.url), _LIMIT_S)

    def write(self, name: str, data: bytes) -> None:
        """Write a small file into the store.

        Raises:
            StoreError: The store refuses, is full, or does not answer for 20 s.
        """
        patiently(lambda: self.store.write(name, data), shown(self.store.url), _LIMIT_S)
        self._looked_at = float("-inf")

    def read(self, name: str) -> bytes | None:
        """Return a file from the store itself, or None where there is none.

        Raises:
            StoreError: The store refuses, or does not answer for 20 s.
        """
        return patiently(lambda: self.store.read(name), shown(self.store.url), _LIMIT_S)

    def folders(self, name: str) -> list[str]:
        """Return the names of the folders in a folder of the run.

        Raises:
            StoreError: The store refuses, or does not answer for 20 s.
        """
        return patiently(lambda: self.store.folders(name), shown(self.store.url), _LIMIT_S)

    def remove(self, name: str) -> None:
        """Remove a file from the store, if it is there.

        Raises:
            StoreError: The store refuses, or does not answer for 20 s.
        """
        patiently(lambda: self.store.remove(name), shown(self.store.url), _LIMIT_S)
        self._looked_at = float("-inf")

    def _look(self) -> None:
        with self._lock:
            found = {name: entry for name, entry in self.store.entries().items() if name.endswith(_SMALL)}
            commits = self.store.entries(CHECKPOINTS)
            found |= {f"{CHECKPOINTS}/{name}": commits[name] for name in commits if name.endswith(".json")}
            for name, entry in found.items():
                if self._known.get(name) != entry or not (self.root / name).exists():
                    self.store.fetch(name, self.root / name)
            for path in [*self.root.glob("*"), *(self.root / CHECKPOINTS).glob("*")]:
                if path.suffix in _SMALL and str(path.relative_to(self.root)) not in found:
                    path.unlink(missing_ok=True)
            self._known, self._looked_at, self._is_away = found, time.monotonic(), False
