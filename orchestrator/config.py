"""What a user may choose: every configuration key with its meaning, unit, limits and default.

`load_config` reads YAML and `--set` overrides into a frozen `Config`. Every value either works or is refused here: a
key that this version does not implement is not a key. Combinations of keys are judged in `orchestrator.config_rules`,
messages are worded in `orchestrator.config_errors`, text is read in `orchestrator.config_source`. Whether a model of
that name exists and has that many layers is the business of `dabnn.models.build`. Rank, device and handles are never
here.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    Strict,
    ValidationError,
    ValidatorFunctionWrapHandler,
    WrapValidator,
    model_serializer,
    model_validator,
)

from dabnn.errors import InvalidInputError
from orchestrator.config_errors import invalid_config
from orchestrator.config_rules import check_config, check_domain, check_inputs, check_name, check_written
from orchestrator.config_source import assign, parse_override, read_mapping

Scalar = str | int | float | bool | None

# A wrapped field is judged as Python values, where a strict tuple would not take the list that YAML holds.
_List = Strict(False)


class Section(BaseModel):
    """Base of all sections: frozen, no unknown keys, no conversion between types."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class Model(Section):
    """Which network."""

    name: str = Field(min_length=1, description="model of the zoo; `dab models` lists them")
    num_classes: int | None = Field(
        default=None, ge=2, description="classes to tell apart; null: those of the data set"
    )
    input_size: int | None = Field(
        default=None, ge=1, description="side of the square input, pixels; null: the model's own"
    )
    in_channels: Literal[1, 3] | None = Field(
        default=None, description="1 for grey, 3 for colour; null: the model's own"
    )
    width: float = Field(default=1.0, gt=0, le=16, description="factor on the number of channels of each layer")


def _words_or_layers(value: Any, handler: ValidatorFunctionWrapHandler) -> Any:
    try:
        return handler(value)
    except ValidationError:
        raise ValueError("must be model, none or a list of layer numbers such as [2, 3]") from None


class Binarize(Section):
    """Which layers are binary, and how. Layers are numbered from 1, as `dab models show` prints them."""

    weights: Literal["dab", "xnor", "sign"] = Field(default="dab", description="quantizer of the weights in the range")
    center: Literal["none", "filter", "tap"] | None = Field(
        default=None, description="mean subtracted before quantizing; null: tap where the input is binary, else none"
    )
    inputs: Annotated[
        Literal["model", "none"] | Annotated[tuple[Annotated[int, Field(ge=1)], ...], _List],
        WrapValidator(_words_or_layers),
        AfterValidator(check_inputs),
    ] = Field(default="model", description="layers with binary inputs: model (as its variant says), none, or numbers")
    bin_start: int | None = Field(
        default=None, ge=1, description="first layer with binary weights; null: the model's own"
    )
    bin_end: int | None = Field(default=None, ge=1, description="last layer with binary weights; null: the model's own")


class Data(Section):
    """Samples and batches."""

    train: str = Field(min_length=1, description="folder made by `dab data build`; its split train is learned from")
    val: str | None = Field(
        default=None, min_length=1, description="folder whose split val measures accuracy; null: the one of data.train"
    )
    batch_size: int = Field(default=256, ge=2, description="samples of one optimizer step over all workers")
    eval_batch_size: int = Field(default=64, ge=1, description="samples of one evaluation batch on one worker")
    num_loaders: int = Field(default=2, ge=0, description="loader processes a worker; 0 loads in the worker itself")
    transform: Literal["auto", "plain", "crop_flip"] = Field(
        default="auto",
        description="what happens to a training image: plain resizes, crop_flip also crops and mirrors it",
    )
    remainder: Literal["keep", "drop"] = Field(
        default="keep", description="what happens to the last, smaller batch of an epoch"
    )


class Optim(Section):
    """The optimizer and the limits of its learning rate."""

    name: Literal["adam", "sgd", "adamw"] = Field(default="adam", description="optimizer")
    max_lr: float = Field(default=5e-4, gt=0, description="highest learning rate")
    min_lr: float = Field(default=1e-5, ge=0, description="learning rate that the schedule does not go below")
    weight_decay: float = Field(
        default=0.0, ge=0, description="weight decay, 1/step, as torch's optimizer of that name uses it"
    )
    momentum: float = Field(default=0.9, ge=0, lt=1, description="momentum; sgd only")
    nesterov: bool = Field(default=False, description="Nesterov momentum; sgd only")


class Schedule(Section):
    """The learning rate as a function of the epoch."""

    name: Literal["decay", "cosine", "linear", "one_cycle", "constant"] = Field(default="decay", description="shape")
    interval: int = Field(default=50, ge=1, description="epochs between two drops; decay only")
    level: float = Field(default=2.0, ge=1, description="factor that the rate is divided by at each drop; decay only")
    warmup_epochs: float = Field(default=0.0, ge=0, description="epochs over which the rate first rises from 0")


