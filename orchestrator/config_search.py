"""The `search` section of a configuration: what `dab submit --sweep` tries; see `orchestrator.config`."""

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


class Domain(Section):
    """What one key may be in a search: exactly one of the four."""

    int_: Annotated[tuple[int, int], AS_LIST] | None = Field(
        default=None, alias="int", description="[lowest, highest], whole numbers, both included"
    )
    float_: Annotated[tuple[float, float], AS_LIST] | None = Field(
        default=None, alias="float", description="[lowest, highest], evenly"
    )
    log: Annotated[tuple[float, float], AS_LIST] | None = Field(
        default=None, description="[lowest, highest], evenly in its logarithm"
    )
    choice: Annotated[tuple[Scalar, ...], AS_LIST] | None = Field(default=None, description="the values to choose from")

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
