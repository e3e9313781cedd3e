"""Shapes that the cost model reads: of a model, of a batch and of adapters, and a table of known models.

Needs no torch. `MODEL_SHAPES` holds keyword arguments of transformers configurations, as published with the weights.
"""

import dataclasses
from collections.abc import Iterable
from types import MappingProxyType
from typing import Any

from .families import FAMILIES, ModelFamily

__all__ = ["MLP_PROJECTIONS", "MODEL_SHAPES", "BatchShape", "LayerShape", "LoraShape", "ModelShape"]

MLP_PROJECTIONS = ("gate_proj", "up_proj", "down_proj")

_CONFIG_FIELDS = {
    "hidden": "hidden_size",
    "intermediate": "intermediate_size",
    "heads": "num_attention_heads",
    "layers": "num_hidden_layers",
    "vocab": "vocab_size",
}
_EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
_EXPERTS_PER_TOKEN = ("num_experts_per_tok", "num_experts_per_token", "moe_k", "moe_topk", "top_k_experts")
_SHARED_EXPERTS = ("n_shared_experts", "num_shared_experts", "moe_num_shared_experts")
_SHARED_WIDTH = ("shared_expert_intermediate_size", "shared_intermediate_size")


def _shape(
    layers: int,
    hidden: int,
    intermediate: int,
    heads: int,
    kv_heads: int,
    vocab: int,
    tied: bool = False,
    model_type: str = "llama",
    **extra: Any,
) -> MappingProxyType:
    return MappingProxyType(
        {
            "model_type": model_type,
            "num_hidden_layers": layers,
            "hidden_size": hidden,
            "intermediate_size": intermediate,
            "num_attention_heads": heads,
            "num_key_value_heads": kv_heads,
            "vocab_size": vocab,
            "tie_word_embeddings": tied,
            **extra,
        }
    )


MODEL_SHAPES = MappingProxyType(
    {
        "llama-2-7b": _shape(32, 4096, 11008, 32, 32, 32000),
        "llama-2-13b": _shape(40, 5120, 13824, 40, 40, 32000),
        "llama-3-8b": _shape(32, 4096, 14336, 32, 8, 128256),
        "llama-3.1-8b": _shape(32, 4096, 14336, 32, 8, 128256),
        "llama-3.2-1b": _shape(16, 2048, 8192, 32, 8, 128256, tied=True, head_dim=64),
        "llama-3.2-3b": _shape(28, 3072, 8192, 24, 8, 128256, tied=True, head_dim=128),
        "mistral-7b": _shape(32, 4096, 14336, 32, 8, 32768, model_type="mistral"),
        "qwen2.5-0.5b": _shape(24, 896, 4864, 14, 2, 151936, tied=True, model_type="qwen2"),
        "qwen2.5-7b": _shape(28, 3584, 18944, 28, 4, 152064, model_type="qwen2"),
        "qwen3-8b": _shape(36, 4096, 12288, 32, 8, 151936, model_type="qwen3", head_dim=128),
        "smollm3-3b": _shape(36, 2048, 11008, 16, 4, 128256, tied=True, model_type="smollm3"),
        "tiny-229m": _shape(12, 1024, 3584, 16, 4, 32000),
    }
)


@dataclasses.dataclass(frozen=True)
class LayerShape:
    """What a layer may have of its own.

    Args:
        intermediate: MLP channels that a token passes through.
        sparse_mlp: how many of them may be dropped, None for all: in a mixture of experts those of the MLP that every
            token passes through.
        linears: inputs and outputs of the linears of what is in the place of an attention with projections, as
            multi-head latent attention or a convolution, which drops nothing; empty where there are q, k, v and o.
        core: width of heads over which QKᵀ and AV are computed, their mean; None is that of the queries.
        gates: channels that `q_proj` computes beside the queries, as a gate of what attention gives.
    """

    intermediate: int
    sparse_mlp: int | None = None
    linears: tuple[tuple[int, int], ...] = ()
    core: int | None = None
    gates: int = 0


