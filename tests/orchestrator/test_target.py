"""Which cluster is meant, what one second of asking tells of it, and whose turn it is. Real clusters: `tests/jobs`."""

import json
import re
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import cli
from dabnn.errors import DabError, InvalidInputError
from orchestrator import clusters_file
from orchestrator.capacity import Needs, Node, num_places, shortage
from orchestrator.clusters_file import Entry, add_cluster, known_clusters
from orchestrator.config import load_config
from orchestrator.config_search import Search
from orchestrator.jobs_api import SeenJob
from orchestrator.probe import NodeReport, problem, skew, versions
from orchestrator.queue import Entry as Run
from orchestrator.queue import entries, metadata, turn_of, turns
from orchestrator.reach import reach
from orchestrator.send import Parcel, preview
from orchestrator.sent_runs import SentRun, remember, sent_runs, tracker_at, tracker_of
from orchestrator.submit import claim_of_sweep, placed
from orchestrator.target import Target, Token, resolve_target

EXAMPLE = Path(__file__).parents[2] / "examples" / "digits.yaml"
TOKEN = "0123456789abcdef" * 4
NODE = {"node_ip": "10.0.0.1", "state": "ALIVE", "resources_total": {"CPU": 4.0}, "labels": {}}
Answers = Callable[[Mapping[str, Any], str], tuple[int, object]]


@pytest.fixture(autouse=True)
def own_home(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="dab-") as folder:
        for name in ("DAB_HOME", "HOME"):
            monkeypatch.setenv(name, folder)
        for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
            monkeypatch.delenv(name, raising=False)
        yield Path(folder)


@pytest.fixture
def token_file(own_home: Path) -> Path:
    file = own_home / "token"
    file.write_text(TOKEN + "\n")
    file.chmod(0o600)
    return file


class Handler(BaseHTTPRequestHandler):
    """Answers as the server's `answer` says."""

    def do_GET(self) -> None:
        status, body = self.server.answer(self.headers, self.path)  # type: ignore[attr-defined]
        text = body if isinstance(body, str) else json.dumps(body)
        self.send_response(status)
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, *arguments: object) -> None:
        pass


def guarded(headers: Mapping[str, Any], path: str) -> tuple[int, object]:
    """Answer as a cluster with token authentication does."""
    given_token = headers.get("authorization")
    if given_token is None:
        return 401, "Unauthorized"
    if given_token != f"Bearer {TOKEN}":
        return 403, "Forbidden"
    if path == "/api/version":
        return 200, {"ray_version": version("ray"), "session_name": "one"}
    return 200, {"data": {"result": {"result": [NODE, NODE | {"state": "DEAD"}]}}}


@pytest.fixture
def serve() -> Iterator[Callable[[Answers], str]]:
    """Start a server that answers as told; returns its URL."""
    servers = []

    def start(answer: Answers) -> str:
        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        server.answer = answer  # type: ignore[attr-defined]
        threading.Thread(target=server.serve_forever, daemon=True).start()
        servers.append(server)
        return f"http://127.0.0.1:{server.server_port}"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def test_no_address_is_the_cluster_of_this_machine_and_starts_nothing(own_home: Path) -> None:
    assert resolve_target(None) == resolve_target("embedded") == Target("embedded", "", None)
    assert not (own_home / "cluster.json").exists()


@pytest.mark.parametrize(
    ("address", "name", "url"),
    [
        ("http://head:8265", "head:8265", "http://head:8265"),
        ("https://ray.lab/cluster/", "ray.lab", "https://ray.lab/cluster"),
        ("head:8265", "head:8265", "http://head:8265"),
        ("http://[::1]:8265", "[::1]:8265", "http://[::1]:8265"),
    ],
)
def test_a_url_is_a_cluster(address: str, name: str, url: str) -> None:
    target = resolve_target(address)
    assert (target.name, target.jobs_url, target.token) == (name, url, None)


@pytest.mark.parametrize(
    "address",
    [
        "ray://head:10001",
        "http://",
        "http://head:port",
        "http://head:8265/?token=x",
        "ftp://head",
        "http://:1",
        "http://[::1",
    ],
)
def test_what_is_no_address_of_a_jobs_api_is_refused(address: str) -> None:
    with pytest.raises(InvalidInputError, match=r"^--address: "):
        resolve_target(address)


