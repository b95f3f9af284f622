"""Image files inside tar and zip archives: listed without unpacking, read at their place. Nothing is ever written.

A compressed tar archive (`.tar.gz`) has no places to read at, and is refused, except where a layout reads it whole.
"""

import hashlib
import zipfile
from collections.abc import Callable
from pathlib import Path

from dabnn.data.images import EXTENSIONS
from dabnn.data.sources.records import FileRead, Record
from dabnn.data.sources.tar import scan_tar
from dabnn.data.sources.tree import Found, Tree, extension_of, is_hidden
from dabnn.data.sources.zip import ZipRead, scan_zip


def list_archive(path: Path, inside: str = "") -> Tree:
    """Lists the image files of a tar or zip archive.

    Args:
        path: The archive.
        inside: What `Record.place` calls it: its name relative to the source; empty where it is the source.

    Returns:
        The tree. A folder that holds everything else is taken off the names, unless it is `train` or `val`.

    Raises:
        InvalidInputError: It is no such archive, is damaged or compressed as a whole, or has members that no honest
            data set has: links, devices, absolute names, names with `..`, one name twice.
    """
    is_zip = zipfile.is_zipfile(path)
    members = list(scan_zip(path) if is_zip else scan_tar(path))
    files: list[Found] = []
    folders: set[str] = set()
    num_passed_over = 0
    for member in members:
        parents = member.name.rstrip("/").split("/")
        depth = len(parents) if member.name.endswith("/") else len(parents) - 1
        if is_hidden(member.name):
            num_passed_over += not member.name.endswith("/")
            continue
        folders.update("/".join(parents[: i + 1]) for i in range(depth))
        if extension_of(member.name) in EXTENSIONS:
            files.append(Found(member.name, member.num_bytes, (inside, member.offset)))
        elif not member.name.endswith("/"):
            num_passed_over += 1
    status = path.stat()
    stamp = hashlib.sha256(f"{path.name}\0{status.st_size}\0{status.st_mtime_ns}".encode()).hexdigest()
    root = path if not inside else path.parents[inside.count("/")]
    read: Callable[[Record], bytes] = ZipRead(root) if is_zip else FileRead(root)
    return _without_top(Tree(root, tuple(sorted(files)), frozenset(folders), num_passed_over, stamp, read))


def _without_top(tree: Tree) -> Tree:
    tops = {name.partition("/")[0] for name in tree.folders | {found.name for found in tree.files}}
    top = next(iter(tops), "")
    if len(tops) != 1 or top in ("train", "val") or not any(name.count("/") == 1 for name in tree.folders):
        return tree
    files = tuple(found._replace(name=found.name.removeprefix(f"{top}/")) for found in tree.files)
    folders = frozenset(name.removeprefix(f"{top}/") for name in tree.folders if name != top)
    return Tree(tree.root, files, folders, tree.num_passed_over, tree.stamp, tree.read)
