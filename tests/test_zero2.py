import importlib.util
import json
import math
import os
import subprocess
import sys

import pytest
from helpers import ROOT, SPARSE

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None, reason="DeepSpeed is not installed: pip install deepspeed"
)


@pytest.fixture(scope="module")
def losses(tmp_path_factory) -> dict[str, list[float]]:
    """Losses of `zero2_run.py` on two CPU processes, by case."""
    file = tmp_path_factory.mktemp("zero2") / "losses.json"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    environment = os.environ | {"DS_ACCELERATOR": "cpu", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command += [str(ROOT / "tests" / "zero2_run.py"), str(file)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(file.read_text())


def test_exact_savings_change_no_loss(losses):
    assert losses["exact"] == pytest.approx(losses["plain"], rel=1e-6)
    assert losses["plain"][-1] != losses["plain"][0]


def test_dense_until_start_step_and_sparse_from_there(losses):
    start = SPARSE.start_step
    assert losses["sparse"][:start] == pytest.approx(losses["plain"][:start], rel=1e-6)
    assert losses["sparse"][start] != pytest.approx(losses["plain"][start], rel=1e-4)
    assert all(math.isfinite(loss) for loss in losses["sparse"])
