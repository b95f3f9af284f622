"""Members of archives: names that are refused, whatever the kind of archive."""

from pathlib import Path
from typing import NamedTuple

from dabnn.errors import InvalidInputError


class Member(NamedTuple):
    """One file or folder (a name that ends in `/`) of an archive, and where its bytes lie in it."""

    name: str
    offset: int
    num_bytes: int


def safe_name(archive: Path, name: str) -> str:
    """Returns a member's name without `./`; empty for the root folder itself.

    Raises:
        InvalidInputError: The name is absolute or leads out of the archive.
    """
    parts = name.replace("\\", "/").split("/")
    if not name or name[0] in "/\\" or ".." in parts or "\0" in name or parts[0][1:] == ":":
        raise InvalidInputError(
            f"{archive}: has a member named {name!r}, which is absolute or leads out of the folder it is unpacked in. "
            "No data set needs that; get the archive from where it was published"
        )
    return "/".join(part for part in name.split("/") if part != ".")


def no_file(archive: Path, name: str) -> InvalidInputError:
    """Returns the error for a member that is neither a file nor a folder."""
    return InvalidInputError(
        f"{archive}: member {name!r} is a link, a device or something else that is no file. No data set needs that; "
        "get the archive from where it was published"
    )


def twice(archive: Path, name: str) -> InvalidInputError:
    """Returns the error for a name that two members have."""
    return InvalidInputError(
        f"{archive}: has two members named {name!r}, and only one of them can be meant; make the archive anew"
    )
