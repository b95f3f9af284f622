"""Which layout a folder or archive has."""

from collections.abc import Callable
from pathlib import Path

from dabnn.data.sources.cifar import LAYOUTS, find_layout
from dabnn.data.sources.imagenet import TRAIN_TAR, is_imagenet12
from dabnn.data.sources.omniglot import PARTS, is_omniglot
from dabnn.data.sources.parquet import is_parquet
from dabnn.data.sources.records import SPLITS
from dabnn.data.sources.sketchy import FOLDER as SKETCHY_FOLDER
from dabnn.data.sources.tuberlin import IMAGES_PER_CLASS, NUM_CLASSES, is_tuberlin
from dabnn.data.sources.webdataset import is_webdataset
from dabnn.errors import InvalidInputError

_LOOKED_FOR = (
    "train/CLASS/IMAGE and val/CLASS/IMAGE (folder)",
    "CLASS/IMAGE (folder, with val_fraction)",
    f"{', '.join(layout.archive for layout in LAYOUTS)} or what they unpack to (cifar10, cifar100)",
    f"{NUM_CLASSES} folders, or png/ with such, of {IMAGES_PER_CLASS} PNG files (tuberlin)",
    f"{SKETCHY_FOLDER}/{{train,val}}/CLASS/IMAGE (sketchyrecognition)",
    f"train/WNID/*.JPEG or {TRAIN_TAR} (imagenet12)",
    f"{' and '.join(f'{part}.zip' for part in PARTS)} or what they unpack to (omniglot)",
    "train-*.parquet (parquet)",
    "train-*.tar or train/*.tar (webdataset)",
    "a .zip or .tar file of an image folder",
)


def recognise(path: Path) -> str:
    """Returns the format of a source that is no built-in one, from the names of files and folders alone.

    Raises:
        InvalidInputError: There is nothing at the path, or nothing that is known.
    """
    if path.is_file():
        return _recognise_file(path)
    if not path.is_dir():
        raise InvalidInputError(f"{path}: no such folder or archive; give a folder of images or builtin:digits")
    tests: dict[str, Callable[[Path], bool]] = {
        "sketchyrecognition": lambda folder: (folder / SKETCHY_FOLDER).is_dir(),
        "imagenet12": is_imagenet12,
        "omniglot": is_omniglot,
        "parquet": is_parquet,
        "webdataset": is_webdataset,
        "folder": lambda folder: any((folder / split).is_dir() for split in SPLITS),
    }
    layout = find_layout(path)
    if layout is not None:
        return layout[1].format
    for format_, test in tests.items():
        if test(path):
            return format_
    if is_tuberlin(path):
        return "tuberlin"
    if any(entry.is_dir() and not entry.name.startswith(".") for entry in path.iterdir()):
        return "folder"
    raise unknown_layout(path)


def _recognise_file(path: Path) -> str:
    layout = find_layout(path)
    if layout is not None:
        return layout[1].format
    if is_omniglot(path):
        return "omniglot"
    if path.suffix == ".parquet":
        raise InvalidInputError(f"{path}: one file of a table; give the folder that train-*.parquet lies in")
    if path.name.endswith((".zip", ".tar", ".tar.gz", ".tgz")):
        return "folder"
    raise unknown_layout(path)


def unknown_layout(path: Path) -> InvalidInputError:
    """Returns the error for a source that is nothing that is known."""
    return InvalidInputError(
        f"{path}: not laid out as anything that is known; looked for {'; '.join(_LOOKED_FOR)}. If it is one of these, "
        "say which with format"
    )
