"""What `estimate` counts from a configuration, and the log in a model, against what the model computes."""

import pytest
from helpers import SPARSE, add_lora, make_batch, randomise
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForCausalLM
from zoo import CONFIGS, VISION, VOCAB, lora_targets, vision_model, zoo_config, zoo_model

from sparselora_hf import sparsify
from sparselora_hf.cli.estimate import counted_shape
from sparselora_hf.cost import BatchShape, LoraShape, keep_lists, step_cost
from sparselora_hf.families import find_family
from sparselora_hf.plan import TokenPlan

CONFIG = SPARSE.replace(mlp_sparsity=0.5, exact=False, criterion="output")
# layers that differ in ways that the models of the zoo do not
MORE = {
    "deepseek_v3": {"n_shared_experts": 3},  # as wide as the MLP of the dense layer
    "gemma4_text": {
        "num_hidden_layers": 4,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "num_kv_shared_layers": 2,
        "use_double_wide_mlp": True,
    },
    "granitemoehybrid": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "lfm2": {"block_auto_adjust_ff_dim": True},
}


def batch_without_images():
    batch = make_batch()
    batch["input_ids"].clamp_(max=VOCAB - 4)
    return batch


def hold(model):
    """The counter's figure for the dense forward, estimate's and the log's for a step, a dense and a sparse one."""
    batch = batch_without_images()
    with FlopCounterMode(display=False) as counter:
        model.eval()(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
    products = counter.get_flop_counts()["Global"]
    plan = TokenPlan.from_batch(batch["labels"], batch["attention_mask"])
    rows = plan.shape[0] * plan.shape[1]
    kinds = (len(plan.context), len(plan.output), rows - plan.tokens, len(plan.loss))
    shape, tokens = counted_shape(model.config), BatchShape(*kinds, *plan.shape)
    dense = step_cost(shape, tokens, LoraShape(0))
    forward = dense.mlp.forward + dense.projections.forward + dense.head.forward
    tower = r".*language_model.*(q_proj|o_proj)" if model.config.model_type == "gemma4" else ""
    model = add_lora(model, tower or lora_targets(model, "attention")).train()
    with sparsify(model, CONFIG, progress=False) as handle:
        meter = handle.state.meter
        meter.add(plan, True, frozenset())
        keep = dict(zip(("mlp_keep", "attention_keep"), keep_lists(CONFIG, shape), strict=True))
        sparse = step_cost(shape, tokens, LoraShape(0), compensation_rank=meter.rank, **keep)
        assert (meter.dense_flops, meter.flops) == pytest.approx((dense.linear, sparse.linear))
    return forward, sum(flops for kind, flops in products.items() if str(kind) in ("aten.mm", "aten.addmm"))


def check(model):
    """Routers are not counted, nor what Gemma 3n and 4 have beside attention and MLP, which is much in a tiny 3n."""
    text = model.config.get_text_config()
    weights = model.get_decoder().num_parameters()
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    shape = counted_shape(model.config)
    assert shape.tied == tied
    assert shape.parameters == weights + (0 if tied else VOCAB * text.hidden_size)
    beside = getattr(text, "hidden_size_per_layer_input", 0) * text.num_hidden_layers * 3  # in, out, and of all layers
    forward, counter = hold(model)
    counter -= 2 * batch_without_images()["input_ids"].numel() * text.hidden_size * beside
    assert forward == pytest.approx(counter, rel=0.01) or text.model_type == "gemma3n_text"
    assert forward <= counter


@pytest.mark.parametrize("name", CONFIGS)
def test_estimate_and_log_count_what_a_model_computes(name):
    check(zoo_model(name))


@pytest.mark.parametrize("name", MORE)
def test_of_layers_that_differ(name):
    config = zoo_config(name, **MORE[name])
    check(randomise(AutoModelForCausalLM.from_config(config, experts_implementation="eager")))


def test_of_a_mixture_without_another_width():
    """As the configuration of Qwen3.5-MoE, which has no `intermediate_size`."""
    config = zoo_config("qwen3_5_moe_text")
    del config.intermediate_size
    check(randomise(AutoModelForCausalLM.from_config(config, experts_implementation="eager")))


@pytest.mark.parametrize("name", VISION)
def test_of_a_language_tower(name):
    check(vision_model(name))


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("name", ["glm4v", "qwen2_vl", "qwen2_5_vl", "qwen3_vl_moe"])
def test_the_head_is_tied_where_the_whole_model_says_so(name, tied):
    config = AutoConfig.for_model(name, **VISION[name][0], tie_word_embeddings=tied)
    assert counted_shape(config).tied == tied


def test_report_names_experts_beside_the_mlp():
    config = zoo_config("granitemoehybrid", **MORE["granitemoehybrid"])
    model = randomise(AutoModelForCausalLM.from_config(config, experts_implementation="eager"))
    handle = sparsify(add_lora(model, lora_targets(model, "attention")), CONFIG)
    experts = [decision for decision in handle.decisions if decision.reason == "experts stay dense"]
    beside = find_family("granitemoehybrid").experts_beside
    assert [decision.name.split("layers.")[1] for decision in experts] == [f"{layer}.{beside}" for layer in (0, 1)]
