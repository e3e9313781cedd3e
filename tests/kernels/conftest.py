"""Kernels against their PyTorch twins: on a GPU, or on a CPU in Triton's interpreter, in a process of its own.

`tests/test_kernels.py` starts that process; `pytest tests/kernels` on a GPU machine runs the same cases on the device.
"""

import os

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") != "1" and not torch.cuda.is_available():
    collect_ignore_glob = ["test_*.py"]


@pytest.fixture(autouse=True)
def _poison(poison):
    """Every output starts as NaN."""
