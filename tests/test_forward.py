"""Forwards in all their ways: evaluation, generation, recomputation, errors on the way."""

import contextlib

import pytest
import torch
from helpers import (
    ATTENTION,
    MLP,
    SPARSE,
    add_lora,
    assert_same,
    assert_untouched,
    differs,
    flatten_batch,
    gradients,
    lora_model,
    loss_and_gradients,
    make_batch,
    snapshot,
    tiny_model,
)
from transformers import AutoModelForCausalLM

from sparselora_hf import SparseLoraConfig, sparsify

SPARSE = SPARSE.replace(mlp_sparsity=0.9, attention_sparsity={"1-2": 0.75})


@pytest.fixture(params=[ATTENTION, ATTENTION + MLP], ids=["qkvo", "all linears"])
def model(request):
    return lora_model(targets=request.param)


@pytest.fixture
def handle(model):
    with sparsify(model, SPARSE) as handle:
        yield handle


def logits(model, batch):
    with torch.no_grad():
        return model(**batch).logits


def test_evaluation_is_exactly_dense(model, batch):
    want, plain = (
        logits(model.eval(), batch),
        model.generate(batch["input_ids"][:1, :5], max_new_tokens=6, do_sample=False),
    )
    with sparsify(model, SPARSE) as handle:
        handle.set_enabled(True)
        sparse = loss_and_gradients(model.train(), batch)
        assert torch.equal(logits(model.eval(), batch), want)
        assert torch.equal(model.generate(batch["input_ids"][:1, :5], max_new_tokens=6, do_sample=False), plain)
        assert_same(loss_and_gradients(model.train(), batch), sparse, 1e-7)  # and training goes on as before
    assert torch.equal(logits(model.eval(), batch), want)


@pytest.mark.parametrize("config", [SPARSE, SPARSE.replace(criterion="static")], ids=["sparse", "waits for a sample"])
def test_steps_in_evaluation_mode_are_warned_of(config, batch, tmp_path, caplog):
    """A model by `from_pretrained` is in that mode, though PEFT's wrapper says that it is in training."""
    tiny_model().save_pretrained(tmp_path / "base")
    model = add_lora(AutoModelForCausalLM.from_pretrained(tmp_path / "base"))
    assert model.training
    with sparsify(model, config) as handle:
        handle.set_enabled(config is SPARSE)
        with torch.no_grad():
            model(**batch)
        model.train()(**batch)
        assert "evaluation mode" not in caplog.text
        for _ in range(2):
            model.eval()(**batch).loss.backward()
    assert caplog.text.count("in evaluation mode, where it is dense") == 1


def test_training_mode_without_gradients_is_dense(model, batch):
    """To the last bit, exact savings left out: in training mode they round in another order."""
    want = logits(model.eval(), batch)
    handle = sparsify(model, SPARSE.replace(exact=False))
    handle.set_enabled(True)
    model.train()
    loss_and_gradients(model, batch)
    assert torch.equal(logits(model, batch), want)
    generated = model.generate(batch["input_ids"][:1, :5], max_new_tokens=4, do_sample=False)
    assert torch.equal(generated, model.eval().generate(batch["input_ids"][:1, :5], max_new_tokens=4, do_sample=False))


def _disturbed(model, batch):
    """Adversarial training adds to the embeddings what its gradient says."""
    embeds = model.get_input_embeddings()(batch["input_ids"])
    added = torch.zeros_like(embeds, requires_grad=True)
    return {"inputs_embeds": embeds + added}, added


def _prompted(model, batch):
    """Embeddings of one's own take the place of the first tokens."""
    embeds = model.get_input_embeddings()(batch["input_ids"]).detach()
    prompt = torch.full_like(embeds[:1, :2], 0.1).requires_grad_(True)
    return {"inputs_embeds": torch.cat([prompt.expand(len(embeds), -1, -1), embeds[:, 2:]], 1)}, prompt


