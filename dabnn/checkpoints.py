"""Checkpoints: written in the background, atomically, checksummed, loaded with weights only.

A checkpoint is `step-00000120.pt` beside `step-00000120.json`. The JSON file is written last and is the commit: a
checkpoint without it, or whose checksum differs, is never chosen. File and name of the first are with the disk (or the
server of a network folder) before the second is begun, so a crash of the machine cannot leave a commit alone. Data that
was committed is never overwritten: that of a step that is saved again has a part of its checksum in its name, as in
`step-00000120-1f0e9a3b.pt`, and the commit, which names its data, is replaced when it is there. Retention
keeps the newest k, the best k, and the end of each stage. Only the last stage of a run has checkpoints that count as
best: the accuracy of a float stage says nothing about the binary network that the run is for. Checkpoints behind a URL
are listed and loaded as others are; how they come there is told in `dabnn.run_mirror`.
"""

import errno
import hashlib
import io
import json
import logging
import math
import os
import pickle
import re
import shutil
import threading
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from io import FileIO
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dabnn.data.remote import is_url, shown
from dabnn.errors import DabError, InvalidInputError
from dabnn.run_folder import RunFolder, sync_folder, write_json
from dabnn.run_store import RunStore, patiently
from dabnn.spec import CheckpointPolicy

_log = logging.getLogger(__name__)

BEST_METRIC = "val_top1"
# Without these a checkpoint says nothing of its network.
_NEEDED = ("net", "model")
_NUM_KEYS_TOLD = 6
_DATA_NAME = re.compile(r"(step-\d+)(-[0-9a-f]{8})?\.pt")
_FETCH_LIMIT_S = 120.0


@dataclass(frozen=True)
class Checkpoint:
    """One committed checkpoint.

    Attributes:
        path: The `.pt` file; in a commit file its name.
        step: Optimizer steps taken.
        epoch: Epochs finished.
        metrics: Metrics of the last finished epoch; empty for one taken in mid-epoch.
        sha256: Checksum of the file.
        num_bytes: Size of the file.
        stage: Number of the stage that it was taken in, from 1.
        num_stages: Stages of the run; 1 for a run without.
        ends_stage: Whether the stage was over.
    """

    path: str
    step: int
    epoch: int
    metrics: dict[str, float]
    sha256: str
    num_bytes: int
    stage: int = 1
    num_stages: int = 1
    ends_stage: bool = False

    @property
    def name(self) -> str:
        """Name of the file."""
        return Path(self.path).name

    @property
    def commit(self) -> Path:
        """The commit file of one on this machine."""
        return Path(self.path).with_name(f"{_stem(self.step)}.json")

    @property
    def is_deliverable(self) -> bool:
        """Whether it holds the network that the run is for: that of its last stage."""
        return self.stage == self.num_stages

    @property
    def score(self) -> float:
        """`val_top1`, or minus infinity where it was not measured or is that of an earlier stage."""
        return self.metrics.get(BEST_METRIC, -math.inf) if self.is_deliverable else -math.inf


@dataclass(frozen=True)
class Moment:
    """When a checkpoint is taken; see `Checkpoint`."""

    step: int
    epoch: int
    stage: int = 1
    num_stages: int = 1
    ends_stage: bool = False


def list_checkpoints(folder: Path | RunFolder) -> list[Checkpoint]:
    """Return the committed checkpoints of a run, oldest first; their contents are not read.

    Args:
        folder: The run's folder, or that of its checkpoints on this machine. Behind a URL, what is known of it here;
            the paths are URLs then.
    """
    if isinstance(folder, RunFolder):
        folder.refresh()
        found = list_checkpoints(folder.checkpoints)
        if folder.copy is None:
            return found
        names = [f"{folder.checkpoints.name}/{checkpoint.name}" for checkpoint in found]
        return [replace(each, path=folder.place_of(name)) for each, name in zip(found, names, strict=True)]
    found = []
    for commit in sorted(folder.glob("step-*.json")):
        try:
            entry = json.loads(commit.read_text())
        except FileNotFoundError:
            continue  # retention removed it since the folder was listed
        except json.JSONDecodeError:
            _log.warning("%s: unreadable (a crash of the machine?); this checkpoint does not count", commit)
            continue
        found.append(Checkpoint(**entry | {"path": str(commit.with_name(Path(entry["path"]).name))}))
    return found


def commit_name(name: str) -> str | None:
    """Return the name of the commit file of data of that name; None where a checkpoint's data is not named so."""
    found = _DATA_NAME.fullmatch(name)
    return None if found is None else f"{found[1]}.json"


