"""Launching a kernel: binaries are found by what they were compiled for, on the device that holds the tensors.

Kernels and binaries are made up: what they would run is not the question.
"""

import importlib.metadata
import inspect
import sys
from types import SimpleNamespace

import pytest
import torch

from sparselora_hf.kernels import runtime
from sparselora_hf.kernels.runtime import launch


class Binary:
    """As Triton has it: what is run takes the grid, a stream, the function, its metadata, hooks and arguments."""

    function, packed_metadata = "function", (4, 1, 0)

    def __init__(self, kernel):
        self.kernel = kernel

    def run(self, x, y, z, stream, function, metadata, *rest):
        assert (stream, function, metadata, *rest[:3]) == ("stream", "function", (4, 1, 0), None, None, None)
        self.kernel.launched.append(((x, y, z), rest[3:]))


class Kernel:
    """As `triton.jit` has it: compiles, launches, and gives the binary back."""

    arg_names = ("x_ptr", "y_ptr", "T", "stride", "SCALED", "BLOCK")

    def __init__(self):
        self.compiled, self.launched = [], []

    def __getitem__(self, grid):
        return lambda *args, **options: self.compiled.append((grid, args, options)) or Binary(self)


@pytest.fixture
def kernel(monkeypatch):
    monkeypatch.setattr(runtime, "_compiled", {})
    monkeypatch.setattr(runtime, "_takes_constants", lambda: True)
    monkeypatch.setattr(runtime, "_stream_of", lambda: lambda device: "stream")
    monkeypatch.setattr(torch.cuda, "current_device", lambda: None)  # where CPU tensors are
    return Kernel()


def run(kernel, tokens=32, stride=64, scaled=True, warps=4, dtype=torch.float32, offset=0):
    x = torch.zeros(tokens * stride + offset, dtype=dtype)[offset:]
    launch(kernel, (3,), x, x, None, tokens, stride, SCALED=scaled, BLOCK=16, num_warps=warps)


def test_the_second_launch_goes_to_the_binary(kernel):
    run(kernel)
    run(kernel, tokens=48)
    assert len(kernel.compiled) == 1
    [(grid, args)] = kernel.launched
    assert grid == (3, 1, 1)
    assert args[1:] == (None, 48, 64, True, 16)
    x = torch.zeros(8)
    for _ in range(2):
        launch(kernel, (3,), x, x, x, 8, 8, SCALED=True, BLOCK=16)
    assert kernel.launched[-1][1][:2] == (x.data_ptr(), x.data_ptr())


def test_a_tensor_on_another_device_is_left_to_triton_to_refuse(kernel):
    run(kernel)
    launch(kernel, (3,), torch.zeros(64), torch.zeros(64, device="meta"), None, 32, 64, SCALED=True, BLOCK=16,
           num_warps=4)  # fmt: skip
    assert len(kernel.compiled) == 2


@pytest.mark.parametrize(
    "change",
    [
        {"tokens": 33},
        {"tokens": 1},
        {"stride": 65},
        {"scaled": False},
        {"warps": 8},
        {"dtype": torch.bfloat16},
        {"offset": 1},
    ],
)
def test_what_triton_compiles_anew_for(kernel, change):
    run(kernel)
    run(kernel, **change)
    assert len(kernel.compiled) == 2
    assert not kernel.launched


def test_more_than_32_bits_have_a_binary_of_their_own(kernel):
    x = torch.zeros(16)
    for count in (1 << 31, (1 << 31) - 16):
        launch(kernel, (1,), x, x, None, count, 16, SCALED=False, BLOCK=16)
    assert len(kernel.compiled) == 2


def test_triton_before_3_3_finds_its_binaries_itself(kernel, monkeypatch):
    monkeypatch.setattr(runtime, "_takes_constants", lambda: False)
    run(kernel)
    run(kernel)
    assert len(kernel.compiled) == 2
    assert not kernel.launched


def test_triton_is_asked_for_its_version_whatever_its_package_is_called(monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", SimpleNamespace(__version__="3.2.0+git0d4682f0"))
    monkeypatch.setattr(importlib.metadata, "version", lambda name: 1 / 0)
    assert not runtime._takes_constants.__wrapped__()
    sys.modules["triton"].__version__ = "3.3.1"
    assert runtime._takes_constants.__wrapped__()


def test_the_device_of_the_tensor_becomes_the_current_one(kernel, monkeypatch):
    entered = []

    class Device:
        def __init__(self, index):
            entered.append(index)

        def __enter__(self):
            return self

        def __exit__(self, *_):
            return None

    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(torch.cuda, "device", Device)
    run(kernel)
    assert entered == [None]
    assert len(kernel.compiled) == 1


def test_an_empty_grid_launches_nothing(kernel):
    launch(kernel, (0, 2), torch.zeros(4), torch.zeros(4), None, 0, 4, SCALED=False, BLOCK=16)
    assert not kernel.compiled


def test_a_launcher_that_takes_other_arguments_is_left_to_triton(kernel, monkeypatch):
    monkeypatch.setattr(runtime, "_stream_of", lambda: None)
    monkeypatch.setattr(Binary, "run", None)
    monkeypatch.setattr(
        Binary,
        "__getitem__",
        lambda self, grid: lambda *args: self.kernel.launched.append((grid, args)),
        raising=False,
    )
    run(kernel)
    run(kernel)
    assert kernel.launched[0][0] == (3, 1, 1)
    assert kernel.launched[0][1][1:] == (None, 32, 64, True, 16)


@pytest.mark.skipif(not runtime.has_triton() or not runtime._takes_constants(), reason="needs Triton 3.3")
def test_the_triton_at_hand_runs_binaries_as_known(monkeypatch):
    """What comes behind the function, Triton shows where it runs a binary itself."""
    from triton.compiler import CompiledKernel
    from triton.runtime import driver

    monkeypatch.setattr(driver, "_active", SimpleNamespace(get_current_stream=max), raising=False)
    assert runtime._stream_of.__wrapped__() is max
    passed = "stream, self.function, self.packed_metadata, launch_metadata"
    assert passed in inspect.getsource(CompiledKernel.__getitem__)
