"""What is compiled once is there for the next process, and nothing older than its sources."""

import json
import subprocess
import sys
from pathlib import Path

import torch

from kernels import packed_conv2d, packed_conv2d_signs
from kernels.compiled import sources_version

ROOT = Path(__file__).parents[2]


def call_both_convolutions():
    bits = torch.zeros(1, 4, 5, 2, dtype=torch.int32)
    weight_bits = torch.zeros(40, 3, 3, 2, dtype=torch.int32)
    ones = torch.ones(40)
    packed_conv2d(bits, weight_bits, ones, ones, in_channels=33)
    packed_conv2d_signs(bits, weight_bits, ones, ones, None, ones, ones > 0, in_channels=33)


def cache_counts():
    """Returns how many functions of the convolution came from the cache on disk, and how many were compiled."""
    from kernels import conv_numba, conv_numba_loops

    found = [*vars(conv_numba).values(), *vars(conv_numba_loops).values()]
    statistics = {id(value): value.stats for value in found if hasattr(value, "stats")}.values()
    return {
        "hits": sum(sum(each.cache_hits.values()) for each in statistics),
        "misses": sum(sum(each.cache_misses.values()) for each in statistics),
    }


def test_a_second_process_compiles_nothing():
    call_both_convolutions()
    script = "import json, test_compiled as t; t.call_both_convolutions(); print(json.dumps(t.cache_counts()))"
    environment = {"PYTHONPATH": f"{ROOT}:{Path(__file__).parent}", "OMP_NUM_THREADS": "1"}
    run = subprocess.run(
        [sys.executable, "-W", "error", "-c", script], env=environment, capture_output=True, text=True, check=True
    )
    assert json.loads(run.stdout) == {"hits": 2, "misses": 0}


def test_an_edited_source_is_another_version(tmp_path):
    tile = tmp_path / "vector_tile.py"
    tile.write_text("first")
    before = sources_version(tmp_path)
    sources_version.cache_clear()
    assert sources_version(tmp_path) == before
    tile.write_text("second")
    sources_version.cache_clear()
    assert sources_version(tmp_path) != before
    sources_version.cache_clear()