@pytest.mark.parametrize(
    "address", ["http://me:secret@head:8265", "ray://me:secret@head", "me:secret@head:8265", "https://me:secret@[::1"]
)
def test_a_password_in_an_address_is_refused_and_not_shown(address: str) -> None:
    with pytest.raises(InvalidInputError, match=r"^--address: holds a password") as caught:
        resolve_target(address)
    assert "secret" not in str(caught.value)


def test_what_follows_an_address_is_not_shown() -> None:
    for address in ("http://head:8265/?token=secret", "head:8265?token=secret", "ray://head/?token=secret"):
        with pytest.raises(InvalidInputError, match="is no address of a Jobs API") as caught:
            resolve_target(address)
        assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
    "line",
    [
        'address = "http://me:secret@a:1"',
        'address = "me:secret@a:1"',
        'address = "http://a:1"\ntracking = "https://me:secret@mlflow"',
        'address = "http://a:1"\ntracking = "https://mlflow?token=secret"',
        'address = "http://a:1"\nstorage = "s3://key:secret@bucket/runs"',
    ],
)
def test_a_file_of_clusters_takes_no_secrets(own_home: Path, line: str) -> None:
    (own_home / "clusters.toml").write_text(f"[lab]\n{line}")
    with pytest.raises(InvalidInputError, match="holds a user name, a password or something after the path") as caught:
        known_clusters()
    assert "secret" not in str(caught.value)


def test_the_example_of_a_file_of_clusters_is_one(own_home: Path) -> None:
    lines = str(clusters_file.__doc__).splitlines()
    text = "\n".join(line for line in lines if line.startswith("    "))
    (own_home / "clusters.toml").write_text(text)
    assert known_clusters()["lab"].python == "/opt/dab/bin/python"


def test_clusters_that_are_added_at_once_are_all_kept() -> None:
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda number: add_cluster(f"c{number}", Entry(f"http://a:{number + 1}")), range(8)))
    assert len(known_clusters()) == 8


def test_a_name_is_looked_up_and_an_unknown_one_names_the_nearest(own_home: Path) -> None:
    entry = Entry("http://head:8265/", token_file="~/t", tracking="http://mlflow", storage="/runs", max_running=2)
    file = add_cluster("lab", entry)
    assert file.stat().st_mode & 0o777 == 0o600
    expected = Target(
        "lab", "http://head:8265", Token(own_home / "t"), tracking_uri="http://mlflow", storage="/runs", max_running=2
    )
    assert resolve_target("lab") == expected
    assert resolve_target("http://head:8265") == expected
    with pytest.raises(InvalidInputError, match=r"^--address: 'lba' is neither a URL nor .* Did you mean lab\?"):
        resolve_target("lba")


def test_clusters_are_added_beside_others_and_not_replaced_by_accident() -> None:
    first, second = Entry("http://a:1", verify="ca.pem", open=True), Entry("http://b:1", python='/odd "path"/python')
    add_cluster("one", first)
    add_cluster("two", second)
    assert known_clusters() == {"one": first, "two": second}
    with pytest.raises(InvalidInputError, match="one: is http://a:1 already"):
        add_cluster("one", second)
    add_cluster("one", second, replace=True)
    assert known_clusters() == {"one": second, "two": second}


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("[lab", "cannot be read"),
        ("[lab]\n", r"\[lab\]: needs address"),
        ('[embedded]\naddress = "http://a:1"', "cannot name a cluster"),
        ('["a b"]\naddress = "http://a:1"', "cannot name a cluster"),
        ('[lab]\naddress = "http://a:1"\ntoken = "x"', "a token does not belong here"),
        ('[lab]\naddress = "http://a:1"\ntrakcing = "x"', "nearest known key is tracking"),
        ('[lab]\naddress = "http://a:1"\nverify = false', "would let anyone on the way read the token"),
        ('[lab]\naddress = "http://a:1"\nmax_running = 0', "no run would ever start"),
        ('[lab]\naddress = "http://a:1"\nmax_running = true', "True is not a number"),
        ("[lab]\naddress = 5", "5 is not text"),
    ],
)
def test_a_wrong_file_of_clusters_says_where_and_what(own_home: Path, text: str, complaint: str) -> None:
    (own_home / "clusters.toml").write_text(text)
    with pytest.raises(InvalidInputError, match=complaint):
        known_clusters()


