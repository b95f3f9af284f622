"""The sbatch script under a real Slurm: one controller and two nodes on this machine, each in namespaces of its own.

Needs root and Debian's `slurm-wlm`; every process, file and interface of it goes with the test.
"""

import contextlib
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PROGRAM = Path(sys.executable).parent
PROGRAMS = ("slurmctld", "slurmd", "sbatch", "munged", "mungekey", "ip", "unshare", "nsenter")
MISSING = [name for name in PROGRAMS if shutil.which(name) is None]
NUM_NODES = 2
FINISH_TIMEOUT_S = 400

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.skipif(os.geteuid() != 0 or bool(MISSING), reason=f"needs root and {', '.join(MISSING) or 'nothing'}"),
]

CONFIGURATION = """
ClusterName=test
SlurmctldHost={host}(10.78.0.1)
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/%n.log
ReturnToService=2
MailProg=/bin/true
NodeName=dabn[0-1] NodeAddr=10.78.0.1[0-1] CPUs={cpus} RealMemory=1000
PartitionName=all Nodes=ALL Default=YES State=UP
"""
# What a node sees of its own: processes, host name and /tmp; folders of ours that lie below /tmp are put back.
NODE = """
set -e
hostname {name}
mount -t tmpfs tmpfs /mnt
{hide}
mount -t tmpfs tmpfs /tmp
{show}
exec slurmd -D -N {name} -f {conf}
"""


@dataclass(frozen=True)
class Slurm:
    """A Slurm that runs; `folder` is seen by all nodes."""

    folder: Path
    environment: dict[str, str]

    def submit(self, script: Path, *options: str) -> tuple[int, str]:
        """Run a job to its end and return its exit code and what it printed."""
        job = self.start(script, *options)
        return self.wait(job)

    def start(self, script: Path, *options: str) -> str:
        return self.run("sbatch", "--parsable", *options, str(script)).strip()

    def wait(self, job: str) -> tuple[int, str]:
        deadline = time.monotonic() + FINISH_TIMEOUT_S
        while "JobState=COMPLETING" in (shown := self.run("scontrol", "show", "job", job)) or (
            "JobState=RUNNING" in shown or "JobState=PENDING" in shown
        ):
            assert time.monotonic() < deadline, self.log(job)
            time.sleep(1)
        return int(shown.split("ExitCode=")[1].split(":")[0]), self.log(job)

    def log(self, job: str) -> str:
        file = self.folder / f"dab-{job}.log"
        return file.read_text() if file.exists() else "no log"

    def run(self, *command: str) -> str:
        done = subprocess.run(
            command, cwd=self.folder, env=self.environment, capture_output=True, text=True, timeout=120
        )
        assert done.returncode == 0, f"{shlex.join(command)}: {done.stderr}"
        return done.stdout


@pytest.fixture(scope="module")
def slurm() -> Iterator[Slurm]:
    folder = Path(tempfile.mkdtemp(prefix="dabslurm-"))
    environment = {**os.environ, "SLURM_CONF": str(folder / "slurm.conf"), "DAB_HOME": str(folder / "home")}
    with contextlib.ExitStack() as stack:
        stack.callback(shutil.rmtree, folder, ignore_errors=True)
        start_network(stack)
        start_controller(folder, environment, stack)
        for number in range(NUM_NODES):
            start_node(number, folder, environment, stack)
        cluster = Slurm(folder, environment)
        deadline = time.monotonic() + 60
        while cluster.run("sinfo", "--noheader", "--format=%t %D").split() != ["idle", str(NUM_NODES)]:
            assert time.monotonic() < deadline, cluster.run("sinfo")
            time.sleep(1)
        yield cluster


def start_network(stack: contextlib.ExitStack) -> None:
    def ip(words: str, *, is_needed: bool = True) -> None:
        subprocess.run(["ip", *words.split()], check=is_needed, capture_output=True)

    stack.callback(ip, "link del dabs0", is_needed=False)
    for words in ("link add dabs0 type bridge", "addr add 10.78.0.1/24 dev dabs0", "link set dabs0 up"):
        ip(words)
    for number in range(NUM_NODES):
        stack.callback(ip, f"netns del dabn{number}", is_needed=False)
        for words in (
            f"netns add dabn{number}",
            f"link add dabv{number} type veth peer name eth0 netns dabn{number}",
            f"link set dabv{number} master dabs0 up",
            f"-n dabn{number} addr add 10.78.0.1{number}/24 dev eth0",
            f"-n dabn{number} link set eth0 up",
            f"-n dabn{number} link set lo up",
            f"-n dabn{number} route add default via 10.78.0.1",
        ):
            ip(words)


