"""What only Ray knows of a worker: that its node will be taken away, that it does not answer, that it is told to end.

The watch itself, which a worker has in any case, is `dabnn.watch`.
"""

from typing import Any

import ray
from ray.exceptions import RayActorError
from ray.train.v2._internal.execution.callback import WorkerCallback, WorkerGroupCallback
from ray.train.v2._internal.execution.context import get_train_context

from dabnn.errors import DabError
from dabnn.watch import HangError as HangError
from dabnn.watch import Notice, heed_sigterm
from dabnn.watch import WorkerWatch as WorkerWatch
from dabnn.watch import watched as watched

_ANSWER_S = 2.0


class SilentError(DabError):
    """A worker does not answer while another one failed."""


def notice_of_ray() -> Notice | None:
    """Return what Ray Train's watcher told this worker, without the barrier of `ray.train.get_preemption_info`."""
    info = get_train_context().preemption_context.preemption_info
    if info is None:
        return None
    deadline = None if info.deadline_ms is None else info.deadline_ms / 1000
    return Notice(tuple(sorted(info.preempted_node_to_ranks)), deadline)


class HeedSigterm(WorkerCallback):
    """Has every worker heed SIGTERM; Ray Train calls it in the worker's main thread."""

    def after_init_train_context(self) -> None:
        """Set the signal's handler."""
        heed_sigterm()


class Witness(WorkerGroupCallback):
    """Asks every worker whether it lives when one of them fails.

    Ray Train ends an attempt with the first errors that it sees. Those are often of workers whose peer died: the peer's
    own end would never be told.
    """

    def __init__(self) -> None:
        self._workers: list[Any] = []

    def after_worker_group_start(self, worker_group: Any) -> None:
        """Keep the handles of the workers."""
        self._workers = worker_group.get_workers()

    def after_worker_group_poll_status(self, worker_group_status: Any) -> None:
        """Add the deaths that Ray has not told yet to the errors."""
        statuses = worker_group_status.worker_statuses
        if not worker_group_status.errors:
            return
        silent = {rank: worker for rank, worker in enumerate(self._workers) if statuses[rank].error is None}
        answers = {rank: worker.actor.get_metadata.remote() for rank, worker in silent.items()}
        if answers:
            ray.wait(list(answers.values()), num_returns=len(answers), timeout=_ANSWER_S)
        for rank, answer in answers.items():
            error = _error_of(answer)
            if error is not None:
                statuses[rank].error = error


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
