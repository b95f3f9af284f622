"""Run the training loop on the workers of a Ray cluster, attempt by attempt, or in this process without workers.

Before each attempt it is decided where the workers go and those nodes are looked at (`jobs.preflight`); then Ray Train
starts and supervises them (`jobs.workers`). What fails is tried again from the last checkpoint, if `jobs.failures`
says so. A run with `cluster.min_workers` goes on with fewer workers while nodes are gone, and takes a checkpoint and
begins again with more when there is room: the samples of each step are the same on any number of workers.
"""

import itertools
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

from ray.exceptions import RayError

from dabnn.errors import DabError
from dabnn.observer import LeavingError, Observer
from dabnn.run_folder import RunFolder
from dabnn.spec import TrainSpec
from jobs.growth import forget_wish, leave_wish
from jobs.nodes import Seen, seen
from jobs.preflight import Wanted, look_at, wait_for_store
from jobs.system_metrics import sampling
from orchestrator.capacity import Needs, Node, num_places, shortage
from orchestrator.config import Config
from orchestrator.config_sections import Cluster as ClusterConfig
from orchestrator.failure import Action
from orchestrator.placement import choose, returned
from orchestrator.story import begun, message

if TYPE_CHECKING:
    from jobs.failures import Judge

Tell = Callable[[str], None]

_POLL_S = 0.5
_TELL_EVERY_S = 30.0
_SETTLE_S = 5.0  # how long a run waits for all its workers' places before it takes what there is
_RETURN_S = 600.0  # how long a run that has begun waits for nodes that are gone
_SHUNNED_S = 120.0  # how long a node with a problem is left out of later attempts
_GROW_POLL_S = 2.0
_GROW_SETTLE_S = 5.0
_GROW_INTERVAL_S = 30.0  # a restart takes some of this; more seldom than that
_PIXEL_BYTES = 4


def launch(
    spec: TrainSpec,
    folder: RunFolder,
    config: Config,
    name: str,
    *,
    tracking_uri: str = "",
    tell: Tell = lambda _: None,
) -> dict[str, Any]:
    """Train on the cluster and return the result that the loop left in `folder`.

    Args:
        spec: The run.
        folder: The run's folder, on storage that every node sees.
        config: The configuration that `spec` was made of.
        name: Unique name for Ray: a name used before would make Ray continue that run's state.
        tracking_uri: MLflow server that the nodes must reach; empty if none.
        tell: Told what happens, for the job's log.

    Raises:
        DabError: The cluster cannot hold the workers, a node lacks something, or it was given up after failures.
    """
    wait_for_store(folder, spec.checkpoint.retry_s, tell)
    folder.forget_result()
    if not config.cluster.num_workers:
        return _train_watched(spec, folder, config)
    if not config.cluster.wait:
        check_capacity(config.cluster)
    return _Attempts(spec, folder, config, name, tracking_uri, tell).run()


def train_here(
    spec: TrainSpec,
    folder: RunFolder,
    cluster: ClusterConfig,
    observer: Observer | None = None,
    *,
    system_metrics_s: float = 0.0,
) -> None:
    """Run the loop in this process, on the CPU or the GPU that Ray gave it, and look at it from this thread.

    Args:
        spec: The run.
        folder: The run's folder.
        cluster: What the process was given.
        observer: Told about each finished epoch.
        system_metrics_s: Seconds between two samples of the machine's load; 0 for none.

    Raises:
        HangError: It hangs; its thread is left behind, to be ended with the process.
    """
    import torch

    from dabnn.distributed import World
    from dabnn.train import train
    from dabnn.watch import WorkerWatch, hang_limit_s, watched

    watch = WorkerWatch(folder, 0, socket.gethostname(), hang_s=hang_limit_s(cluster.hang_s, spec))

    def loop() -> None:
        torch.set_num_threads(max(1, int(cluster.cpus_per_worker)))
        world = World.current("cuda" if cluster.gpus_per_worker else "cpu")
        train(spec, folder, world=world, observer=observer, watch=watch)

    with sampling(folder, system_metrics_s):
        watched(loop, watch)


def _train_watched(spec: TrainSpec, folder: RunFolder, config: Config) -> dict[str, Any]:
    """Train in this process, whose main thread this must be, and return the result."""
    from dabnn.watch import heed_sigterm

    heed_sigterm()
    try:
        train_here(spec, folder, config.cluster, system_metrics_s=config.tracking.system_metrics_s)
    except LeavingError:
        return _stopped(folder, "told to end (SIGTERM) and saved a checkpoint; `dab resume` goes on from it")
    return _result(folder)