@pytest.mark.parametrize("make", [_disturbed, _prompted])
@pytest.mark.parametrize("checkpointed", [False, True], ids=["plain", "checkpointed"])
def test_embeddings_that_are_given_have_their_gradient(batch, make, checkpointed):
    """Though nothing of the model below its adapters is trained."""
    results = []
    for config in (None, SparseLoraConfig()):
        model = lora_model()
        if checkpointed:
            checkpoint(model, reentrant=False)
        with sparsify(model, config) if config else contextlib.nullcontext():
            inputs, leaf = make(model, batch)
            loss = model(**inputs, attention_mask=batch["attention_mask"], labels=batch["labels"]).loss
            loss.backward()
        results.append((loss.detach(), gradients(model) | {"leaf": leaf.grad}))
    assert_same(results[1], results[0])


def _seen_by_all_before(batch):
    length = batch["input_ids"].shape[1]
    return torch.ones(length, length, dtype=torch.bool).tril()[None, None].expand(len(batch["input_ids"]), 1, -1, -1)


def _whole(model, batch):
    return model(**batch).loss


def _token_by_token(model, batch):
    """A prompt in pieces, the second a single token, with what came before in a cache."""
    ids, labels, cache, losses = batch["input_ids"], batch["labels"], None, []
    for piece in (slice(0, 3), slice(3, 4), slice(4, None)):
        out = model(input_ids=ids[:, piece], labels=labels[:, piece], past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        losses.append(out.loss)
    return losses[-1]


FORMS = {
    "4-D mask, all at position 0": (
        lambda batch: {"attention_mask": _seen_by_all_before(batch), "position_ids": 0 * batch["input_ids"]},
        _whole,
    ),
    "masks by kind of attention": (
        lambda batch: {"attention_mask": {"full_attention": _seen_by_all_before(batch)}},
        _whole,
    ),
    "single token between others": (lambda batch: {}, _token_by_token),
}


@pytest.mark.parametrize(("change", "loss_of"), FORMS.values(), ids=FORMS.keys())
def test_tokens_that_others_see_are_no_padding(batch, change, loss_of):
    """Exact savings leave none of them out."""
    batch, results = batch | change(batch), []
    for config in (None, SparseLoraConfig()):
        model = lora_model("qwen2")
        with sparsify(model, config) if config else contextlib.nullcontext():
            loss = loss_of(model, batch)
            loss.backward()
        results.append((loss.detach(), gradients(model)))
    assert_same(results[1], results[0])


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_padding_that_predicts_a_first_token(attention):
    """It may see no token; where attention is written out it sees all of them alike, padding too."""
    batch = make_batch(prompts=(0, 5, 12), side="left")
    model = lora_model(attn_implementation=attention)
    want = loss_and_gradients(model, batch)
    with sparsify(model, SparseLoraConfig()):
        assert_same(loss_and_gradients(model, batch), want)


def test_training_without_labels_is_dense(model, handle, batch):
    want = loss_without_labels(model, batch)
    handle.set_enabled(True)
    loss_and_gradients(model, batch)
    assert_same(loss_without_labels(model, batch), want, 1e-7)


def test_every_run_is_told_of_forwards_without_labels(batch, caplog):
    """A run of another handle, or the one before, does not count."""
    for runs in (1, 2):
        model = lora_model()
        with sparsify(model, SPARSE) as handle:
            for _ in range(runs):
                handle.begin_run(max_steps=4)
                loss_without_labels(model, batch)
                loss_without_labels(model, batch)
    assert caplog.text.count("its context tokens are not known") == 3


def loss_without_labels(model, batch):
    model.zero_grad(set_to_none=True)
    loss = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits.square().mean()
    loss.backward()
    return loss.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}


