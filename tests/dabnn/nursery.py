"""Starts training processes in milliseconds: a process that has imported everything and forks them.

    python nursery.py    reads one JSON request a line from stdin, answers with one JSON line on stdout

Each child is `python -m dabnn.train FOLDER/spec.json FOLDER` as torchrun starts it, except that the server which its
loaders are forked from is the one of this process, unless the request says otherwise, and that it writes down what it
reads. Rank n reads `spec-n.json` where there is one, as if it were on a machine that has other files.
"""

import json
import os
import sys
import traceback
from collections.abc import Iterator
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

from dabnn import torchrun, train
from dabnn.data import Batch, Stream, loaders
from dabnn.distributed import World
from dabnn.models import ModelSpec
from dabnn.spec import TrainSpec
from dabnn.splits import open_split


def record_samples(file: Path, launch: int) -> None:
    """Make the loop of this process append each training batch that it gets to a file: a line a step and rank."""
    log = os.open(file, os.O_WRONLY | os.O_APPEND | os.O_CREAT)

    def recorded(spec: TrainSpec, model: ModelSpec, split: str, world: World) -> Stream:
        stream = open_split(spec, model, split, world)
        read = stream.epoch

        def epoch(number: int, start_step: int = 0) -> Iterator[Batch]:
            for step, batch in enumerate(read(number, start_step), start_step):
                line = {"launch": launch, "rank": world.rank, "epoch": number, "step": step}
                os.write(log, json.dumps(line | {"indices": batch.indices.tolist()}).encode() + b"\n")
                yield batch

        if split == "train":
            vars(stream)["epoch"] = epoch
        return stream

    vars(train)["open_split"] = recorded


def run_rank(request: dict[str, Any], rank: int) -> None:
    """Be one rank of a training run."""
    os.setsid()
    folder = Path(request["folder"])
    log = os.open(folder / "log.txt", os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.dup2(log, 1)
    os.dup2(log, 2)
    places = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": request["num_workers"]}
    os.environ |= {key: str(value) for key, value in places.items()}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(request["port"])}
    if request["own_server"]:
        vars(forkserver._forkserver).update(vars(forkserver.ForkServer()))
        loaders._server = None
    else:
        # It is running, but is no child of this process, which is how it would find out.
        vars(forkserver._forkserver)["ensure_running"] = lambda: None
    record_samples(folder / "samples.jsonl", request["launch"])
    own = folder / f"spec-{rank}.json"
    sys.argv = ["dabnn.train", str(own if own.exists() else folder / "spec.json"), str(folder)]
    torchrun.main()


def start(request: dict[str, Any]) -> list[int]:
    """Fork the ranks and return their process ids."""
    pids = []
    for rank in range(request["num_workers"]):
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                run_rank(request, rank)
                code = 0
            finally:
                if code:
                    traceback.print_exc()
                sys.stdout.flush()
                os._exit(code)
        pids.append(pid)
    return pids


def main() -> None:
    """Answer requests until stdin ends."""
    loaders.start_server(("dabnn.train",)).result()
    print(json.dumps("ready"), flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        answer = [os.waitpid(pid, 0)[1] for pid in request["wait"]] if "wait" in request else start(request)
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
