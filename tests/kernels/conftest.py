"""Without a CUDA device the Triton kernels run under Triton's interpreter; they look for it when they are imported."""

import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture
def triton_device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"
