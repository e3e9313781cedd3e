import dataclasses

import pytest

from sparselora_hf.config import SparseLoraConfig
from sparselora_hf.cost import (
    GROUPS,
    StepCost,
    activation_bytes,
    bound,
    keep_lists,
    layer_cost,
    step_cost,
    weight_bytes,
)
from sparselora_hf.shapes import MODEL_SHAPES, BatchShape, LayerShape, LoraShape, ModelShape

LLAMA = ModelShape(4096, 14336, 32, 8, 128, layers=32, vocab=128256)
TINY = ModelShape(hidden=8, intermediate=20, heads=4, kv_heads=2, head_dim=2, layers=3, vocab=10)
NO_LORA = LoraShape(0, ())
THREE_QUARTERS = BatchShape(context=384, output=128, padding=0, loss=128, batch=1, sequence=512)
SMALL = BatchShape(context=5, output=3, padding=2, loss=2, batch=1, sequence=10)


def multiply_adds(cost: StepCost) -> float:
    """Millions per token of the linears, forward."""
    forward = cost.mlp.forward + cost.projections.forward + cost.head.forward
    return forward / 2 / THREE_QUARTERS.tokens / 1e6


def math_schedule(**options) -> StepCost:
    mlp, attention = keep_lists(SparseLoraConfig.from_preset("llama-3-8b-math"), LLAMA)
    return step_cost(LLAMA, THREE_QUARTERS, NO_LORA, mlp_keep=mlp, attention_keep=attention, **options)


# the bound worked out by hand for Llama-3-8B on math, in millions of multiply-adds per token


def test_dense_llama_3_8b():
    cost = step_cost(LLAMA, THREE_QUARTERS, NO_LORA)
    assert multiply_adds(cost) == pytest.approx(6979.3 + 525.3, abs=0.2)
    assert cost.head.forward / 2 / 512e6 == pytest.approx(525.3, abs=0.1)


def test_math_schedule_leaves_2986():
    cost = math_schedule()
    assert multiply_adds(cost) - cost.head.forward / 2 / 512e6 == pytest.approx(2986.5, abs=0.5)


@pytest.mark.parametrize(("exact", "total", "ratio"), [((), 3117.5, 2.28), (("last_layer",), 2960.5, 2.40)])
def test_math_schedule_bound(exact, total, ratio):
    dense = multiply_adds(step_cost(LLAMA, THREE_QUARTERS, NO_LORA, head="labels"))
    sparse = multiply_adds(math_schedule(exact=exact, head="labels"))
    assert dense == pytest.approx(7111, abs=0.5)
    assert sparse == pytest.approx(total, abs=1)
    assert dense / sparse == pytest.approx(ratio, abs=0.005)


# single terms, by hand on a small shape


def test_dense_layer_groups():
    cost = layer_cost(TINY, SMALL, LoraShape(2), layer=1)
    assert cost.mlp.forward == 2 * 10 * 3 * 8 * 20
    assert cost.projections.forward == 2 * 10 * (8 * 8 + 8 * 4 + 8 * 4 + 8 * 8)
    assert cost.attention.forward == 2 * 2 * (10 * 10) * 8  # padded rows come with a mask
    assert cost.lora.forward == 2 * 10 * 2 * ((8 + 8) + (8 + 4) + (8 + 4) + (8 + 8))
    assert cost.mlp.backward == cost.mlp.forward
    assert cost.lora.backward == 2 * cost.lora.forward
    assert cost.attention.backward == 2.5 * cost.attention.forward  # five products for two
    assert cost.head.total == cost.estimator.total == 0


def test_sparse_layer_keeps_channels_for_context_rows_only():
    cost = layer_cost(TINY, SMALL, NO_LORA, layer=1, mlp_keep=4, attention_keep=1)
    assert cost.mlp.forward == 2 * 3 * 8 * (5 * 20 + 5 * 4)
    whole, kept = 8 * 8 * 2 + 8 * 4 * 2, 8 * 2 * 2 + 8 * 1 * 2  # one kv channel stands for two query channels
    assert cost.projections.forward == 2 * (5 * whole + 5 * kept)


def test_estimator_and_stand_in():
    cost = layer_cost(TINY, SMALL, NO_LORA, layer=1, mlp_keep=4, attention_keep=1, rank=2, compensation_rank=3)
    plain = layer_cost(TINY, SMALL, NO_LORA, layer=1, mlp_keep=4, attention_keep=1)
    assert cost.estimator.forward == 2 * 5 * (2 * (8 * 2 + 2 * 20) + 3 * (8 * 2 + 2 * 2))
    assert cost.estimator.backward == 0
    assert cost.mlp.forward - plain.mlp.forward == 2 * 5 * 3 * (2 * 8 + 4)
    factors = (8 + 8) + (8 + 4) + (8 + 4) + (8 + 8)  # in and out of q, k, v and o
    assert cost.projections.forward - plain.projections.forward == 2 * 5 * 3 * factors


