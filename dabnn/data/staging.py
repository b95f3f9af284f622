"""The folder in which a build works, `DEST/.building`: one build at a time, and one that was cut off can go on.

It remembers what is being built. A build of something else finds nothing there that it could use, and begins anew.
"""

import errno
import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from dabnn.errors import DabError, InvalidInputError

STAGING_NAME = ".building"
_PLAN_NAME = "plan"
_NO_ROOM = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})


def is_no_room(error: OSError) -> bool:
    """Tells whether an error says that a disk, or a quota, is full."""
    return error.errno in _NO_ROOM


@contextmanager
def staging_folder(dest: Path, plan: str) -> Iterator[Path]:
    """Gives the folder to write into; it stays where the build is cut off with a shard finished, and is else removed.

    Args:
        dest: The dataset's folder; created if missing.
        plan: Digest of what is built; where the folder was left by a build of something else it is emptied first.

    Raises:
        DabError: Another build is at work there.
        OSError: The folder cannot be made.
    """
    staging = dest / STAGING_NAME
    staging.mkdir(parents=True, exist_ok=True)
    lock = _lock(staging, dest)
    try:
        if _stored_plan(staging) != plan:
            _empty(staging)
            (staging / _PLAN_NAME).write_text(plan)
        yield staging
    except InvalidInputError:
        shutil.rmtree(staging, ignore_errors=True)
        raise
    except OSError as error:
        if is_no_room(error):
            shutil.rmtree(staging, ignore_errors=True)
        raise
    finally:
        # Before the lock ends: the files of a build that begins then must not be removed.
        if staging.exists() and not any(staging.glob("*.finished.json")):
            shutil.rmtree(staging, ignore_errors=True)
        os.close(lock)


def _lock(staging: Path, dest: Path) -> int:
    """Returns an open descriptor of the folder; the lock ends when it is closed, or with the process."""
    descriptor = os.open(staging, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise _busy(dest) from None
    except OSError:
        pass  # some network file systems lock no folders
    if not _is_still(staging, descriptor):  # another build ended between the two calls, and removed the folder
        os.close(descriptor)
        raise _busy(dest)
    return descriptor


def _busy(dest: Path) -> DabError:
    return DabError(f"{dest}: another build is writing there; wait for its end, or stop it")


def _is_still(staging: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(staging.stat(), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _stored_plan(staging: Path) -> str | None:
    try:
        return (staging / _PLAN_NAME).read_text()
    except OSError:
        return None


def _empty(staging: Path) -> None:
    for path in staging.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()
