"""The `search` section of a configuration: what `dab submit --sweep` tries; see `orchestrator.config`."""

import re
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    ValidationError,
    ValidatorFunctionWrapHandler,
    WrapValidator,
    model_serializer,
    model_validator,
)

from orchestrator.config_rules import check_domain
from orchestrator.config_sections import AS_LIST, Section

Scalar = str | int | float | bool | None
Entry = int | str
Choice = Scalar | Annotated[tuple[Scalar, ...], AS_LIST] | dict[str, Annotated[tuple[Scalar, ...], AS_LIST]]

# Whether more or less is better of what a trial logs once an epoch, and of what is known of its network.
OF_EPOCH = {
    "val_top1": "max", "val_top5": "max", "val_loss": "min",
    "train_top1": "max", "train_top5": "max", "train_loss": "min", "images_per_s": "max",
}  # fmt: skip
OF_NETWORK = {"packed_bytes": "min", "bit_ops": "min", "latency_ms": "min"}
BETTER = OF_EPOCH | OF_NETWORK
_CONSTRAINT = re.compile(r"\s*(\S+?)\s*(<=|>=)\s*([-+]?[0-9][0-9_]*\.?[0-9]*(?:[eE][-+]?[0-9]+)?)\s*")


class Domain(Section):
    """What one key may be in a search: exactly one of the five."""

    int_: Annotated[tuple[int, int], AS_LIST] | None = Field(
        default=None, alias="int", description="[lowest, highest], whole numbers, both included"
    )
    float_: Annotated[tuple[float, float], AS_LIST] | None = Field(
        default=None, alias="float", description="[lowest, highest], evenly"
    )
    log: Annotated[tuple[float, float], AS_LIST] | None = Field(
        default=None, description="[lowest, highest], evenly in its logarithm"
    )
    choice: Annotated[tuple[Choice, ...], AS_LIST] | None = Field(default=None, description="the values to choose from")
    subset: Annotated[tuple[Entry, ...], AS_LIST] | None = Field(
        default=None, description="entries of a list of layers, each of which a trial has or has not"
    )

    @model_validator(mode="after")
    def _one_kind(self) -> "Domain":
        if len(self._given()) != 1:
            raise ValueError("one kind")
        return self

    @model_serializer
    def _serialize(self) -> dict[str, list[Any]]:
        return {self.kind: list(self.values)}

    @property
    def kind(self) -> str:
        """`int`, `float`, `log`, `choice` or `subset`."""
        return next(iter(self._given()))

    @property
    def values(self) -> tuple[Choice, ...]:
        """The two ends of a range, or the values of a choice, or the entries of a subset."""
        return self._given()[self.kind]

    @property
    def ends(self) -> tuple[float, float]:
        """The two ends of a range."""
        ends = self.int_ or self.float_ or self.log
        if ends is None:
            raise TypeError(f"a {self.kind} has no ends")
        return ends

    def _given(self) -> dict[str, tuple[Choice, ...]]:
        kinds: dict[str, tuple[Choice, ...] | None] = {
            "int": self.int_, "float": self.float_, "log": self.log, "choice": self.choice, "subset": self.subset
        }  # fmt: skip
        return {kind: values for kind, values in kinds.items() if values is not None}


def _domain_or_message(value: Any, handler: ValidatorFunctionWrapHandler) -> Any:
    try:
        return handler(value)
    except ValidationError:
        raise ValueError(
            "must be one of {int: [2, 4]}, {float: [0.1, 0.5]}, {log: [1e-4, 1e-2]}, {choice: [a, b]}, {subset: [2, 3]}"
        ) from None


class Objective(Section):
    """What a search improves."""

    metric: str = Field(
        default="val_top1",
        min_length=1,
        description="what a trial logs in its last epoch (val_top1, val_top5, val_loss, train_loss, ...; a layer's as "
        "conv2/NAME), packed_bytes, bit_ops (both of one image), or latency_ms, measured with the packed kernels",
    )
    mode: Literal["max", "min"] = Field(
        default="max", description="whether more or less of it is better; left out: as is usual for the metric"
    )

    @model_validator(mode="before")
    @classmethod
    def _usual_mode(cls, raw: Any) -> Any:
        if isinstance(raw, dict) and "mode" not in raw and raw.get("metric") in BETTER:
            return raw | {"mode": BETTER[raw["metric"]]}
        return raw


class Latency(Section):
    """Where and how latency_ms is measured."""

    device: Literal["cpu", "cuda"] = Field(
        default="cpu", description="of the node that the trial runs on; cuda for trials that have a GPU"
    )
    threads: int = Field(default=1, ge=1, description="on the CPU; with 1 other programs do not lengthen the figure")
    batch_size: int = Field(default=1, ge=1, description="images at once")


