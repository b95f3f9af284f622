"""From the name of a run to what it left: its record, its folder, its best checkpoint."""

import os
from pathlib import Path

from dabnn.checkpoints import best_checkpoint
from dabnn.errors import InvalidInputError
from dabnn.run_folder import RunFolder
from orchestrator import tracking
from orchestrator.tracking import RunRecord

_SUFFIXES = (".safetensors", ".onnx", ".pt2")


def folder_of(record: RunRecord) -> RunFolder:
    """Return the run's folder.

    Raises:
        InvalidInputError: The run was not made by `dab submit`.
    """
    path = record.tags.get("dab.folder")
    if not path:
        raise InvalidInputError(f"{record.name}: this run was not made by `dab submit`; it has no tag dab.folder.")
    return RunFolder.of(path)


def check_no_file(target: str, instead: str) -> None:
    """Refuse what is named like a file, before a run of that name is looked for; call it where there is no such file.

    Names of runs hold no slash. They may hold a dot, as in `lr0.1`; what follows it like the ending of a file is one.

    Raises:
        InvalidInputError: It is named like a file; `instead` is what to give.
    """
    ending = Path(target).suffix
    if os.sep in target or ending[1:].isalpha() or ending.lower() in _SUFFIXES:
        raise InvalidInputError(f"{target}: no such file. Give {instead}; a run of such a name is found by its id.")


def best_run(uri: str, reference: str) -> RunRecord:
    """Return the run that `reference` names; for a sweep, the run of its best trial.

    Raises:
        InvalidInputError: There is no such run, or the sweep has no best trial yet.
    """
    record = tracking.find_run(uri, reference)
    if record.tags.get("dab.kind") != "sweep":
        return record
    best = record.tags.get("dab.best_run") or folder_of(record).result().get("best")
    if best is None:
        raise InvalidInputError(
            f"{record.name}: this sweep has no best trial yet. Wait for it to end, or name a trial."
        )
    return tracking.find_run(uri, best)


def checkpoint_of(uri: str, reference: str) -> str:
    """Return the path or URL of the best checkpoint of a run, or of the best trial of a sweep.

    Raises:
        InvalidInputError: There is no such run, or it has no checkpoint of its last stage yet.
    """
    return best_checkpoint(folder_of(best_run(uri, reference))).path
