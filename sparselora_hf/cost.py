"""Cost model of one training step, dense and sparse, from shapes alone.

A frozen linear of `inp` inputs and `out` outputs costs `rows * inp * out` multiply-adds forward and the same again
backward, for `dX = dY W`; a LoRA matrix costs that twice in backward, for `dX` and `dW`. Contextual sparsity sends
context rows through a slice of `W`, so a layer is a short list of products (rows, inp, out) and its cost is their sum.
FLOPs count 2 per multiply-add. Norms, RoPE, activation functions, embedding look-ups and the gathers that
sparsity itself needs are left out: the ratio of two costs bounds the speed-up from above.

Needs no torch.
"""

import dataclasses
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from .config import EXACT_SAVINGS, SparseLoraConfig
from .layers import kept_channels
from .shapes import MLP_PROJECTIONS, BatchShape, LoraShape, ModelShape

__all__ = [
    "GROUPS",
    "BatchShape",
    "LoraShape",
    "ModelShape",
    "StepCost",
    "Work",
    "activation_bytes",
    "bound",
    "keep_lists",
    "layer_cost",
    "step_cost",
    "weight_bytes",
]

GROUPS = ("mlp", "projections", "attention", "lora", "head", "estimator")
_INPUT_SIDE = ("q_proj", "k_proj", "v_proj")


@dataclasses.dataclass(frozen=True)
class Work:
    """FLOPs of a forward and a backward pass."""

    forward: float = 0.0
    backward: float = 0.0

    def __add__(self, other: "Work") -> "Work":
        return Work(self.forward + other.forward, self.backward + other.backward)

    def __mul__(self, times: int) -> "Work":
        return Work(times * self.forward, times * self.backward)

    @property
    def total(self) -> float:
        """Forward and backward."""
        return self.forward + self.backward


@dataclasses.dataclass(frozen=True)
class StepCost:
    """FLOPs of a step by group, and the bytes it moves.

    `mlp` and `projections` (q, k, v and o) include the stand-ins for dropped channels, `attention` is the core (QKᵀ
    and AV), `head` the language-model head, `estimator` the scoring of channels.

    `bytes` is rough: each product reads its matrix and writes its result once, in 2-byte elements.
    """

    mlp: Work = Work()
    projections: Work = Work()
    attention: Work = Work()
    lora: Work = Work()
    head: Work = Work()
    estimator: Work = Work()
    bytes: float = 0.0

    def __add__(self, other: "StepCost") -> "StepCost":
        return StepCost(*(getattr(self, name) + getattr(other, name) for name in (*GROUPS, "bytes")))

    def __mul__(self, times: int) -> "StepCost":
        return StepCost(*(getattr(self, name) * times for name in (*GROUPS, "bytes")))

    @property
    def forward(self) -> float:
        """FLOPs of the forward pass."""
        return sum(getattr(self, group).forward for group in GROUPS)

    @property
    def backward(self) -> float:
        """FLOPs of the backward pass, recomputation included."""
        return sum(getattr(self, group).backward for group in GROUPS)

    @property
    def total(self) -> float:
        """FLOPs of the step."""
        return self.forward + self.backward

    @property
    def linear(self) -> float:
        """FLOPs of the frozen linears: MLP, projections and head."""
        return self.mlp.total + self.projections.total + self.head.total


class _Product(NamedTuple):
    """`rows` tokens times an `inp` x `out` matrix, and how many products of that size backward adds."""

    rows: int
    inp: int
    out: int
    backward: int = 1

    @property
    def work(self) -> Work:
        forward = 2.0 * self.rows * self.inp * self.out
        return Work(forward, self.backward * forward)

    def bytes(self, recompute: bool) -> float:
        weight = self.inp * self.out if self.rows else 0
        forward = weight + self.rows * self.out
        return 2.0 * ((1 + recompute) * forward + self.backward * (weight + self.rows * self.inp))


