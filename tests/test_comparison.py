import dataclasses

import pytest

from sparselora_hf.comparison import Outcome, draw, shared_loss
from sparselora_hf.measure import Evaluation, StepTime


def outcome(name: str, attach: float, *points: tuple[float, float], first_sparse: int | None = None) -> Outcome:
    """A run of four steps with evaluations at (seconds, loss)."""
    steps = [StepTime(seconds, seconds) for seconds in (4.0, 1.0, 2.0, 3.0)]
    evaluations = [Evaluation(i, *point) for i, point in enumerate(points)]
    rest = {"memory": None, "score": None, "sparsity": 0.0, "flops": [1.0] * 4, "config": None}
    return Outcome(name, [4.0, 3.0, 2.0, 1.0], steps, evaluations, first_sparse, attach, 10.0, **rest)


DENSE = outcome("dense", 0.0, (0.0, 3.0), (5.0, 2.0), (10.0, 1.0))
SPARSE = outcome("sparse", 1.0, (0.0, 3.0), (2.0, 1.9), (4.0, 1.2), first_sparse=1)


def test_shared_loss_is_the_lowest_that_all_reach():
    assert shared_loss([DENSE, SPARSE]) == 1.2
    assert shared_loss([DENSE, dataclasses.replace(SPARSE, evaluations=[])]) is None


@pytest.mark.parametrize(
    ("run", "loss", "seconds"),
    [(DENSE, 2.0, 5.0), (DENSE, 1.2, 10.0), (SPARSE, 2.0, 3.0), (SPARSE, 1.2, 5.0), (SPARSE, 1.0, None)],
)
def test_time_to_a_loss_counts_attaching(run, loss, seconds):
    assert run.seconds_to(loss) == seconds


def test_step_is_the_median_after_the_dense_ones():
    assert SPARSE.step(SPARSE.first_sparse) == StepTime(2.0, 2.0)
    assert SPARSE.total_seconds == 11.0


def test_final_loss_is_of_the_last_tenth():
    assert DENSE.loss == 1.0


@pytest.mark.parametrize("evaluated", [True, False], ids=["evaluations", "training losses"])
def test_picture(tmp_path, evaluated):
    runs = [DENSE, SPARSE] if evaluated else [dataclasses.replace(run, evaluations=[]) for run in (DENSE, SPARSE)]
    draw(tmp_path / "picture.png", runs)
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")
