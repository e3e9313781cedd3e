"""Rows, columns and the whole of a bitsandbytes weight, bit by bit against bitsandbytes' own dequantisation."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from sparselora_hf.channels import HeadLayout
from sparselora_hf.ops.linear import compute_dtype, gathered_columns, gathered_rows
from sparselora_hf.ops.mlp import MlpWeights
from sparselora_hf.ops.quant import (
    QuantisedRows,
    Weight4bit,
    Weight8bit,
    frozen_weight,
    read_columns,
    read_rows,
    read_whole,
    why_unreadable,
)

bnb = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
INDEX = {
    "odd": [1, 3, 4, 10],
    "unsorted": [9, 0, 5],
    "one": [7],
    "none": [],
    "twelve": list(range(12)),
    "ends": [0, 11],
}


def linear_4bit(
    out=12, inp=128, kind="nf4", nested=True, compute=torch.float32, weight=torch.float32, seed=0, **extra
):
    torch.manual_seed(seed)
    plain = nn.Linear(inp, out).to(weight)
    linear = bnb.nn.Linear4bit(inp, out, compute_dtype=compute, quant_type=kind, compress_statistics=nested, **extra)
    linear.load_state_dict(plain.state_dict())
    return linear


def with_blocks(linear, blocksize):
    linear.weight.blocksize = blocksize
    return linear.to("cpu")


def linear_8bit(out=12, inp=128):
    torch.manual_seed(0)
    plain = nn.Linear(inp, out)
    linear = bnb.nn.Linear8bitLt(inp, out, has_fp16_weights=False)
    linear.load_state_dict(plain.state_dict())
    return linear.to("cpu")


def dequantised(linear, dtype):
    """What bitsandbytes makes of the whole weight in a type."""
    if isinstance(linear, bnb.nn.Linear8bitLt):
        scales = linear.weight.SCB if linear.weight.SCB is not None else linear.state.SCB
        return linear.weight.data.to(dtype).mul_(scales.unsqueeze(1).mul(1.0 / 127.0))
    state = linear.weight.quant_state
    absmax = state.absmax
    if state.nested:
        absmax = bnb.functional.dequantize_blockwise(absmax, state.state2) + state.offset
    plain = bnb.functional.QuantState(absmax, state.shape, state.code, state.blocksize, state.quant_type, dtype)
    return bnb.functional.dequantize_4bit(linear.weight.data, plain)


def check_reads(weight, want, index, dtype):
    index = torch.tensor(index, dtype=torch.long)
    rows, columns = read_rows(weight, index, dtype), read_columns(weight, index, dtype)
    assert rows.dtype == columns.dtype == dtype
    assert torch.equal(rows, want.index_select(0, index))
    assert torch.equal(columns, want.index_select(1, index))
    assert torch.equal(read_whole(weight, dtype), want)


@pytest.mark.parametrize("index", INDEX.values(), ids=INDEX.keys())
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())
@pytest.mark.parametrize("nested", [False, True], ids=["plain", "double"])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_4bit(kind, nested, dtype, index):
    linear = linear_4bit(kind=kind, nested=nested).to("cpu")
    check_reads(frozen_weight(linear), dequantised(linear, dtype), index, dtype)


@pytest.mark.parametrize("nested", [False, True], ids=["plain", "double"])
def test_bitsandbytes_is_not_asked_for_nothing(monkeypatch, nested):
    """A launch of no blocks is an error to CUDA, with which it ends the process."""
    weight = frozen_weight(linear_4bit(out=24, inp=64, nested=nested).to("cpu"))
    monkeypatch.setattr(bnb.functional, "dequantize_4bit", None)
    got = read_rows(weight, torch.tensor([], dtype=torch.long), torch.bfloat16)
    assert (got.shape, got.dtype) == ((0, 64), torch.bfloat16)


@pytest.mark.parametrize("nested", [False, True], ids=["plain", "double"])
@pytest.mark.parametrize("inp", [64, 96, 128, 256, 50], ids=lambda inp: f"in{inp}")
@pytest.mark.parametrize("blocksize", [32, 64, 256])
def test_blocks_that_fit_rows_and_that_do_not(blocksize, inp, nested):
    linear = with_blocks(linear_4bit(inp=inp, nested=nested), blocksize)
    assert linear.weight.quant_state.blocksize == blocksize
    for index in INDEX.values():
        check_reads(frozen_weight(linear), dequantised(linear, torch.float32), index, torch.float32)


@pytest.mark.parametrize("nested", [False, True], ids=["plain", "double"])
def test_double_quantisation_over_many_blocks_of_scales(nested):
    """700 x 4 scales fill eleven blocks of 256, whose bounds fall inside rows."""
    linear = linear_4bit(out=701, inp=256, nested=nested).to("cpu")
    check_reads(frozen_weight(linear), dequantised(linear, torch.float32), [0, 63, 64, 65, 200, 255], torch.float32)
    index = torch.tensor([0, 63, 64, 500, 700])
    rows = read_rows(frozen_weight(linear), index, torch.float32)
    assert torch.equal(rows, dequantised(linear, torch.float32)[index])


@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16, torch.float32], ids=str)
def test_packed_bytes_in_another_type(storage):
    """FSDP asks for packed data in the type of the other parameters."""
    linear = linear_4bit(quant_storage=storage).to("cpu")
    assert linear.weight.dtype == storage
    check_reads(frozen_weight(linear), dequantised(linear, torch.float32), INDEX["odd"], torch.float32)


@pytest.mark.parametrize("index", INDEX.values(), ids=INDEX.keys())
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())
def test_8bit_before_and_after_its_first_forward(dtype, index):
    linear = linear_8bit()
    want = dequantised(linear, dtype)
    check_reads(frozen_weight(linear), want, index, dtype)
    linear.train()(torch.randn(2, 128))
    assert linear.weight.SCB is None  # the scales have moved
    check_reads(frozen_weight(linear), want, index, dtype)


def test_a_share_of_a_fused_weight():
    linear = linear_4bit(out=24).to("cpu")
    layout = HeadLayout(heads=6, kv_heads=3, head_dim=4)
    weight = QuantisedRows(frozen_weight(linear), layout.expand, 12)
    want = dequantised(linear, torch.float32)[layout.expand(torch.arange(6))]
    share = QuantisedRows(frozen_weight(linear), lambda index: index + 5, 12)
    check_reads(share, dequantised(linear, torch.float32)[5:17], INDEX["odd"], torch.float32)
    assert share.shape == (12, 128)
    assert share.product == torch.float32
    assert torch.equal(weight.rows(torch.arange(6), torch.float32), want)


class Reads(torch.utils._python_dispatch.TorchDispatchMode):
    """Records the elements of what every operation gives."""

    def __init__(self):
        super().__init__()
        self.elements = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and not func.is_view:
            self.elements.append(result.numel())
        return result


@pytest.mark.parametrize("make", [linear_4bit, linear_8bit], ids=["4bit", "8bit"])
@pytest.mark.parametrize(("read", "most"), [(read_rows, 3 * 256), (read_columns, 3 * 512)], ids=["rows", "columns"])
def test_nothing_else_is_dequantised(make, read, most):
    weight = frozen_weight(make(out=512, inp=256).to("cpu"))
    with Reads() as reads:
        read(weight, torch.tensor([7, 100, 255]), torch.float32)
    scales = 512 * 256 // 64
    assert max(reads.elements) <= max(most, scales if read is read_columns else 0)


def test_whether_weights_have_changed_is_known_without_an_operation():
    fused, down = (frozen_weight(linear_4bit(out=24).to("cpu")) for _ in range(2))
    gate, up = (QuantisedRows(fused, lambda index, first=first: index + first, 12) for first in (0, 12))
    weights = MlpWeights(gate, up, down, F.silu)
    with Reads() as reads:
        assert weights.state() == weights.state()
    assert not reads.elements


def test_nothing_dequantised_is_kept_for_backward():
    weight, x = frozen_weight(linear_4bit().to("cpu")), torch.randn(5, 128, requires_grad=True)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y = gathered_rows(x, weight, torch.tensor([1, 5, 6]))
    assert saved == []
    held = [thing for thing in vars(y.grad_fn).values() if isinstance(thing, torch.Tensor)]
    assert all(tensor.numel() <= 3 for tensor in held)


@pytest.mark.parametrize("make", [linear_4bit, linear_8bit], ids=["4bit", "8bit"])
def test_products_equal_those_of_the_dequantised_weight(make):
    linear, index = make().to("cpu"), torch.tensor([1, 5, 6])
    dense = dequantised(linear, torch.float32)
    x, narrow = torch.randn(5, 128, requires_grad=True), torch.randn(5, 3, requires_grad=True)
    rows = gathered_rows(x, frozen_weight(linear), index, linear.bias)
    assert torch.equal(rows, gathered_rows(x, dense, index, linear.bias))
    assert torch.equal(torch.autograd.grad(rows.sum(), x)[0], dense[index].sum(0).expand(5, -1))
    columns = gathered_columns(narrow, frozen_weight(linear), index, linear.bias)
    torch.testing.assert_close(columns, F.linear(narrow, dense[:, index], linear.bias))
    torch.testing.assert_close(torch.autograd.grad(columns.sum(), narrow)[0], dense[:, index].sum(0).expand(5, -1))


def test_type_of_products():
    x = torch.randn(2, 128)
    computes_in_bf16 = frozen_weight(linear_4bit(compute=torch.bfloat16).to("cpu"))
    assert compute_dtype(x, computes_in_bf16) == computes_in_bf16.dtype == torch.bfloat16
    follows = frozen_weight(linear_8bit())
    assert compute_dtype(x.bfloat16(), follows) == torch.bfloat16
    assert follows.dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        assert compute_dtype(x, frozen_weight(linear_4bit().to("cpu"))) == torch.bfloat16


class HQQLinear(nn.Module):
    """Stands for linears of other quantisers: no subclass of `nn.Linear`, and no `weight`."""


def test_what_can_be_read_and_why_not():
    class Special(nn.Linear):
        pass

    assert why_unreadable(nn.Linear(3, 2)) == ""
    assert why_unreadable(linear_4bit().to("cpu")) == why_unreadable(linear_8bit()) == ""
    assert why_unreadable(bnb.nn.LinearNF4(64, 2).to("cpu")) == ""
    assert why_unreadable(Special(3, 2)) == "a Special, not a plain linear"
    assert "of bitsandbytes alone" in why_unreadable(HQQLinear())
    for dtype in (torch.float8_e4m3fn, torch.int8):
        packed = nn.Linear(3, 2)
        packed.weight = nn.Parameter(packed.weight.to(dtype), requires_grad=False)
        assert f"a weight in {str(dtype)[6:]}: of quantised weights" in why_unreadable(packed)
    del packed.weight
    assert "without a weight: of quantised weights" in why_unreadable(packed)
    assert why_unreadable(nn.Linear(3, 2).half()) == why_unreadable(nn.Linear(3, 2).double()) == ""
    assert "not quantised yet" in why_unreadable(linear_4bit())
    assert "not quantised yet" in why_unreadable(bnb.nn.Linear8bitLt(8, 8, has_fp16_weights=True))


def test_kinds():
    assert isinstance(frozen_weight(linear_4bit().to("cpu")), Weight4bit)
    assert isinstance(frozen_weight(linear_8bit()), Weight8bit)
    assert type(frozen_weight(nn.Linear(3, 2))) is torch.Tensor
