import functools
import inspect

import pytest
import torch
from datasets import Dataset
from helpers import (
    ATTENTION,
    MLP,
    SPARSE,
    VOCAB,
    assert_same,
    assert_untouched,
    fill_adapters,
    lora_model,
    make_batch,
    relative_error,
    snapshot,
    tiny_model,
)
from peft import LoHaConfig, LoraConfig, PromptTuningConfig, get_peft_model, inject_adapter_in_model
from training import Collator, DenseTrainer, SparseTrainer, assert_same_run, examples, make_trainer, metrics, trained
from transformers import TrainerCallback
from trl import SFTConfig, SFTTrainer

from sparselora_hf import SparseLoraCallback, SparseLoraConfig, SparseLoraTrainer, sparsify


def one_step(trainer):
    """Loss and gradients of the first step."""
    return torch.tensor(trainer.losses[0]), trainer.recorder.gradients[0]


# sparsity 0 is SFTTrainer


@pytest.mark.parametrize("exact", [False, True], ids=["exact off", "exact on"])
@pytest.mark.parametrize("targets", [ATTENTION, ATTENTION + MLP], ids=["qkvo", "all linears"])
def test_sparsity_0_gives_the_losses_of_sft(tmp_path, exact, targets):
    runs = [
        trained(tmp_path, config, model=lora_model(targets=targets), max_steps=20)
        for config in (None, SparseLoraConfig(exact=exact))
    ]
    assert_same_run(runs[1], runs[0])
    assert runs[0].losses[-1] < runs[0].losses[0]


SETTINGS = {
    "checkpointing": {"gradient_checkpointing": True},
    "reentrant": {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}},
    "dft": {"loss_type": "dft"},
    "smoothing": {"label_smoothing_factor": 0.1},
    "accumulation": {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2},
    "bf16": {"bf16": True},
}


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS.keys())
def test_settings_of_sft_keep_their_meaning(tmp_path, settings):
    dense, exact = (trained(tmp_path, config, max_steps=3, **settings) for config in (None, SparseLoraConfig()))
    tol = 1e-5 if "bf16" not in settings else 3e-3
    assert_same_run(exact, dense, tol)
    assert metrics(exact, "mean_token_accuracy") == metrics(dense, "mean_token_accuracy")
    assert metrics(exact, "entropy") == pytest.approx(metrics(dense, "entropy"), rel=tol)
    assert metrics(exact, "num_tokens") == metrics(dense, "num_tokens")


@pytest.mark.parametrize("config", [SparseLoraConfig(), SPARSE.replace(start_step=0)], ids=["dense", "sparse"])
def test_a_batch_without_labels_among_others(tmp_path, config):
    rows = examples(8)
    labels = [row if i % 2 else [-100] * len(row) for i, row in enumerate(rows["labels"])]
    data = Dataset.from_dict({"input_ids": rows["input_ids"], "labels": labels})
    dense, sparse = (
        trained(tmp_path, each, data=data, per_device_train_batch_size=1, max_steps=8) for each in (None, config)
    )
    assert [loss == 0 for loss in sparse.losses] == [loss == 0 for loss in dense.losses]
    assert sum(loss == 0 for loss in sparse.losses) == 4
    if not config.is_sparse:
        assert_same_run(sparse, dense)


def loss_of_all_logits(self, model, inputs, return_outputs=False, num_items_in_batch=None):
    logits = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits
    return logits[inputs["attention_mask"].bool()].logsumexp(-1).square().mean()


def test_own_compute_loss_may_read_every_position(tmp_path, monkeypatch):
    """A subclass that makes its own loss of all logits promises nothing about loss positions."""

    for trainer_class in (DenseTrainer, SparseTrainer):
        monkeypatch.setattr(trainer_class, "compute_loss", loss_of_all_logits, raising=False)
    dense, exact = (trained(tmp_path, config, max_steps=2) for config in (None, SparseLoraConfig()))
    assert_same_run(exact, dense)


