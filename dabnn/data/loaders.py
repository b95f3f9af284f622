"""Who reads the batches: loader processes, or the training process until those are up.

Loader processes come from a fork server. Plain fork copies a process in which gloo and Ray run threads, and can
deadlock on a lock that one of them holds; spawn imports torch (2 s of CPU) anew for each loader, the server once. The
server is started in the background when a stream is opened, and the first batches are read in the training process
meanwhile: what a batch holds is a function of the request, so nobody can tell who read it.
"""

import multiprocessing
import os
import threading
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from dabnn.data.memory import keep_freed_memory
from dabnn.data.pipeline import Pipeline
from dabnn.data.requests import Request, Requests
from dabnn.errors import DabError, PassingError

_MIN_SAMPLES = 2  # of a rank in a training step: BatchNorm cannot train on one value a channel
_ADVICE = "see `dab data check`, then build again"

_server: Future[None] | None = None
_server_lock = threading.Lock()


@dataclass(frozen=True)
class Answer:
    """What was read for a request; arrays where a tensor would cost a file in shared memory.

    Attributes:
        images: float32, normalised, or uint8 where the stream does that later.
        labels: int64 (n,).
        indices: int64 (n,): the samples that could be decoded.
        bad_indices: int64: the others.
        bad: What is wrong with each of them.
        partner_labels: int64 (n,), with mixing.
        weights: float32 (n,), with mixing.
    """

    images: Tensor
    labels: NDArray[np.int64]
    indices: NDArray[np.int64]
    bad_indices: NDArray[np.int64]
    bad: tuple[str, ...]
    partner_labels: NDArray[np.int64] | None
    weights: NDArray[np.float32] | None


class BatchReader(Dataset["Answer | DabError"]):
    """Answers requests, in whichever process it was copied to.

    Args:
        pipeline: From indices to images.
        is_training: Whether a batch of one sample is of no use.
        tolerates_bad: Whether samples that cannot be decoded are left out instead of being an error.
        is_finished: Whether images are normalised here.
    """

    def __init__(self, pipeline: Pipeline, *, is_training: bool, tolerates_bad: bool, is_finished: bool) -> None:
        self.pipeline = pipeline
        self.is_training, self.tolerates_bad, self.is_finished = is_training, tolerates_bad, is_finished

    def __getitem__(self, request: Request) -> Answer | DabError:
        try:
            return self._read(request)
        except DabError as error:
            # Raised here, the loader would replace its message by a traceback.
            return error

    def _read(self, request: Request) -> Answer:
        made = self.pipeline.batch(request.indices, request.epoch, request.partners, finished=self.is_finished)
        indices = made.indices.numpy()
        if made.bad and not self.tolerates_bad:
            raise DabError(f"{made.bad[0]}; {_ADVICE}")
        if made.bad and self.is_training and len(indices) < _MIN_SAMPLES:
            raise DabError(
                f"{made.bad[0]}; with it {len(made.bad)} of the {len(request.indices)} samples that this worker has in "
                f"step {request.step + 1} of epoch {request.epoch + 1} are bad, and batch normalization needs "
                f"{_MIN_SAMPLES} good ones; {_ADVICE}"
            )
        return Answer(
            made.images,
            made.labels.numpy(),
            indices,
            np.setdiff1d(request.indices, indices) if made.bad else indices[:0],
            made.bad,
            None if made.partner_labels is None else made.partner_labels.numpy(),
            None if made.weights is None else made.weights.numpy(),
        )


