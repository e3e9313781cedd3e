"""The GPU benchmark as far as it goes without one: its command lines, and what each script writes."""

import csv
import importlib
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from helpers import ROOT

from sparselora_hf import SparseLoraConfig
from sparselora_hf.kernels.choice import Choice, shape_key

BENCH = ROOT / "recipes" / "bench"
SCRIPTS = ("setup", "step", "attach", "kernel_times", "profile_step")
TINY = ["--device", "cpu", "--model", "llama-3-8b", "--layers", "1", "--hidden", "64"]


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCH))
    yield SimpleNamespace(**{name: importlib.import_module(name) for name in SCRIPTS})
    for name in SCRIPTS:
        sys.modules.pop(name)


def rows_of(path):
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


@pytest.fixture
def gpu_sh(tmp_path):
    """Runs `gpu.sh` with an interpreter that only notes its arguments; returns them by script."""

    def run(**variables):
        record, python = tmp_path / "record", tmp_path / "python"
        python.write_text(f'#!/bin/sh\n(printf "%s\\037" "$@"; printf "\\036") >> {record}\n', encoding="utf-8")
        python.chmod(0o755)
        environment = {**os.environ, "SPARSELORA_PYTHON": str(python), "SPARSELORA_BENCH_OUT": str(tmp_path / "out")}
        done = subprocess.run(
            ["bash", str(BENCH / "gpu.sh")], env={**environment, **variables}, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        assert "failed" not in done.stdout
        assert done.stderr == ""
        calls = [call.split("\037")[:-1] for call in record.read_text(encoding="utf-8").split("\036")[:-1]]
        return [(call[0].rpartition("/")[2], call[1:]) for call in calls if call[0].endswith(".py")]

    return run


@pytest.mark.parametrize("smoke", [False, True], ids=["gpu", "smoke"])
def test_every_line_of_the_gpu_run_is_understood(bench, gpu_sh, smoke):
    """Each command parses; figures of different subjects go to different files."""
    parsers = {"step.py": bench.step, "profile_step.py": bench.step}
    parsers |= {"attach.py": bench.attach, "kernel_times.py": bench.kernel_times}
    calls = []
    for script, argv in gpu_sh(SPARSELORA_BENCH_SMOKE="1" * smoke):
        parts = bench.step.split(argv) if script == "step.py" else [argv]
        calls += [(script, parsers[script].parse(part)) for part in parts]
    steps = [args for script, args in calls if script == "step.py"]
    subjects = {}
    for args in steps:
        SparseLoraConfig.from_dict(bench.step.sparse_settings(args).to_dict())
        subject = (args.csv.name, args.model, args.sequence, args.output, args.batch, args.checkpointing)
        subjects.setdefault(subject, []).append(args.variants)
    assert {script for script, _ in calls} == parsers.keys()
    if smoke:
        return
    assert all(args.device == "cuda" for _, args in calls)
    told_nothing = [args for args in steps if args.sparse == "default"]
    assert [bench.step.sparse_settings(args).criterion for args in told_nothing] == ["output"] * 2
    assert [(args.csv.name, args.checkpointing) for args in told_nothing] == [
        ("step-default-cuda.csv", False),
        ("step-default-cuda.csv", True),
    ]
    once = [names for key, names in subjects.items() if key[0] == "step-cuda.csv"]
    launched_and_replayed = ["sft", "sparse", "sparse_graphs"]
    whole_rows, padded_rows = once[0]
    assert (whole_rows, padded_rows) == (["sft", "exact", "sparse", "sparse_graphs"], launched_and_replayed)
    assert sorted(once[1:]) == [[["sft", "exact", "exact_graphs"]]] + [[launched_and_replayed]] * 5
    quantised = [(args.quantization, args.checkpointing) for args in steps if args.csv.name == "step-qlora-cuda.csv"]
    assert quantised == [("nf4", True)]
    beside_liger = {key[2:-1]: names for key, names in subjects.items() if key[0] == "step-liger-cuda.csv"}
    protocols = ((512, 128, 8), (512, 3, 8), (1024, 512, 6), (2048, 512, 2))
    assert beside_liger == {protocol: [["sft_liger", "sparse", "sparse_graphs"]] for protocol in protocols}


def test_a_single_step_by_name(gpu_sh):
    assert [script for script, _ in gpu_sh(SPARSELORA_BENCH_ONLY="attach")] == ["attach.py"]


def test_several_measurements_in_a_process(bench, monkeypatch, capsys):
    """Each is told what all are told and what it alone is; one that fails leaves the others be."""
    ran = []
    monkeypatch.setattr(bench.step, "run", lambda argv: ran.append(argv) or 1 / (len(ran) - 1))
    assert bench.step.main(["--batch", "1", "--then", "--batch", "2", "--fill", "0.5", "--then"]) == 1
    assert ran == [["--batch", "1"], ["--batch", "1", "--batch", "2", "--fill", "0.5"]]
    assert "ZeroDivisionError" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        bench.step.main(["--batch", "1", "--then", "--batch", "many"])
    assert len(ran) == 2


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--model", "{folder}"), "step.py: error: Unrecognized model in"),
        (("--sparse", "{{rnk: 8}}"), "step.py: error: Unknown SparseLoRA setting rnk"),
        (("--sparse", "{{rank: 8"), "step.py: error: while parsing a flow mapping"),
    ],
    ids=["model", "setting", "syntax"],
)
def test_what_cannot_be_measured_is_one_line(bench, tmp_path, monkeypatch, capsys, flags, message):
    monkeypatch.setattr(sys, "argv", ["step.py"])
    (tmp_path / "config.json").write_text("{}", encoding="utf-8")
    with pytest.raises(SystemExit):
        bench.step.main([flag.format(folder=tmp_path) for flag in flags])
    assert message in capsys.readouterr().err.splitlines()[-1]


