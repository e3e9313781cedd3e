"""Two processes on a CPU (gloo) against one: DDP and FSDP2, by the settings of `recipes/accelerate`.

accelerate starts DeepSpeed on accelerators alone and falls back to DDP here: of ZeRO-2 the settings are read, no more.

Fixed sets and exact savings give the losses of one process with the same global batch. Sets that are chosen for each
micro-batch depend on what is in one, so they are compared with one process that accumulates the micro-batches of both.
"""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import distributed_run
import pytest
from accelerate.commands import launch
from helpers import ROOT

TOLERANCE = 1e-5
CRITERIA = [name for name in distributed_run.CRITERIA if name != "svd"]
SHARDED = ["exact", "fixed sets", "svd", "all linears", "uneven", "saved"]
DDP = [*SHARDED, *CRITERIA, "uneven, all linears", "checkpointing", "dispatched"]


def environment(config: str, tmp) -> dict[str, str]:
    """What `accelerate launch` sets for a configuration, for a CPU and full precision."""
    parser = launch.launch_command_parser()
    args = parser.parse_args(
        ["--config_file", str(ROOT / "recipes/accelerate" / config), "--mixed_precision", "no", "x"]
    )
    args, defaults, _ = launch._validate_launch_command(args)
    args.deepspeed_fields_from_accelerate_config = ",".join(defaults.deepspeed_config)
    env = launch.prepare_multi_gpu_env(args) if not args.use_deepspeed else launch.prepare_deepspeed_cmd_env(args)[1]
    own = {
        "ACCELERATE_USE_CPU": "true",
        "OMP_NUM_THREADS": "1",
        "SPARSELORA_CACHE": str(tmp / "cache"),
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")]),
    }
    return {**env, **own}