def check_capacity(cluster: ClusterConfig) -> None:
    """Refuse more workers than the cluster could ever place: Ray would wait for ever.

    Raises:
        DabError: Says what is needed and what each node has.
    """
    short = shortage(Needs.of(cluster), seen().total, "the cluster")
    if short:
        raise DabError(f"{short} Ask for fewer workers or add nodes, or set cluster.wait to wait for them.")


class _Attempts:
    """The attempts of one call of `launch`."""

    def __init__(
        self, spec: TrainSpec, folder: RunFolder, config: Config, name: str, tracking_uri: str, tell: Tell
    ) -> None:
        self.spec, self.folder, self.cluster, self.name, self.tell = spec, folder, config.cluster, name, tell
        self.config, self.needs = config, Needs.of(config.cluster)
        self.wanted = _wanted(spec, config.cluster, tracking_uri)
        self.shunned: dict[str, float] = {}
        self.unsound_since = 0.0

    def run(self) -> dict[str, Any]:
        """Return the result of the last attempt."""
        for number in itertools.count(1):
            found = self._find_places()
            if found is None:
                return _stopped(self.folder, "stopped by request while it waited for room")
            places, nodes = found
            if wait_for_store(self.folder, self.spec.checkpoint.retry_s, self.tell):
                continue  # somebody else may have the places by now
            if not self._are_sound(places, nodes):
                continue
            if len(places) < self.cluster.num_workers:
                self.tell(
                    f"training on {len(places)} of {self.cluster.num_workers} workers, as long as there is no room"
                )
            ended = self._try(places, self.name if number == 1 else f"{self.name}-{number}")
            if ended:
                return ended
        raise AssertionError("attempts are counted for ever")

    def _find_places(self) -> tuple[list[str], Seen] | None:
        """Wait for room; return the nodes' ids, one entry a worker, and the nodes; None when the run is to stop."""
        began, told_at = time.monotonic(), time.monotonic()
        while not self.folder.is_stop_requested():
            waited_s = time.monotonic() - began
            nodes = seen(self._shunned())
            places = most(self.needs, nodes.free)
            could_hold = min(self.cluster.num_workers, num_places(self.needs, nodes.total))
            if len(places) >= self.needs.least and (len(places) >= could_hold or waited_s >= _SETTLE_S):
                return places, nodes
            short = shortage(self.needs, nodes.total, "the cluster")
            if short and not self.cluster.wait and waited_s >= _RETURN_S:
                raise DabError(f"{short} Nothing came back within {_RETURN_S:.0f} s; `dab resume` goes on when it has.")
            if time.monotonic() - told_at >= _TELL_EVERY_S:
                told_at = time.monotonic()
                self.tell(f"waiting for nodes: {short}" if short else "waiting for room: the cluster is busy")
            time.sleep(_POLL_S)
        return None

    def _are_sound(self, places: Sequence[str], nodes: Seen) -> bool:
        """Look at the nodes; those with a problem are left out for a while, unless nothing has begun yet."""
        findings = look_at(places, nodes.addresses, self.folder, self.wanted)
        now = time.monotonic()
        self.unsound_since = (self.unsound_since or now) if findings else 0.0
        is_first = not begun(self.folder)  # whichever driver began it
        if findings.problems and (is_first or now - self.unsound_since >= _RETURN_S):
            raise DabError(str(findings))
        for node in (*findings.problems, *findings.lost):
            self.shunned[node] = now
        if findings:
            self.tell(str(findings))
        return not findings

    def _try(self, places: Sequence[str], name: str) -> dict[str, Any] | None:
        """Train once; return the result, or None when there shall be another attempt."""
        from jobs.failures import ENDS, Judge
        from jobs.workers import fit

        judge = Judge(self.folder, self.config, self.tell, places)
        try:
            with self._growing(places) as is_asked:
                fit(self.spec, self.folder, self.config, name, places)
        except ENDS as error:
            if is_asked.is_set() and _has_left(error):
                return None
            return self._decide(judge, error)
        wait_for_store(self.folder, self.spec.checkpoint.retry_s, self.tell)
        return _result(self.folder)

    def _decide(self, judge: "Judge", error: BaseException) -> dict[str, Any] | None:
        failure, decision = judge.judge(error)
        if decision.action is Action.GIVE_UP:
            raise DabError(message(failure, decision)) from error
        if decision.action is Action.STOP:
            return _stopped(self.folder, message(failure, decision))
        _wait(decision.wait_s, self.folder.is_stop_requested)
        return None

    @contextmanager
    def _growing(self, places: Sequence[str]) -> Iterator[threading.Event]:
        """Within the block the loop is asked to take a checkpoint and leave when there is room for more workers.

        Yields:
            Set once it was asked.
        """
        is_asked, over = threading.Event(), threading.Event()
        forget_wish(self.folder)
        if len(places) == self.cluster.num_workers:
            yield is_asked
            return
        num_attempts = len(self.folder.attempts())
        thread = threading.Thread(
            target=self._watch_room, args=(places, num_attempts, is_asked, over), name="grow", daemon=True
        )
        thread.start()
        try:
            yield is_asked
        finally:
            over.set()
            thread.join()
            forget_wish(self.folder)

    def _watch_room(
        self, places: Sequence[str], num_attempts: int, is_asked: threading.Event, over: threading.Event
    ) -> None:
        began, roomy_since = 0.0, 0.0
        while not over.wait(_GROW_POLL_S):
            now = time.monotonic()
            with suppress(DabError, OSError, RayError):  # a store or Ray that does not answer is asked again
                began = began or (now if len(self.folder.attempts()) > num_attempts else 0.0)
                nodes = seen(self._shunned())
                count = len(most(self.needs, returned(nodes.free, places, self.needs.each)))
                roomy_since = (roomy_since or now) if count > len(places) else 0.0
                is_settled = roomy_since and now - roomy_since >= _GROW_SETTLE_S
                if is_settled and began and now - began >= _GROW_INTERVAL_S:
                    leave_wish(self.folder)
                    is_asked.set()
                    self.tell(f"room for {count} workers: a checkpoint is taken, and training goes on with them")
                    return

    def _shunned(self) -> list[str]:
        now = time.monotonic()
        return [node for node, since in self.shunned.items() if now - since < _SHUNNED_S]