@dataclass(frozen=True)
class Constraint:
    """What a trial must satisfy to be the best, or on the front.

    Attributes:
        metric: As of an objective.
        is_upper: Whether the limit is the most, not the least, that is allowed.
        limit: In the unit of the metric.
    """

    metric: str
    is_upper: bool
    limit: float

    def excess(self, value: float) -> float:
        """Return by how much `value` breaks the constraint, as a share of the limit; 0 or less when it does not."""
        beyond = value - self.limit if self.is_upper else self.limit - value
        return beyond / (abs(self.limit) or 1.0)


def parse_constraint(text: str) -> Constraint:
    """Return the constraint that a text such as `packed_bytes <= 300_000` says.

    Raises:
        ValueError: It says none.
    """
    match = _CONSTRAINT.fullmatch(text)
    if match is None:
        raise ValueError("must be a metric, <= or >=, and a number, such as packed_bytes <= 300_000")
    metric, sign, limit = match.groups()
    return Constraint(metric, sign == "<=", float(limit))


def _check_constraint(text: str) -> str:
    parse_constraint(text)
    return text


class Search(Section):
    """What `dab submit --sweep` tries."""

    preset: Literal["reference", "quick"] | None = Field(
        default=None,
        description="a ready space, replaced by what it stands for: reference (range of binary layers, every schedule "
        "with its own keys, learning rate) or quick (range and rate, 8 short trials); entries of space replace its "
        "own, null removes one",
    )
    num_trials: int = Field(default=20, ge=1, description="trials; a grid ends earlier when it has no more points")
    space: dict[str, Annotated[Domain, WrapValidator(_domain_or_message), AfterValidator(check_domain)]] = Field(
        default={}, min_length=1, description="dotted configuration key -> what it may be"
    )
    objectives: Annotated[tuple[Objective, ...], AS_LIST] = Field(
        default=(Objective(),), min_length=1, description="one, or several for a Pareto front"
    )
    constraints: Annotated[tuple[Annotated[str, AfterValidator(_check_constraint)], ...], AS_LIST] = Field(
        default=(),
        description="what the best trials must satisfy, such as packed_bytes <= 300_000; a point whose network "
        "breaks one (packed_bytes, bit_ops) is not trained",
    )
    algorithm: Literal["tpe", "random", "grid", "nsga2", "gp", "cmaes"] = Field(
        default="tpe",
        description="how the next trial is chosen: tpe and gp (Gaussian process) learn from those before; nsga2 is for "
        "several objectives and many trials; cmaes is for ranges of numbers alone",
    )
    start_from: str | None = Field(
        default=None,
        min_length=1,
        description="sweep whose best points, or run whose values and plan of `dab sensitivity`, are tried first",
    )
    early_stop: Annotated[
        Literal["asha", "median"] | None, BeforeValidator(lambda value: None if value == "none" else value)
    ] = Field(
        default="asha",
        description="asha or median end trials that fall behind in the first objective that is logged each epoch; none "
        "or null lets each one finish, and is what several objectives have unless it is written",
    )
    grace_epochs: int | None = Field(
        default=None,
        ge=1,
        description="epochs before a trial can be ended; null: a quarter of its epochs, at least 3, as binary networks "
        "improve late",
    )
    reduction: int = Field(default=2, ge=2, description="asha goes on with one of so many trials at each judgement")
    latency: Latency = Field(default_factory=Latency, description="where latency_ms is measured")
    epochs: int | None = Field(default=None, ge=1, description="epochs of one trial; null: train.epochs")
    max_concurrent: int | None = Field(default=None, ge=1, description="trials at a time; null: as many as fit")
    register_best: bool = Field(
        default=True,
        description="whether the best trial, or up to 20 of the front, become versions in MLflow's model registry",
    )
    max_minutes: float | None = Field(
        default=None, gt=0, description="minutes after which no further trial starts; null: no limit"
    )
    max_gpu_hours: float | None = Field(
        default=None, gt=0, description="GPU-hours of all trials after which no further one starts; null: no limit"
    )

    @model_validator(mode="before")
    @classmethod
    def _finish_for_a_front(cls, raw: Any) -> Any:
        """Early stopping judges by one objective, and would end what is good at the others."""
        objectives = raw.get("objectives") if isinstance(raw, dict) else None
        if isinstance(objectives, list | tuple) and len(objectives) > 1 and "early_stop" not in raw:
            return raw | {"early_stop": None}
        return raw

    @property
    def limits(self) -> tuple[Constraint, ...]:
        """The constraints, read."""
        return tuple(parse_constraint(text) for text in self.constraints)
