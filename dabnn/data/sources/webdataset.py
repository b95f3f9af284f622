"""WebDataset shards that are there already: tar files of `KEY.jpg` and `KEY.cls`, which are indexed, not copied.

Where a sample has no `KEY.cls`, the number `label` or `cls` in its `KEY.json` is the label.
"""

import json
from collections.abc import Iterable, Sequence
from itertools import groupby
from pathlib import Path

from dabnn.data.images import EXTENSIONS
from dabnn.data.sources.members import Member
from dabnn.data.sources.records import FileRead, Record, Source, numbered_classes, read_at, read_lines, split_notes
from dabnn.data.sources.split_files import files_by_split, stamp_of, train_and_val
from dabnn.data.sources.tar import scan_tar
from dabnn.data.sources.tree import extension_of
from dabnn.errors import InvalidInputError

CLASS_NAMES = "classes.txt"
_MAX_LABEL_BYTES = 20
_MAX_JSON_BYTES = 2**20


def webdataset(path: Path) -> Source:
    """Lists the samples of WebDataset shards.

    Args:
        path: A folder with `train-*.tar` and `val-*.tar` (or `validation`, `valid`, `test`), or with folders of these
            names and tar files in them. The class names are the lines of `classes.txt` there; else the numbers.

    Returns:
        The source. A record's name is that of the shard and of the image in it; its place is in the shard.

    Raises:
        InvalidInputError: The shards are not there or damaged, or a sample has no image, two images, or no label.
    """
    shards, notes = train_and_val(path, ".tar")
    splits = {}
    num_passed_over = 0
    for split, files in shards.items():
        records: list[Record] = []
        for file in files:
            listed, num_others = _list_shard(path, file)
            records += listed
            num_passed_over += num_others
        splits[split] = tuple(records)
    classes = _classes(path, [record for records in splits.values() for record in records])
    if num_passed_over:
        notes = (*notes, f"{num_passed_over:,} members were passed over, which are neither images nor labels")
    num_shards = sum(len(files) for files in shards.values())
    return Source(
        name=str(path.resolve()),
        classes=classes,
        splits=splits,
        read=FileRead(path),
        format="webdataset",
        notes=(
            f"read as WebDataset: {num_shards:,} shards, {len(classes):,} classes",
            *notes,
            *split_notes(classes, splits),
        ),
        shards=shards,
        stamp=stamp_of(path, shards),
        has_class_list=(path / CLASS_NAMES).is_file(),
    )


def is_webdataset(path: Path) -> bool:
    """Tells whether a folder has training shards: tar files so named, or in a folder so named."""
    return path.is_dir() and "train" in files_by_split(path, ".tar")


def key_of(record: Record) -> str:
    """Returns the WebDataset key of a sample: the name of the image in the shard, up to the first dot."""
    member = record.name if record.place is None else record.name.removeprefix(f"{record.place[0]}/")
    return _key(member)


def label_in_json(data: bytes) -> int | None:
    """Returns the label that the text of a `KEY.json` holds, `{"label": N}` or `{"cls": N}`; None where it has none."""
    try:
        fields = json.loads(data) if len(data) <= _MAX_JSON_BYTES else None
    except (ValueError, RecursionError):
        return None
    values = [fields.get(name) for name in ("label", "cls")] if isinstance(fields, dict) else []
    found = {value for value in values if type(value) is int}
    return found.pop() if len(found) == 1 and min(found) >= 0 else None


def _key(member_name: str) -> str:
    folder, slash, file = member_name.rpartition("/")
    return f"{folder}{slash}{file.partition('.')[0]}"


def _list_shard(root: Path, file: Path) -> tuple[list[Record], int]:
    shard = file.relative_to(root).as_posix()
    records = []
    num_passed_over = 0
    files = (member for member in scan_tar(file) if not member.name.endswith("/"))
    for key, members in groupby(files, key=lambda member: _key(member.name)):
        image, label, num_others = _sample(file, key, members)
        num_passed_over += num_others
        if image is None or label is None:
            continue
        name, extension = f"{shard}/{image.name}", extension_of(image.name)
        records.append(Record(name, label, extension, image.num_bytes, (shard, image.offset)))
    if not records:
        raise InvalidInputError(f"{file}: no sample in it; samples are KEY.jpg (or another image) and KEY.cls")
    return records, num_passed_over


def _sample(file: Path, key: str, members: Iterable[Member]) -> tuple[Member | None, int | None, int]:
    images, labels, tables = [], [], []
    num_others = 0
    for member in members:
        if extension_of(member.name) in EXTENSIONS:
            images.append(member)
        elif member.name == f"{key}.cls":
            labels.append(member)
        elif member.name == f"{key}.json":
            tables.append(member)
        else:
            num_others += 1
    numbers = [_read_json(file, member) for member in tables] if images and not labels else []
    numbers = [number for number in numbers if number is not None]
    num_others += len(tables) - len(numbers)
    if not images and not labels:
        return None, None, num_others
    if len(images) != 1 or len(labels) + len(numbers) != 1:
        raise InvalidInputError(
            f"{file}: sample {key!r} has {len(images)} images and {len(labels)} labels ({key}.cls, or a number `label` "
            f"or `cls` in {key}.json), not one of each, side by side; write the shard anew"
        )
    return images[0], numbers[0] if numbers else _read_label(file, key, labels[0]), num_others


def _read_json(file: Path, member: Member) -> int | None:
    return label_in_json(read_at(file, member.offset, min(member.num_bytes, _MAX_JSON_BYTES + 1)))


def _read_label(file: Path, key: str, label: Member) -> int:
    text = read_at(file, label.offset, min(label.num_bytes, _MAX_LABEL_BYTES)).strip()
    if not text.isdigit() or label.num_bytes > _MAX_LABEL_BYTES:
        raise InvalidInputError(
            f"{file}: sample {key!r} has the label {text.decode('latin1')!r}, not the number of a class from 0"
        )
    return int(text)


def _classes(path: Path, records: Sequence[Record]) -> tuple[str, ...]:
    highest = max(records, key=lambda record: record.label)
    if not (path / CLASS_NAMES).is_file():
        return numbered_classes(highest.label, highest.name)
    classes = tuple(read_lines(path / CLASS_NAMES, "it names one class a line"))
    if highest.label >= len(classes):
        raise InvalidInputError(
            f"{path / CLASS_NAMES}: names {len(classes)} classes, and {highest.name} has the label {highest.label}; "
            "name them all, or delete the file to have numbers"
        )
    return classes