@pytest.mark.parametrize(("tokens", "scored"), [(None, 5), (2, 2), (9, 5)])
def test_scores_by_the_weights_and_of_some_tokens(tokens, scored):
    keeps = {"mlp_keep": 4, "attention_keep": 1, "score_tokens": tokens}
    by_weights, by_factors = (layer_cost(TINY, SMALL, NO_LORA, layer=1, rank=rank, **keeps) for rank in (None, 2))
    assert by_weights.estimator.forward == 2 * scored * (2 * 8 * 20 + 8 * 8 + 2 * 8 * 4)  # gate and up; q, k and v
    assert by_factors.estimator.forward == 2 * scored * (2 * (8 * 2 + 2 * 20) + 3 * (8 * 2 + 2 * 2))
    assert by_weights.estimator.backward == by_factors.estimator.backward == 0


def test_normalised_queries_and_keys_are_not_scored_and_need_no_stand_in():
    shape = dataclasses.replace(TINY, sparse_qk=False)
    cost = layer_cost(shape, SMALL, NO_LORA, layer=1, attention_keep=1, rank=2, compensation_rank=3)
    plain = layer_cost(shape, SMALL, NO_LORA, layer=1, attention_keep=1)
    assert cost.estimator.forward == 2 * 5 * (8 * 2 + 2 * 2)  # v
    assert cost.projections.forward - plain.projections.forward == 2 * 5 * 3 * ((8 + 4) + (8 + 8))  # v and o


def test_experts_are_not_scored_and_need_no_stand_in():
    """Of 20 channels that a token passes through 12 are of experts; of the other 8 a sparse layer keeps 3."""
    mixture = dataclasses.replace(TINY, sparse_mlp=8)
    plain, cost = (layer_cost(mixture, SMALL, NO_LORA, 1, mlp_keep=15, rank=r, compensation_rank=r) for r in (0, 2))
    assert cost.estimator.forward == 2 * 5 * 2 * (8 * 2 + 2 * 8)
    assert cost.mlp.forward - plain.mlp.forward == 2 * 5 * 2 * (8 + 3 + 8)


def test_what_is_in_the_place_of_attention():
    """Two linears in layer 1: they and their adapters cost by their sizes, and the core is as wide as it says."""
    own = (LayerShape(20), LayerShape(20, linears=((8, 4), (4, 8)), core=6), LayerShape(20))
    shape, lora = dataclasses.replace(TINY, own=own), LoraShape(2)
    cost = layer_cost(shape, SMALL, lora, layer=1, exact=("padding", "last_layer"))
    assert cost.projections.forward == cost.projections.backward == 2 * 10 * (8 * 4 + 4 * 8)
    assert cost.lora.forward == 2 * 10 * 2 * (12 + 12)
    assert cost.attention.forward == 2 * 2 * (10 * 11 / 2) * 6
    assert layer_cost(shape, SMALL, lora, layer=0) == layer_cost(TINY, SMALL, lora, layer=0)
    assert lora.parameters(TINY) - lora.parameters(shape) == 2 * (16 + 12 + 12 + 16 - 12 - 12)
    config = SparseLoraConfig(mlp_sparsity=0.5, attention_sparsity=0.5)
    assert keep_lists(config, shape) == ([10, 10, 10], [2, None, 2])


def test_gate_of_attention_is_computed_beside_the_queries():
    gated = layer_cost(dataclasses.replace(TINY, gates=8), SMALL, NO_LORA, layer=1)
    assert gated.projections.forward - layer_cost(TINY, SMALL, NO_LORA, layer=1).projections.forward == 2 * 10 * 8 * 8


def test_each_layer_has_its_own_mlp():
    """A dense layer is as wide as the MLP beside the experts of the two others."""
    mixture = LayerShape(20, 8)
    shape = dataclasses.replace(TINY, own=(LayerShape(8), mixture, mixture))
    assert keep_lists(SparseLoraConfig(mlp_sparsity=0.5), shape)[0] == [4, 12 + 4, 12 + 4]
    assert step_cost(shape, SMALL, NO_LORA).mlp.forward == 2 * 10 * 3 * 8 * (8 + 20 + 20)
    assert activation_bytes(shape, SMALL, NO_LORA) < activation_bytes(TINY, SMALL, NO_LORA)


