"""What Ray says about the nodes of the cluster that this program runs on."""

from collections.abc import Collection
from dataclasses import dataclass

import ray
from ray._private import state  # the only way to what is free on each node

from orchestrator.capacity import Node


@dataclass(frozen=True)
class Seen:
    """The nodes that are alive.

    Attributes:
        total: What they have in all, named by their addresses, as messages call them.
        free: What is left of those that workers may go to, named by Ray's node ids.
        addresses: Node id -> address.
    """

    total: tuple[Node, ...]
    free: tuple[Node, ...]
    addresses: dict[str, str]


def seen(avoid: Collection[str] = ()) -> Seen:
    """Return the nodes as they are now.

    Args:
        avoid: Ids of nodes that workers must not go to; nodes that are about to be taken away are left out anyhow.
    """
    alive = [node for node in ray.nodes() if node["Alive"]]
    left = state.available_resources_per_node()
    closed = {*avoid, *state.state.get_draining_nodes()}
    return Seen(
        total=tuple(Node(each["NodeManagerAddress"], each["Resources"], each["Labels"]) for each in alive),
        free=tuple(
            Node(each["NodeID"], left[each["NodeID"]], each["Labels"])
            for each in alive
            if each["NodeID"] in left and each["NodeID"] not in closed
        ),
        addresses={each["NodeID"]: each["NodeManagerAddress"] for each in alive},
    )


def is_draining() -> bool:
    """Whether a node of the cluster is about to be taken away."""
    return ray.is_initialized() and bool(state.state.get_draining_nodes())


def dead_nodes(nodes: Collection[str]) -> list[str]:
    """Return the addresses of those of some nodes, named by their ids, that are not alive any more."""
    return [each["NodeManagerAddress"] for each in ray.nodes() if each["NodeID"] in nodes and not each["Alive"]]
