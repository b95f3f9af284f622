"""A program on the head of the cluster of `nodes_program`: drives a run, or looks at the nodes for one.

`train FOLDER OVERRIDE...` trains as `jobs.train` does and prints what it is told, then the result as JSON.
`look` reads lines of JSON, each {folder, data, interface, ...}, and prints what was found wrong, as JSON, for each.
"""

import json
import logging
import sys
from pathlib import Path
from typing import Any

import ray

from dabnn.errors import DabError
from dabnn.run_folder import RunFolder
from jobs.launch import launch
from jobs.nodes import seen
from jobs.preflight import Wanted, look_at
from orchestrator.config import load_config, resolve_paths
from orchestrator.resolve import resolve, train_spec

CONFIG = Path(__file__).parents[2] / "examples" / "digits.yaml"


def main() -> None:
    """Do what the arguments say."""
    ray.init(logging_level=logging.WARNING, log_to_driver=False)
    if sys.argv[1] == "look":
        for line in sys.stdin:
            say(json.dumps(look(json.loads(line))))
    else:
        say(json.dumps(train(RunFolder(Path(sys.argv[2])), sys.argv[3:])))


def train(folder: RunFolder, overrides: list[str]) -> dict[str, Any]:
    """Return the result of a run."""
    config = resolve(resolve_paths(load_config(CONFIG, overrides)), lambda name: name)
    try:
        return launch(train_spec(config), folder, config, folder.root.name, tell=say)
    except DabError as error:
        return {"status": "failed", "message": str(error)}


def look(question: dict[str, Any]) -> list[str]:
    """Return what is wrong with the nodes that have CPUs, for a worker each."""
    nodes = seen()
    places = [node.name for node in nodes.free if node.resources.get("CPU", 0)]
    defaults: dict[str, Any] = {
        "tracking_uri": "",
        "interface": None,
        "num_loaders": 1,
        "sample_bytes": 4,
        "batch_size": 8,
    }
    folder = RunFolder(Path(question.pop("folder")))
    wanted = Wanted(**defaults | {"disks": ()} | question | {"data": tuple(question["data"])})
    try:
        return str(look_at(places, nodes.addresses, folder, wanted)).splitlines()
    except DabError as error:
        return [str(error)]


def say(line: str) -> None:
    """Print a line at once."""
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