def fewer_labels(batch):
    """The first example gone, and half of the labels of the others."""
    batch = {name: value[1:] if torch.is_tensor(value) else value for name, value in batch.items()}
    batch["labels"] = batch["labels"].masked_fill(batch["labels"] > VOCAB // 2, -100)
    return batch


def changed_in_training_step(own):
    return lambda self, model, inputs, *args: own(self, model, fewer_labels(inputs), *args)


def changed_in_prepare_inputs(own):
    return lambda self, inputs: fewer_labels(own(self, inputs))


def changed_in_get_batch_samples(own):
    def get_batch_samples(self, *args):
        batches, items = own(self, *args)
        return [fewer_labels(batch) for batch in batches], items

    return get_batch_samples


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
@pytest.mark.parametrize("change", [changed_in_training_step, changed_in_prepare_inputs, changed_in_get_batch_samples])
def test_batches_that_a_subclass_changes(tmp_path, monkeypatch, change, checkpointing):
    name = change.__name__.removeprefix("changed_in")
    name = name if hasattr(SFTTrainer, name) else name.removeprefix("_")
    for trainer_class in (DenseTrainer, SparseTrainer):
        monkeypatch.setattr(trainer_class, name, change(getattr(trainer_class, name)), raising=False)
    settings = {"max_steps": 3, "gradient_checkpointing": checkpointing}
    configs = None, SparseLoraConfig(), SPARSE.replace(exact=False), SPARSE
    dense, exact, plain, saving = (trained(tmp_path, config, **settings) for config in configs)
    assert_same_run(exact, dense)
    assert_same_run(saving, plain)
    assert max(metrics(saving, "sparselora/channel_sparsity")) > 0.5


@pytest.mark.parametrize("width", [12, 16], ids=["another shape", "the same shape"])
def test_own_compute_loss_may_run_the_model_on_other_tokens(tmp_path, monkeypatch, width):
    """A term of other data, before or after the batch's own loss: each forward has the plan of its own labels."""
    other = make_batch((width - 3, 2, 4, 6), (3, 2, 3, 4), seed=5)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        own = super(type(self), self).compute_loss
        before = model(**other).loss
        return own(model, inputs, return_outputs, num_items_in_batch) + before - model(**other).loss / 2

    for trainer_class in (DenseTrainer, SparseTrainer):
        monkeypatch.setattr(trainer_class, "compute_loss", compute_loss, raising=False)
    data = examples(8, prompt=(13, 13), answer=(3, 3))
    settings = {"data": data, "max_steps": 3}
    dense, exact = (trained(tmp_path, config, **settings) for config in (None, SparseLoraConfig()))
    assert_same_run(exact, dense)
    config = SPARSE.replace(start_step=1)
    for checkpointing in (False, True):
        plain, saving = (
            trained(tmp_path, config.replace(exact=exact), gradient_checkpointing=checkpointing, **settings)
            for exact in (False, True)
        )
        assert_same_run(saving, plain)


def logits_by_model(model, ids):
    return model(input_ids=ids).logits


def logits_by_decoder(model, ids):
    return model.get_base_model().lm_head(model.get_base_model().model(input_ids=ids).last_hidden_state)


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
def test_own_compute_loss_may_call_the_decoder_by_itself(tmp_path, monkeypatch, checkpointing):
    """It has the plan of the batch for the batch's tokens, and none for others, as the whole model has."""
    other, runs = make_batch((13, 12, 4, 6), (3, 2, 3, 4), seed=5)["input_ids"], []
    for logits_of in (logits_by_model, logits_by_decoder):

        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None, logits_of=logits_of):
            logits = logits_of(model, inputs["input_ids"])[:, :-1].flatten(0, 1)
            apart = logits_of(model, other).square().mean()
            return torch.nn.functional.cross_entropy(logits, inputs["labels"][:, 1:].flatten()) + apart

        monkeypatch.setattr(SparseTrainer, "compute_loss", compute_loss, raising=False)
        settings = {"data": examples(8, prompt=(13, 13), answer=(3, 3)), "gradient_checkpointing": checkpointing}
        config = SPARSE.replace(start_step=1, mlp_sparsity=0.9)
        runs.append(trained(tmp_path, config, max_steps=3, **settings))
    assert_same_run(*runs)


def first_token_hidden(inputs):
    inputs["attention_mask"][:, 0] = 0


def first_token_hidden_in_another_mask(inputs):
    mask = inputs["attention_mask"].clone()
    inputs["attention_mask"] = mask.index_fill_(1, torch.tensor([0]), 0)


