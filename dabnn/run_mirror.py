"""Keeping a run's folder behind a URL equal to the local one that the loop writes.

Rank 0 works in a folder of its own machine. Small files follow every two seconds, checkpoints as they are committed:
the data first, then the metrics that it counts on, then the commit file. So what stands in the store is always a run
that can be continued, on any machine: an attempt begins by fetching the newest checkpoint whose checksum is right. A
store that is away is asked again while training goes on; one that refuses or is full ends the run.

A second attempt of a run may meet the first one, cut off from the cluster but still alive. `owner.json` in the store
names who may write: whoever finds another name there stops. Leaves out who looks at a run: see `dabnn.run_copy`.
"""

import fcntl
import json
import logging
import os
import shutil
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import IO

from dabnn.checkpoints import Checkpoint, is_intact, list_checkpoints, set_aside
from dabnn.errors import DabError
from dabnn.run_copy import CHECKPOINTS, machine_folder
from dabnn.run_folder import RunFolder
from dabnn.run_store import Entry, RunStore, StoreAwayError, StoreError, patiently

POLL_S = 2.0
OWNER = "owner.json"
_CONTROL = "control.json"
_PROBE = ".probe"
_LARGEST_PROBE_BYTES = 256 << 20
_TELL_EVERY_S = 30.0
_LOCK_LIMIT_S = 30.0
_HASTY_S = 15.0
_BEGIN_LIMIT_S = 240.0  # the other ranks wait meanwhile, and `torch.distributed` gives up after five minutes
_LEFT_OUT = frozenset({_CONTROL, OWNER})
_FOLDERS_LEFT_OUT = frozenset({CHECKPOINTS, "ray", "tune"})

_log = logging.getLogger(__name__)


@contextmanager
def mirroring(folder: RunFolder, *, is_main: bool, retry_s: float) -> Iterator[tuple[RunFolder, "RunMirror | None"]]:
    """Within the block rank 0 has a local folder to work in, where the run's lies behind a URL.

    Args:
        folder: The run's.
        is_main: Whether this is rank 0; the others read from the store itself.
        retry_s: How long the store may be away.

    Yields:
        The folder to work in, and what keeps the store equal to it, `RunMirror.begin` not called yet.

    Raises:
        StoreError: At the end of the block, where not everything could be brought into the store.
    """
    if folder.copy is None or not is_main:
        yield folder, None
        return
    mirror = RunMirror(folder.location, work_folder(folder).root, retry_s=retry_s)
    try:
        yield mirror.folder, mirror
    except BaseException:
        with suppress(DabError):  # the first reason counts
            mirror.close(limit_s=_HASTY_S)
        raise
    mirror.close()


def work_folder(folder: RunFolder) -> RunFolder:
    """Return the folder that rank 0 of a run works in on its machine, the run's own where that lies in no store."""
    return folder if folder.copy is None else RunFolder(machine_folder(folder.location) / "work")


