"""From what the user wrote to what will run: classes of the data set, model, layer range, the loop's specification.

Everything that can be refused without a cluster is refused here.
"""

import shutil
from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from dabnn.checkpoints import load_state
from dabnn.data import Manifest, load_manifest
from dabnn.data.location import Location
from dabnn.data.reader import verify_files
from dabnn.data.remote import is_url, shown
from dabnn.errors import InvalidInputError
from dabnn.learner import checkpoint_bytes
from dabnn.models import ModelTable, Network, outline, skeleton
from dabnn.options import LayerOptions
from dabnn.run_store import check_access, check_url
from dabnn.schedules import Schedule
from dabnn.spec import (
    AugmentSpec,
    CheckpointPolicy,
    DataSpec,
    DistillSpec,
    KurtosisSpec,
    LossSpec,
    OptimSpec,
    StageSpec,
    TrainSpec,
)
from dabnn.transfer import check_teacher, check_transfer
from orchestrator.config import Config, parts, with_files, with_overrides
from orchestrator.config_rules import STAGE_TEACHER
from orchestrator.config_sections import PlanSets
from orchestrator.config_stages import place
from orchestrator.plan_file import load_plan

LoadState = Callable[[str], dict[str, Any]]
_MEGABYTE, _GIGABYTE = 1e6, 1e9


def resolve(config: Config, find_run: Callable[[str], str] | None = None) -> Config:
    """Return `config` with the number of classes, plans, and files of weights filled in, checked against each other.

    Args:
        config: With absolute paths.
        find_run: Returns the checkpoint file of a run that `train.init_from` or a teacher names; None when runs cannot
            be looked up.

    Raises:
        InvalidInputError: A data set or a shard is missing or truncated, classes differ, the model or a layer of a plan
            does not exist, or weights are those of another architecture.
    """
    if config.storage is not None and is_url(config.storage):
        check_url(config.storage)
    _check_place("data.train", config.data.train)
    _check_place("data.val", config.data.val or config.data.train)
    train, val = (load_manifest(place) for place in (config.data.train, config.data.val or config.data.train))
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
        verify_files(place, manifest.split(split))
    num_classes = len(train.classes)
    if config.model.num_classes not in (None, num_classes):
        raise InvalidInputError(
            f"model.num_classes: {config.model.num_classes}, but {config.data.train} has {num_classes} classes. "
            "Leave it out, or --set model.num_classes=null, to take the data set's."
        )
    epochs = sum(stage.epochs for stage in config.train.stages or ()) or config.train.epochs
    resolved = with_overrides(config, {"model.num_classes": num_classes, "train.epochs": epochs})
    files = [part.binarize.plan for _, part in parts(resolved)]
    resolved = with_files(resolved, lambda field, name: _weights_file(field, name, find_run), _plan_of)
    check_networks(resolved, files)
    return resolved


def _check_place(field: str, place: str) -> None:
    """Refuse a URL that cannot be read, or that would bring a secret into the run's records."""
    try:
        Location.of(place)
    except InvalidInputError as error:
        raise InvalidInputError(f"{field}: {error}") from None
    if is_url(place) and ("?" in place or "#" in place):
        raise InvalidInputError(
            f"{field}: {shown(place)} has a part after the path, such as a signature, which would be kept in the run's "
            "records. Name the folder alone; s3:// takes credentials from the environment of each node."
        )


def _weights_file(field: str, name: str, find_run: Callable[[str], str] | None) -> str:
    if Path(name).is_file() or is_url(name):  # one that cannot be loaded is refused with the networks
        return name
    if "/" in name or name.endswith(".pt") or find_run is None:  # no run is asked for: a wrong path is a wrong path
        raise InvalidInputError(
            f"{field}: {name} is neither a file nor a run. Name a run (`dab runs` lists them), or a step-*.pt file of "
            "its checkpoints folder."
        )
    try:
        return find_run(name)
    except InvalidInputError as error:
        reason = str(error).removeprefix("run: ")
        raise InvalidInputError(f"{field}: {name} is neither a file nor a run that can be taken: {reason}") from None


def _plan_of(field: str, file: str) -> dict[str, Any]:
    try:
        plan = load_plan(Path(file))
    except InvalidInputError as error:
        raise InvalidInputError(f"{field}: {error}") from None
    return {"weights": plan["binary_weights"], "inputs": plan["binary_inputs"]}


def check_networks(config: Config, files: Sequence[object] = (), load: LoadState = load_state) -> None:
    """Refuse a run one of whose networks cannot be built, or does not fit the weights that it would get from elsewhere.

    The networks are built without their memory.

    Args:
        config: With plans and files of weights filled in.
        files: For each part of the run the file that its plan stood in, or anything else.
        load: Reads a checkpoint.

    Raises:
        InvalidInputError: Starts with the stage, where the run has any, and the field.
    """
    nets = []
    for position, stage in enumerate(train_spec(config).parts):
        where = place(position, config.train.stages[position]) if config.train.stages else ""
        try:
            nets.append(skeleton(**stage.model))
            _check_teacher(stage, nets[-1], load)
        except InvalidInputError as error:
            file = files[position] if position < len(files) else None
            is_of_file = isinstance(file, str) and str(error).startswith("binarize.plan.")
            origin = f" The plan is that of {file}." if is_of_file else ""
            raise InvalidInputError(f"{where}{error}{origin}") from None
    if config.train.init_from:
        source = f"train.init_from: {config.train.init_from}"
        check_transfer(_loaded("train.init_from", config.train.init_from, load), nets[0], source)