def mask_left_out(inputs):
    del inputs["attention_mask"]


def labels_everywhere(inputs):
    inputs["labels"] = inputs["input_ids"]


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize(
    "change", [first_token_hidden, first_token_hidden_in_another_mask, mask_left_out, labels_everywhere]
)
def test_own_compute_loss_may_change_the_batch(tmp_path, monkeypatch, change, side):
    """Its forward has the plan of what it is given, or none."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        change(inputs)
        return model(**inputs).loss

    for trainer_class in (DenseTrainer, SparseTrainer):
        monkeypatch.setattr(trainer_class, "compute_loss", compute_loss, raising=False)

    def collator(rows):  # positions would keep the mask in its place
        batch = Collator(side)(rows)
        return {name: batch[name] for name in ("input_ids", "labels", "attention_mask")}

    settings = {"max_steps": 2, "data_collator": collator}
    dense, exact = (trained(tmp_path, config, **settings) for config in (None, SparseLoraConfig()))
    assert_same_run(exact, dense)
    if change is labels_everywhere:
        sparse = trained(tmp_path, SPARSE.replace(start_step=0, exact=False), **settings)
        assert sparse.losses[0] == pytest.approx(dense.losses[0], rel=1e-5)  # no context is left


@pytest.mark.parametrize("form", [None, "torch"])
def test_column_of_labels_that_are_no_tokens(tmp_path, form):
    """Classes, say, of which a collator of one's own makes tokens."""

    def collator(rows):
        tokens = [[3, 4, 5, int(row["labels"])] for row in rows]
        return Collator("right")([{"input_ids": ids, "labels": [-100] * 3 + ids[3:]} for ids in tokens])

    data = Dataset.from_dict({"labels": [6, 7, 8, 9]}).with_format(form)
    settings = {"data": data, "data_collator": collator, "max_steps": 2, "remove_unused_columns": False}
    dense, exact = (trained(tmp_path, config, **settings) for config in (None, SparseLoraConfig()))
    assert_same_run(exact, dense)


def test_compute_loss_given_to_a_trainer_may_read_every_position(tmp_path):
    dense, exact = (make_trainer(tmp_path, config, max_steps=2) for config in (None, SparseLoraConfig()))
    for trainer in (dense, exact):
        trainer.compute_loss = functools.partial(loss_of_all_logits, trainer)
        trainer.train()
    assert_same_run(exact, dense)


def test_streamed_data(tmp_path):
    dense, exact = (
        trained(tmp_path, config, data=examples(16).to_iterable_dataset(), max_steps=3)
        for config in (None, SparseLoraConfig())
    )
    assert_same_run(exact, dense)


def test_a_forward_between_steps_has_a_plan_of_its_own(tmp_path):
    batch, seen = make_batch(), []

    class Between(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            model(**batch)
            seen.append(trainer.sparse_handle.state.batch)

    trainer = make_trainer(tmp_path, SPARSE.replace(start_step=0), callbacks=[Between()], max_steps=2)
    trainer.train()
    assert len(seen) == 2
    assert all(each is not None and each.plan.shape == batch["labels"].shape for each in seen)


def test_the_collator_stays_as_it_was(tmp_path):
    trainer = make_trainer(tmp_path, SPARSE)
    before = trainer.data_collator
    trainer.get_train_dataloader()
    assert trainer.data_collator is before


def test_batches_that_bring_no_plan(tmp_path):
    """A loader of one's own: the plan is made in the step."""
    with_plan = trained(tmp_path, SPARSE)
    trainer = make_trainer(tmp_path, SPARSE)
    trainer.get_train_dataloader = functools.partial(SFTTrainer.get_train_dataloader, trainer)
    trainer.train()
    assert_same_run(trainer, with_plan, 1e-6)


def test_adapters_made_by_the_trainer(tmp_path):
    peft_config = LoraConfig(r=4, target_modules=list(ATTENTION), task_type="CAUSAL_LM")
    runs = []
    for config in (None, SparseLoraConfig()):
        torch.manual_seed(0)
        runs.append(trained(tmp_path, config, model=tiny_model(), peft_config=peft_config))
    assert_same_run(runs[1], runs[0])


def test_layers_that_peft_replicates_are_counted(tmp_path):
    """Layer numbers are those of the model in training, replicas included."""
    lora = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], layer_replication=[(0, 3), (1, 3)])
    config = SPARSE.replace(mlp_sparsity={3: 0.75}, attention_sparsity=0.0)
    trainer = trained(tmp_path, config, model=tiny_model(), peft_config=lora)
    sparse = [d.name for d in trainer.sparse_handle.decisions if d.outcome == "sparse"]
    assert sparse == ["base_model.model.model.layers.3.mlp"]
    dense = trained(tmp_path, config.replace(mlp_sparsity=0.0), model=tiny_model(), peft_config=lora)
    assert trainer.losses[2] != dense.losses[2]
    model = tiny_model()
    with pytest.raises(ValueError, match="layer 5 does not exist"):
        make_trainer(tmp_path, config.replace(mlp_sparsity={5: 0.75}), model=model, peft_config=lora)
    with pytest.raises(ValueError, match="rank: 33 exceeds 32"):  # of k and v, before PEFT replicates
        settings = {"mlp_sparsity": 0.0, "attention_sparsity": {3: 0.75}, "rank": 33}
        make_trainer(tmp_path, config.replace(**settings), model=model, peft_config=lora)
    assert len(model.model.layers) == 3


