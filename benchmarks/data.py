"""Our data path beside plain webdataset, mosaicml-streaming, litdata, and torchvision's ImageFolder.

The peers need an environment of their own:

    uv venv peers
    uv pip install --python peers -r requirements.lock
    uv pip install --python peers -r benchmarks/requirements-data.txt
    PYTHONPATH=. peers/bin/python benchmarks/data.py cifar sketches --cifar CIFAR10 --omniglot OMNIGLOT --work WORK

CIFAR10 is an image folder of JPEG files, {train,val}/CLASS/*.jpg, OMNIGLOT one of Omniglot's drawings; data sets are
made from them in WORK, once. Each part writes `data_PART.json`:

| part     | measures                                                                                              |
| -------- | ----------------------------------------------------------------------------------------------------- |
| cifar    | images/s of CIFAR-10: cut out at random, mirrored, normalised; ours also with decoded images kept     |
| sketches | images/s of 10,000 sketches of 224 x 224: any part of it, mirrored, rotated, inverted, normalised     |
| start    | seconds of a new process until its first batch, from 1,000 shards                                     |
| manifest | seconds and memory for opening a manifest of 100,000 shards                                           |
| memory   | memory of all processes over 10 epochs of CIFAR-10                                                    |
| import   | images/s of `dab data build` in 2 processes, from CIFAR-10's archive and from the image folder        |

`data_contender.py` says what the contenders do, `data_turns.py` how they take turns, `data_sets.py` what the data are.
A contender with wrong batches is not timed.
"""

import argparse
import json
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

from data_contender import BATCH, NUM_LOADERS
from data_sets import NUM_SKETCHES, cifar_task, make_cifar_archive, make_sketches, prepare, sketch_task
from data_turns import compare_rates, compare_starts, memory_curve
from packed_conv import record

from dabnn.data.manifest import ImageInfo, Manifest, Shard, Split, write_manifest

PLAIN = ["dab", "webdataset", "mosaicml", "litdata", "imagefolder"]
CIFAR = ["dab_decoded", *PLAIN, "webdataset_tensors", "mosaicml_tensors", "imagefolder_tensors"]
NUM_SHARDS, NUM_MANIFEST_SHARDS, NUM_PROCESSES = 1000, 100_000, 2
_OPEN_MANIFEST = """
import json, re, sys, time
from pathlib import Path
from dabnn.data.manifest import load_manifest
peak = lambda: int(re.search("VmHWM:(.*)kB", Path("/proc/self/status").read_text())[1]) / 1024
before, start = peak(), time.perf_counter()
manifest = load_manifest(sys.argv[1])
seconds = time.perf_counter() - start
assert len(manifest.split("train").shards) == int(sys.argv[2])
print(json.dumps({"seconds": seconds, "peak_mb": peak(), "imported_mb": before}))
"""


def _chosen(names: list[str], options: argparse.Namespace) -> list[str]:
    return [name for name in names if name not in options.without]


