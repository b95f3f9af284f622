"""Without a CUDA device the Triton kernels run under Triton's interpreter; `tests/conftest.py` sees to that."""

import pytest
import torch


@pytest.fixture
def triton_device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"
