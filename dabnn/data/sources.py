"""Where images come from: each source lists its samples in a fixed order and reads one image file at a time.

Knows the image-folder layout `SRC/{train,val}/CLASS/*` and the handwritten digits of scikit-learn. To add a source,
write a function that returns a `Source` and name it in `open_source`.
"""

import io
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from dabnn.choices import unknown_choice
from dabnn.data.images import EXTENSIONS
from dabnn.data.order import permutation
from dabnn.errors import InvalidInputError

FORMATS = ("auto", "folder", "digits")
BUILTIN_PREFIX = "builtin:"
SPLITS = ("train", "val")
_DIGITS_SEED = 0
_DIGITS_VAL_FRACTION = 0.2


@dataclass(frozen=True, slots=True)
class Record:
    """One image of a source: its name there, the class, its file extension in lower case, its size."""

    name: str
    label: int
    extension: str
    num_bytes: int


@dataclass(frozen=True)
class Source:
    """A set of images in classes and splits.

    Attributes:
        name: What the manifest remembers it by.
        classes: Class names, in the order of the labels.
        splits: The records of each split, in an order that depends on the source alone.
        read: Returns the image file of a record.
    """

    name: str
    classes: tuple[str, ...]
    splits: Mapping[str, tuple[Record, ...]]
    read: Callable[[Record], bytes]


def open_source(source: str, format: str = "auto") -> Source:  # noqa: A002 - the option is called --format
    """Lists the images of a source.

    Args:
        source: A folder, or `builtin:digits`.
        format: `folder`, `digits`, or `auto`: whichever `source` is.

    Returns:
        The source; images are read later, one by one.

    Raises:
        InvalidInputError: The source is not there, or not laid out as the format wants it.
    """
    if format not in FORMATS:
        raise unknown_choice("format", format, FORMATS)
    if source.startswith(BUILTIN_PREFIX) or format == "digits":
        if source != f"{BUILTIN_PREFIX}digits" or format == "folder":
            raise InvalidInputError(f"{source}: not a built-in dataset; there is {BUILTIN_PREFIX}digits")
        return digits()
    return image_folder(Path(source))


def image_folder(folder: Path) -> Source:
    """Lists an image-folder tree: `SRC/{train,val}/CLASS/*`, at any depth below a class.

    Classes are the folder names of `train`, sorted. Files with other extensions and hidden files are no samples.

    Args:
        folder: The tree's root.

    Returns:
        The source; record names are paths relative to the root.

    Raises:
        InvalidInputError: A folder is missing or empty, or `val` has a class that `train` does not have.
    """
    if not folder.is_dir():
        raise InvalidInputError(f"{folder}: no such folder; give a folder of images or {BUILTIN_PREFIX}digits")
    missing = [split for split in SPLITS if not (folder / split).is_dir()]
    if missing:
        raise InvalidInputError(
            f"{folder}: no folder {' and no folder '.join(missing)} in it; the layout is "
            f"{folder}/{{train,val}}/CLASS/IMAGE, with one folder a class"
        )
    classes = tuple(_class_folders(folder / "train"))
    for name in _class_folders(folder / "val"):
        if name not in classes:
            raise InvalidInputError(
                f"{folder / 'val' / name}: the class is not in {folder / 'train'}, so no network could learn it; add "
                "training images or remove the folder"
            )
    labels = {name: label for label, name in enumerate(classes)}
    splits = {
        split: tuple(
            record for name in _class_folders(folder / split) for record in _class_records(folder, split, name, labels)
        )
        for split in SPLITS
    }
    root = folder.resolve()
    return Source(str(root), classes, splits, lambda record: (root / record.name).read_bytes())


def _class_folders(folder: Path) -> list[str]:
    names = sorted(entry.name for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    if not names:
        raise InvalidInputError(f"{folder}: no class folder in it; the layout is {folder}/CLASS/IMAGE")
    return names


def _class_records(folder: Path, split: str, class_name: str, labels: Mapping[str, int]) -> list[Record]:
    records = []
    for parent, _, files in os.walk(folder / split / class_name):
        for file in files:
            path = Path(parent, file)
            extension = path.suffix.lower().removeprefix(".")
            if extension in EXTENSIONS and not file.startswith("."):
                name = path.relative_to(folder).as_posix()
                records.append(Record(name, labels[class_name], extension, path.stat().st_size))
    if not records:
        raise InvalidInputError(
            f"{folder / split / class_name}: no image in the class folder ({', '.join(sorted(EXTENSIONS))}); add some "
            "or remove the folder"
        )
    return sorted(records, key=lambda record: record.name)


def digits() -> Source:
    """Lists the handwritten digits that scikit-learn ships, as 8x8 gray PNG files.

    1,797 images of 10 classes (Alpaydin and Kaynak 1998), the test part of UCI "Optical Recognition of Handwritten
    Digits". Values 0 to 16 become 0 to 255. Of every class 20 % are drawn into `val` with a fixed seed.

    Returns:
        The source; a record's name is its class and its position in scikit-learn's table.
    """
    import numpy as np
    from PIL import Image
    from sklearn.datasets import load_digits

    table = load_digits()
    pixels = np.rint(table.images * (255 / 16)).astype(np.uint8)
    files: dict[str, bytes] = {}
    splits: dict[str, list[Record]] = {split: [] for split in SPLITS}
    for label in range(len(table.target_names)):
        rows = np.flatnonzero(table.target == label)
        num_val = round(len(rows) * _DIGITS_VAL_FRACTION)
        is_val = permutation(len(rows), _DIGITS_SEED, label) < num_val
        for row, val in zip(rows, is_val, strict=True):
            buffer = io.BytesIO()
            Image.fromarray(pixels[row]).save(buffer, "PNG")
            name = f"{label}/{row:04d}.png"
            files[name] = buffer.getvalue()
            splits["val" if val else "train"].append(Record(name, label, "png", len(files[name])))
    classes = tuple(str(name) for name in table.target_names)
    records = {split: tuple(listed) for split, listed in splits.items()}
    return Source(f"{BUILTIN_PREFIX}digits", classes, records, lambda record: files[record.name])