def test_a_token_comes_from_where_ray_looks_and_is_never_shown(
    own_home: Path, token_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (own_home / ".ray").mkdir()
    (own_home / ".ray" / "auth_token").write_text("from-home")
    assert resolve_target("http://a:1").token == Token(own_home / ".ray" / "auth_token")
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(token_file))
    target = resolve_target("http://a:1")
    assert target.token is not None
    assert target.token.read() == TOKEN
    assert TOKEN not in repr(target)
    monkeypatch.setenv("RAY_AUTH_TOKEN", "from-variable")
    assert resolve_target("http://a:1").token == Token(variable="RAY_AUTH_TOKEN")


@pytest.mark.parametrize("content", [None, "", " \n", "two words"])
def test_a_token_that_cannot_be_read_names_the_file_and_how_to_get_one(own_home: Path, content: str | None) -> None:
    file = own_home / "t"
    if content is not None:
        file.write_text(content)
    with pytest.raises(InvalidInputError, match=rf"^token: {file} .*copy the file ~/.ray/auth_token"):
        Token(file).read()


def test_a_token_that_others_may_read_is_noticed(token_file: Path) -> None:
    assert not Token(token_file).is_exposed()
    token_file.chmod(0o644)
    assert Token(token_file).is_exposed()


def test_a_cluster_that_takes_our_token_says_what_it_has(serve: Callable[[Answers], str], token_file: Path) -> None:
    found = reach(Target("lab", serve(guarded), Token(token_file)))
    assert (found.ray_version, found.session) == (version("ray"), "one")
    assert found.nodes == (Node("10.0.0.1", {"CPU": 4.0}, {}),)


def test_a_missing_and_a_wrong_token_are_told_apart(serve: Callable[[Answers], str], token_file: Path) -> None:
    url = serve(guarded)
    with pytest.raises(InvalidInputError, match=r"^token: .* asks for a token, and none is known here"):
        reach(Target("lab", url, None))
    token_file.write_text("wrong")
    with pytest.raises(InvalidInputError, match=r"^token: .* refuses the token of ") as caught:
        reach(Target("lab", url, Token(token_file)))
    assert "wrong token" not in str(caught.value)


def test_a_cluster_that_takes_commands_from_anyone_is_refused_unless_that_is_accepted(
    serve: Callable[[Answers], str], token_file: Path
) -> None:
    seen: list[str | None] = []

    def careless(headers: Mapping[str, Any], path: str) -> tuple[int, object]:
        seen.append(headers.get("authorization"))
        return guarded({"authorization": f"Bearer {TOKEN}"}, path)

    url = serve(careless)
    with pytest.raises(InvalidInputError, match="takes commands without a token, from anyone"):
        reach(Target("lab", url, Token(token_file)))
    assert seen == [None]
    assert reach(Target("lab", url, None, is_open=True)).nodes


def test_another_ray_is_refused_with_both_versions(serve: Callable[[Answers], str], token_file: Path) -> None:
    def old(headers: Mapping[str, Any], path: str) -> tuple[int, object]:
        status, answer = guarded(headers, path)
        return status, {"ray_version": "2.9.0"} if status == 200 else answer

    with pytest.raises(InvalidInputError, match=rf"^versions: .* Ray 2\.9\.0, this machine has {version('ray')}"):
        reach(Target("lab", serve(old), Token(token_file)))


@pytest.mark.parametrize(
    ("status", "body", "kind", "message"),
    [
        (200, "<html>", InvalidInputError, "is no Jobs API of a Ray cluster"),
        (404, "", InvalidInputError, "is no Jobs API of a Ray cluster .it answered 404"),
        (502, "", DabError, "does not answer .a proxy or gateway answered 502"),
    ],
)
def test_what_is_no_cluster_is_told_from_one_that_is_away(
    serve: Callable[[Answers], str], token_file: Path, status: int, body: str, kind: type[DabError], message: str
) -> None:
    with pytest.raises(kind, match=message):
        reach(Target("lab", serve(lambda *_: (status, body)), Token(token_file)))


