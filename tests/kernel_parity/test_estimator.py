import pytest
import torch
from cases import DEVICE, DTYPES, Draw, poisoned
from torch.nn import functional as F

from sparselora_hf.kernels.estimator import channel_norms, gated_norms
from sparselora_hf.kernels.tiles import Tile
from sparselora_hf.svd import LowRank

TILE, NORMS = Tile(32, 16, 128, 4, 2), Tile(32, 64, 0, 4, 2)
SHAPES = {"odd": (37, 45, 70), "tiles": (130, 260, 130), "one token": (1, 16, 20), "no token": (0, 16, 20)}
RANKS = [1, 8, 20]


def assert_scores(got, want, dtype):
    assert got.dtype == torch.float32
    tolerance = {torch.float32: 2e-3, torch.float16: 1e-2, torch.bfloat16: 4e-2}[dtype]
    assert float((got.double() - want).norm()) <= tolerance * float(want.norm())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rank", RANKS)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_channel_norms(shape, rank, dtype):
    tokens, hidden, width = shape
    draw = Draw(dtype)
    x, down, up = draw(tokens, hidden), draw(rank, hidden), draw(width, rank)
    want = (x.double() @ down.double().t() @ up.double().t()).norm(dim=0)
    got = channel_norms(x, down, up, TILE, NORMS)
    assert_scores(got, want, dtype)
    assert_scores(got, LowRank(down, up).channel_norms(x).double(), dtype)


@pytest.mark.parametrize("biased", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("rank", RANKS)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_gated_norms(shape, rank, biased):
    tokens, hidden, width = shape
    dtype = torch.float32
    draw = Draw(dtype)
    x, down, gate, up = draw(tokens, hidden), draw(2 * rank, hidden, scale=0.1), draw(width, rank), draw(width, rank)
    biases = (draw(width), draw(width)) if biased else (None, None)
    z = x.double() @ down.double().t()
    g, u = z[:, :rank] @ gate.double().t(), z[:, rank:] @ up.double().t()
    if biased:
        g, u = g + biases[0].double(), u + biases[1].double()
    want = (F.silu(g) * u).norm(dim=0)
    assert_scores(gated_norms(x, down, gate, up, "silu", TILE, NORMS, *biases), want, dtype)
    # rows that do not count lie between those that do
    spread, rows = poisoned(2 * tokens + 1, hidden, dtype=dtype), 2 * torch.arange(tokens, device=DEVICE)
    spread[rows] = x
    assert_scores(gated_norms(spread, down, gate, up, "silu", TILE, NORMS, *biases, rows), want, dtype)


def test_tokens_that_give_nan_count_for_nothing():
    draw = Draw()
    x, down, gate, up = draw(100, 20), draw(6, 20), draw(40, 3), draw(40, 3)
    want = gated_norms(x[:50], down, gate, up, "silu", TILE, NORMS)
    x[50:] = float("nan")
    assert_scores(gated_norms(x, down, gate, up, "silu", TILE, NORMS), want.double(), torch.float32)