def test_plots_are_made_where_they_are_asked_for(tmp_path):
    pytest.importorskip("matplotlib")
    command = [sys.executable, str(BENCH / "plot.py"), "--output-dir", str(tmp_path / "new" / "plots")]
    subprocess.run(command, check=True)
    assert len(list((tmp_path / "new" / "plots").glob("step-cpu-*.png"))) == 3
    done = subprocess.run([*command, "--csv", str(tmp_path / "none.csv")], capture_output=True, text=True)
    assert (done.returncode, "none.csv is no file of rows" in done.stderr) == (2, True)


def test_help_on_the_picture_draws_none():
    pytest.importorskip("matplotlib")
    picture = BENCH / "results" / "overview.png"
    before = picture.stat().st_mtime_ns
    done = subprocess.run([sys.executable, str(BENCH / "picture.py"), "--help"], capture_output=True, text=True)
    assert (done.returncode, "README's picture" in done.stdout) == (0, True)
    assert picture.stat().st_mtime_ns == before


def test_a_model_is_made_once(bench):
    first, same, other = (bench.step.parse([*TINY, "--batch", batch, *more]) for batch, more in
                          (("1", []), ("2", []), ("2", ["--layers", "2"])))  # fmt: skip
    model = bench.step.make_model(first)
    assert bench.step.make_model(same) is model is not bench.step.make_model(other)


def test_what_a_turn_exchanges_is_put_back(bench):
    """Liger puts its functions into the file of a model's family; the next variant takes the family's own."""
    model = bench.step.make_model(bench.step.parse([*TINY]))
    family = sys.modules[type(model).__module__]
    own = dict(vars(family))
    with pytest.raises(ZeroDivisionError), bench.step.family_as_it_was(model):
        family.apply_rotary_pos_emb = family.of_liger = None
        1 / 0  # noqa: B018
    assert vars(family) == own


def test_wheels_that_do_not_fit_end_the_run(tmp_path):
    (tmp_path / "bad-1.0-py2-none-any.whl").write_bytes(b"")
    environment = {**os.environ, "SPARSELORA_PYTHON": sys.executable, "SPARSELORA_WHEELS": str(tmp_path)}
    environment["SPARSELORA_BENCH_OUT"] = str(tmp_path / "out")
    done = subprocess.run(["bash", str(BENCH / "gpu.sh")], env=environment, capture_output=True, text=True)
    assert done.returncode == 1
    assert "not a supported wheel" in done.stderr
    assert done.stdout == ""


