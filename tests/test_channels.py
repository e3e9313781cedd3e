import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.models.llama.modeling_llama import repeat_kv

from sparselora_hf.channels import ChannelSelection, HeadLayout, top_channels

LAYOUTS = [HeadLayout(8, 4, 6), HeadLayout(32, 8, 4), HeadLayout(8, 8, 4), HeadLayout(4, 1, 10), HeadLayout(14, 2, 3)]
layouts = pytest.mark.parametrize("layout", LAYOUTS, ids=lambda x: f"{x.heads}/{x.kv_heads}")


def owners(layout: HeadLayout) -> list[int]:
    """For each query channel the kv channel that attention pairs it with, by transformers' own `repeat_kv`."""
    kv = torch.arange(layout.kv_width).view(1, layout.kv_heads, 1, layout.head_dim)
    return repeat_kv(kv, layout.groups).reshape(-1).tolist()


def random_index(layout: HeadLayout, keep: int, seed: int = 0) -> torch.Tensor:
    return torch.randperm(layout.kv_width, generator=torch.Generator().manual_seed(seed))[:keep].sort().values


@layouts
def test_repeat_kv_is_repeat_interleave_of_heads(layout):
    heads = torch.arange(layout.kv_width).view(layout.kv_heads, layout.head_dim)
    assert owners(layout) == heads.repeat_interleave(layout.groups, 0).flatten().tolist()


@layouts
@pytest.mark.parametrize("share", [0, 0.1, 0.5, 1])
def test_expand(layout, share):
    index = random_index(layout, int(share * layout.kv_width))
    kept = set(index.tolist())
    assert sorted(layout.expand(index).tolist()) == [c for c, owner in enumerate(owners(layout)) if owner in kept]
    assert [owners(layout)[c] for c in layout.expand(index)] == index.tolist() * layout.groups


@layouts
def test_pool_queries(layout):
    scores = torch.rand(layout.heads * layout.head_dim, dtype=torch.float64)
    want = torch.zeros(layout.kv_width, dtype=torch.float64)
    for channel, owner in enumerate(owners(layout)):
        want[owner] += scores[channel] ** 2
    torch.testing.assert_close(layout.pool_queries(scores), want.sqrt())


@layouts
def test_attention_with_kept_channels_is_attention_with_masked_ones(layout):
    """Scores of q and k through the kept channels alone, with key heads repeated as attention does."""
    q, k = torch.randn(5, layout.heads * layout.head_dim), torch.randn(5, layout.kv_width)
    selection = ChannelSelection.of(random_index(layout, layout.kv_width // 3), layout)
    q_kept, k_kept = torch.zeros_like(q), torch.zeros_like(k)
    q_kept[:, selection.wide], k_kept[:, selection.narrow] = q[:, selection.wide], k[:, selection.narrow]

    def products(q, k):
        k = k.view(1, 5, layout.kv_heads, layout.head_dim).transpose(1, 2)
        return q.view(1, 5, layout.heads, layout.head_dim).transpose(1, 2) @ repeat_kv(k, layout.groups).mT

    torch.testing.assert_close(products(q_kept, k_kept), products(q_kept, k))
    torch.testing.assert_close(products(q_kept, k_kept), products(q, k_kept))


def test_selection_without_a_layout():
    index = torch.tensor([1, 4])
    selection = ChannelSelection.of(index)
    assert selection.narrow is selection.wide is index


@given(scores=st.lists(st.floats(0, 1e6, width=32), min_size=1, max_size=40, unique=True), data=st.data())
@settings(max_examples=80, deadline=None)
def test_top_channels(scores, data):
    keep = data.draw(st.integers(0, len(scores)))
    index = top_channels(torch.tensor(scores), keep)
    best = sorted(range(len(scores)), key=lambda c: -scores[c])[:keep]
    assert sorted(index.tolist()) == sorted(best)
    assert index.dtype == torch.int64


def test_top_channels_keeps_its_count_whatever_the_scores():
    scores = torch.tensor([float("nan"), 1.0, float("inf"), 0.0, float("nan")])
    assert top_channels(scores, 3).tolist() == [1, 2, 3]
    assert top_channels(scores, 2).tolist() == [1, 2]
    assert len(top_channels(torch.zeros(10), 4)) == 4
    assert len(set(top_channels(torch.full((10,), float("nan")), 10).tolist())) == 10


def test_channels_that_lie_together_are_sorted():
    scores = torch.rand(320, generator=torch.Generator().manual_seed(0))
    many, few = top_channels(scores, 21), top_channels(scores, 20)
    assert many.tolist() == sorted(many.tolist())
    assert set(few.tolist()) < set(many.tolist())