@dataclasses.dataclass(frozen=True)
class _Layer:
    """One layer's share of a step: which rows meet which slice of which matrix."""

    model: ModelShape
    batch: BatchShape
    lora: LoraShape
    mlp_keep: int | None
    attention_keep: int | None
    exact: tuple[str, ...]
    first: bool
    last: bool

    def rows(self, name: str) -> tuple[int, int]:
        """Rows of a projection that are dense, and rows that are sparse."""
        if self.last and "last_layer" in self.exact and name not in ("k_proj", "v_proj"):
            return self.batch.loss, 0
        keep = self.mlp_keep if name in MLP_PROJECTIONS else self.attention_keep
        sparse = self.batch.context if keep is not None else 0
        padding = 0 if "padding" in self.exact else self.batch.padding
        return self.batch.context + self.batch.output + padding - sparse, sparse

    def scored(self) -> tuple[str, ...]:
        """Projections of the attention's input that drop channels where any do."""
        return _INPUT_SIDE if self.model.sparse_qk else ("v_proj",)

    def input_gradient(self, name: str) -> int:
        """1 where a projection passes a gradient on to its input."""
        return 0 if self.first and "frozen_below" in self.exact and name in _INPUT_SIDE else 1

    def widths(self) -> tuple[dict[str, tuple[int, int]], dict[str, tuple[int, int]]]:
        """Shapes of all projections, whole and kept."""
        return self.model.widths(), self.model.widths(self.mlp_keep, self.attention_keep)

    def frozen(self, names: Iterable[str]) -> list[_Product]:
        """Products of the base weights; every token passes through experts, whatever may be left out beside them."""
        whole, kept = self.widths()
        experts = self.model.intermediate - self.model.droppable
        products = []
        for name in names:
            dense, sparse = self.rows(name)
            gradient = self.input_gradient(name)
            if experts and name in MLP_PROJECTIONS:
                beside = (experts, self.model.hidden) if name == "down_proj" else (self.model.hidden, experts)
                left_out = self.batch.tokens - dense - sparse
                products.append(_Product(left_out, *beside, gradient))
            products += [_Product(dense, *whole[name], gradient), _Product(sparse, *kept[name], gradient)]
        return products

    def projections(self) -> list[_Product]:
        """Products of q, k, v and o; every token passes through what is in their place."""
        if self.model.linears:
            return [_Product(self.batch.tokens, inp, out) for inp, out in self.model.linears]
        return self.frozen((*_INPUT_SIDE, "o_proj"))

    def adapters(self) -> list[_Product]:
        """Products of the LoRA branches: all rows and channels beside attention, those computed beside the MLP."""
        _, kept = self.widths()
        products = []
        for name, widths in self.model.adapted(self.lora.targets):
            in_mlp = name in MLP_PROJECTIONS
            dense, sparse = self.rows(name) if in_mlp else (self.batch.tokens, 0)
            for rows, (inp, out) in ((dense, widths), (sparse, kept.get(name, widths))):
                products.append(_Product(rows, inp, self.lora.rank, 1 + self.input_gradient(name)))
                products.append(_Product(rows, self.lora.rank, out, 2))
        return products

    def stand_in(self, rank: int) -> list[_Product]:
        """Products of the low-rank stand-in: hidden to rank and rank to the kept channels; `closing` has the last."""
        _, sparse = self.rows("down_proj")
        if not rank or not sparse:
            return []
        kept = self.mlp_keep - (self.model.intermediate - self.model.droppable)
        return [_Product(sparse, self.model.hidden, rank), _Product(sparse, rank, kept)]

    def factors(self, rank: int) -> list[_Product]:
        """Products of the factors that stand in for the dropped channels of attention."""
        if not rank:
            return []
        whole, _ = self.widths()
        products = []
        for name in (*self.scored(), "o_proj"):
            inp, out = whole[name]
            _, sparse = self.rows(name)
            gradient = self.input_gradient(name)
            products += [_Product(sparse, inp, rank, gradient), _Product(sparse, rank, out, gradient)]
        return products

    def closing(self, rank: int) -> list[_Product]:
        """Products that close the MLP: `down_proj`, and the stand-in's map from rank to hidden."""
        _, sparse = self.rows("down_proj")
        return [*self.frozen(["down_proj"]), _Product(sparse if rank else 0, rank, self.model.hidden)]

    def scores(self, rank: int | None, tokens: int | None) -> list[_Product]:
        """Products that score: by factors, Gram matrices of the rank for attention, or by the weights themselves."""
        hidden, channels, matrices = self.model.hidden, self.model.droppable, self.model.mlp_matrices - 1
        mlp, attention = (
            sparse if tokens is None else min(sparse, tokens)
            for sparse in (self.rows("down_proj")[1], self.rows("k_proj")[1])
        )
        if rank is None:
            whole, _ = self.widths()
            projections = [_Product(attention, *whole[name], 0) for name in self.scored()]
            return [_Product(mlp, hidden, channels, 0)] * matrices + projections
        factors = [_Product(mlp, hidden, rank, 0), _Product(mlp, rank, channels, 0)] * matrices
        moments = [_Product(attention, hidden, rank, 0), _Product(attention, rank, rank, 0)]
        return factors + moments * len(self.scored())

    def core(self) -> Work:
        """QKᵀ and AV over the causal half; backward has two products for each, and fused kernels form QKᵀ again.

        With the mask that padded rows come with, PyTorch's kernels compute the whole square. What has no QKᵀ counts
        nothing here.
        """
        masked = self.batch.padding and "padding" not in self.exact
        seen = self.batch.sequence if masked else (self.batch.sequence + 1) / 2  # by a token, on average
        width = self.model.query_width if self.model.core is None else self.model.core
        product = 2.0 * self.batch.batch * self.batch.sequence * seen * width
        return Work(2.0 * product, 5.0 * product)


