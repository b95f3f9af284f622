"""Export, evaluation and prediction of runs and packed files, recorded with the run they come from."""

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from dabnn import deliver
from dabnn.checkpoints import best_checkpoint
from dabnn.convert import form_of as form_of
from dabnn.convert import load_model
from dabnn.data import load_manifest
from dabnn.errors import InvalidInputError
from dabnn.models import ModelSpec, Network
from dabnn.packed import Normalization, Provenance
from dabnn.run_folder import RunFolder
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
    data = Job.load(folder_of(record)).parsed_config().data
    checkpoint = best_checkpoint(folder_of(record))
    val = data.val or data.train
    with TemporaryDirectory() as folder:
        verification, packed, file_bytes = deliver.export(
            checkpoint.path,
            file if chosen == "packed" else Path(folder) / "model.safetensors",
            train_data=data.train,
            val_data=val,
            transform=data.transform,
            mean=data.mean,
            std=data.std,
            batch_size=data.eval_batch_size,
            half=half,
            provenance=Provenance(
                run_id=record.run_id,
                git_commit=record.tags.get("dab.git_commit"),
                data_digest=record.tags.get("dab.data_digest"),
                dab_version=version("dab"),
            ),
        )
    comparison = None
    if chosen != "packed":
        comparison = deliver.export_converted(packed, file, chosen, val, data.eval_batch_size)
        file_bytes = comparison.file_bytes
    result = asdict(verification) | {
        "file": str(file),
        "run_id": record.run_id,
        "checkpoint_step": checkpoint.step,
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
