"""Whole shards from servers, kept in a folder of bounded size that the processes of a machine share.

A file bears the checksum of its content as its name, so shards of any dataset may lie side by side. It appears under
that name whole, verified and written through to the disk, or not at all; while it comes it is `SHA256.BYTES.part`,
locked by the one that fetches it. A part whose fetcher died is unlocked, and the next one that wants it goes on.

A file may be dropped at any time, so a reader opens it with `open`, and keeps it only as long as it is open.
"""

import errno
import fcntl
import hashlib
import os
import re
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from io import FileIO, IOBase
from pathlib import Path
from typing import NamedTuple

from dabnn.data import remote
from dabnn.data.manifest import Shard
from dabnn.data.remote import Patience, shown
from dabnn.errors import DabError, InvalidInputError

DEFAULT_BYTES = 50 * 10**9
DEFAULT_RETRY_S = 600.0
_GB = 1e9
_TRIES = 3
_TOUCH_EVERY_S = 5.0
_POLL_S = 0.05
_TELL_EVERY_S = 60.0
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT)
_SHA256 = re.compile(r"[0-9a-f]{64}")
_NAMES = re.compile(r"[0-9a-f]{64}\.(?:tar|index\.json(?:\.\d+)?|(\d+)\.part)")

_inherited: set[int] = set()
_inherited_lock = threading.Lock()
_is_registered = False


class _Entry(NamedTuple):
    """A file of the cache: when it was used last, what it takes or will take, and whether it is still coming."""

    used: float
    num_bytes: int
    path: Path
    is_part: bool


def default_folder() -> Path:
    """Returns the folder of the cache under DAB_HOME."""
    return Path(os.environ.get("DAB_HOME") or "~/.dab").expanduser() / "cache" / "shards"