def _check_teacher(stage: StageSpec, net: Network, load: LoadState) -> None:
    distill = stage.loss.distill
    if distill and not distill.teacher.startswith(STAGE_TEACHER):
        state = _loaded("train.distill.teacher", distill.teacher, load)
        check_teacher(skeleton(**state["model"]).spec, net.spec, distill.teacher)


def _loaded(field: str, file: str, load: LoadState) -> dict[str, Any]:
    try:
        return load(file)
    except InvalidInputError as error:
        raise InvalidInputError(f"{field}: {error}") from None


def model_table(config: Config) -> ModelTable:
    """Return the layer table of the configured model."""
    return outline(**train_spec(config).model)


def manifest_of(config: Config) -> Manifest:
    """Return the manifest of the training data."""
    return load_manifest(config.data.train)


def train_spec(config: Config) -> TrainSpec:
    """Return the specification of the training loop for `config`."""
    train = config.train
    stages = tuple(_stage_spec(name, part) for name, part in parts(config))
    last = stages[-1]
    return TrainSpec(
        seed=config.seed,
        model=last.model,
        data=_data_spec(config),
        schedule=last.schedule,
        optim=last.optim,
        loss=last.loss,
        stages=stages if train.stages else (),
        epochs=sum(stage.epochs for stage in stages),
        precision=train.precision,
        ema_decay=train.ema_decay,
        sync_bn=train.sync_bn,
        instruments=train.instruments,
        num_workers=config.cluster.num_processes,
        checkpoint=CheckpointPolicy(**train.checkpoint.model_dump()),
        init_from=train.init_from,
    )


def _data_spec(config: Config) -> DataSpec:
    data = config.data
    values = data.model_dump(exclude={"augment", "cache_gb", "decoded_cache_gb"})
    augment = data.augment.model_dump(exclude={"randaugment"})
    if data.augment.randaugment:
        augment |= {f"randaugment_{key}": value for key, value in data.augment.randaugment.model_dump().items()}
        augment["randaugment_ops"] = augment.pop("randaugment_num_ops")
    return DataSpec(
        **values | {"val": data.val or data.train},
        augment=AugmentSpec(**augment),
        cache_bytes=int(data.cache_gb * _GIGABYTE),
        decoded_cache_bytes=int(data.decoded_cache_gb * _GIGABYTE),
    )


def _stage_spec(name: str, part: Config) -> StageSpec:
    optim, train = part.optim, part.train
    schedule = part.schedule.model_dump() | {"max_lr": optim.max_lr, "min_lr": optim.min_lr, "epochs": train.epochs}
    return StageSpec(
        name=name,
        epochs=train.epochs,
        model=_model(part),
        schedule=Schedule(**schedule),
        optim=OptimSpec(**optim.model_dump(exclude={"max_lr", "min_lr"})),
        loss=LossSpec(
            train.label_smoothing,
            KurtosisSpec(**train.kurtosis.model_dump()) if train.kurtosis else None,
            DistillSpec(**train.distill.model_dump()) if train.distill else None,
        ),
    )


def _model(part: Config) -> dict[str, Any]:
    """Return the keyword arguments of `build`; options that were not chosen are left to the model."""
    binarize = part.binarize
    options = {field.name: getattr(binarize, field.name) for field in fields(LayerOptions)}
    plan = binarize.plan.model_dump() if isinstance(binarize.plan, PlanSets) else binarize.plan
    if isinstance(plan, str):
        plan = _plan_of("binarize.plan", plan)
    return part.model.model_dump() | {
        "bin_start": binarize.bin_start,
        "bin_end": binarize.bin_end,
        "weights": binarize.weights,
        "center": binarize.center,
        "inputs": binarize.inputs,
        "layers": binarize.layers,
        "plan": plan and {"binary_weights": plan["weights"], "binary_inputs": plan["inputs"]},
        "options": {key: value for key, value in options.items() if value is not None},
    }


def check_room(config: Config, storage: Path | str) -> None:
    """Refuse a run whose checkpoints would not fit on the disk of `storage`, or a URL that cannot be written to.

    How much room there is behind a URL cannot be asked: before its first step a run writes as much as a checkpoint.

    Raises:
        InvalidInputError: Names the space needed and free.
        DabError: The store refuses, is full, or does not answer.
    """
    if is_url(str(storage)):
        check_access(str(storage))
        return
    storage = Path(storage)
    policy = config.train.checkpoint
    kept = policy.keep_last + policy.keep_best + len(parts(config)) - 1  # the end of each stage stays
    needed = checkpoint_bytes(train_spec(config)) * (kept + 1)
    existing = next(folder for folder in (storage, *storage.parents) if folder.exists())
    free = shutil.disk_usage(existing).free
    if needed > free:
        raise InvalidInputError(
            f"storage: no room on disk: checkpoints need up to {needed / _MEGABYTE:.0f} MB in {storage}, "
            f"{free / _MEGABYTE:.0f} MB are free. Free some space, set storage to another folder, or lower "
            "train.checkpoint.keep_last."
        )
