import pytest
import torch

from sparselora_hf.standin import fit_fixed_set, fit_stand_in, reduced_rank

N, H, M, TRUE_RANK = 400, 12, 30, 3


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def linear_world():
    """Targets that are a map of rank 3 of the inputs, with offsets and a little noise."""
    x = randn(N, H) + 2
    y = x @ randn(H, TRUE_RANK, seed=1) @ randn(TRUE_RANK, M, seed=2) + randn(M, seed=3)
    return x, y + 0.01 * randn(N, M, seed=4)


def residual(prediction, y):
    return float((prediction - y).square().sum() / (y - y.mean(0)).square().sum())


def ridge_regression(x, y, ridge):
    """Predictions of the regression of full rank."""
    centred, targets = x - x.mean(0), y - y.mean(0)
    gram = centred.T @ centred / len(x)
    gram += ridge * gram.diagonal().mean() * torch.eye(x.shape[1])
    return y.mean(0) + centred @ torch.linalg.solve(gram, centred.T @ targets / len(x))


def test_rank_0_is_the_mean(linear_world):
    x, y = linear_world
    fit = reduced_rank(x, y, 0)
    torch.testing.assert_close(fit(x), y.mean(0).expand(N, M))


def test_true_rank_is_found(linear_world):
    x, y = linear_world
    residuals = [residual(reduced_rank(x, y, rank)(x), y) for rank in range(TRUE_RANK + 2)]
    assert residuals[0] == pytest.approx(1)
    assert residuals == sorted(residuals, reverse=True)
    assert residuals[TRUE_RANK] < 1e-3 < residuals[TRUE_RANK - 1]


def test_full_rank_is_the_ridge_regression(linear_world):
    x, y = linear_world
    fit = reduced_rank(x, y, min(H, M))
    torch.testing.assert_close(fit(x), ridge_regression(x, y, 1e-3), rtol=1e-3, atol=1e-3)


def test_best_of_its_rank(linear_world):
    """No other map of rank 2 does clearly better: the best one is the SVD of the predictions."""
    x, y = linear_world
    centred, targets = x - x.mean(0), y - y.mean(0)
    predictions = centred @ torch.linalg.lstsq(centred, targets).solution
    u, s, vh = torch.linalg.svd(predictions, full_matrices=False)
    best = residual((u[:, :2] * s[:2]) @ vh[:2] + y.mean(0), y)
    assert residual(reduced_rank(x, y, 2)(x), y) < 1.01 * best


def test_ridge_is_chosen_by_rows_held_out():
    """Noise is predicted best by the strongest ridge, an exact map by the weakest."""
    x = randn(24, 20)
    for y, ridge in ((randn(24, 5, seed=1), 0.1), (x @ randn(20, 5, seed=2), 1e-3)):
        torch.testing.assert_close(reduced_rank(x, y, 5)(x), ridge_regression(x, y, ridge), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("rows", [1, 2, 5])
def test_few_rows_give_finite_factors(rows):
    fit = reduced_rank(randn(rows, H), randn(rows, M, seed=1), 4)
    assert fit(randn(7, H, seed=2)).isfinite().all()


def test_too_few_rows_to_hold_any_out_take_the_strongest_ridge():
    x, y = randn(8, H), randn(8, M, seed=1)
    torch.testing.assert_close(reduced_rank(x, y, H)(x), ridge_regression(x, y, 0.1), rtol=1e-3, atol=1e-3)


def test_a_rank_above_that_of_the_map_is_the_full_one(linear_world):
    x, y = linear_world
    torch.testing.assert_close(reduced_rank(x, y, 99)(x), reduced_rank(x, y, H)(x), rtol=1e-3, atol=1e-3)
    assert reduced_rank(x, y[:, :5], 99).outward.shape == (5, 5)


def test_constant_inputs_give_the_mean():
    y = randn(20, M)
    torch.testing.assert_close(reduced_rank(torch.ones(20, H), y, 4)(torch.ones(20, H)), y.mean(0).expand(20, M))


def test_deterministic_and_leaves_the_random_numbers_alone(linear_world):
    before = torch.get_rng_state()
    first = reduced_rank(*linear_world, 2)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(77)
    assert torch.equal(reduced_rank(*linear_world, 2).inward, first.inward)


def test_stand_in_maps_agree(linear_world):
    """`output` and `constant` are what `predict` gives, carried through down_proj."""
    x, h = linear_world
    down = randn(H, M, seed=5)
    stand_in = fit_stand_in(x, h, down, 2)
    output, given_up = stand_in.correction(x, torch.tensor([4, 9]))
    torch.testing.assert_close(output, stand_in.predict(x) @ down.T, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(given_up, stand_in.predict(x)[:, [4, 9]])


def test_stand_in_heeds_the_weight_of_a_channel(linear_world):
    """A rank of 1 goes to the channels that down_proj reads."""
    x, _ = linear_world
    h = torch.cat([10 * x[:, :1] + 0.0 * x[:, 1:2], x[:, 1:2]], 1)
    down = torch.tensor([[1e-4, 0.0], [0.0, 1.0]])
    stand_in = fit_stand_in(x, h, down, 1)
    error = (stand_in.predict(x) - h).square().mean(0) / (h - h.mean(0)).square().mean(0)
    assert error[1] < 0.05 < 0.5 < error[0]


def test_channel_that_down_proj_ignores_does_no_harm(linear_world):
    x, h = linear_world
    down = randn(H, M, seed=5)
    down[:, 3] = 0
    stand_in = fit_stand_in(x, h, down, 2)
    parts = stand_in.output, stand_in.constant, stand_in.mean, stand_in.channels
    assert all(part.isfinite().all() for part in parts)


def test_fixed_set_stands_for_dropped_channels_alone(linear_world):
    x, h = linear_world
    down, index, before = randn(H, M, seed=5), torch.tensor([0, 7, 20]), h.clone()
    stand_in = fit_fixed_set(x, h, down, index, TRUE_RANK)
    assert torch.equal(h, before)
    dropped = [c for c in range(M) if c not in index.tolist()]
    want = h[:, dropped] @ down[:, dropped].T
    output, given_up = stand_in.correction(x, index)
    assert residual(output, want) < 1e-3
    assert given_up == 0.0
    assert stand_in.mean is stand_in.channels is None
