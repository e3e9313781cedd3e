"""Tiny random models of every family, a few thousand weights each."""

import torch
from helpers import VOCAB, add_lora, make_batch, randomise
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    Qwen2AudioForConditionalGeneration,
)

from sparselora_hf.families import FAMILIES, find_family

IMAGE_TOKEN = VOCAB - 1

_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "decoder_sparse_step": 1}
_LINEAR = {
    "layer_types": ["linear_attention", "full_attention"],
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}
_SHARED = {**_EXPERTS, "shared_expert_intermediate_size": 48}
_LATENT = {
    "head_dim": 4,
    "num_key_value_heads": 8,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
}
_MOE = {
    "first_k_dense_replace": 1,
    "n_routed_experts": 4,
    "n_group": 1,
    "topk_group": 1,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "n_shared_experts": 1,
}
_DEEPSEEK = {**_LATENT, **_MOE, "mlp_layer_types": ["dense", "sparse"]}
_INDEXER = {"index_n_heads": 2, "index_head_dim": 8, "index_topk": 4}
_MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_n_groups": 1}
_PER_LAYER = {"hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": VOCAB}
_SLIDING = ["sliding_attention", "full_attention"]
_GEMMA3N = {"layer_types": _SLIDING, "sliding_window": 6, "laurel_rank": 8, **_PER_LAYER}
_GEMMA4 = {"layer_types": _SLIDING, "sliding_window": 6, "global_head_dim": 16}