def best_checkpoint(folder: Path | RunFolder) -> Checkpoint:
    """Return the checkpoint of the last stage with the best `val_top1`, the newest among equals.

    Args:
        folder: As for `list_checkpoints`; a folder behind a URL is looked at anew.

    Raises:
        InvalidInputError: There is none yet.
    """
    where = folder.fresh().location if isinstance(folder, RunFolder) else folder
    found = list_checkpoints(folder)
    if not found:
        raise InvalidInputError(f"{where}: no checkpoint yet. Let the run finish at least one epoch.")
    candidates = [checkpoint for checkpoint in found if checkpoint.is_deliverable]
    if not candidates:
        raise InvalidInputError(
            f"{where}: no checkpoint of the last stage yet; the newest is of stage {found[-1].stage} of "
            f"{found[-1].num_stages}, another network than the run is for. Let the last stage finish an epoch."
        )
    return max(candidates, key=lambda checkpoint: (checkpoint.score, checkpoint.step))


def stage_end(folder: RunFolder, stage: int) -> Checkpoint:
    """Return the intact checkpoint at the end of stage number `stage`, counted from 1.

    Raises:
        InvalidInputError: There is none, or its checksum differs.
    """
    for checkpoint in reversed(list_checkpoints(folder.fresh())):
        is_end = checkpoint.stage == stage and checkpoint.ends_stage
        if is_end and (is_url(checkpoint.path) or is_intact(checkpoint)):  # that of a URL is verified when it is loaded
            return checkpoint
    raise InvalidInputError(
        f"{folder.location}: the checkpoint at the end of stage {stage} is missing or damaged. Restore the file, or "
        "start the run again."
    )


def restore_point(folder: Path) -> Checkpoint | None:
    """Return the newest checkpoint whose file has the recorded checksum, or None.

    Damaged ones that are newer get the suffix `.damaged`, so that retention does not count them; the log names them.
    """
    found = list_checkpoints(folder)
    _remove_replaced(found)
    for checkpoint in reversed(found):
        if is_intact(checkpoint):
            return checkpoint
        set_aside(checkpoint)
    return None


def set_aside(checkpoint: Checkpoint) -> None:
    """Give the files of a damaged checkpoint another name, so that it does not count, and say so."""
    _log.warning("%s: damaged checkpoint (checksum differs); using the one before", checkpoint.path)
    for path in (checkpoint.commit, Path(checkpoint.path)):
        if path.exists():
            path.rename(f"{path}.damaged")


def load_state(path: str | Path) -> dict[str, Any]:
    """Load what `CheckpointWriter.save` was given, tensors on the CPU, without running any code of the file.

    Args:
        path: Path or URL of the file. It must have the checksum of the commit file beside it, if any.

    Raises:
        InvalidInputError: The file is missing or is no checkpoint, which holds `net` and `model` at least.
        DabError: It is damaged, or its store does not answer.
    """
    place = shown(str(path))
    source = io.BytesIO(_fetched(str(path))) if is_url(str(path)) else path
    try:
        if not isinstance(source, io.BytesIO):
            _check_file(Path(source))
        state = torch.load(source, map_location="cpu", weights_only=True)
    except OSError as error:
        raise InvalidInputError(f"{place}: cannot be read ({error.strerror or error}). Name another file.") from error
    except (RuntimeError, ValueError, EOFError, pickle.UnpicklingError) as error:
        raise InvalidInputError(
            f"{place} is no checkpoint of dab, or is damaged. Name a run, or a step-*.pt of its checkpoints folder."
        ) from error
    missing = [key for key in _NEEDED if not isinstance(state, dict) or key not in state]
    if missing:
        raise InvalidInputError(
            f"{place}: no checkpoint of a run: it holds {_contents(state, missing)}. Name a step-*.pt in the folder "
            "checkpoints of a run."
        )
    return dict(state)


def _fetched(url: str) -> bytes:
    """Return a file from a store, compared with its commit file."""
    head, _, name = url.rpartition("/")
    store = RunStore(head)
    data = patiently(lambda: store.read(name), shown(url), _FETCH_LIMIT_S)
    if data is None:
        raise InvalidInputError(f"{shown(url)}: there is no such file. Name another.")
    commit = commit_name(name)
    text = None if commit is None else patiently(lambda: store.read(commit), shown(url), _FETCH_LIMIT_S)
    _check_digest(shown(url), hashlib.sha256(data).hexdigest(), text)
    return data