def test_an_address_without_anybody_is_named(token_file: Path) -> None:
    with pytest.raises(
        DabError, match=r"^--address: the cluster lab at http://127.0.0.1:1 does not answer .Connection"
    ):
        reach(Target("lab", "http://127.0.0.1:1", Token(token_file)))


def test_a_cluster_elsewhere_needs_a_tracker_and_a_storage_that_it_reaches() -> None:
    config = load_config(EXAMPLE, ["data.train=digits"])
    assert placed(config, Target("embedded", "", None)) is config
    with pytest.raises(InvalidInputError, match=r"^tracking.uri: null"):
        placed(config, Target("lab", "http://a:1", None, storage="/runs"))
    with pytest.raises(InvalidInputError, match=r"^storage: null"):
        placed(config, Target("lab", "http://a:1", None, tracking_uri="http://mlflow"))
    target = Target("lab", "http://a:1", None, tracking_uri="http://mlflow", storage="/runs")
    assert (placed(config, target).tracking.uri, placed(config, target).storage) == ("http://mlflow", "/runs")
    own = load_config(EXAMPLE, ["data.train=digits", "storage=/mine"])
    assert placed(own, target).storage == "/mine"


def test_a_submission_to_nobody_creates_nothing(
    own_home: Path, digits: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for command in (["submit", str(EXAMPLE), "--set", f"data.train={digits}"], ["cluster", "add", "lab"]):
        assert cli.run([*command, "--address", "http://127.0.0.1:1", "--json"]) == 1
        assert json.loads(capsys.readouterr().out)["error"]["message"].startswith("--address: ")
    assert not list(own_home.iterdir())


def test_a_job_is_shown_without_the_values_of_its_environment(token_file: Path) -> None:
    target = Target("lab", "http://a:1", Token(token_file), python="/opt/$(touch x)/python")
    needs = Needs(2, 2, {"CPU": 1.0}, "spread", {})
    carried = metadata("a $name", 3, needs, 4)
    parcel = Parcel("jobs.train", "dab-1", json.dumps({"name": "$(touch x)"}), "1", "train", carried)
    shown = preview(target, parcel, needs)
    assert shown["entrypoint"] == 'exec "${DAB_PYTHON:-python}" -m jobs.train'
    assert {"DAB_JOB", "DAB_PYTHON"} <= set(shown["environment"])
    assert not {"RAY_ADDRESS", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"} & set(shown["environment"])
    assert "touch" not in json.dumps(shown)
    assert TOKEN not in json.dumps(shown) + json.dumps(parcel.variables(target))
    assert (shown["placement"], shown["workers"], shown["resources_per_worker"]) == ("spread", 2, {"CPU": 1.0})
    assert len(shown["package"]["digest"]) == 16


def node(name: str, cpus: float, gpus: float = 0.0, **labels: str) -> Node:
    return Node(name, {"CPU": cpus, "GPU": gpus} if gpus else {"CPU": cpus}, labels)


@pytest.mark.parametrize(
    ("needs", "places"),
    [
        (Needs(2, 2, {"CPU": 2.0}, "pack", {}), 4),
        (Needs(2, 2, {"CPU": 2.0}, "strict_pack", {}), 3),
        (Needs(2, 2, {"CPU": 2.0}, "strict_spread", {}), 2),
        (Needs(2, 2, {"CPU": 1.0, "GPU": 1.0}, "spread", {}), 2),
        (Needs(1, 1, {"CPU": 1.0, "GPU": 0.5}, "pack", {}), 4),
        (Needs(2, 2, {"CPU": 1.0}, "pack", {"pool": "lab"}), 3),
        (Needs(2, 2, {"CPU": 8.0}, "pack", {}), 0),
    ],
)
def test_places_are_counted_node_by_node(needs: Needs, places: int) -> None:
    assert num_places(needs, [node("a", 7, 2), node("b", 3, pool="lab"), node("c", 0)]) == places


def test_a_cluster_that_is_too_small_is_told_what_is_missing_and_where() -> None:
    nodes = [node("10.0.0.1", 4), node("10.0.0.2", 2)]
    needs = Needs(8, 8, {"CPU": 1.0}, "pack", {})
    assert shortage(needs, nodes, "the cluster lab") == (
        "cluster.num_workers: 8 workers of 1 CPU each, but the cluster lab (10.0.0.1: 4 CPU, 0 GPU; 10.0.0.2: 2 CPU, "
        "0 GPU) holds 6; 2 are missing."
    )
    assert shortage(Needs(8, 4, {"CPU": 1.0}, "pack", {}), nodes, "the cluster lab") is None
    assert shortage(Needs(0, 0, {"CPU": 99.0}, "pack", {}), [], "the cluster lab") is None


HERE = {"python": "3.11.2", "ray": "2.60.0", "torch": "2.13.0", "dab": "0.1.0"} | dict.fromkeys(
    ("torchvision", "mlflow", "pydantic", "safetensors", "webdataset", "psutil", "numpy", "pyyaml"), "1"
)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"python": "3.12.1"}, r"python 3\.12\.1 \(here 3\.11\.2\)"),
        ({"torch": "2.12.0"}, r"torch 2\.12\.0"),
        ({"torch": ""}, "torch not installed"),
        ({"dab": "0.2.0"}, r"dab 0\.2\.0"),
        ({"mlflow": ""}, "lacks mlflow"),
    ],
)
def test_other_versions_on_a_node_are_named(change: dict[str, str], told: str) -> None:
    found = skew("node 10.0.0.7", HERE | change, HERE)
    assert found is not None
    assert found.startswith("versions: node 10.0.0.7 ")
    assert re.search(told, found)