def cifar(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Rates on CIFAR-10."""
    root = prepare(options.cifar, options.work / "cifar")
    return compare_rates(_chosen(CIFAR, options), root, cifar_task(options.cifar), options.turns, options.batches)


def sketches(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Rates on sketches."""
    folder = make_sketches(options.omniglot, options.work / "sketches" / "images", options.num_sketches)
    root = prepare(folder, options.work / "sketches")
    return compare_rates(_chosen(PLAIN, options), root, sketch_task(folder), options.turns, options.batches)


def start(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Times to the first batch from many shards."""
    root = prepare(options.cifar, options.work / "many_shards", NUM_SHARDS)
    return compare_starts(_chosen(PLAIN, options), root, cifar_task(options.cifar), options.turns)


def memory(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Memory over epochs."""
    root, task = prepare(options.cifar, options.work / "cifar"), cifar_task(options.cifar)
    names = _chosen(["dab_decoded", *PLAIN], options)
    return [row for name in names for row in memory_curve(name, root, task, options.epochs)]


def manifest(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Opening a manifest of very many shards, each time in a new process."""
    folder = options.work / "manifest"
    folder.mkdir(parents=True, exist_ok=True)
    names = [f"train-{number:06d}.tar" for number in range(NUM_MANIFEST_SHARDS)]
    shards = tuple(Shard(name, 10_000, 2**30, f"{n:064x}", f"{n + 1:064x}") for n, name in enumerate(names))
    classes = tuple(f"class_{number:04d}" for number in range(1000))
    image = ImageInfo(3, 400, 500, (0.5,) * 3, (0.2,) * 3, 0.5, 0.2)
    counts = [NUM_MANIFEST_SHARDS * 10] * 1000
    splits = {"train": Split.of(shards, counts), "val": Split.of(shards[:1], [10] * 1000)}
    write_manifest(folder, Manifest("synthetic", classes, image, splits))
    opened = []
    for _ in range(options.turns):
        command = [sys.executable, "-c", _OPEN_MANIFEST, str(folder), str(NUM_MANIFEST_SHARDS)]
        opened.append(json.loads(subprocess.run(command, check=True, capture_output=True).stdout))
    middle = {key: median(one[key] for one in opened) for key in opened[0]}
    file_mb = (folder / "manifest.json").stat().st_size / 2**20
    return [{"shards": NUM_MANIFEST_SHARDS, "file_mb": file_mb, **middle, "high_s": max(o["seconds"] for o in opened)}]


def import_(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Building shards, by the whole command, its start included."""
    archive = make_cifar_archive(options.cifar, options.work / "archive")
    sources = {"cifar-10-python.tar.gz": archive, "image folder": options.cifar}
    seconds: dict[str, list[float]] = {name: [] for name in sources}
    images = 0
    dest = options.work / "imported"
    for _ in range(options.turns):
        for name, source in sources.items():
            shutil.rmtree(dest, ignore_errors=True)
            command = [sys.executable, "cli.py", "data", "build", str(source), str(dest), "--json"]
            began = time.perf_counter()
            built = subprocess.run([*command, "--processes", str(NUM_PROCESSES)], check=True, stdout=subprocess.PIPE)
            seconds[name].append(time.perf_counter() - began)
            images = sum(split["num_samples"] for split in json.loads(built.stdout)["splits"].values())
    return [
        {
            "source": name,
            "images": images,
            "seconds": median(found),
            "images_per_s": images / median(found),
            "low": images / max(found),
            "high": images / min(found),
        }
        for name, found in seconds.items()
    ]


PARTS: dict[str, Callable[[argparse.Namespace], list[dict[str, Any]]]] = {
    "cifar": cifar,
    "sketches": sketches,
    "start": start,
    "manifest": manifest,
    "memory": memory,
    "import": import_,
}
_PEERS = ("litdata", "mosaicml-streaming", "webdataset", "torchvision", "pillow", "numpy")


def main() -> None:
    """Runs the parts that are named, all by default."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("parts", nargs="*", default=[], help=", ".join(PARTS))
    parser.add_argument("--cifar", type=Path, help="image folder of CIFAR-10, JPEG files")
    parser.add_argument("--omniglot", type=Path, help="image folder of Omniglot's drawings")
    parser.add_argument("--work", type=Path, required=True, help="folder for the data sets that are made")
    parser.add_argument("--turns", type=int, default=7)
    parser.add_argument("--batches", type=int, default=60, help="of a turn of the parts cifar and sketches")
    parser.add_argument("--epochs", type=int, default=10, help="of the part memory")
    parser.add_argument("--without", nargs="+", default=[], metavar="CONTENDER", help="contenders to leave out")
    parser.add_argument("--num-sketches", type=int, default=NUM_SKETCHES)
    options = parser.parse_args()
    if unknown := set(options.parts) - set(PARTS):
        parser.error(f"no such part: {', '.join(sorted(unknown))}; there are {', '.join(PARTS)}")
    for part in options.parts or PARTS:
        rows = PARTS[part](options)
        conditions = {"batch": BATCH, "loaders": NUM_LOADERS, "turns": options.turns, "processes": NUM_PROCESSES}
        record(
            f"data_{part}", rows, **conditions, peers={name: version(name) for name in _PEERS}, os=platform.release()
        )


if __name__ == "__main__":
    main()