def _check_file(path: Path) -> None:
    """Compare a file of this machine with its commit file, if it has one."""
    commit = commit_name(path.name)
    if commit is None or not path.with_name(commit).exists():
        return
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    _check_digest(str(path), digest, path.with_name(commit).read_bytes())


def _check_digest(place: str, digest: str, commit: bytes | None) -> None:
    try:
        entry = dict(json.loads(commit or b"{}"))
    except (ValueError, TypeError):  # torn: it commits nothing
        return
    if entry.get("path") == place.rpartition("/")[2] and entry["sha256"] != digest:
        raise DabError(
            f"{place}: damaged (its checksum is not that of {commit_name(entry['path'])}). Name another checkpoint, or "
            "restore the file."
        )


def _contents(state: object, missing: Sequence[str]) -> str:
    """Return in words what a file that is no checkpoint holds."""
    if not isinstance(state, dict):
        return f"a {type(state).__name__}"
    if not state:
        return "nothing"
    more = ["..."] if len(state) > _NUM_KEYS_TOLD else []
    return f"{', '.join([*map(str, list(state)[:_NUM_KEYS_TOLD]), *more])} and no {' or '.join(missing)}"


def weights_sha256(weights: Mapping[str, Tensor]) -> str:
    """Return the checksum of all parameters and buffers of a network, in the order of its state dictionary."""
    digest = hashlib.sha256()
    for name, tensor in weights.items():
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


class CheckpointWriter:
    """Writes checkpoints of one run in a background thread, one at a time.

    `save` copies the state and returns; the copy is written while training goes on, without Python's lock for all that
    takes time. The memory of the copy is used again, because getting it costs more than the copying. An error of the
    thread is raised by the next `save` or by `wait`, so that none is lost.
    """

    def __init__(self, folder: Path, policy: CheckpointPolicy) -> None:
        self._folder = folder
        self._policy = policy
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._copies = _Copies()
        self.is_rehearsed = False

    def rehearse(self, state: dict[str, Any]) -> None:
        """Get the memory for copies of `state`, which takes several times as long as a copy, before it matters."""
        self._copies.take(state)
        self.is_rehearsed = True

    def save(self, state: dict[str, Any], moment: Moment, metrics: dict[str, float]) -> None:
        """Start writing `state` (tensors, containers and plain values) as the checkpoint of a moment.

        Raises:
            DabError: The checkpoint before this one could not be written.
        """
        self.wait()
        snapshot = self._copies.take(state)
        arguments = (snapshot, moment, dict(metrics))
        self._thread = threading.Thread(target=self._write_guarded, args=arguments, name="checkpoint-writer")
        self._thread.start()

    def wait(self) -> None:
        """Wait for the checkpoint being written.

        Raises:
            DabError: It could not be written; says why. Earlier checkpoints are untouched.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def _write_guarded(self, state: dict[str, Any], moment: Moment, metrics: dict[str, float]) -> None:
        try:
            self._write(state, moment, metrics)
        except OSError as error:
            self._error = _write_error(self._folder, error)
        except BaseException as error:  # noqa: BLE001 - carried to the training thread, which raises it
            self._error = error

    def _write(self, state: dict[str, Any], moment: Moment, metrics: dict[str, float]) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        temporary = self._folder / f"{_stem(moment.step)}.tmp"
        try:
            with temporary.open("wb", buffering=0) as file:
                sink = _Sink(file)
                sink.save(state)
                os.fsync(file.fileno())  # older checkpoints are removed right after
            digest = sink.digest.hexdigest()
            name = self._data_name(moment.step, digest)
            temporary.replace(self._folder / name)
            sync_folder(self._folder)  # the name too must be there before the commit is
        finally:
            temporary.unlink(missing_ok=True)
        entry = Checkpoint(name, metrics=metrics, sha256=digest, num_bytes=sink.num_bytes, **asdict(moment))
        write_json(self._folder / entry.commit.name, asdict(entry), durable=True)
        self._remove_unneeded()

    def _data_name(self, step: int, digest: str) -> str:
        stem = _stem(step)
        was_committed = any((self._folder / f"{stem}.{ending}").exists() for ending in ("json", "json.damaged"))
        return f"{stem}-{digest[:8]}.pt" if was_committed else f"{stem}.pt"

    def _remove_unneeded(self) -> None:
        checkpoints = list_checkpoints(self._folder)
        _remove_replaced(checkpoints)
        for checkpoint in checkpoints:
            if checkpoint not in kept(checkpoints, self._policy):
                checkpoint.commit.unlink()
                Path(checkpoint.path).unlink(missing_ok=True)


def _stem(step: int) -> str:
    return f"step-{step:08d}"


def _remove_replaced(checkpoints: Sequence[Checkpoint]) -> None:
    """Remove data of steps that were saved again since."""
    for checkpoint in checkpoints:
        stem, folder = _stem(checkpoint.step), Path(checkpoint.path).parent
        for path in [folder / f"{stem}.pt", *folder.glob(f"{stem}-*.pt")]:
            if path.name != checkpoint.name:
                path.unlink(missing_ok=True)


def kept(checkpoints: Sequence[Checkpoint], policy: CheckpointPolicy) -> list[Checkpoint]:
    """Return those of `checkpoints` (oldest first) that `policy` keeps: the newest, the best, the end of each stage."""
    newest = checkpoints[-policy.keep_last :]
    scored = [checkpoint for checkpoint in checkpoints if checkpoint.score > -math.inf]
    best = sorted(scored, key=lambda checkpoint: (checkpoint.score, checkpoint.step), reverse=True)[: policy.keep_best]
    ends = [checkpoint for checkpoint in checkpoints if checkpoint.ends_stage and not checkpoint.is_deliverable]
    return [checkpoint for checkpoint in checkpoints if checkpoint in [*newest, *best, *ends]]


def is_intact(checkpoint: Checkpoint) -> bool:
    """Return whether the file of a checkpoint on this machine is there and has the recorded checksum."""
    path = Path(checkpoint.path)
    if not path.exists() or path.stat().st_size != checkpoint.num_bytes:
        return False
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() == checkpoint.sha256


class _Sink:
    """A file that takes the checksum of what it is given; `torch.save` holds Python's lock for none of both."""

    def __init__(self, file: FileIO) -> None:
        self._file = file
        self._error: OSError | None = None
        self.digest = hashlib.sha256()
        self.num_bytes = 0

    def save(self, state: dict[str, Any]) -> None:
        """Write a state.

        Raises:
            OSError: The file does not take it.
        """
        try:
            torch.save(state, self)  # type: ignore[arg-type] # it only writes
        except RuntimeError:
            if self._error is not None:  # torch has words of its own for it
                raise self._error from None
            raise

    def write(self, data: bytes) -> int:
        """Write all of `data`."""
        left = memoryview(data).cast("B")
        self.digest.update(left)
        self.num_bytes += len(left)
        try:
            while left:
                left = left[self._file.write(left) :]
        except OSError as error:
            self._error = error
            raise
        return len(data)

    def flush(self) -> None:
        """Do nothing: nothing is held back."""


