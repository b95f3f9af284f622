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
class AugmentSpec:
    """What is done to training images besides the transform, see `dabnn.data.augment` and `dabnn.data.mixing`.

    Attributes:
        randaugment_ops: Operations of RandAugment on each image; 0 for none.
        randaugment_magnitude: Their strength, 0 to 30.
        erasing: Probability that a rectangle of an image is erased.
        mixup: Parameter of the Beta distribution that two images are mixed with; 0 for none.
        cutmix: The same for a rectangle of one image put into another; 0 for none.
    """

    randaugment_ops: int = 0
    randaugment_magnitude: int = 9
    erasing: float = 0.0
    mixup: float = 0.0
    cutmix: float = 0.0

    @property
    def is_mixing(self) -> bool:
        """Whether a sample is mixed with a partner."""
        return self.mixup > 0 or self.cutmix > 0


@dataclass(frozen=True)
class DataSpec:
    """Where samples come from and how they become batches.

    Attributes:
        train: Folder or URL with `manifest.json` whose split `train` is learned from.
        val: Folder or URL with `manifest.json` whose split `val` is evaluated.
        batch_size: Samples of one optimizer step over all workers.
        eval_batch_size: Samples of one evaluation batch on one worker.
        num_loaders: Loader processes a worker; 0 loads in the worker itself.
        transform: Name of the transform, see `dabnn.data.transforms`.
        remainder: "keep" or "drop" the samples that do not fill a batch.
        ten_crop: Evaluate the mean of ten crops, see `dabnn.evaluate`.
        mean: What is subtracted from each channel, see `dabnn.data.transforms.normalization_for`; None: the data's own.
        std: What each channel is divided by; None: the data's own.
        augment: What else is done to training images.
        window: Samples of the training split that are mixed with each other, see `dabnn.data.order.epoch_order`.
        max_bad_fraction: Share of an epoch's samples that may be undecodable before the run fails.
        cache_folder: Where shards behind a URL are kept; None: `cache/shards` under DAB_HOME.
        cache_bytes: Most bytes kept there.
        retry_s: How long a server that does not answer is waited for.
        decoded_cache_bytes: Most bytes of decoded images that are kept; 0 decodes them again each epoch.
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
    augment: AugmentSpec = field(default_factory=AugmentSpec)
    window: int = 65536
    max_bad_fraction: float = 0.0
    cache_folder: str | None = None
    cache_bytes: int = 50 * 10**9
    retry_s: float = 600.0
    decoded_cache_bytes: int = 0

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "DataSpec":
        """Build it from what `dataclasses.asdict` returned."""
        spec: DataSpec = _from_plain(cls, values)
        return spec


@dataclass(frozen=True)
class OptimSpec:
    """The optimizer; the learning rate comes from the schedule.

    Attributes:
        name: See `dabnn.optim`.
        weight_decay: L2 coefficient as the named optimizer of torch understands it.
        momentum: Momentum of sgd; ignored by the others.
        nesterov: Nesterov momentum for sgd.
        decay_all: Whether the decay acts on vectors and scalars too, not only on weights of layers.
    """

    name: str = "adam"
    weight_decay: float = 0.0
    momentum: float = 0.9
    nesterov: bool = False
    decay_all: bool = False


@dataclass(frozen=True)
class KurtosisSpec:
    """A penalty on the latent weights of the binary layers, see `dabnn.losses.kurtosis_penalty`.

    Attributes:
        weight: Its factor in the loss.
        target: Kurtosis aimed at.
    """

    weight: float
    target: float = 1.8


@dataclass(frozen=True)
class DistillSpec:
    """A teacher, see `dabnn.losses.distillation`.

    Attributes:
        teacher: Checkpoint file, or "stage:NAME" for the network at the end of an earlier stage of the same run.
        temperature: Divisor of the logits.
        weight: Share of the distillation in the loss of a sample; the cross-entropy has the rest.
    """

    teacher: str
    temperature: float = 4.0
    weight: float = 0.5


@dataclass(frozen=True)
class LossSpec:
    """What is minimised.

    Attributes:
        label_smoothing: Share of the target that is spread evenly over all classes.
        kurtosis: Penalty on the latent weights, or None.
        distill: Teacher, or None.
    """

    label_smoothing: float = 0.0
    kurtosis: KurtosisSpec | None = None
    distill: DistillSpec | None = None


@dataclass(frozen=True)
class StageSpec:
    """One part of a run: it starts with the weights of the part before and a fresh optimizer.

    Attributes:
        name: Unique in the run; empty for the only part of a run without stages.
        epochs: Passes over the training split.
        model: Keyword arguments of `dabnn.models.build`; stages differ in what is binary and how, in nothing else.
        schedule: The learning rate as a function of the stage's own epoch.
        optim: The optimizer.
        loss: What is minimised.
    """

    name: str
    epochs: int
    model: dict[str, Any]
    schedule: Schedule
    optim: OptimSpec = field(default_factory=OptimSpec)
    loss: LossSpec = field(default_factory=LossSpec)


@dataclass(frozen=True)
class CheckpointPolicy:
    """When a checkpoint is written and which are kept.

    Attributes:
        every_epochs: Write after every this many epochs; the last epoch always writes one.
        every_steps: Also write after every this many optimizer steps; None writes between epochs only.
        keep_last: How many of the newest to keep.
        keep_best: How many of the best by `val_top1` to keep.
        retry_s: How long a store behind a URL may be away before the run fails; training goes on meanwhile.
    """

    every_epochs: int = 1
    every_steps: int | None = None
    keep_last: int = 2
    keep_best: int = 1
    retry_s: float = 3600.0


@dataclass(frozen=True)
class TrainSpec:
    """One training run.

    Attributes:
        seed: Decides initial weights, sample order, augmentation and dropout.
        model: Keyword arguments of `dabnn.models.build`, `name` included; with stages, those of the last one.
        data: The samples.
        schedule: The learning rate as a function of the epoch; with stages, that of the last one.
        epochs: Passes over the training split; with stages, the sum of theirs.
        optim: The optimizer; with stages, that of the last one.
        loss: What is minimised; with stages, that of the last one.
        stages: Parts of the run in order; empty for one part, as the fields above say.
        precision: "fp32", or "bf16" for the arithmetic of training steps.
        ema_decay: Decay per step of the weights' moving average that is evaluated and exported; None evaluates the
            weights themselves.
        sync_bn: Whether BatchNorm takes its statistics over all ranks.
        instruments: Whether each layer is measured, see `dabnn.instruments`.
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
    loss: LossSpec = field(default_factory=LossSpec)
    stages: tuple[StageSpec, ...] = ()
    precision: str = "fp32"
    ema_decay: float | None = None
    sync_bn: bool = False
    instruments: bool = True
    num_workers: int = 1
    checkpoint: CheckpointPolicy = field(default_factory=CheckpointPolicy)
    init_from: str | None = None

    def __post_init__(self) -> None:
        """Raise InvalidInputError when the stages do not add up to the run."""
        total = sum(stage.epochs for stage in self.stages)
        if self.stages and total != self.epochs:
            raise InvalidInputError(
                f"train.epochs: {self.epochs}, but the stages take {total} epochs together. Make them equal."
            )

    @property
    def parts(self) -> tuple[StageSpec, ...]:
        """The stages, or the whole run as one without a name."""
        return self.stages or (StageSpec("", self.epochs, self.model, self.schedule, self.optim, self.loss),)

    def first_epoch(self, stage: int) -> int:
        """Return how many epochs come before part number `stage`, counted from 0."""
        return sum(part.epochs for part in self.parts[:stage])

    def to_dict(self) -> dict[str, Any]:
        """Return the specification as plain JSON-able values; `from_dict` is the inverse."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "TrainSpec":
        """Build a specification from what `to_dict` returned.

        Raises:
            InvalidInputError: A key is unknown or missing.
        """
        try:
            spec: TrainSpec = _from_plain(cls, values)
        except TypeError as error:
            raise InvalidInputError(f"specification: {error}. Write it with TrainSpec.to_dict().") from error
        return spec

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


# Field -> the class of its value, or of the entries of its list.
_NESTED: dict[str, type[Any]] = {
    "data": DataSpec,
    "augment": AugmentSpec,
    "schedule": Schedule,
    "optim": OptimSpec,
    "checkpoint": CheckpointPolicy,
    "loss": LossSpec,
    "kurtosis": KurtosisSpec,
    "distill": DistillSpec,
    "stages": StageSpec,
}


def _from_plain(kind: type[Any], values: dict[str, Any]) -> Any:
    return kind(**{key: _value(key, value) for key, value in values.items()})


def _value(key: str, value: Any) -> Any:
    if isinstance(value, list | tuple):
        return tuple(_from_plain(_NESTED[key], entry) for entry in value) if key in _NESTED else tuple(value)
    return _from_plain(_NESTED[key], value) if key in _NESTED and value is not None else value
