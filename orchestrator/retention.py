"""`dab runs gc`: what lies about that no run needs, and freeing it.

Looks at what this machine keeps (DAB_HOME) and at the folders of the runs that the tracker knows, and never at anything
else. A run that may be alive keeps everything: that is asked of its cluster, and of its own progress besides.
"""

import fcntl
import re
import shutil
import time
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from dabnn.checkpoints import commit_name, list_checkpoints
from dabnn.errors import DabError
from dabnn.run_copy import CHECKPOINTS, cache_folder, local_name
from dabnn.run_folder import RunFolder
from dabnn.run_store import RunStore, StoreAwayError, StoreError, patiently
from orchestrator import runs, tracking
from orchestrator.found_runs import folder_of
from orchestrator.home import home_path
from orchestrator.origin import FILE as ORIGIN
from orchestrator.output import Report, Table, View
from orchestrator.tracking import RunRecord

PARTIAL = "partial file"
DELETED = "deleted run"
DAMAGED = "damaged checkpoint"
PACKAGE = "package"
COPY = "copy of a run"
RAY = "state of Ray"

_OLD_S = 3600.0  # what is being written is younger
_MOVING_S = 120.0  # a loop that trains has written its progress since
_STORE_LIMIT_S = 20.0
# Temporary names of dabnn.run_folder, dabnn.checkpoints, dabnn.run_store, orchestrator.home and orchestrator.package.
_PARTIAL_NAME = re.compile(r"\..+\.[0-9]+(-[0-9]+)?|step-[0-9]+\.tmp|\..+\.json-.{8}|\.partial-.*|\.probe.*")


@dataclass(frozen=True)
class Waste:
    """Something that no run needs.

    Attributes:
        kind: What it is: one of the constants of this module.
        place: Path or URL.
        num_bytes: What is freed with it.
        run: Name of the run that it was of, or empty.
    """

    kind: str
    place: str
    num_bytes: int
    run: str = ""

    @property
    def needs_consent(self) -> bool:
        """Whether it is more than a file that nobody can use."""
        return self.kind != PARTIAL


def find_waste(records: list[RunRecord], deleted: list[RunRecord], *, now: float | None = None) -> list[Waste]:
    """Return what no run needs. What is not known to be unneeded is kept.

    Args:
        records: All runs of the tracker, with the status that their jobs give them.
        deleted: Those that were deleted there.
        now: Seconds since 1970; None is the time of the call.
    """
    now = time.time() if now is None else now
    ours = [record for record in records if "dab.folder" in record.tags]
    living = {record.run_id for record in ours if _may_live(record, now)}
    living |= {record.parent for record in ours if record.run_id in living and record.parent}
    ended = [record for record in ours if not {record.run_id, record.parent} & living]
    return [
        *_of_deleted([record for record in deleted if "dab.folder" in record.tags], records, living, now),
        *(waste for record in ended for waste in _of_ended(record, now)),
        *_of_home(now),
        *_packages(ours, now),
        *_copies([record for record in ours if record.run_id in living], now),
    ]


def collect(uri: str, *, is_dry: bool, has_consent: bool) -> View:
    """Free what no run needs, and say what and how much.

    Args:
        uri: Tracking server.
        is_dry: Free nothing.
        has_consent: Free more than old partial files.

    Raises:
        DabError: The tracker does not answer, or something cannot be removed.
    """
    records = runs.list_runs(uri)
    deleted = [runs.as_it_stands(record) for record in tracking.find_deleted_runs(uri)]
    found = find_waste(records, deleted)
    wanted = [waste for waste in found if not is_dry and (has_consent or not waste.needs_consent)]
    left = [waste for waste in found if waste not in wanted]
    free(wanted)
    data = {
        "freed": [asdict(waste) for waste in wanted],
        "freed_bytes": sum(waste.num_bytes for waste in wanted),
        "left": [asdict(waste) for waste in left],
        "left_bytes": sum(waste.num_bytes for waste in left),
    }
    return data, Report([*_lines("freed", wanted), *_lines("can be freed", left)] or ["nothing to free"])


def _lines(title: str, found: list[Waste]) -> list[str | Table]:
    if not found:
        return []
    total = sum(waste.num_bytes for waste in found)
    rows = [{"what": waste.kind, "run": waste.run, "bytes": waste.num_bytes, "where": waste.place} for waste in found]
    return [f"{title}: {total:,} bytes", Table.of(rows, ["what", "run", "bytes", "where"])]


def free(found: Iterable[Waste]) -> None:
    """Remove what `find_waste` found.

    Raises:
        DabError: Something cannot be removed; what came before it is gone.
    """
    for waste in found:
        try:
            _remove(waste.place)
        except OSError as error:
            raise DabError(f"{waste.place}: cannot be removed ({error.strerror or error}).") from error
        except StoreAwayError as error:
            raise DabError(f"{waste.place}: its store does not answer ({error}). Try again.") from error


def _remove(place: str) -> None:
    if "://" in place:
        head, _, name = place.rpartition("/")
        RunStore(head).remove(name)  # a file; of a folder, nothing
        RunStore(place).remove_all()
    elif Path(place).is_dir():
        shutil.rmtree(place)
    else:
        Path(place).unlink(missing_ok=True)


