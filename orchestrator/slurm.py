"""`dab cluster slurm`: an sbatch script that starts Ray on the nodes of a Slurm job and trains one configuration there.

What the script does is in `slurm.sh`, word for word: this module only puts the values before it, as `#SBATCH` lines
and quoted assignments. Leaves out queues, accounts and limits: options of `sbatch` win over those of a script.
"""

import math
import re
import shlex
import sys
from pathlib import Path

from dabnn.errors import InvalidInputError
from orchestrator.config import Config, load_config, resolve_paths, to_yaml
from orchestrator.home import home
from orchestrator.output import View

_BODY = Path(__file__).with_name("slurm.sh")
_MAX_JOB_NAME = 60
_SECONDS_FOR_A_CHECKPOINT = 180


def write_script(
    config: Path, overrides: list[str], *, num_nodes: int, gpus_per_node: int, output: Path | None
) -> View:
    """Return the sbatch script for a configuration, and write it to `output` if that is given.

    Args:
        config: YAML file of one run.
        overrides: `key=value` texts, as for `dab submit`.
        num_nodes: Nodes of the Slurm job, the head included: it works too.
        gpus_per_node: GPUs of each node; 0 asks for none.
        output: File to write; an existing one is replaced.

    Raises:
        InvalidInputError: The configuration is wrong, or its workers do not fit on these nodes.
    """
    wanted = resolve_paths(load_config(config, overrides))
    _check_fits(wanted, num_nodes, gpus_per_node)
    text = sbatch_script(
        wanted, num_nodes=num_nodes, gpus_per_node=gpus_per_node, program=Path(sys.executable).parent, folder=home()
    )
    if output is not None:
        output.write_text(text, encoding="utf-8")
    data = {
        "file": None if output is None else str(output),
        "nodes": num_nodes,
        "gpus_per_node": gpus_per_node,
        "script": text,
    }
    return data, text if output is None else f"{output}: {num_nodes} nodes with {gpus_per_node} GPUs each"


def sbatch_script(config: Config, *, num_nodes: int, gpus_per_node: int, program: Path, folder: Path) -> str:
    """Return the script, which holds the configuration.

    Args:
        config: What to train; its paths are absolute.
        num_nodes: Nodes of the Slurm job.
        gpus_per_node: GPUs of each node.
        program: Folder of `dab`, `ray` and `python`; seen by every node.
        folder: Where each job gets a folder of its own; seen by every node, and by nobody else.
    """
    directives = {
        "job-name": _job_name(config.name),
        "nodes": str(num_nodes),
        "ntasks-per-node": "1",
        "gpus-per-node": str(gpus_per_node) if gpus_per_node else None,
        "mem": "0",
        "output": "dab-%j.log",
        "open-mode": "append",
        "signal": f"B:USR1@{_SECONDS_FOR_A_CHECKPOINT}",
    }
    values = {
        "program": str(program),
        "home": str(folder),
        "tracking": config.tracking.uri or "",
        "interface": config.cluster.interface or "",
        "gpus": str(gpus_per_node),
        "config": to_yaml(config),
    }
    return "\n".join(
        [
            "#!/bin/bash",
            "# Written by `dab cluster slurm`. Program, data and the folder `home` must be the same on every node.",
            *(f"#SBATCH --{key}={value}" for key, value in directives.items() if value is not None),
            "#SBATCH --exclusive",  # Ray's ports, and the `ray stop` at the end, are for a whole machine
            "#SBATCH --no-kill",  # the run itself goes on without a node that was lost
            *(f"{key}={shlex.quote(value)}" for key, value in values.items()),
            "",
            _BODY.read_text(encoding="utf-8"),
        ]
    )


def _job_name(name: str) -> str:
    """Return a run's name as a word that needs no quotes: Slurm reads `#SBATCH` lines by rules of its own."""
    return "dab-" + re.sub(r"[^A-Za-z0-9._-]+", "-", name)[:_MAX_JOB_NAME].strip("-")


def _check_fits(config: Config, num_nodes: int, gpus_per_node: int) -> None:
    workers, share = config.cluster.num_workers, config.cluster.gpus_per_worker
    if share == 0 and gpus_per_node:
        raise InvalidInputError(
            f"--gpus-per-node: {gpus_per_node} would stand idle, since cluster.gpus_per_worker is 0. Leave the option "
            "out, or add --set cluster.gpus_per_worker=1."
        )
    room = num_nodes * math.floor(gpus_per_node / share) if share else workers
    if room < workers:
        raise InvalidInputError(
            f"cluster.num_workers: {workers} workers x {share:g} GPUs do not fit on {num_nodes} nodes x "
            f"{gpus_per_node} GPUs, which hold {room}. Ask for more nodes or GPUs, or for at most {room} workers."
        )
