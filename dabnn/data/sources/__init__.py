"""Where images come from: each source lists its samples in a fixed order and reads one image at a time.

`open_source` recognises the layout. To add one, write a module with a function that returns a `Source`, and name it
here.
"""

from pathlib import Path

from dabnn.choices import unknown_choice
from dabnn.data.sources.digits import BUILTIN_PREFIX, digits
from dabnn.data.sources.folder import image_folder
from dabnn.data.sources.records import SPLITS, Record, Source
from dabnn.errors import InvalidInputError

__all__ = ["BUILTIN_PREFIX", "FORMATS", "SPLITS", "Record", "Source", "open_source"]

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
        return digits()
    return image_folder(Path(source), val_fraction=val_fraction, seed=seed, split_lists=split_lists)
