"""From what Ray says about the end of an attempt to what is done: named, decided (`orchestrator.failure`), told.

Every failure is one line of `events.jsonl`, with what was decided. So the count of restarts outlives the driver.
Leaves out how an attempt is started again: see `jobs.launch`.
"""

import re
from collections.abc import Callable, Iterator, Sequence

import ray
from ray.exceptions import RayActorError, RayError
from ray.train import TrainingFailedError
from ray.train.v2._internal.exceptions import (
    WorkerGroupStartupFailedError,
    WorkerGroupStartupTimeoutError,
    WorkerHealthCheckFailedError,
    WorkerHealthCheckTimeoutError,
)
from ray.train.v2.api.exceptions import ControllerError, PreemptionError, WorkerGroupError

from dabnn.errors import DabError
from dabnn.memory import MemoryLimitError, advice, kernel_kills
from dabnn.observer import LeavingError
from dabnn.run_folder import RunFolder
from dabnn.watch import HangError
from jobs.nodes import dead_nodes, is_draining
from orchestrator.config import Config
from orchestrator.failure import Decision, Failure, Kind, Limits, decide
from orchestrator.story import note, reached, recorded

# The first that is there is the cause; those after it follow from it in other workers.
_ORDER = (
    Kind.NODE_LOST, Kind.OUT_OF_MEMORY, Kind.GPU_OUT_OF_MEMORY, Kind.PREEMPTED, Kind.WORKER_LOST, Kind.ERROR, Kind.HANG,
    Kind.CONNECTION_LOST, Kind.NOT_STARTED,
)  # fmt: skip
_CONNECTION = re.compile(r"gloo|nccl|connection (closed|reset|refused)|broken pipe|timed out waiting", re.IGNORECASE)
_NODE = re.compile(r"node (has )?died|node was terminated|node is dead", re.IGNORECASE)
_MEMORY = re.compile(r"NODE_OUT_OF_MEMORY|running low on memory")
_ADDRESS = re.compile(r"^\s*ip: (\S+)", re.MULTILINE)


class SilentError(DabError):
    """A worker does not answer while another one failed."""


