"""The model zoo: `build` a network by name, list the `names`, `describe` layers and cost.

One file a family (a real architecture and its variants), `blocks` to lay them out, `zoo` to build, `table` to describe,
`folding` for what packed models keep of batch normalisation.
"""

from dabnn.models.network import ModelSpec, Network
from dabnn.models.table import LayerRow, ModelTable, describe, outline, skeleton
from dabnn.models.zoo import build, names

__all__ = ["LayerRow", "ModelSpec", "ModelTable", "Network", "build", "describe", "names", "outline", "skeleton"]