def decoder_loss(model, ids):
    hidden = model.get_base_model().model(input_ids=ids).last_hidden_state
    return hidden[:, : ids.shape[1] // 2].square().mean()


@pytest.mark.parametrize("checkpointed", ["no", "non-reentrant", "reentrant"])
@pytest.mark.parametrize("tokens", [slice(None), slice(5)], ids=["as many tokens", "fewer tokens"])
def test_decoder_called_by_itself_is_dense(model, batch, tokens, checkpointed):
    """No plan is its own: neither that of the batch before, nor afterwards is its batch lost."""
    if checkpointed != "no":
        checkpoint(model, checkpointed == "reentrant")
    ids = batch["input_ids"][:, tokens].flip(0)
    decoder_loss(model, ids).backward()
    dense = gradients(model)
    with sparsify(model, SPARSE) as handle:
        handle.set_enabled(True)
        _, own = loss_and_gradients(model, batch)
        loss = model(**batch).loss
        (loss + decoder_loss(model, ids)).backward()
        both = gradients(model)
        model.zero_grad(set_to_none=True)
        with torch.no_grad():
            seen = model.train().get_base_model().model(input_ids=ids).last_hidden_state
    assert_same((loss.detach(), both), (loss.detach(), {name: own[name] + dense[name] for name in own}))
    with torch.no_grad():
        want = model.get_base_model().model(input_ids=ids).last_hidden_state
    torch.testing.assert_close(seen, want, rtol=1e-4, atol=1e-5)


def checkpoint(model, reentrant: bool) -> None:
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    if reentrant:
        model.enable_input_require_grads()


REENTRANT = pytest.mark.parametrize("reentrant", [False, True], ids=["non-reentrant", "reentrant"])


@REENTRANT
@pytest.mark.parametrize("criterion", ["svd", "random"])
@pytest.mark.parametrize("exact", [False, True], ids=["plain", "exact"])
def test_checkpointing_gives_the_same_gradients(model, batch, reentrant, criterion, exact):
    config = SPARSE.replace(criterion=criterion, exact=exact)
    results = []
    for checkpointed in (False, True):
        if checkpointed:
            checkpoint(model, reentrant)
        with sparsify(model, config) as handle:
            handle.set_enabled(True)
            results.append(loss_and_gradients(model, batch))
    assert_same(results[1], results[0], 1e-6)


def ask_no_more(model, handle):
    """Scores that differ by a rounding would choose other sets, and no shape would tell."""
    criterion = handle.state.criterion
    criterion.mlp = criterion.qk = criterion.vo = None  # must not be asked again


IN_BETWEEN = {
    "criterion not asked again": ask_no_more,
    "switched off": lambda model, handle: handle.set_enabled(False),
    "evaluation": lambda model, handle: logits(model, make_batch((3,), (2,))),
}


@REENTRANT
@pytest.mark.parametrize("happens", IN_BETWEEN.values(), ids=IN_BETWEEN.keys())
def test_what_happens_between_forward_and_backward_changes_nothing(model, handle, batch, reentrant, happens):
    checkpoint(model, reentrant)
    handle.set_enabled(True)
    want = loss_and_gradients(model, batch)
    loss = model(**batch).loss
    happens(model, handle)
    loss.backward()
    got = loss.detach(), {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
    assert_same(got, want, 1e-7)


@pytest.mark.parametrize("checkpointed", ["no", "non-reentrant", "reentrant"])
def test_two_forwards_before_one_backward(model, handle, batch, checkpointed):
    """Recomputation must meet the plan and the sets of its own forward, not those of the latest one."""
    if checkpointed != "no":
        checkpoint(model, checkpointed == "reentrant")
    other = make_batch((6, 11), (4, 2), seed=5)
    handle.set_enabled(True)
    parts = [loss_and_gradients(model, each) for each in (batch, other)]
    losses = [model(**each).loss for each in (batch, other)]
    sum(losses).backward()
    got = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
    assert_same(
        (sum(losses).detach(), got), (parts[0][0] + parts[1][0], {n: parts[0][1][n] + parts[1][1][n] for n in got})
    )


@REENTRANT
def test_forward_without_labels_is_recomputed_dense(model, handle, batch, reentrant):
    """Backward must not meet the plan of the batch before."""
    checkpoint(model, reentrant)
    want = loss_without_labels(model, batch)
    handle.set_enabled(True)
    loss_and_gradients(model, batch)
    assert_same(loss_without_labels(model, batch), want, 1e-6)


@REENTRANT
def test_dropout_repeats_in_recomputation(batch, reentrant):
    model = lora_model(targets=ATTENTION + MLP, lora={"dropout": 0.3})
    results = []
    for checkpointed in (False, True):
        if checkpointed:
            checkpoint(model, reentrant)
        with sparsify(model, SPARSE) as handle:
            handle.set_enabled(True)
            torch.manual_seed(0)
            results.append(loss_and_gradients(model, batch))
    assert_same(results[1], results[0], 1e-6)


@pytest.mark.parametrize("place", ["mlp", "self_attn", "self_attn.q_proj", "self_attn.o_proj"])
def test_error_inside_the_forward_leaves_a_usable_model(batch, place):
    model = lora_model()
    dense, evaluated = loss_and_gradients(model, batch), logits(model.eval(), batch)
    model.train()

    def fail(*_):
        raise RuntimeError("out of memory")

    with sparsify(model, SPARSE) as handle:
        handle.set_enabled(True)
        sparse = loss_and_gradients(model, batch)
        hook = model.base_model.model.model.layers[1].get_submodule(place).register_forward_hook(fail)
        with pytest.raises(RuntimeError, match="out of memory"):
            model(**batch)
        hook.remove()
        assert torch.equal(logits(model.eval(), batch), evaluated)
        assert_same(loss_and_gradients(model.train(), batch), sparse, 1e-7)
    assert_same(loss_and_gradients(model, batch), dense, 1e-7)


def test_interrupted_forward_is_forgotten_by_the_next_step(batch):
    """Ctrl-C is no `Exception`: PyTorch calls no hook behind it. The next decoder call is no part of that forward."""
    model = lora_model()

    def interrupt(*_):
        raise KeyboardInterrupt

    def loss():
        return model.get_base_model().model(batch["input_ids"][:1, :7]).last_hidden_state.square().mean()

    dense = loss()
    with sparsify(model, SPARSE) as handle:
        handle.begin_run(max_steps=8, step=4)
        hook = model.base_model.model.model.layers[1].register_forward_hook(interrupt)
        with pytest.raises(KeyboardInterrupt):
            model(**batch)
        hook.remove()
        handle.begin_step(5)
        torch.testing.assert_close(loss(), dense)


def test_interrupted_forward_leaves_no_trace_in_checkpointing(batch):
    model = lora_model()
    checkpoint(model, reentrant=False)
    before = snapshot(model)

    def interrupt(*_):
        raise KeyboardInterrupt

    with sparsify(model, SPARSE):
        hook = model.base_model.model.model.layers[1].register_forward_hook(interrupt)
        with pytest.raises(KeyboardInterrupt):
            model(**batch)
        hook.remove()
    assert_untouched(model, before)


def test_disabled_and_merged_adapters_keep_their_meaning(model, handle, batch):
    handle.set_enabled(True)
    with_adapter = loss_and_gradients(model, batch)[0]
    with model.disable_adapter():
        without = model(**batch).loss.detach()
    assert differs((with_adapter, {}), (without, {}))
    model.merge_adapter()
    merged = model(**batch).loss.detach()
    model.unmerge_adapter()
    assert not differs((loss_and_gradients(model, batch)[0], {}), (with_adapter, {}), 1e-5)
    # merging changes the frozen weight itself, and with it which products are dropped, no more than that
    assert differs((merged, {}), (without, {}))


def test_a_second_adapter_takes_over(model, handle, batch):
    from peft import LoraConfig

    handle.set_enabled(True)
    first = loss_and_gradients(model, batch)[0]
    model.add_adapter("other", LoraConfig(r=2, target_modules=list(ATTENTION), task_type="CAUSAL_LM"))
    model.set_adapter("other")
    other = model(**batch).loss.detach()
    model.set_adapter("default")
    assert differs((other, {}), (first, {}))
    torch.testing.assert_close(model(**batch).loss.detach(), first, rtol=1e-6, atol=0)


LAYOUTS = {
    "left": lambda: make_batch(side="left"),
    "right": make_batch,
    "padding-free": lambda: flatten_batch(make_batch()),
}


@pytest.mark.parametrize("sparse", [False, True], ids=["dense", "sparse"])
@pytest.mark.parametrize("exact", [False, True], ids=["plain", "exact"])
@pytest.mark.parametrize("criterion", ["svd", "svd_mean", "oracle"])
def test_layout_of_the_batch_changes_nothing(sparse, exact, criterion):
    model = lora_model()
    results = {}
    for name, make in LAYOUTS.items():
        batch = make()
        if name == "left":  # positions count from the first token, as generation has it
            batch["position_ids"] = (batch["attention_mask"].cumsum(1) - 1).clamp(min=0)
        with sparsify(model, SPARSE.replace(exact=exact, criterion=criterion)) as handle:
            handle.set_enabled(sparse)
            results[name] = loss_and_gradients(model, batch)
    assert_same(results["left"], results["right"])
    assert_same(results["padding-free"], results["right"])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "autocast"])
