"""The operations that use the kernels, against the same operations in PyTorch: outputs and gradients."""

import pytest
import torch
from cases import DEVICE, DTYPES, Draw, assert_near
from helpers import SPARSE, assert_same, lora_model, loss_and_gradients, make_batch, sparse_result
from torch.nn import functional as F
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from zoo import zoo_lora

from sparselora_hf import SparseLoraConfig, sparsify
from sparselora_hf.kernels import choice
from sparselora_hf.kernels.choice import Choice
from sparselora_hf.kernels.tiles import MAX_WIDTH
from sparselora_hf.ops.branch import Branch
from sparselora_hf.ops.context import ContextPart, context_linear
from sparselora_hf.ops.mixed_mlp import FrozenMlp, mixed_mlp
from sparselora_hf.ops.mlp import KeptChannels, MlpWeights, StandIn, kept_mlp
from sparselora_hf.ops.projection import Frozen, MixedRows, projections
from sparselora_hf.ops.rms import lean_rms_norm
from sparselora_hf.ops.rows import fork_rows, overlay_rows
from sparselora_hf.svd import LowRank

ROWS = {"mixed": (23, 9), "all context": (40, 0), "all output": (0, 40), "padding": (20, 5), "nothing": (0, 0)}


def both(op, x, mode=("triton", "torch")):
    """Output and gradient of an operation with and without kernels."""
    results = []
    for kernels in mode:
        leaf = x.detach().clone().requires_grad_()
        y = op(leaf, kernels)
        grad = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y.device, y.dtype)
        y.backward(grad)
        results.append((y.detach(), leaf.grad))
    return results


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("biased", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize("over_outputs", [True, False], ids=["outputs", "inputs"])
@pytest.mark.parametrize("counts", ROWS.values(), ids=ROWS.keys())
def test_context_linear(counts, over_outputs, biased, dtype):
    draw = Draw(dtype)
    x, weight, bias = draw(40, 45), draw(70, 45), draw(70) if biased else None
    index, order = draw.subset(70 if over_outputs else 45, 13), torch.randperm(40, generator=draw.generator)
    context, output = (part.sort().values.to(DEVICE) for part in order.split([counts[0], 40 - counts[0]]))
    output = output[: counts[1]]

    def op(x, kernels):
        whole, few = fork_rows(x, output, apart=True)
        part = ContextPart(context, index, over_outputs, sum(counts), kernels)
        y = context_linear(whole, weight, bias, part)
        return overlay_rows(y, F.linear(few, weight, bias), output, apart=True)

    (y, grad), (y_want, grad_want) = both(op, x)
    assert_near(y, y_want, dtype)
    assert_near(grad, grad_want, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("over_outputs", [True, False], ids=["outputs", "inputs"])
@pytest.mark.parametrize("counts", ROWS.values(), ids=ROWS.keys())
def test_projection(counts, over_outputs, dtype):
    draw = Draw(dtype)
    x, weight, bias = draw(40, 45), draw(70, 45), draw(70)
    branch, stand_in = Branch(draw(3, 45), draw(70, 3), 0.5), (draw(4, 45, scale=0.2), draw(70, 4, scale=0.2))
    index, order = draw.subset(70 if over_outputs else 45, 13), torch.randperm(40, generator=draw.generator)
    context, output = (part.sort().values.to(DEVICE) for part in order.split([counts[0], 40 - counts[0]]))
    output = output[: counts[1]]

    def op(x, kernels):
        rows = MixedRows(output, ContextPart(context, index, over_outputs, sum(counts), kernels), stand_in)
        [y] = projections(x, [Frozen(weight, bias, branch, rows)], dtype)
        return y

    (y, grad), (y_want, grad_want) = both(op, x)
    assert_near(y, y_want, dtype)
    assert_near(grad, grad_want, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("way", ["triton", "slices"])
@pytest.mark.parametrize("kind", ["none", "channels", "fixed", "rank 0"])
@pytest.mark.parametrize("form", ["gated", "plain", "bias"])
def test_kept_mlp(form, kind, way, dtype, monkeypatch):
    draw = Draw(dtype)
    hidden, width, keep, rank = 24, 70, 13, 0 if kind == "rank 0" else 5
    x, gate, up, down = (
        draw(*s, scale=0.3) for s in ((37, hidden), (width, hidden), (width, hidden), (hidden, width))
    )
    biases = (draw(width), draw(width), draw(hidden)) if form == "bias" else (None, None, None)
    weights = MlpWeights(None if form == "plain" else gate, up, down, F.silu, *biases)
    factors = draw(rank, hidden), draw(rank), draw(rank, hidden), draw(hidden)
    channels = (draw(width), draw(rank, width)) if kind in ("channels", "rank 0") else (None, None)
    stand_in = None if kind == "none" else StandIn(*factors, *channels)
    index = draw.subset(width, keep)
    monkeypatch.setattr(choice, "_FORCED", {**choice._FORCED, "mlp": way})
    choice._choose.cache_clear()
    (y, grad), (y_want, grad_want) = both(lambda x, kernels: kept_mlp(x, weights, index, stand_in, kernels), x)
    choice._choose.cache_clear()
    assert_near(y, y_want, dtype)
    assert_near(grad, grad_want, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("way", ["triton", "slices"])
@pytest.mark.parametrize("joined", [False, True], ids=["two linears", "one linear"])
@pytest.mark.parametrize("counts", ROWS.values(), ids=ROWS.keys())
def test_mixed_mlp(counts, joined, way, dtype, monkeypatch, poison):
    draw = Draw(dtype)
    x, joint, down = draw(40, 24), draw(140, 24, scale=0.3), draw(24, 70, scale=0.3)
    gate, up = joint.chunk(2)
    rows, index = draw.subset(40, counts[1]), draw.subset(70, 13)
    inputs = [(joint, None)] if joined else [(gate, None), (up, None)]
    monkeypatch.setattr(choice, "_FORCED", {**choice._FORCED, "mlp": way})
    choice._choose.cache_clear()

    def op(x, kernels):
        mlp = FrozenMlp(inputs, MlpWeights(gate, up, down, F.silu), "silu", dtype, None, kernels)
        return mixed_mlp(x, mlp, rows, lambda *_: (index, None))

    (y, grad), (y_want, grad_want) = both(op, x)
    choice._choose.cache_clear()
    assert_near(y, y_want, dtype)
    assert_near(grad, grad_want, dtype)


def test_unknown_activations_go_through_pytorch():
    draw = Draw()
    weights = MlpWeights(draw(20, 8), draw(20, 8), draw(8, 20), torch.tanh)
    index = draw.subset(20, 6)
    (y, grad), (y_want, grad_want) = both(lambda x, kernels: kept_mlp(x, weights, index, None, kernels), draw(9, 8))
    assert_near(y, y_want, torch.float32)
    assert_near(grad, grad_want, torch.float32)


def test_fused_and_stored_activations_are_used(monkeypatch):
    """The kernels do run: neither comparison above compares PyTorch with itself."""
    draw = Draw()
    weights, index = MlpWeights(draw(20, 8), draw(20, 8), draw(8, 20), F.silu), draw.subset(20, 6)
    monkeypatch.setattr(KeptChannels, "_activate", None)
    kept_mlp(draw(9, 8), weights, index, kernels="triton")
    with pytest.raises(TypeError):
        kept_mlp(draw(9, 8), weights, index, kernels="torch")


@pytest.mark.parametrize("family", ["llama", "qwen2"])
@pytest.mark.parametrize(
    ("criterion", "compensation", "score_tokens"),
    [
        ("svd", "none", None),
        ("svd", "none", 5),
        ("svd", "low_rank", None),
        ("svd_mean", "none", None),
        ("static", "low_rank", None),
    ],
)
def test_a_sparse_step(family, criterion, compensation, score_tokens):
    """A whole model, forward and backward: kernels and PyTorch choose the same channels and agree."""
    model = lora_model(family, layers=2).to(DEVICE)
    batch = {name: tensor.to(DEVICE) for name, tensor in make_batch().items()}
    config = SPARSE.replace(criterion=criterion, compensation=compensation, score_tokens=score_tokens)
    results = []
    for kernels in ("torch", "triton"):
        with sparsify(model, config.replace(kernels=kernels)) as handle:
            if compensation != "none":
                model(**batch).loss.backward()  # a dense step to learn from
                model.zero_grad(set_to_none=True)
            handle.set_enabled(True)
            loss = model(**batch).loss
            loss.backward()
            results.append(
                (loss.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad})
            )
            model.zero_grad(set_to_none=True)
    assert_same(results[1], results[0], 1e-4)


def test_scores_follow_factors_that_are_exchanged():
    model, sets = lora_model(layers=2).to(DEVICE), []
    batch = {name: tensor.to(DEVICE) for name, tensor in make_batch().items()}
    for kernels in ("torch", "triton"):
        with sparsify(model, SPARSE.replace(kernels=kernels)) as handle:
            handle.set_enabled(True)
            loss_and_gradients(model, batch)
            factors = handle.state.criterion.factors
            factors.update({key: LowRank(each.down.flip(1), each.up) for key, each in factors.items()})
            loss_and_gradients(model, batch)
            sets.append({key: sorted(one.narrow.tolist()) for key, one in handle.state.batch.selections.items()})
    assert sets[0] == sets[1]


NORMS = SparseLoraConfig(exact=("norms",), kernels="triton")


@pytest.fixture
def launched(monkeypatch):
    """Names of the norms' kernels in the order of their launches."""
    from sparselora_hf.kernels import rms

    names, launch = [], rms.launch
    monkeypatch.setattr(
        rms, "launch", lambda kernel, *a, **k: names.append(kernel.__name__) or launch(kernel, *a, **k)
    )
    return names


@pytest.mark.parametrize(
    ("family", "norms", "first"), [("llama", 4, 1), ("qwen3", 8, 1), ("gemma3_text", 12, 1), ("olmo2", 8, 0)]
)
@pytest.mark.parametrize("checkpointing", ["none", "reentrant", "not reentrant"])
def test_norms_in_training(family, norms, first, checkpointing, launched):
    """`first`: norms below the first adapter, where only checkpointing asks for a gradient."""
    model = zoo_lora(family).to(DEVICE)
    batch = {name: tensor.to(DEVICE) for name, tensor in make_batch().items()}
    want = loss_and_gradients(model, batch)
    if checkpointing != "none":
        model.gradient_checkpointing_enable({"use_reentrant": checkpointing == "reentrant"})
        model.enable_input_require_grads()
    with sparsify(model, NORMS):
        assert_same(loss_and_gradients(model, batch), want, 1e-4)
    plain = checkpointing == "none"
    assert launched.count("rms_norm_fwd_kernel") == (norms if plain else 2 * norms)
    assert launched.count("rms_norm_bwd_kernel") == (norms - first if plain else norms)


def test_norms_in_evaluation_are_the_models_own(launched):
    model = lora_model(train=False).to(DEVICE)
    batch = {name: tensor.to(DEVICE) for name, tensor in make_batch().items()}
    want = model(**batch).logits
    with sparsify(model, NORMS):
        assert torch.equal(model(**batch).logits, want)
    assert not launched


def test_norms_with_a_forward_of_others_keep_it(launched):
    model = lora_model().to(DEVICE)
    norm, calls = model.get_base_model().model.layers[1].input_layernorm, []
    norm.forward = lambda x: calls.append(1) or LlamaRMSNorm.forward(norm, x)
    with sparsify(model, NORMS):
        calls.clear()
        loss_and_gradients(model, {name: tensor.to(DEVICE) for name, tensor in make_batch().items()})
    assert len(calls) == 1
    assert launched.count("rms_norm_fwd_kernel") == 2 * 3 - 1


@pytest.mark.parametrize(
    ("width", "dtype", "weight_dtype"),
    [
        (8, torch.bfloat16, torch.float32),
        (MAX_WIDTH + 1, torch.float32, torch.float32),
        (8, torch.float64, torch.float64),
    ],
    ids=["mixed types", "too wide", "float64"],
)
def test_norms_without_a_kernel(width, dtype, weight_dtype, launched):
    norm, x = LlamaRMSNorm(width).to(DEVICE, weight_dtype), Draw(dtype)(2, width).requires_grad_()
    y = lean_rms_norm(x, norm, norm.weight, 0.0, norm.variance_epsilon, True, "triton")
    y.sum().backward()
    assert torch.equal(y, norm(x))
    assert not launched


def test_float64_goes_through_pytorch():
    model = lora_model(layers=2).double().to(DEVICE)
    batch = {name: tensor.to(DEVICE) for name, tensor in make_batch().items()}
    assert_same(
        sparse_result(model, batch, SPARSE.replace(kernels="triton")),
        sparse_result(model, batch, SPARSE.replace(kernels="torch")),
        1e-12,
    )


def test_choice_of_the_interpreter():
    x = torch.zeros(3, 4, device=DEVICE)
    assert choice.choose("rows", x, 4, 2, "torch") == Choice("torch")
    assert choice.choose("rows", x, 4, 2, "triton") == Choice("triton")
    assert choice.choose("rows", x.double(), 4, 2, "triton") == Choice("torch")