class Checkpoint(Section):
    """When a checkpoint is written and which are kept."""

    every_epochs: int = Field(default=1, ge=1, description="epochs between two checkpoints; the last writes one too")
    every_steps: int | None = Field(
        default=None, ge=1, description="optimizer steps between two further checkpoints; null: none within an epoch"
    )
    keep_last: int = Field(default=2, ge=1, description="newest checkpoints that are kept")
    keep_best: int = Field(default=1, ge=1, description="checkpoints of highest val_top1 that are kept besides")


class Train(Section):
    """The training loop."""

    epochs: int = Field(default=100, ge=1, description="passes over the training split")
    precision: Literal["fp32"] = Field(default="fp32", description="number format of the arithmetic")
    init_from: None = Field(default=None, description="another run's weights to start from")
    checkpoint: Checkpoint = Field(default=Checkpoint(), description="when a checkpoint is written and which are kept")


class Cluster(Section):
    """What the run takes from the cluster."""

    num_workers: int = Field(default=2, ge=1, description="processes that train together, each on a share of a batch")
    gpus_per_worker: float = Field(default=0.0, ge=0, description="GPUs of one worker; 0 trains on the CPU")
    cpus_per_worker: float = Field(default=1.0, gt=0, description="CPU cores of one worker")
    min_workers: None = Field(default=None, description="fewest workers to go on with")
    max_failures: int = Field(default=3, ge=0, description="restarts after a failure before the run counts as failed")


class Tracking(Section):
    """Where runs are recorded."""

    uri: str | None = Field(
        default=None, min_length=1, description="MLflow server; null: one of our own under DAB_HOME"
    )
    experiment: str = Field(
        default="dab", min_length=1, max_length=100, description="MLflow experiment that the run belongs to"
    )


class Domain(Section):
    """What one key may be in a search: exactly one of the four."""

    int_: Annotated[tuple[int, int], _List] | None = Field(
        default=None, alias="int", description="[lowest, highest], whole numbers, both included"
    )
    float_: Annotated[tuple[float, float], _List] | None = Field(
        default=None, alias="float", description="[lowest, highest], evenly"
    )
    log: Annotated[tuple[float, float], _List] | None = Field(
        default=None, description="[lowest, highest], evenly in its logarithm"
    )
    choice: Annotated[tuple[Scalar, ...], _List] | None = Field(default=None, description="the values to choose from")

    @model_validator(mode="after")
    def _one_kind(self) -> "Domain":
        if len(self._given()) != 1:
            raise ValueError("one kind")
        return self

    @model_serializer
    def _serialize(self) -> dict[str, list[Scalar]]:
        return {self.kind: list(self.values)}

    @property
    def kind(self) -> str:
        """`int`, `float`, `log` or `choice`."""
        return next(iter(self._given()))

    @property
    def values(self) -> tuple[Scalar, ...]:
        """The two ends of a range, or the values of a choice."""
        return self._given()[self.kind]

    def _given(self) -> dict[str, tuple[Scalar, ...]]:
        kinds = {"int": self.int_, "float": self.float_, "log": self.log, "choice": self.choice}
        return {kind: values for kind, values in kinds.items() if values is not None}


def _domain_or_message(value: Any, handler: ValidatorFunctionWrapHandler) -> Any:
    try:
        return handler(value)
    except ValidationError:
        raise ValueError(
            "must be one of {int: [2, 4]}, {float: [0.1, 0.5]}, {log: [1e-4, 1e-2]}, {choice: [a, b]}"
        ) from None


class Objective(Section):
    """What a search improves."""

    metric: Literal["val_top1", "val_top5", "val_loss"] = Field(
        default="val_top1", description="metric of the last epoch"
    )
    mode: Literal["max", "min"] = Field(default="max", description="whether more or less of it is better")


class Search(Section):
    """What `dab submit --sweep` tries."""

    num_trials: int = Field(default=20, ge=1, description="trials; a grid ends earlier when it has no more points")
    space: dict[str, Annotated[Domain, WrapValidator(_domain_or_message), AfterValidator(check_domain)]] = Field(
        min_length=1, description="dotted configuration key -> what it may be"
    )
    objectives: tuple[Objective, ...] = Field(default=(Objective(),), min_length=1, description="exactly one")
    algorithm: Literal["tpe", "random", "grid"] = Field(default="tpe", description="how the next trial is chosen")
    early_stop: Annotated[Literal["asha"] | None, BeforeValidator(lambda value: None if value == "none" else value)] = (
        Field(default="asha", description="asha ends trials that fall behind; none or null lets each one finish")
    )
    epochs: int | None = Field(default=None, ge=1, description="epochs of one trial; null: train.epochs")
    max_concurrent: int | None = Field(default=None, ge=1, description="trials at a time; null: as many as fit")


