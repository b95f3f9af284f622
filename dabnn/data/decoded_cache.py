"""Decoded images of a split in one file, mapped into the memory of every process of a machine that reads them.

For datasets whose stored images all have one size. The file is filled by whoever decodes a sample first: its pixels,
then a byte that says that they are there. It survives its processes, but not a restart of the machine before it was
complete and on the disk, since the order in which a file's pages get there is not that of writing. It is not a copy of
the dataset: nothing is in it that the shards do not give again. Shards that were written anew since, as those are that
were damaged and repaired, have another file, and so has another version of Pillow.
"""

import errno
import fcntl
import hashlib
import json
import logging
import mmap
import os
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from dabnn.data.manifest import Manifest
from dabnn.errors import DabError, InvalidInputError

_HEADER_BYTES = 4096
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
_GB = 10**9
_log = logging.getLogger(__name__)


def one_size(manifest: Manifest) -> tuple[int, int] | None:
    """Returns width and height of every image of a dataset, or None where they differ or are not known."""
    image = manifest.image
    if not image.min_width or (image.min_width, image.min_height) != (image.max_width, image.max_height):
        return None
    return (image.min_width, image.min_height)


def open_decoded(
    folder: Path, max_bytes: int, manifest: Manifest, split: str, channels: int, state: str = ""
) -> "DecodedCache | None":
    """Opens the cache of a split, where it has one.

    Args:
        folder: Holds the files of all datasets.
        max_bytes: What they may take together; 0 for no cache. Files that no process has open make room for a new one,
            the least recently used first.
        manifest: The dataset.
        split: One of its splits.
        channels: 1 or 3, as the network takes them.
        state: Of the split's files on this machine, as `reader.verify_files` gives it.

    Returns:
        The cache; None, with a line in the log, where the images differ in size or do not fit.

    Raises:
        InvalidInputError: The folder cannot be written.
    """
    if max_bytes == 0:
        return None
    size = one_size(manifest)
    if size is None:
        _log.info("data.decoded_cache_gb: not used, the images of %s are not known to have one size", manifest.source)
        return None
    path = folder / f"{manifest.digest}-{split}-{channels}-{_key(state)}"
    cache = DecodedCache(path, manifest.split(split).num_samples, size, channels)
    if cache.num_bytes > max_bytes:
        _log.info(
            "data.decoded_cache_gb: not used, split %s takes %.3g GB decoded, more than the %.3g GB allowed",
            split,
            cache.num_bytes / _GB,
            max_bytes / _GB,
        )
        return None
    try:
        with _Lock(folder):
            if not cache.is_usable():
                cache.path.unlink(missing_ok=True)
                if not _make_room(folder, max_bytes - cache.num_bytes):
                    _log.info("data.decoded_cache_gb: not used, other runs have filled %s", folder)
                    return None
                cache.create()
            cache.open()
    except OSError as error:
        raise InvalidInputError(
            f"data.decoded_cache_gb: {folder} cannot hold {cache.num_bytes / _GB:.3g} GB of decoded images "
            f"({error.strerror}). Make room there, choose another data.cache_folder, or set data.decoded_cache_gb=0."
        ) from error
    return cache


