"""From what the user wrote to what will run: classes of the data set, model, layer range, the loop's specification.

Everything that can be refused without a cluster is refused here.
"""

import shutil
from pathlib import Path

from dabnn.data import Manifest, load_manifest
from dabnn.data.reader import verify_sizes
from dabnn.errors import InvalidInputError
from dabnn.models import ModelTable, build, describe
from dabnn.schedules import Schedule
from dabnn.spec import CheckpointPolicy, DataSpec, OptimSpec, TrainSpec
from orchestrator.config import Config, with_overrides

_ADAM_COPIES = 3  # weights and two moments
_MEGABYTE = 1e6


def resolve(config: Config) -> Config:
    """Return `config` with the number of classes filled in from the data set, checked against data and model.

    Raises:
        InvalidInputError: A data set or a shard is missing or truncated, classes differ, the model or its layer range
            does not exist.
    """
    for field, place in (("storage", config.storage), ("data.train", config.data.train), ("data.val", config.data.val)):
        if place is not None and "://" in place:
            raise InvalidInputError(
                f"{field}: {place} is a URL; this version reads and writes folders only. Name a folder that every node "
                "sees."
            )
    train, val = (load_manifest(Path(path)) for path in (config.data.train, config.data.val or config.data.train))
    if train.classes != val.classes:
        raise InvalidInputError(
            f"data.val: {config.data.val} has {len(val.classes)} classes, data.train {len(train.classes)}, or others. "
            "Build both from the same source."
        )
    for split, manifest in (("train", train), ("val", val)):
        if split not in manifest.splits:
            raise InvalidInputError(
                f"data.{split}: the data set has no split {split!r}, only {', '.join(manifest.splits)}."
            )
        place = config.data.train if split == "train" else config.data.val or config.data.train
        verify_sizes(Path(place), manifest.split(split))
    num_classes = len(train.classes)
    if config.model.num_classes not in (None, num_classes):
        raise InvalidInputError(
            f"model.num_classes: {config.model.num_classes}, but {config.data.train} has {num_classes} classes. "
            "Leave it out, or --set model.num_classes=null, to take the data set's."
        )
    resolved = with_overrides(config, {"model.num_classes": num_classes})
    model_table(resolved)
    return resolved


def model_table(config: Config) -> ModelTable:
    """Return the layer table of the configured model."""
    return describe(build(**train_spec(config).model))


def manifest_of(config: Config) -> Manifest:
    """Return the manifest of the training data."""
    return load_manifest(Path(config.data.train))


def train_spec(config: Config) -> TrainSpec:
    """Return the specification of the training loop for `config`."""
    model, binarize, data, optim = config.model, config.binarize, config.data, config.optim
    return TrainSpec(
        seed=config.seed,
        model={
            "name": model.name,
            "num_classes": model.num_classes,
            "in_channels": model.in_channels,
            "input_size": model.input_size,
            "width": model.width,
            "bin_start": binarize.bin_start,
            "bin_end": binarize.bin_end,
            "weights": binarize.weights,
            "center": binarize.center,
            "inputs": binarize.inputs,
        },
        data=DataSpec(
            train=data.train,
            val=data.val or data.train,
            batch_size=data.batch_size,
            eval_batch_size=data.eval_batch_size,
            num_loaders=data.num_loaders,
            transform=data.transform,
            remainder=data.remainder,
            ten_crop=data.ten_crop,
            mean=data.mean,
            std=data.std,
        ),
        schedule=Schedule(
            name=config.schedule.name,
            max_lr=optim.max_lr,
            min_lr=optim.min_lr,
            interval=config.schedule.interval,
            level=config.schedule.level,
            warmup_epochs=config.schedule.warmup_epochs,
            epochs=config.train.epochs,
        ),
        optim=OptimSpec(optim.name, optim.weight_decay, optim.momentum, optim.nesterov),
        epochs=config.train.epochs,
        instruments=config.train.instruments,
        num_workers=config.cluster.num_workers,
        checkpoint=CheckpointPolicy(**config.train.checkpoint.model_dump()),
        init_from=config.train.init_from,
    )


def check_room(config: Config, storage: Path) -> None:
    """Refuse a run whose checkpoints would not fit on the disk of `storage`.

    Raises:
        InvalidInputError: Names the space needed and free.
    """
    table = model_table(config)
    policy = config.train.checkpoint
    needed = table.float_bytes * _ADAM_COPIES * (policy.keep_last + policy.keep_best + 1)
    existing = next(folder for folder in (storage, *storage.parents) if folder.exists())
    free = shutil.disk_usage(existing).free
    if needed > free:
        raise InvalidInputError(
            f"storage: no room on disk: checkpoints need up to {needed / _MEGABYTE:.0f} MB in {storage}, "
            f"{free / _MEGABYTE:.0f} MB are free. Free some space, set storage to another folder, or lower "
            "train.checkpoint.keep_last."
        )