class Config(Section):
    """One run, or one search, as the user asked for it."""

    name: Annotated[str, AfterValidator(check_name)] = Field(
        description="name of the run: printable text without slashes"
    )
    seed: int = Field(default=1, ge=0, lt=2**32, description="decides first weights, sample order and augmentation")
    model: Model = Field(description="which network")
    binarize: Binarize = Field(default=Binarize(), description="which layers are binary, and how")
    data: Data = Field(description="samples and batches")
    optim: Optim = Field(default=Optim(), description="the optimizer")
    schedule: Schedule = Field(default=Schedule(), description="the learning rate over time")
    train: Train = Field(default=Train(), description="the training loop")
    cluster: Cluster = Field(default=Cluster(), description="what the run takes from the cluster")
    storage: str | None = Field(
        default=None, min_length=1, description="folder, network path or URL for checkpoints; null: under DAB_HOME"
    )
    tracking: Tracking = Field(default=Tracking(), description="where runs are recorded")
    search: Search | None = Field(default=None, description="what `dab submit --sweep` tries; null: nothing to search")

    @model_validator(mode="after")
    def _check(self) -> "Config":
        check_config(self)
        return self


def load_config(path: Path | None, overrides: Sequence[str] = ()) -> Config:
    """Return the validated configuration.

    Args:
        path: YAML file, or None to start from the defaults alone.
        overrides: `key=value` texts, `key` dotted and `value` YAML. Each is an assignment: it replaces what stood at
            that key, a whole section too, and a later one wins.

    Raises:
        InvalidInputError: The file is missing or no YAML mapping, a key is unknown, a value is of the wrong type or out
            of its limits, or values contradict each other.
    """
    raw = {} if path is None else read_mapping(path)
    for text in overrides:
        key, value = parse_override(text)
        assign(Config, raw, key, value)
    config = _validate(raw)
    try:
        check_written(config)
    except ValueError as error:
        raise InvalidInputError(str(error)) from None
    return config


def with_overrides(config: Config, values: Mapping[str, Any]) -> Config:
    """Return `config` with the dotted keys of `values` replaced, validated again.

    Raises:
        InvalidInputError: As for `load_config`.
    """
    raw = to_dict(config)
    for key, value in values.items():
        assign(Config, raw, key, value)
    return _validate(raw)


def resolve_paths(config: Config, base: Path | None = None) -> Config:
    """Return `config` with absolute folders and `data.val` filled in; URLs stay as they are.

    Args:
        config: The configuration as read.
        base: Folder that relative paths start from; None is the current directory.
    """
    start = Path.cwd() if base is None else base.absolute()
    train = _absolute(config.data.train, start)
    val = train if config.data.val is None else _absolute(config.data.val, start)
    storage = None if config.storage is None else _absolute(config.storage, start)
    return with_overrides(config, {"data.train": train, "data.val": val, "storage": storage})


def flatten(config: Config) -> dict[str, Scalar]:
    """Return dotted key -> value with one entry for each leaf, lists as JSON text, for a tracker's parameters."""
    flat: dict[str, Scalar] = {}
    _flatten_into(flat, "", to_dict(config))
    return flat


def to_dict(config: Config) -> dict[str, Any]:
    """Return `config` as plain JSON-able values; `Config.model_validate_json` of its JSON text is the inverse."""
    return config.model_dump(mode="json")


def to_yaml(config: Config) -> str:
    """Return `config` as YAML text that `load_config` reads back to an equal configuration."""
    return yaml.safe_dump(to_dict(config), sort_keys=False, allow_unicode=True)


def config_schema() -> dict[str, Any]:
    """Return the JSON schema of a configuration file, for editors and other programs."""
    return Config.model_json_schema()


def _validate(raw: Mapping[str, Any]) -> Config:
    try:
        # As JSON, because pydantic's strict rules for JSON are what a person means: a list where a tuple is declared
        # and 1 where 1.0 is, but never text where a number is.
        return Config.model_validate_json(json.dumps(raw, default=str))
    except ValidationError as error:
        raise invalid_config(Config, error) from None


def _absolute(location: str, start: Path) -> str:
    return location if "://" in location else str((start / Path(location).expanduser()).resolve())


def _flatten_into(flat: dict[str, Scalar], prefix: str, values: Mapping[str, Any]) -> None:
    for key, value in values.items():
        if isinstance(value, dict):
            _flatten_into(flat, f"{prefix}{key}.", value)
        else:
            flat[prefix + key] = json.dumps(value) if isinstance(value, list) else value
