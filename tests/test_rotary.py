"""Rotary position embedding in one function: same numbers, and only where a family turns halves of its heads."""

import copy
import functools
import io
import itertools
import types

import pytest
import torch
from helpers import assert_same, kept_for_backward, lora_model, loss_and_gradients, make_batch
from torch.autograd import gradcheck
from transformers.models.llama import modeling_llama
from transformers.models.llama.modeling_llama import LlamaAttention, apply_rotary_pos_emb
from zoo import VARIED, zoo_lora

from sparselora_hf import SparseLoraConfig, sparsify
from sparselora_hf.modules import rotary
from sparselora_hf.modules.rotary import LeanAttention
from sparselora_hf.ops.rotary import lean_rotary

LEAN = SparseLoraConfig(exact=("rotary",))
# pairs of neighbours, or half as many angles
OTHERWISE = {"cohere", "cohere2", "deepseek_v2", "ernie4_5", "ernie4_5_moe", "glm", "glm4", "gpt_oss", "helium"}
OTHERWISE |= {"cohere2_moe", "nanochat"}  # the latter turns the other way round
OTHERWISE |= {"bailing_hybrid", "deepseek_v32", "glm_moe_dsa", "kimi_linear"}
OTHERWISE |= {"gemma3n_text", "gemma4_text", "gemma4_unified_text"}  # queries and keys one after the other
# heads with angles of a share of them, a function of another name for pairs, or no positions at all
SHARES = {"deepseek_v3", "glm4_moe", "glm4_moe_lite", "gpt_neox", "granitemoehybrid", "nemotron"}
SHARES |= {"axk1", "bamba", "lara_mini", "qwen3_5_moe_text", "qwen3_5_text", "qwen3_next", "sarvam_mla", "youtu"}
# that take part, of two: in some layers there are no positions, or no attention
ATTENTIONS = {
    **dict.fromkeys(OTHERWISE | SHARES, 0),
    "exaone4": 1,
    "exaone_moe": 1,
    "lfm2": 1,
    "lfm2_moe": 1,
    "lfm3": 1,
    "olmo_hybrid": 1,
    "smollm3": 1,
}
NARROW = (torch.float32, torch.bfloat16, torch.float16)
TYPES = [*itertools.product(NARROW, repeat=2), (torch.float64, torch.float64)]


