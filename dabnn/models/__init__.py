"""The model zoo: `build` a network by name, list the `names`, `describe` layers and cost.

One file a family (a real architecture and its variants), `zoo` to build, `table` to describe.
"""

from dabnn.models.network import ModelSpec, Network
from dabnn.models.table import LayerRow, ModelTable, describe
from dabnn.models.zoo import build, names

__all__ = ["LayerRow", "ModelSpec", "ModelTable", "Network", "build", "describe", "names"]