def test_attach_writes_what_it_measured(bench, tmp_path):
    assert bench.attach.main([*TINY, "--repeats", "1", "--csv", str(tmp_path / "a.csv")]) == 0
    [row] = rows_of(tmp_path / "a.csv")
    assert (row["layers"], row["of"], row["sparse_parts"]) == ("1", "32", "2")
    assert all(float(row[name]) > 0 for name in ("cold", "cold_cpu", "cached", "cached_cpu"))


def test_layers_are_cut_from_the_middle_of_the_schedule(bench):
    config = bench.attach.cut(SparseLoraConfig.from_preset("llama-3-8b-math"), 2, 32)
    mlp, attention = config.layer_sparsity(2)
    assert (mlp, attention) == ([0.99, 0.99], [0.75, 0.75])


class Turns:
    """A trainer that trains nothing and has its timer filled."""

    def __init__(self, args, variant, model, steps, callbacks):
        self.timer, self.steps, self.compute_loss_context_manager = callbacks[0], steps, None

    def train(self):
        self.timer.steps += [0] * self.steps
        self.timer.forward += [0] * self.steps


@pytest.mark.parametrize(("device", "want"), [("cpu", {}), ("cuda", {"sft": 7, "sparse": 9})])
def test_peak_memory_of_a_gpu_is_that_of_the_turns(bench, monkeypatch, device, want):
    peaks = iter([5, 4, 7, 9])  # two rounds of two variants
    monkeypatch.setattr(bench.step, "make_model", lambda _: SimpleNamespace(config=None))
    monkeypatch.setattr(bench.step.ModelShape, "from_config", lambda _: None)
    monkeypatch.setattr(bench.step, "make_trainer", Turns)
    monkeypatch.setattr(bench.step, "reset_peak_memory", lambda: None)
    monkeypatch.setattr(bench.step, "peak_memory", lambda: next(peaks))
    args = bench.step.parse(["--device", device, "--variants", "sft", "sparse", "--rounds", "2"])
    timers, _, _, found = bench.step.measure(args)
    assert found == want
    assert [len(timer.steps) for timer in timers.values()] == [6, 6]


@pytest.mark.parametrize(
    ("sparse", "dropped"), [("{mlp_sparsity: 0.9, criterion: svd}", 1), ("{mlp_sparsity: 0.9, criterion: static}", 2)]
)
def test_steps_that_warm_up_or_fit_are_not_counted(bench, monkeypatch, sparse, dropped):
    lengths = []

    class Counted(Turns):
        def train(self):
            lengths.append(self.steps)
            self.timer.steps += range(self.steps)
            self.timer.forward += range(self.steps)

    monkeypatch.setattr(bench.step, "make_model", lambda _: SimpleNamespace(config=None))
    monkeypatch.setattr(bench.step.ModelShape, "from_config", lambda _: None)
    monkeypatch.setattr(bench.step, "make_trainer", Counted)
    turns = ["--variants", "sft", "--rounds", "2", "--steps", "3"]
    args = bench.step.parse(["--device", "cpu", *turns, "--sparse", sparse])
    timers, *_ = bench.step.measure(args)
    assert timers["sft"].steps == timers["sft"].forward == [dropped, dropped + 1, dropped + 2] * 2
    assert lengths == [3 + dropped] * 2


def test_kernel_times_that_are_cut_short_are_kept(bench, tmp_path, monkeypatch):
    times = iter([1.0] * 10)  # two ceilings, and two operations with a backward, two turns each
    monkeypatch.setattr(bench.kernel_times, "median_ms", lambda *_: next(times))
    with pytest.raises(RuntimeError, match="StopIteration"):
        bench.kernel_times.main(["--device", "cpu", "--tiny", "--dtype", "fp32", "--csv", str(tmp_path / "k.csv")])
    assert [row["operation"] for row in rows_of(tmp_path / "k.csv")] == ["rows", "rows", "columns", "columns"]


