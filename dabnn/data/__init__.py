"""Data: image folders become WebDataset shards with a manifest, and shards become a deterministic, resumable stream.

`build` writes, `check` verifies, `order` decides which sample comes when (pure functions), `stream` reads. Remote
storage and more importers are not here yet.
"""

from dabnn.data.build import build_dataset
from dabnn.data.check import Problem, check_dataset
from dabnn.data.manifest import Manifest, Shard, Split, load_manifest
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
