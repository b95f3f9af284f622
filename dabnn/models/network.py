"""The network that `build` returns, and the specification that it carries."""

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from dabnn.errors import InvalidInputError
from dabnn.models.blocks import Chain
from dabnn.models.family import Shape, Stages


@dataclass(frozen=True)
class ModelSpec:
    """Everything that decides an architecture, resolved; `build(**dataclasses.asdict(spec))` builds it again.

    All values survive JSON (tuples come back as lists, which `build` takes as well).

    Attributes:
        name: model name.
        num_classes: number of logits.
        in_channels: channels of the images.
        input_size: height and width of the images, pixels.
        width: multiplier of every hidden channel count.
        bin_start: first convolution with binary weights, counted from 1; None where no range is binarized.
        bin_end: last one, included.
        weights: quantizer of the binary weights.
        center: what is subtracted before quantizing; None for the default of each layer.
        inputs: "model", "none" or the numbers of the convolutions with sign inputs.
        plan: {"binary_weights": numbers, "binary_inputs": numbers} where given instead of range and inputs.
        layers: numbers of the convolutions with binary weights where given instead of a range; None where not.
        block: order of the blocks, reference or bireal.
        activation: relu or rprelu; None for that of the order.
        options: fields of `dabnn.options.LayerOptions`, for all binary layers.
    """

    name: str
    num_classes: int
    in_channels: int
    input_size: int
    width: float
    bin_start: int | None
    bin_end: int | None
    weights: str
    center: str | None
    inputs: str | tuple[int, ...]
    plan: dict[str, tuple[int, ...]] | None
    layers: tuple[int, ...] | None = None
    block: str = "reference"
    activation: str | None = None
    options: dict[str, Any] = field(default_factory=dict)

    def shape(self) -> Shape:
        """Return the part that a family's architecture depends on."""
        return Shape(self.in_channels, self.input_size, self.num_classes, self.width)


class Network(Chain):
    """A classifier: images (N, in_channels, input_size, input_size) floating -> logits (N, num_classes).

    Images of another size are refused: a fully convolutional body would fold their positions into the batch.

    Attributes:
        spec: what was built.
    """

    def __init__(self, stages: Stages, spec: ModelSpec) -> None:
        super().__init__(stages)
        self.spec = spec

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - the parent's name, callable by keyword
        """Return the logits (N, num_classes) of images (N, in_channels, input_size, input_size).

        Raises:
            InvalidInputError: if the images have another number of channels or another size.
        """
        check_image_shape(self.spec, input)
        return super().forward(input)


def check_image_shape(spec: ModelSpec, images: Tensor) -> None:
    """Refuse images that are not (N, in_channels, input_size, input_size) of a network's specification.

    Raises:
        InvalidInputError: They have another number of channels or another size.
    """
    expected = (spec.in_channels, spec.input_size, spec.input_size)
    if images.dim() != 4 or tuple(images.shape[1:]) != expected:
        raise InvalidInputError(
            f"images: shape {tuple(images.shape)} does not fit this {spec.name}, which takes (N, "
            f"{', '.join(map(str, expected))}). Resize the images, or build the model with other model.in_channels "
            "and model.input_size."
        )