@dataclasses.dataclass(frozen=True)
class ModelShape:
    """Widths of a decoder with grouped-query attention and a (gated) MLP; biases are not counted.

    Args:
        hidden: width of the residual stream.
        intermediate: MLP channels, as in a `LayerShape`.
        heads: query heads.
        kv_heads: key and value heads.
        head_dim: channels of a head.
        layers: decoder layers.
        vocab: rows of the embedding and of the language-model head.
        mlp_matrices: 3 for a gated MLP (gate, up, down), 2 for a plain one (up, down).
        tied: whether the head shares the embedding's weight.
        sparse_qk: whether queries and keys may drop channels (they may not where they are normalised).
        sparse_mlp: as in a `LayerShape`.
        linears: as in a `LayerShape`.
        core: as in a `LayerShape`.
        gates: as in a `LayerShape`.
        stored: MLP channels held in memory, where a token passes through some of them alone; 0 is `intermediate`.
        own: what each layer has, where layers differ; empty where all are alike.
        counted: weights of the whole model; 0 where they have not been counted.
    """

    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    layers: int
    vocab: int
    mlp_matrices: int = 3
    tied: bool = False
    sparse_qk: bool = True
    sparse_mlp: int | None = None
    linears: tuple[tuple[int, int], ...] = ()
    core: int | None = None
    gates: int = 0
    stored: int = 0
    own: tuple[LayerShape, ...] = ()
    counted: int = 0

    @classmethod
    def from_config(cls, config: Any, family: ModelFamily | None = None) -> "ModelShape":
        """Shape of a transformers configuration; of a vision-language model that of its language tower.

        A mixture of experts counts what one token passes through. All layers are taken to be alike, with q, k, v and
        o; of MLPs that a configuration lists layer by layer the widest counts. `counting.count_layers` knows better.

        Args:
            config: configuration with the field names that transformers has for all decoders.
            family: row of the model, looked up where it is left out; an unknown family has a gated MLP.

        Raises:
            ValueError: a field that gives the shape is missing.
        """
        text_config = config.get_text_config()
        family = family or FAMILIES.get(text_config.model_type, ModelFamily(text_config.model_type))
        values = text_config.to_dict()
        if isinstance(values.get("intermediate_size"), list):
            values["intermediate_size"] = max(values["intermediate_size"])
        if _first(values, _EXPERTS):  # where all layers are mixtures there may be no other width than that of experts
            values["intermediate_size"] = values.get("intermediate_size") or values.get("moe_intermediate_size")
        values["num_experts_per_tok"] = _first(values, _EXPERTS_PER_TOKEN) or None
        needed = [*_CONFIG_FIELDS.values(), *(["num_experts_per_tok"] if _first(values, _EXPERTS) else [])]
        missing = [name for name in needed if values.get(name) is None]
        if missing:
            raise ValueError(
                f"The {values.get('model_type')} configuration has no {', '.join(missing)}. Where it gives these by "
                "other names, set them under these, too: the cost of a step is counted by them."
            )
        shape = {field: values[name] for field, name in _CONFIG_FIELDS.items()}
        return cls(
            **shape,
            kv_heads=values.get("num_key_value_heads") or shape["heads"],
            head_dim=values.get("head_dim") or shape["hidden"] // shape["heads"],
            mlp_matrices=3 if family.is_gated else 2,
            tied=bool(getattr(config, "tie_word_embeddings", False)),  # the head is the whole model's
            sparse_qk=not family.normalises_queries(text_config),
            core=_core(values, shape["heads"]),
        )._with_experts(values)

    def _with_experts(self, values: dict[str, Any]) -> "ModelShape":
        """The same with the MLP of a mixture of experts, where the configuration has one."""
        experts = _first(values, _EXPERTS)
        if not experts:
            return dataclasses.replace(self, intermediate=_shared(values) or self.intermediate)
        width = values.get("moe_intermediate_size") or self.intermediate
        shared = _shared(values)
        active = values["num_experts_per_tok"] * width + shared
        return dataclasses.replace(self, intermediate=active, sparse_mlp=shared, stored=experts * width + shared)

    def at(self, layer: int) -> "ModelShape":
        """The shape of a model all of whose layers are as this one."""
        return dataclasses.replace(self, **vars(self.own[layer]), own=()) if self.own else self

    @property
    def query_width(self) -> int:
        """Channels of `q_proj` and inputs of `o_proj`."""
        return self.heads * self.head_dim

    @property
    def kv_width(self) -> int:
        """Channels of `k_proj` and `v_proj`."""
        return self.kv_heads * self.head_dim

    @property
    def droppable(self) -> int:
        """MLP channels that may be dropped: all, or those beside the experts."""
        return self.intermediate if self.sparse_mlp is None else self.sparse_mlp

    @property
    def mlp_names(self) -> tuple[str, ...]:
        """Projections of the MLP."""
        return MLP_PROJECTIONS[-self.mlp_matrices :]

    def widths(self, mlp_keep: int | None = None, attention_keep: int | None = None) -> dict[str, tuple[int, int]]:
        """Inputs and outputs of each projection.

        Args:
            mlp_keep: MLP channels kept, None for all.
            attention_keep: key and value channels kept, None for all.
        """
        mlp = self.intermediate if mlp_keep is None else mlp_keep
        kv = self.kv_width if attention_keep is None else attention_keep
        groups, keys = self.heads // self.kv_heads, kv if self.sparse_qk else self.kv_width
        attention = {"q_proj": (self.hidden, keys * groups + self.gates), "k_proj": (self.hidden, keys)}
        attention |= {"v_proj": (self.hidden, kv), "o_proj": (kv * groups, self.hidden)}
        names = dict.fromkeys(self.mlp_names, (self.hidden, mlp)) | {"down_proj": (mlp, self.hidden)}
        return attention | names

    def adapted(self, targets: Iterable[str]) -> list[tuple[str, tuple[int, int]]]:
        """Name, inputs and outputs of the linears of a layer that adapters on `targets` are on.

        Adapters on attention are on every linear of what is in its place, which has no name here.
        """
        widths, attention = self.widths(), [name for name in targets if name not in MLP_PROJECTIONS]
        others = [("", linear) for linear in self.linears] if attention else []
        return others + [(name, widths[name]) for name in targets if not (self.linears and name in attention)]

    @property
    def parameters(self) -> int:
        """Weights of the whole model: linears, embedding, head and norms."""
        if self.counted:
            return self.counted
        mlp = self.mlp_matrices * self.hidden * max(self.stored, self.intermediate)
        linears = mlp + self.hidden * (2 * self.query_width + 2 * self.kv_width + self.gates)
        embeddings = self.vocab * self.hidden * (1 if self.tied else 2)
        return self.layers * (linears + 2 * self.hidden) + embeddings + self.hidden


