"""Where a run comes from: the commit of the program, whether it was changed since, and the versions that matter."""

import platform
import subprocess
from importlib.metadata import version
from pathlib import Path

PROGRAM_ROOT = Path(__file__).resolve().parent.parent

_PACKAGES = ("torch", "torchvision", "ray", "mlflow", "optuna", "numba", "triton", "webdataset")


def provenance() -> dict[str, str]:
    """Return tags: git commit and state of the checkout, Python and package versions; "unknown" outside a checkout."""
    commit = _git("rev-parse", "HEAD") or "unknown"
    tags = {"dab.git_commit": commit, "mlflow.source.git.commit": commit, "dab.python": platform.python_version()}
    if commit != "unknown":
        tags["dab.git_dirty"] = str(bool(_git("status", "--porcelain"))).lower()
    return tags | {f"dab.version.{name}": version(name) for name in _PACKAGES}


def _git(*arguments: str) -> str:
    try:
        answer = subprocess.run(
            ["git", "-C", str(PROGRAM_ROOT), *arguments], capture_output=True, text=True, check=True, timeout=10
        )
    except (OSError, subprocess.SubprocessError):
        return ""  # no git, or the program was copied without its history
    return answer.stdout.strip()