class DecodedCache:
    """Pixels of samples by index; `open_decoded` opens one. A pickled copy opens the same file.

    Attributes:
        path: The file.
        size: Width and height of each image.
        channels: 1 or 3.
        num_bytes: Bytes of the whole file.
    """

    def __init__(self, path: Path, num_samples: int, size: tuple[int, int], channels: int) -> None:
        self.path, self.size, self.channels = path, size, channels
        self._num_samples = num_samples
        self._sample_bytes = size[0] * size[1] * channels
        # A header, one byte a sample, the pixels.
        self.num_bytes = _HEADER_BYTES + num_samples * (1 + self._sample_bytes)
        self._file = -1
        self._is_there: NDArray[np.uint8]
        self._pixels: NDArray[np.uint8]
        self._is_complete = False

    def is_usable(self) -> bool:
        """Whether the file is one that this machine has written since it started, or that was completed."""
        header = _read_header(self.path)
        return header is not None and self._fits(header)

    def create(self) -> None:
        """Writes an empty file, whose room on the disk is its own from now on."""
        partial = self.path.with_name(f"{self.path.name}.partial")
        try:
            with partial.open("wb") as file:
                os.posix_fallocate(file.fileno(), 0, self.num_bytes)
                os.pwrite(file.fileno(), self._header(is_complete=False), 0)
        except OSError:
            partial.unlink(missing_ok=True)
            raise
        partial.replace(self.path)

    def open(self) -> None:
        """Maps the file; as long as it is open, no other process drops it."""
        self._file = os.open(self.path, os.O_RDWR)
        fcntl.flock(self._file, fcntl.LOCK_SH)
        os.utime(self._file)
        mapped = np.frombuffer(mmap.mmap(self._file, self.num_bytes, access=mmap.ACCESS_READ), dtype=np.uint8)
        first = _HEADER_BYTES + self._num_samples
        self._is_there = mapped[_HEADER_BYTES:first]
        width, height = self.size
        self._pixels = mapped[first:].reshape(self._num_samples, height, width, self.channels)

    def missing(self, indices: NDArray[np.int64]) -> NDArray[np.int64]:
        """Returns those of some samples that nobody has stored yet."""
        if self._file < 0:
            self.open()
        missing: NDArray[np.int64] = indices[self._is_there[indices] == 0]
        return missing

    def is_full(self) -> bool:
        """Whether every sample is stored."""
        return len(self.missing(np.arange(self._num_samples))) == 0

    def store(self, indices: NDArray[np.int64], pixels: NDArray[np.uint8]) -> None:
        """Stores decoded samples.

        Args:
            indices: Of the samples in the split.
            pixels: uint8 (n, height, width, channels).

        Raises:
            DabError: The file cannot be written.
        """
        # By system calls, not through the mapping: no other process sees the byte before the pixels.
        try:
            for index, image in zip(indices.tolist(), pixels, strict=True):
                offset = _HEADER_BYTES + self._num_samples + index * self._sample_bytes
                os.pwrite(self._file, image.tobytes(), offset)
                os.pwrite(self._file, b"\1", _HEADER_BYTES + index)
            if not self._is_complete and self._is_there.all():
                os.fsync(self._file)
                os.pwrite(self._file, self._header(is_complete=True), 0)
                self._is_complete = True
        except OSError as error:
            raise DabError(
                f"data.decoded_cache_gb: {self.path} cannot be written ({error.strerror}). Choose another "
                "data.cache_folder, or set data.decoded_cache_gb=0."
            ) from error

    def pixels(self, indices: NDArray[np.int64]) -> NDArray[np.uint8]:
        """Returns samples that are stored: uint8 (n, height, width, channels), a copy."""
        return self._pixels[indices]

    def close(self) -> None:
        """Closes the file; using it again opens it again."""
        if self._file >= 0:
            # The mapping has a descriptor of its own, which would go on holding the lock.
            fcntl.flock(self._file, fcntl.LOCK_UN)
            os.close(self._file)
        self._file = -1

    def _header(self, *, is_complete: bool) -> bytes:
        content = {"num_bytes": self.num_bytes, "boot_id": _boot_id(), "is_complete": is_complete}
        return json.dumps(content).encode().ljust(_HEADER_BYTES)

    def _fits(self, header: dict[str, Any]) -> bool:
        is_of_now = bool(header["is_complete"]) or (header["boot_id"] == _boot_id() != "")
        return is_of_now and bool(header["num_bytes"] == self.num_bytes == self.path.stat().st_size)

    def __getstate__(self) -> dict[str, object]:
        return {key: value for key, value in self.__dict__.items() if key not in ("_is_there", "_pixels")} | {
            "_file": -1
        }

    def __del__(self) -> None:
        self.close()


class _Lock:
    """One process at a time creates and drops files of a folder."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def __enter__(self) -> Self:
        self._folder.mkdir(parents=True, exist_ok=True)
        self._file = os.open(self._folder / ".lock", os.O_RDWR | os.O_CREAT, 0o666)
        fcntl.flock(self._file, fcntl.LOCK_EX)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        os.close(self._file)


def _make_room(folder: Path, max_bytes: int) -> bool:
    """Drops files that no process has open until the rest takes no more than `max_bytes`; whether that was reached."""
    files = [(path.stat(), path) for path in folder.iterdir() if path.name != ".lock"]
    total = sum(found.st_size for found, _ in files)
    for found, path in sorted(files, key=lambda entry: entry[0].st_mtime):
        if total > max_bytes and _is_free(path):
            path.unlink()
            total -= found.st_size
    return total <= max_bytes


def _is_free(path: Path) -> bool:
    file = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
            raise
        return False
    finally:
        os.close(file)
    return True


def _read_header(path: Path) -> dict[str, Any] | None:
    try:
        with path.open("rb") as file:
            header = json.loads(file.read(_HEADER_BYTES))
    except (FileNotFoundError, ValueError):
        return None
    is_known = isinstance(header, dict) and header.keys() >= {"num_bytes", "boot_id", "is_complete"}
    return header if is_known else None


def _key(state: str) -> str:
    """Returns what names all that pixels depend on besides the manifest."""
    from PIL import __version__ as pillow_version

    return hashlib.sha256(f"{pillow_version} {state}".encode()).hexdigest()[:16]


def _boot_id() -> str:
    """Returns what names the time since this machine's last start; nothing where that is not known."""
    try:
        return _BOOT_ID.read_text().strip()
    except OSError:
        return ""
