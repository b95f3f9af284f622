"""Where images come from: each source lists its samples in a fixed order and reads one image at a time.

`open_source` recognises the layout. To add one, write a module with a function that returns a `Source`, and name it
here.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

from dabnn.choices import unknown_choice
from dabnn.data.sources.cifar import cifar
from dabnn.data.sources.digits import BUILTIN_PREFIX, digits
from dabnn.data.sources.folder import image_folder
from dabnn.data.sources.imagenet import imagenet12
from dabnn.data.sources.omniglot import omniglot
from dabnn.data.sources.parquet import parquet
from dabnn.data.sources.recognise import recognise
from dabnn.data.sources.records import SPLITS, Record, Source, require_fraction
from dabnn.data.sources.sketchy import sketchyrecognition
from dabnn.data.sources.tuberlin import tuberlin
from dabnn.data.sources.webdataset import key_of, webdataset
from dabnn.errors import InvalidInputError

__all__ = ["BUILTIN_PREFIX", "FORMATS", "SPLITS", "Record", "Source", "key_of", "open_source"]

FORMATS = (
    "auto",
    "folder",
    "digits",
    "cifar10",
    "cifar100",
    "tuberlin",
    "sketchyrecognition",
    "imagenet12",
    "omniglot",
    "parquet",
    "webdataset",
)


def open_source(
    source: str,
    format: str = "auto",  # noqa: A002 - the option is called --format
    *,
    val_fraction: float | None = None,
    seed: int = 0,
    split_lists: Path | None = None,
) -> Source:
    """Lists the images of a source.

    Args:
        source: A folder, an archive, or `builtin:digits`.
        format: One of `FORMATS`; `auto` is whatever `source` looks like, and is told in the notes.
        val_fraction: The share of each class that becomes `val`, where the source has no `val` of its own.
        seed: Another seed draws other images into `val`.
        split_lists: A folder with `train.txt` and `val.txt`, which name the images of each split.

    Returns:
        The source; images are read later, one by one.

    Raises:
        InvalidInputError: The source is not there, or not laid out as the format wants it.
    """
    if format not in FORMATS:
        raise unknown_choice("format", format, FORMATS)
    if source.startswith(BUILTIN_PREFIX) or format == "digits":
        if source != f"{BUILTIN_PREFIX}digits" or format not in ("auto", "digits"):
            raise InvalidInputError(f"{source}: not a built-in dataset; there is {BUILTIN_PREFIX}digits")
        return _with_unused(digits(), val_fraction, split_lists)
    require_fraction(val_fraction)
    try:
        return _open(Path(source).absolute(), format, val_fraction, seed, split_lists)
    except OSError as error:
        raise InvalidInputError(f"{error.filename or source}: cannot be read: {error.strerror or error}") from error


def _open(path: Path, format_: str, val_fraction: float | None, seed: int, split_lists: Path | None) -> Source:
    if not path.exists():
        raise InvalidInputError(f"{path}: no such folder or archive; give a folder of images or {BUILTIN_PREFIX}digits")
    format_ = recognise(path) if format_ == "auto" else format_
    if format_ == "folder":
        return image_folder(path, val_fraction=val_fraction, seed=seed, split_lists=split_lists)
    if format_ == "tuberlin":
        return tuberlin(path, val_fraction=val_fraction, seed=seed, split_lists=split_lists)
    if format_ == "omniglot":
        return _with_unused(omniglot(path, val_fraction=val_fraction, seed=seed), None, split_lists)
    opened = cifar(path, format_) if format_ in ("cifar10", "cifar100") else _WITH_OWN_SPLIT[format_](path)
    return _with_unused(opened, val_fraction, split_lists)


_WITH_OWN_SPLIT: Mapping[str, Callable[[Path], Source]] = {
    "sketchyrecognition": sketchyrecognition,
    "imagenet12": imagenet12,
    "parquet": parquet,
    "webdataset": webdataset,
}


def _with_unused(source: Source, val_fraction: float | None, split_lists: Path | None) -> Source:
    asked = {"val_fraction": val_fraction, "split_lists": split_lists}
    unused = [name for name, value in asked.items() if value is not None]
    if not unused:
        return source
    note = f"{' and '.join(unused)} not used: {source.format} has a split of its own"
    return replace(source, notes=(*source.notes, note))
