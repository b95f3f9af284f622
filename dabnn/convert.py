"""From a packed model to a file for other programs, compared with it before the file is kept; and back to a model.

The form follows from the file's name: `.onnx`, `.pt2`, and the packed file for all else.
"""

import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, cast, get_args

import torch
from torch import Tensor

from dabnn.errors import DabError, InvalidInputError
from dabnn.exported import ExportedModel
from dabnn.packed import PackedModel, load_packed
from dabnn.verify import MIN_SAME_ARGMAX, Labelled

Form = Literal["packed", "onnx", "pt2"]
_SUFFIXES: Mapping[str, Form] = {".onnx": "onnx", ".pt2": "pt2"}
# A layer that is wrong is wrong on every image; the answers are compared on all of them.
_LAYER_IMAGES = 64


@dataclass(frozen=True)
class Comparison:
    """How an exported file compares with its packed model over some images.

    Attributes:
        form: onnx or pt2.
        file_bytes: Size of the file.
        num_samples: Images compared.
        same_argmax: Share of the images with the same highest logit in both.
        max_abs_logit_diff: Largest difference of a logit.
        top1: Top-1 of the file in percent.
        layers_equal: Whether every binary layer gives the same output up to rounding (onnx, on the first 64 images), or
            has the same bits and scalars (pt2, whose operators are the packed model's); always true of a file kept.
        max_layer_diff: Largest difference of such an output; 0 where both round alike.
    """

    form: str
    file_bytes: int
    num_samples: int
    same_argmax: float
    max_abs_logit_diff: float
    top1: float
    layers_equal: bool
    max_layer_diff: float


def form_of(file: Path, given: str | None = None) -> Form:
    """Return the form of a file by its name, and refuse a name that says something else than `given`.

    Raises:
        InvalidInputError: There is no such form, or the file's name ends like another form's.
    """
    by_name = _SUFFIXES.get(file.suffix.lower(), "packed")
    if given is None or given == by_name:
        return by_name
    if given not in get_args(Form):
        raise InvalidInputError(f"--format: no {given!r}. Give one of {', '.join(get_args(Form))}, or leave it out.")
    suffixes = {form: suffix for suffix, form in _SUFFIXES.items()}
    ending = suffixes.get(cast(Form, given))
    advice = f"ends in {ending}" if ending else f"does not end in {file.suffix}"
    raise InvalidInputError(
        f"--format: {given} for {file.name}, but a name like that is read as {by_name}. Give a name that {advice}."
    )


def load_model(path: Path | str) -> PackedModel | ExportedModel:
    """Read a packed model, an ONNX file (which runs in onnxruntime) or a `torch.export` program, by its name.

    Raises:
        InvalidInputError: There is no such file, or it is damaged or something else.
    """
    form = form_of(Path(path))
    return load_packed(path) if form == "packed" else _load(form)(path)


def convert(packed: PackedModel, file: Path, form: Form, batches: Iterable[Labelled]) -> Comparison:
    """Write a packed model in another form, and keep the file if it does what the packed model does.

    What is compared is the file itself, read back under a temporary name; it gets its own name when it passed.

    Args:
        packed: The model, on the CPU.
        file: The file to write; its folder exists.
        form: onnx or pt2.
        batches: Validation images with their labels.

    Returns:
        The figures of the comparison.

    Raises:
        InvalidInputError: A layer has no such form, or there is not one image.
        DabError: The file disagrees with the packed model, or cannot be written; no file was written.
    """
    unchecked = file.with_name(f".unchecked-{os.getpid()}.{file.name}")  # another export may go to the same file
    try:
        num_bytes = _writer(form)(packed, unchecked)
        comparison = _compare(packed, unchecked, form, num_bytes, batches)
        unchecked.replace(file)
    finally:
        unchecked.unlink(missing_ok=True)
    return comparison


def _writer(form: Form) -> Callable[[PackedModel, Path], int]:
    if form == "onnx":
        from dabnn.export_onnx import export_onnx

        return export_onnx
    from dabnn.export_program import export_program

    return export_program


def _load(form: Form) -> Callable[[Path | str], ExportedModel]:
    if form == "onnx":
        from dabnn.run_onnx import load_onnx

        return load_onnx
    from dabnn.export_program import load_program

    return load_program


def _compare(packed: PackedModel, file: Path, form: Form, num_bytes: int, batches: Iterable[Labelled]) -> Comparison:
    exported = _load(form)(file)
    num_samples = same = hits = 0
    largest, first = 0.0, torch.empty(0)
    for batch in batches:
        images = batch.images
        if len(first) < _LAYER_IMAGES:
            first = torch.cat([first, images]) if len(first) else images
        logits, expected = exported(images), packed(images)
        num_samples += len(images)
        same += int((logits.argmax(1) == expected.argmax(1)).sum())
        hits += int((logits.argmax(1) == batch.labels).sum())
        largest = max(largest, float((logits - expected).abs().nan_to_num(nan=torch.inf).max()))
    if not num_samples:
        raise InvalidInputError("data.val: not one image to compare the file on. Give a split with images.")
    layer_diff, wrong = _compare_layers(packed, file, form, first[:_LAYER_IMAGES])
    problems = [*wrong]
    if same < MIN_SAME_ARGMAX * num_samples:
        problems.append(f"same_argmax: {same} of {num_samples} images, and {MIN_SAME_ARGMAX:.1%} must agree.")
    if problems:
        raise DabError(
            f"export: the {form} file disagrees with the packed model, nothing was written: {' '.join(problems)}"
        )
    return Comparison(
        form, num_bytes, num_samples, same / num_samples, largest, 100 * hits / num_samples, True, layer_diff
    )


def _compare_layers(packed: PackedModel, file: Path, form: Form, images: Tensor) -> tuple[float, list[str]]:
    if form == "onnx":
        from dabnn.run_onnx import compare_layers

        largest, wrong = compare_layers(packed, file, images)
        return largest, list(wrong.values())
    from dabnn.export_program import wrong_constants

    return 0.0, [f"{name}: is not what the packed model holds." for name in wrong_constants(packed, file)]
