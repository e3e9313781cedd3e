"""Sequence classification: one token of each sequence is pooled, and that one is dense."""

import contextlib

import pytest
import torch
from helpers import (
    ATTENTION,
    SPARSE,
    VOCAB,
    assert_same,
    differs,
    fill_adapters,
    gradients,
    lora_model,
    loss_and_gradients,
    make_batch,
    randomise,
    sparse_result,
)
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import LlamaConfig, LlamaForSequenceClassification, LlamaModel, Trainer, TrainingArguments
from transformers.modeling_outputs import SequenceClassifierOutput
from transformers.models.llama.modeling_llama import LlamaPreTrainedModel

from sparselora_hf import SparseLoraCallback, SparseLoraConfig, sparsify
from sparselora_hf.plan import TokenPlan


class _OfMeans(LlamaPreTrainedModel):
    """A classifier of one's own: it reads the mean state of all tokens."""

    def __init__(self, config):
        super().__init__(config)
        self.model = LlamaModel(config)
        self.score = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()

    def forward(self, input_ids=None, attention_mask=None, labels=None, **kwargs):
        states = self.model(input_ids, attention_mask=attention_mask, **kwargs).last_hidden_state
        weights = attention_mask[..., None] / attention_mask.sum(1)[:, None, None]
        logits = self.score((states * weights).sum(1))
        return SequenceClassifierOutput(nn.functional.cross_entropy(logits, labels), logits)


def classifier(kind=LlamaForSequenceClassification, **options):
    """A tiny classifier with live adapters."""
    torch.manual_seed(0)
    widths = {"vocab_size": VOCAB, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3}
    heads = {"num_attention_heads": 8, "num_key_value_heads": 4}
    model = kind(LlamaConfig(**widths, **heads, **({"pad_token_id": 0} | options)))
    model = get_peft_model(model, LoraConfig(r=4, task_type="SEQ_CLS", target_modules=list(ATTENTION)))
    fill_adapters(model)
    return model.train()


def class_batch(side="right", labels=(0, 2, 1)):
    return make_batch(side=side) | {"labels": torch.tensor(labels)}


LABELS = {
    "classes": (3, (0, 2, 1)),
    "regression": (1, (0.5, -1.0, 2.0)),
    "several": (3, [[1.0, 0, 0], [0, 1, 1], [1, 1, 0]]),
}


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("kind", LABELS)
def test_sparsity_zero_equals_the_dense_model(kind, side):
    number, labels = LABELS[kind]
    model, batch = classifier(num_labels=number), class_batch(side, labels)
    assert_same(sparse_result(model, batch, SparseLoraConfig()), loss_and_gradients(model, batch))


def test_sparsity_changes_the_step_and_not_the_prediction():
    model, batch = classifier(num_labels=3), class_batch()
    dense = loss_and_gradients(model, batch)
    logits = model.eval()(**batch).logits
    assert differs(sparse_result(model.train(), batch, SPARSE), dense)
    with sparsify(model, SPARSE) as handle:
        handle.set_enabled(True)
        assert torch.equal(model.eval()(**batch).logits, logits)


@pytest.mark.parametrize("side", ["right", "left"])
def test_the_pooled_token_is_output_and_loss_and_the_rest_context(side):
    batch = class_batch(side)
    plan = TokenPlan.of_pooled(batch["input_ids"], batch["attention_mask"], pad_token_id=0)
    last = [int(row.nonzero().max()) + number * len(row) for number, row in enumerate(batch["attention_mask"])]
    real = batch["attention_mask"].flatten().nonzero().squeeze(1).tolist()
    assert plan.output.tolist() == plan.loss.tolist() == last
    assert plan.context.tolist() == [row for row in real if row not in last]
    assert not plan.loss_in_context


def test_without_a_padding_token_the_last_position_is_pooled():
    assert TokenPlan.of_pooled(torch.zeros(2, 3, dtype=torch.long)).output.tolist() == [2, 5]