def _sum(products: Iterable[_Product]) -> Work:
    return sum((product.work for product in products), Work())


def layer_cost(
    model: ModelShape,
    batch: BatchShape,
    lora: LoraShape,
    layer: int,
    *,
    mlp_keep: int | None = None,
    attention_keep: int | None = None,
    exact: Sequence[str] = (),
    checkpointing: bool = False,
    rank: int | None = 0,
    score_tokens: int | None = None,
    compensation_rank: int = 0,
) -> StepCost:
    """Cost of one decoder layer; the arguments are those of `step_cost`, for a single layer."""
    model, last = model.at(layer), layer == model.layers - 1
    part = _Layer(model, batch, lora, mlp_keep, attention_keep, tuple(exact), layer == 0, last)
    inner = part.frozen(name for name in model.mlp_names if name != "down_proj")
    products = {
        "mlp": inner + part.stand_in(compensation_rank),
        "projections": part.projections() + part.factors(compensation_rank),
        "lora": part.adapters(),
    }
    closing = part.closing(compensation_rank)
    works = {group: _sum(group_products) for group, group_products in products.items()} | {"attention": part.core()}
    if checkpointing:
        kept = {"attention"} if "recomputation" in exact else set()
        works = {group: work if group in kept else work + Work(0.0, work.forward) for group, work in works.items()}
    # recomputation ends with the last tensor that backward needs, before a frozen product that closes the layer
    closing_again = checkpointing and "down_proj" in lora.targets
    last_work = _sum(closing)
    works["mlp"] += last_work + (Work(0.0, last_work.forward) if closing_again else Work())
    moved = sum(product.bytes(checkpointing) for group_products in products.values() for product in group_products)
    moved += sum(product.bytes(closing_again) for product in closing)
    return StepCost(**works, estimator=_sum(part.scores(rank, score_tokens)), bytes=moved)


def step_cost(
    model: ModelShape,
    batch: BatchShape,
    lora: LoraShape,
    *,
    mlp_keep: Sequence[int | None] | None = None,
    attention_keep: Sequence[int | None] | None = None,
    exact: Sequence[str] = (),
    checkpointing: bool = False,
    rank: int | None = 0,
    score_tokens: int | None = None,
    compensation_rank: int = 0,
    head: str = "all",
) -> StepCost:
    """FLOPs and bytes of one training step.

    Args:
        model: widths of the model.
        batch: tokens by kind.
        lora: adapters; their branch stays dense on attention projections and follows the kept channels in the MLP.
        mlp_keep: MLP channels kept per layer, None for a dense layer; left out, all layers are dense.
        attention_keep: the same for key and value channels, each standing for `heads / kv_heads` query channels.
        exact: savings that change no number, names out of `config.EXACT_SAVINGS`.
        checkpointing: adds a forward pass of the layers to backward (the non-reentrant kind, which ends before a
            closing product without an adapter); channel sets are not scored again.
        rank: rank of the SVD estimator that scores context tokens, None where the weights themselves do; 0 leaves
            scoring out.
        score_tokens: at most this many of them are scored; None takes all.
        compensation_rank: rank of the stand-ins of sparse parts; 0 is none.
        head: positions that TRL scores by itself, ``all`` (CPU) or ``labels`` (GPU). Its fused head computes the
            product again in backward, so there are three of them.

    Raises:
        ValueError: a list that does not fit the model, an unknown saving or head.
    """
    unknown = sorted(set(exact) - set(EXACT_SAVINGS))
    if unknown:
        raise ValueError(f"exact: {', '.join(unknown)} is not one of {', '.join(EXACT_SAVINGS)}.")
    if head not in ("all", "labels"):
        raise ValueError(f"head: {head!r} is not one of all, labels.")
    keeps = (_per_layer("mlp_keep", mlp_keep, model), _per_layer("attention_keep", attention_keep, model))
    shared = {"exact": exact, "checkpointing": checkpointing, "compensation_rank": compensation_rank}
    shared |= {"rank": rank, "score_tokens": score_tokens}
    cost = StepCost()
    for layer, (mlp, attention) in enumerate(zip(*keeps, strict=True)):
        cost += layer_cost(model, batch, lora, layer, mlp_keep=mlp, attention_keep=attention, **shared)
    rows = batch.loss if head == "labels" or "logits" in exact else batch.tokens
    logits = _Product(rows, model.hidden, model.vocab, 2)
    return cost + StepCost(head=logits.work, bytes=logits.bytes(False))


