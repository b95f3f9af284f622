"""Files that are named after their split: `train-00000-of-00002.parquet`, `val/shard-000001.tar`."""

import hashlib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from dabnn.errors import InvalidInputError

# Where there are several, the first is taken.
_VAL_NAMES = ("validation", "valid", "val", "test")
_SPLIT = re.compile(rf"^(train|{'|'.join(_VAL_NAMES)})(?:[-._].*)?$")


def files_by_split(path: Path, suffix: str) -> dict[str, list[Path]]:
    """Returns the files with a suffix in a folder and in the folders below it, by the split that their names tell."""
    found: dict[str, list[Path]] = {}
    for file in sorted([*path.glob(f"*{suffix}"), *path.glob(f"*/*{suffix}")]):
        folder = "" if file.parent == path else file.parent.name
        match = _SPLIT.match(folder) or _SPLIT.match(file.name.removesuffix(suffix))
        if match is not None and not file.name.startswith("."):
            found.setdefault(match[1], []).append(file)
    return found


def train_and_val(path: Path, suffix: str) -> tuple[dict[str, tuple[Path, ...]], tuple[str, ...]]:
    """Returns the files of `train` and `val`, and a sentence about each other split that is there.

    Raises:
        InvalidInputError: One of them has no files.
    """
    found = files_by_split(path, suffix)
    present = [name for name in _VAL_NAMES if name in found]
    if "train" not in found or not present:
        there = ", ".join(sorted(found)) or "neither"
        raise InvalidInputError(
            f"{path}: no training and validation images; looked for train-*{suffix} and one of "
            f"{', '.join(f'{name}-*{suffix}' for name in _VAL_NAMES)}, there and in folders so named; found {there}"
        )
    notes = tuple(f"{name} was not read: {present[0]} became val" for name in present[1:])
    return {"train": tuple(found["train"]), "val": tuple(found[present[0]])}, notes


def stamp_of(path: Path, files: Mapping[str, Sequence[Path]]) -> str:
    """Returns a text that changes when one of the files is written again."""
    listed = [(file, file.stat()) for split in files.values() for file in split]
    lines = [f"{file.relative_to(path)} {status.st_size} {status.st_mtime_ns}" for file, status in listed]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()