def arguments(dtype, angles, shared=False):
    """Queries, keys, cosines and sines, whose halves differ here."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    q, k = (draw(2, 5, heads, 6).to(dtype).transpose(1, 2).requires_grad_() for heads in (4, 2))
    return q, k, *(draw(1 if shared else 2, 5, 6).to(angles) for _ in range(2))


@pytest.mark.parametrize("shared", [False, True], ids=["angles each", "angles shared"])
@pytest.mark.parametrize(("dtype", "angles"), TYPES, ids=str)
def test_forward_and_backward_are_the_familys_bit_for_bit(dtype, angles, shared):
    results = []
    for run in (apply_rotary_pos_emb, lean_rotary):
        q, k, cos, sin = arguments(dtype, angles, shared)
        turned = run(q, k, cos, sin)
        grads = [torch.linspace(-1, 1, x.numel()).view(x.shape).to(x.dtype) for x in turned]
        results.append((*turned, *torch.autograd.grad(turned, (q, k), grads)))
    for got, want in zip(*results, strict=True):
        assert got.dtype == want.dtype
        assert torch.equal(got, want)


def test_gradient_is_that_of_the_formula():
    q, k, cos, sin = arguments(torch.float64, torch.float64)
    assert gradcheck(lambda q, k: lean_rotary(q, k, cos, sin), (q, k))


def test_angles_alone_are_kept_for_backward():
    q, k, cos, sin = arguments(torch.float32, torch.float32)
    kept = kept_for_backward(lambda: torch.cat(lean_rotary(q, k, cos, sin), 1))
    assert {tensor.data_ptr() for tensor in kept} == {cos.data_ptr(), sin.data_ptr()}


@pytest.fixture
def turned(monkeypatch):
    """Shapes of the queries that the function is given."""
    shapes = []

    def watched(q, k, cos, sin, kernels):
        if kernels != "torch":  # how a family turns is tried with that
            shapes.append(tuple(q.shape))
        return lean_rotary(q, k, cos, sin, kernels)

    monkeypatch.setattr(rotary, "lean_rotary", watched)
    return shapes


def train(model, batch, turned):
    """Loss and gradients, and how many attentions turned in the function."""
    turned.clear()
    result = loss_and_gradients(model, batch)
    return result, len(turned)


@pytest.mark.parametrize("name", VARIED)
def test_every_family_trains_as_before(name, turned):
    model, batch = zoo_lora(name), make_batch()
    want = loss_and_gradients(model, batch)
    with sparsify(model, LEAN) as handle:
        got, count = train(model, batch, turned)
        family = name.split()[0]
        assert count == ATTENTIONS.get(family, 2)
        assert ("rotary" in handle.state.withheld) == (family in OTHERWISE)
    assert torch.equal(got[0], want[0])
    assert_same(got, want, 1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("name", "count"), [("llama", 2), ("olmo2", 0)], ids=str)
def test_autocast_as_before(name, count, dtype, turned):
    """Queries in bfloat16 may meet angles in float32; OLMo 2, whose angles always are, rounds once, at the end."""
    model, batch, results = zoo_lora(name, dtype=dtype), make_batch(), []
    for config in (SparseLoraConfig(exact=()), LEAN):
        with sparsify(model, config), torch.autocast("cpu", torch.bfloat16):
            results.append(train(model, batch, turned))
    assert_same(results[1][0], results[0][0], 1e-6)
    assert (results[0][1], results[1][1]) == (0, count)


@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "not reentrant"])
def test_recomputation_turns_in_the_function_too(reentrant, turned, batch):
    model = lora_model()
    want = loss_and_gradients(model, batch)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    with sparsify(model, LEAN):
        got, count = train(model, batch, turned)
    assert count == 6
    assert_same(got, want, 1e-6)


def test_sparse_steps_turn_in_the_function_too(turned, batch):
    model, results = lora_model(), []
    for exact in ((), ("rotary",)):
        config = SparseLoraConfig(attention_sparsity=0.5, exact=exact, rank=4, dense_if_slower=False)
        with sparsify(model, config) as handle:
            handle.set_enabled(True)
            results.append(train(model, batch, turned))
    assert_same(results[1][0], results[0][0], 1e-6)
    assert [count for _, count in results] == [0, 3]


def test_evaluation_runs_the_familys_own(turned, batch):
    model = lora_model()
    want = model.eval()(**batch).logits
    with sparsify(model, LEAN):
        assert torch.equal(model(**batch).logits, want)
        assert not turned


def test_a_compiler_traces_the_familys_own(turned):
    model = lora_model()
    attention = attentions_of(model)[0]
    for module in (attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj):
        module.base_layer.weight.requires_grad_(True)  # left alone by all other savings
    x, angles = torch.randn(2, 5, 64), (torch.randn(2, 5, 8), torch.randn(2, 5, 8))
    want, _ = attention(x, angles)
    with sparsify(model, LEAN):
        for hook in list(attention._forward_pre_hooks):
            del attention._forward_pre_hooks[hook]
        got, _ = torch.compile(attention, backend="eager", fullgraph=True)(x, angles)
        torch.testing.assert_close(got, want)
        assert not turned
        torch.testing.assert_close(attention(x, angles)[0], want)
        assert turned == [(2, 8, 5, 8)]


def attentions_of(model):
    return [layer.self_attn for layer in model.get_base_model().model.layers]


def is_lean(attention):
    return isinstance(attention, LeanAttention)


@pytest.mark.parametrize("exact", [("rotary",), ("padding",), ()], ids=str)
def test_saving_is_switchable_and_undone(exact, batch):
    model = lora_model()
    want, before = loss_and_gradients(model, batch), vars(modeling_llama).copy()
    with sparsify(model, SparseLoraConfig(exact=exact)):
        loss_and_gradients(model, batch)
        assert all(is_lean(attention) == ("rotary" in exact) for attention in attentions_of(model))
        assert vars(modeling_llama) == before
    assert {type(attention) for attention in attentions_of(model)} == {LlamaAttention}
    assert not [name for attention in attentions_of(model) for name in vars(attention) if "sparselora" in name]
    assert_same(loss_and_gradients(model, batch), want, 1e-7)


def pickled(model):
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, pickled])
@pytest.mark.parametrize("trained", [False, True], ids=["fresh", "trained"])
def test_copies_are_lean(duplicate, trained, turned, batch):
    model = lora_model()
    want = loss_and_gradients(model, batch)
    with sparsify(model, LEAN):
        if trained:
            loss_and_gradients(model, batch)
        got, count = train(duplicate(model), batch, turned)
    assert count == 3
    assert_same(got, want, 1e-6)


def test_a_copy_made_where_the_family_turns_otherwise_runs_that(monkeypatch, turned, batch):
    model = lora_model()
    with sparsify(model, LEAN):
        monkeypatch.setattr(modeling_llama, "apply_rotary_pos_emb", no_angle)
        got, count = train(copy.deepcopy(model), batch, turned)
    assert count == 0
    assert_same(got, loss_and_gradients(model, batch), 1e-6)


def test_kernels_are_those_of_the_settings_in_copies_too(monkeypatch, batch):
    model, asked = lora_model(), set()
    monkeypatch.setattr(rotary, "lean_rotary", lambda *args: asked.add(args[4]) or lean_rotary(*args))
    with sparsify(model, LEAN.replace(kernels="torch")):
        loss_and_gradients(model, batch)
        loss_and_gradients(copy.deepcopy(model), batch)
    assert asked == {"torch"}


def backwards(q, k, cos, sin):
    return apply_rotary_pos_emb(q, k, cos, -sin)


def no_angle(q, k, cos, sin):
    return q, k


def queries_alone(q, k, cos, sin):
    return apply_rotary_pos_emb(q, k, cos, sin)[0], k


@pytest.mark.parametrize("other", [backwards, no_angle, queries_alone, None, max])
def test_a_family_that_turns_otherwise_is_left_alone(other, monkeypatch):
    model = lora_model()
    monkeypatch.setattr(modeling_llama, "apply_rotary_pos_emb", other)
    with sparsify(model, LEAN) as handle:
        assert not any(map(is_lean, attentions_of(model)))
        assert "rotary" in handle.state.withheld
        assert "exact saving rotary: off" in handle.report()


@pytest.mark.parametrize("name", ["apply_rotary_pos_emb", "eager_attention_forward", "ALL_ATTENTION_FUNCTIONS"])
def test_a_name_exchanged_later_is_used(name, monkeypatch, turned, batch):
    """Liger exchanges the first one in the family's file."""
    model = lora_model()
    with sparsify(model, LEAN):
        want, count = train(model, batch, turned)
        assert count == 3
        own, calls = getattr(modeling_llama, name), []
        if name == "ALL_ATTENTION_FUNCTIONS":
            other = types.SimpleNamespace(get_interface=lambda *a: calls.append(1) or own.get_interface(*a))
        else:
            model.set_attn_implementation("eager")
            other = functools.wraps(own)(lambda *a, **k: calls.append(1) or own(*a, **k))
        with monkeypatch.context() as patched:
            patched.setattr(modeling_llama, name, other)
            got, count = train(model, batch, turned)
            assert (len(calls), count) == (3, 0)
        assert_same(got, want, 1e-5)
        assert train(model, batch, turned)[1] == 3  # and its return too


