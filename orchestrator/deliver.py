"""Export, evaluation and prediction of runs and packed files, recorded with the run they come from."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from dabnn import deliver
from dabnn.checkpoints import Checkpoint, best_checkpoint
from dabnn.convert import form_of as form_of
from dabnn.convert import load_model
from dabnn.data import load_manifest
from dabnn.errors import InvalidInputError
from dabnn.models import ModelSpec, Network
from dabnn.packed import Normalization, PackedModel, Provenance
from dabnn.run_folder import RunFolder
from dabnn.verify import Verification
from orchestrator import tracking
from orchestrator.found_runs import best_run as best_run
from orchestrator.found_runs import folder_of
from orchestrator.job import Job

OnBatch = Callable[[int, int], None]


@dataclass(frozen=True)
class Trained:
    """A trained network and how its run was evaluated.

    Attributes:
        net: The network of the best checkpoint, in evaluation mode.
        epoch: Finished epochs at that checkpoint.
        normalization: What is done to images first.
        classes: Names of its classes, in the order of the logits.
        val: Folder or URL of the dataset whose split `val` was used.
        ten_crop: Whether ten crops of each image were averaged.
        batch_size: Images of one batch.
    """

    net: Network
    epoch: int
    normalization: Normalization
    classes: tuple[str, ...]
    val: str
    ten_crop: bool
    batch_size: int


@dataclass(frozen=True)
class Exported:
    """The packed model of a checkpoint.

    Attributes:
        checkpoint: Where it was made from.
        verification: How it compares with the trained network.
        packed: The model.
        file_bytes: Size of its file.
    """

    checkpoint: Checkpoint
    verification: Verification
    packed: PackedModel
    file_bytes: int


def export_run(uri: str, reference: str, file: Path, *, half: bool = False, form: str | None = None) -> dict[str, Any]:
    """Export the best checkpoint of a run, or of the best trial of a sweep; record the file.

    Args:
        uri: The tracking store.
        reference: The run or sweep.
        file: The file to write: .onnx for an ONNX file, .pt2 for a `torch.export` program, else a packed file.
        half: Store scalars and float layers as float16.
        form: packed, onnx or pt2; None by the file's name.

    Returns:
        The keys that `dab export --json` prints. Those of the verification compare the packed model with the trained
        network; for other forms `comparison` compares the file with the packed model.

    Raises:
        InvalidInputError: The run has no checkpoint yet, or the form does not go with the file's name.
        DabError: The packed network or the file disagrees with the trained one; no file was written.
    """
    chosen = form_of(file, form)
    deliver.make_folder_of(file)
    record = best_run(uri, reference)
    folder = folder_of(record)
    with TemporaryDirectory() as temporary:
        packed_file = file if chosen == "packed" else Path(temporary) / "model.safetensors"
        exported = export_best(folder, packed_file, run_id=record.run_id, tags=record.tags, half=half)
    packed, file_bytes, comparison = exported.packed, exported.file_bytes, None
    if chosen != "packed":
        data = Job.load(folder).parsed_config().data
        comparison = deliver.export_converted(packed, file, chosen, data.val or data.train, data.eval_batch_size)
        file_bytes = comparison.file_bytes
    result = asdict(exported.verification) | {
        "file": str(file),
        "run_id": record.run_id,
        "checkpoint_step": exported.checkpoint.step,
        "file_bytes": file_bytes,
        "float_bytes": packed.float_bytes,
        "ratio": packed.float_bytes / file_bytes,
        "format": chosen,
        "rounded": packed.rounded,
    }
    if comparison is not None:
        result["comparison"] = asdict(comparison)
    tracking.log_file(uri, record.run_id, file, "packed")
    tracking.log_json(uri, record.run_id, "packed/verification.json", result)
    return result


def export_best(folder: RunFolder, file: Path, *, run_id: str, tags: Mapping[str, str], half: bool = False) -> Exported:
    """Write the packed model of a run's best checkpoint, compared with the trained network; the tracker is not asked.

    Args:
        folder: The run's folder.
        file: The packed file.
        run_id: The run, for the file.
        tags: What the tracker has of it; commit and data digest go into the file.
        half: Store scalars and float layers as float16.

    Raises:
        InvalidInputError: The run has no checkpoint yet, or its data cannot be read.
        DabError: The packed network disagrees with the trained one; no file was written.
    """
    data = Job.load(folder).parsed_config().data
    checkpoint = best_checkpoint(folder)
    provenance = Provenance(
        run_id=run_id,
        git_commit=tags.get("dab.git_commit"),
        data_digest=tags.get("dab.data_digest"),
        dab_version=version("dab"),
    )
    verification, packed, file_bytes = deliver.export(
        checkpoint.path,
        file,
        train_data=data.train,
        val_data=data.val or data.train,
        transform=data.transform,
        mean=data.mean,
        std=data.std,
        batch_size=data.eval_batch_size,
        half=half,
        provenance=provenance,
    )
    return Exported(checkpoint, verification, packed, file_bytes)


def evaluate_file(
    file: Path, data: Path | str, on_batch: OnBatch | None = None, *, ten_crop: bool = False
) -> dict[str, Any]:
    """Evaluate a packed file on the split `val` of a dataset; return the keys that `dab evaluate --json` prints.

    Args:
        file: The packed file, or one made of it: .onnx, which runs in onnxruntime, or .pt2.
        data: Folder or URL of the dataset.
        on_batch: Told how many images of how many were evaluated.
        ten_crop: Whether to average the answers to ten crops of each image.

    Raises:
        InvalidInputError: The file or the dataset cannot be read, or they have different classes.
    """
    packed = load_model(file)
    if packed.normalization is None:
        raise InvalidInputError(f"{file}: holds no normalisation, so images cannot be prepared. Export the run again.")
    found = _evaluate(packed, packed.spec, packed.normalization, packed.classes, data, ten_crop, on_batch)
    return found | {"provenance": asdict(packed.provenance)}


def evaluate_run(
    uri: str, reference: str, data: str | None, on_batch: OnBatch | None = None, *, ten_crop: bool | None = None
) -> dict[str, Any]:
    """Evaluate the best checkpoint of a run on `data`, or on its own validation data.

    Args:
        uri: The tracking store.
        reference: The run.
        data: Folder or URL of a dataset, or None.
        on_batch: Told how many images of how many were evaluated.
        ten_crop: Whether to average the answers to ten crops of each image; None as the run was configured.

    Raises:
        InvalidInputError: The run has no checkpoint yet, or the dataset cannot be used.
    """
    trained = trained_of(folder_of(best_run(uri, reference)))
    ten_crop = trained.ten_crop if ten_crop is None else ten_crop
    place = data or trained.val
    return _evaluate(trained.net, trained.net.spec, trained.normalization, trained.classes, place, ten_crop, on_batch)


def trained_of(folder: RunFolder) -> Trained:
    """Return the network of a run's best checkpoint, and how the run was evaluated.

    Raises:
        InvalidInputError: The run has no checkpoint yet, or its training data cannot be read.
    """
    data = Job.load(folder).parsed_config().data
    checkpoint = best_checkpoint(folder)
    net = deliver.load_trained(checkpoint.path)
    return Trained(
        net=net,
        epoch=checkpoint.epoch,
        normalization=deliver.prepare(data.train, net.spec, data.transform, data.mean, data.std),
        classes=tuple(load_manifest(data.train).classes),
        val=str(data.val or data.train),
        ten_crop=data.ten_crop,
        batch_size=data.eval_batch_size,
    )


def predict_files(file: Path, images: Sequence[Path]) -> tuple[list[dict[str, Any]], list[dict[str, str]]]:
    """Return, for each image, its path and the most probable classes with probabilities; and the problems of others.

    Raises:
        InvalidInputError: The model cannot be read, or not one image.
    """
    problems: list[dict[str, str]] = []
    predictions = [
        {"image": seen.image, "classes": [{"class": name, "probability": value} for name, value in seen.classes]}
        for seen in deliver.predict(
            file, images, lambda image, error: problems.append({"image": str(image), "message": str(error)})
        )
    ]
    if problems and not predictions:
        raise InvalidInputError(" ".join(problem["message"] for problem in problems))
    return predictions, problems


def _evaluate(
    model: Any,
    spec: ModelSpec,
    normalization: Normalization,
    classes: Sequence[str] | None,
    data: Path | str,
    ten_crop: bool,
    on_batch: OnBatch | None,
) -> dict[str, Any]:
    total = load_manifest(data).split("val").num_samples
    started = time.monotonic()
    metrics = deliver.evaluate_on(
        model,
        spec,
        normalization,
        data,
        classes=classes,
        ten_crop=ten_crop,
        on_batch=None if on_batch is None else lambda done: on_batch(done, total),
    )
    return metrics | {"images_per_s": metrics["num_samples"] / (time.monotonic() - started)}
