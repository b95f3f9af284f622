"""Who can get in: every port that listens while a run trains, tried without credentials."""

import http.client
import importlib
import json
import pkgutil
import socket
import subprocess
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import grpc
import psutil
import pytest
import ray.core.generated
from program import ROOT, Dab, has_checkpoint, wait_until

from orchestrator.processes import members, recorded

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(600)]

# What SECURITY.md exempts, by the words that it uses.
STORE, METRICS, DOOR = "rendezvous store", "metrics in the form of Prometheus", "door of the pre-flight check"
HTTP_EXEMPT = {"/", "/health", "/api/authentication_mode", "/api/gcs_healthz", "/api/local_raylet_healthz"}
HTTP_PATHS = (
    *sorted(HTTP_EXEMPT),
    "/api/version",
    "/api/jobs/",
    "/api/job_agent/jobs/",
    "/api/packages/gcs/a.zip",
    "/api/v0/nodes",
    "/get_or_create_runtime_env",
    "/logs",
    "/metrics",
    "/worker/traceback",
)
HEALTH = "/grpc.health.v1.Health/Check"
REFUSED = {grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.UNIMPLEMENTED}


@pytest.fixture(scope="module")
def running(dab: Dab, digits: Path) -> Iterator[str]:
    """A run of two workers that trains until the module is done."""
    changes = [f"data.train={digits}", "name=ports", "model.width=0.0625", "data.batch_size=32", "train.epochs=10000"]
    config = ROOT / "examples" / "digits.yaml"
    started = dab.ok("submit", config, *(part for each in changes for part in ("--set", each)), "--detach")
    run_id = str(started["run_id"])
    wait_until(lambda: has_checkpoint(dab.folder(run_id), 1), 240)
    yield run_id
    dab.ok("stop", run_id, "--now")


def test_every_port_refuses_who_has_no_token(dab: Dab, running: str) -> None:
    ports = listening(dab)
    methods = rpc_methods()
    assert len(methods) > 140
    exempt: dict[str, list[str]] = {}
    num_guarded = 0
    for (address, port), title in ports.items():
        if is_grpc(address, port):
            let_in = grpc_let_in(address, port, methods)
            num_guarded += 1
        elif (codes := http_codes(address, port)) is not None:
            if is_metrics(address, port, codes):
                exempt.setdefault(METRICS, []).append(title)
                continue
            let_in = {path: code for path, code in codes.items() if code not in (401, 403, 404, 405)}
            let_in = {path: code for path, code in let_in.items() if path.split(" ")[1] not in HTTP_EXEMPT}
            if is_own_tracker(dab, port):
                assert address == "127.0.0.1"  # open there, see SECURITY.md; `test_tracking_server` has it elsewhere
                continue
            num_guarded += 1
        elif closes_at_once(address, port):
            exempt.setdefault(DOOR, []).append(title)
            continue
        else:  # speaks neither: the workers' own, between them
            exempt.setdefault(STORE, []).append(title)
            continue
        assert let_in == {}, f"{title} at {address}:{port} answers without a token"

    assert num_guarded >= 8  # control service, raylet (2), agents, dashboard, drivers and workers
    assert set(exempt) <= {STORE, METRICS, DOOR}
    assert [title for title in exempt.get(DOOR, ()) if "jobs.train" not in title] == []
    assert [title for title in exempt.get(STORE, ()) if "RayTrainWorker" not in title] == []
    assert all("dashboard" in title.lower() for title in exempt[METRICS])
    policy = (ROOT / "SECURITY.md").read_text()
    assert all(what in policy for what in exempt)


def test_nothing_but_ray_and_the_workers_listens_beyond_loopback(dab: Dab, running: str) -> None:
    beyond = {title for (address, _), title in listening(dab).items() if not address.startswith("127.")}
    known = ("ray::", "/ray/", "-m jobs.train")
    assert {title for title in beyond if not any(part in title for part in known)} == set()


def test_secrets_stand_nowhere(dab: Dab, running: str) -> None:
    """Neither the token of the cluster nor what stood in the environment of `dab`."""
    token = (dab.home / "ray_token").read_text().strip()
    secrets = [token, *dab.secrets.values()]
    commands = subprocess.run(["ps", "axww", "-o", "args"], capture_output=True, text=True, check=True).stdout
    shown = {
        "ps": commands,
        "status": json.dumps(dab.ok("status", running)),
        "runs": json.dumps(dab.ok("runs")),
        "logs": dab("logs", running).stdout,
        "jobs": ask_jobs_api(dab, token),
    }
    assert running in shown["jobs"]
    session = Path(json.loads((dab.home / "cluster.json").read_text())["details"]["session_folder"])
    files = [path for root in (dab.home, session) for path in root.rglob("*") if path.is_file()]
    for path in files:
        with suppress(FileNotFoundError):  # a checkpoint that a later one has replaced
            shown[str(path)] = path.read_bytes().decode(errors="replace")
    holders = {place for place, text in shown.items() for secret in secrets if secret in text}
    assert holders == {str(dab.home / "ray_token")}
    assert (dab.home / "ray_token").stat().st_mode & 0o777 == 0o600


