"""Kernels against their PyTorch twins: on a GPU, or on a CPU in Triton's interpreter, in a process of its own.

`tests/test_kernels.py` starts that process; on a GPU machine `pytest tests/kernel_parity` runs the same cases on the
device. (A folder named kernels would be taken for the package that transformers looks for.)
"""

import os

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") != "1" and not torch.cuda.is_available():
    collect_ignore_glob = ["test_*.py"]


@pytest.fixture(autouse=True)
def _poison(poison, monkeypatch):
    """Every output starts as NaN."""
    strided = torch.empty_strided
    monkeypatch.setattr(torch, "empty_strided", lambda *a, **k: strided(*a, **k).fill_(float("nan")))
