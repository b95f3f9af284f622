"""The documentation knows the keys of a configuration, and its configurations are ones."""

import re
from pathlib import Path

import pytest

from orchestrator.config import Config
from orchestrator.config_errors import leaf_keys

ROOT = Path(__file__).parents[2]
SECTIONS = ("model", "binarize", "optim", "schedule", "train", "cluster", "search")
KEYS = [key for key in leaf_keys(Config) if key.partition(".")[0] in SECTIONS]


@pytest.fixture(scope="module")
def pages() -> str:
    files = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    return "\n".join(file.read_text(encoding="utf-8") for file in files)


@pytest.mark.parametrize("key", KEYS)
def test_a_key_stands_in_the_documentation(key: str, pages: str) -> None:
    assert re.search(rf"\b{key.rpartition('.')[2]}\b", pages)
