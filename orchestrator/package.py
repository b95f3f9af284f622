"""The code that travels with a job: the program's own Python sources and nothing else, named by their content.

The snapshot lies under DAB_HOME, so a run keeps the code it was submitted with while the checkout moves on. Ray names
the archive that it makes of it by its content too: code that a cluster has is not sent to it again. What git ignores is
left out; a new source that is not committed yet travels, as the run would fail without it.
"""

import hashlib
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

from dabnn.errors import DabError
from orchestrator.home import home
from orchestrator.provenance import PROGRAM_ROOT

ROOMS = ("dabnn", "jobs", "kernels", "orchestrator")
MAX_BYTES = 16_000_000  # ten times what the sources are; the Jobs API takes 100 MiB, compressed


@dataclass(frozen=True)
class Package:
    """The program's sources.

    Attributes:
        folder: The copy of them.
        digest: First 16 hexadecimal digits of the SHA-256 of names and contents.
        num_files: Files.
        num_bytes: Their size together.
    """

    folder: Path
    digest: str
    num_files: int
    num_bytes: int


def package(root: Path = PROGRAM_ROOT, max_bytes: int = MAX_BYTES) -> Package:
    """Return the sources as they would travel; nothing is copied yet, see `snapshot`.

    Args:
        root: Where the program lies.
        max_bytes: What is refused above.

    Raises:
        DabError: They are larger; names the largest.
    """
    digest, sizes = hashlib.sha256(), {}
    for path in sources(root):
        content = path.read_bytes()
        digest.update(str(path.relative_to(root)).encode() + b"\0" + content + b"\0")
        sizes[path] = len(content)
    total = sum(sizes.values())
    if total > max_bytes:
        largest = max(sizes, key=lambda path: sizes[path])
        raise DabError(
            f"package: the program's sources have {total:,} bytes, and {max_bytes:,} at most travel with a job; the "
            f"largest is {largest.relative_to(root)} ({sizes[largest]:,} bytes). Data does not belong among them."
        )
    name = digest.hexdigest()[:16]
    return Package(home() / "packages" / name, name, len(sizes), total)


def sources(root: Path = PROGRAM_ROOT) -> list[Path]:
    """Return the Python sources below `root` that belong to the program, in order."""
    found = sorted(path for room in ROOMS for path in (root / room).rglob("*.py"))
    known = _known_to_git(root)
    return found if known is None else [path for path in found if path in known]


def snapshot(root: Path = PROGRAM_ROOT) -> Package:
    """Return the package, its folder made if it is not there; equal sources give the same folder.

    Raises:
        DabError: The sources are too large.
    """
    parent = home() / "packages"
    parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=".partial-", dir=parent))
    try:
        for path in sources(root):
            copy = partial / path.relative_to(root)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, copy)
        made = package(partial)  # of the copy: a source may be saved at this moment
        try:
            partial.replace(made.folder)
        except OSError:
            if not made.folder.exists():  # otherwise it was there, or another submission was faster
                raise
        return made
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _known_to_git(root: Path) -> set[Path] | None:
    """Return the files that git tracks or would track; None where the program lies outside a checkout."""
    command = ["git", "-C", str(root), "ls-files", "-z", "--cached", "--others", "--exclude-standard", "--", *ROOMS]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, check=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return None
    return {root / name for name in answer.stdout.split("\0") if name} if (root / ".git").exists() else None
