"""One attempt on the workers of a Ray cluster: Ray Train starts them where they were told to go, and supervises them.

The loop, its checkpoints and its record belong to `dabnn`. Ray ends the attempt at the first failure; whether there is
another, and on how many workers, is decided in `jobs.launch`. `ray.train.report` is called once an epoch only, because
each call waits for the controller's next poll.
"""

import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import ray
import ray.train
import torch
from ray.train.torch import TorchConfig, TorchTrainer, get_device
from ray.train.torch.config import _TorchBackend
from ray.train.v2._internal.execution import context as execution_context

from dabnn.distributed import COLLECTIVE_TIMEOUT_S, World
from dabnn.observer import Watch
from dabnn.run_folder import RunFolder
from dabnn.spec import TrainSpec
from dabnn.train import train
from dabnn.watch import WorkerWatch, hang_limit_s, watched
from jobs.group import Group, inner
from jobs.growth import GrowthWatch
from jobs.system_metrics import sampling
from jobs.watch import HeedSigterm, notice_of_ray
from orchestrator.capacity import Needs
from orchestrator.config import Config
from orchestrator.interfaces import VARIABLES, environment, interface_of

_AFTER_HANG_S = 60.0
_NODE_ID_LABEL = "ray.io/node-id"  # Ray gives it to every node


class ReportToRay:
    """Tells Ray Train about each finished epoch; every rank must take part."""

    def epoch_finished(self, epoch: int, metrics: dict[str, float]) -> None:
        """Report the epoch's metrics."""
        ray.train.report(metrics | {"epoch": float(epoch)})


class _Backend(_TorchBackend):
    """torch's process group over the interface that each node has for it."""

    def on_start(self, worker_group: Any, backend_config: Any) -> None:
        worker_group.execute(use_interface, backend_config.interface)
        super().on_start(worker_group, backend_config)

    def on_shutdown(self, worker_group: Any, backend_config: Any) -> None:
        """Do nothing: the processes are ended next; leaving the group politely waits 30 s for one that is frozen."""


@dataclass
class _Network(TorchConfig):
    """The process group, and the interface that it talks over; None for the one of each node's address."""

    interface: str | None = None

    @property
    def backend_cls(self) -> type[_Backend]:
        return _Backend


def use_interface(name: str | None) -> None:
    """Make gloo and NCCL of this process use a network interface: `name`, else that of the node's address.

    What the operator of a node has set there is kept unless the run names an interface.
    """
    if name is None and any(variable in os.environ for variable in VARIABLES):
        return
    chosen = name or interface_of(ray.util.get_node_ip_address())
    if chosen is not None:
        os.environ.update(environment(chosen))


def fit(spec: TrainSpec, folder: RunFolder, config: Config, name: str, places: Sequence[str]) -> None:
    """Train until the loop has left its result in `folder`.

    Args:
        spec: The run.
        folder: The run's folder.
        config: The configuration that `spec` was made of.
        name: Unique name for Ray: a name used before would make Ray continue that run's state.
        places: Ids of the nodes of the workers, one entry a worker.

    Raises:
        ray.train.TrainingFailedError: A worker, its node or its start failed.
    """
    cluster = config.cluster
    hang_s = hang_limit_s(cluster.hang_s, spec)
    # Ray Train passes these on to its controller and to the workers.
    os.environ["RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"] = f"{cluster.start_timeout_s:g}"
    os.environ["RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S"] = f"{hang_s + _AFTER_HANG_S:g}"
    os.environ["RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S"] = "1"
    trainer = TorchTrainer(
        _train_on_worker,
        train_loop_config={
            "spec": spec.to_dict(),
            "folder": folder.location,
            "threads": cluster.cpus_per_worker,
            "hang_s": hang_s,
            "may_grow": len(places) < cluster.num_workers,
            "system_metrics_s": config.tracking.system_metrics_s,
        },
        torch_config=_Network(
            backend="nccl" if cluster.gpus_per_worker else "gloo",
            timeout_s=int(_collective_timeout_s(hang_s)),
            interface=cluster.interface,
        ),
        scaling_config=ray.train.ScalingConfig(  # type: ignore[call-arg] # what ray declares is its older form
            num_workers=len(places),
            use_gpu=cluster.gpus_per_worker > 0,
            resources_per_worker=dict(Needs.of(cluster).each),
            placement_strategy=cluster.placement.upper(),
            label_selector=[{_NODE_ID_LABEL: place} for place in places],
        ),
        run_config=ray.train.RunConfig(
            name=name,
            storage_path=str(folder.root / "ray"),
            callbacks=[Group(folder.location, config), HeedSigterm()],  # type: ignore[list-item] # the same
            # Group decides how often.
            failure_config=ray.train.FailureConfig(  # type: ignore[call-arg] # the same
                max_failures=-1, controller_failure_limit=0, max_preemption_failures=0
            ),
        ),
    )
    try:
        trainer.fit()
    except ray.train.TrainingFailedError as error:
        raise inner(error) from error


def _train_on_worker(settings: dict[str, Any]) -> None:
    """Run the loop on one rank; Ray calls this on every worker."""
    # Ray names this logger after its file; at its own level each report would be a long line of the job's log.
    logging.getLogger(execution_context.__file__).setLevel(logging.WARNING)
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    spec, folder = TrainSpec.from_dict(settings["spec"]), RunFolder.of(settings["folder"])
    world = World.current(get_device(), timeout_s=_collective_timeout_s(settings["hang_s"]))
    own = WorkerWatch(
        folder, world.rank, ray.util.get_node_ip_address(), hang_s=settings["hang_s"], notice=notice_of_ray
    )
    watch = GrowthWatch(folder, own) if settings["may_grow"] and world.is_main else own
    with sampling(folder, settings["system_metrics_s"] if world.is_main else 0.0):
        watched(lambda: _loop(spec, folder, world, watch, num_threads=max(1, int(settings["threads"]))), own)


def _loop(spec: TrainSpec, folder: RunFolder, world: World, watch: Watch, *, num_threads: int) -> None:
    """Train in this thread, which is not the one that Ray has prepared."""
    torch.set_num_threads(num_threads)
    if world.device.type == "cuda":
        torch.cuda.set_device(world.device)
    train(spec, folder, world=world, observer=ReportToRay(), watch=watch)


def _collective_timeout_s(hang_s: float) -> float:
    """Return how long ranks wait for each other: longer than a hang takes to be noticed, which is told better."""
    return max(COLLECTIVE_TIMEOUT_S, hang_s + _AFTER_HANG_S)
