"""The table that sends an operation to Triton, to slices with cuBLAS or to PyTorch. Devices are made up."""

import json
import os

import pytest
import torch
from helpers import assert_ends

from sparselora_hf.kernels import choice, runtime
from sparselora_hf.kernels.choice import OPERATIONS, Choice, choose, shape_key, write_table
from sparselora_hf.kernels.runtime import blocker, is_exact, numerics
from sparselora_hf.kernels.tiles import MAX_WIDTH, TILES, chip_of, rotary_tile, row_tile, tile_for


class OnGpu:
    """What `choose` reads of a tensor on a GPU."""

    is_cuda = True

    def __init__(self, dtype=torch.bfloat16, tokens=4096):
        self.device, self.dtype, self.tokens = torch.device("cuda", 0), dtype, tokens

    def __len__(self):
        return self.tokens


@pytest.fixture
def gpu(monkeypatch):
    """A machine with a GPU of some compute capability, and tables of its own."""

    def make(capability):
        monkeypatch.setattr("sparselora_hf.kernels.runtime._capability", lambda index: capability)
        monkeypatch.setattr("sparselora_hf.kernels.runtime._fault", lambda: "")
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
        choice._choose.cache_clear()
        choice._measured.cache_clear()

    yield make
    choice._choose.cache_clear()
    choice._measured.cache_clear()


@pytest.mark.parametrize("op", OPERATIONS)
def test_a_cpu_goes_the_pytorch_way(op):
    assert not choose(op, torch.zeros(3, 4), 4, 2)
    assert not choose(op, torch.zeros(3, 4), 4, 2, "triton")


@pytest.mark.parametrize(
    ("capability", "dtype", "ways"),
    [
        ((9, 0), torch.bfloat16, {"rows": "torch", "columns": "torch", "mlp": "slices", "estimator": "triton"}),
        ((9, 0), torch.float32, {"rows": "torch", "columns": "torch", "mlp": "slices", "estimator": "torch"}),
        ((9, 0), torch.float32, {"norm": "triton", "rotary": "triton"}),
        ((8, 6), torch.float16, {"rows": "torch", "mlp": "slices", "norm": "triton"}),
        ((7, 5), torch.float16, {"rows": "torch", "mlp": "slices", "nf4": "triton", "norm": "triton"}),
        ((7, 5), torch.float32, {"activation": "triton"}),
        ((7, 5), torch.bfloat16, dict.fromkeys(OPERATIONS, "torch")),
        ((7, 0), torch.float16, dict.fromkeys(OPERATIONS, "torch")),
        ((9, 0), torch.float64, dict.fromkeys(OPERATIONS, "torch")),
        ((13, 0), torch.bfloat16, {"estimator": "triton"}),
    ],
    ids=str,
)
def test_reasons(gpu, capability, dtype, ways):
    gpu(capability)
    assert {op: choose(op, OnGpu(dtype), 4096, 1024).way for op in ways} == ways


def test_the_configuration_overrules(gpu):
    gpu((9, 0))
    assert choose("rows", OnGpu(), 4096, 1024, "torch") == Choice("torch")
    assert choose("mlp", OnGpu(), 4096, 1024, "triton") == Choice("triton")
    assert choose("rows", OnGpu(), 4096, 1024, Choice("slices", 2)) == Choice("slices", 2)
    assert {choose(op, OnGpu(), 4096, 1024, "triton").way for op in OPERATIONS} == {"triton"}


def test_what_was_measured_wins_for_its_shape(gpu):
    gpu((9, 0))
    assert not choose("rows", OnGpu(tokens=3000), 4096, 1024)
    key = shape_key("rows", torch.bfloat16, 3000, 4096, 1024)
    assert key == "rows/bfloat16/4096x4096x1024"
    path = write_table({"sm_90": {key: ["triton", 1]}, "sm_80": {key: ["slices", 0]}})
    write_table({"sm_90": {"mlp/bfloat16/4096x4096x144": ["triton", 1]}})
    assert len(json.loads(path.read_text())["sm_90"]) == 2
    assert choose("rows", OnGpu(tokens=3000), 4096, 1024) == Choice("triton", 1, measured=True)
    assert choose("mlp", OnGpu(tokens=4096), 4096, 144) == Choice("triton", 1, measured=True)
    assert choose("rows", OnGpu(tokens=3000), 4096, 512) == Choice("torch")
    assert choose("rows", OnGpu(tokens=2), 4096, 1024, tokens=3000) == Choice("triton", 1, measured=True)
    gpu((8, 0))
    assert choose("rows", OnGpu(tokens=3000), 4096, 1024) == Choice("slices", 0, measured=True)


def test_a_damaged_table_costs_no_run(gpu, tmp_path):
    gpu((9, 0))
    choice.machine_table().parent.mkdir(parents=True, exist_ok=True)
    choice.machine_table().write_text("{ half")
    assert choose("norm", OnGpu(), 4096, 1024) == Choice("triton")


