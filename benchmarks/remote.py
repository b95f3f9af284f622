"""Reading shards over HTTP (nginx) and S3 beside reading them from a folder, and what a server that stops does to it.

    PYTHONPATH=. python benchmarks/remote.py --s3 "COMMAND with {port} and {folder}"

nginx must be installed (Debian: nginx-light). COMMAND starts an S3 server on a port of loopback that keeps its objects
in a folder and takes the credentials in AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY; without it S3 is left out. The
dataset is 40,000 PNG of noise, 36x36, about 4 KB each, in shards of 1,000.

Throughput: one epoch of samples in the training order, bytes only (`SampleReader.read`) and decoded (`open_stream`, no
loaders), from the folder, with an empty cache (`cold`) and with a full one (`warm`). The places take turns; each figure
is the median of its turns. `get` is the ceiling of the server: all shards one after the other, thrown away.

Outage: in mid-epoch the server is killed and started again 20 s later (`killed`), or holds still for 20 s with its
connections open (`hung`), while its rate is limited so that fetches are under way. The epoch must give the samples of
an undisturbed stream, step by step; `longest_gap_s` is the longest wait for a batch.
"""

import argparse
import hashlib
import io
import os
import shlex
import shutil
import signal
import socket
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from packed_conv import record
from PIL import Image

from dabnn.data import load_manifest, open_stream
from dabnn.data.manifest import ImageInfo, Manifest, Split, write_manifest
from dabnn.data.reader import SampleReader
from dabnn.data.remote import open_at
from dabnn.data.shard_cache import ShardCache
from dabnn.data.shards import StoredSample, write_shard

NUM_SHARDS, SHARD_SAMPLES, SIDE = 40, 1000, 36
TURNS = 3
BATCH_SIZE = 100
WINDOW = 2000
OUTAGE_S = 20.0
STOP_AT_STEP = 60
OUTAGE_RATE = "1m"  # bytes a second and connection, nginx's spelling

NGINX = """
daemon off; pid {folder}/nginx.pid; error_log {folder}/error.log; worker_processes 1; {master}
events {{ worker_connections 256; }}
http {{
  access_log off; sendfile on; client_body_temp_path {folder}/body; proxy_temp_path {folder}/proxy;
  fastcgi_temp_path {folder}/fastcgi; uwsgi_temp_path {folder}/uwsgi; scgi_temp_path {folder}/scgi;
  server {{ listen 127.0.0.1:{port}; root {root}; {limit} }}
}}
"""


class Server:
    """A server process that can be killed, started again, and held still."""

    def __init__(self, command: list[str], port: int) -> None:
        self._command, self._port = command, port
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Returns when the server takes connections."""
        self._process = subprocess.Popen(self._command, start_new_session=True)
        while True:
            try:
                socket.create_connection(("127.0.0.1", self._port), 1).close()
            except ConnectionRefusedError:
                if self._process.poll() is not None:
                    raise SystemExit(f"{self._command[0]}: ended with {self._process.returncode}") from None
                time.sleep(0.05)
            else:
                return

    def send(self, number: signal.Signals) -> None:
        """Sends a signal to the server's processes."""
        assert self._process is not None
        os.killpg(self._process.pid, number)

    def stop(self) -> None:
        """Kills the server."""
        if self._process is not None:
            self.send(signal.SIGKILL)
            self._process.wait()
            self._process = None


