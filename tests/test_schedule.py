import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparselora_hf.config import SparseLoraConfig
from sparselora_hf.schedule import Schedule


@pytest.mark.parametrize(
    ("start", "end", "steps", "want"),
    [
        (0.05, 1.0, 100, (5, 100)),
        (0.05, 1.0, 10, (1, 10)),
        (0.0, 1.0, 10, (0, 10)),
        (0.1, 0.5, 7, (1, 4)),
        (3, 1.0, 10, (3, 10)),
        (3, 8, 10, (3, 8)),
        (0, 0, 10, (0, 0)),
        (0.29, 1.0, 100, (29, 100)),  # 0.29 * 100 is a little above 29
        (5, 100, 10, (5, 100)),
    ],
)
def test_schedule_in_steps(start, end, steps, want):
    schedule = Schedule.of(SparseLoraConfig(start_step=start, end_step=end), steps)
    assert (schedule.start, schedule.end) == want
    assert [schedule.is_sparse(step) for step in range(steps)] == [want[0] <= step < want[1] for step in range(steps)]


@given(start=st.floats(0, 1), length=st.floats(0, 1), steps=st.integers(1, 100000))
@settings(max_examples=100, deadline=None)
def test_fractions_round_up(start, length, steps):
    end = min(1.0, start + length)
    schedule = Schedule.of(SparseLoraConfig(start_step=start, end_step=end), steps)
    assert abs(schedule.start - start * steps) < 1
    assert schedule.start >= math.floor(start * steps)
    assert schedule.start <= schedule.end <= steps


def test_mixed_kinds_that_end_before_they_start():
    config = SparseLoraConfig(start_step=8, end_step=0.5)  # known only with the length of the run
    assert Schedule.of(config, 20).is_sparse(9)
    with pytest.raises(ValueError, match=r"start_step 8 .*is after end_step 0.5 \(step 5\).*10 steps.*train longer"):
        Schedule.of(config, 10)


@pytest.mark.parametrize("start", [0.05, 3])
def test_run_of_no_steps(start):
    """As with `num_train_epochs=0`, which a Trainer takes."""
    config = SparseLoraConfig(mlp_sparsity=0.9, criterion="static", start_step=start)
    assert not Schedule.of(config, 0).is_sparse(0)


@pytest.mark.parametrize(
    "settings",
    [{"criterion": "static"}, {"criterion": "output"}, {"criterion": "svd_whitened"}, {"compensation": "mean"}],
    ids=str,
)
def test_statistics_need_a_dense_step(settings):
    config = SparseLoraConfig(mlp_sparsity=0.9, **settings)
    assert [Schedule.of(config.replace(start_step=start), 10).start for start in (0, 1, 3)] == [1, 1, 3]


@pytest.mark.parametrize(
    ("start", "end", "steps", "want"),
    [(0.05, 1.0, 100, True), (9, 1.0, 10, True), (10, 1.0, 10, False), (1.0, 1.0, 10, False), (3, 3, 10, False)],
)
def test_whether_any_step_of_a_run_is_sparse(start, end, steps, want):
    schedule = Schedule.of(SparseLoraConfig(mlp_sparsity=0.9, start_step=start, end_step=end), steps)
    assert schedule.is_ever_sparse(steps) is want is any(map(schedule.is_sparse, range(steps)))
