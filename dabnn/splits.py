"""The stream of a run's training or validation split, as its specification says."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dabnn.data import Stream, load_manifest, open_stream
from dabnn.data.shard_cache import ShardCache, default_folder
from dabnn.data.transforms import make_transform, normalization_for
from dabnn.distributed import World
from dabnn.errors import InvalidInputError
from dabnn.models import ModelSpec
from dabnn.spec import DataSpec, TrainSpec

# What decides which samples a step of an epoch holds, by the key that a user writes.
_ORDER_KEYS = ("seed", "data.batch_size", "data.remainder", "data.window", "cluster.num_workers")


def open_split(spec: TrainSpec, model: ModelSpec, split: str, world: World) -> Stream:
    """Return this rank's part of a split.

    Args:
        spec: The run.
        model: Its network, for the size of the images.
        split: "train", augmented and shuffled, or "val".
        world: The ranks.

    Raises:
        InvalidInputError: The data set cannot be read, or the transform does not fit.
    """
    is_training = split == "train"
    data = spec.data
    image = load_manifest(data.train).image
    mean, std = normalization_for(data.transform, image, model.in_channels, data.mean, data.std)
    transform = make_transform(
        data.transform,
        input_size=model.input_size,
        in_channels=model.in_channels,
        mean=mean,
        std=std,
        training=is_training,
        ten_crop=data.ten_crop,
        augment=data.augment,
    )
    return open_stream(
        data.train if is_training else data.val,
        split,
        batch_size=data.batch_size if is_training else data.eval_batch_size,
        seed=spec.seed,
        rank=world.rank,
        world_size=world.size,
        num_loaders=data.num_loaders,
        shuffle=is_training,
        transform=transform,
        remainder=data.remainder if is_training else "keep",
        num_workers_planned=spec.num_workers,
        window=data.window,
        max_bad_fraction=data.max_bad_fraction,
        cache=shard_cache(data),
        decoded_bytes=data.decoded_cache_bytes,
        # Bytes are a quarter of the floats, over shared memory and over the bus.
        device=world.device if world.device.type == "cuda" else None,
    )


def shard_cache(data: DataSpec) -> ShardCache:
    """Return the cache for shards behind a URL; nothing is created before one is read."""
    folder = default_folder() if data.cache_folder is None else Path(data.cache_folder)
    return ShardCache(folder, data.cache_bytes, data.retry_s)


def order_settings(spec: TrainSpec) -> dict[str, Any]:
    """Return what decides which samples a step holds, for a checkpoint that is taken in mid-epoch."""
    values = (spec.seed, spec.data.batch_size, spec.data.remainder, spec.data.window, spec.num_workers)
    return dict(zip(_ORDER_KEYS, values, strict=True))


def check_data(spec: TrainSpec, digest: str, saved: str) -> None:
    """Refuse to go on with other samples than the run began with.

    Args:
        spec: The run.
        digest: Of its data set now.
        saved: Of the one that it began with.

    Raises:
        InvalidInputError: They differ.
    """
    if digest != saved:
        raise InvalidInputError(
            f"data.train: {spec.data.train} has other samples than the run began with (digest {digest[:12]}, the "
            f"checkpoint has {saved[:12]}). Restore the data set, or start a new run."
        )


def check_order(spec: TrainSpec, saved: Mapping[str, Any]) -> None:
    """Refuse to go on in mid-epoch with steps that hold other samples than those before.

    Args:
        spec: The run as it is now.
        saved: What `order_settings` returned when the checkpoint was taken; empty for one from before it was kept.

    Raises:
        InvalidInputError: Names the first setting that differs.
    """
    for key, value in order_settings(spec).items():
        if key in saved and saved[key] != value:
            raise InvalidInputError(
                f"{key}: {value}, but the run is in the middle of an epoch that began with {saved[key]}, so samples "
                "would be lost and repeated. Resume with the value that it began with."
            )