def test_adapters_by_a_pattern_that_names_the_head_to_leave_it_out(tmp_path):
    peft_config = LoraConfig(r=4, target_modules=r"(?!lm_head).*\.[qv]_proj", task_type="CAUSAL_LM")
    trainer = trained(tmp_path, SparseLoraConfig(), model=tiny_model(), peft_config=peft_config, max_steps=1)
    assert len(trainer.recorder.gradients[0]) == 12


class Unfreeze(TrainerCallback):
    """Lets what was frozen train from the second step on."""

    def __init__(self, name):
        self.name = name

    def on_step_end(self, args, state, control, model=None, **kwargs):
        for name, parameter in model.named_parameters():
            if self.name in name:
                parameter.requires_grad_(True)


@pytest.mark.parametrize("name", ["embed_tokens", "layers.0.self_attn.q_proj.lora_A"])
@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
def test_what_is_unfrozen_below_while_training_goes_on_has_a_gradient(tmp_path, name, checkpointing):
    runs = []
    for config in (None, SparseLoraConfig()):
        model = lora_model()
        model.get_base_model().model.layers[0].requires_grad_(False)
        settings = {"callbacks": [Unfreeze(name)], "gradient_checkpointing": checkpointing, "max_steps": 3}
        runs.append(trained(tmp_path, config, model=model, **settings))
    assert_same_run(runs[1], runs[0])
    assert not any(name in each for each in runs[1].recorder.gradients[0])
    assert any(name in each and gradient.any() for each, gradient in runs[1].recorder.gradients[1].items())


# sparse steps


def test_dense_until_start_step_and_sparse_from_there(tmp_path):
    dense, sparse = trained(tmp_path), trained(tmp_path, SPARSE)
    assert sparse.losses[:2] == pytest.approx(dense.losses[:2], rel=1e-5)
    assert sparse.losses[2] != pytest.approx(dense.losses[2], rel=1e-4)


@pytest.mark.parametrize("reentrant", [False, True], ids=["non-reentrant", "reentrant"])
@pytest.mark.parametrize("targets", [ATTENTION, ATTENTION + MLP], ids=["qkvo", "all linears"])
def test_checkpointing_gives_the_same_run(tmp_path, reentrant, targets):
    plain, checkpointed = (
        trained(
            tmp_path,
            SPARSE,
            model=lora_model(targets=targets),
            gradient_checkpointing=on,
            gradient_checkpointing_kwargs={"use_reentrant": reentrant} if on else None,
        )
        for on in (False, True)
    )
    assert_same_run(checkpointed, plain)


@pytest.mark.parametrize("exact", [False, True, "logits", "last_layer", "padding", "frozen_below"], ids=str)
def test_exact_savings_change_no_sparse_run(tmp_path, exact):
    plain, saving = (trained(tmp_path, SPARSE.replace(exact=e), max_steps=4) for e in (False, exact))
    assert_same_run(saving, plain)


