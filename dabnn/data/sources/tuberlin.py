"""TU-Berlin sketches (Eitz, Hays and Alexa 2012): 250 folders of 80 PNG files, as published, without a split."""

from pathlib import Path

from dabnn.data.sources.folder import open_tree, source_of_tree
from dabnn.data.sources.records import Source
from dabnn.errors import InvalidInputError

NUM_CLASSES = 250
IMAGES_PER_CLASS = 80
# 54 training and 26 validation images of the 80 of each class.
VAL_FRACTION = 26 / 80


def tuberlin(
    path: Path, *, val_fraction: float | None = None, seed: int = 0, split_lists: Path | None = None
) -> Source:
    """Lists TU-Berlin: `SRC/CLASS/*.png`, the `png` folder in `SRC`, or the zip file.

    Of each class 54 images of 80 are drawn into `train` and 26 into `val`, in this proportion where there are more or
    fewer. A source that has `train` and `val` folders keeps its own split.

    Args:
        path: The folder or the archive.
        val_fraction: Another share for `val`.
        seed: Another seed draws others.
        split_lists: A folder with `train.txt` and `val.txt`, which name the images of each split instead.

    Returns:
        The source.

    Raises:
        InvalidInputError: The source is not laid out like this.
    """
    folder = path / "png" if (path / "png").is_dir() and not (path / "train").is_dir() else path
    tree = open_tree(folder)
    if not tree.files:
        raise InvalidInputError(f"{folder}: no images; looked for CLASS/*.png, png/CLASS/*.png, or a zip file of these")
    has_own = {"train", "val"} <= tree.folders
    if val_fraction is None and split_lists is None and not has_own:
        val_fraction = VAL_FRACTION
    source = source_of_tree(tree, val_fraction=val_fraction, seed=seed, split_lists=split_lists)
    return source.renamed(path, "tuberlin")


def is_tuberlin(folder: Path) -> bool:
    """Tells whether a folder, or `png` in it, has 250 class folders with 80 PNG files each."""
    root = folder / "png" if (folder / "png").is_dir() else folder
    classes = [entry for entry in root.iterdir() if entry.is_dir() and not entry.name.startswith(".")]
    return len(classes) == NUM_CLASSES and all(
        sum(file.suffix.lower() == ".png" for file in entry.iterdir()) == IMAGES_PER_CLASS for entry in classes
    )
