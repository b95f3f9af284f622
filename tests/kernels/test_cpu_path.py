import logging

import pytest

from kernels.cpu_path import choose_cpu_path, cpu_path


@pytest.mark.parametrize(
    ("features", "name"),
    [
        ({"avx512f": True, "avx512vpopcntdq": True, "avx2": True}, "avx512"),
        ({"avx512f": True, "avx512vpopcntdq": False, "avx2": True}, "avx2"),
        ({"avx512f": False, "avx512vpopcntdq": True, "avx2": True}, "avx2"),
        ({"avx2": True}, "avx2"),
        ({"avx": True, "popcnt": True}, "popcount"),
        ({"neon": True, "sve": True}, "popcount"),
        ({}, "popcount"),
    ],
)
def test_the_features_decide_the_path(features, name):
    assert choose_cpu_path(features, has_numba=True).name == name


def test_without_numba_there_is_only_the_reference_and_the_reason_says_what_to_do():
    path = choose_cpu_path({"avx512f": True, "avx512vpopcntdq": True, "avx2": True}, has_numba=False)
    assert path.name == "reference"
    assert "install numba" in path.reason


def test_the_reason_names_what_the_processor_lacks():
    assert "avx512vpopcntdq" in choose_cpu_path({"avx512f": True, "avx2": True}, has_numba=True).reason
    assert "avx2" in choose_cpu_path({}, has_numba=True).reason


def test_the_path_is_logged_once(caplog):
    cpu_path.cache_clear()
    with caplog.at_level(logging.INFO, "kernels.cpu_path"):
        first = cpu_path()
        assert cpu_path() == first
    (message,) = [record.getMessage() for record in caplog.records if record.name == "kernels.cpu_path"]
    assert first.name in message
    assert first.reason in message
