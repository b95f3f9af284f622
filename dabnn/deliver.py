"""From a checkpoint to something a person uses: load the trained network, export it packed, evaluate, predict.

The checks of an export are `dabnn.verify`; the file is `dabnn.packed`, files for other programs are `dabnn.convert`.
Leaves out where checkpoints come from.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from dabnn.classifier import Classifier
from dabnn.convert import Comparison, Form, convert, load_model
from dabnn.data import Batch, load_manifest, open_stream
from dabnn.data.transforms import make_transform, normalization_for
from dabnn.errors import DabError, InvalidInputError
from dabnn.evaluate import count
from dabnn.models import ModelSpec
from dabnn.packed import Normalization, PackedModel, Provenance, load_packed, pack
from dabnn.transfer import load_trained as load_trained
from dabnn.verify import Verification, verify

NUM_PREDICTIONS = 5


@dataclass(frozen=True)
class Prediction:
    """What a network sees in an image.

    Attributes:
        image: The file.
        classes: (name, probability) of the most probable classes, the most probable first.
    """

    image: str
    classes: tuple[tuple[str, float], ...]


def export(
    checkpoint: str | Path,
    file: Path,
    *,
    train_data: Path | str,
    val_data: Path | str,
    transform: str = "auto",
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    batch_size: int = 64,
    half: bool = False,
    provenance: Provenance | None = None,
) -> tuple[Verification, PackedModel, int]:
    """Write the packed model of a checkpoint, after comparing it with the trained network on every validation image.

    What is compared is the file itself, read back under a temporary name; it gets its own name when it passed. Each
    image is compared once, also where the network is otherwise evaluated on ten crops.

    Args:
        checkpoint: Checkpoint of the trained network.
        file: The packed file; its folder is created.
        train_data: Folder or URL of the dataset that the normalisation comes from.
        val_data: Folder or URL of the dataset whose split `val` is compared on.
        transform: Name of the transform that the network was trained with.
        mean: Fixed mean that it was trained with, per channel, or None for that of the data.
        std: Fixed standard deviation that it was trained with, per channel, or None.
        batch_size: Images of one batch of the comparison.
        half: Store scalars and float layers as float16; where that changes too many classes, only what no sign depends
            on (`PackedModel.rounded` says which).
        provenance: Where the checkpoint comes from, for the file.

    Returns:
        The comparison, the packed model, and the size of the file in bytes.

    Raises:
        InvalidInputError: Checkpoint or dataset cannot be read.
        DabError: The packed network disagrees with the trained one, or the disk is full; no file was written.
    """
    net = load_trained(checkpoint)
    prepared = prepare(train_data, net.spec, transform, mean, std)
    make_folder_of(file)
    unchecked = file.with_name(f".{file.name}.unchecked-{os.getpid()}")  # another export may go to the same file
    try:
        classes = load_manifest(train_data).classes
        made = pack(net, classes=classes, normalization=prepared, provenance=provenance)
        # First all that may be rounded, then, where that turns too many signs, only what no sign depends on.
        for keep_signs in (False, True) if half else (False,):
            num_bytes = made.save(unchecked, half=half, keep_signs=keep_signs)
            packed = load_packed(unchecked)
            verification = verify(net, packed, val_batches(val_data, net.spec, prepared, batch_size))
            if not verification.problems:
                break
        else:
            problems = " ".join(verification.problems)
            raise DabError(
                f"export: the packed network disagrees with the trained one, nothing was written: {problems}"
            )
        unchecked.replace(file)
    finally:
        unchecked.unlink(missing_ok=True)
    return verification, packed, num_bytes


def export_converted(packed: PackedModel, file: Path, form: Form, val_data: Path | str, batch_size: int) -> Comparison:
    """Write a packed model as a file for other programs, after comparing it on every validation image.

    Args:
        packed: From `export`.
        file: The file; its folder is created.
        form: onnx or pt2.
        val_data: Folder or URL of the dataset whose split `val` is compared on.
        batch_size: Images of one batch of the comparison.

    Raises:
        InvalidInputError: The model has no such form, or the dataset cannot be read.
        DabError: The file disagrees with the packed model, or the disk is full; no file was written.
    """
    if packed.normalization is None:
        raise InvalidInputError(f"{file}: the packed model holds no normalisation. Export the run again.")
    make_folder_of(file)
    return convert(packed, file, form, val_batches(val_data, packed.spec, packed.normalization, batch_size))


def make_folder_of(file: Path) -> None:
    """Make the folder that a file is about to be written to.

    Raises:
        InvalidInputError: The file is a folder, or its folder cannot be made.
    """
    if file.is_dir():
        raise InvalidInputError(f"{file}: is a folder. Name the file to write, such as {file / 'model.safetensors'}.")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InvalidInputError(f"{file}: its folder cannot be made ({error}). Name a file elsewhere.") from error


def evaluate_on(
    model: Callable[[Tensor], Tensor],
    spec: ModelSpec,
    normalization: Normalization,
    data: Path | str,
    *,
    classes: Sequence[str] | None = None,
    ten_crop: bool = False,
    batch_size: int = 64,
    on_batch: Callable[[int], None] | None = None,
) -> dict[str, float]:
    """Return `loss`, `top1`, `top5` (percent) and `num_samples` of a network over the split `val` of a dataset.

    Args:
        model: Images to logits; a network in evaluation mode or a packed model.
        spec: Its architecture, for the size of its images.
        normalization: What is done to images first.
        data: The dataset.
        classes: Names of the classes that the network knows, in the order of its logits; None when unknown.
        ten_crop: Average the answers to ten crops of each image, see `dabnn.evaluate`.
        batch_size: Images of one batch.
        on_batch: Told the number of images that were evaluated.

    Raises:
        InvalidInputError: The dataset cannot be read, or has other classes than the network has logits.
    """
    _check_classes(data, spec.num_classes, classes)
    batches = _counted(val_batches(data, spec, normalization, batch_size, ten_crop=ten_crop), on_batch)
    totals = count(model, batches, torch.device("cpu"))
    return totals.metrics("") | {"num_samples": int(totals.num_samples)}


def _check_classes(data: Path | str, num_classes: int, classes: Sequence[str] | None) -> None:
    found = load_manifest(data).classes
    if len(found) != num_classes:
        difference = f"has {len(found)} classes, the network tells {num_classes} apart"
    elif classes is not None and tuple(classes) != tuple(found):
        first = next((own, other) for own, other in zip(classes, found, strict=True) if own != other)
        difference = f"has a class {first[1]!r} where the network knows {first[0]!r}"
    else:
        return
    raise InvalidInputError(f"--data: {data} {difference}. Use a dataset with the classes that it was trained on.")


def val_batches(
    data: Path | str,
    spec: ModelSpec,
    normalization: Normalization,
    batch_size: int,
    *,
    ten_crop: bool = False,
) -> Iterator[Batch]:
    """Yield the split `val` of a dataset in order, prepared as for evaluation; images are their ten crops if asked."""
    made = make_transform(
        normalization.transform,
        input_size=spec.input_size,
        in_channels=spec.in_channels,
        mean=normalization.mean,
        std=normalization.std,
        training=False,
        ten_crop=ten_crop,
    )
    with open_stream(data, "val", batch_size=batch_size, shuffle=False, transform=made) as stream:
        yield from stream.epoch(0)


def predict(
    file: Path, images: Sequence[Path], on_bad: Callable[[Path, InvalidInputError], None] | None = None
) -> list[Prediction]:
    """Return what a packed model, or a file made of one (`dabnn.convert`), sees in image files.

    Args:
        file: The model.
        images: The images.
        on_bad: Told of each image that cannot be read, which is then left out; None refuses the first.

    Raises:
        InvalidInputError: The model or an image cannot be read; the message names the file.
    """
    classifier = Classifier.of(load_model(file), file)
    found = []
    for image in images:
        try:
            pixels = _pixels(classifier, image)
        except InvalidInputError as error:
            if on_bad is None:
                raise
            on_bad(image, error)
        else:
            found.append(_predict_one(classifier, image, pixels))
    return found


def _pixels(classifier: Classifier, image: Path) -> Tensor:
    try:
        data = image.read_bytes()
    except OSError as error:
        raise InvalidInputError(f"{image}: no readable image ({error}).") from error
    return classifier.pixels(data, image)


def _predict_one(classifier: Classifier, image: Path, pixels: Tensor) -> Prediction:
    best = classifier.probabilities([pixels])[0].topk(min(NUM_PREDICTIONS, len(classifier.classes)))
    pairs = zip(best.indices.tolist(), best.values.tolist(), strict=True)
    return Prediction(str(image), tuple((classifier.classes[index], value) for index, value in pairs))


def prepare(
    train_data: Path | str,
    spec: ModelSpec,
    transform: str = "auto",
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> Normalization:
    """Return what was done to the images that a network was trained on.

    Args:
        train_data: Dataset that it was trained on.
        spec: Its architecture.
        transform: Name of the transform.
        mean: Fixed mean per channel, or None for that of the data.
        std: Fixed standard deviation per channel, or None.
    """
    image = load_manifest(train_data).image
    return Normalization(*normalization_for(transform, image, spec.in_channels, mean, std), transform)


def _counted(batches: Iterator[Batch], on_batch: Callable[[int], None] | None) -> Iterator[Batch]:
    seen = 0
    for batch in batches:
        yield batch
        seen += len(batch.labels)
        if on_batch is not None:
            on_batch(seen)
