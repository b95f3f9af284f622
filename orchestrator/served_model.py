"""What MLflow runs to serve a packed model: the code of the model itself, kept and executed as text, never pickled.

It is copied into every registered model beside `dabnn` and `kernels`, and imports nothing else of the program. Requests
are rows with one column `image`, the bytes of an image file; over HTTP as base64. Answers are rows of `class` and
`probability`, in the same order. `orchestrator.model_folder` writes the folder around it.
"""

import threading
from pathlib import Path
from typing import Any

import pandas as pd
from mlflow.exceptions import MlflowException
from mlflow.models import set_model
from mlflow.pyfunc.model import PythonModel

from dabnn.classifier import Classifier
from dabnn.errors import InvalidInputError
from dabnn.packed import load_packed

ARTIFACT = "packed"
COLUMN = "image"
CLASS, PROBABILITY = "class", "probability"
_BATCH_SIZE = 32


class PackedClassifier(PythonModel):
    """Answers with the most probable class of each image and its probability."""

    def load_context(self, context: Any) -> None:
        """Read the packed file of the model."""
        file = Path(context.artifacts[ARTIFACT])
        self._classifier = Classifier.of(load_packed(file), file)
        self._classifier.warm_up()
        # The server answers requests in threads; two networks at once would only share the cores.
        self._one_at_a_time = threading.Lock()

    def predict(self, context: Any, model_input: pd.DataFrame, params: dict[str, Any] | None = None) -> pd.DataFrame:  # noqa: ARG002 - MLflow's signature
        """Return a row with `class` and `probability` for each row of `model_input`.

        Raises:
            MlflowException: An image cannot be read; the client of a server gets the message, with the row from 0.
        """
        images = list(model_input[COLUMN])
        with self._one_at_a_time:
            found = [row for begin in range(0, len(images), _BATCH_SIZE) for row in self._classes(images, begin)]
        return pd.DataFrame(found, columns=[CLASS, PROBABILITY])

    def _classes(self, images: list[bytes], begin: int) -> list[tuple[str, float]]:
        pixels = [self._pixels(images[row], row) for row in range(begin, min(begin + _BATCH_SIZE, len(images)))]
        values, places = self._classifier.probabilities(pixels).max(dim=1)
        names = self._classifier.classes
        return [(names[place], value) for place, value in zip(places.tolist(), values.tolist(), strict=True)]

    def _pixels(self, image: object, row: int) -> Any:
        if not isinstance(image, bytes):
            raise MlflowException.invalid_parameter_value(
                f"row {row}: {type(image).__name__}, no bytes of an image file."
            )
        try:
            return self._classifier.pixels(image, f"row {row}")
        except InvalidInputError as error:
            raise MlflowException.invalid_parameter_value(str(error)) from error


set_model(PackedClassifier())
