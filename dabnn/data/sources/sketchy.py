"""Sketchy, recognition part: `sketchy_recognition/{train,val}/CLASS/*`, or that folder itself."""

from pathlib import Path

from dabnn.data.sources.folder import open_tree, source_of_tree
from dabnn.data.sources.records import Source
from dabnn.errors import InvalidInputError

FOLDER = "sketchy_recognition"


def sketchyrecognition(path: Path) -> Source:
    """Lists the Sketchy images for recognition, with their own split.

    Args:
        path: The folder `sketchy_recognition`, the folder it lies in, or an archive of it.

    Returns:
        The source.

    Raises:
        InvalidInputError: The source is not laid out like this.
    """
    folder = path / FOLDER if (path / FOLDER).is_dir() else path
    if folder.is_dir() and not ((folder / "train").is_dir() and (folder / "val").is_dir()):
        raise InvalidInputError(
            f"{path}: no sketchyrecognition; looked for {FOLDER}/{{train,val}}/CLASS/IMAGE and for "
            "{train,val}/CLASS/IMAGE"
        )
    return source_of_tree(open_tree(folder)).renamed(path, "sketchyrecognition")
