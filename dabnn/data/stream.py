"""A deterministic, resumable stream of batches from local shards.

What a step holds is decided by `order` alone. A torch `DataLoader` with a sampler that yields one request a step, on
and on over the epochs, lets loader processes read ahead without having a say in the order.

Loader processes come from a fork server. Plain fork copies a process in which gloo and Ray run threads, and can
deadlock on a lock that one of them holds; spawn imports torch (3 s of CPU) anew for each loader, the server once.
"""

import multiprocessing
import os
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from dabnn.data.manifest import Manifest, load_manifest
from dabnn.data.order import batches, epoch_order, share, steps
from dabnn.data.pipeline import Pipeline
from dabnn.data.reader import SampleReader, verify_sizes
from dabnn.data.transforms import Transform, make_transform
from dabnn.errors import DabError, InvalidInputError

if TYPE_CHECKING:
    from multiprocessing.context import BaseContext

DEFAULT_WINDOW = 65536


@dataclass(frozen=True)
class Batch:
    """One rank's part of a step.

    Attributes:
        images: float32 (n, C, H, W), normalised; (n, 10, C, H, W) where the transform makes ten crops.
        labels: int64 (n,).
        indices: int64 (n,): each sample's index in the split.
        global_size: Samples of the step over all ranks.
    """

    images: Tensor
    labels: Tensor
    indices: Tensor
    global_size: int


@dataclass(frozen=True)
class _Request:
    """What a loader process is asked for: a batch, by the samples' indices."""

    epoch: int
    indices: NDArray[np.int64]
    global_size: int


@dataclass(frozen=True)
class _Plan:
    """One rank's batches: for each the block of the epoch's order, and the size of the step over all ranks."""

    blocks: tuple[range, ...]
    global_sizes: tuple[int, ...]
    shard_sizes: tuple[int, ...]
    seed: int
    shuffle: bool
    window: int

    def requests(self, epoch: int, step: int) -> Iterator[_Request]:
        """Yields the requests from a position on, without end."""
        while True:
            order = self._order(epoch)
            for block, global_size in zip(self.blocks[step:], self.global_sizes[step:], strict=True):
                yield _Request(epoch, order[block.start : block.stop], global_size)
            epoch, step = epoch + 1, 0

    def _order(self, epoch: int) -> NDArray[np.int64]:
        if self.shuffle:
            return epoch_order(self.seed, epoch, self.shard_sizes, self.window)
        return np.arange(sum(self.shard_sizes))


class _Requests(Sampler[_Request]):
    """The requests from `start` on; the loader asks for a new iterator after each move of it."""

    def __init__(self, plan: _Plan, start: tuple[int, int]) -> None:
        self.plan = plan
        self.start = start

    def __iter__(self) -> Iterator[_Request]:
        return self.plan.requests(*self.start)


class _BatchReader(Dataset["Batch | DabError"]):
    """Answers requests, in whichever process it was copied to."""

    def __init__(self, pipeline: Pipeline) -> None:
        self.pipeline = pipeline

    def __getitem__(self, request: _Request) -> Batch | DabError:
        try:
            return self._read(request)
        except DabError as error:
            # Raised here, the loader would replace its message by a traceback.
            return error

    def _read(self, request: _Request) -> Batch:
        made = self.pipeline.batch(request.indices, request.epoch)
        if made.bad:
            raise DabError(f"{made.bad[0]}; see `dab data check`, then build again")
        return Batch(made.images, made.labels, made.indices, request.global_size)


class Stream:
    """Batches of one rank, epoch after epoch; `open_stream` opens one. Close it, or use it in a `with` statement.

    Attributes:
        num_steps: Batches of this rank in an epoch.
        num_samples: Samples in an epoch over all ranks.
    """

    def __init__(self, plan: _Plan, dataset: _BatchReader, num_samples: int, num_loaders: int) -> None:
        self.num_steps = len(plan.blocks)
        self.num_samples = num_samples
        self._next = (0, 0)
        self._pipeline = dataset.pipeline
        self._requests = _Requests(plan, self._next)
        self._loader: DataLoader[Batch | DabError] | None = _make_loader(dataset, self._requests, num_loaders)
        self._batches: Iterator[Batch | DabError] | None = None

    def position(self) -> dict[str, int]:
        """Returns the next step to be read, `{"epoch": ..., "step": ...}`: all that a resumed stream needs."""
        epoch, step = self._next
        return {"epoch": epoch, "step": step}

    def seek(self, epoch: int, step: int = 0) -> None:
        """Moves to a step of an epoch; what was read ahead is kept where that is the next one anyway."""
        if epoch < 0 or not 0 <= step < max(self.num_steps, 1):
            raise InvalidInputError(
                f"position: epoch {epoch}, step {step} is outside the stream's {self.num_steps} steps an epoch; was it "
                "taken with another dataset or batch size?"
            )
        if (epoch, step) != self._next:
            self._next, self._batches = (epoch, step), None

    def epoch(self, epoch: int, start_step: int = 0) -> Iterator[Batch]:
        """Yields this rank's batches of an epoch.

        Args:
            epoch: The epoch, from 0.
            start_step: The first step to read.

        Yields:
            The batches in order. While one is in hand, `position` is the step after it.

        Raises:
            DabError: A sample cannot be read; the message names it.
        """
        self.seek(epoch, start_step)
        for step in range(start_step, self.num_steps):
            batch = next(self._running())
            if isinstance(batch, DabError):
                self._batches = None
                raise batch
            self._next = (epoch, step + 1) if step + 1 < self.num_steps else (epoch + 1, 0)
            yield batch

    def __iter__(self) -> Iterator[Batch]:
        """Yields the rest of the epoch in which the position is; iterating again gives the next epoch."""
        return self.epoch(*self._next)

    def close(self) -> None:
        """Ends the loader processes and closes the files; the stream cannot be read any more."""
        self._batches = self._loader = None
        self._pipeline.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _running(self) -> Iterator[Batch | DabError]:
        if self._loader is None:
            raise ValueError("the stream is closed")
        if self._batches is None:
            self._requests.start = self._next
            self._batches = iter(self._loader)
        return self._batches


