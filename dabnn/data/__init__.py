"""Data: images become WebDataset shards with a manifest, and shards become a deterministic, resumable stream.

`sources` lists images, `build` writes shards, `check` verifies them, `show` draws them, `order` decides which sample
comes when (pure functions), `stream` reads. Only the names of `stream` need torch, whose import takes longer than many
a command: they are imported when they are first used, so that the processes that build and check start at once.
"""

from typing import TYPE_CHECKING, Any

from dabnn.data.build import build_dataset
from dabnn.data.check import Problem, check_dataset
from dabnn.data.manifest import Manifest, Shard, Split, load_manifest

if TYPE_CHECKING:
    from dabnn.data.stream import Batch, Stream, open_stream

__all__ = [
    "Batch",
    "Manifest",
    "Problem",
    "Shard",
    "Split",
    "Stream",
    "build_dataset",
    "check_dataset",
    "load_manifest",
    "open_stream",
]


def __getattr__(name: str) -> Any:
    if name not in ("Batch", "Stream", "open_stream"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from dabnn.data import stream

    return getattr(stream, name)
