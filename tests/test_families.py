"""Every family and every kind of LoRA: sparsity 0 is dense, sparse is the masked dense model, adapters are PEFT's."""

import copy
import dataclasses
import itertools
import textwrap

import pytest
import torch
from helpers import (
    SPARSE,
    VOCAB,
    add_lora,
    assert_same,
    assert_untouched,
    differs,
    gradients,
    loss_and_gradients,
    make_batch,
    randomise,
    relative_error,
    snapshot,
)
from hooked import HookedDense, fused_rows
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from reference import next_token_loss
from safetensors.torch import load_file
from torch import nn
from training import assert_same_run, make_trainer, trained
from transformers import AutoConfig, AutoModelForCausalLM
from zoo import (
    CONFIGS,
    EXPERTS,
    IMAGE_TOKEN,
    VISION,
    audio_batch,
    audio_model,
    vision_batch,
    vision_model,
    zoo_config,
    zoo_lora,
    zoo_model,
)

from sparselora_hf import FAMILIES, ModelFamily, SparseLoraConfig, TokenPlan, sparsify
from sparselora_hf.cost import keep_lists
from sparselora_hf.counting import count_layers
from sparselora_hf.families import families_table, find_family
from sparselora_hf.modules.classes import Patched
from sparselora_hf.shapes import ModelShape
from sparselora_hf.views import AttentionView, MlpView

SPARSE = SPARSE.replace(mlp_sparsity={"0": 0.9, "1": 0.5}, attention_sparsity=0.75, criterion="oracle")
TOL = 1e-5  # the norms and softmax of transformers compute in float32, whatever the model's type

every_model = pytest.mark.parametrize("name", CONFIGS)


def run(model, batch):
    """Logits, loss in the type of the logits, and gradients."""
    model.zero_grad(set_to_none=True)
    logits = model(**batch).logits
    loss = next_token_loss(logits, batch["labels"])
    if loss.requires_grad:  # not with adapters that are merged or disabled
        loss.backward()
    return logits.detach(), (loss.detach(), gradients(model))


def context_of(batch):
    labelled = batch["labels"] != -100
    predicts = torch.zeros_like(labelled)
    predicts[:, :-1] = labelled[:, 1:]
    return batch["attention_mask"].bool() & ~labelled & ~predicts


def compare(model, batch, config=SPARSE, family=None):
    """The sparse model against its own dense code under masks; returns the handle's decisions."""
    model, masked = model.double(), copy.deepcopy(model.double())
    text_config = model.get_base_model().config.get_text_config()
    family = family or find_family(text_config.model_type)
    dense = run(model, batch)[1]
    with sparsify(model, config, family=family, progress=False) as handle:
        assert "dense self" not in handle.report()  # what the check at attach makes dense would pass unseen
        handle.set_enabled(True)
        keep = {d.name: d.keep for d in handle.decisions if d.outcome == "sparse"}
        logits, got = run(model, batch)
        sets = {key: s.narrow.tolist() for key, s in handle.state.batch.selections.items() if key[1] != "qkv"}
    values_alone = family.normalises_queries(text_config)
    reference = HookedDense(masked, family, keep, context_of(batch), values_alone)
    want_logits, want = run(masked, batch)
    by_layer = {(_number(name), kind): kept for (name, kind), kept in reference.sets.items()}
    assert sets == {key: kept for key, kept in by_layer.items() if not (values_alone and key[1] == "qk")}
    real = batch["attention_mask"].bool()
    assert relative_error(logits[real], want_logits[real]) < TOL
    assert relative_error(got[0], want[0]) < TOL
    if want[1]:
        assert_same(got, want, TOL)
    assert differs(want, dense)
    return handle.decisions


def _number(name):
    return int(next(part for part in name.split(".") if part.isdigit()))


