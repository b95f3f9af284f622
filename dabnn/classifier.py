"""A packed model with what it takes to look at images as they are stored: decoding, its transform, its class names.

Leaves out where models and images come from.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from dabnn.data.images import decode_image
from dabnn.data.transforms import Transform, make_transform
from dabnn.errors import InvalidInputError
from dabnn.exported import ExportedModel
from dabnn.packed import PackedModel


@dataclass(frozen=True)
class Classifier:
    """Turns images into probabilities of classes; `Classifier.of` makes one.

    Attributes:
        model: Normalized images to logits.
        transform: What is done to an image first.
        classes: Names of the classes in the order of the probabilities; their numbers where the model has no names.
    """

    model: Callable[[Tensor], Tensor]
    transform: Transform
    classes: tuple[str, ...]

    @classmethod
    def of(cls, model: PackedModel | ExportedModel, file: Path | str) -> "Classifier":
        """Return the classifier of a model that was read from `file`.

        Raises:
            InvalidInputError: The model does not say how images are prepared.
        """
        if model.normalization is None:
            raise InvalidInputError(
                f"{file}: holds no normalisation, so images cannot be prepared. Export the run again."
            )
        made = make_transform(
            model.normalization.transform,
            input_size=model.spec.input_size,
            in_channels=model.spec.in_channels,
            mean=model.normalization.mean,
            std=model.normalization.std,
            training=False,
        )
        return cls(model, made, model.classes or tuple(str(index) for index in range(model.spec.num_classes)))

    def pixels(self, data: bytes, name: Path | str) -> Tensor:
        """Return what the transform makes of an image file's bytes: uint8 (C, S, S).

        Raises:
            InvalidInputError: They are no readable image; `name` says which.
        """
        try:
            return self.transform.sample(decode_image(data))
        except (OSError, ValueError) as error:
            raise InvalidInputError(f"{name}: no readable image ({error}).") from error

    def warm_up(self) -> None:
        """Look at a black image: kernels are compiled and layouts derived, so that the first real one need not wait."""
        side, channels = self.transform.input_size, self.transform.in_channels
        self.probabilities([torch.zeros(channels, side, side, dtype=torch.uint8)])

    def probabilities(self, pixels: Sequence[Tensor]) -> Tensor:
        """Return float32 (N, classes) for N images that `pixels` returned."""
        return self.model(self.transform.batch(torch.stack(list(pixels)))).softmax(dim=1)
