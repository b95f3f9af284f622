"""Writing a file in one step: readers see the old file, the whole new one, or none."""

import os
from pathlib import Path

from dabnn.errors import DabError, InvalidInputError


def write_whole(path: Path, data: bytes) -> int:
    """Write a file in one step; an existing one is replaced.

    Returns:
        Its size in bytes.

    Raises:
        InvalidInputError: The folder does not exist, or the path is a folder.
        DabError: The file cannot be written, for example because the disk is full; no part of it is left.
    """
    if not path.parent.is_dir():
        raise InvalidInputError(f"{path}: the folder {path.parent} does not exist. Create it, or name another file.")
    if path.is_dir():
        raise InvalidInputError(f"{path}: is a folder. Name a file in it.")
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        raise DabError(
            f"{path}: {len(data):,} bytes could not be written ({error.strerror}); nothing was left behind. "
            "Free some space, or name a file elsewhere."
        ) from error
    finally:
        temporary.unlink(missing_ok=True)
    return len(data)