def _may_live(record: RunRecord, now: float) -> bool:
    """Whether a run may be going on, whatever the tracker and the cluster say of it."""
    return record.status not in runs.ENDED or now - float(folder_of(record).progress().get("time", 0)) < _MOVING_S


def _of_deleted(deleted: Iterable[RunRecord], others: list[RunRecord], living: set[str], now: float) -> Iterator[Waste]:
    """Yield the folders of deleted runs, but for what another run still has or names there."""
    named = [value for other in others for value in (other.tags.get("dab.folder", ""), *other.params.values())]
    for record in deleted:
        folder = folder_of(record)
        with suppress(StoreError):
            is_its_own = folder.load_json("job.json").get("run_id") == record.run_id
            is_named = any(f"{folder.location}/" in value for value in named)
            if is_its_own and not is_named and not _may_live(record, now) and record.parent not in living:
                yield Waste(DELETED, folder.location, _num_bytes(folder), record.name)


def _of_ended(record: RunRecord, now: float) -> Iterator[Waste]:
    folder = folder_of(record)
    if folder.copy is not None:
        yield from _of_ended_in_store(record, folder, now)
        return
    for path in sorted(folder.root.rglob("*")):
        if not path.is_file() or path.is_relative_to(folder.root / "trials") or not _is_old(path, now):
            continue
        commit = commit_name(path.name) if path.parent == folder.checkpoints else None
        is_alone = commit is not None and not path.with_name(commit).exists()
        if _PARTIAL_NAME.fullmatch(path.name) or is_alone:
            yield Waste(PARTIAL, str(path), path.stat().st_size, record.name)
        elif path.suffix == ".damaged":
            yield Waste(DAMAGED, str(path), path.stat().st_size, record.name)
    for name in ("ray", "tune"):
        state = folder.root / name
        if state.is_dir() and _is_old(state, now):
            yield Waste(RAY, str(state), _size(state), record.name)


def _of_ended_in_store(record: RunRecord, folder: RunFolder, now: float) -> Iterator[Waste]:
    store = RunStore(folder.location)
    try:
        there = patiently(lambda: store.entries(CHECKPOINTS), str(store), _STORE_LIMIT_S)
    except StoreError:
        return
    for name, entry in sorted(there.items()):
        commit = commit_name(name)
        is_old = entry.time is not None and now - entry.time > _OLD_S
        if commit is not None and commit not in there and is_old:
            yield Waste(PARTIAL, store.child(f"{CHECKPOINTS}/{name}"), entry.num_bytes, record.name)


def _of_home(now: float) -> Iterator[Waste]:
    """Yield what a killed command left half written in DAB_HOME itself."""
    home = home_path()
    for path in sorted([*home.glob(".*"), *(home / "packages").glob(".partial-*")]):
        if _PARTIAL_NAME.fullmatch(path.name) and _is_old(path, now):
            yield Waste(PARTIAL, str(path), _size(path))


def _packages(records: Iterable[RunRecord], now: float) -> Iterator[Waste]:
    """Yield the copies of sources that no run began with; all are kept where some run does not tell."""
    needed = set()
    for record in records:
        try:
            origin = folder_of(record).load_json(ORIGIN)
        except StoreError:
            return
        if not origin and record.status not in runs.ENDED:
            return
        needed.add(origin.get("code"))
    for folder in sorted((home_path() / "packages").glob("*")):
        if not folder.name.startswith(".") and folder.name not in needed and _is_old(folder, now):
            yield Waste(PACKAGE, str(folder), _size(folder))


def _copies(living: Iterable[RunRecord], now: float) -> Iterator[Waste]:
    """Yield what this machine has of runs behind URLs, but for what is not in their stores."""
    if not (home_path() / "storage-cache").is_dir():
        return
    needed = {local_name(record.tags["dab.folder"]) for record in living}
    for folder in sorted(cache_folder().glob("*")):
        if folder.name in needed or not _is_old(folder, now) or _is_locked(folder / "lock"):
            continue
        if not _is_unsent(folder):
            yield Waste(COPY, str(folder), _size(folder))


def _is_unsent(folder: Path) -> bool:
    """Whether a loop was killed here before all its checkpoints were in the store."""
    here = [checkpoint.commit.name for checkpoint in list_checkpoints(folder / "work" / CHECKPOINTS)]
    place = folder / "url"
    if not here or not place.exists():
        return bool(here)
    store = RunStore(place.read_text())
    try:
        there = patiently(lambda: store.entries(CHECKPOINTS), str(store), _STORE_LIMIT_S)
    except DabError:
        return True
    return max(here) > max((name for name in there if name.endswith(".json")), default="")


def _is_locked(file: Path) -> bool:
    if not file.exists():
        return False
    with file.open() as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def _is_old(path: Path, now: float) -> bool:
    """Whether nothing in a file or folder, one level deep, was written within the last hour."""
    try:
        times = [path.stat().st_mtime, *(child.stat().st_mtime for child in path.glob("*"))]
    except FileNotFoundError:
        return False
    return now - max(times) > _OLD_S


def _num_bytes(folder: RunFolder) -> int:
    if folder.copy is None:
        return _size(folder.root)
    return patiently(RunStore(folder.location).num_bytes, folder.location, _STORE_LIMIT_S)


def _size(path: Path) -> int:
    files = [path] if path.is_file() else [child for child in path.rglob("*") if child.is_file()]
    return sum(file.stat().st_size for file in files)
