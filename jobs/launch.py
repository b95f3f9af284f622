"""Run the training loop on the workers of a Ray cluster, or in this process when one worker is asked for by a trial.

Ray launches, supervises and restarts; the loop, its checkpoints and its record belong to `dabnn`. `ray.train.report`
is called once an epoch only, because each call waits for the controller's next poll.
"""

import logging
import os
from pathlib import Path
from typing import Any

import ray
import ray.train
from ray.train.torch import TorchConfig, TorchTrainer

from dabnn.distributed import COLLECTIVE_TIMEOUT_S
from dabnn.errors import DabError
from dabnn.run_folder import RunFolder
from dabnn.spec import TrainSpec
from dabnn.train import train
from orchestrator.config_sections import Cluster as ClusterConfig


class ReportToRay:
    """Tells Ray Train about each finished epoch; every rank must take part."""

    def epoch_finished(self, epoch: int, metrics: dict[str, float]) -> None:
        """Report the epoch's metrics."""
        ray.train.report(metrics | {"epoch": float(epoch)})


def launch(spec: TrainSpec, folder: RunFolder, cluster: ClusterConfig, name: str) -> dict[str, Any]:
    """Train on the cluster and return the result that the loop left in `folder`.

    Args:
        spec: The run.
        folder: The run's folder, on storage that every node sees.
        cluster: Workers and what each needs.
        name: Unique name for Ray: a name used before would make Ray continue that run's state.

    Raises:
        DabError: The cluster cannot hold the workers, or workers died more often than `max_failures`.
    """
    check_capacity(cluster)
    folder.forget_result()
    trainer = TorchTrainer(
        _train_on_worker,
        train_loop_config={"spec": spec.to_dict(), "folder": str(folder.root), "threads": cluster.cpus_per_worker},
        torch_config=TorchConfig(backend="nccl" if cluster.gpus_per_worker else "gloo", timeout_s=COLLECTIVE_TIMEOUT_S),
        scaling_config=ray.train.ScalingConfig(
            num_workers=cluster.num_workers,
            use_gpu=cluster.gpus_per_worker > 0,
            resources_per_worker=_resources(cluster),
        ),
        run_config=ray.train.RunConfig(
            name=name,
            storage_path=str(folder.root / "ray"),
            failure_config=ray.train.FailureConfig(max_failures=cluster.max_failures),
        ),
    )
    try:
        trainer.fit()
    except ray.train.TrainingFailedError as error:
        raise DabError(f"training failed after {cluster.max_failures} restarts: {_last_line(error)}") from error
    result = folder.result()
    if not result:
        raise DabError(f"{folder.root}: the workers ended without a result. Look at `dab logs`.")
    return result


def check_capacity(cluster: ClusterConfig) -> None:
    """Refuse more workers than the cluster could ever place: Ray would wait for ever.

    Raises:
        DabError: Says what is needed and what each node has.
    """
    wanted = _resources(cluster)
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    held = (min(node.get(kind, 0) // amount for kind, amount in wanted.items() if amount) for node in nodes)
    slots = int(sum(held))
    if slots < cluster.num_workers:
        have = "; ".join(f"{node.get('CPU', 0):g} CPU, {node.get('GPU', 0):g} GPU" for node in nodes)
        needs = ", ".join(f"{amount:g} {kind}" for kind, amount in wanted.items())
        raise DabError(
            f"cluster.num_workers: {cluster.num_workers} workers of {needs} each, but the cluster's nodes ({have}) "
            f"hold {slots}. Ask for fewer workers or add nodes."
        )


def _resources(cluster: ClusterConfig) -> dict[str, float]:
    resources: dict[str, float] = {"CPU": float(cluster.cpus_per_worker)}
    if cluster.gpus_per_worker:
        resources["GPU"] = float(cluster.gpus_per_worker)
    return resources


def _train_on_worker(settings: dict[str, Any]) -> None:
    """Run the loop on one rank; Ray calls this on every worker."""
    import torch
    from ray.train.torch import get_device
    from ray.train.v2._internal.execution import context as execution_context

    from dabnn.distributed import World

    # Ray names this logger after its file; at its own level each report would be a long line of the job's log.
    logging.getLogger(execution_context.__file__).setLevel(logging.WARNING)
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.set_num_threads(max(1, int(settings["threads"])))
    spec = TrainSpec.from_dict(settings["spec"])
    train(spec, RunFolder(Path(settings["folder"])), world=World.current(get_device()), observer=ReportToRay())


def _last_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__
