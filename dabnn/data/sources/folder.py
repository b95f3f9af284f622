"""Image folders: `SRC/{train,val}/CLASS/*`, or `SRC/CLASS/*` of which a share is drawn into `val`."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from dabnn.data.images import EXTENSIONS
from dabnn.data.sources.archive import list_archive
from dabnn.data.sources.records import (
    SPLITS,
    Record,
    Source,
    read_lines,
    require_fraction,
    split_class,
    split_notes,
)
from dabnn.data.sources.tree import Found, Tree, list_folder
from dabnn.errors import InvalidInputError

_LISTS = "split_lists is a folder with train.txt and val.txt, which name one image a line, relative to the source"


class MissingSplitError(InvalidInputError):
    """A folder of images has no `train` or no `val`, and nothing says how to make them."""


def image_folder(
    folder: Path, *, val_fraction: float | None = None, seed: int = 0, split_lists: Path | None = None
) -> Source:
    """Lists an image folder: `SRC/{train,val}/CLASS/*`, at any depth below a class, or `SRC/CLASS/*` to be split.

    A tar or zip archive of such a folder is read as it is, without unpacking.

    Classes are the folder names of `train`, sorted. Files with other extensions and hidden files are no samples.

    Args:
        folder: The tree's root, or an archive of it.
        val_fraction: The share of each class that becomes `val`, where the source has no `val` of its own.
        seed: Another seed draws other images into `val`.
        split_lists: A folder with `train.txt` and `val.txt`, which name the images of each split instead.

    Returns:
        The source; record names are paths relative to the root.

    Raises:
        InvalidInputError: A folder is missing or empty, or `val` has a class that `train` does not have.
    """
    tree = open_tree(folder)
    return source_of_tree(tree, val_fraction=val_fraction, seed=seed, split_lists=split_lists)


def open_tree(path: Path) -> Tree:
    """Lists the image files of a folder (of its `train` and `val` alone, where it has such) or of an archive.

    Raises:
        InvalidInputError: There is no such folder or archive, or it cannot be read.
    """
    if path.is_file():
        return list_archive(path)
    if not path.is_dir():
        raise InvalidInputError(f"{path}: no such folder or archive; give a folder of images or builtin:digits")
    return list_folder(path, [split for split in SPLITS if (path / split).is_dir()] or ("",))


def source_of_tree(
    tree: Tree, *, val_fraction: float | None = None, seed: int = 0, split_lists: Path | None = None
) -> Source:
    """Gives classes and splits to image files that lie as in an image folder.

    Args:
        tree: The files.
        val_fraction: As for `image_folder`.
        seed: As for `image_folder`.
        split_lists: As for `image_folder`.

    Returns:
        The source.

    Raises:
        InvalidInputError: As for `image_folder`.
    """
    require_fraction(val_fraction)
    notes: list[str] = []
    own = [split for split in SPLITS if split in tree.folders]
    if len(own) == len(SPLITS):
        if val_fraction is not None or split_lists is not None:
            notes.append(f"{tree.root} has train and val of its own, which were taken; nothing was drawn")
        classes, splits = own_splits(tree)
        notes += loose_notes(tree, own)
    elif split_lists is not None and not own:
        classes, records = class_records(tree, "")
        splits, left_out = split_by_lists([record for listed in records for record in listed], split_lists, tree.root)
        notes += [*left_out, *loose_notes(tree, [""])]
    elif val_fraction is not None and own != ["val"]:
        parent = "".join(own)
        classes, records = class_records(tree, parent)
        splits = split_by_fraction(records, val_fraction, seed)
        notes.append(f"val was drawn from each class: {val_fraction:g} of its images, seed {seed}")
        notes += loose_notes(tree, [parent])
    else:
        raise _no_splits(tree.root, own)
    return Source(
        name=str(tree.root.resolve()),
        classes=classes,
        splits={split: tuple(records) for split, records in splits.items()},
        read=tree.read,
        notes=(*notes, *tree.notes(), *split_notes(classes, splits)),
        stamp=tree.stamp,
    )


def _no_splits(root: Path, own: Sequence[str]) -> MissingSplitError:
    missing = " and no folder ".join(split for split in SPLITS if split not in own)
    draw = "" if "val" in own else "; or set val_fraction (for example 0.2) to have val drawn from each class"
    return MissingSplitError(
        f"{root}: no folder {missing} in it; the layout is {root}/{{train,val}}/CLASS/IMAGE, with one folder a "
        f"class{draw}"
    )


def own_splits(tree: Tree) -> tuple[tuple[str, ...], dict[str, list[Record]]]:
    """Returns the classes and the records of a tree with `train/CLASS` and `val/CLASS`.

    Raises:
        InvalidInputError: There is no class, one without images, or one that only `val` has.
    """
    classes, train = class_records(tree, "train")
    for name in class_folders(tree, "val"):
        if name not in classes:
            raise InvalidInputError(
                f"{tree.root / 'val' / name}: the class is not in {tree.root / 'train'}, so no network could learn "
                "it; add training images or remove the folder"
            )
    _, val = class_records(tree, "val", {name: label for label, name in enumerate(classes)})
    return classes, {"train": [r for records in train for r in records], "val": [r for records in val for r in records]}


def class_folders(tree: Tree, parent: str) -> list[str]:
    """Returns the sorted names of the folders that lie directly in a folder of the tree.

    Raises:
        InvalidInputError: There is none.
    """
    prefix = f"{parent}/" if parent else ""
    names = sorted(
        name.removeprefix(prefix)
        for name in tree.folders
        if name.startswith(prefix) and name and "/" not in name.removeprefix(prefix)
    )
    if not names:
        folder = tree.root / parent
        raise InvalidInputError(f"{folder}: no class folder in it; the layout is {folder}/CLASS/IMAGE")
    return names


def class_records(
    tree: Tree, parent: str, labels: Mapping[str, int] | None = None
) -> tuple[tuple[str, ...], list[list[Record]]]:
    """Returns the classes whose folders lie in `parent`, and the records of each.

    Args:
        tree: The files.
        parent: A folder of the tree; empty for its root.
        labels: The label of each class; by default its position among the folders.

    Returns:
        The names of the class folders, and as many lists of records.

    Raises:
        InvalidInputError: A class folder has no image.
    """
    names = class_folders(tree, parent)
    labels = labels or {name: label for label, name in enumerate(names)}
    prefix = f"{parent}/" if parent else ""
    records: dict[str, list[Record]] = {name: [] for name in names}
    for found in tree.files:
        name, has_class, _ = found.name.removeprefix(prefix).partition("/")
        if found.name.startswith(prefix) and has_class and name in records:
            records[name].append(to_record(found, labels[name]))
    for name, listed in records.items():
        if not listed:
            raise InvalidInputError(
                f"{tree.root / parent / name}: no image in the class folder ({', '.join(sorted(EXTENSIONS))}); add "
                "some or remove the folder"
            )
    return tuple(names), [records[name] for name in names]


def loose_notes(tree: Tree, parents: Sequence[str]) -> tuple[str, ...]:
    """Returns a sentence about the images that lie beside the class folders; empty where there are none.

    Args:
        tree: The files.
        parents: The folders of the tree that the class folders lie in; the empty name is its root.
    """
    loose = [found.name for found in tree.files if not any(_is_in_class(found.name, parent) for parent in parents)]
    if not loose:
        return ()
    return (f"{len(loose):,} images lie in no class folder and were left out, the first of them is {loose[0]}",)


def _is_in_class(name: str, parent: str) -> bool:
    return "/" in name.removeprefix(f"{parent}/") and (not parent or name.startswith(f"{parent}/"))


def to_record(found: Found, label: int) -> Record:
    """Returns the record of an image file that was found."""
    return Record(found.name, label, found.extension, found.num_bytes, found.place)


def split_by_fraction(records: Iterable[Sequence[Record]], val_fraction: float, seed: int) -> dict[str, list[Record]]:
    """Draws a share of each class into `val`; a class of one image stays in `train`.

    Args:
        records: The records of each class.
        val_fraction: The share.
        seed: Another seed draws others.

    Returns:
        The records of `train` and `val`.
    """
    splits: dict[str, list[Record]] = {split: [] for split in SPLITS}
    for label, listed in enumerate(records):
        for split, chosen in zip(SPLITS, split_class(listed, val_fraction, seed, label), strict=True):
            splits[split] += chosen
    return splits


def split_by_lists(
    records: Sequence[Record], folder: Path, root: Path
) -> tuple[dict[str, list[Record]], tuple[str, ...]]:
    """Splits as `train.txt` and `val.txt` say, which name one image a line, relative to the source.

    Args:
        records: All images.
        folder: Where the lists lie.
        root: The source, for messages.

    Returns:
        The records of `train` and `val`, in the order of `records`, and a sentence about those that are in neither.

    Raises:
        InvalidInputError: A list is missing, names an image that is not there, or one that was named before.
    """
    known = {record.name for record in records}
    split_of: dict[str, str] = {}
    for split in SPLITS:
        path = folder / f"{split}.txt"
        for number, line in enumerate(read_lines(path, _LISTS), 1):
            name = line.removeprefix("./")
            if name not in known:
                raise InvalidInputError(f"{path}: line {number} names {name!r}, which is no image of {root}")
            if name in split_of:
                raise InvalidInputError(
                    f"{path}: line {number} names {name!r}, which {split_of[name]}.txt has already; an image in both "
                    "splits, or twice in one, would make every figure too good"
                )
            split_of[name] = split
    splits: dict[str, list[Record]] = {split: [] for split in SPLITS}
    for record in records:
        if record.name in split_of:
            splits[split_of[record.name]].append(record)
    num_left_out = len(known) - len(split_of)
    notes = (f"{num_left_out:,} images are in neither list and were left out",) if num_left_out else ()
    return splits, notes