def start_controller(folder: Path, environment: dict[str, str], stack: contextlib.ExitStack) -> None:
    for name in ("state", "home"):
        (folder / name).mkdir()
    text = CONFIGURATION.format(host=os.uname().nodename, folder=folder, cpus=os.cpu_count())
    (folder / "slurm.conf").write_text(text)
    folder.chmod(0o755)
    key, socket = folder / "munge.key", folder / "munge.socket"
    subprocess.run(["mungekey", "--create", f"--keyfile={key}"], check=True)
    files = [f"--{kind}-file={folder}/munge.{kind}" for kind in ("pid", "log", "seed")]
    start(["munged", "--foreground", "--force", f"--key-file={key}", f"--socket={socket}", *files], environment, stack)
    deadline = time.monotonic() + 20
    while not socket.exists():
        assert time.monotonic() < deadline, "munged does not start"
        time.sleep(0.1)
    start(["slurmctld", "-D", "-f", str(folder / "slurm.conf")], environment, stack)


def start_node(number: int, folder: Path, environment: dict[str, str], stack: contextlib.ExitStack) -> None:
    name = f"dabn{number}"
    shared = {path.resolve() for path in (folder, ROOT, PROGRAM.parent)}
    below = sorted(path for path in shared if path.is_relative_to("/tmp"))
    words = [(shlex.quote(str(path)), f"/mnt/{position}") for position, path in enumerate(below)]
    script = NODE.format(
        name=name,
        hide="\n".join(f"mkdir {place}; mount --bind {path} {place}" for path, place in words),
        show="\n".join(f"mkdir -p {path}; mount --move {place} {path}" for path, place in words),
        conf=shlex.quote(str(folder / "slurm.conf")),
    )
    apart = ["unshare", "--pid", "--fork", "--kill-child", "--mount", "--mount-proc", "--uts"]
    start(["nsenter", f"--net=/run/netns/{name}", *apart, "bash", "-c", script], environment, stack)


def start(command: list[str], environment: dict[str, str], stack: contextlib.ExitStack) -> None:
    process = subprocess.Popen(
        command, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        start_new_session=True,
    )  # fmt: skip
    stack.callback(end, process)


def end(process: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGTERM)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(5)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait(10)


@pytest.fixture(scope="module")
def data(slurm: Slurm) -> Path:
    from dabnn.data import build_dataset

    build_dataset("builtin:digits", slurm.folder / "digits")
    return slurm.folder / "digits"


def job_script(slurm: Slurm, data: Path, *overrides: str) -> Path:
    """Write the script as `dab cluster slurm` does, with one worker on each node."""
    script = slurm.folder / "job.sh"
    spread = ("cluster.num_workers=2", "cluster.placement=strict_spread", f"data.train={data}")
    command = [PROGRAM / "dab", "cluster", "slurm", ROOT / "examples" / "digits.yaml", "--nodes", NUM_NODES]
    options = [word for override in (*spread, *overrides) for word in ("--set", override)]
    slurm.run(*map(str, command), "--output", str(script), *options)
    return script


def test_digits_are_trained_on_two_nodes(slurm: Slurm, data: Path) -> None:
    job = slurm.start(job_script(slurm, data, "train.epochs=1", "name=it's a run"))
    code, log = slurm.wait(job)
    assert code == 0, log
    folder = Path(slurm.environment["DAB_HOME"]) / "slurm" / job
    assert f"run of job {job}: finished" in log
    assert (folder / "run").read_text().strip()
    assert not (folder / "token").exists()


def test_a_run_stopped_by_the_time_limit_goes_on_in_the_next_job(slurm: Slurm, data: Path) -> None:
    script = job_script(slurm, data, "train.epochs=60")
    first = slurm.start(script)
    folder = Path(slurm.environment["DAB_HOME"]) / "slurm" / first
    deadline = time.monotonic() + FINISH_TIMEOUT_S
    while not list(folder.glob("storage/*/checkpoints/*")):
        assert time.monotonic() < deadline, slurm.log(first)
        time.sleep(1)
    slurm.run("scancel", "--batch", "--signal=USR1", first)
    code, log = slurm.wait(first)
    assert code == 75, log
    assert f"DAB_SLURM_JOB={first}" in log
    code, log = slurm.submit(script, f"--export=ALL,DAB_SLURM_JOB={first}")
    assert code == 0, log
