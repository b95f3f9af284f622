"""What a source of images is, whatever its layout: records in splits, and a function that reads one image.

Also what several layouts share: the split that is drawn here where a source has none of its own.
"""

import hashlib
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np

from dabnn.data.order import permutation, random_keys
from dabnn.errors import DabError, InvalidInputError

SPLITS = ("train", "val")
_SHUFFLE_SEED = 0
_MAX_CLASSES = 2**20
_BLOCK_LEVEL, _RECORD_LEVEL = 0, 1
# About what a reader of compressed blocks keeps in memory; see `Source.blocks`.
WINDOW_BYTES = 256 * 2**20


@dataclass(frozen=True, slots=True)
class Record:
    """One image of a source.

    Attributes:
        name: Its name there, unique in the source.
        label: Position in the source's classes.
        extension: Of the file that `Source.read` returns, in lower case, without the dot.
        num_bytes: Its size at the source: of the file; where there is none (raw pixels, rows of a table), about that.
        place: Where it lies inside an archive: the archive, relative to the source (empty: the source itself), and a
            position that the layout gives a meaning, for a tar file the byte offset. None: a file of its own.
    """

    name: str
    label: int
    extension: str
    num_bytes: int
    place: tuple[str, int] | None = None


@dataclass(frozen=True)
class Source:
    """A set of images in classes and splits.

    Attributes:
        name: What the manifest remembers it by.
        classes: Class names, in the order of the labels.
        splits: The records of each split, in an order that depends on the source alone.
        read: Returns the image file of a record. Can be pickled; opens what it needs in the process that calls it.
        format: The layout, one of `FORMATS`.
        notes: What a person should know: what was recognised, what was passed over, which classes lack images.
        shards: WebDataset shards that are there already, by split; the place of each record is then in one of them.
        blocks: Runs of records, by split, that lie in one compressed block, which a reader has to decode as a whole.
        stamp: Changes when a file of the source is written again, even with the same content: whether a build that was
            interrupted may go on. It says nothing about what the images are; `digest` does.
        has_class_list: Whether the classes come from a list that lies with the images, which may name some that `train`
            has no image of; else they are those of the images, and one that only `val` has is a mistake.
    """

    name: str
    classes: tuple[str, ...]
    splits: Mapping[str, tuple[Record, ...]]
    read: Callable[[Record], bytes]
    format: str = "folder"
    notes: tuple[str, ...] = ()
    shards: Mapping[str, tuple[Path, ...]] | None = None
    blocks: Mapping[str, tuple[range, ...]] | None = None
    stamp: str = ""
    has_class_list: bool = False

    @cached_property
    def digest(self) -> str:
        """The sha256 of the classes and of the split, name, label, extension and size of each record."""
        digest = hashlib.sha256()
        for name in self.classes:
            digest.update(os.fsencode(f"{name}\n"))
        for split, records in self.splits.items():
            for record in records:
                line = f"{split}\0{record.name}\0{record.label}\0{record.extension}\0{record.num_bytes}\n"
                digest.update(os.fsencode(line))
        return digest.hexdigest()

    def renamed(self, path: Path, format: str) -> "Source":  # noqa: A002 - as the field is called
        """Returns the same source under the path that the user gave and as the format that it was read as."""
        read_as = f"read as {format}: {len(self.classes):,} classes"
        return replace(self, name=str(path.resolve()), format=format, notes=(read_as, *self.notes))

    def shuffled(self, split: str) -> tuple[Record, ...]:
        """Returns the records in the order in which shards hold them: mixed, so that each shard has many classes.

        All are mixed with all; with `blocks`, within windows of random blocks that a reader can keep in memory.
        """
        records = self.splits[split]
        if self.blocks is None:
            return tuple(records[position] for position in permutation(len(records), _SHUFFLE_SEED))
        return tuple(records[position] for position in _shuffled_blocks(records, self.blocks[split]))


def _shuffled_blocks(records: Sequence[Record], blocks: Sequence[range]) -> Iterable[int]:
    if not blocks:
        return []
    shuffled = [blocks[position] for position in permutation(len(blocks), _SHUFFLE_SEED, _BLOCK_LEVEL)]
    sizes = [sum(records[position].num_bytes for position in block) for block in shuffled]
    ends = np.cumsum(sizes, dtype=np.int64)
    windows = (ends - sizes) // WINDOW_BYTES
    positions = np.concatenate([np.arange(block.start, block.stop) for block in shuffled])
    keys = random_keys(len(positions), _SHUFFLE_SEED, _RECORD_LEVEL)
    ordered: Iterable[int] = positions[np.lexsort((keys, np.repeat(windows, [len(b) for b in shuffled])))].tolist()
    return ordered


