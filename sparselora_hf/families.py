"""Model families: where a decoder keeps its projections. A family is a row of this table, not a class."""

import dataclasses
from typing import Any

__all__ = ["FAMILIES", "ModelFamily", "families_table", "find_family"]


@dataclasses.dataclass(frozen=True)
class ModelFamily:
    """Names of one family's modules, relative to a decoder layer, and what a layer's structure has of its own.

    The defaults describe Llama. Whatever the family's own code does between the projections (rotary embeddings,
    windows, soft-capping, norms before or after a block, parallel residuals) runs unchanged and needs no entry.

    Args:
        name: the ``model_type`` of the configuration of the language model.
        title: name for people, in tables.
        layers: attribute of the decoder that lists its layers.
        norm: final norm of the decoder.
        attention: attention module of a layer, with projections `q`, `k`, `v` and `o`. Where `q` and `qkv` are empty
            it has none that could drop channels, as multi-head latent attention, and stays dense.
        mixer: what some layers have in place of attention (linear attention, a convolution); it stays dense.
        qkv: projection that computes queries, keys and values at once; `q`, `k` and `v` are not looked up then.
        qkv_by_head: the fused rows are grouped by key/value head (its queries, its key, its value), where otherwise
            all queries come first, then all keys, then all values.
        head_dim: attribute of the attention module that tells the channels of a head.
        qk_norm: queries and keys are normalised before they meet, which makes them unfit for dropping channels
            (`AttentionHook` says why): True, or the configuration's field that says so.
        mlp: MLP module of a layer, with projections `gate`, `up`, `down`.
        activation: activation of the MLP: an attribute of it, or the name of one of transformers' activations.
        gate: empty for a plain MLP, ``down(activation(up(x)))``.
        gate_up: projection that computes gate and up at once, gate first; `gate` and `up` are not looked up then.
        dropout: attribute of the MLP that gives the dropout of its output; empty where it has none.
        experts: child of the MLP module of those layers that are mixtures of experts, which stay dense.
        shared_mlp: MLP inside a mixture of experts that every token passes through.
        experts_beside: child of those layers that have experts beside the MLP module; they stay dense.
    """

    name: str
    title: str = ""
    layers: str = "layers"
    norm: str = "norm"
    attention: str = "self_attn"
    mixer: str = ""
    q: str = "q_proj"
    k: str = "k_proj"
    v: str = "v_proj"
    o: str = "o_proj"
    qkv: str = ""
    qkv_by_head: bool = False
    head_dim: str = "head_dim"
    qk_norm: bool | str = False
    mlp: str = "mlp"
    gate: str = "gate_proj"
    up: str = "up_proj"
    down: str = "down_proj"
    gate_up: str = ""
    activation: str = "act_fn"
    dropout: str = ""
    experts: str = ""
    shared_mlp: str = ""
    experts_beside: str = ""

    @property
    def has_projections(self) -> bool:
        """Whether attention has projections that can drop channels."""
        return bool(self.q or self.qkv)

    @property
    def is_gated(self) -> bool:
        """Whether the MLP multiplies an activated gate with a second projection."""
        return bool(self.gate or self.gate_up)

    def normalises_queries(self, config: Any) -> bool:
        """Whether a model of this family, with this language configuration, normalises queries and keys."""
        return self.qk_norm if isinstance(self.qk_norm, bool) else bool(getattr(config, self.qk_norm))


_EXPERTS = {"experts": "experts", "shared_mlp": "shared_experts"}
_DEEPSEEK = {"q": "", **_EXPERTS}
_LFM2_MLP = {"mlp": "feed_forward", "gate": "w1", "up": "w3", "down": "w2", "activation": "silu"}
_LFM2 = {"norm": "embedding_norm", "mixer": "conv", "o": "out_proj", "qk_norm": True, **_LFM2_MLP}
_NEOX_MLP = {"gate": "", "up": "dense_h_to_4h", "down": "dense_4h_to_h", "activation": "act"}
_NEOX = {"qkv": "query_key_value", "qkv_by_head": True, "o": "dense", **_NEOX_MLP}
_QWEN3_NEXT = {"mixer": "linear_attn", "qk_norm": True, "experts": "experts", "shared_mlp": "shared_expert"}
_PHI3_MLP = {"gate_up": "gate_up_proj", "activation": "activation_fn"}

