from collections import Counter
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.capacity import Needs, Node
from orchestrator.placement import choose, returned


def nodes(**cpus: float) -> list[Node]:
    return [Node(name, {"CPU": amount}, {}) for name, amount in cpus.items()]


def needs(placement: Any, num_workers: int = 2, cpus: float = 1.0, labels: dict[str, str] | None = None) -> Needs:
    return Needs(num_workers, num_workers, {"CPU": cpus}, placement, labels or {})


@pytest.mark.parametrize(
    ("placement", "count", "expected"),
    [
        ("pack", 2, {"large": 2}),
        ("pack", 5, {"large": 4, "middle": 1}),
        ("pack", 8, None),
        ("spread", 2, {"large": 1, "middle": 1}),
        ("spread", 6, {"large": 3, "middle": 2, "small": 1}),
        ("strict_pack", 2, {"middle": 2}),
        ("strict_pack", 3, {"large": 3}),
        ("strict_pack", 5, None),
        ("strict_spread", 3, {"large": 1, "middle": 1, "small": 1}),
        ("strict_spread", 4, None),
    ],
)
def test_workers_go_where_the_placement_says(placement: str, count: int, expected: dict[str, int] | None) -> None:
    places = choose(needs(placement, count), nodes(small=1, large=4, middle=2), count)
    assert (places and Counter(places)) == expected


def test_only_nodes_with_the_labels_hold_workers() -> None:
    lab, other = Node("lab", {"CPU": 1}, {"pool": "lab"}), Node("other", {"CPU": 4}, {"pool": "other"})
    assert choose(needs("pack", 1, labels={"pool": "lab"}), [other, lab], 1) == ["lab"]
    assert choose(needs("pack", 2, labels={"pool": "lab"}), [other, lab], 2) is None


def test_what_running_workers_hold_is_counted_as_room_for_a_larger_attempt() -> None:
    room = returned(nodes(full=0, back=1), ["full"], {"CPU": 1.0})
    assert choose(needs("spread"), room, 2) == ["back", "full"]


@given(
    cpus=st.lists(st.integers(0, 5), min_size=1, max_size=6),
    count=st.integers(1, 12),
    placement=st.sampled_from(["pack", "spread", "strict_pack", "strict_spread"]),
)
def test_no_node_gets_more_workers_than_it_has_room_for(cpus: list[int], count: int, placement: str) -> None:
    free = nodes(**{f"n{number}": float(amount) for number, amount in enumerate(cpus)})
    places = choose(needs(placement, count), free, count)
    if places is None:
        return
    held = Counter(places)
    assert sum(held.values()) == count
    assert all(held[node.name] <= node.resources["CPU"] for node in free)
    assert [name for name, _ in held.items() for _ in range(held[name])] == places  # a node's workers together
