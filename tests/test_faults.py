"""Things going wrong: what is left of model, cache and checkpoint, and how a run goes on."""

import contextlib
import json
import multiprocessing
import os
import signal

import pytest
import torch
from helpers import SPARSE, assert_same, assert_untouched, lora_model, loss_and_gradients, make_batch, snapshot
from training import examples, make_trainer, trained
from transformers import TrainerCallback, TrainerState

from sparselora_hf import files, sparsify, svd_cache
from sparselora_hf.cli import quickstart
from sparselora_hf.cli.main import main
from sparselora_hf.handle import CALIBRATION_FILE
from sparselora_hf.svd_cache import SvdCache

STATIC = SPARSE.replace(criterion="static", compensation="low_rank", compensation_rank=4)
SAVING = {"save_strategy": "steps", "save_steps": 1}


def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)


class Nth:
    """Calls through, but the n-th time something else."""

    def __init__(self, n: int, through, instead) -> None:
        self.left, self.through, self.instead = n, through, instead

    def __call__(self, *args, **kwargs):
        self.left -= 1
        return (self.instead if self.left == 0 else self.through)(*args, **kwargs)


def in_a_process_that_dies(function, *args, **kwargs) -> None:
    process = multiprocessing.get_context("fork").Process(target=function, args=args, kwargs=kwargs)
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL


# the cache of SVD factors


def factors_of(model) -> dict:
    with sparsify(model, SPARSE) as handle:
        return handle.state.criterion.factors


@pytest.mark.parametrize("place", ["SVD", "write"])
def test_killed_while_the_cache_is_built(tmp_path, place, monkeypatch):
    """What had been written whole is used, the rest is computed, half a file is never taken for one."""
    want = factors_of(lora_model())
    monkeypatch.setenv("SPARSELORA_CACHE", str(tmp_path / "shared"))
    with monkeypatch.context() as patch:
        if place == "SVD":
            patch.setattr(svd_cache, "truncated_svd", Nth(3, svd_cache.truncated_svd, die))
        else:
            patch.setattr(files.os, "replace", Nth(3, os.replace, die))
        in_a_process_that_dies(sparsify, lora_model(), SPARSE)
    assert len(list((tmp_path / "shared").rglob("*.safetensors"))) == 2
    hits = []
    monkeypatch.setattr(SvdCache, "_read", lambda *a, read=SvdCache._read: hits.append(read(*a)) or hits[-1])
    got = factors_of(lora_model())
    assert sum(hit is not None for hit in hits) == 2
    assert got.keys() == want.keys()
    assert all(torch.equal(got[key].down, want[key].down) for key in want)


def full_disk(dir, **_):
    return os.open("/dev/full", os.O_WRONLY), str(dir / "unused")


@pytest.mark.parametrize("fault", ["full disk", "read-only"])
def test_cache_that_takes_nothing(tmp_path, fault, monkeypatch, caplog):
    """One warning that names the folder; the run goes on with the same factors."""
    want = factors_of(lora_model())
    folder = "/proc/sparselora" if fault == "read-only" else str(tmp_path / "full")
    monkeypatch.setenv("SPARSELORA_CACHE", folder)
    if fault == "full disk":
        monkeypatch.setattr(files.tempfile, "mkstemp", full_disk)
    got = factors_of(lora_model())
    assert caplog.text.count(f"SVD cache {folder} cannot be written") == 1
    assert all(torch.equal(got[key].up, want[key].up) for key in want)


# checkpoints


def half_a_state(self, path):
    with open(path, "w") as file:
        file.write(json.dumps({"global_step": 3, "max_steps": 6})[:-5])
    die()


@pytest.mark.parametrize("place", ["statistics", "trainer state", "before the end"])
def test_killed_while_a_checkpoint_is_written(tmp_path, place, monkeypatch, caplog):
    """The newest whole checkpoint is taken; the losses are those of a run that nobody stopped."""
    whole = trained(tmp_path / "whole", STATIC, **SAVING)
    with monkeypatch.context() as patch:
        if place == "statistics":
            patch.setattr(files.os, "replace", Nth(5, os.replace, die))  # two files a checkpoint: those of the third
        else:
            instead = half_a_state if place == "trainer state" else die
            save = TrainerState.save_to_json
            calls = Nth(3, save, instead)
            patch.setattr(TrainerState, "save_to_json", lambda self, path: calls(self, path))
        in_a_process_that_dies(trained, tmp_path / "run", STATIC, **SAVING)
    assert (tmp_path / "run" / "checkpoint-3").is_dir()
    resumed = trained(tmp_path / "run", STATIC, resume=True, **SAVING)
    assert resumed.losses == pytest.approx(whole.losses[2:], rel=1e-6)
    assert "checkpoint-3 was not written to its end" in caplog.text


