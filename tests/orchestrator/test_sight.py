import socket
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest

from dabnn.run_folder import RunFolder
from orchestrator.interfaces import address_of, environment, interface_of, interfaces
from orchestrator.probe import versions
from orchestrator.sight import Here, Question, Share, Sight, answer, judge, judge_meeting, look

ROOMY = 10**12
HERE = Here(versions(), "a" * 64, {"/data": "d" * 64})
QUESTION = Question(("/data",), "/storage/run", ".marker", "secret", "http://tracker", None, ("/tmp",))
GOOD = Sight(
    dict(HERE.versions),
    HERE.sources,
    dict(HERE.data),
    "",
    "",
    "eth0",
    ("10.0.0.2", 4000),
    ROOMY,
    ROOMY,
    {"/tmp": ROOMY},
)
SHARE = Share(num_workers=2, num_loaders=2, batch_bytes=10**6)


def test_a_node_that_has_everything_has_no_problem() -> None:
    assert judge("10.0.0.2", GOOD, HERE, QUESTION, SHARE) == []


@pytest.mark.parametrize(
    ("changes", "begin", "reason"),
    [
        ({"versions": HERE.versions | {"torch": "1.0"}}, "versions: node 10.0.0.2 has torch 1.0", "requirements.lock"),
        ({"sources": "b"}, "versions: node 10.0.0.2 runs other sources", "one version"),
        ({"data": {"/data": "e" * 64}}, "data: node 10.0.0.2 does not see /data", "digest eeeeeeeeeeee instead of dd"),
        ({"data": {"/data": "! no such file"}}, "data: node 10.0.0.2 does not see /data", "no such file"),
        ({"storage": "it is not"}, "storage: node 10.0.0.2 cannot use /storage/run", "all nodes share"),
        ({"tracking": "no answer"}, "tracking.uri: node 10.0.0.2 cannot use http://tracker", "all nodes reach"),
        ({"interface": "! lo"}, "cluster.interface: node 10.0.0.2 has no interface with its own address", "it has lo"),
        ({"memory_bytes": 10**9}, "cluster: node 10.0.0.2 has 1000 MB of memory left", "need 1200 MB"),
        ({"shared_bytes": 10**6}, "cluster: node 10.0.0.2 has 1 MB of shared memory", "--shm-size"),
        ({"disks": {"/tmp": 10**7}}, "cluster: node 10.0.0.2 has 10 MB of room in /tmp", "Free some"),
    ],
)
def test_what_a_node_lacks_is_said_with_its_name_and_what_to_do(
    changes: Mapping[str, object], begin: str, reason: str
) -> None:
    (line,) = judge("10.0.0.2", replace(GOOD, **changes), HERE, QUESTION, SHARE)  # type: ignore[arg-type]
    assert line.startswith(begin)
    assert reason in line


def test_a_clock_that_is_wrong_and_a_node_that_is_not_reached_are_said() -> None:
    assert judge_meeting("10.0.0.2", 4.0, []) == []
    early, cut = judge_meeting("10.0.0.2", -60.0, ["10.0.0.3"])
    assert early.startswith("clock: node 10.0.0.2 is 60 s behind")
    assert cut.startswith("cluster.interface: node 10.0.0.2 cannot connect to 10.0.0.3")


def test_a_look_at_this_machine_reads_the_marker_leaves_an_answer_and_can_be_met(digits: Path, tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.leave_json(".marker", {"text": "secret"})
    here = Here.of([str(digits)])
    question = replace(QUESTION, data=(str(digits),), location=str(tmp_path), tracking_uri="")
    sight = look(question, "127.0.0.3")
    assert judge("127.0.0.3", sight, here, question, SHARE) == []
    assert folder.load_json(answer(".marker", "127.0.0.3")) == {"text": "secret"}
    socket.create_connection(sight.listens, timeout=5).close()
    wrong = replace(question, text="other", data=(str(digits / "none"),), interface="none0")
    storage, data, interface = (line.partition(":")[0] for line in _sorted(look(wrong, "127.0.0.3"), here, wrong))
    assert (storage, data, interface) == ("storage", "data", "cluster.interface")


def _sorted(sight: Sight, here: Here, question: Question) -> list[str]:
    seen = replace(sight, data=dict.fromkeys(here.data, sight.data[question.data[0]]))
    order = ["storage", "data", "cluster.interface"]
    return sorted(judge("127.0.0.3", seen, here, question, SHARE), key=lambda line: order.index(line.partition(":")[0]))


def test_the_interface_is_the_one_that_holds_the_nodes_address() -> None:
    loopback = interface_of("127.0.0.1")
    assert loopback is not None
    assert interface_of("127.0.0.77") == loopback  # any of the network, as several nodes on one machine have
    assert address_of(loopback) == "127.0.0.1"
    assert interface_of("203.0.113.9") is None
    assert address_of("none0") is None
    assert loopback in interfaces()
    assert environment("eth0") == {"GLOO_SOCKET_IFNAME": "eth0", "NCCL_SOCKET_IFNAME": "=eth0"}
