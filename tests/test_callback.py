"""The callback in a plain `transformers.Trainer`."""

import pytest
import torch
from accelerate import Accelerator
from datasets import Dataset
from helpers import SPARSE, assert_untouched, lora_model, make_batch, snapshot
from training import tokenizer
from transformers import Trainer, TrainerCallback, TrainingArguments, integrations
from transformers.trainer_utils import HPSearchBackend
from trl import DPOConfig, DPOTrainer

from sparselora_hf import SparseLoraCallback, SparseLoraConfig, sparsify
from sparselora_hf.config import CONFIG_FILE
from sparselora_hf.handle import CALIBRATION_FILE

SPARSE = SPARSE.replace(mlp_sparsity=0.9, attention_sparsity={"1": 0.5}, end_step=5)


class _Watch(TrainerCallback):
    """Whether each optimizer step was sparse, as seen when it ends."""

    def __init__(self, handle):
        self.handle = handle
        self.seen = []

    def on_step_end(self, args, state, control, **kwargs):
        batch = self.handle.state.batch
        self.seen.append(batch is not None and batch.sparse)


def rows(n=16):
    batch = make_batch((8,) * n, (3,) * n)
    return [{key: value[i] for key, value in batch.items()} for i in range(n)]


def make_trainer(folder, model, callbacks, model_init=None, trainer_class=Trainer, **settings):
    args = TrainingArguments(
        str(folder),
        **{
            "max_steps": 8,
            "per_device_train_batch_size": 2,
            "learning_rate": 5e-3,
            "logging_steps": 1,
            "save_strategy": "no",
            "report_to": "none",
            "use_cpu": True,
            "disable_tqdm": True,
        }
        | settings,
    )
    data = {"train_dataset": rows(), "eval_dataset": rows(4)}
    return trainer_class(model, args, **data, model_init=model_init, callbacks=callbacks)


def run(folder, config, resume=None, **settings):
    model = lora_model()
    handle = sparsify(model, config)
    watch = _Watch(handle)
    trainer = make_trainer(folder, model, [SparseLoraCallback(handle), watch], **settings)
    trainer.train(resume_from_checkpoint=resume)
    return trainer, handle, watch


def losses(trainer):
    return [log["loss"] for log in trainer.state.log_history if "loss" in log]


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize(
    ("start", "end", "want"),
    [
        (2, 5, [0, 0, 1, 1, 1, 0, 0, 0]),
        (0, 1.0, [1] * 8),
        (0.25, 0.5, [0, 0, 1, 1, 0, 0, 0, 0]),
        (0.05, 1.0, [0] + [1] * 7),
        (3, 3, [0] * 8),
        (8, 100, [0] * 8),
    ],
    ids=str,
)
def test_steps_that_are_sparse(tmp_path, start, end, want, accumulation):
    config = SPARSE.replace(start_step=start, end_step=end)
    _, handle, watch = run(tmp_path, config, gradient_accumulation_steps=accumulation)
    assert watch.seen == [bool(step) for step in want]
    assert not handle.enabled


@pytest.mark.parametrize("step", [1, 3, 6])
def test_schedule_goes_on_after_resuming(tmp_path, step):
    settings = {"save_strategy": "steps", "save_steps": 1}
    whole, _, watch = run(tmp_path, SPARSE, **settings)
    folder = str(tmp_path / f"checkpoint-{step}")
    resumed, _, again = run(tmp_path, SPARSE, resume=folder, **settings)
    assert again.seen == watch.seen[step:]
    assert losses(resumed) == pytest.approx(losses(whole), rel=1e-4)  # the log holds the steps before, too
    assert SparseLoraConfig.from_yaml(folder) == SPARSE


@pytest.mark.parametrize("step", [1, 3])
def test_statistics_go_on_after_resuming(tmp_path, step):
    config = SPARSE.replace(criterion="static", compensation="mean")
    settings = {"save_strategy": "steps", "save_steps": 1}
    whole, _, _ = run(tmp_path, config, **settings)
    resumed, _, _ = run(tmp_path, config, resume=str(tmp_path / f"checkpoint-{step}"), **settings)
    assert losses(resumed) == pytest.approx(losses(whole), rel=1e-4)


class _Interrupt(TrainerCallback):
    """Ctrl-C in the middle of a run, once."""

    def on_optimizer_step(self, args, state, control, **kwargs):
        if state.global_step == 4:
            self.on_optimizer_step = super().on_optimizer_step
            raise KeyboardInterrupt


