"""What a stage of a run is: the run's configuration with the keys that the stage writes in place of its own."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from orchestrator.config import Config
    from orchestrator.config_sections import Stage

# The keys of binarize that say which weights are binary: a stage that writes one group replaces the other two.
_WEIGHT_CHOICES = (("bin_start", "bin_end"), ("layers",), ("plan",))


def overlaid(config: "Config", stage: "Stage") -> "Config":
    """Return what `stage` runs, without stages and search; nothing is validated."""
    written = {name: _written(getattr(stage, name)) for name in ("binarize", "optim", "schedule")}
    written["binarize"] = _replaced(written["binarize"]) | written["binarize"]
    sections = {name: getattr(config, name).model_copy(update=values) for name, values in written.items()}
    given: dict[str, Any] = {
        key: getattr(stage, key) for key in ("kurtosis", "distill") if key in stage.model_fields_set
    }
    if "label_smoothing" in stage.model_fields_set:
        given["label_smoothing"] = stage.label_smoothing or 0.0
    train = config.train.model_copy(update=given | {"epochs": stage.epochs, "stages": None})
    return config.model_copy(update=sections | {"train": train, "search": None})


def place(position: int, stage: "Stage") -> str:
    """Return what a message about stage number `position`, counted from 0, starts with."""
    return f"train.stages[{position}] ({stage.name}): "


def _written(section: Any) -> dict[str, Any]:
    return {} if section is None else {key: getattr(section, key) for key in section.model_fields_set}


def _replaced(binarize: dict[str, Any]) -> dict[str, Any]:
    """Return the keys of `binarize` whose place is taken by what a stage writes there, with what they become."""
    chosen = [group for group in _WEIGHT_CHOICES if any(key in binarize for key in group)]
    replaced: dict[str, Any] = dict.fromkeys(
        key for group in _WEIGHT_CHOICES if chosen and group not in chosen for key in group
    )
    return replaced | ({"inputs": "model"} if "plan" in binarize else {})