def test_killed_while_the_only_checkpoint_is_written(tmp_path, caplog):
    """The error is that of a folder without a checkpoint, not of the one that was passed over."""
    trained(tmp_path, STATIC, **SAVING | {"save_steps": 6})
    (tmp_path / "checkpoint-6" / "trainer_state.json").unlink()
    with pytest.raises(ValueError, match=r"No valid checkpoint found .* start from the beginning"):
        trained(tmp_path, STATIC, resume=True, **SAVING)
    assert "checkpoint-6 was not written to its end" in caplog.text


def test_disk_full_at_a_checkpoint(tmp_path, monkeypatch):
    """The error of the system is the run's; the model is dense, and the checkpoint before is whole."""
    whole = trained(tmp_path / "whole", STATIC, **SAVING)
    trainer = make_trainer(tmp_path / "run", STATIC, **SAVING)
    with monkeypatch.context() as patch:
        patch.setattr(files.tempfile, "mkstemp", Nth(5, files.tempfile.mkstemp, full_disk))
        with pytest.raises(OSError, match="No space left"):
            trainer.train()
    assert not trainer.sparse_handle.enabled
    resumed = trained(tmp_path / "run", STATIC, resume=True, **SAVING)
    assert resumed.losses == pytest.approx(whole.losses[2:], rel=1e-6)


def test_damaged_statistics_are_refused(tmp_path):
    trained(tmp_path, STATIC, max_steps=4, **SAVING)
    file = tmp_path / "checkpoint-4" / CALIBRATION_FILE
    file.write_bytes(file.read_bytes()[:-8])
    with pytest.raises(ValueError, match=r"is damaged .*Resume from another checkpoint, or delete the file"):
        trained(tmp_path, STATIC, resume=True)
    file.unlink()
    assert len(trained(tmp_path, STATIC, resume=True).losses) == 2


# numbers


def poisoned(model, value, position):
    return model.get_input_embeddings().register_forward_hook(
        lambda module, args, out: out.index_fill(1, torch.tensor(position), value)
    )


@pytest.mark.parametrize("value", [float("nan"), float("inf")], ids=["NaN", "inf"])
@pytest.mark.parametrize("criterion", ["svd", "svd_mean", "sampled", "random"])
def test_broken_hidden_states_in_a_sparse_step(value, criterion, batch):
    """The loss says so, as a dense one would; the next batch is what it would have been."""
    model = lora_model()
    with sparsify(model, SPARSE.replace(criterion=criterion)) as handle:
        handle.set_enabled(True)
        handle.state.step = 0
        want = loss_and_gradients(model, batch)
        hook = model.get_input_embeddings().register_forward_hook(
            lambda m, a, out: out.index_fill(1, torch.tensor(2), value)
        )
        assert not loss_and_gradients(model, batch)[0].isfinite()
        hook.remove()
        handle.state.step = 0
        assert_same(loss_and_gradients(model, batch), want, 1e-7)


@pytest.mark.parametrize("criterion", ["static", "output", "svd_whitened"])
def test_broken_hidden_states_in_a_dense_step_teach_nothing(criterion, batch):
    model = lora_model()
    config = STATIC.replace(criterion=criterion)
    with sparsify(model, config) as handle:
        loss_and_gradients(model, make_batch(seed=4))
        hook = poisoned(model, float("nan"), [8])  # late: causal attention keeps the tokens before it whole
        loss_and_gradients(model, batch)
        hook.remove()
        handle.set_enabled(True)
        loss, grads = loss_and_gradients(model, batch)
    assert loss.isfinite()
    assert all(grad.isfinite().all() for grad in grads.values())


def test_nothing_but_broken_hidden_states(batch):
    model = lora_model()
    with sparsify(model, STATIC) as handle:
        hook = poisoned(model, float("inf"), [0])
        loss_and_gradients(model, batch)
        hook.remove()
        with pytest.raises(RuntimeError, match=r"diverged before sparsity started: lower the learning rate"):
            handle.set_enabled(True)


# exceptions on the way


OUT_OF_MEMORY = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
ERRORS = {"error": RuntimeError("broken"), "Ctrl-C": KeyboardInterrupt(), "CUDA out of memory": OUT_OF_MEMORY}


class Thrower:
    """Raises once, from the n-th call on a module."""

    def __init__(self, module, n: int, error: BaseException, backward: bool = False) -> None:
        self.left, self.error, self.backward = n, error, backward
        self.hook = module.register_forward_hook(self)

    def __call__(self, module, args, output):
        self.left -= 1
        if self.left == 0 and self.backward:
            output.register_hook(self.throw)
        elif self.left == 0:
            self.throw()

    def throw(self, *_):
        self.hook.remove()
        raise self.error


class AfterStep3(TrainerCallback):
    def __init__(self, error):
        self.error = error

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 3 and self.error:
            error, self.error = self.error, None
            raise error


