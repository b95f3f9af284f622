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

    Args:
        path: The tar file to write.
        samples: What it holds; read once, one after the other.

    Returns:
        The shard's entry in the manifest.
    """
    from webdataset import TarWriter

    columns: dict[str, list[Any]] = {"keys": [], "names": [], "offsets": [], "sizes": [], "labels": []}
    with path.open("wb") as file:
        with TarWriter(file, encoder=False, user="dab", group="dab", mtime=0) as tar:
            for sample in samples:
                start = tar.tarstream.offset
                tar.write({"__key__": sample.key, sample.extension: sample.data, "cls": str(sample.label).encode()})
                columns["keys"].append(sample.key)
                columns["names"].append(sample.name)
                columns["offsets"].append(_image_offset(start, tar.tarstream.offset, sample))
                columns["sizes"].append(len(sample.data))
                columns["labels"].append(sample.label)
        file.flush()
        os.fsync(file.fileno())
    text = json.dumps(columns, separators=(",", ":")).encode()
    index_path(path).write_bytes(text)
    return Shard(
        name=path.name,
        num_samples=len(columns["keys"]),
        num_bytes=path.stat().st_size,
        sha256=file_sha256(path),
        index_sha256=hashlib.sha256(text).hexdigest(),
    )


def _image_offset(start: int, end: int, sample: StoredSample) -> int:
    """Returns where the image's bytes begin in the entry `[start, end)`: TarWriter sorts members by extension."""
    if sample.extension < "cls":
        return start + _TAR_BLOCK
    return end - member_bytes(len(sample.data)) + _TAR_BLOCK


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
