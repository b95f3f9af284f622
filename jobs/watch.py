"""What a worker of Ray Train notices besides what `dabnn.watch` does: Ray will drain its node, SIGTERM."""

from ray.train.v2._internal.execution.callback import WorkerCallback
from ray.train.v2._internal.execution.context import get_train_context

from dabnn.watch import Notice, heed_sigterm


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