class Judge:
    """Decides about the failure of one attempt, at whose start it is made, and tells.

    Args:
        folder: The run's folder.
        config: The run.
        tell: Told what is done, for the job's log.
        places: Ids of the nodes of the workers.
    """

    def __init__(
        self, folder: RunFolder, config: Config, tell: Callable[[str], None], places: Sequence[str] = ()
    ) -> None:
        self._folder, self._config, self._tell, self._places = folder, config, tell, places
        self._kills = kernel_kills()

    def judge(self, error: BaseException) -> tuple[Failure, Decision]:
        """Return what ended an attempt and what to do about it, noted and told.

        Args:
            error: What Ray Train raised.
        """
        failure, decision = self.weigh(error)
        self.tell(failure, decision)
        return failure, decision

    def tell(self, failure: Failure, decision: Decision) -> None:
        """Note what was decided about a failure in the run's folder, and tell it."""
        note(self._folder, failure, decision, self._tell)

    def weigh(self, error: BaseException) -> tuple[Failure, Decision]:
        """Return what `judge` does, without noting anything."""
        failure = self.failure_of(error)
        cluster, history = self._config.cluster, recorded(self._folder)
        limits = Limits(
            max_failures=cluster.max_failures,
            is_stopping=self._folder.is_stop_requested(),
            advice=advice(self._config.data.batch_size, cluster.num_processes),
        )
        return failure, decide(failure, history, limits)

    def failure_of(self, error: BaseException) -> Failure:
        """Return what ended an attempt."""
        attempts, start_step, step = reached(self._folder)
        found = sorted(self._causes(error), key=lambda cause: _ORDER.index(cause.kind))
        first = found[0]
        others = [cause.why for cause in found[1:] if cause.kind in (Kind.HANG, Kind.NODE_LOST, Kind.WORKER_LOST)]
        return Failure(
            kind=first.kind,
            why="; ".join(dict.fromkeys([first.why, *others])),
            step=step,
            start_step=start_step,
            attempt=attempts,
            node=first.node,
            rank=first.rank,
            is_drained=first.is_drained,
        )

    def _causes(self, error: BaseException) -> Iterator[Failure]:
        """Yield what is known of each worker, or of the attempt as a whole."""
        if isinstance(error, PreemptionError):
            ranks = ", ".join(str(rank) for rank in error.preemption_info.preempted_ranks)
            yield Failure(Kind.PREEMPTED, f"the machine of rank {ranks} was taken away", 0, is_drained=True)
        elif isinstance(error, WorkerGroupError) and error.worker_failures:
            for rank, each in error.worker_failures.items():
                yield self._cause(rank, each)
        elif isinstance(error, ControllerError):
            yield self._start_failure(error.controller_failure)
        else:
            yield Failure(Kind.WORKER_LOST, f"what supervises the workers ended: {first_line(error)}", 0)

    def _cause(self, rank: int, error: BaseException) -> Failure:
        if isinstance(error, WorkerHealthCheckFailedError):
            error = error.health_check_failure
        text = str(error)
        found = _ADDRESS.search(text)
        node = found.group(1) if found else ""
        where = f"rank {rank}" + (f" on {node}" if node else "")
        if isinstance(error, LeavingError):
            return Failure(Kind.PREEMPTED, "it saved a checkpoint and left", 0, rank=rank, is_drained=is_draining())
        if isinstance(error, MemoryLimitError):
            return Failure(Kind.GPU_OUT_OF_MEMORY if error.is_gpu else Kind.OUT_OF_MEMORY, text, 0, rank=rank)
        if isinstance(error, HangError | WorkerHealthCheckTimeoutError):
            return Failure(Kind.HANG, first_line(error), 0, rank=rank)
        if isinstance(error, SilentError):
            return Failure(Kind.HANG, f"rank {rank}: {text}", 0, rank=rank)
        if isinstance(error, RayActorError):
            return self._lost(where, rank, node, error)
        if not isinstance(error, DabError) and _CONNECTION.search(text):
            return Failure(
                Kind.CONNECTION_LOST, f"{where} lost the connection to another: {first_line(error)}", 0, rank=rank
            )
        return Failure(Kind.ERROR, f"{where}: {type(error).__name__}: {first_line(error)}", 0, rank=rank)

    def _start_failure(self, error: BaseException) -> Failure:
        """Name what ended an attempt while its workers started, or in what supervises them."""
        if isinstance(error, WorkerGroupStartupTimeoutError):
            return Failure(Kind.NOT_STARTED, "their places were taken in the meantime (cluster.start_timeout_s)", 0)
        if isinstance(error, WorkerGroupStartupFailedError | RayActorError):
            if gone := dead_nodes(self._places):
                why = f"the machine {gone[0]} is gone, on which a worker started"
                return Failure(Kind.NODE_LOST, why, 0, node=gone[0])
            return Failure(Kind.WORKER_LOST, "a worker ended while it started", 0)
        text = f"{type(error).__name__}: {first_line(error)}"
        if _CONNECTION.search(str(error)):
            return Failure(Kind.CONNECTION_LOST, f"the workers could not connect to each other: {text}", 0)
        return Failure(Kind.ERROR, f"what starts and supervises the workers failed: {text}", 0)

    def _lost(self, where: str, rank: int, node: str, error: RayActorError) -> Failure:
        """Name the loss of a worker's process."""
        text = str(error)
        if error.preempted:
            reason = f"the machine of {where} was taken away"
            return Failure(Kind.PREEMPTED, reason, 0, node=node, rank=rank, is_drained=True)
        if _NODE.search(text) or (node and node not in _living_nodes()):
            return Failure(Kind.NODE_LOST, f"the machine of {where} is gone", 0, node=node, rank=rank)
        if _MEMORY.search(text):
            reason = f"Ray ended {where}, because its machine ran out of memory"
            return Failure(Kind.OUT_OF_MEMORY, reason, 0, node=node, rank=rank)
        if node == ray.util.get_node_ip_address() and kernel_kills() > self._kills:
            reason = f"the system ended {where}, because the machine ran out of memory"
            return Failure(Kind.OUT_OF_MEMORY, reason, 0, node=node, rank=rank)
        return Failure(
            Kind.WORKER_LOST, f"the process of {where} ended without a word, as if killed", 0, node=node, rank=rank
        )


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message that says something."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


def _living_nodes() -> set[str]:
    return {node["NodeManagerAddress"] for node in ray.nodes() if node["Alive"]}


ENDS: tuple[type[BaseException], ...] = (TrainingFailedError, RayError)
"""What `TorchTrainer.fit` raises when an attempt has ended without a result."""
