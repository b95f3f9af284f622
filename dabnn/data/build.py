"""Building a dataset: the images of a source become shards of mixed classes, indexes, statistics and a manifest.

A build is a list of tasks, one a shard, which run in this process, in several, or on a cluster; the same source gives
the same bytes whichever it is. Everything is written into `DEST/.building` and moved into place at the end, so a build
that fails leaves a dataset that was there before as it was, and one that was cut off goes on with the finished shards.
"""

import errno
import shutil
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

from dabnn.data.build_plan import BuildPlan, Listing, plan_build
from dabnn.data.encode import Encoding
from dabnn.data.manifest import MANIFEST_NAME, Manifest, Shard, Split, load_manifest, write_manifest
from dabnn.data.processes import LocalProcesses, RunTasks, available_cpus
from dabnn.data.shard_task import MAX_NAMED_FAILURES, ShardResult, ShardTask, finished, make_shard
from dabnn.data.shards import index_path
from dabnn.data.staging import STAGING_NAME, is_no_room, staging_folder
from dabnn.data.statistics import ImageStatistics
from dabnn.errors import DabError, InvalidInputError

DEFAULT_SHARD_BYTES = 64 * 2**20
_MIN_IMAGES_PER_PROCESS = 2000  # about a second's work, twice what a process takes to start


def build_dataset(
    source: str,
    dest: Path,
    *,
    format: str = "auto",  # noqa: A002 - the option is called --format
    val_fraction: float | None = None,
    seed: int = 0,
    split_lists: Path | None = None,
    shard_bytes: int = DEFAULT_SHARD_BYTES,
    encoding: Encoding | None = None,
    num_processes: int | None = 1,
    run_tasks: RunTasks | None = None,
    on_progress: Callable[[int, int], None] | None = None,
    say: Callable[[str], None] = lambda _: None,
) -> Manifest:
    """Builds WebDataset shards with a manifest; only manifest and indexes where the source is WebDataset shards.

    Args:
        source: A folder, an archive, or `builtin:digits`.
        dest: The dataset's folder: new, empty, or one built from the same source, which is then replaced.
        format: One of `dabnn.data.sources.FORMATS`.
        val_fraction: The share of each class that becomes `val`, where the source has no `val` of its own.
        seed: Another seed draws other images into `val`.
        split_lists: A folder with `train.txt` and `val.txt`, which name the images of each split.
        shard_bytes: About how large a shard becomes; smaller where there would be fewer than 8 of them.
        encoding: How images are changed before they are stored, from `make_encoding`; None: stored as they came.
        num_processes: Processes of this machine, as many as are useful with None. More than one is for programs whose
            main module is guarded by `if __name__ == "__main__"`.
        run_tasks: Runs the tasks instead, for instance on a cluster.
        on_progress: Called as `on_progress(done, total)` with counts of images.
        say: Told what a person should know about the source, and that an earlier build is continued.

    Returns:
        The manifest that was written.

    Raises:
        InvalidInputError: The source is not laid out as it must be, changes while it is read, holds images that do not
            decode (all are tried, and counted), or the destination holds something else.
        DabError: The destination cannot be written, has no room, or is being written by another build.
    """
    dest = Path(dest)
    plan = plan_build(Listing(source, format, val_fraction, seed, split_lists), shard_bytes, encoding)
    for note in plan.source.notes:
        say(note)
    if run_tasks is None:
        run_tasks = LocalProcesses(_useful_processes(num_processes, plan.num_images))
    try:
        _check_destination(dest, plan)
        with staging_folder(dest, plan.digest()) as staging:
            results = _run(plan, plan.tasks(staging), run_tasks, on_progress, say)
            _require_decodable(results, plan.num_images)
            plan.require_unchanged()
            manifest = _manifest(plan, results)
            _publish(manifest, staging, dest)
    except OSError as error:
        if is_no_room(error):
            needed = sum(plan.stored_bytes(records) for records in plan.source.splits.values())
            raise _no_room(dest, needed, str(error.strerror)) from error
        raise DabError(
            f"{dest}: cannot be written: {error}. Name a folder that you may write to, or ask for the permission"
        ) from error
    return manifest


