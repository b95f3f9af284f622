"""Data that many tests read, built once a session."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch

os.environ.setdefault("OMP_NUM_THREADS", "1")
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when Triton is imported, which torchvision does, too

SHARED_CLUSTER = "tests/jobs/"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the tests that take longest."""
    items.sort(key=lambda item: group_of(item.nodeid) != SHARED_CLUSTER)


@pytest.hookimpl(optionalhook=True)  # a CUDA machine need not have pytest-xdist
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Keep the tests of a file in one of several test processes, and those that share a cluster, too."""
    from xdist.scheduler import LoadScopeScheduling

    class ByGroup(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return group_of(nodeid)

    return ByGroup(config, log)


def group_of(nodeid: str) -> str:
    path = nodeid.partition("::")[0]
    return SHARED_CLUSTER if path.startswith(SHARED_CLUSTER) else path


@pytest.fixture(scope="session")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The handwritten digits of scikit-learn as a data set."""
    from dabnn.data import build_dataset

    root = tmp_path_factory.mktemp("data") / "digits"
    build_dataset("builtin:digits", root)
    return root


@pytest.fixture(scope="session")
def small_digits(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An image folder of a few digits a class, built into a data set of its own."""
    from PIL import Image
    from sklearn.datasets import load_digits

    from dabnn.data import build_dataset

    source = tmp_path_factory.mktemp("source")
    bunch = load_digits()
    for position in range(300):
        folder = source / ("val" if position % 5 == 0 else "train") / str(bunch.target[position])
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray((bunch.images[position] * 15).astype("uint8")).save(folder / f"{position}.png")
    root = tmp_path_factory.mktemp("data") / "small"
    build_dataset(str(source), root)
    return root
