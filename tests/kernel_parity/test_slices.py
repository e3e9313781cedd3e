import pytest
import torch
from cases import DEVICE, DTYPES, Draw, assert_near

from sparselora_hf.kernels.nf4 import nf4_gather
from sparselora_hf.kernels.slices import gather_columns, gather_rows
from sparselora_hf.kernels.tiles import Tile

TILE = Tile(16, 64)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tail", [None, 5])
@pytest.mark.parametrize("keep", [0, 1, 13, 40])
def test_gather(keep, tail, dtype):
    draw = Draw(dtype)
    gate, up, down = draw(50, 130), draw(50, 130), draw(130, 50)
    rest = None if tail is None else draw(tail, 130)
    index, end = draw.subset(50, keep), [] if rest is None else [rest]
    assert torch.equal(gather_rows((up,), index, TILE, rest), torch.cat([up[index], *end]))
    assert torch.equal(gather_rows((gate, up), index, TILE, rest), torch.cat([gate[index], up[index], *end]))
    assert torch.equal(gather_columns(down, index, TILE, rest), torch.cat([down[:, index].t(), *end]))


@pytest.mark.parametrize("columns", [False, True], ids=["rows", "columns"])
@pytest.mark.parametrize("shape", [(24, 128), (33, 192), (16, 40)], ids=str)
@pytest.mark.parametrize("keep", [0, 7])
def test_nf4(shape, columns, keep):
    """Against the format's definition; 40 columns put two rows into one block of 64."""
    draw = Draw()
    codes = torch.randint(16, shape, generator=draw.generator)
    code = torch.linspace(-1, 1, 16).square() * torch.linspace(-1, 1, 16).sign()
    scales = torch.rand(-(-codes.numel() // 64), generator=draw.generator) + 0.5
    flat = codes.flatten()
    packed = ((flat[0::2] << 4) | flat[1::2]).to(torch.uint8)
    weight = (code[flat] * scales.repeat_interleave(64)[: flat.numel()]).view(shape)
    index = draw.subset(shape[1] if columns else shape[0], keep)
    want = weight[:, index.cpu()].t() if columns else weight[index.cpu()]
    got = nf4_gather(
        packed.to(DEVICE), scales.to(DEVICE), code.to(DEVICE), shape, index, torch.float32, TILE, columns=columns
    )
    assert_near(got, want.to(DEVICE), torch.float32)
