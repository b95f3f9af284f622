"""`dab data`: builds and checks datasets, and says what it found as JSON and as text."""

from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

from dabnn.data import Manifest, Problem, build_dataset, check_dataset
from orchestrator.output import Table, View

OnProgress = Callable[[int, int], None]
_BYTES_PER_MB = 2**20


def build(source: str, dest: Path, *, layout: str, shard_mb: int, on_progress: OnProgress) -> View:
    """Build a dataset and return its splits and classes.

    Args:
        source: Folder of images, or `builtin:NAME`.
        dest: Folder for shards and manifest.
        layout: How the source is laid out, or `auto`.
        shard_mb: About how large a shard becomes, MiB.
        on_progress: Called as `on_progress(done, total)` with counts of images.

    Raises:
        DabError: As `dabnn.data.build_dataset`.
    """
    shard_bytes = shard_mb * _BYTES_PER_MB
    return _dataset_view(build_dataset(source, dest, format=layout, shard_bytes=shard_bytes, on_progress=on_progress))


def check(dest: Path, *, on_progress: OnProgress) -> tuple[bool, View]:
    """Return whether a dataset is what was built, and what is wrong with it.

    Args:
        dest: Folder of the dataset.
        on_progress: Called as `on_progress(done, total)` with counts of images.

    Raises:
        DabError: As `dabnn.data.check_dataset`.
    """
    problems = check_dataset(dest, on_progress=on_progress)
    return not problems, _problems_view(dest, problems)


def _dataset_view(manifest: Manifest) -> View:
    splits = {
        name: {"num_samples": split.num_samples, "num_shards": len(split.shards), "num_bytes": split.num_bytes}
        for name, split in manifest.splits.items()
    }
    records = [{"split": name, **sizes} for name, sizes in splits.items()]
    table = Table.of(records, ["split", "num_samples", "num_shards", "num_bytes"])
    return {"splits": splits, "classes": list(manifest.classes)}, f"{table}\n{len(manifest.classes)} classes"


def _problems_view(dest: Path, problems: Sequence[Problem]) -> View:
    records = [asdict(problem) for problem in problems]
    human = str(Table.of(records, ["shard", "kind", "detail"])) if records else f"{dest}: no problems"
    return {"ok": not records, "problems": records}, human