class RunMirror:
    """Keeps a store equal to a local folder from `begin` to `close`.

    Args:
        url: The run's folder.
        root: The local one; what an attempt before left there is used where it is ahead of the store.
        retry_s: How long the store may be away before `problem` says so.
        poll_s: Seconds between two looks at the local folder.

    Attributes:
        problem: Why nothing is sent any more; None while all is well.
        on_wait: Called while `begin`, `settle` or `close` wait for a store that is away.
    """

    def __init__(self, url: str, root: Path, *, retry_s: float, poll_s: float = POLL_S) -> None:
        self.store = RunStore(url)
        self.folder = RunFolder(root)
        self.problem: DabError | None = None
        self.on_wait: Callable[[], object] = lambda: None
        self._retry_s, self._poll_s = retry_s, poll_s
        self._id = uuid.uuid4().hex
        self._owner: Entry | None = None
        self._closing = threading.Event()
        self._small_lock, self._checkpoint_lock = threading.Lock(), threading.Lock()
        self._sent: dict[str, tuple[int, int]] = {}
        self._committed: dict[str, tuple[str, str]] = {}  # by the name of the commit: checksum and name of the data
        self._threads: list[threading.Thread] = []
        self._lock_file: IO[str] | None = None

    def begin(self, probe_bytes: int = 0) -> None:
        """Take the store over, make store and folder equal in what the run goes on from, and begin to send.

        Args:
            probe_bytes: Size of a checkpoint: where the store has none yet, so much is written there and removed again.

        Raises:
            DabError: The store refuses, has no room for a checkpoint, does not answer for four minutes, or another
                process of this machine works in the local folder.
        """
        self._lock()
        limit_s = min(self._retry_s, _BEGIN_LIMIT_S)
        try:
            self._persist(lambda: self._take_over(probe_bytes), limit_s)
        except DabError as error:
            self.problem = error
            self._unlock()
            raise
        for work, name in ((self._send_small, "small"), (self._send_checkpoints, "checkpoints")):
            thread = threading.Thread(target=self._keep, args=(work,), name=f"mirror-{name}", daemon=True)
            thread.start()
            self._threads.append(thread)

    def settle(self) -> None:
        """Wait until the store has every committed checkpoint.

        Raises:
            StoreError: It refuses, or does not answer for `retry_s`.
        """
        if self.problem is not None:
            raise self.problem
        self._persist(self._send_checkpoints)

    def close(self, limit_s: float | None = None) -> None:
        """Send what is left and stop; the local folder is removed, as the store has everything.

        Args:
            limit_s: How long to wait for a store that is away; None is `retry_s`.

        Raises:
            StoreError: Not everything could be sent; the local folder stays, for the next attempt on this machine.
        """
        self._retry_s = self._retry_s if limit_s is None else limit_s
        self._closing.set()
        for thread in self._threads:  # one that still looks at the folder would take what is removed below for unneeded
            thread.join()
        try:
            if self._threads:
                self.settle()
                self._persist(self._send_small)
                shutil.rmtree(self.folder.root, ignore_errors=True)
        except StoreError as error:
            raise StoreError(
                f"{error} What is not in the store yet is in {self.folder.root} on {socket.gethostname()}."
            ) from error
        finally:
            self._unlock()

    def _unlock(self) -> None:
        if self._lock_file is not None:
            self._lock_file.close()

    def _persist(self, call: Callable[[], None], limit_s: float | None = None) -> None:
        told = time.monotonic()

        def tell(text: str) -> None:
            nonlocal told
            self.on_wait()
            if time.monotonic() - told >= _TELL_EVERY_S:
                told = time.monotonic()
                _log.warning("%s", text)

        patiently(call, str(self.store), self._retry_s if limit_s is None else limit_s, on_wait=tell)

    def _keep(self, work: Callable[[], None]) -> None:
        """Do `work` again and again; this is a thread of its own."""
        heard, told = time.monotonic(), 0.0
        while not self._closing.wait(self._poll_s) and self.problem is None:
            try:
                work()
                if told:
                    _log.warning("storage: %s answers again after %.0f s", self.store, time.monotonic() - heard)
                heard, told = time.monotonic(), 0.0
            except StoreAwayError as error:
                away_s = time.monotonic() - heard
                if away_s > self._retry_s:
                    self.problem = StoreError(
                        f"storage: {self.store} has not answered for {away_s:.0f} s ({error}), more than "
                        f"train.checkpoint.retry_s allows. Checkpoints wait in {self.folder.checkpoints} on "
                        f"{socket.gethostname()}; check the store, then `dab resume` the run."
                    )
                elif time.monotonic() - told >= _TELL_EVERY_S:
                    told = time.monotonic()
                    _log.warning("storage: %s does not answer (%s); training goes on, the rest is sent later",
                                 self.store, error)  # fmt: skip
            except DabError as error:
                self.problem = error
            except OSError as error:
                self.problem = DabError(f"storage: {self.folder.root} cannot be read: {error}")

    def _lock(self) -> None:
        """Take the local folder for this process; the system frees it when the process ends."""
        root = self.folder.root
        root.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._lock_file = (root.parent / "lock").open("w")
        deadline = time.monotonic() + _LOCK_LIMIT_S
        while True:
            try:
                fcntl.flock(self._lock_file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise DabError(
                        f"storage: another process of this machine works on {self.store}, in {root}. Wait for it to "
                        "end, or end it."
                    ) from None
                time.sleep(0.2)
            else:
                root.mkdir(exist_ok=True)
                return

    def _take_over(self, probe_bytes: int) -> None:
        self._claim(probe_bytes)
        self._bring()
        self._send_checkpoints()  # the other ranks load from the store what rank 0 chooses here

    def _claim(self, probe_bytes: int) -> None:
        """Write `owner.json`, and see whether a checkpoint finds room."""
        owner = {"id": self._id, "host": socket.gethostname(), "pid": os.getpid(), "time": time.time()}
        self.store.write(OWNER, json.dumps(owner).encode())
        if probe_bytes and not self.store.entries(CHECKPOINTS):
            self.store.write(_PROBE, bytes(min(probe_bytes, _LARGEST_PROBE_BYTES)))
            self.store.remove(_PROBE)
        self._owner = self.store.entries().get(OWNER)

    def _check_owner(self, found: Entry | None) -> None:
        """Stop where another attempt has taken over."""
        if found == self._owner:
            return
        data = self.store.read(OWNER)
        if data is None:
            raise StoreAwayError(f"{OWNER} is not there")
        if json.loads(data)["id"] == self._id:
            self._owner = found
            return
        raise StoreError(
            f"storage: another attempt of this run has taken over {self.store}; this one, which the cluster had lost, "
            "ends."
        )

    def _bring(self) -> None:
        """Make the local folder what the run goes on from: that of the store, or what is here if it is further."""
        root, checkpoints = self.folder.root, self.folder.checkpoints
        commits = {name for name in self.store.entries(CHECKPOINTS) if name.endswith(".json")}
        is_ahead = self._bring_lines("metrics.jsonl")
        for name in ("attempts.jsonl", "events.jsonl"):
            self._bring_lines(name)
        for checkpoint in list_checkpoints(checkpoints):
            commit = checkpoint.commit
            if commit.name not in commits and not (is_ahead and commit.name > max(commits, default="")):
                commit.unlink()
                Path(checkpoint.path).unlink(missing_ok=True)
        for name in commits:
            self.store.fetch(f"{CHECKPOINTS}/{name}", checkpoints / name)
        for name in ("result.json", "progress.json", _CONTROL):
            root.joinpath(name).unlink(missing_ok=True)
        self._take_control({name: entry for name, entry in self.store.entries().items() if name == _CONTROL})
        self._bring_newest()

    def _bring_lines(self, name: str) -> bool:
        """Have a file here that grows line by line; return whether what was here already goes on from the store's."""
        path = self.folder.root / name
        there, here = self.store.read(name) or b"", path.read_bytes() if path.exists() else b""
        if here.startswith(there):
            return True
        path.unlink(missing_ok=True)
        self.store.fetch(name, path)
        return False

    def _bring_newest(self) -> None:
        found = list_checkpoints(self.folder.checkpoints)
        newest = next((each for each in reversed(found) if self._bring_checkpoint(each)), None)
        for checkpoint in found:
            if checkpoint.ends_stage and not checkpoint.is_deliverable and checkpoint != newest:
                self._bring_checkpoint(checkpoint)

    def _bring_checkpoint(self, checkpoint: Checkpoint) -> bool:
        """Have the file of a checkpoint here; return whether it is what was written once."""
        if is_intact(checkpoint):
            return True
        path = Path(checkpoint.path)
        path.unlink(missing_ok=True)
        if self.store.fetch(f"{CHECKPOINTS}/{checkpoint.name}", path) == checkpoint.sha256:
            return True
        set_aside(checkpoint)
        return False

    def _take_control(self, found: dict[str, Entry]) -> None:
        """Hand on a stop that was asked for in the store."""
        if _CONTROL not in found:
            self.folder.control_file.unlink(missing_ok=True)
        elif not self.folder.control_file.exists():
            self.store.fetch(_CONTROL, self.folder.control_file)

    def _send_small(self) -> None:
        with self._small_lock:
            found = self.store.entries()
            self._check_owner(found.get(OWNER))
            self._take_control(found)
            for path in self._small_files():
                name = str(path.relative_to(self.folder.root))
                with suppress(FileNotFoundError):  # replaced or removed in between: the next look sees it
                    self._send_if_changed(path, name, found.get(name))

    def _send_if_changed(self, path: Path, name: str, there: Entry | None) -> None:
        stat = path.stat()
        now = (stat.st_mtime_ns, stat.st_size)
        # Only names at the top are listed; one that an older attempt overwrote has another size.
        is_other = "/" not in name and (there is None or there.num_bytes != stat.st_size)
        if self._sent.get(name) != now or is_other:
            self.store.send(path, name)
            self._sent[name] = now

    def _small_files(self) -> list[Path]:
        found = []
        for folder, folders, names in os.walk(self.folder.root):
            folders[:] = [name for name in folders if name not in _FOLDERS_LEFT_OUT and not name.startswith(".")]
            found += [Path(folder) / name for name in names if name not in _LEFT_OUT and not name.startswith(".")]
        return sorted(found)

    def _send_checkpoints(self) -> None:
        with self._checkpoint_lock:
            there = self.store.entries(CHECKPOINTS)
            here = list_checkpoints(self.folder.checkpoints)
            is_equal = True
            for checkpoint in here:
                try:
                    if self._is_to_be_sent(checkpoint, there):
                        self._send_checkpoint(checkpoint)
                except FileNotFoundError:  # retention removed it, or it was saved again: the next look sees that
                    is_equal = False
            if is_equal:
                self._remove_unneeded(here, there)

    def _is_to_be_sent(self, checkpoint: Checkpoint, there: dict[str, Entry]) -> bool:
        """Whether the store lacks it, or has what was written in that step before."""
        name, state = checkpoint.commit.name, (checkpoint.sha256, checkpoint.name)
        if name not in there:
            return True
        if self._committed.get(name) == state:
            return False
        data = self.store.read(f"{CHECKPOINTS}/{name}")
        found = {} if data is None else json.loads(data)
        if (found.get("sha256"), found.get("path")) != state:
            return True
        self._committed[name] = state
        return False

    def _send_checkpoint(self, checkpoint: Checkpoint) -> None:
        """Send the data, then what a run resumed from it would not write again, then the commit."""
        began = time.monotonic()
        self._check_owner(self.store.entries().get(OWNER))
        self.store.send(Path(checkpoint.path), f"{CHECKPOINTS}/{checkpoint.name}")
        self._send_small()
        # Not the file, which may be that of other data by now.
        commit = json.dumps(asdict(checkpoint) | {"path": checkpoint.name})
        self.store.write(f"{CHECKPOINTS}/{checkpoint.commit.name}", commit.encode())
        self._committed[checkpoint.commit.name] = (checkpoint.sha256, checkpoint.name)
        _log.info("%s is in %s (%.1f MB in %.1f s)", checkpoint.name, self.store, checkpoint.num_bytes / 1e6,
                  time.monotonic() - began)  # fmt: skip

    def _remove_unneeded(self, here: list[Checkpoint], there: dict[str, Entry]) -> None:
        """Remove from the store what is not of the checkpoints here, all of which it has; commits first."""
        kept = {name for checkpoint in here for name in (checkpoint.commit.name, checkpoint.name)}
        newest = max((checkpoint.commit.stem for checkpoint in here), default="")
        # What is newer than anything here would be that of an attempt that took over in between.
        unneeded = [name for name in there if name not in kept and name[: len(newest)] <= newest] if newest else []
        if unneeded:
            self._check_owner(self.store.entries().get(OWNER))
        for name in sorted(unneeded, key=lambda name: not name.endswith(".json")):
            self.store.remove(f"{CHECKPOINTS}/{name}")
