"""One shard: a WebDataset tar file, written byte for byte the same each time, and the index that lies beside it.

A sample is two tar members, `KEY.EXTENSION` (the image file as it came) and `KEY.cls` (the label as text). The index
gives each image's place inside the tar, so that any sample is read with one `pread`, without scanning.
"""

import hashlib
import json
import os
from array import array
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dabnn.data.manifest import Shard
from dabnn.errors import DabError

_TAR_BLOCK = 512
_TAR_RECORD = 20 * _TAR_BLOCK
_MAX_NAME_BYTES = 100
_MAX_MEMBER_BYTES = 8**11 - 1


@dataclass(frozen=True, slots=True)
class StoredSample:
    """A sample on its way into a shard: its key, the image's name at the source, extension, bytes, and label."""

    key: str
    name: str
    extension: str
    data: bytes
    label: int


@dataclass(frozen=True)
class ShardIndex:
    """Where the samples of a shard lie: one entry a sample, in the order of the tar file.

    Attributes:
        keys: WebDataset keys.
        names: The images' names at the source, for messages.
        offsets: Byte offset of the image inside the tar file.
        sizes: Bytes of the image.
        labels: Positions in the manifest's classes.
    """

    keys: tuple[str, ...]
    names: tuple[str, ...]
    offsets: "array[int]"
    sizes: "array[int]"
    labels: "array[int]"


def index_path(shard_path: Path) -> Path:
    """Returns the path of a shard's index."""
    return shard_path.with_name(f"{shard_path.name}.index.json")


def member_bytes(num_bytes: int) -> int:
    """Returns what a file of this size occupies in a tar archive: a header and whole blocks of 512 bytes."""
    return _TAR_BLOCK + -(-num_bytes // _TAR_BLOCK) * _TAR_BLOCK


def write_shard(path: Path, samples: Iterable[StoredSample]) -> Shard:
    """Writes a shard and its index.

    The bytes are those of webdataset's `TarWriter`, at a tenth of the time: members sorted by extension, USTAR headers
    that say nothing about when and by whom they were written.

    Args:
        path: The tar file to write.
        samples: What it holds; read once, one after the other.

    Returns:
        The shard's entry in the manifest.

    Raises:
        ValueError: A member's name has more than 100 bytes, or an image more than 8 GiB.
    """
    index = IndexColumns()
    digest = hashlib.sha256()
    offset = 0
    with path.open("wb") as file:
        for sample in samples:
            members = sorted(((sample.extension, sample.data), ("cls", str(sample.label).encode())))
            entry = bytearray()
            for extension, data in members:
                entry += _header(f"{sample.key}.{extension}".encode(), len(data))
                if extension == sample.extension:
                    index.add(sample.key, sample.name, offset + len(entry), len(data), sample.label)
                entry += data
                entry += bytes(-len(data) % _TAR_BLOCK)
            offset += len(entry)
            file.write(entry)
            digest.update(entry)
        end = bytes(2 * _TAR_BLOCK + -(offset + 2 * _TAR_BLOCK) % _TAR_RECORD)
        file.write(end)
        digest.update(end)
        file.flush()
        os.fsync(file.fileno())
    return index.write(path, offset + len(end), digest.hexdigest())


class IndexColumns:
    """The index of a shard while it is being made, one sample after the other."""

    def __init__(self) -> None:
        self._columns: dict[str, list[Any]] = {"keys": [], "names": [], "offsets": [], "sizes": [], "labels": []}

    def add(self, key: str, name: str, offset: int, size: int, label: int) -> None:
        """Takes note of a sample; the arguments are those of `ShardIndex`, one of each."""
        for column, value in zip(self._columns.values(), (key, name, offset, size, label), strict=True):
            column.append(value)

    def write(self, path: Path, num_bytes: int, sha256: str) -> Shard:
        """Writes the index beside a shard.

        Args:
            path: The tar file.
            num_bytes: Its length.
            sha256: Of its content.

        Returns:
            The shard's entry in the manifest.
        """
        text = json.dumps(self._columns, separators=(",", ":")).encode()
        with index_path(path).open("wb") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        index_sha256 = hashlib.sha256(text).hexdigest()
        return Shard(path.name, len(self._columns["keys"]), num_bytes, sha256, index_sha256)


def _header(name: bytes, size: int) -> bytes:
    """Returns the USTAR header of a regular file of mode 0444 that user and group `dab` own, last written in 1970."""
    if len(name) > _MAX_NAME_BYTES or size > _MAX_MEMBER_BYTES:
        raise ValueError(f"{name!r} of {size} bytes; a member has a name of at most 100 bytes and at most 8 GiB")
    before = b"%b0000444\0000000000\0000000000\0%011o\00000000000000\0" % (name.ljust(_MAX_NAME_BYTES, b"\0"), size)
    after = b"0".ljust(101, b"\0") + b"ustar\x0000" + b"dab".ljust(32, b"\0") * 2 + bytes(183)
    return before + b"%06o\0 " % (sum(before) + sum(after) + 8 * ord(" ")) + after


def file_sha256(path: Path) -> str:
    """Returns the sha256 of a file as hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def load_index(folder: Path, shard: Shard) -> ShardIndex:
    """Reads a shard's index and verifies it against the manifest.

    Args:
        folder: The dataset's folder.
        shard: The shard's entry in the manifest.

    Returns:
        The index.

    Raises:
        DabError: The index is missing, or is not the one that was written with the shard.
    """
    path = index_path(folder / shard.name)
    try:
        text = path.read_bytes()
    except OSError as error:
        raise DabError(
            f"{path}: the shard's index cannot be read ({error.strerror}); build the dataset again"
        ) from error
    return parse_index(text, shard, str(path))


def parse_index(text: bytes, shard: Shard, place: str) -> ShardIndex:
    """Returns the index that a file holds.

    Args:
        text: The file's content.
        shard: The shard's entry in the manifest.
        place: Where the file lies, for messages.

    Raises:
        DabError: It is not the one that was written with the shard.
    """
    if hashlib.sha256(text).hexdigest() != shard.index_sha256:
        raise DabError(f"{place}: not the index that was written with the shard; build the dataset again")
    columns = json.loads(text)
    return ShardIndex(
        keys=tuple(columns["keys"]),
        names=tuple(columns["names"]),
        offsets=array("q", columns["offsets"]),
        sizes=array("q", columns["sizes"]),
        labels=array("q", columns["labels"]),
    )
