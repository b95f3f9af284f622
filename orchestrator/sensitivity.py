"""`dab sensitivity`: what each layer of a trained run costs, measured as a job on the cluster, and a plan from that.

The job (`jobs.sensitivity`) leaves its figures as `sensitivity.json` in the run's folder. Asked again for the same
checkpoints and images, for instance with another budget, the command reads that file instead of measuring.
"""

import json
import os
import shlex
import uuid
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dabnn.checkpoints import Checkpoint, best_checkpoint
from dabnn.deliver import load_trained
from dabnn.errors import DabError, InvalidInputError
from dabnn.models import Network
from dabnn.planner import Budget, Proposal, propose
from dabnn.plans import numbered_convs
from dabnn.run_folder import RunFolder
from dabnn.sensitivity import LayerFigures, Samples, is_binary
from dabnn.spec import DataSpec
from orchestrator.config import Config, load_config, to_dict
from orchestrator.config_rules import STAGE_TEACHER
from orchestrator.deliver import best_run
from orchestrator.job import VARIABLE, Job
from orchestrator.jobs_api import follow_job, job_client
from orchestrator.plan_file import write_plan
from orchestrator.resolve import train_spec
from orchestrator.runs import folder_of
from orchestrator.send import hand_over
from orchestrator.sent_runs import target_of
from orchestrator.submit import ensure_services
from orchestrator.target import Target
from orchestrator.tracking import RunRecord

FILE = "sensitivity.json"
_RANGES = ("bin_start", "bin_end", "layers")


@dataclass(frozen=True)
class Measured:
    """What decides the figures: equal values, equal figures.

    Attributes:
        checkpoint_sha256: Of the run's best checkpoint.
        twin_sha256: Of the float twin's; None without one.
        num_images: Validation images that were asked for.
    """

    checkpoint_sha256: str
    twin_sha256: str | None
    num_images: int


@dataclass(frozen=True)
class Request:
    """The description that travels to the job, as JSON in an environment variable.

    Attributes:
        job_id: Name of the Ray job.
        run_id: MLflow run.
        folder: The run's folder.
        tracking_uri: MLflow server.
        checkpoint: Of the run.
        twin_checkpoint: Of the float twin, or None.
        data: Fields of the `DataSpec` of the run.
        seed: Of the run.
        measured: What the figures will be of.
    """

    job_id: str
    run_id: str
    folder: str
    tracking_uri: str
    checkpoint: str
    twin_checkpoint: str | None
    data: dict[str, Any]
    seed: int
    measured: Measured

    @property
    def samples(self) -> Samples:
        """The images to measure on."""
        return Samples(DataSpec.from_dict(self.data), self.seed, self.measured.num_images)

    def to_json(self) -> str:
        """Return the text that `from_environment` reads; Ray replaces `$NAME` in variables, so it holds no dollar."""
        return json.dumps(asdict(self)).replace("$", "\\u0024")

    @classmethod
    def from_environment(cls) -> "Request":
        """Read the description of the job that this process is.

        Raises:
            DabError: The variable is not set: the program was not started by `dab sensitivity`.
        """
        text = os.environ.get(VARIABLE)
        if text is None:
            raise DabError(f"{VARIABLE} is not set. This program is started by `dab sensitivity`.")
        values = json.loads(text)
        return cls(**values | {"measured": Measured(**values["measured"])})


