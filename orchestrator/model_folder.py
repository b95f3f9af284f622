"""A packed file as an MLflow model: a folder that `mlflow models serve` and `mlflow.pyfunc.load_model` take.

It holds the packed file, the code that runs it (`served_model.py`, `dabnn`, `kernels`), a signature, an example of a
request, and the pinned packages that are needed. Nothing in it is pickled. Leaves out where it is kept
(`orchestrator.registry`).
"""

import json
import logging
import shutil
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from orchestrator.package import sources
from orchestrator.provenance import PROGRAM_ROOT

_SCRIPT = Path(__file__).with_name("served_model.py")
_ROOMS = ("dabnn", "kernels")
_PACKAGES = ("mlflow", "numba", "numpy", "pandas", "pillow", "safetensors", "torch")
_INPUTS = [{"type": "binary", "name": "image", "required": True}]
_OUTPUTS = [
    {"type": "string", "name": "class", "required": True},
    {"type": "double", "name": "probability", "required": True},
]


def write_model(
    folder: Path, packed: Path, input_size: int, *, run_id: str, model_id: str, metadata: Mapping[str, Any]
) -> None:
    """Write the MLflow model of a packed file.

    Args:
        folder: Where; must not exist.
        packed: The packed file.
        input_size: Height and width of the example's image.
        run_id: The run that trained it.
        model_id: The logged model that the folder becomes.
        metadata: What else the model says of itself, in its file MLmodel.
    """
    import mlflow  # noqa: F401 - its import sets the level of its logger

    with TemporaryDirectory() as code, _quiet():
        import pandas as pd
        from mlflow import pyfunc
        from mlflow.models import Model, ModelSignature
        from mlflow.types import Schema

        pyfunc.save_model(
            folder,
            python_model=_SCRIPT,
            artifacts={"packed": str(packed)},
            code_paths=[str(path) for path in copy_code(Path(code))],
            signature=ModelSignature(
                Schema.from_json(json.dumps(_INPUTS)),
                Schema.from_json(json.dumps(_OUTPUTS)),
            ),
            input_example=pd.DataFrame({"image": [example_image(input_size)]}),
            pip_requirements=requirements(),
            mlflow_model=Model(run_id=run_id, model_id=model_id),
            metadata=dict(metadata),
        )
    for cache in folder.rglob("__pycache__"):
        shutil.rmtree(cache)


def requirements() -> list[str]:
    """Return the packages that a model needs, as they are here; without the mark of a build (`+cpu`)."""
    return [f"{name}=={version(name).partition('+')[0]}" for name in _PACKAGES]


def copy_code(folder: Path) -> list[Path]:
    """Copy the rooms of the program that run a model into `folder`, and return where each lies."""
    for path in sources():
        place = path.relative_to(PROGRAM_ROOT)
        if place.parts[0] in _ROOMS:
            folder.joinpath(place).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, folder / place)
    return [folder / room for room in _ROOMS]


def example_image(side: int) -> bytes:
    """Return a gray ramp as a PGM file: an example that shows no one's data."""
    return f"P5 {side} {side} 255\n".encode() + bytes(255 * (place % side) // side for place in range(side * side))


@contextmanager
def _quiet() -> Iterator[None]:
    """Within the block MLflow tells only of errors; it warns of type hints in its own sources, and where pip is not."""
    logger = logging.getLogger("mlflow")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