def _per_layer(field: str, keep: Sequence[int | None] | None, model: ModelShape) -> Sequence[int | None]:
    if keep is None:
        return [None] * model.layers
    if len(keep) != model.layers:
        raise ValueError(f"{field}: {len(keep)} entries for {model.layers} layers. Give one per layer.")
    return keep


def keep_lists(config: SparseLoraConfig, model: ModelShape) -> tuple[list[int | None], list[int | None]]:
    """MLP channels and key/value channels that a configuration keeps per layer, None where a layer is dense."""
    layers = [model.at(layer) for layer in range(model.layers)]
    mlp, attention = (zip(layers, sparsities, strict=True) for sparsities in config.layer_sparsity(model.layers))

    def kept(width: int, sparsity: float, beside: int = 0) -> int | None:
        return beside + kept_channels(width, sparsity) if sparsity and width else None

    return (
        [kept(layer.droppable, sparsity, layer.intermediate - layer.droppable) for layer, sparsity in mlp],
        [kept(0 if layer.linears else layer.kv_width, sparsity) for layer, sparsity in attention],
    )


def bound(dense: StepCost, sparse: StepCost) -> float:
    """How many times faster the sparse step is where FLOPs are all that counts."""
    return dense.total / sparse.total


def weight_bytes(model: ModelShape, lora: LoraShape, element: float = 2.0) -> float:
    """Bytes of the frozen weights, and of the adapters with gradient and two Adam moments in fp32.

    Args:
        model: widths of the model.
        lora: adapters.
        element: bytes of a frozen weight: 2 for bf16, about 0.53 for 4-bit with its scales.
    """
    return element * model.parameters + 16.0 * lora.parameters(model)


def activation_bytes(
    model: ModelShape,
    batch: BatchShape,
    lora: LoraShape,
    *,
    mlp_keep: Sequence[int | None] | None = None,
    exact: Sequence[str] = (),
    checkpointing: bool = False,
    element: float = 2.0,
) -> float:
    """Bytes that autograd holds from forward to backward; an estimate without allocator overhead or logits.

    A frozen linear keeps no input. Per token a layer holds the inputs of both norms, the normalised input that LoRA
    reads, q, k, v and the attention output (full width: the LoRA branch is dense), the rank-sized LoRA activations,
    and three MLP tensors: gate, up and the activated gate, which shrink to the kept channels; with the saving
    ``activations`` dense tokens hold the first two. With checkpointing only each layer's input stays, plus one whole
    layer while it is recomputed.

    Args:
        model: widths of the model.
        batch: tokens by kind.
        lora: adapters.
        mlp_keep: MLP channels kept per layer, as in `step_cost`.
        exact: exact savings; `last_layer`, `padding` and `activations` shrink the MLP part, `recomputation` keeps a
            matrix a layer.
        checkpointing: whether activations are recomputed.
        element: bytes of an activation.
    """
    layers = []
    for layer, keep in enumerate(_per_layer("mlp_keep", mlp_keep, model)):
        shape = model.at(layer)
        part = _Layer(shape, batch, lora, keep, None, tuple(exact), layer == 0, layer == model.layers - 1)
        dense, sparse = part.rows("down_proj")
        lean = shape.droppable if "activations" in exact and shape.mlp_matrices == 3 else 0
        mlp = shape.mlp_matrices * (dense * shape.intermediate + sparse * (keep or 0)) - dense * lean
        attention = sum(out for _, out in shape.linears) or 2 * (shape.query_width + shape.kv_width)
        attention += lora.rank * len(shape.adapted(lora.targets))
        layers.append(batch.tokens * (3 * shape.hidden + attention) + mlp)
    if checkpointing:
        stays = model.hidden + (model.query_width if "recomputation" in exact else 0)
        return element * (model.layers * batch.tokens * stays + max(layers))
    return element * sum(layers)
