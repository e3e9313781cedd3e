import pytest
import torch

from sparselora_hf.svd import LowRank, truncated_svd


def decaying(out: int, inp: int, decay: float = 0.6, seed: int = 0) -> torch.Tensor:
    """A matrix with singular values 1, d, d², ..."""
    generator = torch.Generator().manual_seed(seed)
    rank = min(out, inp)
    u, _ = torch.linalg.qr(torch.randn(out, rank, generator=generator))
    v, _ = torch.linalg.qr(torch.randn(inp, rank, generator=generator))
    return (u * decay ** torch.arange(rank)) @ v.t()


@pytest.mark.parametrize("shape", [(96, 64), (64, 96), (50, 50), (200, 17)], ids=str)
@pytest.mark.parametrize("rank", [1, 8, 17])
def test_against_the_full_svd(shape, rank):
    weight = decaying(*shape)
    factors = truncated_svd(weight, rank)
    u, s, vh = torch.linalg.svd(weight, full_matrices=False)
    best = (u[:, :rank] * s[:rank]) @ vh[:rank]
    assert torch.linalg.matrix_norm(factors.up @ factors.down - best) < 1e-4 * s[0]
    assert (factors.down.shape, factors.up.shape) == ((rank, shape[1]), (shape[0], rank))


def test_flat_spectrum_is_near_the_best():
    weight = torch.randn(256, 192, generator=torch.Generator().manual_seed(0))
    factors = truncated_svd(weight, 8)
    error = torch.linalg.matrix_norm(weight - factors.up @ factors.down)
    best = torch.linalg.svdvals(weight)[8:].square().sum().sqrt()
    assert error < 1.005 * best


def test_factors_share_the_singular_values_evenly():
    factors = truncated_svd(decaying(40, 30), 4)
    root = 0.6 ** (torch.arange(4) / 2)
    torch.testing.assert_close(factors.down.norm(dim=1), root, rtol=1e-4, atol=0)
    torch.testing.assert_close(factors.up.norm(dim=0), root, rtol=1e-4, atol=0)


def test_full_rank_is_the_weight():
    weight = torch.randn(12, 20)
    factors = truncated_svd(weight, 12)
    torch.testing.assert_close(factors.up @ factors.down, weight, rtol=1e-4, atol=1e-5)


def test_low_rank_products():
    factors = LowRank(torch.randn(4, 10, dtype=torch.float64), torch.randn(20, 4, dtype=torch.float64))
    x = torch.randn(7, 10, dtype=torch.float64)
    product = x @ (factors.up @ factors.down).t()
    torch.testing.assert_close(factors(x), product)
    torch.testing.assert_close(factors.project(x), x @ factors.down.t())
    torch.testing.assert_close(factors.channel_norms(x).double(), product.norm(dim=0), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("tokens", [1, 3, 100])
def test_gram_norms_equal_explicit_norms(tokens):
    factors, x = truncated_svd(torch.randn(96, 64), 8), torch.randn(tokens, 64)
    torch.testing.assert_close(factors.channel_norms(x), factors(x).norm(dim=0), rtol=1e-4, atol=1e-4)


def test_norms_of_nothing_are_zero():
    norms = truncated_svd(torch.randn(6, 5), 2).channel_norms(torch.zeros(0, 5))
    assert norms.tolist() == [0] * 6


def test_norms_in_half_precision_are_summed_in_full():
    factors = truncated_svd(torch.randn(96, 64), 8)
    x = torch.randn(5000, 64)
    half = factors.to(torch.device("cpu"), torch.bfloat16).channel_norms(x.bfloat16())
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, factors.channel_norms(x), rtol=0.05, atol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_autocast_does_not_reach_the_sums(dtype):
    factors = truncated_svd(torch.randn(96, 64), 8).to(torch.device("cpu"), dtype)
    x = (8 * torch.randn(5000, 64)).to(dtype)
    with torch.autocast("cpu", dtype):
        norms = factors.channel_norms(x)
    torch.testing.assert_close(norms, factors.channel_norms(x), rtol=1e-6, atol=0)


def test_deterministic_and_leaves_the_random_numbers_alone():
    weight = torch.randn(64, 64)
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first = truncated_svd(weight, 8)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(6)
    second = truncated_svd(weight, 8)
    assert torch.equal(first.down, second.down)
    assert torch.equal(first.up, second.up)
    other = truncated_svd(weight, 8, seed=1)
    assert not torch.equal(first.down, other.down)


def test_half_precision_weight_and_autocast():
    weight = decaying(48, 32).bfloat16().requires_grad_()
    plain = truncated_svd(weight, 4)
    with torch.autocast("cpu", torch.bfloat16):
        under = truncated_svd(weight, 4)
    assert plain.down.dtype == torch.float32
    assert torch.equal(plain.down, under.down)
    assert not plain.up.requires_grad


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_damaged_weight(value):
    weight = torch.randn(8, 8)
    weight[3, 4] = value
    with pytest.raises(ValueError, match="NaN or infinity"):
        truncated_svd(weight, 2)


def test_infinities_of_both_signs():
    weight = torch.randn(8, 8)
    weight[0, 0], weight[5, 5] = float("inf"), -float("inf")
    with pytest.raises(ValueError, match="NaN or infinity"):
        truncated_svd(weight, 2)


def test_rank_too_large():
    with pytest.raises(ValueError, match=r"rank 9 exceeds the largest possible, 8, of a weight \(8, 20\)"):
        truncated_svd(torch.randn(8, 20), 9)