def _first(values: dict[str, Any], names: tuple[str, ...]) -> int:
    """The number that a configuration gives by one of some names, 0 where it gives none."""
    return next(filter(None, map(values.get, names)), 0)


def _shared(values: dict[str, Any]) -> int:
    """Channels of the MLP that every token passes through beside the experts, if any."""
    # Gemma 4 has them beside its MLP, and Hunyuan's configuration does not name the MLP beside them
    if values.get("enable_moe_block") or values.get("model_type") == "hunyuan_v1_moe":
        return values["intermediate_size"]
    width = values.get("moe_intermediate_size") or values.get("intermediate_size") or 0
    return _first(values, _SHARED_WIDTH) or _first(values, _SHARED_EXPERTS) * width


def _core(values: dict[str, Any], heads: int) -> int | None:
    """Width over which multi-head latent attention computes QKᵀ and AV, their mean; None for other attention."""
    keys, values_ = (values.get(name) or 0 for name in ("qk_nope_head_dim", "v_head_dim"))
    return heads * (keys + values["qk_rope_head_dim"] + values_) // 2 if keys and values_ else None


@dataclasses.dataclass(frozen=True)
class BatchShape:
    """Tokens of one batch by kind.

    Args:
        context: tokens that sparse layers compute in part.
        output: tokens that stay dense.
        padding: tokens of no row.
        loss: positions that enter the loss.
        batch: rows.
        sequence: tokens of a row, padding included.
    """

    context: int
    output: int
    padding: int
    loss: int
    batch: int
    sequence: int

    @classmethod
    def full(cls, batch: int, sequence: int, output: int, fill: float = 1.0) -> "BatchShape":
        """Equal rows, each with `output` answer tokens at its end.

        The dense tokens are the answer and the position that predicts its first token (`label_or_predictor`).

        Args:
            batch: rows.
            sequence: tokens of a row.
            output: answer tokens of a row.
            fill: share of a row that is no padding.

        Raises:
            ValueError: `fill` outside (0, 1], or an answer that does not fit the row.
        """
        if not 0 < fill <= 1:
            raise ValueError(f"fill: {fill} is outside (0, 1]. It is the share of a row that is no padding.")
        length = round(sequence * fill)
        if not 0 <= output < length:
            raise ValueError(f"output: {output} answer tokens need a longer row, this one has {length} tokens.")
        dense = output + 1 if output else 0
        return cls(
            context=batch * (length - dense),
            output=batch * dense,
            padding=batch * (sequence - length),
            loss=batch * output,
            batch=batch,
            sequence=sequence,
        )

    @property
    def tokens(self) -> int:
        """All positions, padding included."""
        return self.context + self.output + self.padding


@dataclasses.dataclass(frozen=True)
class LoraShape:
    """Rank and target projections of the adapters, under PEFT's names."""

    rank: int = 16
    targets: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj")

    def parameters(self, model: ModelShape) -> int:
        """Trainable weights of all layers."""
        layers = (model.at(layer).adapted(self.targets) for layer in range(model.layers))
        return self.rank * sum(sum(widths) for layer in layers for _, widths in layer)