def test_a_forward_put_on_the_function_is_used(monkeypatch, turned, batch):
    """Functions with a kernel in the hub are modules, whose forward is exchanged."""

    class Function(torch.nn.Module):
        def forward(self, *args):
            return apply_rotary_pos_emb(*args)

    function, model, calls = Function(), lora_model(), []
    monkeypatch.setattr(modeling_llama, "apply_rotary_pos_emb", function)
    with sparsify(model, LEAN):
        want, count = train(model, batch, turned)
        assert count == 3
        function.forward = lambda *args: calls.append(1) or apply_rotary_pos_emb(*args)
        got, count = train(model, batch, turned)
        assert (len(calls), count) == (3, 0)
    assert_same(got, want, 1e-6)
    with sparsify(model, LEAN):
        assert not any(map(is_lean, attentions_of(model)))


def test_a_forward_exchanged_in_the_class_is_used(monkeypatch, turned, batch):
    model, calls, own = lora_model(), [], LlamaAttention.forward
    with sparsify(model, LEAN):
        want, _ = train(model, batch, turned)
        monkeypatch.setattr(LlamaAttention, "forward", lambda *a, **k: calls.append(1) or own(*a, **k))
        got, count = train(model, batch, turned)
        assert (len(calls), count) == (3, 0)
    assert_same(got, want, 1e-6)


@pytest.mark.parametrize("later", [False, True], ids=["before", "later"])
def test_a_forward_put_on_an_attention_serves(later, turned, batch):
    model, calls = lora_model(), []
    want, attention = loss_and_gradients(model, batch), attentions_of(model)[1]

    def put():
        attention.forward = lambda *a, **k: calls.append(1) or LlamaAttention.forward(attention, *a, **k)

    if not later:
        put()
    with sparsify(model, LEAN):
        if later:
            put()
        calls.clear()
        got, count = train(model, batch, turned)
        assert (len(calls), count) == (1, 2)
    assert_same(got, want, 1e-6)
    assert "forward" in vars(attention)


def shouted(function):
    """A decorator that keeps what it wraps in a place of its own."""
    box = [function]
    return functools.wraps(function)(lambda *a, **k: box[0](*a, **k))


def told(function):
    """A decorator as they are usually written."""

    @functools.wraps(function)
    def wrapper(self, *args, told=True, **kwargs):
        self.told = told
        return function(self, *args, **kwargs)

    return wrapper


def unfinished(function, later=None):
    """One with a variable that has no value yet."""

    @functools.wraps(function)
    def wrapper(*args, **kwargs):
        return function(*args, **kwargs) if args else later

    del wrapper.__closure__[wrapper.__code__.co_freevars.index("later")].cell_contents
    return wrapper


