"""The one folder that holds everything `dab` keeps on a machine, and how small records in it are written.

It holds `mlflow.db`, `artifacts/`, `storage/` (runs), `logs/` (servers), `ray_token`, and `cluster.json` and
`tracking.json`, which say what runs; `tracking.toml` and `clusters.toml` are its owner's. Ray's session files alone lie
in the system's temporary folder: the paths of its sockets may not exceed 107 bytes.
"""

import json
import os
import stat
import tempfile
from pathlib import Path
from typing import Any, Literal

from dabnn.errors import InvalidInputError


def home_path() -> Path:
    """Return the folder that DAB_HOME of the environment names (default `~/.dab`), there or not."""
    return Path(os.environ.get("DAB_HOME") or "~/.dab").expanduser().absolute()


def home() -> Path:
    """Return the folder that DAB_HOME of the environment names (default `~/.dab`), closed to other users.

    Folders that hold more than ours, as /tmp or the user's own, keep their mode.

    Raises:
        InvalidInputError: It cannot be created, is not a folder, or may not be written to.
    """
    folder = home_path()
    advice = (
        "everything that dab keeps lies there. Set the environment variable DAB_HOME to a folder that you may write to."
    )
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise InvalidInputError(f"DAB_HOME: {folder} cannot be created ({error.strerror}); {advice}") from error
    if not os.access(folder, os.W_OK | os.X_OK):
        raise InvalidInputError(f"DAB_HOME: {folder} may not be written to; {advice}")
    found, user = folder.stat(), Path.home()
    is_shared = bool(found.st_mode & stat.S_ISVTX) or folder in (user, *user.parents)
    if found.st_uid == os.getuid() and found.st_mode & 0o077 and not is_shared:
        folder.chmod(0o700)
    return folder


def home_folder(name: Literal["artifacts", "storage", "logs"]) -> Path:
    """Return the folder of that name below `home()`, created if missing."""
    folder = home() / name
    folder.mkdir(mode=0o700, exist_ok=True)
    return folder


def write_private(path: Path, text: str) -> None:
    """Write a file of mode 0600 so that a reader sees the old text or the new one, never a part."""
    descriptor, partial = tempfile.mkstemp(prefix=f".{path.name}-", dir=path.parent)  # mkstemp creates with mode 0600
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        Path(partial).replace(path)
    except BaseException:
        Path(partial).unlink(missing_ok=True)
        raise


def read_record(path: Path) -> dict[str, Any] | None:
    """Return the JSON object in a file; None if there is no such file or it does not hold one."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return None
    return record if isinstance(record, dict) else None
