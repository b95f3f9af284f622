"""Which nodes the workers of an attempt go to. Pure functions.

Ray would place them too, but only when they start; here it is known before, so that those very nodes are looked at
first (`jobs.preflight`) and a run can begin, or go on, with the workers that find room. Whether a cluster could ever
hold a run is asked in `orchestrator.capacity`.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace

from orchestrator.capacity import Needs, Node, num_places


def choose(needs: Needs, free: Sequence[Node], count: int) -> list[str] | None:
    """Return the names of the nodes for `count` workers, one entry a worker and a node's workers together.

    Args:
        needs: What a worker needs, and where workers may go.
        free: The nodes with what is left of them.
        count: Workers, at least 1.

    Returns:
        None when that many find no room.
    """
    places = places_by_node(needs, free)
    if needs.placement == "strict_pack":
        fitting = [name for name, held in places.items() if held >= count]
        return [fitting[-1]] * count if fitting else None  # the fullest node: larger ones stay free for larger runs
    if needs.placement == "strict_spread":
        return list(places)[:count] if len(places) >= count else None
    if sum(places.values()) < count:
        return None
    taken = _spread(places, count) if needs.placement == "spread" else _pack(places, count)
    return [name for name, number in taken.items() for _ in range(number)]


def places_by_node(needs: Needs, free: Sequence[Node]) -> dict[str, int]:
    """Return how many workers each node could take, the emptiest first and nodes without room left out."""
    anywhere = replace(needs, placement="pack")
    places = {node.name: num_places(anywhere, [node]) for node in free}
    return {name: held for name, held in sorted(places.items(), key=lambda item: (-item[1], item[0])) if held}


def returned(free: Sequence[Node], held: Sequence[str], each: Mapping[str, float]) -> list[Node]:
    """Return the nodes with what they would have free if the workers on `held`, one entry a worker, were gone."""
    workers = Counter(held)
    return [
        replace(node, resources=_plus(node.resources, each, workers[node.name])) if workers[node.name] else node
        for node in free
    ]


def _plus(resources: Mapping[str, float], each: Mapping[str, float], times: int) -> dict[str, float]:
    return {**resources, **{kind: resources.get(kind, 0) + amount * times for kind, amount in each.items()}}


def _pack(places: Mapping[str, int], count: int) -> dict[str, int]:
    taken: dict[str, int] = {}
    for name, held in places.items():
        taken[name] = min(held, count - sum(taken.values()))
    return taken


def _spread(places: Mapping[str, int], count: int) -> dict[str, int]:
    taken = dict.fromkeys(places, 0)
    for _ in range(count):
        name = min((name for name in places if taken[name] < places[name]), key=lambda name: taken[name])
        taken[name] += 1
    return taken