def _useful_processes(wanted: int | None, num_images: int) -> int:
    if wanted is not None and wanted < 1:
        raise InvalidInputError(f"num_processes: {wanted}; at least 1 process has to do the work")
    return wanted or min(available_cpus(), -(-num_images // _MIN_IMAGES_PER_PROCESS))


def _check_destination(dest: Path, plan: BuildPlan) -> None:
    if dest.exists() and not dest.is_dir():
        raise InvalidInputError(f"{dest}: a file, not a folder; name a new folder for the dataset")
    if (dest / MANIFEST_NAME).exists():
        existing = load_manifest(dest).source
        if existing != plan.source.name:
            raise InvalidInputError(
                f"{dest}: holds a dataset built from {existing}, not from {plan.source.name}, and is not overwritten; "
                "name another folder, or delete this one first"
            )
    elif dest.is_dir() and any(dest.iterdir()) and not (dest / STAGING_NAME).exists():
        raise InvalidInputError(
            f"{dest}: not empty, and holds no dataset; name a new folder, so that none of your files is overwritten"
        )


def _run(
    plan: BuildPlan,
    tasks: Sequence[ShardTask],
    run_tasks: RunTasks,
    on_progress: Callable[[int, int], None] | None,
    say: Callable[[str], None],
) -> list[tuple[ShardTask, ShardResult]]:
    """Runs those tasks that no earlier build has done; returns all with their results, in order."""
    results = {task.number: result for task in tasks if (result := finished(task)) is not None}
    waiting = [task for task in tasks if task.number not in results]
    needed = sum(plan.stored_bytes(task.records) for task in waiting)
    if waiting and shutil.disk_usage(waiting[0].path.parent).free < needed:
        raise OSError(errno.ENOSPC, "the disk is too full to begin")
    done = plan.num_images - sum(len(task.records) for task in waiting)
    if results:
        say(f"going on with {len(results):,} of {len(tasks):,} shards from a build that was cut off")

    def tell(number: int) -> None:
        nonlocal done
        done += number
        if on_progress is not None:
            on_progress(done, plan.num_images)

    if done:
        tell(0)
    for result in run_tasks(make_shard, waiting, tell):
        results[result.number] = result
    return [(task, results[task.number]) for task in tasks]


def _require_decodable(results: Sequence[tuple[ShardTask, ShardResult]], total: int) -> None:
    num_failures = sum(result.num_failures for _, result in results)
    if not num_failures:
        return
    failures = [failure for _, result in results for failure in result.failures]
    named = "; ".join(failures[:MAX_NAMED_FAILURES])
    more = f"; and {num_failures - MAX_NAMED_FAILURES} more" if num_failures > MAX_NAMED_FAILURES else ""
    raise InvalidInputError(
        f"{named}{more}: {num_failures} of {total} images do not decode. Nothing was built, since a dataset that "
        "silently lacks images is not the one you measured on; repair or remove them and build again"
    )


def _manifest(plan: BuildPlan, results: Sequence[tuple[ShardTask, ShardResult]]) -> Manifest:
    statistics = ImageStatistics()
    shards: dict[str, list[Shard]] = {split: [] for split in plan.source.splits}
    labels: dict[str, Counter[int]] = {split: Counter() for split in plan.source.splits}
    for task, result in results:
        (statistics.merge if task.split == "train" else statistics.merge_sizes)(result.statistics)
        shards[task.split].append(result.shard)
        labels[task.split].update(dict(result.class_counts))
    splits = {
        split: Split.of(tuple(shards[split]), [labels[split][label] for label in range(len(plan.source.classes))])
        for split in plan.source.splits
    }
    return Manifest(
        plan.source.name,
        plan.source.classes,
        statistics.summary(),
        splits,
        source_digest=plan.source.digest,
        stored=None if plan.encoding is None else plan.encoding.stored(),
        source_options=plan.listing.options(),
    )


def _no_room(dest: Path, needed: int, reason: str) -> DabError:
    free = shutil.disk_usage(dest).free
    return DabError(
        f"{dest}: no room ({reason}): the dataset needs about {needed / 2**20:,.1f} MiB, {free / 2**20:,.1f} MiB are "
        "free. Everything that this build wrote was removed; a dataset that was there before is as it was. Free some "
        "space or name a folder on another disk"
    )


def _publish(manifest: Manifest, staging: Path, dest: Path) -> None:
    """Moves the finished files into place; until the manifest is written the folder holds no dataset."""
    if (dest / MANIFEST_NAME).exists():
        previous = load_manifest(dest)
        (dest / MANIFEST_NAME).unlink()
        for shard in (shard for split in previous.splits.values() for shard in split.shards):
            index_path(dest / shard.name).unlink(missing_ok=True)
            if shard.url is None:
                (dest / shard.name).unlink(missing_ok=True)
    for shard in (shard for split in manifest.splits.values() for shard in split.shards):
        index_path(staging / shard.name).replace(index_path(dest / shard.name))
        if shard.url is None:
            (staging / shard.name).replace(dest / shard.name)
    write_manifest(dest, manifest)
    shutil.rmtree(staging)