@pytest.mark.parametrize("change", [{}, {"python": "3.11.9"}, {"dab": ""}, {"mlflow": "2"}])
def test_versions_that_make_no_difference_are_accepted(change: dict[str, str]) -> None:
    assert skew("node 10.0.0.7", HERE | change, HERE) is None


def test_the_versions_of_this_machine_are_all_known() -> None:
    assert all(versions().values())


def report(**changes: Any) -> NodeReport:
    return NodeReport(**{"node": "b", "versions": HERE, "data": {"/d": "1"}, "storage": "", "tracking": ""} | changes)


@pytest.mark.parametrize(
    ("reported", "message"),
    [
        (report(), None),
        (report(data={"/d": "! no such file"}), "data: /d is not seen by node b (no such file)."),
        (report(data={"/d": "2"}), "data: /d is not seen by node b (it holds other data than here)."),
        (report(storage="No such file or directory"), "storage: /runs of this machine is not that of node b"),
        (report(tracking="no answer"), "tracking.uri: node b cannot reach it (no answer)."),
    ],
)
def test_what_a_node_does_not_see_is_named_with_the_node(reported: NodeReport, message: str | None) -> None:
    found = problem([report(node="a"), reported], HERE, {"/d": "1"}, "/runs")
    assert (found is None) if message is None else str(found).startswith(message)


def run(job_id: str, cpus: float = 2.0, **changes: Any) -> Run:
    values: dict[str, Any] = {
        "user": "ann", "priority": 0, "submitted_at": 1.0, "needs": Needs(1, 1, {"CPU": cpus}, "pack", {}),
        "max_running": None, "is_running": False,
    }  # fmt: skip
    return Run(job_id, **values | changes)


def test_an_empty_cluster_is_everybodys_turn() -> None:
    assert turn_of(run("a"), [], [node("n", 4)]).action == "start"
    assert turn_of(run("a", 9.0), [], [node("n", 4)]).action == "start"  # what Ray holds is not ours to judge


def test_a_full_cluster_is_waited_for_and_the_reason_told() -> None:
    full = [run("b", is_running=True), run("c", is_running=True)]
    turn = turn_of(run("a"), full, [node("n", 4)])
    assert (turn.action, turn.reason) == ("wait", "needs 2 CPU where 0 CPU is left by 2 runs")
    assert turn_of(run("a"), full[:1], [node("n", 4)]).action == "start"


