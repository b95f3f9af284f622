"""`dab doctor`: what is wrong with this installation, and what to do about it. It starts and changes nothing.

Each check looks at one thing and decides by a function of what it found. A package that cannot be imported is a finding
like any other, so nothing beyond the standard library is imported before its own check. Left out: clusters elsewhere.
"""

import os
import re
import shutil
import sqlite3
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from orchestrator.home import home_path
from orchestrator.output import DabError, Report, Table, View
from orchestrator.provenance import PROGRAM_ROOT

if TYPE_CHECKING:
    from dabnn.machine import Devices

Status = Literal["ok", "warning", "problem"]

_MIN_PYTHON = (3, 11)
_FEW_BYTES, _FEWEST_BYTES = 10 * 10**9, 10**9
# Ray's object store of 200 MB, and a batch or two of each loader.
_SHARED_BYTES, _FEWEST_SHARED_BYTES = 10**9, 256 * 10**6
_SETUP = "`make setup` installs what requirements.lock pins."
_STYLES = {"ok": "", "warning": "yellow", "problem": "red"}


@dataclass(frozen=True)
class Check:
    """One thing that was looked at.

    Attributes:
        name: What.
        status: `ok`; `warning`, it works with a drawback; `problem`, something does not work.
        detail: What was found.
        advice: What to do; empty where nothing is to be done.
    """

    name: str
    status: Status
    detail: str
    advice: str = ""


def doctor() -> tuple[bool, View]:
    """Return whether no problem was found, and what was."""
    checks = examine()
    is_ok = all(check.status != "problem" for check in checks)
    table = Table(
        ["status", "check", "found"],
        [[check.status, check.name, check.detail] for check in checks],
        [_STYLES[check.status] for check in checks],
    )
    advice = [f"{check.name}: {check.advice}" for check in checks if check.advice]
    counts = {status: sum(check.status == status for check in checks) for status in ("problem", "warning")}
    last = ", ".join(f"{count} {status}{'' if count == 1 else 's'}" for status, count in counts.items())
    text = Report([table, *(["", *advice] if advice else []), "", last])
    return is_ok, ({"ok": is_ok, "checks": [asdict(check) for check in checks]}, text)


def examine() -> list[Check]:
    """Look at everything, in the order in which a person would put it right."""
    looks: dict[str, Callable[[], list[Check]]] = {
        "python": lambda: [judge_python(sys.version_info[:3])],
        "packages": lambda: [judge_packages(*installed())],
        "devices": lambda: [_look_at_devices()],
        "CPU kernels": lambda: [_look_at_cpu_kernels()],
        "GPU kernels": _look_at_gpu_kernels,
        "compiled kernels": _look_at_compiled,
        "store": lambda: [_look_at_store()],
        "sockets": lambda: [_look_at_sockets()],
        "shared memory": lambda: [_look_at_shared_memory()],
        "experiment tracker": lambda: [_look_at_tracker()],
        "cluster": lambda: [_look_at_cluster()],
    }
    return [check for name, look in looks.items() for check in _guarded(name, look)]


def _guarded(name: str, look: Callable[[], list[Check]]) -> list[Check]:
    try:
        return look()
    except ImportError as error:
        return [Check(name, "problem", f"could not be looked at: {error}", _SETUP)]
    except DabError as error:
        return [Check(name, "problem", str(error), "Put right first what is wrong with the store.")]


def judge_python(found: Sequence[int]) -> Check:
    """Return the check of the interpreter's version."""
    text, wanted = ".".join(map(str, found)), ".".join(map(str, _MIN_PYTHON))
    if tuple(found) < _MIN_PYTHON:
        advice = f"Install python {wanted} or newer, then `make setup PYTHON=/path/to/it`."
        return Check("python", "problem", f"{text}, and dab needs {wanted}", advice)
    return Check("python", "ok", f"{text} at {sys.executable}")


def installed() -> tuple[dict[str, str], dict[str, str | None]]:
    """Return the versions that dab was tested with, and those that are installed; None is not installed."""
    file = PROGRAM_ROOT / "requirements.in"
    lines = file.read_text(encoding="utf-8").partition("# Development.")[0].splitlines() if file.exists() else []
    matches = [re.match(r"([\w.-]+)(?:\[.*\])?==(\S+)", line) for line in lines]
    pins = {match[1]: match[2] for match in matches if match}
    return pins, {name: _version(name) for name in pins}