class Loaders:
    """The answers to requests in their order, from a position on.

    Args:
        reader: Copied to each loader process.
        requests: Started anew at each move.
        num_loaders: Loader processes; 0 reads in this one.
    """

    def __init__(self, reader: BatchReader, requests: Requests, num_loaders: int) -> None:
        self._reader, self._requests, self._num_loaders = reader, requests, num_loaders
        self._here: Iterator[Request] | None = None
        self._ahead: Iterator[Answer | DabError] | None = None
        self._loader: DataLoader[Answer | DabError] | None = None
        if num_loaders:
            start_server(reader.pipeline.modules)

    def move(self) -> None:
        """Forget what was read ahead; the next answer is that of the position given with it."""
        self._here = self._ahead = None

    def next(self, position: tuple[int, int]) -> Answer | DabError:
        """Return the answer for the next step.

        Args:
            position: Its epoch and step, which count after a move only.

        Raises:
            PassingError: A loader process died.
            DabError: None can be started.
        """
        if self._ahead is None and self._num_loaders and self._is_server_up():
            self._requests.start, self._here = position, None
            self._ahead = self._start()
        if self._ahead is not None:
            return self._from_loaders(self._ahead)
        if self._here is None:
            self._requests.start = position
            self._here = iter(self._requests)
        with _one_thread():
            return self._reader[next(self._here)]

    def begin_epoch(self) -> None:
        """Read in this process from now on, where batches take longer to hand over than to make."""
        if self._num_loaders and self._reader.pipeline.is_arithmetic:
            self.move()
            self._loader, self._num_loaders = None, 0

    def close(self) -> None:
        """End the loader processes and close the files."""
        self.move()
        self._loader = None
        self._reader.pipeline.close()

    def _is_server_up(self) -> bool:
        server = start_server(self._reader.pipeline.modules)
        if not server.done():
            return False
        if error := server.exception():
            raise DabError(
                f"data.num_loaders: no loader process can be started ({error}). Use 0 to read in the training process."
            ) from error
        return True

    def _start(self) -> Iterator[Answer | DabError]:
        if self._loader is None:
            self._loader = DataLoader(
                self._reader,
                batch_size=None,
                sampler=self._requests,
                num_workers=self._num_loaders,
                persistent_workers=True,
                multiprocessing_context=multiprocessing.get_context("forkserver"),
                worker_init_fn=_begin,
                # The loader draws a number from this at each start; from the default one, a resumed run would draw
                # once more.
                generator=torch.Generator(),
            )
        return iter(self._loader)

    def _from_loaders(self, answers: Iterator[Answer | DabError]) -> Answer | DabError:
        try:
            return next(answers)
        except (RuntimeError, ConnectionError, EOFError, FileNotFoundError) as error:
            is_own = "Caught " in str(error)  # raised by the reader itself, in the loader
            if is_own or (isinstance(error, RuntimeError) and "exited unexpectedly" not in str(error)):
                raise
            self._loader = None
            self.move()
            raise PassingError(
                f"data.num_loaders: a loader process was killed, or ran out of memory or of /dev/shm ({error}). Use "
                "fewer loaders or a smaller data.batch_size if it happens again."
            ) from error


@contextmanager
def _one_thread() -> Iterator[None]:
    """Keeps torch from sharing out its work, as in a loader.

    A batch is so little that threads spend more time on waiting for each other; where others need the processors, too,
    it then takes ten times as long.
    """
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(num_threads)


def start_server(modules: tuple[str, ...]) -> Future[None]:
    """Begin to start the process that loader processes are forked from, unless that was done before.

    Args:
        modules: What it imports, in addition to torch, so that the loader processes need not.

    Returns:
        Done when a loader process can be had in milliseconds; holds the exception when there is none to be had.
    """
    global _server
    with _server_lock:
        if _server is None:
            _server = Future()
            threading.Thread(target=_start_server, args=(_server, modules), name="loader-server", daemon=True).start()
        return _server


def _start_server(server: Future[None], modules: tuple[str, ...]) -> None:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "PIL.Image", __name__, *modules])
    try:
        first = context.Process(target=_do_nothing, daemon=True)
        first.start()  # waits for the imports
        first.join()
        if first.exitcode:
            raise ChildProcessError(f"the first one ended with code {first.exitcode}")
    except BaseException as error:  # noqa: BLE001 - carried to whoever wants a loader
        server.set_exception(error)
    else:
        server.set_result(None)


def _do_nothing() -> None:
    """What the first process of the server does."""


def _begin(_loader: int) -> None:
    """What a loader process does first."""
    keep_freed_memory()
    _die_with_parent()


def _die_with_parent() -> None:
    """Ends a loader when its training process is gone; torch watches the parent, which here is the fork server."""

    def watch() -> None:
        parent = multiprocessing.parent_process()
        if parent is not None:
            parent.join()
            os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
