"""What is concluded when nodes answer late or not at all; nodes that answer are in `test_nodes.py`."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from dabnn.run_folder import RunFolder
from jobs import preflight
from jobs.preflight import Wanted, look_at
from orchestrator import sight
from orchestrator.sight import LOOK_LIMIT_S, MEETING_LIMIT_S

ADDRESSES = {"a": "127.0.0.3", "b": "127.0.0.4", "c": "127.0.0.5"}
WANTED = Wanted((), "", "lo", 0, 1, 1, ())


def test_a_node_that_does_not_answer_leaves_the_others_their_good_name(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def ask(calls: Mapping[str, Callable[[], Any]], *_: object) -> tuple[dict[str, Any], dict[str, str]]:
        assert "c" in calls, "the nodes that answered were kept waiting, and cannot be met any more"
        return {node: call() for node, call in calls.items() if node != "c"}, {"c": "cluster: node c is late"}

    monkeypatch.setattr(preflight, "_ask", ask)
    monkeypatch.setattr(preflight, "judge", lambda *_: [])
    found = look_at(["a", "b", "c"], ADDRESSES, RunFolder(tmp_path), WANTED)
    assert (found.problems, found.lost) == ({}, {"c": "cluster: node c is late"})


def test_a_node_can_be_met_until_the_slowest_was_looked_at_and_met() -> None:
    assert sight._LISTENS_S > LOOK_LIMIT_S + MEETING_LIMIT_S
