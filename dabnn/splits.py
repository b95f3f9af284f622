"""The stream of a run's training or validation split, as its specification says."""

from pathlib import Path

from dabnn.data import Stream, load_manifest, open_stream
from dabnn.data.transforms import make_transform, normalization_for
from dabnn.distributed import World
from dabnn.models import ModelSpec
from dabnn.spec import TrainSpec


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
    root = Path(spec.data.train if is_training else spec.data.val)
    data = spec.data
    image = load_manifest(Path(data.train)).image
    mean, std = normalization_for(data.transform, image, model.in_channels, data.mean, data.std)
    transform = make_transform(
        data.transform,
        input_size=model.input_size,
        in_channels=model.in_channels,
        mean=mean,
        std=std,
        training=is_training,
        ten_crop=data.ten_crop,
    )
    return open_stream(
        root,
        split,
        batch_size=spec.data.batch_size if is_training else spec.data.eval_batch_size,
        seed=spec.seed,
        rank=world.rank,
        world_size=world.size,
        num_loaders=spec.data.num_loaders,
        shuffle=is_training,
        transform=transform,
        remainder=spec.data.remainder if is_training else "keep",
        num_workers_planned=spec.num_workers,
    )