def test_lora_on_the_mlp_follows_kept_channels():
    lora = LoraShape(2, ("down_proj",))
    cost = layer_cost(TINY, SMALL, lora, layer=1, mlp_keep=4)
    assert cost.lora.forward == 2 * 2 * (5 * (20 + 8) + 5 * (4 + 8))
    assert lora.parameters(TINY) == 3 * 2 * 28


def test_exact_last_layer():
    whole, cost = layer_cost(TINY, SMALL, NO_LORA, 2), layer_cost(TINY, SMALL, NO_LORA, 2, exact=("last_layer",))
    assert cost.mlp.forward == whole.mlp.forward * 2 / 10
    assert cost.projections.forward == 2 * (2 * 8 * 8 * 2 + 10 * 8 * 4 * 2)
    assert layer_cost(TINY, SMALL, NO_LORA, 1, exact=("last_layer",)) == layer_cost(TINY, SMALL, NO_LORA, 1)


def test_exact_padding_and_frozen_below():
    assert layer_cost(TINY, SMALL, NO_LORA, 1, exact=("padding",)).mlp.forward == 2 * 8 * 3 * 8 * 20
    assert layer_cost(TINY, SMALL, NO_LORA, 1, exact=("padding",)).attention.forward == 2 * 2 * (10 * 11 / 2) * 8
    first = layer_cost(TINY, SMALL, NO_LORA, 0, exact=("frozen_below",))
    assert first.projections.backward == 2 * 10 * 8 * 8  # o alone passes a gradient on
    assert first.mlp.backward == first.mlp.forward


@pytest.mark.parametrize(
    ("options", "rows"), [({}, 10), ({"head": "labels"}, 2), ({"exact": ("logits",)}, 2)], ids=["all", "gpu", "exact"]
)
def test_head_has_three_products(options, rows):
    assert step_cost(TINY, SMALL, NO_LORA, **options).head.total == 3 * 2 * rows * 8 * 10


@pytest.mark.parametrize("adapted", [False, True], ids=["frozen down_proj", "adapter on down_proj"])
def test_checkpointing_adds_a_forward_of_the_layers(adapted):
    lora = LoraShape(2, ("q_proj", "down_proj") if adapted else ("q_proj",))
    options = {"mlp_keep": [None, 4, None], "rank": 2}
    plain = step_cost(TINY, SMALL, lora, **options)
    again = step_cost(TINY, SMALL, lora, checkpointing=True, **options)
    layers = plain.forward - plain.head.forward - plain.estimator.forward
    down = 2 * 8 * (2 * 10 * 20 + 5 * 20 + 5 * 4)  # two dense layers; one with 5 rows whole, 5 rows on 4 channels
    assert again.backward - plain.backward == pytest.approx(layers - (0 if adapted else down))
    assert again.forward == plain.forward
    assert again.bytes > plain.bytes


def test_attention_is_not_computed_again_where_its_result_is_kept():
    plain = step_cost(TINY, SMALL, NO_LORA)
    again = step_cost(TINY, SMALL, NO_LORA, checkpointing=True)
    kept = step_cost(TINY, SMALL, NO_LORA, checkpointing=True, exact=("recomputation",))
    assert again.attention.backward == plain.attention.backward + plain.attention.forward
    assert kept.attention == plain.attention
    assert kept.projections == again.projections
    options = {"checkpointing": True, "element": 1.0}
    more = activation_bytes(TINY, SMALL, NO_LORA, exact=("recomputation",), **options)
    assert more - activation_bytes(TINY, SMALL, NO_LORA, **options) == 3 * 10 * 8  # layers, tokens, width of queries


def test_step_is_the_sum_of_its_layers():
    mlp, attention = [4, None, 4], [None, 2, 2]
    options = {"exact": ("last_layer", "frozen_below", "padding"), "rank": 2}
    step = step_cost(TINY, SMALL, LoraShape(2), mlp_keep=mlp, attention_keep=attention, **options)
    layers = (
        layer_cost(TINY, SMALL, LoraShape(2), i, mlp_keep=mlp[i], attention_keep=attention[i], **options)
        for i in range(3)
    )
    total = sum(layers, StepCost())
    for group in set(GROUPS) - {"head"}:
        assert getattr(step, group) == getattr(total, group)
    assert step.linear == step.mlp.total + step.projections.total + step.head.total
    assert step.total == step.forward + step.backward


def test_bound_of_equal_steps_is_one():
    cost = step_cost(TINY, SMALL, NO_LORA)
    assert bound(cost, cost) == 1.0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mlp_keep": [4]}, "mlp_keep: 1 entries for 3 layers"),
        ({"exact": ("logit",)}, "exact: logit"),
        ({"head": "some"}, "head: 'some'"),
    ],
)
def test_step_cost_errors(options, message):
    with pytest.raises(ValueError, match=message):
        step_cost(TINY, SMALL, NO_LORA, **options)


