"""What files for other programs say about the network in them, and the form in which they are called once loaded.

The values are strings of JSON by name, in an ONNX model's metadata and in an extra file of a `torch.export` program:
`format`, `spec`, `classes`, `input_size`, `in_channels`, `provenance`, and `mean`, `std`, `transform` where known.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

from torch import Tensor

from dabnn.errors import InvalidInputError
from dabnn.models import ModelSpec, skeleton
from dabnn.models.network import check_image_shape
from dabnn.packed import Normalization, PackedModel, Provenance

FORMAT = "dab-exported"
INPUT, OUTPUT = "images", "logits"

Run = Callable[[Tensor], Tensor]


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

    def __call__(self, images: Tensor) -> Tensor:
        """Return the logits (N, num_classes) of normalized images (N, in_channels, input_size, input_size).

        Raises:
            InvalidInputError: The images have another number of channels or another size.
        """
        check_image_shape(self.spec, images)
        return self.run(images)


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
        InvalidInputError: It is not of `describe`, or names a model that this program does not have.
    """
    if metadata.get("format") != FORMAT:
        raise InvalidInputError(
            f"{path}: says nothing of a dab network, so dab export did not write it. Give a file that it wrote."
        )
    known = ("spec", "classes", "mean", "std", "transform", "provenance")
    try:
        values = {name: json.loads(metadata[name]) for name in known if name in metadata}
        spec = skeleton(**values["spec"]).spec
    except (KeyError, TypeError, ValueError, InvalidInputError) as error:
        raise InvalidInputError(
            f"{path}: its network is unknown to this dab ({error}). Update dab, or export the model again."
        ) from error
    classes, mean = values.get("classes"), values.get("mean")
    prepared = None if mean is None else Normalization(tuple(mean), tuple(values["std"]), values["transform"])
    provenance = Provenance.of(values.get("provenance") or {})
    return ExportedModel(load(), spec, None if classes is None else tuple(classes), prepared, provenance)