def _stopped(folder: RunFolder, text: str) -> dict[str, Any]:
    """Leave the result of a run that was stopped while nothing trained, and return it."""
    progress = folder.progress()
    result: dict[str, Any] = {
        "status": "stopped",
        "message": text,
        "epoch": progress.get("epoch", 0),
        "step": progress.get("step", 0),
        "metrics": {},
        "weights_sha256": "",
    }
    folder.write_result(result)
    return result


def most(needs: Needs, free: Sequence[Node]) -> list[str]:
    """Return places for as many workers as find room, at most all: names of nodes, one entry a worker."""
    for count in range(needs.num_workers, 0, -1):
        places = choose(needs, free, count)
        if places is not None:
            return places
    return []


def _wanted(spec: TrainSpec, cluster: ClusterConfig, tracking_uri: str) -> Wanted:
    side, channels = spec.model.get("input_size") or 224, spec.model.get("in_channels") or 3
    return Wanted(
        data=(spec.data.train, spec.data.val),
        tracking_uri=tracking_uri,
        interface=cluster.interface,
        num_loaders=spec.data.num_loaders,
        sample_bytes=channels * side * side * _PIXEL_BYTES,
        batch_size=spec.data.batch_size,
        disks=(tempfile.gettempdir(), *([spec.data.cache_folder] if spec.data.cache_folder else [])),
    )


def _result(folder: RunFolder) -> dict[str, Any]:
    result = folder.load_json("result.json")
    if not result:
        raise DabError(f"{folder.location}: the workers ended without a result. Look at `dab logs`.")
    return result


def _has_left(error: BaseException) -> bool:
    """Whether an attempt ended because its workers had saved a checkpoint and left, and for nothing else."""
    failures = getattr(error, "worker_failures", {})
    return bool(failures) and all(isinstance(each, LeavingError) for each in failures.values())


def _wait(wait_s: float, is_over: Callable[[], bool]) -> None:
    deadline = time.monotonic() + wait_s
    while time.monotonic() < deadline and not is_over():
        time.sleep(min(_POLL_S, max(0.0, deadline - time.monotonic())))
