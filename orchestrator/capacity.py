"""Whether the nodes of a cluster could ever hold the workers of a run. Pure functions.

Ray itself waits for ever for what no node has, so this is asked before a run is submitted, and again when it starts.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from orchestrator.config_sections import Cluster

Placement = Literal["pack", "spread", "strict_pack", "strict_spread"]


@dataclass(frozen=True)
class Node:
    """A node of a cluster.

    Attributes:
        name: What messages call it: its address.
        resources: What it has in all, by Ray's names: CPU, GPU, ...
        labels: Its labels.
    """

    name: str
    resources: Mapping[str, float]
    labels: Mapping[str, str]


@dataclass(frozen=True)
class Needs:
    """What a run needs at once.

    Attributes:
        num_workers: Workers; 0: the job's own process trains, which Ray does not place.
        least: The fewest of them that it goes on with.
        each: What one of them needs, by Ray's names.
        placement: Where they may go.
        labels: Labels that their nodes must have.
    """

    num_workers: int
    least: int
    each: Mapping[str, float]
    placement: Placement
    labels: Mapping[str, str]

    @classmethod
    def of(cls, cluster: "Cluster") -> "Needs":
        """Return what the section `cluster` of a configuration asks for."""
        each = {"CPU": float(cluster.cpus_per_worker), "GPU": float(cluster.gpus_per_worker)}
        return cls(
            cluster.num_workers,
            cluster.min_workers or cluster.num_workers,
            {kind: amount for kind, amount in each.items() if amount},
            cluster.placement,
            cluster.labels,
        )

    @property
    def total(self) -> dict[str, float]:
        """What all workers need together, or the job's own process."""
        return self.times(self.num_workers)

    def times(self, num_workers: int) -> dict[str, float]:
        """What so many workers need together; 0 are the job's own process."""
        return {kind: amount * max(1, num_workers) for kind, amount in self.each.items()}


def num_places(needs: Needs, nodes: Sequence[Node]) -> int:
    """Return how many workers the nodes could hold at once if nothing else ran there."""
    places = [_places_on(needs, node) for node in nodes]
    if needs.placement == "strict_pack":
        return max(places, default=0)
    if needs.placement == "strict_spread":
        return sum(place > 0 for place in places)
    return sum(places)


def shortage(needs: Needs, nodes: Sequence[Node], where: str) -> str | None:
    """Return what is missing for `needs`, as the beginning of a message; None when the nodes could hold it.

    Args:
        needs: What the run asks for.
        nodes: All nodes that are alive.
        where: Name of the cluster, for the message.
    """
    places = num_places(needs, nodes)
    if places >= needs.least:
        return None
    each = ", ".join(f"{amount:g} {kind}" for kind, amount in needs.each.items())
    rule = {"strict_pack": ", all on one node", "strict_spread": ", each on a node of its own"}.get(needs.placement, "")
    labels = ", ".join(f"{key}={value}" for key, value in needs.labels.items())
    have = "; ".join(f"{node.name}: {_resources(needs, node)}" for node in nodes) or "no nodes"
    return (
        f"cluster.num_workers: {needs.least} workers of {each} "
        f"each{rule}{f', on nodes labelled {labels}' if labels else ''}, but {where} ({have}) holds {places}; "
        f"{needs.least - places} are missing."
    )


def _places_on(needs: Needs, node: Node) -> int:
    if any(node.labels.get(key) != value for key, value in needs.labels.items()):
        return 0
    return int(min(node.resources.get(kind, 0) // amount for kind, amount in needs.each.items()))


def _resources(needs: Needs, node: Node) -> str:
    kinds = dict.fromkeys(["CPU", "GPU", *needs.each])
    held = ", ".join(f"{node.resources.get(kind, 0):g} {kind}" for kind in kinds)
    unlike = [key for key, value in needs.labels.items() if node.labels.get(key) != value]
    return f"{held}, another {unlike[0]}" if unlike else held
