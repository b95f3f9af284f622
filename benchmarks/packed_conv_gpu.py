"""The packed convolution beside cuDNN's bfloat16 convolution on the GPU, in one run; see `replays.py` for the timing.

    PYTHONPATH=. python benchmarks/packed_conv_gpu.py

`pack` is bfloat16 to bits, `packed_to_packed` bits to the next layer's bits, `packed_to_bf16` bits to bfloat16,
`bf16_to_bf16` packing and that in a row: the layer that takes the place of a float one. The peer `cudnn_bf16` runs
channels-last with cuDNN's autotuner on, without bias, and computes far more precisely. `share_of_peak` is the part of
the 8.4e15 1-bit operations a second that an H200 reaches in its best public measurement.

Three tables: the way that `kernels.gpu_path` takes; the portable ways beside the same peer, where float wins; and every
tile of the tensor-core kernel, from which `kernels.conv_fragments.choose_tile` may be chosen anew.
"""

from collections.abc import Callable
from typing import Any

import torch
from packed_conv import LAYERS, Case, make_case, record, refuse_if_wrong
from replays import median_us
from torch import Tensor
from torch.nn import functional as F

from kernels import conv_cuda, conv_dense_triton, conv_gluon, conv_triton, pack_signs, packed_conv2d_signs
from kernels.conv_fragments import Tile, choose_tile
from kernels.conv_layer import Filters, Geometry, geometry_of
from kernels.gpu_path import gpu_path

TURNS = 30
BATCHES = (1, 128)
PEAK_OPS_PER_S = 8.4e15
# Of the tiles that fill the device at each batch; every one is compiled twice.
TILES = {
    1: [Tile(4, 1, 1, 4), Tile(2, 1, 2, 2), Tile(2, 1, 1, 4), Tile(2, 1, 1, 8)],
    128: [Tile(4, 1, 4, 1), Tile(4, 1, 2, 1), Tile(4, 2, 4, 1), Tile(4, 2, 2, 1)],
}
Call = Callable[[Tensor], Any]


def signs_of(case: Case) -> tuple[Tensor, Tensor]:
    """Returns the thresholds of plain signs: 0, none of them falling."""
    return torch.zeros_like(case.alpha), torch.zeros_like(case.alpha, dtype=torch.bool)


def filters_of(case: Case, *, is_packed: bool) -> Filters:
    """Returns the layer's filters, with thresholds where results are packed."""
    return Filters(case.weight_bits, case.alpha, case.beta, None, *(signs_of(case) if is_packed else ()))


def geometry_of_case(case: Case, bits: Tensor) -> Geometry:
    """Returns the sizes of a 3x3 layer of stride 1 and padding 1."""
    return geometry_of(bits.shape, case.weight_bits.shape, case.x.shape[1], (1, 1), (1, 1))


def to_packed(case: Case, bits: Tensor, signs: tuple[Tensor, Tensor]) -> Tensor:
    """Returns the packed signs of the layer's output."""
    scalars = (case.weight_bits, case.alpha, case.beta, None, *signs)
    return packed_conv2d_signs(bits, *scalars, in_channels=case.x.shape[1])


def main_forms(case: Case) -> dict[str, tuple[Call, Tensor]]:
    """Returns what users call, and the peer."""
    bits, signs = pack_signs(case.x), signs_of(case)
    x, sign, dense = (t.bfloat16().to(memory_format=torch.channels_last) for t in (case.x, case.sign, case.dense))
    return {
        "pack": (pack_signs, x),
        "packed_to_packed": (lambda each: to_packed(case, each, signs), bits),
        "packed_to_bf16": (lambda each: case.packed(each, torch.bfloat16), bits),
        "bf16_to_bf16": (lambda each: case.packed(pack_signs(each), torch.bfloat16), x),
        "cudnn_bf16": (lambda each: F.conv2d(each, dense, padding=1), sign),
    }


def way_forms(case: Case) -> dict[str, tuple[Call, Tensor]]:
    """Returns the portable ways, whether or not they would be taken here."""
    bits = pack_signs(case.x)
    geometry = geometry_of_case(case, bits)
    masks = conv_dense_triton.masks(case.weight_bits, geometry)

    def dense(words: Tensor, filters: Filters, sizes: Geometry, out: Tensor) -> None:
        conv_dense_triton.launch(words, masks, filters, sizes, out)

    forms = {}
    for name, launch in (("popcount", conv_triton.launch_layer), ("dense", dense)):
        for is_packed, output in ((True, "packed"), (False, "bf16")):
            forms[f"{name}_to_{output}"] = (written_by(launch, case, bits, is_packed=is_packed), bits)
    return forms