def judge_packages(wanted: Mapping[str, str], found: Mapping[str, str | None]) -> Check:
    """Return the check of installed packages; a build's own mark, as in 2.13.0+cu130, does not count."""
    if not wanted:
        return Check("packages", "warning", "requirements.in is not beside the program, so versions were not compared")
    missing = [name for name in wanted if found.get(name) is None]
    others = [
        f"{name} {found[name]} (tested: {pin})"
        for name, pin in wanted.items()
        if found.get(name) is not None and str(found[name]).partition("+")[0] != pin
    ]
    if missing:
        return Check("packages", "problem", f"not installed: {', '.join(missing)}", _SETUP)
    if others:
        return Check("packages", "warning", f"other versions than tested: {', '.join(others)}", _SETUP)
    return Check("packages", "ok", f"{len(wanted)} packages in the versions that dab is tested with")


def judge_devices(devices: "Devices") -> Check:
    """Return the check of GPUs: none at all is fine, one that torch cannot use is not."""
    if devices.found:
        names = ", ".join(f"{each.name} ({each.memory_bytes / 2**30:.0f} GiB)" for each in devices.found)
        return Check("devices", "ok", f"{len(devices.found)} for torch {devices.built_for}: {names}")
    if devices.has_driver and devices.built_for is None:
        advice = "Install a torch that is built for CUDA, or go on with the CPU."
        return Check("devices", "warning", "an NVIDIA driver, and a torch that is built for the CPU only", advice)
    if devices.has_driver:
        detail = f"an NVIDIA driver, but no device that torch (CUDA {devices.built_for}) can use"
        advice = "See what `nvidia-smi` says: the driver may be too old for this CUDA, or the container has no GPU."
        return Check("devices", "problem", f"{detail}. {devices.complaint}".rstrip(". "), advice)
    return Check("devices", "ok", "no GPU: everything runs on the CPU")


def judge_free(name: str, free: int, few: int, fewest: int, where: str, advice: str) -> Check:
    """Return the check of space: a problem below `fewest` bytes, a warning below `few`."""
    detail = f"{free / 1e9:,.1f} GB free in {where}"
    if free >= few:
        return Check(name, "ok", detail)
    return Check(name, "problem" if free < fewest else "warning", detail, advice)


def judge_gpu_kernels(device: str, path: str, reason: str) -> Check:
    """Return the check of the way that packed convolutions take on a GPU."""
    detail = f"{device}: {path}, since {reason}"
    if path == "tensor_core":
        return Check("GPU kernels", "ok", detail)
    advice = "Float layers may be faster on this GPU; `dab bench MODEL --device cuda` measures it."
    return Check("GPU kernels", "warning", detail, advice)


def judge_compiled(program: str, variable: str, folders: Sequence[Path], is_writable: Callable[[Path], bool]) -> Check:
    """Return the check of where `program` keeps compiled kernels: the first folder that it may write to."""
    for folder in folders:
        if is_writable(folder):
            return Check("compiled kernels", "ok", f"{program} keeps them in {folder}")
    detail = f"{program} may not write to {' or '.join(map(str, folders))}, and compiles nothing without"
    advice = f"Set the environment variable {variable} to a folder that you may write to."
    return Check("compiled kernels", "problem", detail, advice)


def judge_server(name: str, state: Literal["running", "silent", "stopped"], where: str, starts: str) -> Check:
    """Return the check of a server of ours: not running is fine, since `starts` starts it."""
    if state == "running":
        return Check(name, "ok", f"running, {where}")
    if state == "silent":
        advice = (
            "`dab cluster down` ends it; the next command that needs it starts it again. Its log is in DAB_HOME/logs."
        )
        return Check(name, "problem", "its process runs but does not answer", advice)
    return Check(name, "ok", f"not running; {starts} starts it")


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _look_at_devices() -> Check:
    from dabnn import machine

    return judge_devices(machine.devices())


