"""Building a dataset: the images of a source become shards of mixed classes, indexes, statistics and a manifest.

Everything is written into `DEST/.building` and moved into place at the end, so a build that fails or is interrupted
leaves a dataset that was there before as it was. The same source gives the same bytes. One process writes; images are
stored as they came.
"""

import errno
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from dabnn.data.images import decode_image
from dabnn.data.manifest import MANIFEST_NAME, Manifest, Shard, Split, load_manifest, write_manifest
from dabnn.data.order import permutation
from dabnn.data.shards import StoredSample, index_path, member_bytes, write_shard
from dabnn.data.sources import Record, Source, open_source
from dabnn.data.statistics import ImageStatistics
from dabnn.errors import DabError, InvalidInputError

DEFAULT_SHARD_BYTES = 64 * 2**20
STAGING_NAME = ".building"
# Fewer shards than this would leave nothing to shuffle, or to share out, at shard level.
_MIN_SHARDS = 8
_SHUFFLE_SEED = 0
_LABEL_BYTES = member_bytes(1)
_INDEX_BYTES_PER_SAMPLE = 128
_MAX_NAMED_FAILURES = 3
_NO_ROOM = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})


@dataclass
class _Progress:
    """What a build has gone through so far, over both splits."""

    total: int
    on_progress: Callable[[int, int], None] | None
    done: int = 0
    failures: list[str] = field(default_factory=list)

    def advance(self) -> None:
        self.done += 1
        if self.on_progress is not None:
            self.on_progress(self.done, self.total)


def build_dataset(
    source: str,
    dest: Path,
    *,
    format: str = "auto",  # noqa: A002 - the option is called --format
    shard_bytes: int = DEFAULT_SHARD_BYTES,
    on_progress: Callable[[int, int], None] | None = None,
) -> Manifest:
    """Builds WebDataset shards with a manifest.

    Args:
        source: A folder `SRC/{train,val}/CLASS/*`, or `builtin:digits`.
        dest: The dataset's folder: new, empty, or one built from the same source, which is then replaced.
        format: `folder`, `digits`, or `auto`.
        shard_bytes: About how large a shard becomes; smaller where there would be fewer than 8 of them.
        on_progress: Called as `on_progress(done, total)` after each image.

    Returns:
        The manifest that was written.

    Raises:
        InvalidInputError: The source is not laid out as it must be, holds images that do not decode (all are tried, and
            counted), or the destination holds something else.
        DabError: The destination cannot be written, or has no room.
    """
    dest = Path(dest)
    if shard_bytes < 1:
        raise InvalidInputError(f"shard_bytes: {shard_bytes}; a shard needs at least 1 byte, 64 MiB is the default")
    opened = open_source(source, format)
    _check_destination(dest, opened.name)
    needed = sum(_stored_bytes(record) for records in opened.splits.values() for record in records)
    try:
        with _staging_folder(dest) as staging:
            _require_room(dest, needed)
            manifest = _write_shards(opened, staging, shard_bytes, on_progress)
        _publish(manifest, staging, dest)
    except OSError as error:
        if error.errno in _NO_ROOM:
            raise _no_room(dest, needed, str(error.strerror)) from error
        raise DabError(f"{dest}: cannot be written: {error}") from error
    return manifest