def tile_forms(case: Case) -> dict[str, tuple[Call, Tensor]]:
    """Returns the tensor-core kernel with each tile."""
    bits = pack_signs(case.x)
    geometry = geometry_of_case(case, bits)
    forms = {}
    for tile in TILES[case.batch]:
        weights, ones, kinds = conv_cuda.arrange(case.weight_bits, geometry, tile)

        def launch(
            words: Tensor,
            filters: Filters,
            sizes: Geometry,
            out: Tensor,
            *,
            tile: Tile = tile,
            weights: Tensor = weights,
            counts: tuple[Tensor, Tensor] = (ones, kinds),
        ) -> None:
            conv_gluon.launch(words, weights, counts, filters, sizes, tile, out)

        for is_packed, output in ((True, "packed"), (False, "bf16")):
            forms[f"{label(tile)} to_{output}"] = (written_by(launch, case, bits, is_packed=is_packed), bits)
    return forms


def label(tile: Tile) -> str:
    """Returns size, steps, pixel warps and depth warps."""
    return f"{tile.size}.{tile.steps}.{tile.pixel_warps}.{tile.depth_warps}"


def written_by(launch: Callable[..., None], case: Case, bits: Tensor, *, is_packed: bool) -> Call:
    """Returns a call of one kernel, after a check of its result against the layer's."""
    filters, geometry = filters_of(case, is_packed=is_packed), geometry_of_case(case, bits)
    shape = (case.batch, geometry.out_height, geometry.out_width)
    last = geometry.out_words if is_packed else geometry.filters

    def call(each: Tensor) -> Tensor:
        out = each.new_empty((*shape, last), dtype=torch.int32 if is_packed else torch.bfloat16)
        launch(each, filters, geometry, out)
        return out

    values = case.packed(bits)
    expected = pack_signs(values) if is_packed else values.bfloat16().permute(0, 2, 3, 1)
    if not torch.equal(call(bits), expected):
        raise RuntimeError(f"{case.name}, batch {case.batch}: a kernel is wrong, so it is not timed")
    return call


def check(case: Case) -> None:
    """Raises RuntimeError unless values in both types and signs are right."""
    refuse_if_wrong(case)
    bits = pack_signs(case.x)
    values = case.packed(bits)
    is_right = torch.equal(to_packed(case, bits, signs_of(case)), pack_signs(values))
    if not is_right or not torch.equal(case.packed(bits, torch.bfloat16), values.bfloat16()):
        raise RuntimeError(
            f"{case.name}, batch {case.batch}: packed or bfloat16 results are wrong, so nothing is timed"
        )


def measure(case: Case) -> dict[str, Any]:
    """Returns one row of the first table."""
    check(case)
    times = median_us(main_forms(case), TURNS)
    peer = times["cudnn_bf16"]
    rate = 2 * case.num_macs / times["packed_to_packed"] * 1e6
    return {
        "layer": case.name,
        "batch": case.batch,
        **{f"{name}_us": value for name, value in times.items()},
        **{f"ratio_{name}": peer / times[name] for name in ("packed_to_packed", "packed_to_bf16", "bf16_to_bf16")},
        "share_of_peak": rate / PEAK_OPS_PER_S,
    }


def measure_ways(case: Case, peer_us: float) -> dict[str, Any]:
    """Returns one row of the second table."""
    times = median_us(way_forms(case), TURNS // 3)
    ratios = {f"ratio_{name}": peer_us / value for name, value in times.items()}
    return {"layer": case.name, "batch": case.batch, **{f"{name}_us": value for name, value in times.items()}, **ratios}


def measure_tiles(case: Case, num_processors: int) -> dict[str, Any]:
    """Returns one row of the third table, with the tile that is chosen."""
    times = median_us(tile_forms(case), TURNS // 3)
    geometry = geometry_of_case(case, pack_signs(case.x))
    chosen = choose_tile(geometry, case.batch * geometry.out_height * geometry.out_width, num_processors)
    row = {"layer": case.name, "batch": case.batch, "chosen": label(chosen)}
    return row | {f"{name}_us": value for name, value in times.items()}


def main() -> None:
    """Measures every layer and writes the records."""
    if not torch.cuda.is_available():
        raise SystemExit("packed_conv_gpu: torch sees no CUDA device, and without one there is nothing to measure.")
    torch.backends.cudnn.benchmark = True
    path = gpu_path("cuda")
    conditions = {"turns": TURNS, "figure": "median of graph replays", "path": path.name, "reason": path.reason}
    num_processors = torch.cuda.get_device_properties(0).multi_processor_count
    rows, ways = [], []
    tiles: dict[int, list[dict[str, Any]]] = {batch: [] for batch in BATCHES}
    for batch in BATCHES:
        for channels, size in LAYERS:
            case = make_case(channels, size, batch, "cuda")
            rows.append(measure(case))
            ways.append(measure_ways(case, rows[-1]["cudnn_bf16_us"]))
            if path.name == "tensor_core":
                tiles[batch].append(measure_tiles(case, num_processors))
            torch.cuda.empty_cache()
    record("packed_conv_gpu", rows, **conditions)
    record("packed_conv_gpu_ways", ways, **conditions)
    for batch, table in tiles.items():
        if table:
            record(f"packed_conv_gpu_tiles_batch{batch}", table, **conditions)


if __name__ == "__main__":
    main()
