"""`dab bench`: a packed file, a run or a model of the zoo beside its float peer, on this machine."""

from dataclasses import asdict
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from dabnn import bench as benches
from dabnn.bench import BenchResult, FormResult, OnProgress
from dabnn.bench_layers import LayerResult
from dabnn.bench_networks import random_network
from dabnn.bench_place import make_place
from dabnn.convert import form_of
from dabnn.deliver import load_trained
from dabnn.errors import InvalidInputError
from dabnn.models import names
from dabnn.models.zoo import find
from dabnn.packed import PackedModel, load_packed, pack
from orchestrator.commands import Say, tracking_uri
from orchestrator.found_runs import check_no_file, checkpoint_of
from orchestrator.home import home_path
from orchestrator.output import Report, Table, View
from orchestrator.sent_runs import tracker_of
from orchestrator.tracking_server import tracking_status

_LOSING = "yellow"


def bench(
    uri: str | None,
    target: str,
    *,
    batch: int,
    threads: int | None,
    device: str,
    dtype: str,
    turns: int | None,
    input_size: int | None,
    on_progress: OnProgress,
    say: Say,
) -> View:
    """Measure a packed model beside its float peer.

    Args:
        uri: The tracking store, for a run.
        target: A packed file, a model of the zoo, which gets random weights, or a run; looked for in this order.
        batch: Images at once.
        threads: Of torch and the packed kernels; None as torch is set.
        device: cpu or cuda.
        dtype: Of the float layers.
        turns: Rounds; None for as many as fit into half a minute.
        input_size: Side of the images of a model of the zoo; None is the family's.
        on_progress: Told what is done.
        say: Told what is waited for.

    Raises:
        InvalidInputError: The target does not exist, or cannot be measured as asked.
        DabError: The packed form disagrees with its float twin; nothing was timed.
    """
    place = make_place(batch, threads, device, dtype)
    source, packed = find_packed(uri, target, input_size, say)
    found = benches.bench(packed, place, turns=turns, on_progress=on_progress)
    return _document(found) | {"target": target, "source": source}, _report(found)


def find_packed(uri: str | None, target: str, input_size: int | None, say: Say) -> tuple[str, PackedModel]:
    """Return what `target` is (file, model or run) and its packed model.

    Raises:
        InvalidInputError: It is none of them, or was made for images of another size.
    """
    if Path(target).is_file():
        source, packed = "file", _from_file(target)
    elif target in names():
        family, _ = find(target)
        return "model", pack(random_network(target, num_classes=family.num_classes, input_size=input_size))
    else:
        check_no_file(target, "a packed file, a model of `dab models`, or a run")
        _check_no_model(target, uri)
        source, packed = "run", pack(load_trained(checkpoint_of(tracking_uri(uri, say), target)))
    if input_size not in (None, packed.spec.input_size):
        raise InvalidInputError(
            f"--input-size: {target} was made for images of {packed.spec.input_size} pixels, not {input_size}. Leave "
            "it out, or name a model of `dab models`."
        )
    return source, packed


def _from_file(target: str) -> PackedModel:
    form = form_of(Path(target))
    if form != "packed":
        raise InvalidInputError(
            f"{target}: a file of the form {form}, and only packed models are measured, beside the float network that "
            "they stand for. Give the packed file, which `dab export RUN -o model.safetensors` writes."
        )
    return load_packed(target)


def _check_no_model(target: str, uri: str | None) -> None:
    """Refuse what reads like the name of a model where no tracker runs that could know a run of that name."""
    near = get_close_matches(target, names(), n=1)
    if not near or uri is not None or tracker_of(target) is not None:
        return
    if not home_path().is_dir() or tracking_status().state == "stopped":
        raise InvalidInputError(
            f"{target}: no model of `dab models`; did you mean {near[0]}? If it is a run, start the experiment "
            "tracker, which knows the names of runs, with `dab ui` first."
        )


def _document(found: BenchResult) -> dict[str, Any]:
    data: dict[str, Any] = asdict(found)
    place: dict[str, Any] = data.pop("place")
    return place | {"packed": data.pop("packed_form"), "float": data.pop("float_form")} | data


def _report(found: BenchResult) -> Report:
    place = found.place
    conditions = (
        f"{found.model}, images {'x'.join(map(str, found.input_shape))}, batch {place.batch}, {place.dtype}, "
        f"{place.threads} thread{'s' if place.threads > 1 else ''} of {found.machine.gpu or found.machine.cpu}"
    )
    losing = [row.path for row in found.layers if row.speedup < 1]
    share = (
        f"ordinary numbers (real layers, BN, pooling) take {100 * found.float_share:.0f} % of the packed form's time"
    )
    losses = f"float is faster in {len(losing)} of {len(found.layers)} layers"
    notes = [
        f"{found.num_checked} layers with binary weights equal their float twin; medians of {found.turns} turns",
        "gain: float over packed, for images/s packed over float; float wins below 1",
        "each layer with what follows it, alone on its own recorded inputs: their sum is not quite the whole",
        f"{share}; no kernel for binary layers makes that shorter",
        losses + (f": {', '.join(losing)}" if losing else ""),
    ]
    return Report([conditions, "", _whole_table(found), "", _layer_table(found), "", *notes])


def _whole_table(found: BenchResult) -> Table:
    packed, real = found.packed_form, found.float_form
    rows: list[list[object]] = [
        ["latency, median (ms)", packed.median_ms, real.median_ms, real.median_ms / packed.median_ms],
        ["latency, best (ms)", packed.best_ms, real.best_ms, real.best_ms / packed.best_ms],
        ["images/s", packed.images_per_s, real.images_per_s, packed.images_per_s / real.images_per_s],
        _bytes_row("peak memory of the model (MB)", _added(packed), _added(real)),
        _bytes_row("with python, torch and kernels (MB)", packed.peak_bytes, real.peak_bytes),
        _bytes_row("file (MB)", packed.file_bytes, real.file_bytes),
        ["first answer (s)", packed.first_answer_s, real.first_answer_s,
         real.first_answer_s / packed.first_answer_s],
    ]  # fmt: skip
    return Table(["", "packed", "float", "gain"], rows, [_style(row[3]) for row in rows])


def _layer_table(found: BenchResult) -> Table:
    total = sum(row.packed_ms for row in found.layers)
    rows = [_layer_row(row, total) for row in found.layers]
    rest = ["whole less layers", "", None, found.rest_packed_ms, found.rest_float_ms, None, None]
    columns = ["layer", "kind", "M MACs", "packed ms", "float ms", "gain", "share %"]
    return Table(columns, [*rows, rest], [_style(row[5]) for row in rows])


def _layer_row(row: LayerResult, total_ms: float) -> list[object]:
    share = round(100 * row.packed_ms / total_ms, 1)
    return [row.path, row.kind, row.macs / 1e6 if row.macs else None, row.packed_ms, row.float_ms, row.speedup, share]


def _bytes_row(name: str, packed: int, real: int) -> list[object]:
    return [name, packed / 1e6, real / 1e6, real / packed]


def _added(form: FormResult) -> int:
    return max(form.peak_bytes - form.base_bytes, 1)


def _style(gain: object) -> str:
    return _LOSING if isinstance(gain, float) and gain < 1 else ""
