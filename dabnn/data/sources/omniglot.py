"""Omniglot (Lake, Salakhutdinov and Tenenbaum 2015): the two official zip files, or the folders they unpack to.

A class is a character, `ALPHABET/characterNN`: 964 in `images_background`, 659 in `images_evaluation`, 1,623 in both.
Each was drawn once by each of 20 people, whose number ends the file's name, `0709_17.png`. The split is by that number,
so that nobody's hand is in both splits of an alphabet: 1 to 15 are `train`, 16 to 20 are `val`.
"""

import re
from collections.abc import Callable
from pathlib import Path

from dabnn.data.order import permutation
from dabnn.data.sources.archive import list_archive
from dabnn.data.sources.records import SPLITS, FileRead, Record, Source, require_fraction, split_notes
from dabnn.data.sources.tree import Found, Tree, list_folder
from dabnn.data.sources.zip import ZipRead
from dabnn.errors import InvalidInputError

PARTS = ("images_background", "images_evaluation")
_NUM_DRAWERS = 20
_NUM_VAL_DRAWERS = 5
_NAME = re.compile(r"^(?P<alphabet>[^/]+)/(?P<character>character\d+)/\d+_(?P<drawer>\d\d)\.png$")


def omniglot(path: Path, *, val_fraction: float | None = None, seed: int = 0) -> Source:
    """Lists Omniglot's characters, split by the person who drew them.

    Args:
        path: A folder with `images_background.zip`, `images_evaluation.zip` or what they unpack to (one of the two, or
            both), or one of the zip files.
        val_fraction: The share of the 20 people of each alphabet that become `val`, drawn at random; by default the
            last 5.
        seed: Another seed draws others.

    Returns:
        The source.

    Raises:
        InvalidInputError: The source is not laid out like this.
    """
    require_fraction(val_fraction)
    trees = [list_archive(path)] if path.is_file() else [tree for part in PARTS for tree in _part(path, part)]
    if not any(tree.files for tree in trees):
        raise InvalidInputError(
            f"{path}: no Omniglot; looked for {' and '.join(f'{part}.zip, {part}/' for part in PARTS)} with "
            "ALPHABET/characterNN/NNNN_NN.png in them"
        )
    found = sorted((_parsed(tree, file), file) for tree in trees for file in tree.files)
    classes = tuple(sorted({name for (name, _), _ in found}))
    splits = _split_by_drawer(found, classes, _val_drawers(classes, val_fraction, seed))
    how = "people 16 to 20" if val_fraction is None else f"{val_fraction:g} of the people of each alphabet, seed {seed}"
    return Source(
        name=str(path.resolve()),
        classes=classes,
        splits=splits,
        read=_reader(path, trees),
        format="omniglot",
        notes=(
            f"read as Omniglot: {len(classes):,} characters; val is what was drawn by {how}",
            *(note for tree in trees for note in tree.notes()),
            *split_notes(classes, splits),
        ),
        stamp=" ".join(tree.stamp for tree in trees),
    )


def is_omniglot(path: Path) -> bool:
    """Tells whether a path is one of the two zip files, or a folder with one of them or what they unpack to."""
    if path.is_file():
        return path.name in {f"{part}.zip" for part in PARTS}
    return any((path / part).is_dir() or (path / f"{part}.zip").is_file() for part in PARTS)


def _part(root: Path, part: str) -> list[Tree]:
    if (root / part).is_dir():
        return [list_folder(root, (part,))]
    if (root / f"{part}.zip").is_file():
        return [list_archive(root / f"{part}.zip", f"{part}.zip")]
    return []


def _reader(path: Path, trees: list[Tree]) -> Callable[[Record], bytes]:
    is_zip = any(tree.files and tree.files[0].place is not None for tree in trees)
    return ZipRead(path) if is_zip else FileRead(path)


def _parsed(tree: Tree, file: Found) -> tuple[str, int]:
    name = file.name
    for part in PARTS:
        name = name.removeprefix(f"{part}/")
    match = _NAME.match(name)
    if match is None or not 1 <= int(match["drawer"]) <= _NUM_DRAWERS:
        raise InvalidInputError(
            f"{tree.root}: {file.name} is not named ALPHABET/characterNN/NNNN_NN.png with a person from 01 to "
            f"{_NUM_DRAWERS} at its end, so it cannot be told who drew it; take it out, or give format folder"
        )
    return f"{match['alphabet']}/{match['character']}", int(match["drawer"])


def _val_drawers(classes: tuple[str, ...], val_fraction: float | None, seed: int) -> dict[str, set[int]]:
    alphabets = sorted({name.partition("/")[0] for name in classes})
    if val_fraction is None:
        last = range(_NUM_DRAWERS - _NUM_VAL_DRAWERS + 1, _NUM_DRAWERS + 1)
        return {alphabet: set(last) for alphabet in alphabets}
    num_val = min(max(round(_NUM_DRAWERS * val_fraction), 1), _NUM_DRAWERS - 1)
    return {
        alphabet: set((permutation(_NUM_DRAWERS, seed, position)[:num_val] + 1).tolist())
        for position, alphabet in enumerate(alphabets)
    }


def _split_by_drawer(
    found: list[tuple[tuple[str, int], Found]], classes: tuple[str, ...], val_drawers: dict[str, set[int]]
) -> dict[str, tuple[Record, ...]]:
    labels = {name: label for label, name in enumerate(classes)}
    splits: dict[str, list[Record]] = {split: [] for split in SPLITS}
    for (name, drawer), file in found:
        split = SPLITS[drawer in val_drawers[name.partition("/")[0]]]
        splits[split].append(Record(file.name, labels[name], file.extension, file.num_bytes, file.place))
    return {split: tuple(records) for split, records in splits.items()}