def _look_at_cpu_kernels() -> Check:
    from dabnn import machine

    path = machine.cpu_kernels()
    if path.name == "reference":
        return Check("CPU kernels", "problem", path.reason, _SETUP)
    status: Status = "warning" if path.name == "popcount" else "ok"
    return Check("CPU kernels", status, f"{path.name}: {path.reason}")


def _look_at_gpu_kernels() -> list[Check]:
    from dabnn import machine

    paths = {device.name: machine.gpu_kernels(index) for index, device in enumerate(machine.devices().found)}
    checks = [judge_gpu_kernels(device, path.name, path.reason) for device, path in paths.items()]
    return checks or [
        Check("GPU kernels", "ok", f"not needed without a GPU; Triton {_version('triton') or 'is missing'}")
    ]


def _look_at_compiled() -> list[Check]:
    from dabnn import machine

    numba = judge_compiled("Numba", "NUMBA_CACHE_DIR", machine.compiled_folders(os.environ), machine.is_writable)
    if not machine.devices().found:
        return [numba]
    folder = machine.triton_folder(os.environ)
    return [numba, judge_compiled("Triton", "TRITON_CACHE_DIR", [folder], machine.is_writable)]


def _look_at_store() -> Check:
    folder = home_path()
    advice = (
        "Set the environment variable DAB_HOME to a folder that you may write to; everything that dab keeps is there."
    )
    existing = next(each for each in (folder, *folder.parents) if each.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        return Check("store", "problem", f"{existing} may not be written to (DAB_HOME is {folder})", advice)
    where = f"{folder}" if folder.exists() else f"{folder}, which the first run makes"
    more = "Free some space there, or set DAB_HOME to a folder on a larger disk: runs keep checkpoints and logs in it."
    return judge_free("store", shutil.disk_usage(existing).free, _FEW_BYTES, _FEWEST_BYTES, where, more)


def _look_at_sockets() -> Check:
    from orchestrator.cluster import session_parent

    parent = session_parent()
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        advice = "Set TMPDIR to a folder with a short path (22 bytes at most) that you may write to."
        return Check("sockets", "problem", f"{parent} may not be written to, and Ray's sockets lie there", advice)
    return Check("sockets", "ok", f"Ray's session files go to {parent}, a path short enough for its sockets")


def _look_at_shared_memory() -> Check:
    folder = Path("/dev/shm")  # noqa: S108 - Linux has it there
    if not folder.exists():
        return Check("shared memory", "ok", "no /dev/shm on this system")
    advice = "Give the container more, for example `docker run --shm-size=2g`: loaders and Ray hand over data there."
    free = shutil.disk_usage(folder).free
    return judge_free("shared memory", free, _SHARED_BYTES, _FEWEST_SHARED_BYTES, str(folder), advice)


def _look_at_tracker() -> Check:
    from orchestrator.tracking_server import tracking_status

    folder = home_path()
    if not folder.is_dir():
        return judge_server("experiment tracker", "stopped", "", "`dab submit` or `dab ui`")
    database = folder / "mlflow.db"
    if database.exists() and (complaint := _database_complaint(database)):
        advice = f"Restore {database} from a copy, or move it away: the runs' folders stay, their records begin anew."
        return Check("experiment tracker", "problem", f"{database}: {complaint}", advice)
    found = tracking_status()
    return judge_server("experiment tracker", found.state, found.uri or "", "`dab submit` or `dab ui`")


def _database_complaint(database: Path) -> str:
    """Return what is wrong with a database, read only; empty if it holds the tables of MLflow."""
    try:
        with closing(sqlite3.connect(f"{database.as_uri()}?mode=ro", uri=True, timeout=5)) as connection:
            connection.execute("SELECT count(*) FROM experiments").fetchone()
    except sqlite3.Error as error:
        return str(error)
    return ""


def _look_at_cluster() -> Check:
    from orchestrator.cluster import cluster_status

    if not home_path().is_dir():
        return judge_server("cluster", "stopped", "", "`dab submit`")
    found = cluster_status()
    where = f"{found.cluster.num_cpus} CPUs, {found.cluster.dashboard_url}" if found.cluster else ""
    return judge_server("cluster", found.state, where, "`dab submit`")
