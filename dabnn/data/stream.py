"""A deterministic, resumable stream of batches from shards.

What a step holds is decided by `order` alone, `requests` puts that into words, `loaders` has it read, in this process
or ahead of it in others. docs/stream.md says what is promised and why it holds.
"""

import logging
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Self

import torch
from torch import Tensor

from dabnn.data.bad_samples import BadSamples
from dabnn.data.decoded_cache import open_decoded
from dabnn.data.loaders import Answer, BatchReader, Loaders
from dabnn.data.manifest import Manifest, load_manifest
from dabnn.data.order import batches, share, steps
from dabnn.data.pipeline import Pipeline
from dabnn.data.reader import SampleReader, verify_files
from dabnn.data.requests import Plan, Requests
from dabnn.data.shard_cache import ShardCache, default_folder
from dabnn.data.transforms import Transform, make_transform
from dabnn.errors import DabError, InvalidInputError

DEFAULT_WINDOW = 65536
_MAX_LOGGED = 5  # bad samples of an epoch and rank; the metric counts all

_log = logging.getLogger(__name__)


def _no_indices() -> Tensor:
    return torch.empty(0, dtype=torch.int64)


@dataclass(frozen=True)
class Batch:
    """One rank's part of a step.

    Attributes:
        images: float32 (n, C, H, W), normalised; (n, 10, C, H, W) where the transform makes ten crops.
        labels: int64 (n,).
        indices: int64 (n,): each sample's index in the split.
        global_size: Samples of the step over all ranks, bad ones included.
        partner_labels: int64 (n,): with mixing, the labels of the images that were mixed in; else None.
        weights: float32 (n,): with mixing, the share of the first label in the loss.
        bad_indices: int64: samples that belong here and cannot be decoded.
        bad: What is wrong with each of them, by shard, key and name.
    """

    images: Tensor
    labels: Tensor
    indices: Tensor
    global_size: int
    partner_labels: Tensor | None = None
    weights: Tensor | None = None
    bad_indices: Tensor = field(default_factory=_no_indices)
    bad: tuple[str, ...] = ()

    @property
    def partners(self) -> tuple[Tensor, Tensor] | None:
        """With mixing, `partner_labels` and `weights`; else nothing."""
        return None if self.partner_labels is None or self.weights is None else (self.partner_labels, self.weights)

    @property
    def num_bad(self) -> int:
        """Samples that belong here and cannot be decoded: they weigh nothing in the step."""
        return len(self.bad)


class Stream:
    """Batches of one rank, epoch after epoch; `open_stream` opens one. Close it, or use it in a `with` statement.

    Attributes:
        num_steps: Batches of this rank in an epoch.
        num_samples: Samples in an epoch over all ranks.
        bad: Samples of this rank that could not be decoded, among those read in the last epoch that was read.
    """

    def __init__(
        self,
        plan: Plan,
        reader: BatchReader,
        *,
        num_samples: int,
        num_loaders: int,
        max_bad_fraction: float,
        device: torch.device | None,
    ) -> None:
        """Take what `open_stream` made."""
        self.num_steps = len(plan.blocks)
        self.num_samples = num_samples
        self._plan, self._device, self._transform = plan, device, reader.pipeline.transform
        self._is_finished = reader.is_finished
        self.bad, self._max_bad_fraction = BadSamples(), max_bad_fraction
        self._next = (0, 0)
        requests = Requests(plan, reader.pipeline)
        self._loaders: Loaders | None = Loaders(reader, requests, num_loaders)

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
            self._next = (epoch, step)
            self._open().move()

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
        self._open().begin_epoch()
        for step in range(start_step, self.num_steps):
            answer = self._open().next(self._next)
            if isinstance(answer, DabError):
                self._open().move()
                raise answer
            self._count_bad(answer, epoch)
            self._next = (epoch, step + 1) if step + 1 < self.num_steps else (epoch + 1, 0)
            yield self._batch(answer, len(self._plan.steps[step]))

    def __iter__(self) -> Iterator[Batch]:
        """Yields the rest of the epoch in which the position is; iterating again gives the next epoch."""
        return self.epoch(*self._next)

    def close(self) -> None:
        """Ends the loader processes and closes the files; the stream cannot be read any more."""
        if self._loaders is not None:
            self._loaders.close()
            self._loaders = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _open(self) -> Loaders:
        if self._loaders is None:
            raise ValueError("the stream is closed")
        return self._loaders

    def _batch(self, answer: Answer, global_size: int) -> Batch:
        images = answer.images if self._device is None else answer.images.to(self._device)
        partner_labels, weights = answer.partner_labels, answer.weights
        return Batch(
            images if self._is_finished else self._transform.batch(images),
            torch.from_numpy(answer.labels).to(images.device),
            torch.from_numpy(answer.indices),
            global_size,
            None if partner_labels is None else torch.from_numpy(partner_labels).to(images.device),
            None if weights is None else torch.from_numpy(weights).to(images.device),
            torch.from_numpy(answer.bad_indices),
            answer.bad,
        )

    def _count_bad(self, answer: Answer, epoch: int) -> None:
        for description in answer.bad[: max(_MAX_LOGGED - self.bad.num, 0)]:
            _log.warning("%s; the sample is left out", description)
        self.bad.add(epoch, answer.bad)
        self.bad.check(self.num_samples, self._max_bad_fraction)


