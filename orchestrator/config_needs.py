"""Keys that are looked at only while another key has one of some values, such as `schedule.interval` with `decay`.

A configuration that sets such a key without need is refused (`orchestrator.config_rules`); a search draws it only for
the trials that look at it (`orchestrator.points`).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from orchestrator.config_errors import show

_WITH_WINDOW = ("clipped", "polynomial", "ede", None)  # null: what the model has, one of these
_WEIGHT_STE = ("binarize.ste", "binarize.ste_width", "binarize.ste_center")
_INPUT_STE = ("binarize.input_ste", "binarize.input_ste_width")
_OF_WORKERS = tuple(f"cluster.{key}" for key in ("placement", "interface", "labels", "start_timeout_s"))


@dataclass(frozen=True)
class Need:
    """Keys that are looked at only while another one, `selector`, is one of `wanted`, or none of `not_`."""

    selector: str
    keys: tuple[str, ...]
    wanted: tuple[str | None, ...] = ()
    not_: tuple[Any, ...] = ()

    def is_met(self, value: Any) -> bool:
        """Whether the keys are looked at while the selector has this value."""
        value = tuple(value) if isinstance(value, list) else value
        return value in self.wanted if self.wanted else value not in self.not_

    def problem(self, key: str, chosen: Any) -> str:
        """Return the line for a value of `key` that nothing looks at while the selector is `chosen`."""
        value = chosen if isinstance(chosen, str) else show(chosen)
        return f"{key}: has no effect with {self.selector}={value}. Remove it{self.instead}."

    @property
    def instead(self) -> str:
        """What else a message may propose than to remove the key."""
        return ", or use " + " or ".join(filter(None, self.wanted)) if self.wanted else ""


NEEDS = (
    Need("optim.name", ("optim.momentum", "optim.nesterov"), ("sgd",)),
    Need("schedule.name", ("schedule.interval",), ("decay",)),
    Need("schedule.name", ("schedule.level",), ("decay", "step")),
    Need("schedule.name", ("schedule.milestones",), ("step",)),
    Need("binarize.ste", _WEIGHT_STE[1:], _WITH_WINDOW),
    Need("binarize.input_ste", _INPUT_STE[1:], _WITH_WINDOW),
    Need("binarize.gradient", _WEIGHT_STE, ("straight_through", "means", None)),
    Need("binarize.layers", (*_WEIGHT_STE, "binarize.gradient"), not_=((),)),
    Need("binarize.inputs", (*_INPUT_STE, "binarize.input_quantizer"), not_=("none",)),
    Need("cluster.num_workers", _OF_WORKERS, not_=(0,)),
)


def is_looked_at(key: str, searched: Mapping[str, Any], values: Mapping[str, Any]) -> bool:
    """Whether a trial with `values` looks at `key`, as far as keys that are searched, too, decide it."""
    needs = [need for need in NEEDS if key in need.keys and need.selector in searched]
    return all(need.selector in values and need.is_met(values[need.selector]) for need in needs)