# shapes


def test_batch_full():
    batch = BatchShape.full(batch=2, sequence=100, output=10, fill=0.8)
    assert (batch.context, batch.output, batch.padding, batch.loss, batch.tokens) == (138, 22, 40, 20, 200)


@pytest.mark.parametrize("arguments", [(1, 10, 10), (1, 10, 2, 0.0), (1, 10, 2, 1.5)])
def test_batch_full_errors(arguments):
    with pytest.raises(ValueError, match=r"output: |fill: "):
        BatchShape.full(*arguments)


@pytest.mark.parametrize(
    ("name", "millions"), [("llama-3-8b", 8030.26), ("llama-2-13b", 13015.86), ("llama-3.2-1b", 1235.81)]
)
def test_parameters_of_known_models(name, millions):
    from transformers import AutoConfig

    shape = ModelShape.from_config(AutoConfig.for_model(**MODEL_SHAPES[name]))
    assert shape.parameters / 1e6 == pytest.approx(millions, abs=0.01)


@pytest.mark.parametrize("model_type", ["llama", "mistral", "qwen2"])
def test_shape_counts_what_the_model_holds(model_type):
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(
        model_type,
        hidden_size=32,
        intermediate_size=48,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_hidden_layers=2,
        vocab_size=40,
    )
    shape = ModelShape.from_config(config)
    weights = AutoModelForCausalLM.from_config(config).named_parameters()
    assert shape.parameters == sum(weight.numel() for name, weight in weights if not name.endswith("bias"))
    assert (shape.head_dim, shape.kv_width) == (8, 16)


def test_shape_of_a_foreign_configuration_raises():
    from transformers import GPT2Config

    with pytest.raises(ValueError, match="gpt2 configuration has no"):
        ModelShape.from_config(GPT2Config())


def foreign_configuration(**options):
    from transformers import PretrainedConfig

    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 4, "num_hidden_layers": 2}
    return PretrainedConfig(**{**sizes, "vocab_size": 40, **options})


def test_shape_of_experts_counted_by_another_name_raises():
    config = foreign_configuration(num_experts=8, experts_taken=2, moe_intermediate_size=32)
    with pytest.raises(ValueError, match="has no num_experts_per_tok"):
        ModelShape.from_config(config)
    config.num_experts_per_tok = 2
    assert ModelShape.from_config(config).intermediate == 64


def test_shape_of_an_mlp_beside_experts():
    """Gemma 4's: every token passes through both."""
    names = {"num_experts": 8, "top_k_experts": 2, "moe_intermediate_size": 32, "enable_moe_block": True}
    shape = ModelShape.from_config(foreign_configuration(**names))
    assert (shape.intermediate, shape.droppable, shape.stored) == (2 * 32 + 24, 24, 8 * 32 + 24)


def test_shape_of_mlps_listed_layer_by_layer_has_the_widest():
    shape = ModelShape.from_config(foreign_configuration(intermediate_size=[24, 40]))
    assert shape.widths()["down_proj"] == (40, 16)
    assert shape.parameters > 0


def test_keep_lists_leave_dense_layers_out():
    mlp, attention = keep_lists(SparseLoraConfig(mlp_sparsity={"1-2": 0.5}, attention_sparsity={2: 0.25}), TINY)
    assert mlp == [None, 10, 10]
    assert attention == [None, None, 3]


# memory


def test_activation_bytes_by_hand():
    fixed = 10 * (3 * 8 + 2 * (8 + 4) + 2 * 4)
    dense = activation_bytes(TINY, SMALL, LoraShape(2), element=1)
    assert dense == 3 * (fixed + 3 * 10 * 20)
    sparse = activation_bytes(TINY, SMALL, LoraShape(2), mlp_keep=[None, 4, None], element=1)
    assert dense - sparse == 3 * 5 * (20 - 4)
    kept_inputs = activation_bytes(TINY, SMALL, LoraShape(2), checkpointing=True, element=1)
    assert kept_inputs == 3 * 10 * 8 + fixed + 3 * 10 * 20
    lean = activation_bytes(TINY, SMALL, LoraShape(2), mlp_keep=[None, 4, None], exact=("activations",), element=1)
    assert sparse - lean == (10 + 5 + 10) * 20  # rows of each layer that are dense
    plain = dataclasses.replace(TINY, mlp_matrices=2)
    saved = [activation_bytes(plain, SMALL, LoraShape(2), exact=exact) for exact in ((), ("activations",))]
    assert saved[0] == saved[1]


def test_weight_bytes():
    assert weight_bytes(TINY, LoraShape(2)) == 2 * TINY.parameters + 16 * LoraShape(2).parameters(TINY)
