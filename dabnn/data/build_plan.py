"""What a build will do, before it does any of it: which samples go into which shard, and how much room they take."""

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dabnn.data.encode import Encoding
from dabnn.data.shard_task import ShardTask
from dabnn.data.shards import member_bytes
from dabnn.data.sources import Record, Source, open_source
from dabnn.errors import InvalidInputError

# Raised when the same source and options would give other bytes than before.
_BUILD_VERSION = 2
# Fewer shards than this would leave nothing to shuffle, or to share out, at shard level.
_MIN_SHARDS = 8
_LABEL_BYTES = member_bytes(1)
_INDEX_BYTES_PER_SAMPLE = 128
_NUM_TRIED = 32


@dataclass(frozen=True)
class Listing:
    """Which images a dataset is built from: the arguments of `open_source`."""

    source: str
    format: str = "auto"
    val_fraction: float | None = None
    seed: int = 0
    split_lists: Path | None = None

    def open(self) -> Source:
        """Lists the images; raises `InvalidInputError` as `open_source` does."""
        options: dict[str, Any] = {key: value for key, value in vars(self).items() if key not in ("source", "format")}
        return open_source(self.source, self.format, **options)

    def options(self) -> dict[str, Any]:
        """Returns what the manifest remembers, so that the same images can be listed again."""
        lists = None if self.split_lists is None else str(self.split_lists.resolve())
        return {"format": self.format, "val_fraction": self.val_fraction, "seed": self.seed, "split_lists": lists}


@dataclass(frozen=True)
class BuildPlan:
    """A build before it begins; `plan_build` makes one.

    Attributes:
        listing: How the source was listed.
        source: What it holds.
        shard_bytes: About how large a shard becomes.
        encoding: How images are changed, or None.
        is_index_only: Whether the source is shards that only get a manifest and indexes.
        scale: Bytes that are stored for a byte of the source, as tried on a few images.
        files: Size and time of the source's own file, where it is one.
    """

    listing: Listing
    source: Source
    shard_bytes: int
    encoding: Encoding | None
    is_index_only: bool
    scale: float
    files: tuple[int, int] | None

    @property
    def num_images(self) -> int:
        """Images of all splits."""
        return sum(len(records) for records in self.source.splits.values())

    def digest(self) -> str:
        """Returns what tells this build from any other that could have been begun in the same folder."""
        from PIL import __version__ as pillow_version

        source = [self.source.name, self.source.digest, self.source.stamp, self.files]
        encoding = None if self.encoding is None else [self.encoding.stored(), pillow_version]
        plan = json.dumps([_BUILD_VERSION, source, self.shard_bytes, encoding, self.is_index_only])
        return hashlib.sha256(plan.encode()).hexdigest()

    def stored_bytes(self, records: Sequence[Record]) -> int:
        """Returns about how much room some images take in shards and indexes."""
        if self.is_index_only:
            return len(records) * _INDEX_BYTES_PER_SAMPLE
        return sum(self._sizes(records))

    def tasks(self, staging: Path) -> list[ShardTask]:
        """Returns one task a shard, which writes into a folder."""
        tasks: list[ShardTask] = []
        for split in self.source.splits:
            first = 0
            for number, (records, existing) in enumerate(self._shards(split)):
                path = staging / f"{split}-{number:06d}.tar"
                where = (len(tasks), split, path, first)
                tasks.append(ShardTask(*where, records, self.source.read, self.encoding, existing))
                first += len(records)
        return tasks

    def require_unchanged(self) -> None:
        """Lists the source once more, where that is cheap: where it is no archive.

        Raises:
            InvalidInputError: It is not what it was when the build began.
        """
        if self.files is not None:
            is_same = self.files == file_stamp(self.listing.source)
        else:
            again = self.listing.open()
            is_same = (again.digest, again.stamp) == (self.source.digest, self.source.stamp)
        if not is_same:
            raise InvalidInputError(
                f"{self.source.name}: changed while the dataset was built, so that the shards would be part old "
                "and part new. Build again when nothing writes to the source"
            )

    def _shards(self, split: str) -> Iterator[tuple[tuple[Record, ...], Path | None]]:
        if not self.is_index_only:
            records = self.source.shuffled(split)
            for block in plan_shards(self._sizes(records), self.shard_bytes):
                yield records[block.start : block.stop], None
            return
        records_of: dict[str, list[Record]] = {}
        for record in self.source.splits[split]:
            records_of.setdefault(record.place[0] if record.place else "", []).append(record)
        for name, listed in records_of.items():
            yield tuple(listed), Path(self.source.name, name).resolve()

    def _sizes(self, records: Sequence[Record]) -> list[int]:
        fixed = _LABEL_BYTES + _INDEX_BYTES_PER_SAMPLE
        return [member_bytes(int(record.num_bytes * self.scale)) + fixed for record in records]


def plan_build(listing: Listing, shard_bytes: int, encoding: Encoding | None) -> BuildPlan:
    """Lists a source and decides how it becomes shards.

    Args:
        listing: The source.
        shard_bytes: About how large a shard becomes; smaller where there would be fewer than 8 of them.
        encoding: How images are changed before they are stored, or None.

    Returns:
        The plan.

    Raises:
        InvalidInputError: The source is not laid out as it must be.
    """
    if shard_bytes < 1:
        raise InvalidInputError(f"shard_bytes: {shard_bytes}; a shard needs at least 1 byte, 64 MiB is the default")
    files = file_stamp(listing.source)
    source = listing.open()
    _check_records(source)
    scale = 1.0 if encoding is None else _encoded_scale(source, encoding)
    is_index_only = source.shards is not None and encoding is None
    return BuildPlan(listing, source, shard_bytes, encoding, is_index_only, scale, files)


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


def file_stamp(source: str) -> tuple[int, int] | None:
    """Returns size and time of a source that is a file, or None where it is not."""
    if not os.path.isfile(source):  # noqa: PTH113 - a source may be no path at all
        return None
    status = Path(source).stat()
    return status.st_size, status.st_mtime_ns


def _check_records(source: Source) -> None:
    if not source.splits.get("train"):
        raise InvalidInputError(f"{source.name}: no image to train on; the split train is empty")
    names: set[str] = set()
    for record in (record for records in source.splits.values() for record in records):
        if not 0 <= record.label < len(source.classes):
            raise InvalidInputError(
                f"{record.name}: label {record.label} is outside the {len(source.classes)} classes of {source.name}; "
                "correct it at the source"
            )
        if record.name in names:
            raise InvalidInputError(
                f"{record.name}: {source.name} lists this name twice, so an image would be counted twice, or be in "
                "both splits; rename or remove one"
            )
        names.add(record.name)
    if not source.has_class_list:
        _require_trained(source)


def _require_trained(source: Source) -> None:
    trained = {record.label for record in source.splits["train"]}
    for record in source.splits.get("val", ()):
        if record.label not in trained:
            raise InvalidInputError(
                f"{record.name}: in {source.name} val has the class {source.classes[record.label]}, of which train has "
                "no image, so no network could learn it; add training images, or take the class out of val"
            )


def _encoded_scale(source: Source, encoding: Encoding) -> float:
    """Returns by how much images grow, tried on some of them spread over the train split."""
    records = source.shuffled("train")[:_NUM_TRIED]
    before = after = 0
    for record in records:
        try:
            data, _, _ = encoding.apply(source.read(record), record.extension)
        except (OSError, ValueError):
            continue  # the build names it
        before, after = before + record.num_bytes, after + len(data)
    return after / before if before else 1.0
