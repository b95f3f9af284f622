"""What is done at once when a worker fails, by Ray Train's controller: find all that failed, and start again in place.

Where only processes failed and every machine answers, the controller starts the workers again where they were, which
takes half the time of a new attempt by the driver. For anything else (a machine that is gone or wanted back, nothing
left to try) it ends the attempt, and the driver decides: see `jobs.launch`.
"""

import socket
import sys
import time
from typing import Any

import ray
from ray._private import state  # the only way to which nodes are drained
from ray.exceptions import RayActorError
from ray.train.v2._internal.execution.callback import WorkerGroupCallback
from ray.train.v2.api.exceptions import ControllerError, WorkerGroupError

from dabnn.run_folder import RunFolder
from jobs.failures import Judge, SilentError
from orchestrator.config import Config
from orchestrator.failure import Action, Kind

_ANSWER_S = 2.0
_IN_PLACE = (Kind.WORKER_LOST, Kind.HANG, Kind.OUT_OF_MEMORY, Kind.GPU_OUT_OF_MEMORY, Kind.CONNECTION_LOST, Kind.ERROR)


class Group(WorkerGroupCallback):
    """Watches the workers of an attempt; Ray Train calls it in its controller.

    Args:
        location: The run's folder.
        config: The run.
    """

    def __init__(self, location: str, config: Config) -> None:
        self._location, self._config = location, config
        self._workers: list[Any] = []
        self._judge: Judge | None = None

    def after_worker_group_start(self, worker_group: Any) -> None:
        """Keep the handles of the workers."""
        self._workers = worker_group.get_workers()
        self._judge = Judge(RunFolder.of(self._location), self._config, _say)

    def after_worker_group_poll_status(self, worker_group_status: Any) -> None:
        """Return when the workers shall be started again in place.

        Raises:
            ControllerError: The attempt is over; holds a WorkerGroupError with all that is known.
        """
        if not worker_group_status.errors or self._judge is None:
            return
        self._complete(worker_group_status)
        error = WorkerGroupError(worker_group_status.get_error_string(), worker_group_status.errors)
        failure, decision = self._judge.weigh(error)
        if failure.kind not in _IN_PLACE or decision.action is not Action.RETRY or not self._machines_answer():
            raise ControllerError(error)
        self._judge.tell(failure, decision)
        time.sleep(decision.wait_s)

    def _complete(self, status: Any) -> None:
        """Add the deaths that Ray has not told yet to the errors.

        Ray Train sees first the errors of workers whose peer died: the peer's own end would never be told.
        """
        statuses = status.worker_statuses
        silent = {rank: worker for rank, worker in enumerate(self._workers) if statuses[rank].error is None}
        answers = {rank: worker.actor.get_metadata.remote() for rank, worker in silent.items()}
        if answers:
            ray.wait(list(answers.values()), num_returns=len(answers), timeout=_ANSWER_S)
        for rank, answer in answers.items():
            error = _error_of(answer)
            if error is not None:
                statuses[rank].error = error

    def _machines_answer(self) -> bool:
        """Whether the raylet of every worker takes connections, and none is drained: Ray notices that much later."""
        wanted = {worker.metadata.node_id for worker in self._workers}
        if wanted & set(state.state.get_draining_nodes()):
            return False
        alive = {node["NodeID"]: node for node in ray.nodes() if node["Alive"]}
        return all(node in alive and _answers(alive[node]) for node in wanted)


def inner(error: BaseException) -> BaseException:
    """Return what ended an attempt, out of what Ray Train made of it: errors as the loop raised them, where it did."""
    if isinstance(error, ControllerError) and isinstance(error.controller_failure, WorkerGroupError):
        error = error.controller_failure
    if isinstance(error, WorkerGroupError):
        # Ray wraps what the loop raised together with its traceback, which it has logged.
        failures = {rank: getattr(each, "_base_exc", each) for rank, each in error.worker_failures.items()}
        return WorkerGroupError(str(error), failures)
    return error


def _answers(node: dict[str, Any]) -> bool:
    try:
        with socket.create_connection((node["NodeManagerAddress"], node["NodeManagerPort"]), _ANSWER_S):
            return True
    except OSError:
        return False


def _error_of(answer: Any) -> Exception | None:
    """Return why a worker did not answer, or None where it did."""
    ready, _ = ray.wait([answer], timeout=0)
    if not ready:
        return SilentError("it does not answer: its process is frozen, or its machine cannot be reached")
    try:
        ray.get(answer)
    except RayActorError as error:
        return error
    return None


def _say(line: str) -> None:
    """Print a line for whoever follows the job's log, to which Ray carries it."""
    sys.stdout.write(line + "\n")
    sys.stdout.flush()