def free_port() -> int:
    """Returns a port that nobody listens on."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
    return port


@contextmanager
def nginx(root: Path, scratch: Path, rate: str = "") -> Iterator[tuple[Server, str]]:
    """Yields an nginx that serves a folder, and its URL."""
    port, folder = free_port(), Path(tempfile.mkdtemp(dir=scratch))
    limit = f"limit_rate {rate};" if rate else ""
    text = NGINX.format(folder=folder, port=port, root=root, limit=limit, master="master_process off; user root;")
    (folder / "nginx.conf").write_text(text)
    server = Server(
        ["nginx", "-p", str(folder), "-e", str(folder / "error.log"), "-c", str(folder / "nginx.conf")], port
    )
    server.start()
    try:
        yield server, f"http://127.0.0.1:{port}"
    finally:
        server.stop()


@contextmanager
def s3(root: Path, scratch: Path, command: str) -> Iterator[tuple[Server, str]]:
    """Yields an S3 server that holds a dataset, and its URL."""
    import fsspec

    port, folder = free_port(), Path(tempfile.mkdtemp(dir=scratch))
    server = Server(shlex.split(command.format(port=port, folder=folder)), port)
    server.start()
    os.environ["AWS_ENDPOINT_URL"] = f"http://127.0.0.1:{port}"
    try:
        files = fsspec.filesystem("s3", skip_instance_cache=True)
        if not files.exists("data"):
            files.mkdir("data")
        for path in sorted(root.iterdir()):
            files.pipe_file(f"data/set/{path.name}", path.read_bytes())
        yield server, "s3://data/set"
    finally:
        server.stop()


def write_dataset(folder: Path) -> None:
    """Writes the dataset of the benchmark."""
    generator = np.random.default_rng(0)
    folder.mkdir()

    def samples(number: int) -> Iterator[StoredSample]:
        for position in range(SHARD_SAMPLES):
            file = io.BytesIO()
            Image.fromarray(generator.integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)).save(
                file, "PNG", compress_level=1
            )
            key = f"{number * SHARD_SAMPLES + position:08d}"
            yield StoredSample(key, f"train/{key}.png", "png", file.getvalue(), position % 10)

    shards = tuple(write_shard(folder / f"train-{number:06d}.tar", samples(number)) for number in range(NUM_SHARDS))
    image = ImageInfo(3, SIDE, SIDE, (0.5, 0.5, 0.5), (0.3, 0.3, 0.3), 0.5, 0.2)
    write_manifest(folder, Manifest("noise", tuple(map(str, range(10))), image, {"train": Split.of(shards)}))


def read_bytes(place: str, order: list[int], cache: ShardCache) -> str:
    """Reads samples without decoding them; returns the digest of their bytes."""
    manifest = load_manifest(place)
    reader = SampleReader(place, manifest.split("train"), len(manifest.classes), cache)
    digest = hashlib.sha256()
    reader.prefetch(np.array(order))
    for index in order:
        digest.update(reader.read(index)[0])
    reader.close()
    return digest.hexdigest()


def read_decoded(place: str, cache: ShardCache) -> str:
    """Reads an epoch of batches; returns the digest of their order."""
    digest = hashlib.sha256()
    with open_stream(place, "train", batch_size=BATCH_SIZE, window=WINDOW, cache=cache) as stream:
        for batch in stream.epoch(0):
            digest.update(batch.indices.numpy().tobytes())
    return digest.hexdigest()


def get_all(place: str, root: Path) -> str:
    """Fetches all shards and throws them away."""
    for shard in load_manifest(root).split("train").shards:
        with open_at(f"{place}/{shard.name}", 0) as body:
            while body.read(1 << 20):
                pass
    return ""


def timed(form: Callable[[], str]) -> tuple[float, str]:
    """Returns how long a call takes, in seconds, and its result."""
    start = time.perf_counter()
    result = form()
    return time.perf_counter() - start, result


def throughput(places: dict[str, str], root: Path, scratch: Path) -> list[dict[str, Any]]:
    """Measures the places in turn; every digest must be that of the folder."""
    order = np.random.default_rng(1).permutation(NUM_SHARDS * SHARD_SAMPLES).tolist()
    num_bytes = load_manifest(root).split("train").num_bytes
    forms: dict[tuple[str, str, str], Callable[[], str]] = {}
    for kind, form in (
        ("bytes", lambda place, cache: read_bytes(place, order, cache)),
        ("decoded", read_decoded),
    ):
        for name, place in places.items():
            cache = ShardCache(scratch / f"cache-{kind}-{name}")

            def cold(form: Any = form, place: str = place, cache: ShardCache = cache) -> str:
                shutil.rmtree(cache.folder, ignore_errors=True)
                return str(form(place, cache))

            def warm(form: Any = form, place: str = place, cache: ShardCache = cache) -> str:
                return str(form(place, cache))

            forms |= (
                {(kind, name, "cold"): cold, (kind, name, "warm"): warm}
                if name != "folder"
                else {(kind, name, ""): warm}
            )
    for name, place in places.items():
        if name != "folder":
            forms["get", name, ""] = lambda place=place: get_all(place, root)
    turns: dict[tuple[str, str, str], list[float]] = {key: [] for key in forms}
    digests: dict[str, set[str]] = {}
    for _ in range(TURNS):
        for key, form in forms.items():
            seconds, digest = timed(form)
            turns[key].append(seconds)
            digests.setdefault(key[0], set()).add(digest)
    assert all(len(found) == 1 for found in digests.values()), "a place gave other samples"
    rows = []
    for (kind, name, state), seconds in turns.items():
        middle = median(seconds)
        row = {"what": kind, "place": name, "cache": state, "samples_per_s": round(len(order) / middle)}
        times = "/".join(f"{second:.2f}" for second in seconds)
        rows.append(row | {"mb_per_s": round(num_bytes / middle / 1e6, 1), "seconds": times})
    return rows


def outage(server: Server, place: str, root: Path, scratch: Path, kind: str) -> dict[str, Any]:
    """Reads an epoch in whose middle the server is away, and compares it with an undisturbed one."""
    with open_stream(root, "train", batch_size=BATCH_SIZE, window=WINDOW) as stream:
        expected = [batch.indices.tolist() for batch in stream.epoch(0)]
    cache = ShardCache(Path(tempfile.mkdtemp(dir=scratch)))

    def away() -> None:
        if kind == "killed":
            server.stop()
            time.sleep(OUTAGE_S)
            server.start()
        else:
            server.send(signal.SIGSTOP)
            time.sleep(OUTAGE_S)
            server.send(signal.SIGCONT)

    found, gaps = [], []
    thread = threading.Thread(target=away)
    began = last = time.perf_counter()
    with open_stream(place, "train", batch_size=BATCH_SIZE, window=WINDOW, cache=cache) as stream:
        for step, batch in enumerate(stream.epoch(0)):
            now = time.perf_counter()
            gaps.append(now - last)
            last = now
            found.append(batch.indices.tolist())
            if step == STOP_AT_STEP:
                thread.start()
    seconds = time.perf_counter() - began
    thread.join()
    seen = sorted(index for step in found for index in step)
    return {
        "same_steps_as_undisturbed": found == expected,
        "every_sample_once": seen == list(range(NUM_SHARDS * SHARD_SAMPLES)),
        "away_s": OUTAGE_S,
        "longest_gap_s": round(max(gaps), 2),
        "gap_at_step": gaps.index(max(gaps)),
        "epoch_s": round(seconds, 2),
    }


def main() -> None:
    """Prints the figures and writes `remote.json`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--s3", default="", help="command that starts an S3 server, with {port} and {folder}")
    parser.add_argument("--s3-name", default="", help="what to call it in the results")
    arguments = parser.parse_args()
    if arguments.s3:
        os.environ.setdefault("AWS_ACCESS_KEY_ID", "test")
        os.environ.setdefault("AWS_SECRET_ACCESS_KEY", "test")
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="dab-remote-") as name:
        scratch = Path(name)
        root = scratch / "set"
        write_dataset(root)
        outages: dict[str, Any] = {}
        places = {"folder": str(root)}
        with nginx(root, scratch) as (_, url):
            if arguments.s3:
                with s3(root, scratch, arguments.s3) as (_, s3_url):
                    rows = throughput(places | {"nginx": url, "s3": s3_url}, root, scratch)
            else:
                rows = throughput(places | {"nginx": url}, root, scratch)
        with nginx(root, scratch, OUTAGE_RATE) as (server, url):
            for kind in ("killed", "hung"):
                outages[f"nginx {kind}"] = outage(server, url, root, scratch, kind)
        if arguments.s3:
            with s3(root, scratch, arguments.s3) as (server, url):
                outages["s3 killed"] = outage(server, url, root, scratch, "killed")
    servers = {"nginx": subprocess.run(["nginx", "-v"], capture_output=True, text=True, check=True).stderr.strip()}
    if arguments.s3:
        servers["s3"] = arguments.s3_name or shlex.split(arguments.s3)[0]
    for key, outage_row in outages.items():
        print(key, outage_row)
    record("remote", rows, servers=servers, turns=TURNS, samples=NUM_SHARDS * SHARD_SAMPLES, outages=outages)


if __name__ == "__main__":
    main()
