"""A sweep that goes on with other limits: more trials, more time. What its trials have in common stays as it was."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from dabnn.errors import InvalidInputError
from orchestrator.config import Config, flatten, to_dict, with_overrides
from orchestrator.config_errors import show
from orchestrator.config_source import parse_override
from orchestrator.job import Job

FREE = (
    "search.num_trials", "search.constraints", "search.max_concurrent", "search.max_minutes", "search.max_gpu_hours",
)  # fmt: skip


def extended(job: Job, changes: Sequence[str]) -> Job:
    """Return a sweep with changed limits.

    Args:
        job: The sweep.
        changes: As of `--set`; a number after `=+` is added to what there was: `search.num_trials=+20`.

    Raises:
        InvalidInputError: It is no sweep, or something else than a limit would change; says what.
    """
    if not changes:
        return job
    if job.kind != "sweep":
        raise InvalidInputError(
            f"--set: {job.name} is no sweep, and a run keeps its configuration. Submit a new run; train.init_from "
            "takes over the weights."
        )
    before = job.parsed_config()
    after = with_overrides(before, dict(_read(before, change) for change in changes))
    old, new = flatten(before), flatten(after)
    changed = [
        f"{key}: was {show(old.get(key))}, is {show(new.get(key))}"
        for key in dict.fromkeys([*old, *new])
        if old.get(key) != new.get(key) and key not in FREE
    ]
    if changed:
        lines = "\n".join(changed)
        raise InvalidInputError(
            f"{lines}\nThe trials so far were of the search as it was; only {', '.join(FREE)} may change. For another "
            f"search submit a new sweep with search.start_from={job.name}."
        )
    return replace(job, config=to_dict(after))


def _read(config: Config, change: str) -> tuple[str, Any]:
    key, value = parse_override(change)
    text = change.partition("=")[2].strip()
    if not text.startswith("+"):
        return key, value
    before = flatten(config).get(key)
    if any(isinstance(each, bool) or not isinstance(each, int | float) for each in (before, value)):
        raise InvalidInputError(f"--set: {change!r}: there is no number to add to. Write {key}=NUMBER.")
    return key, before + value
