"""The program of `dab data build --cluster` on the cluster: `python -m jobs.build`.

The driver lists the source and hands out one Ray task a shard. A task that was lost with its machine is done again
elsewhere; a finished shard is not, even after the driver was killed.
"""

import sys
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import ray

from dabnn.data.processes import Tell
from dabnn.errors import DabError
from dabnn.run_folder import write_json
from jobs.connect import connect
from jobs.train import say
from orchestrator.cluster_build import Request
from orchestrator.output import Output

Task = TypeVar("Task")
Result = TypeVar("Result")
_TASKS_PER_CPU = 2  # handed out before others are done, so that no CPU waits for the driver


def main() -> int:
    """Run the job described in the environment; return 0 when the dataset is there, 1 when not."""
    request = Request.from_environment()
    file = Path(request.file)
    connect()
    try:
        with Output().progress(f"build {request.options.dest}", "images") as bar:
            request.options.build(say=say, on_progress=bar.update, run_tasks=over_cluster)
    except DabError as error:
        write_json(file, {"job_id": request.job_id, "error": str(error), "exit_code": error.exit_code})
        return 1
    write_json(file, {"job_id": request.job_id})
    return 0


def over_cluster(function: Callable[[Task, Tell], Result], tasks: Sequence[Task], tell: Tell) -> Iterator[Result]:
    """Yield the results of all tasks as they come, one CPU a task; as `dabnn.data.processes.RunTasks`.

    Raises:
        DabError: A task met an error of ours, or its machine is gone; the other tasks are given up.
    """
    remote: Any = ray.remote(num_cpus=1)(_counted)
    waiting = iter(tasks)
    num_running = _TASKS_PER_CPU * max(1, int(ray.cluster_resources().get("CPU", 1)))
    running = {remote.remote(function, task) for task in islice(waiting, num_running)}
    while running:
        (done,), rest = ray.wait(list(running), num_returns=1)
        running = set(rest)
        try:
            result, count = ray.get(done)
        except ray.exceptions.RayTaskError as error:
            if isinstance(error.cause, DabError | OSError):
                raise error.cause from None
            raise
        except ray.exceptions.RayError as error:
            raise DabError(
                f"the cluster: a task was lost ({error}); the same command goes on where it stopped"
            ) from error
        tell(count)
        yield result
        running |= {remote.remote(function, task) for task in islice(waiting, 1)}


def _counted(function: Callable[[Task, Tell], Result], task: Task) -> tuple[Result, int]:
    """Run a task; return its result and the samples that it told of."""
    told: list[int] = []
    return function(task, told.append), sum(told)


if __name__ == "__main__":
    sys.exit(main())