def test_a_pipe_or_folder_in_place_of_the_table_costs_no_run(gpu):
    gpu((9, 0))
    table = choice.machine_table()
    table.mkdir(parents=True)
    assert choose("norm", OnGpu(), 4096, 1024) == Choice("triton")
    table.rmdir()
    os.mkfifo(table)
    choice._measured.cache_clear()
    choice._choose.cache_clear()
    assert_ends(choose, "norm", OnGpu(), 4096, 1024)


def test_reasons_for_not_running(gpu, monkeypatch):
    gpu((7, 5))
    device = torch.device("cuda", 0)
    assert blocker(device, torch.float16) == ""
    assert "no bfloat16" in blocker(device, torch.bfloat16)
    assert "float64" in blocker(device, torch.float64)
    assert "on cpu" in blocker(torch.device("cpu"))
    with monkeypatch.context() as patch:
        patch.setattr(torch.version, "hip", "6.0")
        assert "not on an NVIDIA GPU" in blocker(device, torch.float16)
    monkeypatch.setattr("sparselora_hf.kernels.runtime.has_triton", lambda: False)
    assert blocker(device) == "Triton is not installed"


class Driver:
    """Triton's, with or without what it takes to compile itself."""

    def __init__(self, starts):
        self.active, self.starts = self, starts

    def get_current_target(self):
        if not self.starts:
            raise RuntimeError("Failed to find C compiler.")


@pytest.mark.parametrize("starts", [True, False])
def test_no_kernels_where_triton_does_not_start(gpu, monkeypatch, caplog, starts):
    pytest.importorskip("triton", reason="Triton is there on Linux only")
    fault = runtime._fault.__wrapped__
    gpu((9, 0))
    monkeypatch.setattr("triton.runtime.driver", Driver(starts))
    monkeypatch.setattr(runtime, "_fault", fault)
    assert bool(choose("norm", OnGpu(), 4096, 4096)) is starts
    assert ("Failed to find C compiler" in blocker(torch.device("cuda", 0))) is not starts
    assert ("goes without its kernels" in caplog.text) is not starts


def test_float32_keeps_its_mantissa_unless_torch_was_told_otherwise():
    assert numerics(torch.float32)["PRECISION"] == "ieee"
    torch.set_float32_matmul_precision("high")
    try:
        assert numerics(torch.float32)["PRECISION"] == "tf32"
    finally:
        torch.set_float32_matmul_precision("highest")


@pytest.mark.skipif(not hasattr(torch.backends, "fp32_precision"), reason="torch before 2.9")
def test_the_newer_setting_that_the_trainer_uses():
    """`tf32=True` sets it for all backends, and behind it torch refuses to be asked in the older way."""
    matmul = torch.backends.cuda.matmul
    before, matmul.fp32_precision = matmul.fp32_precision, "tf32"
    try:
        assert not is_exact(torch.float32)
        assert numerics(torch.bfloat16)["PRECISION"] == numerics(torch.float32)["PRECISION"] == "tf32"
        assert tile_for("mlp_in", torch.zeros(1)) == TILES["mlp_in"]["large"][0]
    finally:
        matmul.fp32_precision = before
    assert is_exact(torch.float32)
    assert not is_exact(torch.float16)


@pytest.mark.parametrize("op", TILES)
def test_a_tile_for_everything(op):
    assert tile_for(op, torch.zeros(1)) == TILES[op]["fma"][0]
    assert tile_for(op, torch.zeros(1, dtype=torch.bfloat16), 99) == TILES[op]["large"][-1]
    assert chip_of((9, 5)) is chip_of((9, 0))
    assert chip_of((5, 0)) is chip_of((7, 5))


@pytest.mark.parametrize("width", [1, 6, 64, 100, 2048, 3072, 4096, 5120, 8192, MAX_WIDTH])
def test_a_block_holds_rows_whole(width):
    tile = row_tile(width)
    assert width <= tile.n < 2 * width
    assert tile.n.bit_count() == tile.m.bit_count() == tile.warps.bit_count() == 1
    assert tile.m * tile.n == max(2048, tile.n)
    assert tile.m * tile.n // (32 * tile.warps) in (16, 32)
    assert tile.warps <= 16


@pytest.mark.parametrize("half", [1, 5, 32, 40, 64, 128, 256])
@pytest.mark.parametrize("heads", [1, 6, 14, 32, 71, 128])
def test_a_block_turns_heads_whole(heads, half):
    tile = rotary_tile(heads, half)
    assert half <= tile.n < 2 * half
    assert tile.n.bit_count() == tile.m.bit_count() == tile.warps.bit_count() == 1
    assert tile.m * tile.n == 2048 or (tile.m * tile.n < 2048 and heads <= tile.m < 2 * heads)
    assert tile.m * tile.n // (32 * tile.warps) == 16 or tile.warps == 1