def listening(dab: Dab) -> dict[tuple[str, int], str]:
    """Return who listens on each address and port, of the cluster, its jobs, and the tracker."""
    servers = [server for name in ("cluster", "tracking") if (server := recorded(dab.home / f"{name}.json"))]
    assert len(servers) == 2
    titles = {process.pid: " ".join(process.cmdline()) for server in servers for process in members(server)}
    found = [each for each in psutil.net_connections("inet") if each.pid in titles]
    assert [each for each in found if each.type.name == "SOCK_DGRAM" and not each.raddr] == []
    return {
        (each.laddr.ip, each.laddr.port): titles[each.pid or 0]
        for each in found
        if each.status == psutil.CONN_LISTEN
    }  # fmt: skip


def rpc_methods() -> list[str]:
    """Return every method of Ray's services, those of the object manager included, which have no Python form."""
    names = [f"/ray.rpc.ObjectManagerService/{method}" for method in ("Push", "Pull", "FreeObjects")]
    for module in pkgutil.iter_modules(ray.core.generated.__path__, "ray.core.generated."):
        if module.name.endswith("_pb2"):
            services = importlib.import_module(module.name).DESCRIPTOR.services_by_name.values()
            names += [f"/{service.full_name}/{method.name}" for service in services for method in service.methods]
    return names


def is_grpc(address: str, port: int) -> bool:
    """Whether a port speaks gRPC."""
    return call(address, port, [HEALTH])[HEALTH] in (None, *REFUSED)


def grpc_let_in(address: str, port: int, methods: list[str]) -> dict[str, object]:
    """Return the methods that do more than refuse, with how they answered; None is an ordinary answer."""
    answers = call(address, port, methods)
    assert grpc.StatusCode.UNAUTHENTICATED in answers.values()
    return {method: code for method, code in answers.items() if code not in REFUSED}


def call(address: str, port: int, methods: list[str]) -> dict[str, grpc.StatusCode | None]:
    """Call methods without a token and with an empty message."""
    answers: dict[str, grpc.StatusCode | None] = {}
    with grpc.insecure_channel(f"{reachable(address)}:{port}") as channel:
        for method in methods:
            try:
                channel.unary_unary(method)(b"", timeout=10)
                answers[method] = None
            except grpc.RpcError as error:
                answers[method] = error.code()
    return answers


def closes_at_once(address: str, port: int) -> bool:
    """Whether whoever connects is sent nothing, read nothing and let go."""
    with socket.create_connection((address, port), timeout=10) as client:
        client.settimeout(3)
        try:
            return client.recv(1) == b""
        except (TimeoutError, ConnectionResetError):
            return False


def http_codes(address: str, port: int) -> dict[str, int] | None:
    """Return what a port answers without a token, by method and path; None if it does not speak HTTP."""
    codes = {}
    for path in HTTP_PATHS:
        for method in ("GET", "POST", "PUT", "DELETE"):
            connection = http.client.HTTPConnection(reachable(address), port, timeout=3)
            try:
                connection.request(method, path)
                codes[f"{method} {path}"] = connection.getresponse().status
            except (OSError, http.client.HTTPException):
                return None
            finally:
                connection.close()
    return codes


def is_metrics(address: str, port: int, codes: dict[str, int]) -> bool:
    """Whether a port gives metrics, whatever is asked for, and takes nothing."""
    if any(code < 400 for request, code in codes.items() if not request.startswith("GET ")):
        return False
    connection = http.client.HTTPConnection(reachable(address), port, timeout=10)
    connection.request("GET", "/metrics")
    answer = connection.getresponse()
    body = answer.read().decode()
    connection.close()
    return answer.status == 200 and all(not line or line[0] == "#" or " " in line for line in body.splitlines())


def is_own_tracker(dab: Dab, port: int) -> bool:
    return bool(json.loads((dab.home / "tracking.json").read_text())["details"]["port"] == port)


def reachable(address: str) -> str:
    return "127.0.0.1" if address in ("::", "0.0.0.0") else address


def ask_jobs_api(dab: Dab, token: str) -> str:
    """Return all that the Jobs API tells about jobs."""
    details = json.loads((dab.home / "cluster.json").read_text())["details"]
    connection = http.client.HTTPConnection("127.0.0.1", int(details["dashboard_port"]), timeout=30)
    connection.request("GET", "/api/jobs/", headers={"authorization": f"Bearer {token}"})
    text = connection.getresponse().read().decode()
    connection.close()
    return text
