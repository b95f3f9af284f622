"""Numba version of `kernels.conv`: a few windows by 32 filters at a time, counts in vector registers.

How filters and windows lie is in `conv_numba_layout`, the compiled loops in `conv_numba_loops`, a tile in
`vector_tile`. What a filter has to subtract at a border, its ones on the taps inside the image, is read from a table of
the few kinds of border. Filters lie side by side, so there is no sum across a vector.

Measured at batch 1 on one thread of an AMD EPYC with AVX-512, see benchmarks/results/packed_conv_cpu.json. What other
processors run is in `cpu_path`.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numba import types
from numpy.typing import NDArray
from torch import Tensor

from kernels.compiled import compiled
from kernels.conv_numba_layout import Filters, Scalars, arrange, last_word, lay_out
from kernels.conv_numba_loops import Numbers, Places, address, empty_images, prepare, run_task
from kernels.derived import derived
from kernels.team import next_task, runtime_address, team_of, team_size, worker_address
from kernels.vector_tile import tile_form

# Tasks a thread, so that the last one is not waited for.
_TASKS_PER_THREAD = 4
# Words of input and weight that meet, from where on a team is worth calling (2 cores, AMD EPYC).
_TEAM_WORDS = 2**20


def launch(
    bits: Tensor,
    weight_bits: Tensor,
    alpha: Tensor,
    beta: Tensor,
    bias: Tensor | None,
    in_channels: int,
    stride: Sequence[int],
    padding: Sequence[int],
    out: Tensor,
) -> None:
    """Writes the convolution into out.

    Args:
        bits: as in `kernels.conv.packed_conv2d`, and likewise all up to `padding`.
        weight_bits: see there.
        alpha: see there.
        beta: see there.
        bias: see there.
        in_channels: see there.
        stride: (vertical, horizontal).
        padding: (vertical, horizontal).
        out: (N, F, H', W') float32, overwritten; written without a copy where it is channels-last.
    """
    rows = out.permute(0, 2, 3, 1)
    target = rows if rows.is_contiguous() else rows.contiguous()
    launch_rows(bits, weight_bits, alpha, beta, bias, in_channels, stride, padding, target)
    if target is not rows:
        rows.copy_(target)


def launch_rows(
    bits: Tensor,
    weight_bits: Tensor,
    alpha: Tensor,
    beta: Tensor,
    bias: Tensor | None,
    in_channels: int,
    stride: Sequence[int],
    padding: Sequence[int],
    rows: Tensor,
) -> None:
    """Writes the convolution into rows (N, H', W', F) float32, contiguous; all else as in `launch`."""
    _launch(bits, weight_bits, (alpha, beta, bias), in_channels, _steps(stride, padding), rows.numpy())


def launch_signs(
    bits: Tensor,
    weight_bits: Tensor,
    alpha: Tensor,
    beta: Tensor,
    bias: Tensor | None,
    threshold: Tensor,
    falls: Tensor,
    in_channels: int,
    stride: Sequence[int],
    padding: Sequence[int],
    out: Tensor,
) -> None:
    """Writes the packed signs of the convolution into out.

    Args:
        bits: as in `kernels.conv.packed_conv2d_signs`, and likewise all up to `padding`.
        weight_bits: see there.
        alpha: see there.
        beta: see there.
        bias: see there.
        threshold: see there.
        falls: see there.
        in_channels: see there.
        stride: (vertical, horizontal).
        padding: (vertical, horizontal).
        out: (N, H', W', ceil(F / 32)) int32, contiguous, overwritten.
    """
    scalars = (alpha, beta, bias, threshold, falls)
    _launch(bits, weight_bits, scalars, in_channels, _steps(stride, padding), out.numpy().view(np.uint32))


def _steps(stride: Sequence[int], padding: Sequence[int]) -> tuple[int, int, int, int]:
    return stride[0], stride[1], padding[0], padding[1]


class _Plan(NamedTuple):
    """What a convolution needs beside its input: the filters as the tiles read them, and where the windows lie."""

    filters: Filters
    places: Places
    numbers: Numbers


def _plan(
    weight_bits: Tensor,
    scalars: Scalars,
    in_channels: int,
    shape: tuple[int, int, int],
    steps: tuple[int, int, int, int],
) -> _Plan:
    kernel, form = (weight_bits.shape[1], weight_bits.shape[2]), tile_form()
    place = lay_out(shape, kernel, steps, form)
    # Images of other sizes have the same kinds of border, so the same filters.
    tensors = [weight_bits, *(tensor for tensor in scalars if tensor is not None)]
    filters = derived(
        "conv_numba_filters",
        tensors,
        (in_channels, place.valid.tobytes(), scalars[2] is None),
        lambda: arrange(weight_bits, scalars, in_channels, place.valid, form),
    )
    places = (place.starts, place.kinds, place.places, place.rows, place.columns)
    return _Plan(filters, places, (in_channels, last_word(in_channels), *kernel, *steps, place.pair_step))


def _launch(
    bits: Tensor,
    weight_bits: Tensor,
    scalars: Scalars,
    in_channels: int,
    steps: tuple[int, int, int, int],
    out: NDArray[np.float32] | NDArray[np.uint32],
) -> None:
    if not out.size:
        return
    shape = (bits.shape[1], bits.shape[2], bits.shape[3])
    tensors = [weight_bits, *(tensor for tensor in scalars if tensor is not None)]
    key = (in_channels, shape, steps, scalars[2] is None)
    plan = derived("conv_numba", tensors, key, lambda: _plan(weight_bits, scalars, in_channels, shape, steps))
    words = bits.contiguous().numpy()
    num_threads = team_size()
    if num_threads == 1 or out.size // out.shape[3] * plan.filters[0].size < _TEAM_WORDS:
        _convolve(words, *plan, out)
        return
    chunks = -(-num_threads * _TASKS_PER_THREAD // (len(words) * len(plan.filters[0])))
    worker = worker_address(_work_on_values if out.dtype == np.float32 else _work_on_signs)
    _convolve_in_team(words, *plan, chunks, out, (runtime_address(), worker, num_threads))


@compiled
def _convolve(
    words: NDArray[np.int32],
    filters: Filters,
    places: Places,
    numbers: Numbers,
    out: NDArray[Any],
) -> None:
    bits, rows = words.view(np.uint32), out.reshape(len(words), -1, out.shape[3])
    images = empty_images(bits, places, numbers)
    for image in range(len(bits)):
        prepare(image, bits, images, places, numbers)
    for task in range(len(bits) * len(filters[0])):
        run_task(task, images, filters, places, 1, rows)


def _array(dtype: Any, num_dims: int) -> Any:
    return types.Array(dtype, num_dims, "C")


def _team_arguments(out: Any) -> list[Any]:
    """Returns the Numba types of what a thread of a team works on, in the order of `_work`."""
    of: Any = types.Tuple
    whole, words = _array(types.int64, 1), _array(types.uint32, 4)
    images = of([words, words, _array(types.float32, 2)])
    filters = of([words, _array(types.float32, 3), _array(types.int32, 2)])
    places = of([*[_array(types.int64, 2)] * 3, whole, whole])
    numbers = of([types.int64, types.uint32, *[types.int64] * 7])
    return [whole, words, images, filters, places, numbers, types.int64, _array(out, 3)]


_run_team, _value_arguments, _sign_arguments = team_of(_team_arguments(types.float32), _team_arguments(types.uint32))


@compiled
def _work(arguments: Any) -> None:
    """Prepares images, or without chunks convolves them, as long as there are any left."""
    counter, bits, images, filters, places, numbers, num_chunks, out = arguments
    num_tasks = len(bits) * (len(filters[0]) * num_chunks if num_chunks else 1)
    while True:
        task = next_task(address(counter))
        if task >= num_tasks:
            return
        if num_chunks:
            run_task(task, images, filters, places, num_chunks, out)
        else:
            prepare(task, bits, images, places, numbers)


def _work_on_values(data: Any) -> None:
    _work(_value_arguments(data))


def _work_on_signs(data: Any) -> None:
    _work(_sign_arguments(data))


@compiled
def _convolve_in_team(
    words: NDArray[np.int32],
    filters: Filters,
    places: Places,
    numbers: Numbers,
    num_chunks: int,
    out: NDArray[Any],
    team: tuple[int, int, int],
) -> None:
    bits, rows = words.view(np.uint32), out.reshape(len(words), -1, out.shape[3])
    images = empty_images(bits, places, numbers)
    runtime, worker, num_threads = team
    if len(bits) == 1:
        prepare(0, bits, images, places, numbers)
    else:
        _run_team(
            runtime, worker, num_threads, (np.zeros(1, np.int64), bits, images, filters, places, numbers, 0, rows)
        )
    counter = np.zeros(1, np.int64)
    _run_team(runtime, worker, num_threads, (counter, bits, images, filters, places, numbers, num_chunks, rows))