_ROWS = (
    ModelFamily("apertus", "Apertus", qk_norm=True, gate=""),
    ModelFamily("apertus1p5_text", "Apertus 1.5", qk_norm=True, gate=""),
    ModelFamily("arcee", "Arcee AFM", gate=""),
    ModelFamily("aria_text", "Aria", **_EXPERTS),
    ModelFamily("axk1", "A.X-K1", **_DEEPSEEK),
    ModelFamily("bailing_hybrid", "Ling 3.0", **_DEEPSEEK),
    ModelFamily("bamba", "Bamba", norm="final_layernorm", mixer="mamba", mlp="feed_forward"),
    ModelFamily("cohere", "Cohere Command R", qk_norm="use_qk_norm"),
    ModelFamily("cohere2", "Cohere Command R7B, A"),
    ModelFamily("cohere2_moe", "Cohere Command A+", **_EXPERTS),
    ModelFamily("cwm", "Code World Model"),
    ModelFamily("deepseek_v2", "DeepSeek-V2", **_DEEPSEEK),
    ModelFamily("deepseek_v3", "DeepSeek-V3, R1; Moonlight", **_DEEPSEEK),
    ModelFamily("deepseek_v32", "DeepSeek-V3.2", **_DEEPSEEK),
    # what two heads give is subtracted and normalised
    ModelFamily("diffllama", "DiffLlama", q=""),
    ModelFamily("dots1", "dots.llm1", qk_norm=True, **_EXPERTS),
    ModelFamily("ernie4_5", "ERNIE 4.5"),
    ModelFamily("ernie4_5_moe", "ERNIE 4.5-MoE", **_EXPERTS),
    ModelFamily("exaone", "EXAONE 3"),
    ModelFamily("exaone4", "EXAONE 4", qk_norm=True),
    ModelFamily("exaone_moe", "EXAONE-MoE", qk_norm=True, **_EXPERTS),
    ModelFamily("flex_olmo", "FlexOlmo", qk_norm=True, experts="experts"),
    ModelFamily("gemma", "Gemma 1"),
    ModelFamily("gemma2", "Gemma 2"),
    ModelFamily("gemma3_text", "Gemma 3, with images too", qk_norm=True),
    # queries, keys and values are normalised; some layers have no values of their own, some borrow keys and values
    # a gate of Gemma 3n that keeps its own largest values alone is no plain activation: the check at attach finds it
    ModelFamily("gemma3n_text", "Gemma 3n, text alone", q=""),
    ModelFamily("gemma4_text", "Gemma 4, with images too", q="", experts_beside="experts"),
    ModelFamily("gemma4_unified_text", "Gemma 4 Unified", q="", experts_beside="experts"),
    ModelFamily("glm", "GLM-4-9B", **_PHI3_MLP),
    ModelFamily("glm4", "GLM-4-0414", **_PHI3_MLP),
    ModelFamily("glm4_moe", "GLM-4.5, GLM-4.6", qk_norm="use_qk_norm", **_EXPERTS),
    ModelFamily("glm4_moe_lite", "GLM-4.7-Flash", **_DEEPSEEK),
    ModelFamily("glm4v_moe_text", "GLM-4.5V", **_EXPERTS),
    ModelFamily("glm4v_text", "GLM-4.1V, GLM-4.6V Flash", **_PHI3_MLP),
    ModelFamily("glm_moe_dsa", "GLM-5", **_DEEPSEEK),
    ModelFamily("glm_ocr_text", "GLM-OCR", **_PHI3_MLP),
    ModelFamily(
        "gpt_neox",
        "GPT-NeoX, Pythia",
        norm="final_layer_norm",
        attention="attention",
        head_dim="head_size",
        **_NEOX,
    ),
    ModelFamily("gpt_oss", "gpt-oss", experts="experts"),
    ModelFamily("granite", "Granite 3"),
    ModelFamily("granite_swa", "Granite Swash"),
    ModelFamily("granitemoe", "Granite 3 MoE", mlp="block_sparse_moe", experts="experts"),
    ModelFamily(
        "granitemoehybrid",
        "Granite 4",
        mixer="mamba",
        mlp="shared_mlp",
        gate_up="input_linear",
        down="output_linear",
        activation="activation",
        experts_beside="block_sparse_moe",
    ),
    ModelFamily("helium", "Helium"),
    ModelFamily("hunyuan_v1_dense", "Hunyuan dense", qk_norm=True),
    ModelFamily("hunyuan_v1_moe", "Hunyuan-A13B", qk_norm=True, experts="experts", shared_mlp="shared_mlp"),
    ModelFamily("hy_v3", "Hy3", qk_norm=True, **_EXPERTS),
    ModelFamily("hyperclovax", "HyperCLOVA X SEED"),
    ModelFamily("internlm3", "InternLM3"),
    ModelFamily("iquestcoder", "IQuest-Coder"),
    ModelFamily("jais2", "Jais 2", gate=""),
    ModelFamily("kimi_linear", "Kimi-Linear", **_DEEPSEEK),
    ModelFamily("kolibri1", "Kolibri 1", qk_norm=True, **_EXPERTS),
    ModelFamily("lara_mini", "Lara 4 Mini", **_QWEN3_NEXT),
    ModelFamily("lfm2", "LFM2", **_LFM2),
    ModelFamily("lfm2_moe", "LFM2-MoE", experts="experts", **_LFM2),
    ModelFamily("lfm3", "LFM3", **{**_LFM2, "o": "o_proj"}),
    ModelFamily("llama", "Llama 2, 3.x; SmolLM 1, 2; SmolVLM"),
    ModelFamily("mellum", "Mellum 2", qk_norm=True, experts="experts"),
    ModelFamily("minicpm3", "MiniCPM3", q=""),
    ModelFamily("minimax_m2", "MiniMax-M2", qk_norm=True, experts="experts"),
    ModelFamily("ministral", "Ministral 8B"),
    ModelFamily("ministral3", "Ministral 3"),
    ModelFamily("mistral", "Mistral"),
    ModelFamily("mixtral", "Mixtral", experts="experts"),
    ModelFamily("nanochat", "NanoChat", qk_norm=True, gate="", up="fc1", down="fc2", activation="activation_fn"),
    ModelFamily("nemotron", "Nemotron 3 8B, Minitron", gate=""),
    ModelFamily("olmo", "OLMo 1"),
    ModelFamily("olmo2", "OLMo 2", qk_norm=True),
    ModelFamily("olmo3", "OLMo 3", qk_norm=True),
    ModelFamily("olmo_hybrid", "OLMo Hybrid", mixer="linear_attn", qk_norm=True),
    ModelFamily("olmoe", "OLMoE", qk_norm=True, experts="experts"),
    ModelFamily("paddleocr_vl_text", "PaddleOCR-VL"),
    ModelFamily(
        "persimmon",
        "Persimmon",
        norm="final_layernorm",
        qk_norm="qk_layernorm",
        **_NEOX,
    ),
    ModelFamily(
        "phi",
        "Phi-1, 1.5, 2",
        norm="final_layernorm",
        o="dense",
        qk_norm="qk_layernorm",
        gate="",
        up="fc1",
        down="fc2",
        activation="activation_fn",
    ),
    ModelFamily("phi3", "Phi-3, Phi-4", qkv="qkv_proj", **_PHI3_MLP),
    ModelFamily("phimoe", "Phi-3.5-MoE", experts="experts"),
    ModelFamily("qwen2", "Qwen2, Qwen2.5"),
    ModelFamily("qwen2_5_vl_text", "Qwen2.5-VL"),
    ModelFamily("qwen2_moe", "Qwen1.5-MoE, Qwen2-MoE", experts="experts", shared_mlp="shared_expert"),
    ModelFamily("qwen2_vl_text", "Qwen2-VL"),
    ModelFamily("qwen3", "Qwen3", qk_norm=True),
    ModelFamily("qwen3_5_moe_text", "Qwen3.5-MoE", **_QWEN3_NEXT),
    ModelFamily("qwen3_5_text", "Qwen3.5", mixer="linear_attn", qk_norm=True),
    ModelFamily("qwen3_moe", "Qwen3-MoE", qk_norm=True, experts="experts"),
    ModelFamily("qwen3_next", "Qwen3-Next", **_QWEN3_NEXT),
    ModelFamily("qwen3_vl_moe_text", "Qwen3-VL-MoE", qk_norm=True, experts="experts"),
    ModelFamily("qwen3_vl_text", "Qwen3-VL", qk_norm=True),
    ModelFamily("sarvam_mla", "Sarvam 105B", **_DEEPSEEK),
    ModelFamily("sarvam_moe", "Sarvam 30B", qk_norm="use_qk_norm", **_EXPERTS),
    ModelFamily("seed_oss", "Seed-OSS", dropout="residual_dropout"),
    ModelFamily("smollm3", "SmolLM3"),
    ModelFamily("solar_open", "Solar Open", **_EXPERTS),
    ModelFamily("stablelm", "StableLM", qk_norm="qk_layernorm"),
    ModelFamily(
        "starcoder2",
        "StarCoder2",
        gate="",
        up="c_fc",
        down="c_proj",
        activation="act",
        dropout="residual_dropout",
    ),
    ModelFamily("vaultgemma", "VaultGemma"),
    ModelFamily("youtu", "Youtu-LLM", q=""),
)

