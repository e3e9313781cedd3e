"""Whether Triton can run here, and how a kernel is launched. Importing this file needs no Triton."""

import functools
import importlib.util
import os
from typing import Any

import torch

__all__ = ["blocker", "has_triton", "interpreting", "launch", "numerics"]


@functools.cache
def has_triton() -> bool:
    """Whether Triton can be imported."""
    return importlib.util.find_spec("triton") is not None


@functools.cache
def interpreting() -> bool:
    """Whether Triton interprets its kernels in Python, which works without a GPU. Triton decides on its import."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes", "y")


def blocker(device: torch.device, dtype: torch.dtype | None = None) -> str:
    """Why Triton cannot run on a device for a type; empty where it can."""
    if not has_triton():
        return "Triton is not installed"
    if dtype not in (None, torch.float32, torch.bfloat16, torch.float16):
        return f"{dtype} has no kernels"
    if interpreting():
        return ""
    if device.type != "cuda" or torch.version.hip is not None:
        return f"the model is on {device.type}, not on an NVIDIA GPU"
    major, minor = _capability(device.index)
    if major < 7 or (major, minor) < (7, 5):
        return f"compute capability {major}.{minor} is below 7.5"
    if dtype == torch.bfloat16 and major < 8:
        return f"compute capability {major}.{minor} has no bfloat16"
    return ""


@functools.cache
def _capability(index: int | None) -> tuple[int, int]:
    return torch.cuda.get_device_capability(index)


def numerics(dtype: torch.dtype) -> dict[str, Any]:
    """How tiles of a type are multiplied.

    float32 keeps its full mantissa unless torch was told otherwise (`torch.set_float32_matmul_precision`, the
    Trainer's `tf32`), as in torch's own products; Triton's default would be TF32.
    """
    exact = torch.get_float32_matmul_precision() == "highest"
    return {
        "PRECISION": "ieee" if dtype == torch.float32 and exact else "tf32",
        "UPCAST": interpreting() and dtype == torch.bfloat16,
    }


def launch(kernel: Any, grid: tuple[int, ...], tensor: torch.Tensor, *args: Any, **options: Any) -> None:
    """Launch on the device that holds ``tensor``, whichever is current; an empty grid is nothing to do."""
    if 0 in grid:
        return
    with torch.cuda.device_of(tensor):
        kernel[grid](*args, **options)
