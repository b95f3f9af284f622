"""A list of tasks over processes of this machine, with progress from inside the tasks.

For fan-outs over a cluster see the room `jobs`, which gives the same tasks to Ray.
"""

import multiprocessing
import os
import signal
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection, wait
from typing import Any, Protocol, TypeVar

from dabnn.errors import DabError

Task = TypeVar("Task")
Result = TypeVar("Result")
Tell = Callable[[int], None]
_SECONDS_BETWEEN_TELLS = 0.1


class RunTasks(Protocol):
    """Runs `function(task, tell)` on every task, somewhere, and yields the results as they come, in any order.

    `tell(number)` says that so many more samples of the task are done; what is told is added up by `tell` here.
    """

    def __call__(self, function: Callable[[Task, Tell], Result], tasks: Sequence[Task], tell: Tell) -> Iterator[Result]:
        """Yields the results; an exception of a task is raised here."""


def available_cpus() -> int:
    """Returns how many logical CPUs this process may use."""
    return len(os.sched_getaffinity(0))


class LocalProcesses:
    """Runs tasks in processes of this machine; one process is this one.

    A program that asks for more than one has to guard its main module with `if __name__ == "__main__"`, since each
    process imports it.

    Args:
        num_processes: How many.
    """

    def __init__(self, num_processes: int) -> None:
        self._num_processes = num_processes

    def __call__(self, function: Callable[[Task, Tell], Result], tasks: Sequence[Task], tell: Tell) -> Iterator[Result]:
        """Yields the results as `RunTasks` says.

        Raises:
            DabError: A process died.
        """
        if min(self._num_processes, len(tasks)) <= 1:
            for task in tasks:
                yield function(task, tell)
            return
        # Fresh interpreters: a fork would copy whatever threads and locks this program holds.
        context = multiprocessing.get_context("spawn")
        workers: dict[Connection, Any] = {}
        try:
            for _ in range(min(self._num_processes, len(tasks))):
                ours, theirs = context.Pipe()
                process = context.Process(target=_serve, args=(theirs, function), daemon=True)
                process.start()
                theirs.close()
                workers[ours] = process
            yield from _hand_out(workers, tasks, tell)
        except BaseException:
            for process in workers.values():
                process.kill()
            raise
        finally:
            for connection, process in workers.items():
                connection.close()
                process.join()


def _hand_out(workers: dict[Connection, Any], tasks: Sequence[Any], tell: Tell) -> Iterator[Any]:
    waiting = iter(tasks)
    busy = set()
    for connection, task in zip(workers, waiting, strict=False):
        _send(connection, workers[connection], task)
        busy.add(connection)
    while busy:
        ready = wait(list(busy))
        for connection in [connection for connection in busy if connection in ready]:
            kind, value = _receive(connection, workers[connection])
            if kind == "told":
                tell(value)
                continue
            if kind == "error":
                raise value
            task = next(waiting, None)
            if task is None:
                busy.discard(connection)
            else:
                _send(connection, workers[connection], task)
            yield value


def _send(connection: Connection, process: Any, task: Any) -> None:
    try:
        connection.send(task)
    except OSError as error:
        raise _death(process) from error


def _receive(connection: Connection, process: Any) -> tuple[str, Any]:
    try:
        message: tuple[str, Any] = connection.recv()
    except (EOFError, OSError) as error:
        raise _death(process) from error
    return message


def _death(process: Any) -> DabError:
    process.join(5)
    return DabError(
        f"a process of this command died (exit code {process.exitcode}; -9 is what the system does when memory runs "
        "out). Use fewer processes, or free some memory, and run the command again"
    )


def _serve(connection: Connection, function: Callable[[Any, Tell], Any]) -> None:
    """Runs tasks until the other side closes the connection; this is the main function of a process."""
    # An interruption reaches all processes of the terminal; the first one ends the others.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        while True:
            task = connection.recv()
            teller = _Teller(connection)
            try:
                result = function(task, teller)
            except Exception as error:  # noqa: BLE001 - raised again in the process that handed out the task
                error.add_note("".join(traceback.format_exception(error)))
                connection.send(("error", error))
                return
            teller.flush()
            connection.send(("result", result))
    except (EOFError, BrokenPipeError, ConnectionResetError):
        return


class _Teller:
    """Sends what a task tells, but not for every sample."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._untold = 0
        self._told_at = time.monotonic()

    def __call__(self, number: int) -> None:
        self._untold += number
        if time.monotonic() - self._told_at >= _SECONDS_BETWEEN_TELLS:
            self.flush()

    def flush(self) -> None:
        if self._untold:
            self._connection.send(("told", self._untold))
        self._untold, self._told_at = 0, time.monotonic()