def test_only_the_pooled_row_of_the_last_layer_is_computed():
    """Neither gate, up nor down of the last layer, which only the pooled state needs, sees another token."""
    model, batch = classifier(num_labels=3), class_batch()
    rows = []
    with sparsify(model, SparseLoraConfig()) as handle:
        down = model.get_base_model().model.layers[-1].mlp.down_proj
        hook = down.register_forward_pre_hook(lambda module, args: rows.append(args[0].reshape(-1, 96).shape[0]))
        model(**batch)
        assert handle.state.batch.savings >= {"last_layer"}
        hook.remove()
    assert rows == [3]


def _with_hidden_states(model, batch):
    """A loss that reads every token's state beside."""
    out = model(**batch, output_hidden_states=True)
    return out.loss + out.hidden_states[-1].square().mean()


def _by_embeddings(model, batch):
    embeds = model.get_input_embeddings()(batch["input_ids"][:1])
    return model(inputs_embeds=embeds, labels=batch["labels"][:1]).loss


def _by_place(model, batch):
    return model.get_base_model()(batch["input_ids"], batch["attention_mask"], labels=batch["labels"]).loss


@pytest.mark.parametrize("loss_of", [_with_hidden_states, _by_embeddings, _by_place])
def test_ways_to_call_a_classifier(loss_of):
    model, batch, results = classifier(num_labels=3), class_batch(), []
    batch["attention_mask"][:] = 1  # hidden states of padding are nobody's
    for config in (None, SparseLoraConfig()):
        model.zero_grad(set_to_none=True)
        with sparsify(model, config) if config else contextlib.nullcontext():
            loss = loss_of(model, batch)
            loss.backward()
        results.append((loss.detach(), gradients(model)))
    assert_same(results[1], results[0])


def test_inputs_given_by_place_are_planned_as_by_name():
    model, batch = classifier(num_labels=3), class_batch()
    with sparsify(model, SPARSE) as handle:
        handle.set_enabled(True)
        by_name, by_place = model(**batch).loss, _by_place(model, batch)
    assert torch.equal(by_place, by_name)


def test_as_many_classes_as_tokens():
    """Labels of the tokens' own shape belong to sequences all the same."""
    batch = class_batch()
    batch["labels"] = (batch["input_ids"] % 2).float()
    model = classifier(num_labels=batch["labels"].shape[1], problem_type="multi_label_classification")
    with sparsify(model, SPARSE) as handle:
        handle.set_enabled(True)
        model(**batch)
        assert len(handle.state.batch.plan.output) == 3


def _of_means():
    return classifier(_OfMeans, num_labels=3), class_batch()


def _of_last_labels():
    """Labels for the logits that are asked for, and no others."""
    batch = make_batch(side="left")
    return lora_model(), batch | {"labels": batch["labels"][:, -6:], "logits_to_keep": 6}


def _of_flat_labels():
    batch = make_batch()
    return lora_model(), batch | {"labels": batch["labels"].flatten()}


@pytest.mark.parametrize("made", [_of_means, _of_last_labels, _of_flat_labels])
def test_labels_that_tell_nothing_of_tokens(made):
    """No token is known to be the pooled one: nothing is sparse, nothing is left out."""
    model, batch = made()
    randomise(model)
    assert_same(sparse_result(model, batch, SPARSE), loss_and_gradients(model, batch))


def test_plain_trainer_with_the_callback(tmp_path):
    model = classifier(num_labels=3)
    handle = sparsify(model, SPARSE)
    batch = class_batch()
    rows = [{name: values[i] for name, values in batch.items()} for i in (0, 1, 2, 0)]
    settings = {"max_steps": 4, "logging_steps": 1, "save_strategy": "no", "report_to": "none", "use_cpu": True}
    args = TrainingArguments(str(tmp_path), per_device_train_batch_size=2, disable_tqdm=True, **settings)
    trainer = Trainer(model, args, train_dataset=rows, callbacks=[SparseLoraCallback(handle)])
    trainer.train()
    dropped = [log["sparselora/channel_sparsity"] for log in trainer.state.log_history if "loss" in log]
    assert dropped[:2] == [0, 0]
    assert min(dropped[2:]) > 0.5