@pytest.mark.parametrize("rule", ["label_or_predictor", "label"])
def test_exact_savings_leave_the_last_layers_sample_whole(tmp_path, rule):
    """Its MLP is sampled in dense steps and, where context tokens enter the loss, sparse in later ones."""
    config = SPARSE.replace(mlp_sparsity=0.9, attention_sparsity=0.0, token_rule=rule, criterion="static",
                            compensation="mean", start_step=1)  # fmt: skip
    plain, saving = (make_trainer(tmp_path, config.replace(exact=e), max_steps=3) for e in (False, True))
    for trainer in (plain, saving):
        trainer.train()
    assert_same_run(saving, plain)
    fits = [trainer.sparse_handle.state.calibration for trainer in (plain, saving)]
    for layer in range(3):
        torch.testing.assert_close(fits[1].scores[layer, "mlp"], fits[0].scores[layer, "mlp"], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "config",
    [SparseLoraConfig(), SPARSE.replace(criterion="static", start_step=1)],
    ids=["dense", "sparse with fixed sets"],
)
def test_accumulation_equals_one_larger_batch(tmp_path, config):
    """Channel sets are chosen per micro-batch: only fixed ones can be compared where steps are sparse."""
    whole, parts = (
        trained(tmp_path, config, max_steps=3, per_device_train_batch_size=size, gradient_accumulation_steps=4 // size)
        for size in (4, 1)
    )
    assert [sum(parts.losses[i : i + 4]) for i in (0, 4, 8)] == pytest.approx(whole.losses, rel=1e-5)
    for a, b in zip(parts.recorder.gradients, whole.recorder.gradients, strict=True):
        assert max(relative_error(a[name], b[name]) for name in b) < 1e-4


LAYOUTS = {
    "padded left": {"data_collator": Collator("left")},
    "padding-free": {"padding_free": True, "max_length": None},
    "padding-free to a multiple": {"padding_free": True, "max_length": None, "pad_to_multiple_of": 64},
    "packed": {"packing": True, "max_length": 40, "dataset_kwargs": None},
}


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
@pytest.mark.parametrize("exact", [False, True], ids=["exact off", "exact on"])
@pytest.mark.parametrize("sparse", [False, True], ids=["dense", "sparse"])
def test_layout_changes_neither_loss_nor_gradient(tmp_path, layout, exact, sparse):
    """64 examples, all of them in one batch, padded right and in another form."""
    config = SPARSE.replace(start_step=0, exact=exact) if sparse else SparseLoraConfig(exact=exact)
    padded, other = (
        trained(tmp_path, config, data=examples(64), max_steps=1, per_device_train_batch_size=64, **form)
        for form in ({}, layout)
    )
    assert_same(one_step(other), one_step(padded))


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_side_of_the_collator(tmp_path, side):
    config = SPARSE.replace(start_step=0)
    own, usual = (trained(tmp_path, config, max_steps=2, data_collator=c) for c in (Collator(side), None))
    assert_same_run(own, usual)


# evaluation


def test_evaluation_during_training_is_dense(tmp_path):
    held_out = examples(6, seed=9)
    trainer = trained(tmp_path, SPARSE, eval_dataset=held_out, eval_strategy="steps", eval_steps=1)
    losses = metrics(trainer, "eval_loss")
    assert len(losses) == 6
    dense = make_trainer(tmp_path, model=trainer.model, eval_dataset=held_out)
    trainer.sparse_handle.restore()
    assert losses[-1] == pytest.approx(dense.evaluate()["eval_loss"], rel=1e-6)


@pytest.mark.parametrize(("exact", "training"), [(False, True), (True, False)])
def test_model_is_dense_after_training(tmp_path, exact, training):
    """To the last bit; in training mode exact savings go on, which round in another order."""
    model = lora_model()
    trainer = trained(tmp_path, SPARSE.replace(exact=exact), model=model)
    assert not trainer.sparse_handle.enabled
    ids = torch.arange(3, 13)[None]
    with torch.no_grad():
        before = model.train(training)(input_ids=ids, labels=ids).logits
        trainer.sparse_handle.restore()
        assert torch.equal(before, model(input_ids=ids).logits)


def test_model_is_dense_after_a_crash(tmp_path):
    trainer = make_trainer(tmp_path, SPARSE.replace(start_step=0))
    trainer.compute_loss = None
    with pytest.raises(TypeError):
        trainer.train()
    state = trainer.sparse_handle.state
    assert (state.enabled, state.batch, state.pinned, state.head_rows) == (False, None, False, None)


class _RestoreAfter(TrainerCallback):
    def __init__(self, step: int) -> None:
        self.step, self.trainer = step, None

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            self.trainer.sparse_handle.restore()


@pytest.mark.parametrize("step", [0, 1, 4])
def test_restored_model_trains_as_with_sft(tmp_path, step, caplog):
    """Restored before training, or while it goes on, before sparsity and after it has started."""
    want, callback = trained(tmp_path, learning_rate=0.0), _RestoreAfter(step)
    config = SPARSE.replace(criterion="static")
    callback.trainer = got = make_trainer(tmp_path, config, learning_rate=0.0, callbacks=[callback])
    if not step:
        got.sparse_handle.restore()
    got.train()
    assert got.losses[step:] == pytest.approx(want.losses[step:], rel=1e-5)
    assert len(metrics(got, "sparselora/context_share")) == step
    assert ("so training is dense" in caplog.text) == (not step)


# defaults and wrong input


@pytest.mark.parametrize("layers", [1, 3])
def test_default_configuration(tmp_path, layers):
    trainer = trained(tmp_path, given=False, model=lora_model(layers=layers), max_steps=2)
    assert trainer.sparse_config == SparseLoraConfig.default(layers, 64)
    assert trainer.sparse_config.is_sparse is (layers == 3)


LORA = {"peft_config": LoraConfig(target_modules=["q_proj"])}
LOHA = LoHaConfig(target_modules=["q_proj"])
PROMPT = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
NO_LABELS = Dataset.from_dict({"input_ids": [[3, 4, 5]] * 4, "labels": [[-100] * 3] * 4})
WRONG = {
    "no labels": ({"data": NO_LABELS}, "No token of the first 4 training examples carries a label"),
    "no LoRA": ({"model": tiny_model}, "carries no LoRA adapter.*Pass peft_config"),
    "LoHa": ({"model": lambda: get_peft_model(tiny_model(), LOHA)}, "carries no LoRA adapter"),
    "LoHa to be": ({"model": tiny_model, "peft_config": LOHA}, "peft_config: LoHaConfig gives the model no LoRA"),
    "a prompt to be": ({"model": tiny_model, "peft_config": PROMPT}, "peft_config: PromptTuningConfig gives"),
    "lm_head": ({"model": tiny_model, "peft_config": LoraConfig(target_modules=["lm_head", "q_proj"])}, "lm_head"),
    "lm_head in a pattern": ({"model": tiny_model, "peft_config": LoraConfig(target_modules="lm_.*")}, "lm_head"),
    "layers": ({"config": SparseLoraConfig({"7": 0.5})}, "layer 7 does not exist"),
    "layers of a plain model": ({"model": tiny_model, "config": SparseLoraConfig({"7": 0.5}), **LORA}, "layer 7"),
    "rank": ({"config": SPARSE.replace(rank=100)}, "rank: 100 exceeds"),
    "the callback too": ({"callbacks": [SparseLoraCallback(SPARSE)]}, "callbacks: .* Leave yours out"),
}


@pytest.mark.parametrize(("settings", "message"), WRONG.values(), ids=WRONG.keys())
def test_wrong_input(tmp_path, settings, message):
    settings = {"config": SPARSE, "model": lora_model} | settings
    model = settings.pop("model")()
    before = snapshot(model)
    with pytest.raises(ValueError, match=message):
        make_trainer(tmp_path, model=model, **settings)
    if "labels" not in message and "label" not in message:
        assert_untouched(model, before)
    assert not any("Sparse" in type(module).__name__ for module in model.modules())


def test_adapters_without_a_wrapper(tmp_path):
    """As transformers has them: PEFT's layers in the model, and no `PeftModel` around it."""

    def model():
        model = inject_adapter_in_model(LoraConfig(target_modules=["q_proj", "v_proj"]), tiny_model())
        fill_adapters(model)
        return model

    dense, exact = (trained(tmp_path, config, model=model(), max_steps=2) for config in (None, SparseLoraConfig()))
    assert_same_run(exact, dense)


def test_start_step_after_end_step_in_steps_of_the_run(tmp_path):
    trainer = make_trainer(tmp_path, SPARSE.replace(start_step=5, end_step=0.5))
    with pytest.raises(ValueError, match=r"start_step 5 .*after end_step 0\.5"):
        trainer.train()


def test_signature_is_that_of_sft_and_two_more():
    assert SparseLoraTrainer.__mro__[1] is SFTTrainer
    own = inspect.signature(SparseLoraTrainer.__init__).parameters
    assert set(own) == {"self", "args", "sparse_config", "model_family", "kwargs"}
    assert not issubclass(SFTConfig, SparseLoraConfig)


def test_plain_model_comes_back_unwrapped_when_the_data_is_refused(tmp_path):
    model = tiny_model()
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    classes = [type(module) for module in model.modules()]
    with pytest.raises(ValueError, match="carries a label"):
        make_trainer(tmp_path, SPARSE, model=model, data=NO_LABELS, gradient_checkpointing=True, **LORA)
    assert [type(module) for module in model.modules()] == classes
    assert not model.get_input_embeddings()._forward_hooks
    assert [name for name, parameter in model.named_parameters() if parameter.requires_grad] == trained
    assert "forward" not in vars(model)


def test_second_trainer_on_a_sparse_model_is_refused_before_peft_overwrites_its_adapters(tmp_path):
    """As where a notebook's cell is run again; the first trainer's handle lets the model go."""
    model = tiny_model()
    first = make_trainer(tmp_path, SPARSE, model=model, **LORA)
    fill_adapters(first.model)
    before = snapshot(first.model)
    with pytest.raises(ValueError, match=r"sparse already\. Call restore"):
        make_trainer(tmp_path, SPARSE, model=model, **LORA)
    assert_untouched(first.model, before)
    first.sparse_handle.restore()
    assert make_trainer(tmp_path, SPARSE, model=model, **LORA).sparse_handle.is_attached


@pytest.mark.parametrize("init", [True, "eva", "pissa", "pissa_niter_4", "OLoRA"])
def test_weights_that_an_initialisation_has_rewritten_are_told_of_when_the_data_is_refused(tmp_path, init, caplog):
    model, adapters = tiny_model(), LoraConfig(target_modules=ATTENTION, init_lora_weights=init)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    with pytest.raises(ValueError, match="carries a label"):
        make_trainer(tmp_path, SPARSE, model=model, data=NO_LABELS, peft_config=adapters)
    after = model.state_dict()
    rewritten = not all(torch.equal(after[name], weight) for name, weight in before.items())
    assert rewritten == ("has rewritten the frozen weights" in caplog.text) == (init not in (True, "eva"))


def test_flos_are_counted_as_by_the_trainer(tmp_path, monkeypatch):
    """Over batches of other lengths, with one walk through the model's parameters in a run."""
    dense = trained(tmp_path, data=examples(24, prompt=(3, 20)))
    sparse, walks = make_trainer(tmp_path, SPARSE, data=examples(24, prompt=(3, 20))), []
    count = sparse.model.num_parameters
    monkeypatch.setattr(
        sparse.model, "num_parameters", lambda **kwargs: walks.append(1) or count(**kwargs), raising=False
    )
    sparse._flos_of_a_token = 1  # of a run before, in which the model was another
    sparse.train()
    assert sparse.state.total_flos == dense.state.total_flos > 0
    assert len(walks) == 1
    assert sparse.floating_point_ops({}) == 0


@pytest.mark.parametrize("settings", [{"mlp_sparsity": 0.5}, {}, "llama-3-8b-math"], ids=str)
def test_settings_of_another_kind_are_refused_by_name(tmp_path, settings):
    model = lora_model()
    before = snapshot(model)
    for make in (
        lambda: make_trainer(tmp_path, settings, model=model),
        lambda: sparsify(model, settings),
        lambda: SparseLoraCallback(settings),
    ):
        with pytest.raises(TypeError, match="must be a SparseLoraConfig, got"):
            make()
    assert_untouched(model, before)