def measure(
    uri: str,
    reference: str,
    *,
    twin: str | None,
    num_images: int,
    say: Callable[[str], None],
    on_wait: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Return the figures of the best checkpoint of a run, measured on the cluster unless that was done before.

    Args:
        uri: Tracking server.
        reference: The run; of a sweep, its best trial.
        twin: A float run of the same architecture, or None.
        num_images: Validation images, at most.
        say: Told how far the job is.
        on_wait: Told what is being waited for.

    Raises:
        InvalidInputError: There is no such run or checkpoint, or the twin is none.
        DabError: The job failed.
    """
    record = best_run(uri, reference)
    request = _request(uri, record, None if twin is None else best_run(uri, twin), num_images)
    found = RunFolder.of(request.folder).load_json(FILE)
    if found.get("measured") == asdict(request.measured) and "error" not in found:
        say(f"measured before: {RunFolder.of(request.folder).place_of(FILE)}; remove it to measure again")
    else:
        target, _ = ensure_services(uri, on_wait, target=target_of(record))
        found = _run_job(request, target, say)
    root = folder_of(record).fresh().root
    config = Job.load(root).parsed_config()
    return found | {
        "run_id": record.run_id,
        "name": record.name,
        "config": _file_of(root),
        "without": without(config),
        "stages": None if config.train.stages is None else to_dict(config)["train"]["stages"],
    }


def _file_of(root: Path) -> str:
    """Return the configuration in a run's folder, or CONFIG where that is none of a single run, as older ones are."""
    file = root / "config.yaml"
    try:
        return str(file) if load_config(file).search is None else "CONFIG"
    except InvalidInputError:
        return "CONFIG"


def changes_for_plan(found: dict[str, Any], file: str) -> list[str]:
    """Return the changes to the configuration of a measured run that make a run with the plan in `file` of it.

    Args:
        found: What `measure` returned.
        file: Of a plan; it is for the last stage, where the run has stages, as that is the network that was measured.
    """
    name = f"name={json.dumps(found['name'] + '-plan')}"
    if found["stages"] is None:
        return [name, f"binarize.plan={file}", *found["without"]]
    *before, last = found["stages"]
    others = {key: value for key, value in (last.get("binarize") or {}).items() if key not in (*_RANGES, "inputs")}
    return [name, f"train.stages={json.dumps([*before, last | {'binarize': others | {'plan': file}}])}"]


def proposal(found: dict[str, Any], budget: Budget | None) -> Proposal:
    """Return the plan with the best predicted accuracy within a budget, from the figures of `measure`.

    Raises:
        InvalidInputError: The budget is less than the cheapest plan needs.
    """
    layers = [LayerFigures(**layer) for layer in found["layers"]]
    spec = load_trained(found["checkpoint"]).spec
    top1 = found["top1_reestimated"]
    return propose(spec, layers, num_images=found["num_images"], top1=top1, budget=budget)


def save_plan(file: Path, found: dict[str, Any], plan: Proposal) -> None:
    """Write a proposed plan as a file for `binarize.plan`.

    Raises:
        DabError: The file cannot be written.
    """
    comments = [
        f"proposed by `dab sensitivity` for {found['name']} ({found['run_id']}), from {plan.based_on}",
        f"predicted top-1 {plan.predicted_top1:.2f} %, {plan.operations:,.0f} operations, {plan.packed_bytes:,} bytes",
    ]
    write_plan(file, {"binary_weights": plan.binary_weights, "binary_inputs": plan.binary_inputs}, comments=comments)


def without(config: Config) -> list[str]:
    """Return the changes that take the run's own choice of layers out of its configuration."""
    changes = [f"binarize.{key}=null" for key in _RANGES if getattr(config.binarize, key) is not None]
    return changes if config.binarize.inputs == "model" else [*changes, "binarize.inputs=model"]


def float_twin(config: Config, file: str) -> list[str]:
    """Return the command that trains the float twin of a run, from its configuration and the file that holds it."""
    distill = config.train.distill
    whole = [] if config.train.stages is None else ["train.stages=null", f"train.epochs={config.train.epochs}"]
    if whole and distill is not None and distill.teacher.startswith(STAGE_TEACHER):
        whole.append("train.distill=null")
    name = f"name={json.dumps(config.name + '-float')}"
    changes = [name, "binarize.plan={weights: [], inputs: []}", *without(config), *whole]
    return ["dab", "submit", file, *(word for change in changes for word in ("--set", change))]


def _request(uri: str, record: RunRecord, twin: RunRecord | None, num_images: int) -> Request:
    folder = folder_of(record).fresh()
    config = Job.load(folder).parsed_config()
    checkpoint = best_checkpoint(folder)
    twin_checkpoint = None if twin is None else best_checkpoint(folder_of(twin))
    if twin is not None and twin_checkpoint is not None:
        command = shlex.join(float_twin(config, _file_of(folder.root)))
        _check_twin(command, record, checkpoint, twin, twin_checkpoint)
    spec = train_spec(config)
    return Request(
        job_id=f"dab-{record.run_id[:16]}-s{uuid.uuid4().hex[:12]}",
        run_id=record.run_id,
        folder=folder.location,
        tracking_uri=uri,
        checkpoint=checkpoint.path,
        twin_checkpoint=None if twin_checkpoint is None else twin_checkpoint.path,
        data=asdict(spec.data),
        seed=spec.seed,
        measured=Measured(checkpoint.sha256, None if twin_checkpoint is None else twin_checkpoint.sha256, num_images),
    )


def _check_twin(
    command: str, record: RunRecord, checkpoint: Checkpoint, twin: RunRecord, twin_checkpoint: Checkpoint
) -> None:
    net, other = load_trained(checkpoint.path), load_trained(twin_checkpoint.path)
    if not is_binary(net):
        raise InvalidInputError(f"--twin: {record.name} is a float run and so its own twin. Leave the option out.")
    if is_binary(other):
        raise InvalidInputError(
            f"--twin: {twin.name} has binary layers; the twin must be a float run. Train one: {command}"
        )
    if _shape(net) != _shape(other):
        raise InvalidInputError(
            f"--twin: {twin.name} is a {other.spec.name} with other layers, images or classes than {record.name}, a "
            f"{net.spec.name}. Train one with the same model and data: {command}"
        )
    digests = [record.tags.get("dab.data_digest"), twin.tags.get("dab.data_digest")]
    if digests[0] != digests[1]:
        raise InvalidInputError(
            f"--twin: {twin.name} was trained on other data than {record.name}, so their accuracies say nothing about "
            "one another. Train the twin on the same data set."
        )


def _shape(net: Network) -> tuple[object, ...]:
    convs = [conv for _, conv in numbered_convs(net).values()]
    layers = tuple((tuple(conv.weight.shape), conv.stride, conv.padding, conv.groups) for conv in convs)
    return net.spec.num_classes, net.spec.in_channels, net.spec.input_size, layers


def _run_job(request: Request, target: Target, say: Callable[[str], None]) -> dict[str, Any]:
    hand_over(
        target,
        "jobs.sensitivity",
        job_id=request.job_id,
        description=request.to_json(),
        run_id=request.run_id,
        kind="sensitivity",
    )
    try:
        for text in follow_job(target, request.job_id):
            for line in text.splitlines():
                say(line)
    except KeyboardInterrupt:
        job_client(target).stop_job(request.job_id)
        raise
    found = RunFolder.of(request.folder).load_json(FILE)
    if found.get("job_id") != request.job_id:
        raise DabError(f"sensitivity: the job {request.job_id} ended without figures; its log is above.")
    if "error" in found:
        raise DabError(f"sensitivity: {found['error']}")
    return found
