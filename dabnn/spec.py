"""What a training run is made of, as frozen dataclasses that `dabnn` understands without a configuration library.

`orchestrator.config` validates what a user writes and turns it into a `TrainSpec`; `torchrun -m dabnn.train` reads
one from JSON. Rank, device and handles are not here: they are arguments of the loop.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from dabnn.errors import InvalidInputError
from dabnn.schedules import Schedule


@dataclass(frozen=True)
class DataSpec:
    """Where samples come from and how they become batches.

    Attributes:
        train: Folder with `manifest.json` whose split `train` is learned from.
        val: Folder with `manifest.json` whose split `val` is evaluated.
        batch_size: Samples of one optimizer step over all workers.
        eval_batch_size: Samples of one evaluation batch on one worker.
        num_loaders: Loader processes a worker; 0 loads in the worker itself.
        transform: Name of the transform, see `dabnn.data.transforms`.
        remainder: "keep" or "drop" the samples that do not fill a batch.
        ten_crop: Evaluate the mean of ten crops, see `dabnn.evaluate`.
        mean: What is subtracted from each channel, see `dabnn.data.transforms.normalization_for`; None: the data's own.
        std: What each channel is divided by; None: the data's own.
    """

    train: str
    val: str
    batch_size: int
    eval_batch_size: int = 256
    num_loaders: int = 0
    transform: str = "auto"
    remainder: str = "keep"
    ten_crop: bool = False
    mean: Sequence[float] | None = None
    std: Sequence[float] | None = None


@dataclass(frozen=True)
class OptimSpec:
    """The optimizer; the learning rate comes from the schedule.

    Attributes:
        name: "adam", "adamw" or "sgd".
        weight_decay: L2 coefficient as the named optimizer of torch understands it.
        momentum: Momentum of sgd; ignored by the others.
        nesterov: Nesterov momentum for sgd.
    """

    name: str = "adam"
    weight_decay: float = 0.0
    momentum: float = 0.9
    nesterov: bool = False


@dataclass(frozen=True)
class CheckpointPolicy:
    """When a checkpoint is written and which are kept.

    Attributes:
        every_epochs: Write after every this many epochs; the last epoch always writes one.
        every_steps: Also write after every this many optimizer steps; None writes between epochs only.
        keep_last: How many of the newest to keep.
        keep_best: How many of the best by `val_top1` to keep.
    """

    every_epochs: int = 1
    every_steps: int | None = None
    keep_last: int = 2
    keep_best: int = 1


@dataclass(frozen=True)
class TrainSpec:
    """One training run.

    Attributes:
        seed: Decides initial weights, sample order, augmentation and dropout.
        model: Keyword arguments of `dabnn.models.build`, `name` included.
        data: The samples.
        schedule: The learning rate as a function of the epoch.
        optim: The optimizer.
        epochs: Passes over the training split.
        num_workers: Planned number of ranks; decides how a small last batch is merged.
        checkpoint: When to write checkpoints.
        init_from: Checkpoint file whose weights a fresh run starts from, or None.
    """

    seed: int
    model: dict[str, Any]
    data: DataSpec
    schedule: Schedule
    epochs: int
    optim: OptimSpec = field(default_factory=OptimSpec)
    num_workers: int = 1
    checkpoint: CheckpointPolicy = field(default_factory=CheckpointPolicy)
    init_from: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return the specification as plain JSON-able values; `from_dict` is the inverse."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "TrainSpec":
        """Build a specification from what `to_dict` returned.

        Raises:
            InvalidInputError: A key is unknown or missing.
        """
        parts = dict(values)
        nested = {"data": DataSpec, "schedule": Schedule, "optim": OptimSpec, "checkpoint": CheckpointPolicy}
        try:
            for key, kind in nested.items():
                if key in parts:
                    parts[key] = kind(**parts[key])
            return cls(**parts)
        except TypeError as error:
            raise InvalidInputError(f"specification: {error}. Write it with TrainSpec.to_dict().") from error

    @classmethod
    def from_file(cls, path: Path) -> "TrainSpec":
        """Read a specification from a JSON file.

        Raises:
            InvalidInputError: The file is missing, is not JSON, or a key is unknown or missing.
        """
        try:
            return cls.from_dict(json.loads(path.read_text()))
        except (OSError, json.JSONDecodeError) as error:
            raise InvalidInputError(f"{path}: no readable specification ({error}).") from error
