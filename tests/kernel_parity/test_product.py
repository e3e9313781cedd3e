import pytest
import torch
from cases import DTYPES, Draw, assert_near, poisoned

from sparselora_hf.kernels.product import gathered_product
from sparselora_hf.kernels.tiles import Tile

TILE = Tile(64, 64, 64, 4, 2)
# tokens, rows (None: all), inputs, outputs, kept
SHAPES = {
    "odd": (37, 21, 45, 70, 13),
    "several tiles": (150, 130, 140, 70, 67),
    "all rows": (33, None, 24, 40, 17),
    "no row": (9, 0, 8, 8, 4),
    "none kept": (9, 5, 8, 12, 0),
    "all kept": (20, 20, 16, 32, 8),
}
PRODUCTS = [(t, o) for t in (True, False) for o in (True, False)]
NAMES = ["rows forward", "columns forward", "columns backward", "rows backward"]


def setting(shape, transposed, over_outputs, dtype):
    """Weight ``[outputs, inputs]`` or turned, with an index over outputs or inputs."""
    tokens, rows, inputs, outputs, keep = shape
    draw = Draw(dtype)
    index = draw.subset(outputs if over_outputs else inputs, keep)
    weight = draw(outputs, inputs) if transposed else draw(inputs, outputs)
    return draw, weight, index, None if rows is None else draw.subset(tokens, rows)


def definition(x, weight, index, rows, transposed, over_outputs, bias=None):
    """Full-width float64 product over masked channels, on the rows in question."""
    x, weight = x.double(), weight.double() if transposed else weight.double().t()
    x = x if rows is None else x[rows]
    if over_outputs:
        y = x @ weight[index].t()
        return y if bias is None else y + bias.double()[index]
    y = x[:, index] @ weight[:, index].t()
    return y if bias is None else y + bias.double()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("transposed", "over_outputs"), PRODUCTS, ids=NAMES)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_into_the_joined_output(shape, transposed, over_outputs, dtype):
    """Tokens and results at full width: elements of other rows and channels are left alone, all others written."""
    draw, weight, index, rows = setting(shape, transposed, over_outputs, dtype)
    tokens, _, inputs, outputs, _ = shape
    x, bias = draw(tokens, inputs), draw(outputs)
    out = poisoned(tokens, outputs, dtype=dtype)
    options = {"transposed": transposed, "over_outputs": over_outputs, "rows": rows, "bias": bias}
    gathered_product(x, weight, index, out, TILE, index_tokens=True, **options)
    written = torch.zeros(tokens, outputs, dtype=torch.bool, device=x.device)
    places = (torch.arange(tokens, device=x.device) if rows is None else rows)[:, None]
    columns = index if over_outputs else torch.arange(outputs, device=x.device)
    written[places, columns] = True
    assert bool((out.isnan() == ~written).all())
    assert_near(out[places, columns], definition(x, weight, index, rows, transposed, over_outputs, bias), dtype)


@pytest.mark.parametrize("sliced", [False, True], ids=["in place", "slice"])
@pytest.mark.parametrize(("transposed", "over_outputs"), PRODUCTS, ids=NAMES)
def test_compact(transposed, over_outputs, sliced):
    """Tokens and results at kept width; the weight in place, or its slice of kept rows."""
    dtype = torch.float32
    draw, weight, index, _ = setting(SHAPES["odd"], transposed, over_outputs, dtype)
    x, bias = draw(37, 45), draw(70)
    want = definition(x, weight, index, None, transposed, over_outputs, bias)
    options = {"over_outputs": over_outputs, "bias": bias}
    kept_rows = transposed == over_outputs
    narrow = x if over_outputs else x[:, index].contiguous()
    out = poisoned(*want.shape, dtype=dtype)
    if sliced:  # a slice has its kept channels as rows, so it is turned where they were columns
        piece = weight[index] if kept_rows else weight[:, index].t().contiguous()
        gathered_product(narrow, piece, index, out, TILE, transposed=over_outputs, index_weight=False, **options)
    else:
        gathered_product(narrow, weight, index, out, TILE, transposed=transposed, **options)
    assert_near(out, want, dtype)


def test_strided_tokens_and_unsorted_index():
    draw = Draw()
    x, weight = draw(10, 40)[:, 3:27], draw(30, 24)
    index = torch.tensor([29, 0, 7, 11], device=x.device)
    out = poisoned(10, 4, dtype=torch.float32)
    gathered_product(x, weight, index, out, TILE, transposed=True, over_outputs=True)
    assert_near(out, x.double() @ weight[index].double().t(), torch.float32)