@dataclass(frozen=True)
class FileRead:
    """Reads an image that is a file below `root`, or that lies uncompressed in an archive there."""

    root: Path

    def __call__(self, record: Record) -> bytes:
        """Returns the image's bytes.

        Raises:
            DabError: The archive ends before they do, so that it is not the one that was listed.
        """
        if record.place is None:
            return (self.root / record.name).read_bytes()
        path = self.root / record.place[0]
        data = read_at(path, record.place[1], record.num_bytes)
        if len(data) < record.num_bytes:
            raise DabError(f"{path}: ends within {record.name}: the file was changed after it was listed; begin again")
        return data


def read_at(path: Path, offset: int, num_bytes: int) -> bytes:
    """Returns bytes of a file; fewer where the file ends before."""
    with path.open("rb", buffering=0) as file:
        parts = []
        while num_bytes > 0 and (part := os.pread(file.fileno(), num_bytes, offset)):
            parts.append(part)
            offset, num_bytes = offset + len(part), num_bytes - len(part)
    return parts[0] if len(parts) == 1 else b"".join(parts)


def read_lines(path: Path, purpose: str) -> list[str]:
    """Returns the lines of a text file that have text, without the space around it.

    Args:
        path: The file.
        purpose: What it is for, for the message.

    Raises:
        InvalidInputError: It cannot be read, or is no text.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidInputError(f"{path}: cannot be read ({error}); {purpose}") from error
    return [line.strip() for line in text.splitlines() if line.strip()]


def numbered_classes(highest: int, where: str) -> tuple[str, ...]:
    """Returns the names of classes that have numbers alone, `0` to `highest`.

    Raises:
        InvalidInputError: The number is no number of a class.
    """
    if highest >= _MAX_CLASSES:
        raise InvalidInputError(
            f"{where}: has the label {highest}; labels number the classes from 0, and more than {_MAX_CLASSES:,} are "
            "not read. Number the classes without gaps"
        )
    return tuple(str(label) for label in range(highest + 1))


def require_fraction(val_fraction: float | None) -> None:
    """Refuses a share of validation images that is no share.

    Raises:
        InvalidInputError: It is not between 0 and 1.
    """
    if val_fraction is not None and not 0 < val_fraction < 1:
        raise InvalidInputError(
            f"val_fraction: {val_fraction} is not between 0 and 1; it is the share of each class that becomes "
            "validation images, for example 0.2"
        )


def split_class(
    records: Sequence[Record], val_fraction: float, seed: int, label: int
) -> tuple[list[Record], list[Record]]:
    """Draws the validation images of one class.

    Args:
        records: The images of the class, in an order that depends on the source alone.
        val_fraction: The share of them that becomes validation images; at least one, and not all, where there are two.
        seed: Another seed draws others.
        label: The class.

    Returns:
        The training and the validation images, in the order given.
    """
    num_val = min(max(round(len(records) * val_fraction), 1), len(records) - 1)
    is_val = permutation(len(records), seed, label) < num_val
    chosen: tuple[list[Record], list[Record]] = ([], [])
    for record, val in zip(records, is_val, strict=True):
        chosen[int(val)].append(record)
    return chosen


def split_notes(classes: Sequence[str], splits: Mapping[str, Sequence[Record]]) -> tuple[str, ...]:
    """Returns a sentence about the classes of which one split alone has images; empty where there are none."""
    train, val = ({record.label for record in splits.get(split, ())} for split in SPLITS)
    if not val:
        return ()
    unmeasured = [name for label, name in enumerate(classes) if label not in val]
    unlearned = [name for label, name in enumerate(classes) if label in val and label not in train]
    sentences = {
        "have no image in val, so nothing measures them": unmeasured,
        "have images in val and none in train, so no network learns them": unlearned,
    }
    return tuple(
        f"{len(names)} of {len(classes)} classes {sentence}: {_some(names)}"
        for sentence, names in sentences.items()
        if names
    )


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