def test_higher_priority_goes_first_then_who_came_first() -> None:
    busy = run("z", is_running=True)
    early, late, urgent = run("a"), run("b", submitted_at=2.0), run("c", submitted_at=3.0, priority=5)
    assert {job: turn.action for job, turn in turns([late, urgent, early, busy], [node("n", 4)]).items()} == {
        "a": "wait", "b": "wait", "c": "start",
    }  # fmt: skip
    assert (
        turns([late, early, busy], [node("n", 4)])["b"].reason
        == "needs 2 CPU where 0 CPU is left by 1 runs, 1 ahead of it"
    )


def test_nobody_overtakes_a_big_run_but_past_one_that_can_never_start() -> None:
    busy = run("z", is_running=True)
    big, small = run("a", 4.0), run("b", 1.0, submitted_at=2.0)
    assert turn_of(small, [busy, big], [node("n", 4)]).action == "wait"
    giant = run("a", 99.0)
    assert turn_of(small, [busy, giant], [node("n", 4)]).action == "start"


def test_a_quota_holds_its_user_and_nobody_else() -> None:
    total = [node("n", 100)]
    mine = [run("a", is_running=True), run("b", is_running=True)]
    third = run("c", max_running=2)
    turn = turn_of(third, mine, total)
    assert (turn.action, turn.reason) == ("wait", "ann has 2 runs on the cluster, and 2 may run at a time")
    assert turn_of(run("d", user="bob", max_running=2, submitted_at=9.0), [*mine, third], total).action == "start"
    others = run("d", 98.0, user="bob", submitted_at=9.0)
    assert turn_of(others, [run("a", is_running=True), third], total).action == "wait"
    fitting = run("d", 96.0, user="bob", submitted_at=9.0)
    assert turn_of(fitting, [*mine, third], total).action == "start"


def test_a_run_that_no_placement_holds_keeps_nobody_waiting() -> None:
    busy, nodes = run("z", 1.0, is_running=True), [node("a", 2), node("b", 2)]
    wanted = Needs(3, 3, {"CPU": 1.0}, "strict_pack", {}), Needs(1, 1, {"CPU": 1.0}, "pack", {"pool": "none"})
    for needs in wanted:
        assert turn_of(run("b", submitted_at=2.0), [busy, run("a", needs=needs)], nodes).action == "start"


def test_an_elastic_run_starts_with_its_fewest_workers_and_is_left_room_to_grow() -> None:
    nodes, elastic = [node("a", 4), node("b", 4)], Needs(8, 2, {"CPU": 1.0}, "pack", {})
    busy = run("z", 6.0, is_running=True)
    assert turn_of(run("a", needs=elastic), [busy], nodes[:2]).action == "start"
    assert turn_of(run("a", needs=elastic), [busy, run("b", 2.0, submitted_at=0.5)], nodes).action == "wait"
    grown = run("a", needs=elastic, is_running=True)
    assert turn_of(run("b", 1.0), [grown], nodes).action == "wait"
    assert turn_of(run("b", 1.0), [grown], [*nodes, node("c", 1)]).action == "start"


@pytest.mark.parametrize(
    ("search", "needs", "num_workers", "least"),
    [
        ({}, Needs(2, 2, {"CPU": 1.0}, "spread", {}), 40, 2),
        ({"max_concurrent": 3}, Needs(2, 2, {"CPU": 1.0}, "spread", {}), 6, 2),
        ({"max_concurrent": 9, "num_trials": 4}, Needs(0, 0, {"CPU": 1.0}, "pack", {}), 4, 1),
    ],
)
def test_a_sweep_claims_what_its_trials_take_at_a_time(
    search: dict[str, int], needs: Needs, num_workers: int, least: int
) -> None:
    space = Search.model_validate({"space": {"optim.max_lr": {"log": [1e-4, 1e-2]}}, **search})
    claim = claim_of_sweep(needs, space)
    assert (claim.num_workers, claim.least, claim.placement) == (num_workers, least, "pack")
    sweep = run("a", needs=claim, is_running=True)
    assert turn_of(run("b", 1.0), [sweep], [node("n", num_workers)]).action == "wait"
    assert turn_of(run("b", 1.0), [sweep], [node("n", num_workers + 1)]).action == "start"


