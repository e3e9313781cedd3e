"""Whether Triton can run here, and how a kernel is launched. Importing this file needs no Triton."""

import functools
import importlib
import importlib.util
import inspect
import logging
import os
from typing import Any

import torch
from packaging import version

__all__ = ["blocker", "has_triton", "interpreting", "is_exact", "kernels_of", "launch", "numerics"]

logger = logging.getLogger(__name__)


@functools.cache
def has_triton() -> bool:
    """Whether Triton can be imported."""
    return importlib.util.find_spec("triton") is not None


@functools.cache
def kernels_of(file: str) -> Any:
    """A file of kernels, which takes Triton; an import statement would look for it anew at every call."""
    return importlib.import_module(f".{file}", __package__)


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
    if (major, minor) < (7, 5):
        return f"compute capability {major}.{minor} is below 7.5"
    if dtype == torch.bfloat16 and major < 8:
        return f"compute capability {major}.{minor} has no bfloat16"
    return _fault()


@functools.cache
def _fault() -> str:
    """Why Triton does not start: it compiles a module of its own, which takes a C compiler and Python's headers."""
    try:
        from triton.runtime import driver

        driver.active.get_current_target()
    except Exception as error:  # whatever it is, PyTorch needs none of it
        fault = f"Triton does not start ({error})"
        logger.warning(f"SparseLoRA goes without its kernels, which costs speed: {fault}.")
        return fault
    return ""


@functools.cache
def _capability(index: int | None) -> tuple[int, int]:
    return torch.cuda.get_device_capability(index)


def is_exact(dtype: torch.dtype) -> bool:
    """Whether products of a type keep the full mantissa of float32.

    float32 does unless torch was told otherwise (`torch.set_float32_matmul_precision`, the Trainer's `tf32`), as in
    torch's own products; Triton's default would be TF32.
    """
    if dtype != torch.float32:
        return False
    # since torch 2.9; there the question below is refused where this was set, as the Trainer does
    precision = getattr(torch.backends.cuda.matmul, "fp32_precision", None)
    return torch.get_float32_matmul_precision() == "highest" if precision is None else precision != "tf32"


def numerics(dtype: torch.dtype) -> dict[str, Any]:
    """How tiles of a type are multiplied."""
    return {
        "PRECISION": "ieee" if is_exact(dtype) else "tf32",
        "UPCAST": interpreting() and dtype == torch.bfloat16,
    }


_compiled: dict[tuple, tuple[Any, tuple]] = {}  # by what a binary depends on: the binary, and its constants


def launch(kernel: Any, grid: tuple[int, ...], tensor: torch.Tensor, *args: Any, **options: Any) -> None:
    """Launch on the device that holds ``tensor``, whichever is current; an empty grid is nothing to do.

    Args:
        kernel: a function of `triton.jit` that lives as long as the process, its constants last in its signature.
        grid: blocks along up to three dimensions.
        tensor: any of the kernel's.
        args: arguments that are no constants, in the order of the signature.
        options: constants, and options of the compiler.
    """
    if 0 in grid:
        return
    device = tensor.device.index
    if interpreting() or device == torch.cuda.current_device():
        _launch(kernel, grid, device, args, options)
        return
    with torch.cuda.device(device):
        _launch(kernel, grid, device, args, options)


def _launch(kernel: Any, grid: tuple[int, ...], device: int | None, args: tuple, options: dict[str, Any]) -> None:
    """Binaries that were made are launched directly: Triton's own way to find them takes several times as long.

    They are found by what Triton compiles a kernel anew for: types, alignment to 16 bytes, multiples of 16, 1, more
    than 32 bits. They get addresses, for a tensor the driver would be asked whether it is on a GPU, each time; and no
    hooks, which Triton calls around every launch where there are none, too.
    """
    key, values = [id(kernel), device, *options.values()], []
    for arg in args:
        if type(arg) is int:
            key.append(arg == 1 or (arg & 15 == 0, -2147483648 <= arg < 2147483648))
        elif isinstance(arg, torch.Tensor):
            key += (arg.dtype, arg.device)
            arg = arg.data_ptr()
            key.append(arg & 15 == 0)
        else:
            key.append(type(arg))
        values.append(arg)
    key = tuple(key)
    found = _compiled.get(key)
    if found is None:
        binary = kernel[grid](*args, **options)
        if binary is not None and _takes_constants():
            _compiled[key] = binary, tuple(options[name] for name in kernel.arg_names[len(args) :])
        return
    (binary, constants), stream_of = found, _stream_of()
    x, y, z = grid + (1,) * (3 - len(grid))
    if stream_of is None:
        binary[x, y, z](*values, *constants)
        return
    hooks = None, None, None  # what they are called with, at the start and at the end
    binary.run(x, y, z, stream_of(device), binary.function, binary.packed_metadata, *hooks, *values, *constants)


@functools.cache
def _stream_of() -> Any:
    """What gives the handle of a device's current stream; None where Triton's launcher is not the one known here."""
    from triton.backends.nvidia.driver import CudaLauncher
    from triton.runtime import driver

    first = list(inspect.signature(CudaLauncher.__call__).parameters)[1:6]
    is_known = first == ["gridX", "gridY", "gridZ", "stream", "function"]
    return driver.active.get_current_stream if is_known else None


@functools.cache
def _takes_constants() -> bool:
    """Whether a binary is launched with the constants among its arguments, as it is since Triton 3.3."""
    import triton  # its package has other names, too: `pytorch-triton`, `triton-windows`

    return version.parse(triton.__version__) >= version.parse("3.3")