@pytest.mark.parametrize("place", ["forward", "backward", "evaluation", "callback"])
@pytest.mark.parametrize("error", ERRORS.values(), ids=ERRORS.keys())
def test_a_run_that_ends_in_an_error(tmp_path, place, error):
    """The model is dense and usable, trains again from its checkpoint, and comes back without a trace."""
    model = lora_model()
    before = snapshot(model)
    settings = SAVING | {"eval_dataset": examples(2), "eval_strategy": "steps", "eval_steps": 1, "learning_rate": 0.0}
    extra = {"callbacks": [AfterStep3(error)]} if place == "callback" else {}
    trainer = make_trainer(tmp_path, STATIC, model=model, **settings, **extra)
    mlp = model.base_model.model.model.layers[1].mlp
    if place != "callback":
        calls = {"forward": 5, "backward": 5, "evaluation": 4}[place]  # each step calls it twice, the evaluation last
        Thrower(mlp, calls, error, backward=place == "backward")
    with pytest.raises(type(error)):
        trainer.train()
    state = trainer.sparse_handle.state
    assert (state.enabled, state.batch, state.pinned, state.head_rows, state.set_aside) == (
        False,
        None,
        False,
        None,
        [],
    )
    dense = make_trainer(tmp_path / "dense", eval_dataset=examples(2)).evaluate()["eval_loss"]
    assert trainer.evaluate()["eval_loss"] == pytest.approx(dense, rel=1e-6)
    trainer.train(resume_from_checkpoint=True)
    assert trainer.state.global_step == 6
    trainer.sparse_handle.restore()
    after = snapshot(model)
    assert {name: kind for name, (kind, _, _) in after["modules"].items()} == {
        name: kind for name, (kind, _, _) in before["modules"].items()
    }


def test_out_of_memory_with_a_batch_size_to_be_found(tmp_path):
    """The second try starts from nothing: it is the run of the smaller batch size."""
    want = trained(tmp_path, STATIC, per_device_train_batch_size=3)
    trainer = make_trainer(tmp_path, STATIC, per_device_train_batch_size=4, auto_find_batch_size=True)
    Thrower(trainer.model.base_model.model.model.layers[2].mlp, 1, OUT_OF_MEMORY)
    trainer.train()
    assert trainer._train_batch_size == 3
    assert trainer.losses == pytest.approx(want.losses, rel=1e-6)


@pytest.mark.parametrize("criterion", ["static", "output", "svd_whitened"])
@pytest.mark.parametrize("first", [True, False], ids=["first step", "second"])
def test_a_forward_that_ends_in_an_error_teaches_nothing(criterion, first, batch):
    """A loop that skips a batch for which memory was short: the layers above the error saw nothing of it."""
    config, got = STATIC.replace(criterion=criterion), []
    for broken in (True, False):
        model = lora_model()
        layer = model.base_model.model.model.layers[1].mlp
        with sparsify(model, config) as handle:
            for seed in (4, 5) if first else (5, 4):
                hook = layer.register_forward_pre_hook(lambda *_: 1 / 0) if broken and seed == 4 else None
                with pytest.raises(ZeroDivisionError) if hook else contextlib.nullcontext():
                    model(**make_batch(seed=seed))
                if hook:
                    hook.remove()
            sample = handle.state.calibration._sample("mlp.1")
            got.append(sample)
            handle.set_enabled(True)
            assert loss_and_gradients(model, batch)[0].isfinite()
    part, whole = got
    assert 0 < len(part) < len(whole)
    assert all((whole == row).all(1).any() for row in part)  # nothing is made up


def test_nothing_but_forwards_that_end_in_an_error(batch):
    model = lora_model()
    with sparsify(model, STATIC) as handle:
        Thrower(model.base_model.model.model.layers[0].mlp, 1, OUT_OF_MEMORY)
        with pytest.raises(torch.OutOfMemoryError):
            model(**batch)
        with pytest.raises(RuntimeError, match="let one dense step run to its end"):
            handle.set_enabled(True)


def test_error_in_a_plain_trainers_forward_leaves_a_model_that_restores(batch):
    model = lora_model()
    before, want = snapshot(model), loss_and_gradients(model, batch)
    handle = sparsify(model, SPARSE)
    handle.set_enabled(True)
    Thrower(model.base_model.model.model.layers[1].mlp, 1, KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        model(**batch)
    handle.restore()
    assert_untouched(model, before)
    assert_same(loss_and_gradients(model, batch), want, 1e-7)


# the command line


def test_interrupted_command_is_one_line(tmp_path, monkeypatch, capsys):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(quickstart, "main", interrupt)
    assert main(["quickstart", "--output-dir", str(tmp_path / "out")]) == 130
    want = "sparselora: interrupted. Nothing is half written: run the same command again.\n"
    assert capsys.readouterr().err == want
