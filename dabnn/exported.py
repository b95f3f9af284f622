"""What files for other programs say about the network in them, and the form in which they are called once loaded.

The values are strings of JSON by name, in an ONNX model's metadata and in an extra file of a `torch.export` program:
`format`, `spec`, `classes`, `input_size`, `in_channels`, `provenance`, and `mean`, `std`, `transform` where known.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dabnn.errors import InvalidInputError
from dabnn.models import ModelSpec
from dabnn.packed import Normalization, PackedModel, Provenance
from dabnn.packed_check import check_extras, lay_out
from dabnn.packed_place import check_images, without_autocast

FORMAT = "dab-exported"
INPUT, OUTPUT = "images", "logits"

Run = Callable[[Tensor], Tensor]

_PREPARED = ("mean", "std", "transform")
_NAMES = ("spec", "classes", "provenance", *_PREPARED)
_CPU = torch.device("cpu")
_MAX_REASON = 200


@dataclass(frozen=True, eq=False)
class ExportedModel:
    """A network read from a file for another program, on the CPU.

    Attributes:
        run: Normalized images (N, in_channels, input_size, input_size) float32 to logits (N, num_classes) float32.
        spec: Its architecture, as `dabnn.models.build` was given it.
        classes: Class names in the order of the logits, or None.
        normalization: What to do to images first, or None if unknown.
        provenance: The run, program and data that it comes from.
    """

    run: Run
    spec: ModelSpec
    classes: tuple[str, ...] | None = None
    normalization: Normalization | None = None
    provenance: Provenance = field(default_factory=Provenance)

    @torch.inference_mode()
    def __call__(self, images: Tensor) -> Tensor:
        """Return the logits (N, num_classes) of normalized images (N, in_channels, input_size, input_size) float32.

        As in `dabnn.packed.PackedModel`, autocast does not reach into it.

        Raises:
            InvalidInputError: The images have another type, device, number of channels or size, or the file's network
                does not take them, or gives no logits.
        """
        check_images(self.spec, images, torch.float32, _CPU)
        with without_autocast(_CPU):
            return self.run(images)


def first_line(error: Exception) -> str:
    """Return what an error of another program says, short enough for a message of ours."""
    return next(iter(str(error).splitlines()), type(error).__name__)[:_MAX_REASON]


def describe(packed: PackedModel) -> dict[str, str]:
    """Return what a file says about the packed model that it was made of."""
    prepared = {} if packed.normalization is None else asdict(packed.normalization)
    values = prepared | {
        "spec": asdict(packed.spec),
        "classes": packed.classes,
        "input_size": packed.spec.input_size,
        "in_channels": packed.spec.in_channels,
        "provenance": asdict(packed.provenance),
    }
    return {"format": FORMAT} | {name: json.dumps(value) for name, value in values.items()}


def described(path: Path, metadata: Mapping[str, str], load: Callable[[], Run]) -> ExportedModel:
    """Return the model of a file that says `metadata`, which is checked before `load` loads its network.

    Raises:
        InvalidInputError: It is not of `describe`, or names a model that this program does not have; or the network
            cannot be loaded.
    """
    if metadata.get("format") != FORMAT:
        raise InvalidInputError(
            f"{path}: says nothing of a dab network, so dab export did not write it. Give a file that it wrote."
        )
    values = {name: _value(path, name, metadata[name]) for name in _NAMES if name in metadata}
    given = values.get("spec")
    spec = lay_out(str(path), given if isinstance(given, dict) else {}).spec
    prepared = {name: values[name] for name in _PREPARED if name in values} or None
    extras = {"classes": values.get("classes"), "provenance": values.get("provenance"), "normalization": prepared}
    check_extras(str(path), extras, num_classes=spec.num_classes, in_channels=spec.in_channels)
    classes = extras["classes"]
    return ExportedModel(
        _guarded(path, spec, load()),
        spec,
        None if classes is None else tuple(classes),
        None if prepared is None else Normalization.of(prepared),
        Provenance.of(extras["provenance"] or {}),
    )


def _value(path: Path, name: str, text: str) -> Any:
    try:
        return json.loads(text)
    except (RecursionError, ValueError) as error:
        raise InvalidInputError(f"{path}: its {name} is no JSON. Export the model again.") from error


def _guarded(path: Path, spec: ModelSpec, run: Run) -> Run:
    """Return `run`, which may be of any file, with every failure of it told as one of that file."""

    def guarded(images: Tensor) -> Tensor:
        try:
            logits = run(images)
        except Exception as error:  # what runs is another program's
            raise InvalidInputError(
                f"{path}: its network cannot be run ({first_line(error)}). Export the model again."
            ) from error
        expected = (len(images), spec.num_classes)
        if not isinstance(logits, Tensor) or logits.dtype != torch.float32 or logits.shape != expected:
            shown = f"{logits.dtype} {tuple(logits.shape)}" if isinstance(logits, Tensor) else type(logits).__name__
            raise InvalidInputError(
                f"{path}: its network gives {shown}, where its model.spec asks for logits torch.float32 {expected}. "
                "Export the model again."
            )
        return logits

    return guarded