def twice(function):
    """One that keeps it twice."""
    again = function
    return functools.wraps(function)(lambda *a, **k: (function if a else again)(*a, **k))


@pytest.mark.parametrize(
    ("decorator", "lean"),
    [(told, True), (unfinished, True), (shouted, False), (twice, False), (functools.partialmethod, False)],
)
def test_decorators_are_kept(decorator, lean, turned, batch):
    model = lora_model()
    want = loss_and_gradients(model, batch)
    decorated = type("Decorated", (LlamaAttention,), {"forward": decorator(LlamaAttention.forward)})
    for attention in attentions_of(model):
        attention.__class__ = decorated
    with sparsify(model, LEAN):
        got, count = train(model, batch, turned)
    assert count == (3 if lean else 0)
    assert all(hasattr(attention, "told") == (decorator is told) for attention in attentions_of(model))
    assert_same(got, want, 1e-6)


@pytest.mark.parametrize(
    "decorator",
    [functools.partial, functools.lru_cache, lambda forward: told(functools.lru_cache(forward))],
    ids=["partial", "cached", "cached and decorated"],
)
def test_a_forward_that_is_no_function_is_left_alone(decorator):
    assert rotary._Forward.of(decorator(LlamaAttention.forward), "auto") is None


def test_names_that_a_nested_function_uses_count():
    assert rotary._names((lambda: lambda: torch.sin).__code__) == {"torch", "sin"}


def a_little_longer(*args):
    return tuple(x * (1 + 1e-12) for x in apply_rotary_pos_emb(*args))


def test_a_family_is_tried_on_any_default_device_to_the_last_bit():
    with torch.device("meta"):
        assert rotary._turns_halves(apply_rotary_pos_emb, torch.float64, torch.float64)
        assert not rotary._turns_halves(a_little_longer, torch.float64, torch.float64)


class Counted:
    """A family's function that counts its calls."""

    calls = 0

    def __call__(self, *args, **kwargs):
        self.calls += 1
        return apply_rotary_pos_emb(*args, **kwargs)


def given(**changes):
    """Arguments of a rotation, some of them changed."""
    names = dict(zip(("q", "k", "cos", "sin"), arguments(torch.float32, torch.float32), strict=True))
    return {name: changes.get(name, lambda x: x)(tensor) for name, tensor in names.items()}


UNFIT = {
    "angles that are trained": {"cos": lambda x: x.requires_grad_()},
    "angles of four dimensions": {"cos": lambda x: x[:, None, None], "sin": lambda x: x[:, None, None]},
    "angles of one token": {"cos": lambda x: x[:, :1], "sin": lambda x: x[:, :1]},
    "sines for all sequences": {"sin": lambda x: x[:1]},
    "keys for all sequences": {"k": lambda x: x[:1]},
    "angles of two types": {"sin": lambda x: x.bfloat16()},
    "queries and keys of two types": {"q": lambda x: x.bfloat16()},
    "types not tried": {"q": lambda x: x.double(), "k": lambda x: x.double()},
    "a subclass": {"cos": lambda x: torch.nn.Parameter(x, requires_grad=False)},
}


@pytest.mark.parametrize("changes", UNFIT.values(), ids=UNFIT.keys())
def test_other_arguments_go_to_the_familys_own(changes, turned):
    own = Counted()
    rotation = rotary._Rotation(own, frozenset({(torch.float32, torch.float32)}), "auto")
    rotation(*given().values())
    assert (own.calls, len(turned)) == (0, 1)
    names = given(**changes)
    for call in (lambda: rotation(*names.values()), lambda: rotation(**names)):
        got = []
        for run in (call, lambda: apply_rotary_pos_emb(**names)):
            try:
                got.append(run())
            except RuntimeError as error:
                got.append(str(error))
        assert str(got[0]) == str(got[1])
    assert (own.calls, len(turned)) == (2, 1)


def test_another_dimension_for_heads_goes_to_the_familys_own(turned):
    own = Counted()
    rotation = rotary._Rotation(own, frozenset({(torch.float32, torch.float32)}), "auto")
    names = given(q=lambda x: torch.cat([x, x[:, :1]], 1), k=lambda x: torch.cat([x, x, x[:, :1]], 1))
    assert names["q"].shape[1:3] == names["k"].shape[1:3] == (5, 5)  # nothing else tells heads from tokens
    got, want = rotation(**names, unsqueeze_dim=2), apply_rotary_pos_emb(**names, unsqueeze_dim=2)
    assert all(torch.equal(*pair) for pair in zip(got, want, strict=True))
    assert (own.calls, len(turned)) == (1, 0)