@dataclass(frozen=True)
class ShardCache:
    """Shards and their indexes, by checksum; the least recently used ones are dropped first.

    Safe for several processes and threads. A pickled copy works on the same folder.

    Attributes:
        folder: Where they lie, on this machine's own disk.
        max_bytes: What they may take together.
        retry_s: How long to go on without progress.
    """

    folder: Path
    max_bytes: int = DEFAULT_BYTES
    retry_s: float = DEFAULT_RETRY_S

    def path(self, url: str, shard: Shard) -> Path:
        """Returns the file of a shard; fetches it when it is not there, or waits for the process that does.

        Raises:
            InvalidInputError: The folder cannot be used, or its limit is below the shard's size.
            DabError: The server refuses, is away for too long, or sends something else than the shard.
        """
        waiting = Patience(shown(url), self.retry_s, tell_every_s=_TELL_EVERY_S)
        coming = 0
        while not self.fetch(url, shard):
            found = self._num_coming(shard)
            if found != coming:
                coming = found
                waiting.progress()
            waiting.pause("it is being fetched already, or others take the room for it", at_most=_POLL_S)
        return self._file(shard)

    def open(self, url: str, shard: Shard) -> int:
        """Returns a descriptor of a shard's file, as `path` finds it; the caller closes it."""
        # For each sample, maybe: a text is joined in a tenth of the time of a Path.
        path = f"{self.folder}/{_checksum(shard.sha256)}.tar"
        while True:
            try:
                file = os.open(path, os.O_RDONLY)
            except (FileNotFoundError, NotADirectoryError):
                self.path(url, shard)  # which may be dropped before it is open
                continue
            except OSError as error:
                raise self._unusable(error, "read") from error
            if self._is_whole(os.fstat(file), path, shard.num_bytes):
                return file
            os.close(file)
            self.path(url, shard)

    def holds(self, shard: Shard) -> bool:
        """Returns whether a shard is there, and notes that it is in use."""
        path = self._file(shard)
        try:
            return self._is_whole(path.stat(), path, shard.num_bytes)
        except (FileNotFoundError, NotADirectoryError):
            return False
        except OSError as error:
            raise self._unusable(error, "read") from error

    def fetch(self, url: str, shard: Shard, stop: threading.Event | None = None) -> bool:
        """Fetches a shard, unless it is there.

        Args:
            url: Of the tar file.
            shard: Its entry in the manifest.
            stop: Set when it is wanted no more.

        Returns:
            Whether it is there now; not, if another process is fetching it or everything else in the cache is
            still coming and leaves no room.

        Raises:
            StoppedError: `stop` was set.
            DabError: As `path`.
        """
        if self.holds(shard):
            return True
        if shard.num_bytes > self.max_bytes:
            raise InvalidInputError(
                f"data.cache_gb: {self.max_bytes / _GB:g} GB is less than one shard, {shown(url)} of "
                f"{shard.num_bytes / _GB:g} GB; shards are kept whole, so give the cache room for several"
            )
        try:
            with self._part(shard) as part:
                if part is None:
                    return self.holds(shard)
                if not self._make_room():
                    Path(part.name).unlink()
                    return False
                self._fill(part, url, shard, Patience(shown(url), self.retry_s, stop))
        except OSError as error:
            raise self._unusable(error) from error
        return True

    def index(self, url: str, shard: Shard, stop: threading.Event | None = None) -> bytes:
        """Returns the content of a shard's index file, which is kept like the shard.

        Args:
            url: Of the index file.
            shard: Its shard's entry in the manifest.
            stop: Set when it is wanted no more.

        Raises:
            StoppedError: `stop` was set.
            DabError: As `path`.
        """
        path = self.folder / f"{_checksum(shard.index_sha256)}.index.json"
        with suppress(OSError):
            text = path.read_bytes()
            if hashlib.sha256(text).hexdigest() == shard.index_sha256:
                self._touch(path)
                return text
        text = remote.read_bytes(url, self.retry_s, stop)
        if hashlib.sha256(text).hexdigest() != shard.index_sha256:
            raise DabError(f"{shown(url)}: not the index that was written with {shard.name}; upload the dataset again")
        self._keep(path, text)
        return text

    def require_room(self, shards: Sequence[Shard], window: int) -> None:
        """Refuses a cache that does not hold the shards that are read in turn.

        Args:
            shards: What will be read.
            window: Samples that are mixed with each other, so that their shards are all in use at once.

        Raises:
            InvalidInputError: It would drop shards that are needed next, and fetch each of them again and again.
        """
        if not shards:
            return
        mean_samples = sum(shard.num_samples for shard in shards) / len(shards)
        num_shards = min(int(window / max(mean_samples, 1)) + 2, len(shards))
        needed = sum(sorted((shard.num_bytes for shard in shards), reverse=True)[:num_shards])
        if needed > self.max_bytes:
            raise InvalidInputError(
                f"data.cache_gb: {self.max_bytes / _GB:g} GB, but {window} samples that are mixed with each other "
                f"(data.window) lie in {num_shards} shards of up to {needed / _GB:.3g} GB together, so shards would be "
                f"fetched again and again; use at least {needed / _GB:.3g}, better twice that, or a smaller data.window"
            )

    def _file(self, shard: Shard) -> Path:
        return self.folder / f"{_checksum(shard.sha256)}.tar"

    def _part_file(self, shard: Shard) -> Path:
        return self.folder / f"{_checksum(shard.sha256)}.{shard.num_bytes}.part"

    def _num_coming(self, shard: Shard) -> int:
        """Returns how much of a shard has come so far."""
        try:
            return self._part_file(shard).stat().st_size
        except FileNotFoundError:
            return 0

    def _is_whole(self, found: os.stat_result, path: Path | str, num_bytes: int) -> bool:
        if time.time() - found.st_mtime > _TOUCH_EVERY_S:
            self._touch(path)
        return found.st_size == num_bytes

    def _touch(self, path: Path | str) -> None:
        with suppress(OSError):  # dropped a moment ago, or a cache that others filled and this user may only read
            os.utime(path)

    @contextmanager
    def _part(self, shard: Shard) -> Iterator[FileIO | None]:
        """Yields the locked file that a shard is fetched into; None where another process holds it, or just did."""
        path = self._part_file(shard)
        self.folder.mkdir(parents=True, exist_ok=True)
        with _open_shared(path) as file, _locked(file, is_waiting=False) as is_ours:
            if not (is_ours and _is_same(file, path)):
                yield None
                return
            try:
                yield None if self.holds(shard) else file
            finally:
                if _is_same(file, path) and not os.fstat(file.fileno()).st_size:
                    path.unlink()

    def _fill(self, part: FileIO, url: str, shard: Shard, patience: Patience) -> None:
        """Fetches into a part until it is right, and gives it its name."""
        path = Path(part.name)
        for _ in range(_TRIES):
            found = self._download(part, url, shard, patience)
            if found == shard.sha256:
                os.fsync(part.fileno())
                path.replace(self._file(shard))
                return
            part.truncate(0)
        path.unlink()
        raise DabError(
            f"{shown(url)}: sha256 {found}, the manifest says {shard.sha256}, in each of {_TRIES} tries, so it was "
            "altered since the dataset was built or is damaged on the server; upload the dataset again"
        )

    def _download(self, part: FileIO, url: str, shard: Shard, patience: Patience) -> str:
        while True:
            try:
                return remote.download(url, part, shard.num_bytes, patience)
            except OSError as error:
                if error.errno not in _NO_ROOM:
                    raise
                if not self._make_room(shard.num_bytes, is_disk_full=True):
                    raise self._full_disk(shard) from error

    def _keep(self, path: Path, text: bytes) -> None:
        """Writes a small file; where there is no room for it, it is read from the server the next time, too."""
        partial = path.with_name(f"{path.name}.{threading.get_native_id()}")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with _open_shared(partial) as file:
                file.truncate(0)
                file.write(text)
            partial.replace(path)
        except OSError as error:
            with suppress(OSError):
                partial.unlink()
            if error.errno not in _NO_ROOM:
                raise self._unusable(error) from error

    def _full_disk(self, shard: Shard) -> DabError:
        disk = os.statvfs(self.folder)
        return DabError(
            f"data.cache_folder: {self.folder}: the disk is full: {disk.f_bavail * disk.f_frsize / _GB:.3g} GB are "
            f"free, {shard.name} takes {shard.num_bytes / _GB:.3g}, and the cache has nothing left to drop; free some "
            "space, lower data.cache_gb, or name a folder on another disk"
        )

    def _unusable(self, error: OSError, doing: str = "written to") -> InvalidInputError:
        path = self.folder if error.filename is None else Path(os.fsdecode(error.filename))
        name = f"{path.name}: " if path.parent == self.folder else ""
        return InvalidInputError(
            f"data.cache_folder: {self.folder}: cannot be {doing} ({name}{error.strerror}); shards from a server are "
            "kept there. Name a folder of this machine that you may write to, as everybody may who uses it with you"
        )

    def _make_room(self, num_bytes: int = 0, *, is_disk_full: bool = False) -> bool:
        """Drops the files that were used least recently, until the cache is below its limit.

        Args:
            num_bytes: What is to be dropped at least, with `is_disk_full`.
            is_disk_full: Whether it is the disk and not the limit that has no room.

        Returns:
            Whether there is room now, or something was dropped.
        """
        with _open_shared(self.folder / ".lock") as lock, _locked(lock):
            entries = sorted(self._entries())
            excess = num_bytes if is_disk_full else sum(entry.num_bytes for entry in entries) - self.max_bytes
            dropped = 0
            for entry in entries:
                if dropped >= excess:
                    break
                if _drop(entry):
                    dropped += entry.num_bytes
        return dropped > 0 if is_disk_full else dropped >= excess

    def _entries(self) -> Iterator[_Entry]:
        with os.scandir(self.folder) as files:
            for file in files:
                name = _NAMES.fullmatch(file.name)
                if name is None:
                    continue
                with suppress(FileNotFoundError):
                    found = file.stat()
                    yield _Entry(found.st_mtime, int(name[1] or found.st_size), Path(file.path), name[1] is not None)


