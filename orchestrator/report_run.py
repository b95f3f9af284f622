"""The report of a run: how it learned, what its network confuses, and how its binary layers look.

Curves and instruments come from the run's folder; answers and filters from its best checkpoint. A run without one still
gets its curves. Leaves out how charts are drawn (`report_run_charts`).
"""

from collections.abc import Callable, Sequence
from typing import Any

from dabnn import deliver
from dabnn.answers import Answers, Mistake, answers, png_of
from dabnn.checkpoints import best_checkpoint
from dabnn.errors import InvalidInputError
from dabnn.filters import layer_histograms
from dabnn.run_folder import RunFolder, headline
from orchestrator.deliver import Trained, trained_of
from orchestrator.report_charts import Figure, measured, short
from orchestrator.report_page import Grid, Page, Tiles
from orchestrator.report_run_charts import confusion_matrix, filters, instruments, learning

OnBatch = Callable[[int, int], None]
_TILE_PIXELS = 112
_MAX_PAIRS = 20


def run_page(folder: RunFolder, on_batch: OnBatch | None = None) -> Page:
    """Return the report of a run.

    Args:
        folder: The run's folder.
        on_batch: Told how many validation images of how many were answered.

    Raises:
        InvalidInputError: The run has not finished an epoch yet, or its data cannot be read.
    """
    job, lines, result = folder.load_json("job.json"), folder.metrics(), folder.result()
    name = str(job.get("name", folder.root.name))
    if not lines:
        raise InvalidInputError(
            f"{name}: has not finished an epoch, so there is nothing to report. `dab status {name}` shows "
            "how far it is."
        )
    parts: list[Figure | Grid | Tiles | None] = [learning(lines)]
    facts, summary = _facts(job, result, lines), _summary(name, lines)
    tables: list[Grid] = [_epochs(lines)]
    if _has_checkpoint(folder):
        trained = trained_of(folder)
        classes = trained.classes
        found = _answers(trained, on_batch)
        facts["evaluated"] = f"the checkpoint of epoch {trained.epoch}, on {found.num_samples:,} validation images"
        summary += f" Its best checkpoint, of epoch {trained.epoch}, reaches {found.top1:.2f} % top-1."
        parts += [
            confusion_matrix(found, trained.classes),
            _pairs(found, trained.classes),
            _mistakes(found, trained.classes),
        ]
        parts += [instruments(lines), *filters(layer_histograms(trained.net))]
        tables.append(_confusion(found, classes))
    else:
        summary += " It has no checkpoint, so what its network answers is not shown."
        parts.append(instruments(lines))
    return Page(f"Run {name}", summary, facts, [part for part in parts if part is not None], tables)


def _has_checkpoint(folder: RunFolder) -> bool:
    try:
        best_checkpoint(folder)
    except InvalidInputError:
        return False
    return True


def _answers(trained: Trained, on_batch: OnBatch | None) -> Answers:
    from dabnn.data import load_manifest

    total = load_manifest(trained.val).split("val").num_samples
    spec, prepared = trained.net.spec, trained.normalization
    batches = deliver.val_batches(trained.val, spec, prepared, trained.batch_size, ten_crop=trained.ten_crop)
    return answers(
        trained.net,
        batches,
        spec.num_classes,
        mean=prepared.mean,
        std=prepared.std,
        on_batch=None if on_batch is None else lambda done: on_batch(done, total),
    )


def _summary(name: str, lines: Sequence[dict[str, Any]]) -> str:
    last = lines[-1]["metrics"]
    shown = [measured(metric, last[metric]) for metric in ("val_top1", "val_loss", "train_loss") if metric in last]
    return f"{name} after {len(lines)} epochs: {', '.join(shown)}."


def _facts(job: dict[str, Any], result: dict[str, Any], lines: Sequence[dict[str, Any]]) -> dict[str, object]:
    config = job.get("config") or {}
    model, binarize = config.get("model") or {}, config.get("binarize") or {}
    optim, schedule = config.get("optim") or {}, config.get("schedule") or {}
    seconds = sum(float(line["metrics"].get("epoch_s", 0)) for line in lines)
    facts = {
        "run": job.get("run_id"),
        "status": result.get("status", "running"),
        "model": f"{model.get('name')}, width {model.get('width', 1)}, {model.get('input_size')} pixels",
        "binary weights": f"{binarize.get('weights')}, layers {binarize.get('bin_start')} to {binarize.get('bin_end')}",
        "training": f"{optim.get('name')}, {schedule.get('name')} from {short(optim.get('max_lr'))}",
        "data": (config.get("data") or {}).get("train"),
        "trained for": f"{short(float(round(seconds)))} s" if seconds else None,
    }
    return {key: value for key, value in facts.items() if value is not None}


def _epochs(lines: Sequence[dict[str, Any]]) -> Grid:
    columns = list(dict.fromkeys(key for line in lines for key in headline(line["metrics"])))
    rows = [[line["step"], *(line["metrics"].get(column) for column in columns)] for line in lines]
    return Grid("epochs", "Epochs", "", ["epoch", *columns], rows)


def _confusion(found: Answers, classes: Sequence[str]) -> Grid:
    rows = [[classes[label], classes[answer], int(found.confusion[label, answer])] for label, answer in _cells(found)]
    return Grid("confusion", "Confusion matrix", "", ["class", "answer", "images"], rows)


def _pairs(found: Answers, classes: Sequence[str]) -> Grid | None:
    wrong = [pair for pair in _cells(found) if pair[0] != pair[1]]
    wrong.sort(key=lambda pair: -int(found.confusion[pair]))
    if not wrong:
        return None
    rows = []
    for label, answer in wrong[:_MAX_PAIRS]:
        count, total = int(found.confusion[label, answer]), int(found.confusion[label].sum())
        rows.append([classes[label], classes[answer], count, round(100 * count / total, 1)])
    columns = ["class", "taken for", "images", "% of the class"]
    text = "The pairs of classes that cost most images, the costliest first."
    return Grid("confused_pairs", "Most confused", text, columns, rows)


def _cells(found: Answers) -> list[tuple[int, int]]:
    return [(label, answer) for label, answer in found.confusion.nonzero().tolist()]


def _mistakes(found: Answers, classes: Sequence[str]) -> Tiles | None:
    if not found.worst:
        return None
    tiles = [(png_of(mistake.image, _TILE_PIXELS), _caption(mistake, classes)) for mistake in found.worst]
    text = (
        "The validation images with the greatest losses, as the network saw them: class, then the answer with its "
        "probability. Look here for wrong labels first."
    )
    return Tiles("mistakes", "Worst mistakes", text, tiles)


def _caption(mistake: Mistake, classes: Sequence[str]) -> str:
    answer = f"{classes[mistake.answer]} ({100 * mistake.probability:.0f} %)"
    return f"{classes[mistake.label]}, taken for {answer}; image {mistake.index}"