# what a family's configuration says beside the common settings
CONFIGS = {
    "apertus": {},
    "apertus1p5_text": {},
    "arcee": {"mlp_bias": True},
    "aria_text": {"moe_num_experts": 4, "moe_topk": 2, "moe_num_shared_experts": 2},
    "axk1": {**_LATENT, **_MOE},
    "bailing_hybrid": {**_DEEPSEEK, "num_local_experts": 4, "layer_types": ["linear_attention", "full_attention"]},
    "bamba": {"attn_layer_indices": [1], **_MAMBA},
    "cohere": {"logit_scale": 0.25},
    "cohere with qk norm": {"model_type": "cohere", "use_qk_norm": True},
    "cohere2": {"sliding_window": 6, "layer_types": _SLIDING},
    "cohere2_moe": {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "num_shared_experts": 1,
        "sliding_window": 6,
        "layer_types": _SLIDING,
    },
    "cwm": {"sliding_window": 6, "layer_types": _SLIDING},
    "deepseek_v2": _DEEPSEEK,
    "deepseek_v3": _DEEPSEEK,
    "deepseek_v32": {**_DEEPSEEK, **_INDEXER},
    "diffllama": {},
    "dots1": _MOE,
    "ernie4_5": {"use_bias": True},
    "ernie4_5_moe": {
        "moe_num_experts": 4,
        "moe_k": 2,
        "moe_intermediate_size": 32,
        "moe_num_shared_experts": 2,
        "moe_layer_start_index": 0,
    },
    "exaone": {},
    "exaone4": {"sliding_window": 6, "sliding_window_pattern": 2, "layer_types": _SLIDING},
    "exaone_moe": {
        "sliding_window": 6,
        "layer_types": _SLIDING,
        "mlp_layer_types": ["dense", "sparse"],
        "num_shared_experts": 1,
        **_EXPERTS,
    },
    "flex_olmo": {"num_experts": 4, "num_experts_per_tok": 2},
    "gemma": {},
    "gemma2": {"sliding_window": 6, "query_pre_attn_scalar": 8, "layer_types": _SLIDING},
    "gemma3_text": {"sliding_window": 6, "query_pre_attn_scalar": 8, "layer_types": _SLIDING},
    "gemma3n_text": {**_GEMMA3N, "num_kv_shared_layers": 0, "activation_sparsity_pattern": [0.0, 0.0]},
    "gemma4_text": {**_GEMMA4, **_PER_LAYER},
    "gemma4_unified_text": _GEMMA4,
    "glm": {"attention_bias": True},
    "glm4": {"attention_bias": True},
    "glm4_moe": _MOE,
    "glm4_moe with qk norm": {"model_type": "glm4_moe", **_MOE, "use_qk_norm": True, "n_shared_experts": 2},
    "glm4_moe_lite": _DEEPSEEK,
    "glm_moe_dsa": {**_DEEPSEEK, **_INDEXER},
    "gpt_neox": {"hidden_dropout": 0.0, "attention_dropout": 0.0},
    "gpt_neox sequential": {"model_type": "gpt_neox", "use_parallel_residual": False},
    "gpt_oss": {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 6},
    "granite": {"embedding_multiplier": 2.0, "logits_scaling": 3.0, "residual_multiplier": 0.5},
    "granite_swa": {"sliding_window": 6},
    "granitemoe": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "helium": {},
    "hunyuan_v1_dense": {},
    "hunyuan_v1_moe": {"num_experts": 4, "moe_topk": 2},
    "hy_v3": {**_EXPERTS, "num_shared_experts": 1, "first_k_dense_replace": 1},
    "hyperclovax": {},
    "internlm3": {"qkv_bias": True, "bias": True},
    "granitemoehybrid": {
        "layer_types": ["mamba", "attention"],
        "num_local_experts": 0,
        "shared_intermediate_size": 96,
        **_MAMBA,
    },
    "iquestcoder": {},
    "jais2": {},
    "kimi_linear": {
        **_DEEPSEEK,
        "q_lora_rank": None,
        "num_local_experts": 4,
        "linear_num_heads": 2,
        "linear_head_dim": 8,
        "layer_types": ["linear_attention", "full_attention"],
    },
    "kolibri1": _SHARED,
    "lara_mini": {**_LINEAR, **_SHARED},
    "lfm2": {"layer_types": ["conv", "full_attention"], "block_auto_adjust_ff_dim": False},
    "lfm2_moe with a dense layer": {
        "model_type": "lfm2_moe",
        "layer_types": ["conv", "full_attention"],
        "num_dense_layers": 1,
        **_EXPERTS,
    },
    "lfm3": {"layer_types": ["conv", "full_attention"], "block_auto_adjust_ff_dim": False},
    "llama": {"attention_bias": True, "mlp_bias": True},
    "mellum": {**_EXPERTS, "sliding_window": 6},
    "minicpm3": _LATENT,
    "minimax_m2": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "ministral": {"sliding_window": 6, "layer_types": _SLIDING},
    "ministral3": {"sliding_window": 6},
    "mistral": {"sliding_window": 6},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "nanochat": {},
    "nemotron": {"mlp_bias": True},
    "olmo": {"clip_qkv": 0.5, "attention_bias": True},
    "olmo2": {},
    "olmo3": {"sliding_window": 6, "layer_types": _SLIDING},
    "olmo_hybrid": {
        "layer_types": ["linear_attention", "full_attention"],
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 2,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
    },
    "olmoe": {"num_experts": 4, "num_experts_per_tok": 2, "clip_qkv": 3.0},
    "persimmon": {"num_key_value_heads": 8},
    "persimmon without qk norm": {"model_type": "persimmon", "num_key_value_heads": 8, "qk_layernorm": False},
    "phi": {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attention_dropout": 0.0},
    "phi with qk norm": {"model_type": "phi", "qk_layernorm": True},
    "phi3": {"resid_pdrop": 0.0, "embd_pdrop": 0.0},
    "phimoe": {"num_local_experts": 4, "num_experts_per_tok": 2, "router_jitter_noise": 0.0},
    "qwen2": {},
    "qwen2_moe": _SHARED,
    "qwen3": {},
    "qwen3_5_moe_text": {**_LINEAR, **_SHARED},
    "qwen3_5_text": _LINEAR,
    "qwen3_moe": _EXPERTS,
    "qwen3_moe with a dense layer": {"model_type": "qwen3_moe", **_EXPERTS, "mlp_only_layers": [1]},
    "sarvam_mla": _DEEPSEEK,
    "sarvam_moe": {**_MOE, "use_qk_norm": False},
    "sarvam_moe with qk norm": {"model_type": "sarvam_moe", **_MOE},
    "seed_oss": {"residual_dropout": 0.0, "attention_dropout": 0.0},
    "qwen3_next": {**_LINEAR, **_SHARED},
    "smollm3": {"no_rope_layers": [1, 0]},
    "solar_open": _MOE,
    "stablelm": {"use_parallel_residual": True, "use_qkv_bias": True},
    "stablelm with qk norm": {"model_type": "stablelm", "qk_layernorm": True},
    "starcoder2": {"residual_dropout": 0.0, "embedding_dropout": 0.0, "attention_dropout": 0.0},
    "vaultgemma": {"sliding_window": 6, "query_pre_attn_scalar": 8, "layer_types": _SLIDING},
    "youtu": _LATENT,
}

# whose parts are like others': tests of single parts leave them out, to save time
_LIKE_OTHERS = """
    apertus1p5_text aria_text axk1 bailing_hybrid bamba cohere2_moe deepseek_v32 diffllama glm_moe_dsa granite_swa
    granitemoe hunyuan_v1_moe hy_v3 hyperclovax iquestcoder jais2 kimi_linear kolibri1 lara_mini lfm3 mellum
    minimax_m2 nanochat olmo_hybrid sarvam_mla sarvam_moe solar_open vaultgemma youtu
"""
VARIED = [name for name in CONFIGS if name.split()[0] not in _LIKE_OTHERS.split()]

EXPERTS = {name for name, family in FAMILIES.items() if family.experts}
# whose layers have no gated MLP: a plain one, or experts alone
UNGATED = {name for name, row in FAMILIES.items() if not row.is_gated or (row.experts and not row.shared_mlp)}


def _settings(model_type: str, **options) -> dict:
    return {
        "vocab_size": VOCAB,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 8,
        "num_key_value_heads": 8 if model_type == "gpt_neox" else 4,
        "head_dim": 8,
        "max_position_embeddings": 64,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    } | options


def zoo_config(name: str, **more):
    """Configuration of a tiny model."""
    options = CONFIGS[name] | more
    model_type = options.pop("model_type", name)
    return AutoConfig.for_model(model_type, **_settings(model_type, **options))


def zoo_model(name: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    """A tiny model of a family, every weight large enough to matter."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(zoo_config(name), dtype=dtype, experts_implementation="eager")
    return randomise(model)


# linears of what takes attention's place in some layers, or of attention that is not as others
_OTHERS = {
    "conv": ("in_proj",),
    "linear_attn": ("in_proj_qkv", "in_proj_qkvz", "out_proj"),
    "mamba": ("in_proj",),
    "": ("q_b_proj", "kv_b_proj", "q_proj"),
}


def lora_targets(model: nn.Module, part: str) -> list[str]:
    """Names of the linears of ``attention``, ``mlp`` or ``all``, whatever the family calls them."""
    family = find_family(model.config.get_text_config().model_type)
    attention = (family.qkv,) if family.qkv else (family.q, family.k, family.v)
    if family.mixer or not family.has_projections:
        attention += _OTHERS[family.mixer]
    mlp = (family.gate_up,) if family.gate_up else (family.gate, family.up)
    names = {"attention": (*attention, family.o), "mlp": (*mlp, family.down)}
    return [name for name in (sum(names.values(), ()) if part == "all" else names[part]) if name]


def zoo_lora(name: str, part: str = "attention", dtype: torch.dtype = torch.float32, **lora) -> nn.Module:
    """The same with adapters, in training mode."""
    model = zoo_model(name, dtype)
    return add_lora(model, lora_targets(model, part), **lora).train()


def _vision(**options) -> dict:
    return {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4, **options}


def _text(model_type: str, **options) -> dict:
    return {"model_type": model_type, **_settings(model_type, **options)}


def _grids(text: dict, **vision) -> tuple[dict, dict]:
    """A Qwen-VL or GLM-V: images come as a list of patches with its grid, positions in three axes."""
    text["rope_parameters"] = {"rope_type": "default", "mrope_section": [1, 1, 2], "partial_rotary_factor": 1.0}
    ids = {"image_token_id": IMAGE_TOKEN, "vision_start_token_id": VOCAB - 2, "video_token_id": VOCAB - 3}
    vision = {"depth": 1, "num_heads": 4, "patch_size": 2, "hidden_size": 32, "intermediate_size": 48, **vision}
    return {"text_config": text, "vision_config": vision, **ids}, {"pixel_values": (16, 3 * 2 * 2 * 2)}


_GEMMA4_EXPERTS = {
    **_GEMMA4,
    "use_bidirectional_attention": "vision",
    "num_global_key_value_heads": 2,
    "attention_k_eq_v": True,
    "hidden_size_per_layer_input": 0,
    "enable_moe_block": True,
    "num_experts": 4,
    "top_k_experts": 2,
    "moe_intermediate_size": 32,
}
_DEEPSTACK = {"depth": 2, "num_position_embeddings": 16, "deepstack_visual_indexes": [0, 1]}

# vision-language models: configuration, and the shape of an image's pixels
VISION = {
    "gemma3": (
        {
            "text_config": _text("gemma3_text", **CONFIGS["gemma3_text"]),
            "vision_config": _vision(image_size=8, patch_size=2),
            "mm_tokens_per_image": 4,
            "image_token_index": IMAGE_TOKEN,
            "image_token_id": IMAGE_TOKEN,
        },
        {"pixel_values": (1, 3, 8, 8)},
    ),
    "gemma4": (
        {
            "text_config": _text("gemma4_text", **_GEMMA4_EXPERTS),
            "vision_config": _vision(
                num_key_value_heads=4, head_dim=8, patch_size=2, pooling_kernel_size=2, position_embedding_size=16
            ),
            "image_token_id": IMAGE_TOKEN,
            "video_token_id": VOCAB - 3,
            "audio_token_id": VOCAB,
        },
        {"pixel_values": (1, 16, 3 * 2 * 2)},
    ),
    "glm46v": _grids(_text("glm4v_text"), image_size=8, out_hidden_size=64),
    "glm4v": _grids(_text("glm4v_text"), image_size=8, out_hidden_size=64),
    "glm4v_moe": _grids(_text("glm4v_moe_text", **_MOE), image_size=8, out_hidden_size=64),
    "glm_ocr": _grids(_text("glm_ocr_text"), image_size=8, out_hidden_size=64),
    "paddleocr_vl": (
        _grids(_text("paddleocr_vl_text", use_bias=True), **_vision(image_size=8))[0],
        {"pixel_values": (16, 3, 2, 2)},
    ),
    "qwen2_5_vl": _grids(
        _text("qwen2_5_vl_text"), out_hidden_size=64, spatial_patch_size=2, window_size=8, fullatt_block_indexes=[0]
    ),
    "qwen2_vl": _grids(_text("qwen2_vl_text"), embed_dim=32, hidden_size=64),
    "qwen3_vl": _grids(_text("qwen3_vl_text"), out_hidden_size=64, **_DEEPSTACK),
    "qwen3_vl_moe": _grids(
        _text("qwen3_vl_moe_text", **_EXPERTS, mlp_only_layers=[1]), out_hidden_size=64, **_DEEPSTACK
    ),
    "qwen3_5": _grids(_text("qwen3_5_text", **_LINEAR), out_hidden_size=64, num_position_embeddings=16),
    "smolvlm": (
        {
            "text_config": _text("llama"),
            "vision_config": _vision(image_size=8, patch_size=2),
            "scale_factor": 2,
            "image_token_id": IMAGE_TOKEN,
        },
        {"pixel_values": (1, 1, 3, 8, 8)},
    ),
}


def vision_model(name: str) -> nn.Module:
    """A tiny vision-language model whose images become four tokens."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(name, **VISION[name][0], pad_token_id=0)
    eager = {"experts_implementation": "eager"} if "moe" in name or name == "gemma4" else {}
    return randomise(AutoModelForImageTextToText.from_config(config, dtype=torch.float32, **eager))


def audio_model() -> nn.Module:
    """A tiny Qwen2-Audio, which itself puts a sound's states in the place of a single token."""
    torch.manual_seed(0)
    sizes = {"encoder_layers": 1, "encoder_attention_heads": 2, "encoder_ffn_dim": 48, "max_source_positions": 8}
    config = AutoConfig.for_model(
        "qwen2_audio",
        text_config=_text("qwen2"),
        audio_config={"d_model": 32, "num_mel_bins": 4, **sizes},
        audio_token_id=IMAGE_TOKEN,
        pad_token_id=0,
    )
    config.pad_token_id, config.ignore_index = 0, -100  # its code asks for both, its configuration has neither
    return randomise(Qwen2AudioForConditionalGeneration(config))


def audio_batch(side: str) -> dict[str, torch.Tensor]:
    """A padded batch of three rows; each has a sound of four states, and one token for it."""
    batch = make_batch(side=side)
    ids = batch["input_ids"]
    ids[ids == IMAGE_TOKEN] = 5
    ids[torch.arange(3), batch["attention_mask"].argmax(1)] = IMAGE_TOKEN
    sounds = torch.randn(3, 4, 16, generator=torch.Generator().manual_seed(0))
    return {**batch, "input_features": sounds, "feature_attention_mask": torch.ones(3, 16, dtype=torch.long)}


def vision_batch(name: str) -> dict[str, torch.Tensor]:
    """A padded batch whose first row begins with an image."""
    batch = make_batch()
    ids = batch["input_ids"]
    ids[ids >= VOCAB - 3] = 5
    batch["labels"][batch["labels"] >= VOCAB - 3] = 5
    ids[0, 0], ids[0, 1:5] = VOCAB - 2, IMAGE_TOKEN
    generator = torch.Generator().manual_seed(0)
    pixels = {key: torch.randn(shape, generator=generator) for key, shape in VISION[name][1].items()}
    images = ids == IMAGE_TOKEN
    if name == "gemma3":
        return {**batch, **pixels, "token_type_ids": images.long()}
    if name == "gemma4":
        places = torch.cartesian_prod(torch.arange(4), torch.arange(4)).flip(1)[None]  # x before y
        return {**batch, **pixels, "image_position_ids": places, "mm_token_type_ids": images.int()}
    grids = {"image_grid_thw": torch.tensor([[1, 4, 4]]), "mm_token_type_ids": images.int()}
    return {**batch, **pixels, **({} if name == "smolvlm" else grids)}