def _checksum(sha256: str) -> str:
    if not _SHA256.fullmatch(sha256):
        raise DabError(f"manifest: {sha256!r} is no sha256; the manifest is damaged, build the dataset again")
    return sha256


def _open_shared(path: Path) -> FileIO:
    """Opens a file of the cache; a new one may be read and written by all who may write to its folder."""
    file = path.open("a+b", buffering=0)
    found, writers = os.fstat(file.fileno()), path.parent.stat().st_mode & 0o022
    mode = found.st_mode | writers | writers << 1
    if mode != found.st_mode:
        with suppress(PermissionError):  # another user's, who has seen to it
            os.fchmod(file.fileno(), mode & 0o777)
    return file


def _is_same(file: IOBase, path: Path) -> bool:
    """Returns whether an open file still has its name: who held the lock may have renamed or dropped it."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


def _drop(entry: _Entry) -> bool:
    """Deletes a file of the cache, but no part that someone is fetching."""
    if not entry.is_part:
        entry.path.unlink(missing_ok=True)
        return True
    try:
        with entry.path.open("rb") as file, _locked(file, is_waiting=False) as is_ours:
            if is_ours:
                entry.path.unlink(missing_ok=True)
            return is_ours
    except FileNotFoundError:
        return True


@contextmanager
def _locked(file: IOBase, *, is_waiting: bool = True) -> Iterator[bool]:
    """Holds the lock of an open file; yields False where another has it and there is no waiting."""
    _forget_after_fork()
    try:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if is_waiting else fcntl.LOCK_NB))
    except BlockingIOError:
        yield False
        return
    with _inherited_lock:
        _inherited.add(file.fileno())
    try:
        yield True
    finally:
        with _inherited_lock:
            _inherited.discard(file.fileno())
        fcntl.flock(file, fcntl.LOCK_UN)


def _forget_after_fork() -> None:
    """Sees to it that a forked child keeps no lock: it would outlive its parent's death in the middle of a fetch."""
    global _is_registered
    with _inherited_lock:
        if not _is_registered:
            os.register_at_fork(after_in_child=_close_inherited)
            _is_registered = True


def _close_inherited() -> None:
    global _inherited_lock
    _inherited_lock = threading.Lock()
    # Not closed, since the parent's file objects were copied too and will close the number once more.
    nothing = os.open(os.devnull, os.O_RDONLY)
    for descriptor in _inherited:
        os.dup2(nothing, descriptor, inheritable=False)
    os.close(nothing)
    _inherited.clear()