FAMILIES = {family.name: family for family in _ROWS}

_EXAMPLE = """    from sparselora_hf import ModelFamily, sparsify
    family = ModelFamily("{name}", attention="self_attn", q="q_proj", mlp="mlp", gate="gate_proj")
    # and qk_norm=True if it normalises queries and keys: dropped channels would inflate the others, and nothing warns;
    # q="" if its attention has no q/k/v/o; mixer="linear_attn" if some layers have that in place of attention
    sparsify(model, config, family=family)        # or SparseLoraTrainer(..., model_family=family)"""


def find_family(model_type: str) -> ModelFamily:
    """The row of a model type.

    Raises:
        ValueError: unknown type; the message lists the known ones and shows how to describe a new one.
    """
    if model_type in FAMILIES:
        return FAMILIES[model_type]
    raise ValueError(
        f"Model family {model_type!r} is not known. Known: {', '.join(sorted(FAMILIES))}. "
        "If its layers have an MLP, and q/k/v/o projections or none, describe it in a script (no flag takes one):"
        f"\n{_EXAMPLE.format(name=model_type)}"
    )


def families_table() -> tuple[list[str], list[list[str]]]:
    """Header and rows of a table for people: each family, its structure, and what of it can be sparse."""
    header = ["family", "`model_type`", "MLP", "q, k, v", "sparse"]
    return header, [_describe(family) for family in sorted(_ROWS, key=lambda family: family.title.lower())]


def _describe(family: ModelFamily) -> list[str]:
    mlp = "fused gate and up" if family.gate_up else "gated" if family.gate else "plain"
    inputs = "one linear, by head" if family.qkv_by_head else "one linear" if family.qkv else "three linears"
    inputs = inputs if family.has_projections else "stay whole"
    sparse = "MLP"
    if family.experts:
        mlp = "experts" + (" and a shared MLP" if family.shared_mlp else "")
        sparse = ("shared MLP, " if family.shared_mlp else "") + "MLP of layers without experts"
    condition = f" where `{family.qk_norm}`" if isinstance(family.qk_norm, str) else ""
    attention = "q, k, v, o" if not family.qk_norm or condition else "v, o"
    note = f" (v, o{condition})" if condition else ""
    if family.mixer:
        note += " of layers with attention"
    attention = f"; {attention}{note}" if family.has_projections else ""
    return [family.title, f"`{family.name}`", mlp, inputs, f"{sparse}{attention}"]
