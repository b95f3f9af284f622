"""The image files of a folder: what is there, before any layout gives them classes and splits."""

import hashlib
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from dabnn.data.images import EXTENSIONS
from dabnn.data.sources.records import FileRead, Record
from dabnn.errors import InvalidInputError


class Found(NamedTuple):
    """An image file: its name relative to the root with `/`, its size, and its place where it lies in an archive."""

    name: str
    num_bytes: int
    place: tuple[str, int] | None = None

    @property
    def extension(self) -> str:
        """The file's extension, in lower case, without the dot."""
        return extension_of(self.name)


@dataclass(frozen=True)
class Tree:
    """The image files below a folder or in an archive.

    Attributes:
        root: The folder or archive.
        files: The image files, sorted by name.
        folders: All folders, the empty ones too, as their names relative to the root.
        num_passed_over: Files that are no images.
        stamp: Changes when a file is written again.
        read: Reads one of the files.
    """

    root: Path
    files: tuple[Found, ...]
    folders: frozenset[str]
    num_passed_over: int
    stamp: str
    read: Callable[[Record], bytes]

    def notes(self) -> tuple[str, ...]:
        """Returns a sentence about the files that were passed over; empty where there are none."""
        if not self.num_passed_over:
            return ()
        kinds = ", ".join(sorted(EXTENSIONS))
        what = f"no images ({kinds}), hidden, or linked folders below a class"
        return (f"{self.num_passed_over:,} files were passed over, which are {what}",)


def extension_of(name: str) -> str:
    """Returns a file name's extension, in lower case, without the dot; empty where it has none."""
    return os.path.splitext(name)[1].lower().removeprefix(".")  # noqa: PTH122 - called for millions of names


def is_hidden(name: str) -> bool:
    """Tells whether a file manager wrote the file for itself: a part of its name begins with a dot, or `__MACOSX`."""
    return any(part.startswith(".") or part == "__MACOSX" for part in name.split("/"))


def list_folder(root: Path, under: Sequence[str] = ("",)) -> Tree:
    """Lists the image files below some folders of `root`.

    Linked files are read like others, and linked folders that lie directly in one of `under`, as class folders do.
    Linked folders further down are not entered: they would bring the same images twice, or lead round in a circle.

    Args:
        root: The folder.
        under: Which of its folders, relative to it; the empty name is the folder itself.

    Returns:
        The tree.

    Raises:
        InvalidInputError: A file or folder cannot be read.
    """
    files: list[Found] = []
    folders: set[str] = set()
    digest = hashlib.sha256()
    num_passed_over = 0
    waiting = list(under)
    try:
        while waiting:
            folder = waiting.pop()
            folders.add(folder)
            for entry in _listed(root / folder):
                name = f"{folder}/{entry.name}" if folder else entry.name
                if entry.is_dir(follow_symlinks=folder in under):
                    waiting += [] if entry.name.startswith(".") else [name]
                elif extension_of(entry.name) in EXTENSIONS and not entry.name.startswith("."):
                    status = entry.stat()
                    files.append(Found(name, status.st_size))
                    digest.update(os.fsencode(f"{name}\0{status.st_size}\0{status.st_mtime_ns}\n"))
                else:
                    num_passed_over += 1
    except OSError as error:
        raise InvalidInputError(
            f"{error.filename}: cannot be read: {error.strerror}; repair it, or take it out of the source"
        ) from error
    files.sort()
    return Tree(root, tuple(files), frozenset(folders), num_passed_over, digest.hexdigest(), FileRead(root))


def _listed(folder: Path) -> list[os.DirEntry[str]]:
    with os.scandir(folder) as entries:
        return sorted(entries, key=lambda entry: entry.name)