class _Copies:
    """Copies of a state on the CPU, in memory that the next copy uses again."""

    def __init__(self) -> None:
        self._buffers: dict[tuple[Any, ...], Tensor] = {}
        self._used: dict[tuple[Any, ...], Tensor] = {}

    def take(self, state: dict[str, Any]) -> dict[str, Any]:
        """Return a copy of `state`; that of the call before is overwritten."""
        copy: dict[str, Any] = self._copy(state, ())
        if any(tensor.is_pinned() for tensor in self._used.values()):
            torch.cuda.synchronize()
        self._buffers, self._used = self._used, {}
        return copy

    def _copy(self, value: Any, place: tuple[Any, ...]) -> Any:
        if isinstance(value, torch.Tensor):
            return self._copy_tensor(value.detach(), place)
        if isinstance(value, dict):
            return {key: self._copy(item, (*place, key)) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return type(value)(self._copy(item, (*place, number)) for number, item in enumerate(value))
        return value

    def _copy_tensor(self, tensor: Tensor, place: tuple[Any, ...]) -> Tensor:
        buffer = self._buffers.get(place)
        is_same = buffer is not None and (buffer.shape, buffer.dtype, buffer.stride()) == (
            tensor.shape,
            tensor.dtype,
            tensor.stride(),
        )
        if buffer is None or not is_same:
            buffer = torch.empty_like(tensor, device="cpu", pin_memory=True) if tensor.is_cuda else tensor.clone()
        self._used[place] = buffer
        return buffer.copy_(tensor, non_blocking=True)


def _write_error(folder: Path, error: OSError) -> DabError:
    if error.errno == errno.ENOSPC:
        free_mb = shutil.disk_usage(folder).free / 1e6
        return DabError(
            f"storage: no room on disk for a checkpoint in {folder} ({free_mb:.0f} MB free). Earlier checkpoints are "
            "intact: free some space, then `dab resume` the run."
        )
    return DabError(f"storage: cannot write a checkpoint in {folder}: {error}. Earlier checkpoints are intact.")