def open_stream(
    root: Path | str,
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
    max_bad_fraction: float = 0.0,
    cache: ShardCache | None = None,
    decoded_bytes: int = 0,
    device: torch.device | None = None,
) -> Stream:
    """Opens a split of a dataset as a stream of batches.

    With `shuffle` the stream is for training: an epoch is cut into steps of `batch_size` samples over all ranks, each
    rank gets a contiguous block of every step, and all ranks have equally many. The samples of a step depend on `seed`,
    the epoch and the step, and on neither `world_size` nor `num_loaders`; nor do their augmentations.

    Without, it is for evaluation: the split's order, each rank a contiguous block of the split, in batches of
    `batch_size` each. Together the ranks see every sample once; one may have a batch more than another, or none.

    Args:
        root: The dataset's folder or URL.
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
        max_bad_fraction: Share of an epoch's samples that may be undecodable; one more is an error. Other ranks' are
            not counted here.
        cache: Keeps shards from behind a URL; by default one under DAB_HOME.
        decoded_bytes: Most bytes of decoded images that are kept beside it; see `decoded_cache`.
        device: Where batches go, as uint8, to be normalised there; by default they stay, and whoever reads normalises.

    Returns:
        The stream.

    Raises:
        InvalidInputError: There is no such dataset or split, a shard is missing or truncated, or a number does not fit.
    """
    num_workers = world_size if num_workers_planned is None else num_workers_planned
    _check_numbers(batch_size, rank, world_size, num_workers, num_loaders, window)
    manifest = load_manifest(root)
    entry = manifest.split(split)
    state = verify_files(root, entry)
    if shuffle:
        cut = steps(entry.num_samples, batch_size, num_workers, remainder)
        blocks = [share(step, rank, world_size) for step in cut]
    else:
        cut = blocks = batches(share(range(entry.num_samples), rank, world_size), batch_size)
    plan = Plan(
        tuple(cut),
        tuple(blocks),
        tuple(shard.num_samples for shard in entry.shards),
        seed=seed,
        shuffle=shuffle,
        window=window,
        is_mixing=shuffle and transform is not None and transform.added.is_mixing,
    )
    stored = SampleReader(root, entry, len(manifest.classes), cache)
    stored.require_room(window if shuffle else 1)
    transform = transform or _plain(manifest)
    folder = (default_folder() if cache is None else cache.folder).parent / "decoded"
    decoded = open_decoded(folder, decoded_bytes, manifest, split, transform.in_channels, state)
    pipeline = Pipeline(stored, transform, seed, decoded)
    reader = BatchReader(pipeline, is_training=shuffle, tolerates_bad=max_bad_fraction > 0, is_finished=device is None)
    stream = Stream(
        plan,
        reader,
        num_samples=cut[-1].stop if shuffle else entry.num_samples,
        num_loaders=num_loaders,
        max_bad_fraction=max_bad_fraction,
        device=device,
    )
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