def start(engine: str, results, cases: list[str]) -> subprocess.Popen:
    """Two processes at work on a list of cases."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", f"--master_port={port}"]
    script = [str(ROOT / "tests/distributed_run.py"), engine, str(results), *cases]
    env = environment(f"{engine}.yaml", results)
    with open(results / f"{engine}.log", "a") as log:
        return subprocess.Popen([*command, *script], env=env, stdout=log, stderr=log)


@pytest.fixture(scope="module")
def ddp(tmp_path_factory):
    """Results of all cases under DDP, of a run killed at step 4 and of what was resumed from its checkpoints."""
    results = tmp_path_factory.mktemp("ddp")
    launched = start("ddp", results, [*DDP, "killed"])
    assert launched.wait() != 0, "the last case kills its processes"
    assert not (results / "killed" / "checkpoint-5").exists()
    finish(start("ddp", results, ["resumed saved 1", "resumed killed 3"]), results / "ddp.log")
    return results


@pytest.fixture(scope="module")
def fsdp2(tmp_path_factory):
    results = tmp_path_factory.mktemp("fsdp2")
    finish(start("fsdp2", results, [*SHARDED, "resumed saved 1", "resumed saved 3"]), results / "fsdp2.log")
    return results


def finish(launched: subprocess.Popen, log: Path) -> None:
    assert launched.wait() == 0, log.read_text()[-4000:]


@pytest.fixture
def ranks(request):
    """Function from a case to what each rank found, under the engine that the test names."""
    return lambda engine, case: json.loads((request.getfixturevalue(engine) / f"{case}.json").read_text())


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """Function from a case to what one process finds, each run once."""
    runs = {}

    def run(case, **changes):
        key = (case, *changes.items())
        if key not in runs:
            runs[key] = distributed_run.run(tmp_path_factory.mktemp("alone"), case, **changes)
        return runs[key]

    return run


def accumulated(alone, case):
    """One process that takes the micro-batches of two in turn."""
    return alone(case, gradient_accumulation_steps=2)


def steps(losses: list[float], parts: int) -> list[float]:
    return [sum(losses[i : i + parts]) for i in range(0, len(losses), parts)]


def mean(ranks: list[dict]) -> list[float]:
    """Loss of each step: the mean over ranks, each of which counts its tokens double."""
    return [sum(losses) / len(losses) for losses in zip(*(rank["losses"] for rank in ranks), strict=True)]


ALL = [("ddp", case) for case in DDP] + [("fsdp2", case) for case in SHARDED]


@pytest.mark.parametrize(("engine", "case"), ALL, ids=[f"{engine}-{case}" for engine, case in ALL])
def test_losses_are_those_of_one_process_that_accumulates(ranks, alone, engine, case):
    want = accumulated(alone, case)
    assert mean(ranks(engine, case)) == pytest.approx(steps(want["losses"], 2), rel=TOLERANCE)


@pytest.mark.parametrize("engine", ["ddp", "fsdp2"])
@pytest.mark.parametrize("case", ["exact", "fixed sets"])
def test_losses_are_those_of_one_process_with_the_global_batch(ranks, alone, engine, case):
    want = alone(case, per_device_train_batch_size=4)
    assert mean(ranks(engine, case)) == pytest.approx(want["losses"], rel=TOLERANCE)


@pytest.mark.parametrize("case", DDP)
def test_gradients_are_those_of_one_process(ranks, alone, case):
    first, second = (rank["gradients"] for rank in ranks("ddp", case))
    assert first == second
    for name, want in accumulated(alone, case)["gradients"].items():
        assert first[name] == pytest.approx(want, rel=1e-3, abs=1e-3 * max(map(abs, want))), name


@pytest.mark.parametrize(("engine", "name"), [("ddp", "DistributedDataParallel"), ("fsdp2", "FSDP")])
def test_the_engine_is_the_one_meant(ranks, engine, name):
    assert all(name in rank["engine"] for rank in ranks(engine, "exact"))


@pytest.mark.parametrize(("engine", "case"), [("ddp", "fixed sets"), ("ddp", "svd_whitened"), ("fsdp2", "fixed sets")])
def test_all_ranks_fit_the_same_to_what_all_have_seen(ranks, alone, engine, case):
    first, second = (rank["fitted"] for rank in ranks(engine, case))
    assert first == second
    want = accumulated(alone, case)["fitted"]
    assert first.keys() == want.keys() and first
    scores = [name for name in want if name.startswith("scores")]
    for name in scores:
        assert first[name] == pytest.approx(want[name], rel=1e-3), name


@pytest.mark.parametrize("engine", ["ddp", "fsdp2"])
def test_rank_0_alone_writes(ranks, engine):
    first, second = (rank["written"] for rank in ranks(engine, "saved"))
    assert second == []
    assert {"sparselora_config.yaml", "sparselora_calibration.safetensors"} <= set(first)


RESUMED = [("ddp", "saved", 1), ("ddp", "killed", 3), ("fsdp2", "saved", 1), ("fsdp2", "saved", 3)]


@pytest.mark.parametrize(("engine", "run", "step"), RESUMED, ids=lambda value: str(value))
def test_a_run_that_was_stopped_or_killed_goes_on(ranks, engine, run, step):
    """From step 1 the sample of dense steps is not fitted yet, and each rank held a part of it."""
    resumed, uninterrupted = ranks(engine, f"resumed {run} {step}"), ranks(engine, "saved")
    assert mean(resumed) == pytest.approx(mean(uninterrupted)[step:], rel=TOLERANCE)


def test_a_cache_that_both_processes_built_is_whole(ddp):
    from safetensors import safe_open

    files = list((ddp / "cache").rglob("*"))
    assert not [path for path in files if path.suffix == ".tmp"]
    factors = [path for path in files if path.is_file()]
    assert factors
    for path in factors:
        with safe_open(path, framework="pt") as file:
            assert set(file.keys()) == {"down", "up"}


@pytest.mark.parametrize("config", sorted(path.name for path in (ROOT / "recipes/accelerate").glob("*.yaml")))
def test_configurations_are_accelerates(config, tmp_path):
    env = environment(config, tmp_path)
    assert env["ACCELERATE_MIXED_PRECISION"] == "no"
    assert (env.get("FSDP_VERSION") == "2") is (config == "fsdp2.yaml")
    assert (env.get("ACCELERATE_DEEPSPEED_ZERO_STAGE") == "2") is (config == "zero2.yaml")