@pytest.mark.parametrize("criterion", ["svd", "static"])
@pytest.mark.parametrize("step", [1, 2, 3])
def test_a_run_interrupted_in_a_sparse_step_goes_on_in_the_same_trainer(tmp_path, criterion, step):
    config = SPARSE.replace(criterion=criterion, compensation="low_rank", compensation_rank=4)
    settings = {"save_strategy": "steps", "save_steps": 1}
    whole, _, _ = run(tmp_path / "whole", config, **settings)
    trainer = make_trainer(tmp_path, lora_model(), [SparseLoraCallback(config), _Interrupt()], **settings)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    trainer.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}"))
    assert losses(trainer) == pytest.approx(losses(whole), rel=1e-4)


class _Terminated(TrainerCallback):
    """A SIGTERM that the Trainer's own callback finds at its next turn."""

    def __init__(self, event, step):
        self.step = step
        setattr(self, event, self.arrive)

    def arrive(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            self.manager.is_checkpoint_requested = True


@pytest.mark.parametrize(
    ("event", "step"), [("on_step_begin", 3), ("on_pre_optimizer_step", 3), ("on_log", 3), ("on_log", 4)]
)
def test_a_checkpoint_when_the_process_is_ended_holds_statistics(tmp_path, event, step):
    """The Trainer saves at its next event: before the optimizer or behind it, before a step, after an epoch."""
    config = SPARSE.replace(criterion="static", compensation="mean")
    model = lora_model()
    settings = {"enable_jit_checkpoint": True, "gradient_accumulation_steps": 2}
    terminated = _Terminated(event, step)
    trainer = make_trainer(tmp_path, model, [SparseLoraCallback(sparsify(model, config)), terminated], **settings)
    (jit,) = (c for c in trainer.callback_handler.callbacks if type(c).__name__ == "JITCheckpointCallback")
    terminated.manager = jit.jit_manager
    trainer.train()
    assert trainer.state.global_step < 8
    (checkpoint,) = tmp_path.glob("checkpoint-*")
    assert (checkpoint / "trainer_state.json").is_file()
    assert (checkpoint / CALIBRATION_FILE).is_file()
    assert SparseLoraConfig.from_yaml(checkpoint) == config
    trainer, _, _ = run(tmp_path, config, resume=str(checkpoint), **settings)
    assert trainer.state.global_step == 8


def test_without_sparsity_nothing_changes(tmp_path):
    plain = make_trainer(tmp_path, lora_model(), [])
    plain.train()
    exact, _, watch = run(tmp_path, SparseLoraConfig())
    assert losses(exact) == pytest.approx(losses(plain), rel=1e-4)
    assert not any(watch.seen)


@pytest.mark.parametrize("accumulation", [1, 2])
def test_where_nothing_but_the_loss_is_read_the_head_sees_labelled_rows(tmp_path, accumulation):
    """As a plain Trainer's does: losses are the same, and evaluation has all logits."""
    settings = {"gradient_accumulation_steps": accumulation, "eval_strategy": "steps", "eval_steps": 3}
    runs, shapes = [], []
    for callbacks in ([], [SparseLoraCallback(SparseLoraConfig(), loss_only=True)]):
        model = lora_model()
        shapes.append([])
        seen = shapes[-1]
        model.register_forward_hook(lambda m, args, out, seen=seen: seen.append((m.training, *out.logits.shape[:2])))
        trainer = make_trainer(tmp_path, model, callbacks, **settings)
        trainer.train()
        runs.append([log[name] for log in trainer.state.log_history for name in ("loss", "eval_loss") if name in log])
    assert runs[1] == pytest.approx(runs[0], rel=1e-5)
    assert set(shapes[0]) == {(True, 2, 11), (False, 4, 11)}
    assert set(shapes[1]) == {(True, 1, 7), (False, 4, 11)}


def test_the_promise_may_be_made_until_training_begins(tmp_path):
    callback = SparseLoraCallback(SparseLoraConfig())
    trainer = make_trainer(tmp_path, lora_model(), [callback], max_steps=1)
    handle = callback.handle
    assert not handle.loss_only
    callback.loss_only = True
    trainer.train()
    assert handle.loss_only


def test_figures_join_the_log(tmp_path):
    trainer, _, _ = run(tmp_path, SPARSE)
    logs = [log for log in trainer.state.log_history if "loss" in log]
    assert [log["sparselora/channel_sparsity"] > 0.5 for log in logs] == [False] * 2 + [True] * 3 + [False] * 3
    assert {log["sparselora/context_share"] for log in logs} == {round(7 / 11, 4)}


def test_evaluation_in_between_is_dense(tmp_path):
    model = lora_model()
    handle = sparsify(model, SPARSE.replace(start_step=0, end_step=1.0))
    trainer = make_trainer(tmp_path, model, [SparseLoraCallback(handle)], eval_strategy="steps", eval_steps=4)
    trainer.train()
    seen = [log["eval_loss"] for log in trainer.state.log_history if "eval_loss" in log]
    handle.restore()
    with torch.no_grad():
        assert seen[-1] == pytest.approx(trainer.evaluate()["eval_loss"], rel=1e-6)


def test_one_callback_serves_two_runs(tmp_path):
    model = lora_model()
    handle = sparsify(model, SPARSE)
    watch = _Watch(handle)
    trainer = make_trainer(tmp_path, model, [SparseLoraCallback(handle), watch])
    trainer.train()
    trainer.train()
    assert watch.seen == [False, False, True, True, True, False, False, False] * 2


@pytest.mark.parametrize("criterion", ["svd", "static"])
def test_folder_to_save_into_is_made(tmp_path, criterion):
    handle = sparsify(lora_model(), SPARSE.replace(criterion=criterion))
    handle.save(tmp_path / "run" / "checkpoint-1")
    assert SparseLoraConfig.from_yaml(tmp_path / "run" / "checkpoint-1") == handle.config
    assert (tmp_path / "run" / "checkpoint-1" / CONFIG_FILE).is_file()


class _Trial:
    """Optuna's, as far as a Trainer asks."""

    number, params = 0, None


@pytest.mark.parametrize("criterion", ["svd", "static"])
def test_trials_of_a_search_leave_nothing_where_no_checkpoint_is(tmp_path, criterion, monkeypatch):
    monkeypatch.setattr(integrations, "hp_params", lambda trial: {"learning_rate": 1e-3})
    callback = SparseLoraCallback(SPARSE.replace(criterion=criterion))
    settings = {"model_init": lambda trial: lora_model(), "save_strategy": "steps", "save_steps": 4}
    trainer = make_trainer(tmp_path / "out", None, [callback], **settings)
    trainer.hp_search_backend, trainer.hp_space, trainer.hp_name = HPSearchBackend.OPTUNA, integrations.hp_params, None
    trainer.train(trial=_Trial())
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["run-0"]
    assert sorted(path.name for path in (tmp_path / "out" / "run-0").iterdir()) == ["checkpoint-4", "checkpoint-8"]


# a configuration in place of a handle


def run_by_config(folder, callback, added=False, resume=None, **settings):
    model = lora_model()
    trainer = make_trainer(folder, model, [] if added else [callback], **settings)
    if added:
        trainer.add_callback(callback)
    trainer.train(resume_from_checkpoint=resume)
    return trainer, model


@pytest.mark.parametrize(("start", "steps", "warned"), [(1, 1, True), (1, 2, False), (3, 3, True), (2, 0, False)])
def test_run_that_ends_before_sparsity_starts_is_warned_of(start, steps, warned, caplog):
    handle = sparsify(lora_model(), SPARSE.replace(start_step=start))
    handle.begin_run(max_steps=steps)
    assert ("no step of this run is sparse" in caplog.text) is warned


@pytest.mark.parametrize("added", [False, True], ids=["given to the trainer", "added later"])
def test_callback_with_a_configuration_sparsifies_the_model(tmp_path, added):
    config = SPARSE.replace(criterion="static", compensation="mean")
    want, _, _ = run(tmp_path, config)
    got, _ = run_by_config(tmp_path, SparseLoraCallback(config), added)
    assert losses(got) == losses(want)


def test_callback_with_a_configuration_leaves_a_plain_model(tmp_path):
    plain, model = run_by_config(tmp_path, TrainerCallback(), max_steps=1)
    before = snapshot(model)
    callback = SparseLoraCallback(SPARSE.replace(start_step=0))
    for _ in range(2):
        trainer = make_trainer(tmp_path, model, [callback], max_steps=1, learning_rate=0.0)
        assert any("Sparse" in type(module).__name__ for module in model.modules())
        trainer.train()
        assert_untouched(model, before)
        assert losses(trainer)[0] != pytest.approx(losses(plain)[0], rel=1e-4)


def test_callback_with_a_configuration_serves_a_model_that_was_restored(tmp_path):
    callback = SparseLoraCallback(SPARSE)
    trainer = make_trainer(tmp_path, lora_model(), [callback])
    callback.handle.restore()
    trainer.train()
    assert [log["sparselora/channel_sparsity"] > 0 for log in trainer.state.log_history[2:5]] == [True] * 3


def test_callback_whose_handle_was_restored(tmp_path, caplog):
    plain, _ = run_by_config(tmp_path, TrainerCallback())
    model = lora_model()
    handle = sparsify(model, SPARSE.replace(criterion="static"))
    handle.restore()
    trainer = make_trainer(tmp_path, model, [SparseLoraCallback(handle)])
    trainer.train()
    assert losses(trainer) == losses(plain)
    assert "so training is dense" in caplog.text
    assert "no dense step has sampled" not in caplog.text


@pytest.mark.parametrize("added", [False, True], ids=["given to the trainer", "added later"])
def test_models_that_the_trainer_makes_are_sparse(tmp_path, added):
    """By `model_init` a Trainer makes a new model for every run: the one that its callbacks met first never trains."""
    callback, made = SparseLoraCallback(SPARSE), []

    def model_init():
        made.append(lora_model())
        return made[-1]

    trainer = make_trainer(tmp_path, None, [] if added else [callback], model_init=model_init)
    if added:
        trainer.add_callback(callback)
    for runs in (1, 2):
        trainer.train()
        assert len(made) == 1 + runs
        figures = [log["sparselora/channel_sparsity"] > 0 for log in trainer.state.log_history if "loss" in log]
        assert figures == [False] * 2 + [True] * 3 + [False] * 3
    assert not any("Sparse" in type(module).__name__ for model in made for module in model.modules())


def test_handle_of_another_model_is_refused(tmp_path):
    callback = SparseLoraCallback(sparsify(lora_model(), SPARSE))
    with pytest.raises(ValueError, match="handle of another model"):
        make_trainer(tmp_path, lora_model(), [callback]).train()


@pytest.mark.parametrize("step", [1, 3])
@pytest.mark.parametrize("named", [False, True], ids=["found", "named in the arguments"])
def test_callback_with_a_configuration_resumes(tmp_path, step, named):
    config = SPARSE.replace(criterion="static", compensation="mean")
    settings = {"save_strategy": "steps", "save_steps": 1}
    whole, _ = run_by_config(tmp_path / "whole", SparseLoraCallback(config), **settings)
    folder = str(tmp_path / "whole" / f"checkpoint-{step}")
    extra = {"resume_from_checkpoint": folder} if named else {}
    output = tmp_path / ("other" if named else "whole")
    resumed, _ = run_by_config(output, SparseLoraCallback(config), resume=folder, **extra)
    assert losses(resumed) == pytest.approx(losses(whole), rel=1e-4)


@pytest.mark.parametrize("lost", [False, True], ids=["other settings", "file lost"])
def test_statistics_that_cannot_be_taken_are_gathered_anew(tmp_path, lost, caplog):
    """One step more is dense, and it is said why."""
    config = SPARSE.replace(criterion="static", start_step=1)
    settings = {"save_strategy": "steps", "save_steps": 1}
    run_by_config(tmp_path, SparseLoraCallback(config), max_steps=2, **settings)
    if lost:
        (tmp_path / "checkpoint-2" / CALIBRATION_FILE).unlink()
    callback = SparseLoraCallback(config if lost else config.replace(seed=1))
    resumed, _ = run_by_config(tmp_path, callback, resume=str(tmp_path / "checkpoint-2"))
    sparsity = [log["sparselora/channel_sparsity"] for log in resumed.state.log_history if "loss" in log]
    assert [value > 0 for value in sparsity] == [False, True, False, True, True, False, False, False]
    assert caplog.text.count("no dense step has sampled a context token") == 1
    assert "handle.load(checkpoint)" in caplog.text


def test_callback_whose_configuration_does_not_fit(tmp_path):
    model = lora_model()
    before = snapshot(model)
    with pytest.raises(ValueError, match="layer 7 does not exist"):
        make_trainer(tmp_path, model, [SparseLoraCallback(SparseLoraConfig({"7": 0.5}))])
    assert_untouched(model, before)


# other trainers and loops


def preferences(n: int = 8) -> Dataset:
    """Prompts with a better and a worse answer of other lengths."""
    return Dataset.from_list(
        [
            {
                "prompt": " ".join(f"w{(i + t) % 50 + 6}" for t in range(5 + i % 3)) + " ",
                "chosen": f"w{i + 7} w{i + 8}",
                "rejected": f"w{i + 20} w{i + 3} w{i + 4}",
            }
            for i in range(n)
        ]
    )


def preference_losses(folder, config):
    model = lora_model()
    handle = sparsify(model, config) if config else None
    watch = _Watch(handle)
    args = DPOConfig(str(folder), max_steps=4, per_device_train_batch_size=2, learning_rate=5e-3, logging_steps=1,
                     save_strategy="no", report_to="none", use_cpu=True, bf16=False, disable_tqdm=True)  # fmt: skip
    callbacks = [SparseLoraCallback(handle), watch] if handle else []
    trainer = DPOTrainer(
        model, args=args, train_dataset=preferences(), processing_class=tokenizer(), callbacks=callbacks
    )
    trainer.train()
    return losses(trainer), watch


def test_preference_training(tmp_path):
    """`DPOTrainer`: the reference forward, without gradients, lies between a sparse forward and its backward."""
    dense, _ = preference_losses(tmp_path, None)
    exact, _ = preference_losses(tmp_path, SparseLoraConfig())
    sparse, watch = preference_losses(tmp_path, SPARSE.replace(start_step=2, end_step=4))
    plain, _ = preference_losses(tmp_path, SPARSE.replace(start_step=2, end_step=4, exact=False))
    assert exact == pytest.approx(dense, rel=1e-4)
    assert sparse == pytest.approx(plain, rel=1e-4)
    assert watch.seen == [False, False, True, True]
    assert sparse[2:] != pytest.approx(dense[2:], rel=1e-4)


def test_loop_that_forgets_to_begin_its_run():
    with sparsify(lora_model(), SPARSE) as handle, pytest.raises(RuntimeError, match=r"call begin_run\(max_steps"):
        handle.begin_step(0)


@pytest.mark.parametrize(("end", "warned"), [(1.0, 1), (0.5, 1), (9, 0)])
def test_loop_that_is_longer_than_it_said_is_warned_of(end, warned, caplog):
    """As over several epochs, where `begin_run` was given the batches of one."""
    with sparsify(lora_model(), SPARSE.replace(start_step=0, end_step=end)) as handle:
        handle.begin_run(max_steps=4, step=4)
        assert "was given max_steps" not in caplog.text
        for step in range(8):
            handle.begin_step(step)
    assert caplog.text.count("begin_run was given max_steps = 4,") == warned


def test_every_run_that_waits_for_statistics_says_so(caplog):
    with sparsify(lora_model(), SPARSE.replace(criterion="static", start_step=1)) as handle:
        for said in (1, 2):
            handle.begin_run(max_steps=4)
            for step in range(4):
                handle.begin_step(step)
            assert caplog.text.count("no dense step has sampled a context token") == said


def test_loop_of_ones_own(tmp_path):
    """Accelerate and three calls of the handle give the losses of the callback in a Trainer."""
    config = SPARSE.replace(criterion="static", compensation="mean", start_step=1)
    want, _, _ = run(tmp_path, config, max_steps=4, lr_scheduler_type="constant", max_grad_norm=0.0, seed=1)
    accelerator = Accelerator(cpu=True)
    model = lora_model()
    handle = sparsify(model, config)
    loader = make_trainer(tmp_path, model, [], seed=1).get_train_dataloader()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-3, weight_decay=0.0)
    prepared, optimizer = accelerator.prepare(model, optimizer)
    torch.manual_seed(1)
    handle.begin_run(max_steps=4)
    got = []
    for step, batch in zip(range(4), loader, strict=False):
        handle.begin_step(step)
        loss = prepared(**batch).loss
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        got.append(float(loss.detach()))
    handle.end_run()
    assert got == pytest.approx(losses(want), rel=1e-3)
    assert not handle.enabled