@every_model
def test_sparse_is_the_masked_dense_model(name):
    """Adapters on every linear; attention and MLP sparse; padding left out."""
    decisions = compare(zoo_lora(name, "all"), make_batch(), SPARSE.replace(exact=("padding", "frozen_below")))
    dense = [d for d in decisions if d.outcome == "dense"]
    family = FAMILIES[name.split(" ")[0]]
    mixers = [d for d in dense if d.reason == "it has no q, k, v and o that could drop channels"]
    experts = [d for d in dense if d.reason == "experts stay dense"]
    assert all(d.name.endswith(family.mixer or family.attention) for d in mixers)
    assert all(d.name.endswith(f"{family.mlp}.experts") for d in experts)
    assert bool(mixers) == bool(family.mixer or not family.has_projections)
    assert bool(experts) == bool(family.experts)
    assert len(dense) == len(mixers) + len(experts)


def exactly(model, batch, config):
    """Loss and gradients with every exact saving, the head fed with loss positions alone, as the trainer does it."""
    model.zero_grad(set_to_none=True)
    with sparsify(model, config, progress=False) as handle:
        plan = TokenPlan.from_batch(batch["labels"], batch["attention_mask"])
        handle.set_enabled(True)
        handle.state.begin(plan, batch["labels"].device, loss_only=True)
        handle.state.pinned, handle.state.head_rows = True, plan.head_rows
        inputs = {key: value for key, value in batch.items() if key != "labels"}
        logits = model(**inputs).logits
        assert logits.shape[:2] == (1, len(plan.loss))
        loss = nn.functional.cross_entropy(logits[0], plan.head_targets)
        loss.backward()
    return loss.detach(), gradients(model)


@every_model
@pytest.mark.parametrize("side", ["left", "right"])
def test_exact_savings_change_nothing(name, side):
    """At sparsity 0. A router of experts carries roundings of float32 to the fourth digit of a gradient."""
    model, batch = zoo_lora(name, "all"), make_batch((12, 5), (3, 2), side=side)
    if name.split(" ")[0] in EXPERTS:
        model.double()
    want = run(model, batch)[1]
    assert_same(exactly(model, batch, SPARSE.replace(mlp_sparsity=0.0, attention_sparsity=0.0)), want, 1e-4)
    want, shapes = loss_and_gradients(model, batch), []  # the model's own loss
    with sparsify(model, SparseLoraConfig(), progress=False) as handle:
        handle.loss_only = True
        model.register_forward_hook(lambda module, args, output: shapes.append(output.logits.shape[:2]))
        assert_same(loss_and_gradients(model, batch), want, 1e-4)
    assert shapes == [(1, int((batch["labels"][:, 1:] >= 0).sum()) + 1)]


@every_model
def test_adapter_is_plain_pefts(name, tmp_path):
    """Saved while sparse, it loads into a plain model without a key too many or too few, and merges."""
    model, batch = zoo_lora(name, "all"), make_batch()
    ids = batch["input_ids"][2:]
    with sparsify(model, SPARSE, progress=False) as handle:
        handle.set_enabled(True)
        loss_and_gradients(model, batch)
        want = logits_of(model, ids)
        model.save_pretrained(tmp_path)
        whole = copy.deepcopy(model).double()  # a router carries roundings of float32 far
        merged = copy.deepcopy(whole).eval().merge_and_unload()
        torch.testing.assert_close(logits_of(merged, ids), logits_of(whole, ids), rtol=1e-4, atol=1e-4)
    again = zoo_model(name)
    plain = PeftModel.from_pretrained(again, tmp_path)
    assert load_file(tmp_path / "adapter_model.safetensors").keys() == get_peft_model_state_dict(plain).keys()
    torch.testing.assert_close(logits_of(plain, ids), want, rtol=1e-5, atol=1e-5)


def logits_of(model, ids):
    with torch.no_grad():
        return model.eval()(input_ids=ids).logits