def open_stream(
    root: Path,
    split: str,
    *,
    batch_size: int,
    seed: int = 0,
    rank: int = 0,
    world_size: int = 1,
    num_loaders: int = 0,
    shuffle: bool = True,
    transform: Transform | None = None,
    remainder: str = "keep",
    position: dict[str, int] | None = None,
    num_workers_planned: int | None = None,
    window: int = DEFAULT_WINDOW,
) -> Stream:
    """Opens a split of a dataset as a stream of batches.

    With `shuffle` the stream is for training: an epoch is cut into steps of `batch_size` samples over all ranks, each
    rank gets a contiguous block of every step, and all ranks have equally many. The samples of a step depend on `seed`,
    the epoch and the step, and on neither `world_size` nor `num_loaders`; nor do their augmentations.

    Without, it is for evaluation: the split's order, each rank a contiguous block of the split, in batches of
    `batch_size` each. Together the ranks see every sample once; one may have a batch more than another, or none.

    Args:
        root: The dataset's folder.
        split: `train` or `val`.
        batch_size: Samples a step over all ranks; without `shuffle`, samples a batch.
        seed: Of the order and the augmentations.
        rank: This process among `world_size`.
        world_size: Processes that share the samples now.
        num_loaders: Processes that read ahead for this rank; 0 reads in this one.
        shuffle: Whether the stream is for training.
        transform: What becomes of an image; by default `plain` at the dataset's own size and channels.
        remainder: With `shuffle`, what becomes of the samples after the last full step; see `order.steps`.
        position: Where to begin, as `Stream.position` gave it.
        num_workers_planned: World size that the batch size and remainder are checked against, so that an elastic run
            keeps its steps when it continues on fewer workers; by default `world_size`.
        window: Samples that are mixed with each other; see `order.epoch_order`.

    Returns:
        The stream.

    Raises:
        InvalidInputError: There is no such dataset or split, a shard is missing or truncated, or a number does not fit.
    """
    root = Path(root)
    num_workers = world_size if num_workers_planned is None else num_workers_planned
    _check_numbers(batch_size, rank, world_size, num_workers, num_loaders, window)
    manifest = load_manifest(root)
    entry = manifest.split(split)
    verify_sizes(root, entry)
    everything = range(entry.num_samples)
    if shuffle:
        cut = steps(entry.num_samples, batch_size, num_workers, remainder)
        blocks = [share(step, rank, world_size) for step in cut]
        global_sizes = [len(step) for step in cut]
        everything = range(cut[-1].stop)
    else:
        blocks = batches(share(everything, rank, world_size), batch_size)
        global_sizes = [len(block) for block in blocks]
    shard_sizes = tuple(shard.num_samples for shard in entry.shards)
    plan = _Plan(tuple(blocks), tuple(global_sizes), shard_sizes, seed, shuffle, window)
    reader = SampleReader(root, entry, len(manifest.classes))
    dataset = _BatchReader(Pipeline(reader, transform or _plain(manifest), seed))
    stream = Stream(plan, dataset, len(everything), num_loaders)
    if position is not None:
        stream.seek(position["epoch"], position["step"])
    return stream


def _check_numbers(
    batch_size: int, rank: int, world_size: int, num_workers: int, num_loaders: int, window: int
) -> None:
    if batch_size < 1:
        raise InvalidInputError(f"data.batch_size: {batch_size}; a batch holds at least 1 sample")
    if not 0 <= rank < world_size:
        raise InvalidInputError(f"rank: {rank} is outside the {world_size} workers")
    if world_size > num_workers:
        raise InvalidInputError(
            f"cluster.num_workers: {world_size} workers run, but only {num_workers} were planned for"
        )
    if num_loaders < 0:
        raise InvalidInputError(f"data.num_loaders: {num_loaders}; use 0 to read in the training process")
    if window < 1:
        raise InvalidInputError(f"data.window: {window}; use 1 for the shards' own order, more to mix samples")


def _plain(manifest: Manifest) -> Transform:
    image = manifest.image
    mean, std = image.normalization(image.channels)
    size = max(image.height, image.width)
    return make_transform("plain", input_size=size, in_channels=image.channels, mean=mean, std=std, training=False)


def _make_loader(dataset: _BatchReader, requests: _Requests, num_loaders: int) -> "DataLoader[Batch | DabError]":
    context: BaseContext | None = None
    if num_loaders:
        context = multiprocessing.get_context("forkserver")
        augmentation = type(dataset.pipeline.transform.augmentation).__module__
        context.set_forkserver_preload(["torch", "PIL.Image", __name__, augmentation])
    return DataLoader(
        dataset,
        batch_size=None,
        sampler=requests,
        num_workers=num_loaders,
        persistent_workers=num_loaders > 0,
        multiprocessing_context=context,
        worker_init_fn=_die_with_parent,
        # The loader draws a number from this at each start; from the default one, a resumed run would draw once more.
        generator=torch.Generator(),
    )


def _die_with_parent(_loader: int) -> None:
    """Ends a loader when its training process is gone; torch watches the parent, which here is the fork server."""

    def watch() -> None:
        parent = multiprocessing.parent_process()
        if parent is not None:
            parent.join()
            os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
