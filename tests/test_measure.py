import time
from types import SimpleNamespace

import pytest
import torch

from sparselora_hf.measure import RunClock, StepTime, StepTimer, median_step, peak_memory, reset_peak_memory


def test_timer_takes_every_step():
    timer = StepTimer()
    for pause in (0.02, 0.05):
        timer.on_step_begin(None, None, None)
        time.sleep(pause)
        timer.on_step_end(None, None, None)
    assert len(timer.steps) == 2
    assert 0.02 <= timer.steps[0].wall < timer.steps[1].wall
    assert timer.steps[1].cpu < timer.steps[1].wall / 2  # sleeping costs wall time alone


def test_median_is_taken_clock_by_clock():
    steps = [StepTime(1.0, 30.0), StepTime(2.0, 10.0), StepTime(9.0, 20.0)]
    assert median_step(steps) == StepTime(2.0, 20.0)


def test_run_clock_takes_evaluations_off():
    clock = RunClock()
    clock.on_train_begin(None, None, None)
    time.sleep(0.03)
    for step, loss in ((1, 2.0), (2, 1.5)):
        time.sleep(0.05)  # the evaluation
        metrics = {"eval_runtime": 0.05, "eval_loss": loss}
        clock.on_evaluate(None, SimpleNamespace(global_step=step), None, metrics=metrics)
    clock.on_train_end(None, None, None)
    assert [(e.step, e.loss) for e in clock.evaluations] == [(1, 2.0), (2, 1.5)]
    assert 0.03 <= clock.evaluations[0].seconds <= clock.evaluations[1].seconds <= clock.seconds < 0.1


@pytest.mark.skipif(torch.cuda.is_available() or peak_memory() is None, reason="needs Linux without a GPU")
def test_peak_memory_rises_and_is_reset():
    reset_peak_memory()
    before = peak_memory()
    block = torch.ones(25_000_000)  # 100 MB
    assert peak_memory() - before > 80e6
    del block
    reset_peak_memory()
    assert peak_memory() - before < 50e6
