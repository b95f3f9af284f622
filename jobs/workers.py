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
from ray.train.v2.api.exceptions import WorkerGroupError

from dabnn.distributed import COLLECTIVE_TIMEOUT_S, World
from dabnn.observer import Watch
from dabnn.run_folder import RunFolder
from dabnn.spec import TrainSpec
from dabnn.train import train
from dabnn.watch import WorkerWatch, hang_limit_s, watched
from jobs.growth import GrowthWatch
from jobs.watch import HeedSigterm, Witness, notice_of_ray
from orchestrator.capacity import Needs
from orchestrator.config_sections import Cluster as ClusterConfig
from orchestrator.interfaces import VARIABLES, environment, interface_of

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


def fit(spec: TrainSpec, folder: RunFolder, cluster: ClusterConfig, name: str, places: Sequence[str]) -> None:
    """Train until the loop has left its result in `folder`.

    Args:
        spec: The run.
        folder: The run's folder.
        cluster: What each worker needs.
        name: Unique name for Ray: a name used before would make Ray continue that run's state.
        places: Ids of the nodes of the workers, one entry a worker.

    Raises:
        ray.train.TrainingFailedError: A worker, its node or its start failed.
    """
    # Ray Train passes it on to its controller and to the workers.
    os.environ["RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"] = f"{cluster.start_timeout_s:g}"
    trainer = TorchTrainer(
        _train_on_worker,
        train_loop_config={
            "spec": spec.to_dict(),
            "folder": folder.location,
            "threads": cluster.cpus_per_worker,
            "hang_s": hang_limit_s(cluster.hang_s, spec),
            "may_grow": len(places) < cluster.num_workers,
        },
        torch_config=_Network(
            backend="nccl" if cluster.gpus_per_worker else "gloo",
            timeout_s=COLLECTIVE_TIMEOUT_S,
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
            callbacks=[Witness(), HeedSigterm()],  # type: ignore[list-item] # the same
            failure_config=ray.train.FailureConfig(  # type: ignore[call-arg] # the same
                max_failures=0, controller_failure_limit=0, max_preemption_failures=0
            ),
        ),
    )
    try:
        trainer.fit()
    except WorkerGroupError as error:
        # Ray wraps what the loop raised together with its traceback, which it has logged.
        failures = {rank: getattr(each, "_base_exc", each) for rank, each in error.worker_failures.items()}
        raise WorkerGroupError(str(error), failures) from error


def _train_on_worker(settings: dict[str, Any]) -> None:
    """Run the loop on one rank; Ray calls this on every worker."""
    # Ray names this logger after its file; at its own level each report would be a long line of the job's log.
    logging.getLogger(execution_context.__file__).setLevel(logging.WARNING)
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.set_num_threads(max(1, int(settings["threads"])))
    spec, folder = TrainSpec.from_dict(settings["spec"]), RunFolder.of(settings["folder"])
    world = World.current(get_device())
    own = WorkerWatch(
        folder, world.rank, ray.util.get_node_ip_address(), hang_s=settings["hang_s"], notice=notice_of_ray
    )
    watch = GrowthWatch(folder, own) if settings["may_grow"] and world.is_main else own
    watched(lambda: _loop(spec, folder, world, watch), own)


def _loop(spec: TrainSpec, folder: RunFolder, world: World, watch: Watch) -> None:
    train(spec, folder, world=world, observer=ReportToRay(), watch=watch)