@pytest.mark.parametrize("way", ["no", "non-reentrant"])  # a reentrant checkpoint loses gradients by itself here
def test_layers_that_borrow_keys_and_values_and_are_wider(way):
    """Gemma 4: those of the lower layers are read by MLPs twice as wide, in the upper ones."""
    types = ["sliding_attention", "full_attention"] * 2
    upper = {"num_kv_shared_layers": 2, "use_double_wide_mlp": True}
    torch.manual_seed(0)
    config = zoo_config("gemma4_text", num_hidden_layers=4, layer_types=types, **upper)
    model = add_lora(randomise(AutoModelForCausalLM.from_config(config)), r".*layers.*_proj").train()
    batch = make_batch((12, 5), (3, 2), side="left")
    want = run(model, batch)[1]
    checkpoint(model, way)
    assert_same(exactly(model, batch, SparseLoraConfig()), want, 1e-5)
    decisions = compare(model, batch, SPARSE.replace(mlp_sparsity=0.5))
    assert [d.width for d in decisions if d.outcome == "sparse"] == [96, 96, 192, 192]


def test_gates_that_keep_their_largest_values_are_found():
    """Gemma 3n: in its lower layers; and its upper ones borrow keys and values."""
    types, gates = ["sliding_attention", "full_attention"] * 2, [0.9, 0.9, 0.0, 0.0]
    lower = {"num_kv_shared_layers": 2, "activation_sparsity_pattern": gates, "intermediate_size": [96] * 4}
    torch.manual_seed(0)
    config = zoo_config("gemma3n_text", num_hidden_layers=4, layer_types=types, **lower)
    model = add_lora(randomise(AutoModelForCausalLM.from_config(config)), r".*layers.*_proj").train()
    batch = make_batch((12, 5), (3, 2), side="left")
    want = run(model, batch)[1]
    assert_same(exactly(model, batch, SparseLoraConfig()), want, 1e-5)
    with sparsify(model, SPARSE.replace(mlp_sparsity=0.5), progress=False) as handle:
        mlps = [d for d in handle.decisions if d.name.endswith("mlp")]
    assert ["dense self" in d.reason for d in mlps] == [True, True, False, False]
    assert [d.outcome for d in mlps] == ["dense", "dense", "sparse", "sparse"]


# every kind of LoRA: what PEFT is told, and which parts cannot be sparse with it

PLAIN = {
    "LoRA": {},
    "rsLoRA": {"use_rslora": True},
    "PiSSA": {"init_lora_weights": "pissa"},
    "OLoRA": {"init_lora_weights": "olora"},
    "bias": {"lora_bias": True},
    "dropout": {"dropout": 0.2},
    "head saved": {"modules_to_save": ["lm_head"]},
}
KINDS = {
    **{kind: (settings, ()) for kind, settings in PLAIN.items()},
    "DoRA": ({"use_dora": True}, ("mlp",)),
    "DoRA with dropout": ({"use_dora": True, "dropout": 0.2}, ("mlp", "attention")),
}
PARTS = ("attention", "mlp", "all")
DTYPES = {"fp32": (torch.float32, 1e-4), "bf16": (torch.bfloat16, 0.1)}
CHECKPOINTING = ("no", "non-reentrant", "reentrant")