@pytest.mark.parametrize(
    ("operation", "op", "width", "keep", "forward", "backward"),
    [
        ("rms norm", "norm", 64, 64, 2.0, 3.0),
        ("activation", "activation", 160, 160, 3.0, 5.0),
        ("rotary", "rotary", 64, 16, 3.0, 3.0),  # queries, keys a quarter as wide, and as many angles
    ],
)
def test_floor_of_what_memory_bounds_is_its_passes(bench, monkeypatch, operation, op, width, keep, forward, backward):
    times, tiny = bench.kernel_times, bench.kernel_times.TINY
    monkeypatch.setattr(times, "median_ms", lambda *_: 1.0)
    rows = list(times.measure("tiny", tiny, "cpu", torch.float32, (4.0 * tiny.tokens * width, 1e30)))
    floors = {row["direction"]: row["floor_ms"] for row in rows if row["operation"] == operation}
    assert floors == {"forward": forward, "backward": backward}
    assert times.fastest(rows)[shape_key(op, torch.float32, tiny.tokens, width, keep)] == ["torch", 0]


def test_the_better_of_two_turns_counts(bench, monkeypatch):
    """The ways take turns, so that a host that is held up for a while does not decide between them."""
    times = bench.kernel_times
    subject, order = next(times.subjects(times.TINY, "cpu", torch.float32)), []
    monkeypatch.setattr(times, "ways_of", lambda _: [Choice("torch"), Choice("triton")])
    monkeypatch.setattr(times, "_turn", lambda _, way, __: order.append(way.way) or [("forward", len(order))])
    monkeypatch.setattr(times, "TURNS", 2)
    assert [(way.way, ms) for way, _, ms in times.times_of(subject, "cpu")] == [("torch", 1), ("triton", 2)]
    assert order == ["torch", "triton", "torch", "triton"]


def test_every_kernel_has_its_group_in_the_profile(bench):
    pytest.importorskip("triton", reason="Triton is there on Linux only")
    from sparselora_hf.kernels.compiled import CASES

    names = {case.kernel.__name__ for case in CASES}
    groups = {name: bench.profile_step.group_of(name) for name in names}
    assert {name for name, group in groups.items() if group == "norm and element-wise"} == {
        "mlp_activation_fwd_kernel",
        "mlp_activation_bwd_kernel",
        "rms_norm_fwd_kernel",
        "rms_norm_bwd_kernel",
        "rotary_kernel",
    }
    assert set(groups.values()) == {"sparse kernels", "estimator", "norm and element-wise"}


def test_the_profile_counts_a_wait_once_and_copies_of_the_device_not_at_all(bench):
    def event(key, kernel=False, count=1):
        device = torch.autograd.DeviceType.CUDA if kernel else torch.autograd.DeviceType.CPU
        times = {"self_device_time_total": 1e3 * kernel, "self_cpu_time_total": 1e3}
        return SimpleNamespace(key=key, count=count, device_type=device, is_user_annotation=False, **times)

    cast = "void at::native::(anonymous namespace)::multi_tensor_apply_kernel<TensorListMetadata<2>, CopyFunctor<>>"
    events = [
        event("aten::_local_scalar_dense"),
        event("cudaMemcpyAsync", count=4),
        event("cudaStreamSynchronize"),
        event("Memcpy DtoH (Device -> Pinned)", kernel=True),
        event("Memcpy HtoD (Pinned -> Device)", kernel=True, count=2),
        event("Memcpy DtoD (Device -> Device)", kernel=True),
        event(cast, kernel=True),
    ]
    times, calls, counts = bench.profile_step.summarise(events, True)
    assert (counts["waits"], counts["copies between host and device"]) == (1, 3)
    assert times == {"copy and fill": 4.0}
    assert calls == {"copy and fill": 5}
    assert bench.profile_step.summarise(events[:1], False)[2]["waits"] == 1


def test_a_machine_without_git_measures_all_the_same(bench, monkeypatch):
    assert bench.step.environment("cpu")["commit"]

    def missing(*_, **__):
        raise FileNotFoundError("git")

    monkeypatch.setattr(bench.step.subprocess, "run", missing)
    assert bench.step.environment("cpu")["commit"] == ""