def test_half_precision(batch, dtype):
    model = lora_model(dtype=dtype)
    want = loss_and_gradients(lora_model(), batch)[0]
    with (
        sparsify(model, SPARSE.replace(mlp_sparsity=0.1, attention_sparsity=0.0)) as handle,
        torch.autocast("cpu", torch.bfloat16),
    ):
        handle.set_enabled(True)
        loss, grads = loss_and_gradients(model, batch)
    assert abs(float(loss - want)) < 0.2 * float(want)
    assert all(grad.isfinite().all() for grad in grads.values())


def head_shape(model, batch, **more):
    """Loss and shape of the logits of a training forward."""
    output = model.train()(**batch, **more)
    return output.loss.item(), output.logits.shape[:2]


def test_a_promise_to_read_the_loss_alone(batch):
    """Kept to where the model's own loss is made of logits and labels by their places, and of nothing else."""
    model = lora_model()
    want, whole = head_shape(model, batch)
    few = (1, int((batch["labels"][:, 1:] >= 0).sum()) + 1)
    with sparsify(model, SparseLoraConfig()) as handle:
        assert head_shape(model, batch)[1] == whole  # not promised
        handle.loss_only = True
        assert head_shape(model, batch) == (pytest.approx(want, rel=1e-6), few)
        assert head_shape(model, batch, output_hidden_states=True)[1] == whole
        assert head_shape(model, batch, shift_labels=batch["labels"])[1] == whole
        assert logits(model.train(), batch).shape[:2] == whole  # without gradients
        ids, mask = batch["input_ids"], batch["attention_mask"]
        base = model.train().get_base_model()
        assert base(ids, mask, labels=batch["labels"]).logits.shape[:2] == whole  # given by place
        assert base(input_ids=ids, attention_mask=mask, labels=batch["labels"]).logits.shape[:2] == few
        assert model(ids, mask).logits.shape[:2] == whole  # no labels
        assert logits(model.eval(), batch).shape[:2] == whole
        assert head_shape(model, batch)[1] == few  # and so on
    with sparsify(model, SparseLoraConfig(exact=("last_layer",))) as handle:
        handle.loss_only = True
        assert head_shape(model, batch) == (pytest.approx(want, rel=1e-6), whole)
    assert head_shape(model, batch)[1] == whole


def test_a_loss_function_of_ones_own_has_every_logit(batch):
    """It may read more than the labelled rows."""
    model = lora_model()
    model.get_base_model().loss_function = lambda logits, labels, **kwargs: logits.square().mean()
    want = loss_and_gradients(model, batch)
    with sparsify(model, SparseLoraConfig(exact=("last_layer", "logits"))) as handle:
        handle.loss_only = True
        assert_same(loss_and_gradients(model, batch), want, 1e-5)
        assert not handle.state.batch.savings


def test_a_forward_that_fails_leaves_no_rows_to_the_next(batch):
    model = lora_model()
    with sparsify(model, SparseLoraConfig()) as handle:
        handle.loss_only = True
        broken = model.get_base_model().lm_head.register_forward_pre_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            model.train()(**batch)
        broken.remove()
        assert handle.state.head_rows is None
        assert logits(model.eval(), batch).shape[:2] == batch["input_ids"].shape
