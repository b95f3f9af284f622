"""One shard's part of a build: read its images, decode and count them, write the tar file, its index and a receipt.

A task can be pickled, so that it runs in another process or on another machine that sees the same folders. What it
writes depends on the task alone. The receipt is written last: a shard that has one is finished and is not made again.
"""

import json
import os
import socket
import uuid
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from dabnn.data.encode import Encoding
from dabnn.data.images import decode_image
from dabnn.data.manifest import Shard
from dabnn.data.processes import Tell
from dabnn.data.shards import IndexColumns, StoredSample, file_sha256, index_path, write_shard
from dabnn.data.sources import Record
from dabnn.data.sources.records import FileRead
from dabnn.data.sources.webdataset import key_of
from dabnn.data.statistics import ImageStatistics
from dabnn.errors import DabError, InvalidInputError

MAX_NAMED_FAILURES = 3


@dataclass(frozen=True)
class ShardTask:
    """A shard to make.

    Attributes:
        number: Position among all tasks of the build.
        split: `train` or `val`.
        path: Where the shard goes.
        first: Position of the first record in the split.
        records: The samples, in order.
        read: Returns the image file of a record.
        encoding: How images are changed, or None.
        existing: A tar file that holds the samples already and gets an index only.
    """

    number: int
    split: str
    path: Path
    first: int
    records: tuple[Record, ...]
    read: Callable[[Record], bytes]
    encoding: Encoding | None = None
    existing: Path | None = None


@dataclass(frozen=True)
class ShardResult:
    """What became of a shard.

    Attributes:
        number: The task's.
        shard: Its entry in the manifest.
        class_counts: Pairs of a label and its samples.
        statistics: `ImageStatistics.state`.
        failures: The first images that do not decode, with the reason.
        num_failures: How many there are.
    """

    number: int
    shard: Shard
    class_counts: list[tuple[int, int]]
    statistics: Mapping[str, Any]
    failures: tuple[str, ...] = ()
    num_failures: int = 0


@dataclass
class _Counted:
    statistics: ImageStatistics = field(default_factory=ImageStatistics)
    labels: Counter[int] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)


def make_shard(task: ShardTask, tell: Tell) -> ShardResult:
    """Makes a shard, or the index of one that is there.

    Args:
        task: Which.
        tell: Called with 1 after each image.

    Returns:
        What became of it; where an image does not decode nothing is left behind.

    Raises:
        InvalidInputError: An image cannot be read any more, or has changed since the source was listed.
        OSError: The shard cannot be written.
    """
    counted = _Counted()
    # Another process may be at the same shard: one whose build was killed, or whose machine was given up too early.
    partial = task.path.with_name(f"{task.path.name}.{uuid.uuid4().hex}.partial")
    try:
        if task.existing is None:
            shard = write_shard(partial, _samples(task, counted, tell))
        else:
            shard = _index_shard(partial, task.existing, _samples(task, counted, tell), task.records)
        result = _result(task, shard, counted)
        if not counted.failures:
            if task.existing is None:
                partial.replace(task.path)
            index_path(partial).replace(index_path(task.path))
            _write_receipt(task.path, result)
    finally:
        partial.unlink(missing_ok=True)
        index_path(partial).unlink(missing_ok=True)
    return result


def finished(task: ShardTask) -> ShardResult | None:
    """Returns what an earlier build left of the same task, or None where the shard is still to be made."""
    try:
        stored = json.loads(receipt_path(task.path).read_bytes())
        index_path(task.path).stat()
        found = (task.existing or task.path).stat()
    except (OSError, ValueError):
        return None
    result = ShardResult(**stored | {"shard": Shard(*stored["shard"]), "number": task.number})
    is_same = found.st_size == result.shard.num_bytes and result.shard.mtime_ns in (None, found.st_mtime_ns)
    return result if is_same else None


def receipt_path(shard_path: Path) -> Path:
    """Returns the path of the file that says that a shard is finished."""
    return shard_path.with_name(f"{shard_path.name}.finished.json")


def _write_receipt(path: Path, result: ShardResult) -> None:
    receipt = receipt_path(path)
    partial = receipt.with_name(f"{receipt.name}.{uuid.uuid4().hex}.partial")
    with partial.open("w", encoding="utf-8") as file:
        json.dump(asdict(result), file)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(receipt)


def _result(task: ShardTask, shard: Shard, counted: _Counted) -> ShardResult:
    return ShardResult(
        number=task.number,
        shard=shard._replace(name=task.path.name),
        class_counts=sorted(counted.labels.items()),
        statistics=counted.statistics.state(),
        failures=tuple(counted.failures[:MAX_NAMED_FAILURES]),
        num_failures=len(counted.failures),
    )


def _samples(task: ShardTask, counted: _Counted, tell: Tell) -> Iterator[StoredSample]:
    for position, record in enumerate(task.records, task.first):
        try:
            data, extension = _read_and_count(task, record, counted.statistics)
        except DabError:
            raise
        except ValueError as error:
            counted.failures.append(f"{record.name} ({error})")
        else:
            counted.labels[record.label] += 1
            key = f"{position:08d}" if task.existing is None else key_of(record)
            yield StoredSample(key, record.name, extension, data, record.label)
        tell(1)


def _read_and_count(task: ShardTask, record: Record, statistics: ImageStatistics) -> tuple[bytes, str]:
    data, extension = _read(task, record), record.extension
    if task.encoding is not None:
        data, extension, image = task.encoding.apply(data, extension)
        statistics.add(image)
    elif not statistics.add_file(data):
        statistics.add(decode_image(data))
    return data, extension


def _read(task: ShardTask, record: Record) -> bytes:
    try:
        data = task.read(record)
    except FileNotFoundError as error:
        raise InvalidInputError(
            f"{record.name}: {error.filename} is gone, or {socket.gethostname()} does not see it. Build again when "
            "nothing writes to the source; on a cluster all machines have to see it under the same path"
        ) from error
    except OSError as error:
        raise InvalidInputError(f"{record.name}: cannot be read: {error.strerror}") from error
    if isinstance(task.read, FileRead) and len(data) != record.num_bytes:
        raise InvalidInputError(
            f"{record.name}: {len(data)} bytes, and {record.num_bytes} when the build began, so the source is being "
            "written to. Build again when it is complete"
        )
    return data


def _index_shard(path: Path, existing: Path, samples: Iterator[StoredSample], records: tuple[Record, ...]) -> Shard:
    """Writes the index of a tar file of somebody else's; the keys are the samples' own."""
    mtime_ns = existing.stat().st_mtime_ns  # before anything is read, so that what is written to it later shows
    columns = IndexColumns()
    places = {record.name: record.place for record in records}
    for sample in samples:
        place = places[sample.name]
        if place is None:
            raise ValueError(f"{sample.name} lies in no shard")
        columns.add(sample.key, sample.name, place[1], len(sample.data), sample.label)
    shard = columns.write(path, existing.stat().st_size, file_sha256(existing))
    return shard._replace(url=str(existing), mtime_ns=mtime_ns)
