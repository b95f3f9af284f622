"""The code that travels with a job: the program's own sources and nothing else, named by their content.

The snapshot lies under DAB_HOME, so a run keeps the code it was submitted with while the checkout moves on.
"""

import hashlib
import shutil
import tempfile
from pathlib import Path

from orchestrator.home import home
from orchestrator.provenance import PROGRAM_ROOT

ROOMS = ("dabnn", "jobs", "kernels", "orchestrator")


def snapshot() -> Path:
    """Return a folder with a copy of the program's Python sources; equal sources give the same folder."""
    files = sorted(path for room in ROOMS for path in (PROGRAM_ROOT / room).rglob("*.py"))
    digest = hashlib.sha256()
    for path in files:
        digest.update(str(path.relative_to(PROGRAM_ROOT)).encode() + b"\0" + path.read_bytes() + b"\0")
    target = home() / "packages" / digest.hexdigest()[:16]
    if target.exists():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=".partial-", dir=target.parent))
    for path in files:
        copy = partial / path.relative_to(PROGRAM_ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, copy)
    try:
        partial.replace(target)
    except OSError:
        shutil.rmtree(partial)
        if not target.exists():  # otherwise another submission was faster with the same content
            raise
    return target