@given(
    st.lists(
        st.tuples(st.integers(-3, 3), st.integers(1, 5), st.sampled_from("xyz"), st.sampled_from([None, 1, 2])),
        max_size=8,
    )
)
def test_whoever_waits_the_queue_moves_and_never_takes_more_than_there_is(
    drawn: list[tuple[int, int, str, int | None]],
) -> None:
    """Runs that start one after the other, as they may, and end when nothing else can start: all get their turn."""
    total = [node("n", 5)]
    waiting = {
        str(i): run(str(i), float(n), priority=p, user=u, max_running=q, submitted_at=float(i))
        for i, (p, n, u, q) in enumerate(drawn)
    }
    running: dict[str, Run] = {}
    while waiting:
        found = turns([*waiting.values(), *running.values()], total)
        ready = [job for job, turn in found.items() if turn.action == "start"]
        assert ready or running
        if ready:
            started = replace(waiting.pop(ready[0]), is_running=True)
            running[started.job_id] = started
            assert sum(each.needs.total["CPU"] for each in running.values()) <= 5
            own = sum(each.user == started.user for each in running.values())
            assert started.max_running is None or own <= started.max_running
        else:
            running.pop(next(iter(running)))


def test_what_jobs_carry_is_read_back_and_what_others_carry_is_left_out() -> None:
    needs = Needs(2, 1, {"CPU": 1.0}, "spread", {"pool": "lab"})
    carried = metadata("night", 7, needs, 3)
    jobs = [
        SeenJob("a", "RUNNING", 1.0, carried, has_begun=False),
        SeenJob("b", "RUNNING", 2.0, carried | {"dab_queued": "1"}, has_begun=False),
        SeenJob("c", "SUCCEEDED", 3.0, carried, has_begun=True),
        SeenJob("d", "RUNNING", 4.0, {}, has_begun=True),
        SeenJob("e", "RUNNING", 5.0, carried | {"dab_needs": "[]"}, has_begun=True),
        SeenJob("f", "RUNNING", 6.0, carried | {"dab_priority": "high"}, has_begun=True),
        *(
            SeenJob("g", "RUNNING", 7.0, carried | {"dab_needs": json.dumps(asdict(needs) | wrong)}, has_begun=True)
            for wrong in ({"each": {}}, {"each": {"CPU": 0}}, {"placement": "here"}, {"labels": 3}, {"least": "x"})
        ),
    ]
    found = entries(jobs)
    assert [(entry.job_id, entry.is_running) for entry in found] == [("a", True), ("b", False)]
    assert (found[0].name, found[0].priority, found[0].needs, found[0].max_running) == ("night", 7, needs, 3)


def test_a_run_that_was_sent_elsewhere_is_found_again(own_home: Path) -> None:
    sent = SentRun("ab12", "night", "http://mlflow", "lab", "http://a:1")
    remember(sent)
    remember(SentRun("cd12", "here", "", "embedded", ""))
    remember(SentRun("ab34", "day", "http://other", "lab", "http://b:1"))
    with (own_home / "sent.jsonl").open("a") as file:
        file.write('{"torn')
    assert sent_runs()[0] == sent
    assert tracker_of("night") == tracker_of("ab1") == "http://mlflow"
    assert tracker_of("nobody") is None
    assert tracker_of("") is None
    assert tracker_of("here") is None
    with pytest.raises(InvalidInputError, match="fits runs of 2 trackers: ab12 on http://mlflow, ab34 on http://other"):
        tracker_of("ab")
    remember(SentRun("ef12", "night", "", "embedded", ""))
    with pytest.raises(InvalidInputError, match="ef12 on this machine"):
        tracker_of("night")
    assert tracker_at(Target("lab", "http://b:1", None)) == "http://other"
    with pytest.raises(InvalidInputError, match=r"^--tracking-uri: where the runs of the cluster new are recorded"):
        tracker_at(Target("new", "http://c:1", None))
