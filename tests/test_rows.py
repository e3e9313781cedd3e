import pytest
import torch
from helpers import kept_for_backward
from torch.autograd import gradcheck

from sparselora_hf.ops.rows import (
    fork_rows,
    join_rows,
    overlay_rows,
    scatter_channels,
    select_channels,
    split_rows,
)

ROWS = {
    "some": ([4, 0], [1, 5, 6]),
    "all": ([0, 2, 4, 6], [1, 3, 5]),
    "first empty": ([], [1, 2]),
    "second empty": ([3], []),
    "both empty": ([], []),
    "all in one": (list(range(7)), []),
}


@pytest.fixture(params=ROWS.values(), ids=ROWS.keys())
def rows(request):
    return tuple(torch.tensor(r, dtype=torch.long) for r in request.param)


def matrix(*shape, seed=0, grad=True):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, dtype=torch.float64, generator=generator).requires_grad_(grad)


def test_split_rows(rows, poison):
    x = matrix(7, 3)
    first, second = split_rows(x, *rows)
    assert torch.equal(first, x[rows[0]])
    assert torch.equal(second, x[rows[1]])
    assert gradcheck(lambda x: split_rows(x, *rows), x)


def test_join_rows(rows, poison):
    a, b = matrix(len(rows[0]), 3), matrix(len(rows[1]), 3, seed=1)
    want = torch.zeros(7, 3, dtype=torch.float64)
    want[rows[0]], want[rows[1]] = a.detach(), b.detach()
    assert torch.equal(join_rows(a, b, *rows, 7), want)
    assert gradcheck(lambda a, b: join_rows(a, b, *rows, 7), (a, b))


def test_join_undoes_split(rows):
    x = matrix(7, 3, grad=False)
    kept = torch.zeros(7, 1, dtype=torch.bool)
    kept[torch.cat(rows)] = True
    assert torch.equal(join_rows(*split_rows(x, *rows), *rows, 7), x * kept)


def test_join_takes_the_first_type():
    joined = join_rows(
        torch.zeros(1, 2), torch.ones(1, 2, dtype=torch.float64), torch.tensor([0]), torch.tensor([1]), 2
    )
    assert joined.dtype == torch.float32
    assert joined.tolist() == [[0, 0], [1, 1]]


def test_fork_and_overlay(rows):
    x = matrix(7, 3)
    weight, other = matrix(3, 3, seed=1), matrix(3, 3, seed=2)

    def patched(x, weight, other):
        whole, few = fork_rows(x, rows[0])
        return overlay_rows(whole @ weight, few @ other, rows[0])

    want = (x @ weight).clone()
    want[rows[0]] = (x @ other)[rows[0]]
    assert torch.equal(patched(x, weight, other), want)
    assert gradcheck(patched, (x, weight, other))


def test_fork_with_several_users():
    x, rows = matrix(5, 3), torch.tensor([1, 4])

    def used_twice(x):
        whole, few = fork_rows(x, rows)
        return overlay_rows(whole.sin() + whole.square(), few.exp() * few, rows)

    assert gradcheck(used_twice, x)


def test_fork_leaves_the_callers_gradient_alone():
    x, rows = matrix(4, 2), torch.tensor([0])
    given = torch.ones(4, 2, dtype=torch.float64)
    whole, few = fork_rows(x, rows)
    torch.autograd.backward((whole * 2, few * 3), (given, given[:1]))
    assert x.grad.tolist() == [[5, 5], [2, 2], [2, 2], [2, 2]]
    assert bool((given == 1).all())


def test_overlay_takes_the_type_of_the_base():
    base = overlay_rows(torch.zeros(2, 2), torch.ones(1, 2, dtype=torch.float64), torch.tensor([1]))
    assert base.dtype == torch.float32
    assert base.tolist() == [[0, 0], [1, 1]]


@pytest.mark.parametrize("index", [[0, 2, 5], [3, 1], [], list(range(6))], ids=str)
@pytest.mark.parametrize("tokens", [0, 1, 4])
def test_channels(index, tokens, poison):
    index = torch.tensor(index, dtype=torch.long)
    x, narrow = matrix(tokens, 6), matrix(tokens, len(index), seed=1)
    assert torch.equal(select_channels(x, index), x[:, index])
    spread = torch.zeros(tokens, 6, dtype=torch.float64)
    spread[:, index] = narrow.detach()
    assert torch.equal(scatter_channels(narrow, index, 6), spread)
    assert gradcheck(lambda x: select_channels(x, index), x)
    assert gradcheck(lambda x: scatter_channels(x, index, 6), narrow)


@pytest.mark.parametrize(
    ("op", "width"),
    [
        (lambda x, i: split_rows(x, i, i[:0])[0], 50),
        (lambda x, i: join_rows(x, x[:0], torch.arange(40), i[:0], 60), 50),
        (lambda x, i: fork_rows(x, i)[1], 50),
        (lambda x, i: overlay_rows(x * 1, x[:3] * 1, i), 50),
        (select_channels, 50),
        (lambda x, i: scatter_channels(x, torch.arange(50), 60), 50),
    ],
    ids=["split", "join", "fork", "overlay", "select", "scatter"],
)
def test_only_indices_are_saved(op, width):
    x, index = torch.randn(40, width, requires_grad=True), torch.tensor([2, 7, 11])
    kept = kept_for_backward(lambda: op(x, index))
    assert kept
    assert all(t.dtype == torch.int64 for t in kept)