def plan_shards(sizes: Sequence[int], shard_bytes: int) -> list[range]:
    """Shares out samples over shards, as evenly as whole samples go.

    Args:
        sizes: Bytes that each sample occupies in a shard.
        shard_bytes: About how large a shard may become.

    Returns:
        The positions that each shard holds, in order: at least 8 shards where there are as many samples.
    """
    num_samples = len(sizes)
    num_shards = min(num_samples, max(-(-sum(sizes) // shard_bytes), _MIN_SHARDS))
    return [range(num_samples * i // num_shards, num_samples * (i + 1) // num_shards) for i in range(num_shards)]


def _check_destination(dest: Path, source: str) -> None:
    if dest.exists() and not dest.is_dir():
        raise InvalidInputError(f"{dest}: a file, not a folder; name a new folder for the dataset")
    if (dest / MANIFEST_NAME).exists():
        existing = load_manifest(dest).source
        if existing != source:
            raise InvalidInputError(
                f"{dest}: holds a dataset built from {existing}, not from {source}, and is not overwritten; name "
                "another folder, or delete this one first"
            )
    elif dest.is_dir() and any(dest.iterdir()) and not (dest / STAGING_NAME).exists():
        raise InvalidInputError(
            f"{dest}: not empty, and holds no dataset; name a new folder, so that none of your files is overwritten"
        )


@contextmanager
def _staging_folder(dest: Path) -> Iterator[Path]:
    """Gives an empty folder to write into, and removes it when that fails or is interrupted."""
    staging = dest / STAGING_NAME
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    try:
        yield staging
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise


def _stored_bytes(record: Record) -> int:
    return member_bytes(record.num_bytes) + _LABEL_BYTES + _INDEX_BYTES_PER_SAMPLE


def _require_room(dest: Path, needed: int) -> None:
    if shutil.disk_usage(dest).free < needed:
        raise OSError(errno.ENOSPC, "the disk is too full to begin")


def _no_room(dest: Path, needed: int, reason: str) -> DabError:
    free = shutil.disk_usage(dest).free
    return DabError(
        f"{dest}: no room ({reason}): the dataset needs about {needed / 2**20:,.1f} MiB, {free / 2**20:,.1f} MiB are "
        "free. Everything that this build wrote was removed; a dataset that was there before is as it was. Free some "
        "space or name a folder on another disk"
    )


def _write_shards(
    source: Source, staging: Path, shard_bytes: int, on_progress: Callable[[int, int], None] | None
) -> Manifest:
    progress = _Progress(sum(len(records) for records in source.splits.values()), on_progress)
    statistics = ImageStatistics()
    splits = {}
    for split, records in source.splits.items():
        shuffled = [records[position] for position in permutation(len(records), _SHUFFLE_SEED)]
        shards: list[Shard] = []
        for block in plan_shards([_stored_bytes(record) for record in shuffled], shard_bytes):
            samples = _read_samples(source, split, shuffled, block, statistics, progress)
            shards.append(write_shard(staging / f"{split}-{len(shards):06d}.tar", samples))
        splits[split] = Split.of(tuple(shards))
    if progress.failures:
        raise _undecodable(progress.failures, progress.total)
    return Manifest(source.name, source.classes, statistics.summary(), splits)


def _read_samples(
    source: Source,
    split: str,
    records: Sequence[Record],
    block: range,
    statistics: ImageStatistics,
    progress: _Progress,
) -> Iterator[StoredSample]:
    for position in block:
        record = records[position]
        try:
            data = source.read(record)
            image = decode_image(data)
        except OSError as error:
            raise InvalidInputError(f"{record.name}: cannot be read: {error.strerror}") from error
        except ValueError as error:
            progress.failures.append(f"{record.name} ({error})")
        else:
            if split == "train":
                statistics.add(image)
            else:
                statistics.add_colour(image)
            yield StoredSample(f"{position:08d}", record.name, record.extension, data, record.label)
        progress.advance()


def _undecodable(failures: list[str], total: int) -> InvalidInputError:
    named = "; ".join(failures[:_MAX_NAMED_FAILURES])
    more = f"; and {len(failures) - _MAX_NAMED_FAILURES} more" if len(failures) > _MAX_NAMED_FAILURES else ""
    return InvalidInputError(
        f"{named}{more}: {len(failures)} of {total} images do not decode. Nothing was built, since a dataset that "
        "silently lacks images is not the one you measured on; repair or remove them and build again"
    )


def _publish(manifest: Manifest, staging: Path, dest: Path) -> None:
    """Moves the finished files into place; `staging` goes last, to mark the folder as ours until then."""
    if (dest / MANIFEST_NAME).exists():
        previous = load_manifest(dest)
        (dest / MANIFEST_NAME).unlink()
        for split in previous.splits.values():
            for shard in split.shards:
                (dest / shard.name).unlink(missing_ok=True)
                index_path(dest / shard.name).unlink(missing_ok=True)
    for path in staging.iterdir():
        path.replace(dest / path.name)
    write_manifest(dest, manifest)
    staging.rmdir()