def matrix():
    """Every family with every sparsity and type, every kind with every part, type and checkpointing."""
    kinds, names = list(KINDS), list(CONFIGS)
    for number, (name, turn) in enumerate(itertools.product(names, range(2))):
        kind, part = kinds[number % len(kinds)], PARTS[number // 3 % 3]
        part = "attention" if name.split(" ")[0] in EXPERTS else part  # PEFT's kinds are not for experts
        dtype, checkpointing = list(DTYPES)[(number // 2 + turn) % 2], CHECKPOINTING[number % 3 - number // 9 % 3]
        for sparsity in ("0", "some"):
            yield pytest.param(name, kind, part, dtype, checkpointing, sparsity)


@pytest.mark.parametrize(("name", "kind", "part", "dtype", "checkpointing", "sparsity"), matrix())
def test_matrix(name, kind, part, dtype, checkpointing, sparsity):
    (settings, dense_parts), (dtype, tol) = KINDS[kind], DTYPES[dtype]
    model, batch = zoo_lora(name, part, dtype, **settings), make_batch()
    # rows that are left out draw no dropout, so that those behind them draw another
    config = SPARSE.replace(exact=("frozen_below",) if "dropout" in settings else ("padding", "frozen_below"))
    if sparsity == "0":
        want = result(model, batch)
        checkpoint(model, checkpointing)
        with sparsify(model, config.replace(mlp_sparsity=0.0, attention_sparsity=0.0), progress=False) as handle:
            handle.set_enabled(True)
            assert_same(result(model, batch), want, tol)
        return
    results = [result(model, batch)]
    for way in ("no", checkpointing):
        checkpoint(model, way)
        with sparsify(model, config, progress=False) as handle:
            handle.set_enabled(True)
            results.append(result(model, batch))
            reasons = {d.name: d.reason for d in handle.decisions if d.outcome == "dense" and d.width}
            # nothing reads the context rows of the last layer's MLP
            is_sparse = any(d.outcome == "sparse" and not d.name.endswith("1.mlp") for d in handle.decisions)
    assert_same(results[2], results[1], tol / 10)
    assert all(grad.isfinite().all() for grad in results[1][1].values())
    wanted = part_names(model, [p for p in dense_parts if part in (p, "all")])
    assert reasons.keys() == wanted and all("adapter on" in reason for reason in reasons.values())
    assert differs(results[1], results[0]) == is_sparse


def part_names(model, parts):
    """Names of the attentions and MLPs, where they are among the parts."""
    family = find_family(model.get_base_model().config.get_text_config().model_type)
    with sparsify(model, SparseLoraConfig(), progress=False) as handle:
        names = [d.name for d in handle.decisions if d.width]
    is_attention = {name: name.endswith(family.attention) for name in names}
    return {name for name in names if ("attention" if is_attention[name] else "mlp") in parts}


def result(model, batch):
    torch.manual_seed(0)
    return loss_and_gradients(model, batch)


def checkpoint(model, way):
    if way == "no":
        return model.gradient_checkpointing_disable()
    model.gradient_checkpointing_enable({"use_reentrant": way == "reentrant"})
    return model.enable_input_require_grads()


# images

_TOWER = r".*(language_model|text_model)\.layers.*_proj"


@pytest.mark.parametrize("name", VISION)
def test_language_tower_is_sparse_and_images_are_context(name):
    model, batch = add_lora(vision_model(name), _TOWER).train(), vision_batch(name)
    decisions = compare(model, batch)
    left = (".experts", "linear_attn", *(["self_attn"] if name == "gemma4" else []))
    assert all((d.outcome == "dense") == d.name.endswith(left) for d in decisions)
    # a shared MLP beside the experts; experts beside both MLPs
    assert len(decisions) == 4 + (name == "glm4v_moe") + 2 * (name == "gemma4")
    images = batch["input_ids"] == IMAGE_TOKEN
    assert images.any() and context_of(batch)[images].all()


@pytest.mark.parametrize("name", VISION)
def test_adapters_of_the_vision_tower_keep_their_gradients(name):
    # a tower's gradients are small differences of large numbers: in float32 they are rounding up to 1e-4
    model, batch = add_lora(vision_model(name), "all-linear").train().double(), vision_batch(name)
    batch = {key: tensor.double() if tensor.is_floating_point() else tensor for key, tensor in batch.items()}
    want = run(model, batch)[1]
    dense = SPARSE.replace(mlp_sparsity=0.0, attention_sparsity=0.0)
    assert_same(exactly(model, batch, dense), want, 1e-5)
    with sparsify(model, dense, progress=False) as handle:
        assert "exact saving frozen_below: off" in handle.report()
        assert "lies below the decoder layers" in handle.report()


def vision_lora(name):
    """In float64 where experts are: a router carries roundings of float32 far."""
    model, batch = add_lora(vision_model(name), _TOWER).train(), vision_batch(name)
    if any(part in name for part in ("moe", "gemma4")):
        model.double()
        batch = {key: value.double() if value.is_floating_point() else value for key, value in batch.items()}
    return model, batch


@pytest.mark.parametrize("name", VISION)
def test_where_nothing_but_the_loss_is_read_of_images_the_head_sees_labelled_rows(name):
    model, batch = vision_lora(name)
    if "moe" in name:
        batch["output_router_logits"] = True  # their balance is made of every token, and no logits
    want, shapes = loss_and_gradients(model, batch), []
    with sparsify(model, SparseLoraConfig(), progress=False) as handle:
        handle.loss_only = True
        model.register_forward_hook(lambda module, args, output: shapes.append(output.logits.shape[:2]))
        assert_same(loss_and_gradients(model, batch), want, 1e-4)
        savings = handle.state.batch.savings
    assert shapes == [(1, int((batch["labels"][:, 1:] >= 0).sum()) + 1)]
    assert savings >= ({"logits"} if "moe" in name else {"logits", "last_layer"})


@pytest.mark.parametrize("name", VISION)
def test_trainer_leaves_out_the_logits_of_images(name, tmp_path):
    runs, rows = [], []
    for config in (None, SparseLoraConfig()):
        model, batch = vision_lora(name)
        settings = {"data_collator": lambda _, batch=batch: dict(batch), "max_steps": 2, "router_aux_loss_coef": 0.0}
        trainer = make_trainer(tmp_path, config, model=model, **settings)
        norm = model.get_base_model().get_decoder().norm
        norm.register_forward_hook(lambda module, args, out, config=config: rows.append((config, out.shape[:2])))
        trainer.train()
        runs.append(trainer)
    assert_same_run(runs[1], runs[0])
    few = int((batch["labels"][:, 1:] >= 0).sum())
    assert [shape for config, shape in rows if config is not None][-1] == (1, few)
    assert [shape for config, shape in rows if config is None][-1] == batch["labels"].shape


# sounds


@pytest.mark.parametrize("side", ["left", "right"])
def test_loss_that_is_written_out_has_every_logit(side):
    """Qwen2-Audio looks at the attention mask in it, and at labels of other places than those of its tokens."""
    model, batch = add_lora(audio_model(), r".*language_model.*_proj").train(), make_batch(side=side)
    want = loss_and_gradients(model, batch)
    with sparsify(model, SparseLoraConfig(), progress=False) as handle:
        handle.loss_only = True
        assert_same(loss_and_gradients(model, batch), want, 1e-5)
        assert not handle.state.batch.savings & {"logits", "last_layer"}


@pytest.mark.parametrize("way", ["no", "non-reentrant", "reentrant"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_batch_that_the_model_makes_longer_is_dense(side, way, caplog):
    """Its labels are those of other rows than the decoder's."""
    model, batch = add_lora(audio_model(), r".*language_model.*_proj").train(), audio_batch(side)
    checkpoint(model, way)
    text = make_batch(side=side)
    want, plain_text = loss_and_gradients(model, batch), loss_and_gradients(model, text)
    with sparsify(model, SPARSE, progress=False) as handle:
        handle.set_enabled(True)
        assert_same(loss_and_gradients(model, batch), want, 1e-5)
        assert "changed the length of the batch" in caplog.text
        assert differs(loss_and_gradients(model, text), plain_text)


# the table


def test_an_outsider_describes_a_family(batch):
    """Other names, a fused projection: the row says it all."""
    model = zoo_lora("gpt_neox", "attention")
    row = FAMILIES["gpt_neox"]
    model.get_base_model().config.model_type = "mine"
    with pytest.raises(ValueError, match="'mine' is not known"):
        sparsify(model, SPARSE)
    compare(model, batch, family=dataclasses.replace(row, name="mine"))
    with pytest.raises(ValueError, match=r"GPTNeoXLayer has no 'self_attn', which the family gives as attention"):
        sparsify(model, SPARSE, family=ModelFamily("mine", norm="final_layer_norm"))


def test_error_of_an_unknown_family_holds_a_runnable_example(batch):
    model = zoo_lora("llama")
    model.get_base_model().config.model_type = "llamoid"
    with pytest.raises(ValueError, match=r"Known: apertus, .*youtu") as error:
        sparsify(model, SPARSE)
    example = textwrap.dedent(str(error.value).split("takes one):\n")[1])
    assert "qk_norm=True if it normalises" in example
    names = {"model": model, "config": SPARSE}
    exec(example, names)  # as a user would paste it
    assert names["family"].name == "llamoid"
    assert any(isinstance(module, Patched) for module in model.modules())


def test_outsider_whose_projections_are_no_linears(tmp_path):
    """GPT-2's are transposed: refused by name, before a trainer wraps the model."""
    config = AutoConfig.for_model("gpt2", vocab_size=VOCAB, n_embd=64, n_layer=2, n_head=4)
    model = AutoModelForCausalLM.from_config(config)
    names = {"norm": "ln_f", "attention": "attn", "qkv": "c_attn", "o": "c_proj"}
    row = ModelFamily("gpt2", layers="h", **names, gate="", up="c_fc", down="c_proj", activation="act")
    before = snapshot(model)
    lora = LoraConfig(target_modules=["c_attn"], task_type="CAUSAL_LM")
    with pytest.raises(ValueError, match=r"'c_proj' of GPT2MLP, .* as down, is a Conv1D\. Only linears"):
        make_trainer(tmp_path, SPARSE, model=model, model_family=row, peft_config=lora)
    assert_untouched(model, before)
    with pytest.raises(ValueError, match=r"'c_proj' of GPT2MLP, .* is a Conv1D"):
        sparsify(get_peft_model(model, lora), SPARSE, family=row)


def test_outsider_whose_configuration_has_other_names(tmp_path):
    """Refused before a trainer wraps the model; with the number under the name asked for it trains."""
    model = zoo_model("gpt_neox")
    row = dataclasses.replace(FAMILIES["gpt_neox"], name="mine")
    del model.config.intermediate_size
    before = snapshot(model)
    lora = LoraConfig(target_modules=["query_key_value"], task_type="CAUSAL_LM")
    settings = {"model": model, "model_family": row, "peft_config": lora, "max_steps": 2}
    with pytest.raises(ValueError, match=r"configuration has no intermediate_size\. Where .* set them under these"):
        make_trainer(tmp_path, SPARSE, **settings)
    assert_untouched(model, before)
    model.config.intermediate_size = 96
    assert len(trained(tmp_path, SPARSE.replace(start_step=1), **settings).losses) == 2


@pytest.mark.parametrize("name", ["olmoe", "qwen2_moe"])
def test_mixture_that_is_trained_as_a_whole_stays_dense(name, batch):
    """PEFT's wrapper hides the experts."""
    model = zoo_lora(name, modules_to_save=["mlp"]).double()
    want = loss_and_gradients(model, batch)
    with sparsify(model, SPARSE.replace(attention_sparsity=0.0), progress=False) as handle:
        handle.set_enabled(True)
        assert_same(loss_and_gradients(model, batch), want, 1e-5)
        assert {d.name.split(".")[-1] for d in handle.decisions if d.outcome == "dense"} == {"experts"}


def test_outsider_that_norms_its_embeddings_by_the_final_norm(tmp_path):
    """NanoChat: the loss positions are taken where the norm is called behind the layers."""
    row = ModelFamily("nanochat", qk_norm=True, gate="", up="fc1", down="fc2", activation="activation_fn")
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 8, "num_key_value_heads": 4}
    config = AutoConfig.for_model("nanochat", vocab_size=VOCAB, num_hidden_layers=2, pad_token_id=0, **sizes)
    torch.manual_seed(0)
    plain = randomise(AutoModelForCausalLM.from_config(config))
    models = [add_lora(copy.deepcopy(plain), "all-linear") for _ in range(3)]
    compare(models[0].train(), make_batch(), SPARSE.replace(exact=("padding", "frozen_below")), row)
    dense = trained(tmp_path, model=models[1], max_steps=2)
    exact = trained(tmp_path, SparseLoraConfig(), model=models[2], model_family=row, max_steps=2)
    assert_same_run(exact, dense)


@pytest.mark.parametrize("by_head", [False, True], ids=["in blocks", "by head"])
def test_shares_of_a_fused_projection(by_head):
    """Grouped queries: two heads of keys and values, three query heads each."""
    heads, kv, d, hidden = 6, 2, 4, 5
    attention = nn.Module()
    attention.wqkv, attention.wo = nn.Linear(hidden, (heads + 2 * kv) * d), nn.Linear(heads * d, hidden)
    attention.d = d
    family = ModelFamily("mine", qkv="wqkv", qkv_by_head=by_head, o="wo", head_dim="d")
    view = AttentionView.of(attention, family)
    assert (view.layout.heads, view.layout.kv_heads, view.layout.head_dim) == (heads, kv, d)
    rows = fused_rows(attention, family, heads, d)
    for role in "qkv":
        torch.testing.assert_close(view.inputs[role].weight, attention.wqkv.weight[rows[role]], rtol=0, atol=0)
        torch.testing.assert_close(view.inputs[role].bias, attention.wqkv.bias[rows[role]], rtol=0, atol=0)
        index = torch.arange(0, len(rows[role]), 3)
        assert view.inputs[role].rows(index).tolist() == [rows[role][c] for c in index]


def test_table_names_every_family():
    header, rows = families_table()
    assert {row[1].strip("`") for row in rows} == FAMILIES.keys()
    assert all(len(row) == len(header) and all(row) for row in rows)
    towers = {config["text_config"]["model_type"] for config, _ in VISION.values()}
    assert towers | {CONFIGS[name].get("model_type", name) for name in CONFIGS} == FAMILIES.keys()


# through TRL, and the cost model


@pytest.mark.parametrize("name", ["cohere", "gemma2", "granite", "phi", "gpt_neox", "mixtral"])
def test_trainer_gives_the_losses_of_sft(name, tmp_path):
    """Logit scales, soft-capping, a head with a bias, other norms: TRL's fused head gets loss positions alone."""
    dense = trained(tmp_path, model=zoo_lora(name), max_steps=2)
    exact = trained(tmp_path, SparseLoraConfig(), model=zoo_lora(name), max_steps=2)
    assert exact.losses == pytest.approx(dense.losses, rel=1e-5)
    zero = torch.tensor(0.0)
    assert_same((zero, exact.recorder.gradients[-1]), (zero, dense.recorder.gradients[-1]), 1e-4)


@every_model
def test_shape_of_the_configuration(name):
    """What the cost model reads from a configuration is what the model has, but for what `count_layers` adds."""
    model = zoo_model(name)
    family = find_family(model.config.model_type)
    shape, layers = ModelShape.from_config(model.config), model.get_decoder().layers
    counted = count_layers(shape, model, family)
    if family.has_projections:
        attention = AttentionView.of(layers[-1].get_submodule(family.attention), family)
        assert (shape.heads, shape.kv_heads, shape.head_dim) == dataclasses.astuple(attention.layout)
    attends = [family.has_projections and getattr(layer, family.attention, None) is not None for layer in layers]
    assert [keep is not None for keep in keep_lists(SPARSE, counted)[1]] == attends
    assert shape.sparse_qk != family.normalises_queries(model.config)
    mlps = [layer.get_submodule(family.mlp) for layer in layers]
    mlp = next((mlp for mlp in mlps if hasattr(mlp, family.experts)), mlps[0])
    # neither biases nor norms nor routers, which have a row for each of at most four experts
    matrices = {key: p for key, p in mlp.named_parameters() if p.dim() > 1 and "bias" not in key}
    weights = sum(p.numel() for p in matrices.values() if min(p.shape[-2:]) > 4)
    assert weights == shape.mlp_matrices * shape.hidden * max(shape.stored, shape.intermediate)
    assert len(shape.mlp_names) == shape.mlp_matrices == (3 if family.is_gated else 2)
    if not family.experts:
        assert shape.intermediate == MlpView.of(mlp, family).width


def test_trainer_takes_a_family(tmp_path):
    model = zoo_lora("gpt_neox")
    want = trained(tmp_path, SPARSE.replace(start_step=1), model=model, max_steps=2).losses
    model = zoo_lora("gpt_neox")
    model.get_base_model().config.model_type = "mine"
    with pytest.raises(ValueError, match="'mine' is not known"):
        trained(tmp_path, SPARSE, model=model)
    family = dataclasses.replace(FAMILIES["gpt_neox"], name="mine")
    got = trained(tmp_path, SPARSE.replace(start_step=1), model=model, model_family=family, max_steps=2).losses
    assert got == pytest.approx(want, rel=1e-6)
