"""Tiny checkpoints of every supported family, made and saved by `transformers`.

A recipe is a `config.json` in the spelling the family was published in, shrunk to a few thousand
parameters, with shapes that are legal but unusual (`head_dim != hidden_size / heads`, one and three
key/value heads, a prime vocabulary). `transformers` turns it into a model, the weights are drawn wide
enough that wrong maths moves the logits by far more than the tolerance, and `save_pretrained` writes
the folder (several shards, `config.json` in transformers' own newer spelling).

`Family.features` names what the recipe is there to test, as (config key -> other value) changes:
`test_families.py` checks on the transformers side that each change really moves the logits, so a
decoder that ignored the key could not pass the parity test.
"""

import copy
import dataclasses
import json
import re
import zlib
from pathlib import Path

import torch

VOCABULARY = 131  # prime: nothing rounds it up unnoticed

_BASE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 48,
    "intermediate_size": 72,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
    # Published values (1e-5, 1e-6) would be below the tolerance of a parity test: an ignored or
    # wrong eps must show, so every recipe has its own large one.
    "rms_norm_eps": 0.02,
}


@dataclasses.dataclass(frozen=True)
class Family:
    """One tiny checkpoint: `config` is its published-style config.json, `features` see the module text."""

    name: str
    config: dict
    features: dict[str, dict]

    def with_changes(self, changes: dict) -> dict:
        """The recipe with some keys replaced; a dict value is merged one level down (text_config)."""
        config = copy.deepcopy(self.config)
        for key, value in changes.items():
            if isinstance(value, dict) and isinstance(config.get(key), dict):
                config[key] = {**config[key], **copy.deepcopy(value)}
            else:
                config[key] = copy.deepcopy(value)
        return config

    @property
    def nested(self) -> bool:
        """A vision tower stands beside the decoder."""
        return "text_config" in self.config

    @property
    def text_config(self) -> dict:
        return self.config.get("text_config", self.config)


def _family(name: str, architecture: str, model_type: str, keys: dict, features: dict) -> Family:
    config = {**_BASE, **keys, "architectures": [architecture], "model_type": model_type}
    return Family(name, {k: v for k, v in config.items() if v is not _ABSENT}, features)


def _nested(name: str, architecture: str, text: dict, outer: dict, features: dict) -> Family:
    """A text model inside a multimodal file."""
    text = {k: v for k, v in (_BASE | text).items() if k not in ("tie_word_embeddings", "torch_dtype")}
    config = {"architectures": [architecture], "torch_dtype": "float32", "text_config": text, **outer}
    return Family(name, config, {feature: {"text_config": change} for feature, change in features.items()})


def _elder(name: str, architecture: str, model_type: str, keys: dict, features: dict) -> Family:
    """A family older than Llama, whose files share few keys with it."""
    shared = {"architectures": [architecture], "model_type": model_type, "vocab_size": VOCABULARY}
    shared |= {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "torch_dtype": "float32"}
    return Family(name, shared | keys, features)


_SIZES = {
    "hidden_size": 48,
    "intermediate_size": 84,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "max_position_embeddings": 512,
}
_GPT = {"n_embd": 48, "n_head": 6, "n_positions": 512, "layer_norm_epsilon": 0.02}
_OPT = {
    "hidden_size": 48,
    "ffn_dim": 84,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "max_position_embeddings": 512,
    "activation_function": "relu",
}
_NEOX = {"hidden_act": "gelu", "layer_norm_eps": 0.02, "classifier_dropout": 0.1}
_FALCON = {
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "max_position_embeddings": 512,
    "layer_norm_epsilon": 0.02,
    "alibi": False,
    "apply_residual_connection_post_layernorm": False,
}
_ARCEE_ROPE = {
    "rope_type": "yarn",
    "factor": 20.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "mscale": 1.0,
    "original_max_position_embeddings": 64,
}
_ABSENT = object()
_PIXTRAL = {
    "model_type": "mistral3",
    "image_token_index": 122,
    "spatial_merge_size": 2,
    "vision_config": {
        "model_type": "pixtral",
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "head_dim": 8,
        "image_size": 28,
        "patch_size": 14,
    },
}
_GRANITE = {
    "embedding_multiplier": 3.0,
    "residual_multiplier": 0.6,
    "attention_multiplier": 0.2,
    "logits_scaling": 1.7,
    "hidden_act": "silu",
}
_GRANITE_FEATURES = {
    "embedding": {"embedding_multiplier": 1.0},
    "residual": {"residual_multiplier": 1.0},
    "attention": {"attention_multiplier": 0.4},
    "logits": {"logits_scaling": 1.0},
}
_GRANITE4 = {
    "num_local_experts": 0,
    "num_experts_per_tok": 0,
    "intermediate_size": 72,
    "shared_intermediate_size": 60,
    "layer_types": ["full_attention"] * 2,
    "mamba_n_heads": 12,
}
_MINISTRAL3_ROPE = {
    "rope_type": "yarn",
    "rope_theta": 1000.0,
    "factor": 2.0,
    "original_max_position_embeddings": 256,
    "max_position_embeddings": 512,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
    "llama_4_scaling_beta": 0.1,
}
_LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
_LONGROPE_6 = {  # head_dim 12, all of it rotated: six frequencies
    "type": "longrope",
    "short_factor": [1.0, 1.1, 1.25, 1.5, 1.9, 2.2],
    "long_factor": [1.2, 1.9, 3.1, 4.5, 7.0, 11.0],
}
_LONGROPE_6_OF_8 = {**_LONGROPE_6, "short_factor": [1.0, 1.2, 1.3, 1.4, 1.6, 2.5]}
_GEMMA3_TEXT = {
    "hidden_activation": "gelu_pytorch_tanh",
    "num_hidden_layers": 4,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "query_pre_attn_scalar": 10,
    "rope_theta": 5000.0,
    "rope_local_base_freq": 50.0,
    "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
    "sliding_window": 9,
    "sliding_window_pattern": 3,
    "tie_word_embeddings": _ABSENT,
}
_GEMMA3_FEATURES = {
    "local base": {"rope_local_base_freq": 5000.0},
    "global base": {"rope_theta": 50.0},
    "linear scaling on the global base": {"rope_scaling": None},
    "window": {"sliding_window": 12},
    "pattern": {"sliding_window_pattern": 2},
    "query scale": {"query_pre_attn_scalar": 16},
    "eps": {"rms_norm_eps": 0.04},
}

_FAMILIES = [
    _family(
        "llama2",
        "LlamaForCausalLM",
        "llama",
        {"num_key_value_heads": 6, "head_dim": 10, "rope_theta": 100.0, "hidden_act": "silu"},
        {
            "base": {"rope_theta": 10000.0},
            "eps": {"rms_norm_eps": 0.04},
            "activation": {"hidden_act": "gelu"},
        },
    ),
    _family(
        "llama1",  # older than grouped-query attention: the file has no num_key_value_heads at all
        "LlamaForCausalLM",
        "llama",
        {"num_key_value_heads": _ABSENT, "max_sequence_length": 512, "hidden_act": "silu"},
        {"eps": {"rms_norm_eps": 0.04}},
    ),
    _family(
        "llama3",
        "LlamaForCausalLM",
        "llama",
        {
            "head_dim": 16,
            "num_key_value_heads": 3,
            "rope_theta": 1000.0,
            "rope_scaling": _LLAMA3,
            "hidden_act": "silu",
            "attention_bias": False,
            "mlp_bias": False,
        },
        {"scaling": {"rope_scaling": None}, "factor": {"rope_scaling": {"factor": 32.0}}},
    ),
    _family(
        "llama3.2",
        "LlamaForCausalLM",
        "llama",
        {
            "head_dim": 12,
            "rope_theta": 1000.0,
            "rope_scaling": {**_LLAMA3, "factor": 32.0},
            "hidden_act": "silu",
            "tie_word_embeddings": True,
        },
        {"factor": {"rope_scaling": {"factor": 8.0}}},
    ),
    _family(
        "llama-dynamic",  # NTK scaling grows the base with the text, beyond 64 positions here
        "LlamaForCausalLM",
        "llama",
        {
            "rope_theta": 100.0,
            "rope_scaling": {"type": "dynamic", "factor": 4.0},
            "max_position_embeddings": 64,
            "hidden_act": "silu",
        },
        {"base": {"rope_theta": 10000.0}},
    ),
    _family(
        "llama-yarn",
        "LlamaForCausalLM",
        "llama",
        {
            "rope_theta": 1000.0,
            "rope_scaling": {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 64},
            "hidden_act": "silu",
        },
        {"scaling": {"rope_scaling": None}, "factor": {"rope_scaling": {"factor": 2.0}}},
    ),
    _family(
        "llama-biased",  # attention_bias and mlp_bias put a bias on all seven projections
        "LlamaForCausalLM",
        "llama",
        {"attention_bias": True, "mlp_bias": True, "hidden_act": "silu"},
        {"eps": {"rms_norm_eps": 0.04}},
    ),
    _family(
        "tinyllama",
        "LlamaForCausalLM",
        "llama",
        {"num_attention_heads": 8, "num_key_value_heads": 1, "hidden_act": "silu", "pretraining_tp": 1},
        {"eps": {"rms_norm_eps": 0.04}},
    ),
    _family(
        "smollm2",
        "LlamaForCausalLM",
        "llama",
        {
            "hidden_size": 54,
            "num_attention_heads": 9,
            "num_key_value_heads": 3,
            "rope_theta": 300.0,
            "rope_interleaved": False,
            "is_llama_config": True,
            "tie_word_embeddings": True,
            "hidden_act": "silu",
        },
        {"base": {"rope_theta": 10000.0}},
    ),
    _family(
        "yi",
        "LlamaForCausalLM",
        "llama",
        {"rope_theta": 5000000.0, "hidden_act": "silu"},
        {"base": {"rope_theta": 10000.0}},
    ),
    _family(
        "mistral-v0.1",
        "MistralForCausalLM",
        "mistral",
        {
            "head_dim": 12,
            "num_key_value_heads": 3,
            "sliding_window": 9,
            "rope_theta": 100.0,
            "hidden_act": "silu",
        },
        {"window": {"sliding_window": 10}, "no window": {"sliding_window": None}},
    ),
    _family(
        "mistral-v0.3",
        "MistralForCausalLM",
        "mistral",
        {"sliding_window": None, "rope_theta": 1000000.0, "hidden_act": "silu"},
        {"no window": {"sliding_window": 9}},
    ),
    _family(
        "qwen2",
        "Qwen2ForCausalLM",
        "qwen2",
        {
            "rope_theta": 1000000.0,
            "sliding_window": 9,
            "use_sliding_window": False,
            "max_window_layers": 1,
            "tie_word_embeddings": True,
            "hidden_act": "silu",
        },
        {"window off": {"use_sliding_window": True}},
    ),
    _family(
        "qwen2-window",
        "Qwen2ForCausalLM",
        "qwen2",
        {
            "num_hidden_layers": 3,
            "rope_theta": 100.0,
            "sliding_window": 9,
            "use_sliding_window": True,
            "max_window_layers": 1,
            "hidden_act": "silu",
        },
        {"window": {"sliding_window": 11}, "layers": {"max_window_layers": 2}},
    ),
    _family(
        "qwen3",
        "Qwen3ForCausalLM",
        "qwen3",
        {
            "head_dim": 20,
            "num_key_value_heads": 3,
            "rope_theta": 1000000.0,
            "use_sliding_window": False,
            "sliding_window": None,
            "max_window_layers": 2,
            "attention_bias": False,
            "hidden_act": "silu",
        },
        {"eps": {"rms_norm_eps": 0.04}},
    ),
    _family(
        "gemma",
        "GemmaForCausalLM",
        "gemma",
        {"head_dim": 16, "num_key_value_heads": 1, "hidden_act": "gelu", "tie_word_embeddings": _ABSENT},
        {"eps": {"rms_norm_eps": 0.04}, "activation": {"hidden_act": "silu"}},
    ),
    _family(
        "gemma2",
        "Gemma2ForCausalLM",
        "gemma2",
        {
            "num_hidden_layers": 3,
            "head_dim": 12,
            "hidden_act": "gelu_pytorch_tanh",
            "hidden_activation": "gelu_pytorch_tanh",
            "sliding_window": 9,
            "query_pre_attn_scalar": 7,
            "attn_logit_softcapping": 5.0,
            "final_logit_softcapping": 3.0,
            "cache_implementation": "hybrid",
            "tie_word_embeddings": _ABSENT,
        },
        {
            "window": {"sliding_window": 10},
            "attention softcap": {"attn_logit_softcapping": None},
            "final softcap": {"final_logit_softcapping": None},
            "query scale": {"query_pre_attn_scalar": 12},
            "layer 0 slides": {"layer_types": ["full_attention", "sliding_attention", "full_attention"]},
        },
    ),
    _family("gemma3", "Gemma3ForCausalLM", "gemma3_text", _GEMMA3_TEXT, _GEMMA3_FEATURES),
    Family(
        "gemma3-nested",
        {
            "architectures": ["Gemma3ForConditionalGeneration"],
            "model_type": "gemma3",
            "eos_token_id": [2, 3],
            "torch_dtype": "float32",
            "boi_token_index": 120,
            "eoi_token_index": 121,
            "image_token_index": 122,
            "mm_tokens_per_image": 4,
            "text_config": {
                k: v for k, v in {**_BASE, **_GEMMA3_TEXT, "model_type": "gemma3_text"}.items() if v is not _ABSENT
            },
            "vision_config": {
                "model_type": "siglip_vision_model",
                "hidden_size": 16,
                "intermediate_size": 16,
                "num_hidden_layers": 1,
                "num_attention_heads": 2,
                "image_size": 28,
                "patch_size": 14,
                "vision_use_head": False,
            },
        },
        {name: {"text_config": change} for name, change in _GEMMA3_FEATURES.items()},
    ),
    _family(
        "phi3",
        "Phi3ForCausalLM",
        "phi3",
        {
            "num_attention_heads": 4,
            "num_key_value_heads": 4,
            "original_max_position_embeddings": 64,
            "rope_scaling": _LONGROPE_6,
            "rope_theta": 100.0,
            "sliding_window": 19,
            "hidden_act": "silu",
            "attention_bias": False,
            "embd_pdrop": 0.0,
            "resid_pdrop": 0.0,
        },
        {
            "longrope": {"rope_scaling": None},
            "attention factor": {"max_position_embeddings": 65},
            "short or long": {"original_max_position_embeddings": 16},
            "window": {"sliding_window": 21},
        },
    ),
    _family(
        "phi4-mini",
        "Phi3ForCausalLM",
        "phi3",
        {
            "hidden_size": 64,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "original_max_position_embeddings": 64,
            "partial_rotary_factor": 0.75,
            "rope_scaling": _LONGROPE_6_OF_8,
            "rope_theta": 100.0,
            "sliding_window": 600,
            "tie_word_embeddings": True,
            "hidden_act": "silu",
            "full_attn_mod": 1,
            "interpolate_factor": 1,
            "lm_head_bias": False,
            "mlp_bias": False,
        },
        {"attention factor": {"max_position_embeddings": 65}, "base": {"rope_theta": 10000.0}},
    ),
    _family(
        "olmo2",
        "Olmo2ForCausalLM",
        "olmo2",
        {"num_key_value_heads": 3, "head_dim": 12, "rope_theta": 500.0, "hidden_act": "silu"},
        {"base": {"rope_theta": 10000.0}, "eps": {"rms_norm_eps": 0.04}},
    ),
    _family(
        "ministral",
        "MinistralForCausalLM",
        "ministral",
        {
            "num_hidden_layers": 3,
            "head_dim": 12,
            "rope_theta": 100.0,
            "sliding_window": 9,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
            "hidden_act": "silu",
        },
        {"window": {"sliding_window": 11}, "layers": {"layer_types": ["full_attention"] * 3}},
    ),
    _family(
        "ministral3",  # queries grow with their position beyond 256; within it nothing shows
        "Ministral3ForCausalLM",
        "ministral3",
        {"head_dim": 12, "rope_parameters": _MINISTRAL3_ROPE, "hidden_act": "silu", "tie_word_embeddings": True},
        {"factor": {"rope_parameters": {"factor": 8.0}}, "beta": {"rope_parameters": {"beta_slow": 6.0}}},
    ),
    _nested(
        "mistral3",
        "Mistral3ForConditionalGeneration",
        {"model_type": "mistral", "head_dim": 12, "rope_theta": 1000.0, "sliding_window": None, "hidden_act": "silu"},
        _PIXTRAL | {"tie_word_embeddings": False},
        {"base": {"rope_theta": 100.0}},
    ),
    _nested(
        "mistral3-tied",  # and with the newer text model; the outer config says that the head is tied
        "Mistral3ForConditionalGeneration",
        {"model_type": "ministral3", "head_dim": 12, "rope_parameters": _MINISTRAL3_ROPE, "hidden_act": "silu"},
        _PIXTRAL | {"tie_word_embeddings": True},
        {"factor": {"rope_parameters": _MINISTRAL3_ROPE | {"factor": 8.0}}},
    ),
    _nested(
        "qwen3-vl",
        "Qwen3VLForConditionalGeneration",
        {
            "model_type": "qwen3_vl_text",
            "head_dim": 20,
            "num_key_value_heads": 3,
            "rope_theta": 1000.0,
            "rope_scaling": {"mrope_interleaved": True, "mrope_section": [4, 3, 3], "rope_type": "default"},
            "hidden_act": "silu",
            "attention_bias": True,
        },
        {
            "model_type": "qwen3_vl",
            "tie_word_embeddings": True,
            "image_token_id": 124,
            "video_token_id": 125,
            "vision_start_token_id": 126,
            "vision_end_token_id": 127,
            "vision_config": {
                "model_type": "qwen3_vl",
                "depth": 1,
                "hidden_size": 16,
                "intermediate_size": 16,
                "num_heads": 2,
                "out_hidden_size": 48,
                "num_position_embeddings": 4,
                "deepstack_visual_indexes": [0],
            },
        },
        {"base": {"rope_theta": 100.0}},
    ),
    _family(
        "olmo3",
        "Olmo3ForCausalLM",
        "olmo3",
        {
            "num_hidden_layers": 4,
            "num_key_value_heads": 3,
            "rope_theta": 500000.0,  # of both kinds of layer, whatever the older spelling says of one
            "rope_scaling": {
                "rope_type": "yarn",
                "factor": 8.0,
                "original_max_position_embeddings": 64,
                "attention_factor": 1.2,
                "beta_fast": 32.0,
                "beta_slow": 1.0,
            },
            "sliding_window": 9,
            "hidden_act": "silu",
        },
        {
            "scaling": {"rope_scaling": {"factor": 2.0}},
            "window": {"sliding_window": 11},
            "layers": {"layer_types": ["sliding_attention"] * 4},
        },
    ),
    _family(
        "seed_oss",  # as published: biases on q, k and v only
        "SeedOssForCausalLM",
        "seed_oss",
        {"head_dim": 12, "attention_bias": True, "attention_out_bias": False, "mlp_bias": False, "hidden_act": "silu"}
        | {"rope_theta": 1000.0, "rope_scaling": {"rope_type": "default"}, "residual_dropout": 0.1},
        {"base": {"rope_theta": 100.0}},
    ),
    _family(
        "seed_oss-biased",
        "SeedOssForCausalLM",
        "seed_oss",
        {"head_dim": 12, "attention_bias": False, "attention_out_bias": True, "mlp_bias": True, "hidden_act": "silu"},
        {"eps": {"rms_norm_eps": 0.04}},
    ),
    _family(
        "cwm",
        "CwmForCausalLM",
        "cwm",
        {
            "num_hidden_layers": 4,
            "head_dim": 12,
            "rope_theta": 1000.0,
            "rope_scaling": _LLAMA3,
            "sliding_window": 9,
            "layer_types": ["full_attention", "sliding_attention", "sliding_attention", "sliding_attention"],
            "hidden_act": "silu",
        },
        {"window": {"sliding_window": 11}, "scaling": {"rope_scaling": {"factor": 32.0}}},
    ),
    _family(
        "smollm3",
        "SmolLM3ForCausalLM",
        "smollm3",
        {
            "num_hidden_layers": 4,
            "rope_theta": 300.0,
            "no_rope_layers": [1, 0, 1, 1],
            "use_sliding_window": False,
            "sliding_window": None,
            "tie_word_embeddings": True,
            "hidden_act": "silu",
            "mlp_bias": False,
            "attention_bias": False,
        },
        {"all rotate": {"no_rope_layers": [1] * 4}, "another": {"no_rope_layers": [0, 1, 1, 1]}},
    ),
    _family(
        "smollm3-interval",
        "SmolLM3ForCausalLM",
        "smollm3",
        {"no_rope_layer_interval": 2, "rope_theta": 300.0, "attention_bias": True, "mlp_bias": True},
        {"interval": {"no_rope_layer_interval": 3}},
    ),
    _family(
        "exaone4",
        "Exaone4ForCausalLM",
        "exaone4",
        {
            "num_hidden_layers": 4,
            "head_dim": 12,
            "rope_theta": 1000.0,
            "rope_scaling": _LLAMA3 | {"factor": 16.0},
            "sliding_window": 9,
            "sliding_window_pattern": 3,
            "hidden_act": "silu",
        },
        {
            "window": {"sliding_window": 11},
            "pattern": {"sliding_window_pattern": 2},
            "base": {"rope_theta": 100.0},
            "full layers do not rotate": {"sliding_window": None, "layer_types": ["full_attention"] * 4},
        },
    ),
    _family(
        "exaone4-full",  # without any window all layers rotate
        "Exaone4ForCausalLM",
        "exaone4",
        {
            "rope_theta": 1000.0,
            "sliding_window": None,
            "sliding_window_pattern": None,
            "layer_types": ["full_attention"] * 2,
            "tie_word_embeddings": True,
            "hidden_act": "silu",
        },
        {"base": {"rope_theta": 100.0}},
    ),
    _family(
        "granite",
        "GraniteForCausalLM",
        "granite",
        _GRANITE | {"rope_theta": 1000.0, "tie_word_embeddings": True, "attention_bias": False, "mlp_bias": False},
        _GRANITE_FEATURES,
    ),
    _family(
        "granite-biased",
        "GraniteForCausalLM",
        "granite",
        {"rope_theta": 1000.0, "attention_multiplier": 0.4, "attention_bias": True, "mlp_bias": True},
        {"attention": {"attention_multiplier": 0.2}},
    ),
    _family(
        "granite4",  # dense: no experts, no recurrent layers
        "GraniteMoeHybridForCausalLM",
        "granitemoehybrid",
        _GRANITE | _GRANITE4 | {"position_embedding_type": "rope", "rope_theta": 1000.0, "tie_word_embeddings": True},
        _GRANITE_FEATURES | {"rope": {"position_embedding_type": None}},
    ),
    _family(
        "granite4-nope",
        "GraniteMoeHybridForCausalLM",
        "granitemoehybrid",
        _GRANITE | _GRANITE4 | {"position_embedding_type": "nope"},
        {"rope": {"position_embedding_type": "rope"}},
    ),
    _family(
        "glm",
        "GlmForCausalLM",
        "glm",
        {"head_dim": 12, "partial_rotary_factor": 0.5, "rope_theta": 100.0, "attention_bias": True},
        {"base": {"rope_theta": 1000.0}, "partial": {"partial_rotary_factor": 1.0}},
    ),
    _family(
        "glm4",
        "Glm4ForCausalLM",
        "glm4",
        {"head_dim": 12, "partial_rotary_factor": 0.5, "rope_theta": 100.0, "attention_bias": True},
        {"base": {"rope_theta": 1000.0}, "eps": {"rms_norm_eps": 0.04}},
    ),
    _family(
        "glm4-unbiased",
        "Glm4ForCausalLM",
        "glm4",
        {"head_dim": 16, "partial_rotary_factor": 1.0, "attention_bias": False, "tie_word_embeddings": True},
        {"partial": {"partial_rotary_factor": 0.5}},
    ),
    _family(
        "ernie4_5",
        "Ernie4_5ForCausalLM",
        "ernie4_5",
        {"head_dim": 12, "rope_theta": 100.0, "use_bias": False, "tie_word_embeddings": True, "hidden_act": "silu"},
        {"base": {"rope_theta": 1000.0}},
    ),
    _family(
        "ernie4_5-biased",
        "Ernie4_5ForCausalLM",
        "ernie4_5",
        {"head_dim": 12, "rope_theta": 100.0, "use_bias": True, "hidden_act": "silu"},
        {"base": {"rope_theta": 1000.0}},
    ),
    _family(
        "helium",
        "HeliumForCausalLM",
        "helium",
        {"head_dim": 8, "num_key_value_heads": 6, "rope_theta": 100.0, "attention_bias": False, "mlp_bias": False},
        {"base": {"rope_theta": 1000.0}},
    ),
    _family(
        "helium-biased",
        "HeliumForCausalLM",
        "helium",
        {"head_dim": 8, "rope_theta": 100.0, "attention_bias": True, "mlp_bias": True},
        {"base": {"rope_theta": 1000.0}},
    ),
    _family(
        "arcee",
        "ArceeForCausalLM",
        "arcee",
        {"head_dim": 12, "hidden_act": "relu2", "rope_theta": 100.0, "rope_scaling": _ARCEE_ROPE},
        {"activation": {"hidden_act": "relu"}, "scaling": {"rope_scaling": None}},
    ),
    _family(
        "arcee-biased",
        "ArceeForCausalLM",
        "arcee",
        {"hidden_act": "relu2", "attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True},
        {"eps": {"rms_norm_eps": 0.04}},
    ),
    _elder(
        "starcoder2",
        "Starcoder2ForCausalLM",
        "starcoder2",
        _SIZES
        | {"num_key_value_heads": 2, "hidden_act": "gelu_pytorch_tanh", "norm_epsilon": 0.02}
        | {"use_bias": True, "rope_theta": 100.0, "sliding_window": 9, "activation_function": "gelu"},
        {"window": {"sliding_window": 11}, "eps": {"norm_epsilon": 0.2}, "activation": {"hidden_act": "silu"}},
    ),
    _elder(
        "starcoder2-unbiased",
        "Starcoder2ForCausalLM",
        "starcoder2",
        _SIZES
        | {"num_key_value_heads": 3, "hidden_act": "gelu", "norm_epsilon": 0.02, "use_bias": False}
        | {"tie_word_embeddings": False, "sliding_window": None},
        {"gelu is not tanh": {"hidden_act": "relu"}},
    ),
    _elder(
        "gpt2",
        "GPT2LMHeadModel",
        "gpt2",
        _GPT | {"n_layer": 2, "n_inner": None, "activation_function": "gelu_new", "n_ctx": 512},
        {
            "eps": {"layer_norm_epsilon": 0.2},
            "activation": {"activation_function": "relu"},
            "not scaled": {"scale_attn_weights": False},
            "scaled by layer": {"scale_attn_by_inverse_layer_idx": True},
        },
    ),
    _elder(
        "gpt2-untied",
        "GPT2LMHeadModel",
        "gpt2",
        _GPT | {"n_layer": 3, "n_inner": 84, "activation_function": "relu", "tie_word_embeddings": False},
        {"activation": {"activation_function": "gelu"}},
    ),
    _elder(
        "gpt_bigcode",  # StarCoder and OctoCoder: one key/value head
        "GPTBigCodeForCausalLM",
        "gpt_bigcode",
        _GPT | {"n_layer": 2, "n_inner": 84, "activation_function": "gelu", "multi_query": True},
        {"eps": {"layer_norm_epsilon": 0.2}, "activation": {"activation_function": "relu"}},
    ),
    _elder(
        "gpt_bigcode-heads",
        "GPTBigCodeForCausalLM",
        "gpt_bigcode",
        _GPT | {"n_layer": 2, "activation_function": "gelu_pytorch_tanh", "multi_query": False},
        {"eps": {"layer_norm_epsilon": 0.2}},
    ),
    _elder(
        "opt",
        "OPTForCausalLM",
        "opt",
        _OPT | {"enable_bias": True, "do_layer_norm_before": True, "prefix": "</s>", "word_embed_proj_dim": 48},
        {"activation": {"activation_function": "gelu"}, "order": {"do_layer_norm_before": False}},
    ),
    _elder(
        "opt-unbiased",
        "OPTForCausalLM",
        "opt",
        _OPT | {"enable_bias": False, "tie_word_embeddings": False},
        {"activation": {"activation_function": "gelu"}},
    ),
    _elder(
        "gpt_neox",  # Pythia
        "GPTNeoXForCausalLM",
        "gpt_neox",
        _SIZES | _NEOX | {"use_parallel_residual": True, "rotary_pct": 0.5, "rotary_emb_base": 100},
        {
            "parallel": {"use_parallel_residual": False},
            "rotary": {"rotary_pct": 1.0},
            "base": {"rotary_emb_base": 1000},
            "eps": {"layer_norm_eps": 0.2},
        },
    ),
    _elder(
        "gpt_neox-behind",
        "GPTNeoXForCausalLM",
        "gpt_neox",
        _SIZES
        | _NEOX
        | {"use_parallel_residual": False, "rotary_pct": 0.25, "attention_bias": False}
        | {"tie_word_embeddings": True},
        {"parallel": {"use_parallel_residual": True}, "gelu is not tanh": {"hidden_act": "relu"}},
    ),
    _elder(
        "falcon-7b",  # one key/value head, one norm, no bias
        "FalconForCausalLM",
        "falcon",
        _FALCON | {"multi_query": True, "parallel_attn": True, "bias": False, "new_decoder_architecture": False},
        {"eps": {"layer_norm_epsilon": 0.2}},
    ),
    _elder(
        "falcon-40b",
        "FalconForCausalLM",
        "falcon",
        _FALCON | {"new_decoder_architecture": True, "num_kv_heads": 2, "multi_query": True, "bias": True},
        {"eps": {"layer_norm_epsilon": 0.2}},
    ),
    _elder(
        "falcon-11b",
        "FalconForCausalLM",
        "falcon",
        _FALCON
        | {"new_decoder_architecture": True, "num_kv_heads": 3, "num_ln_in_parallel_attn": 1}
        | {"ffn_hidden_size": 84, "rope_theta": 500.0, "tie_word_embeddings": False},
        {"base": {"rope_theta": 100.0}},
    ),
    _elder(
        "falcon-behind",
        "FalconForCausalLM",
        "falcon",
        _FALCON | {"multi_query": False, "parallel_attn": False, "bias": True},
        {"eps": {"layer_norm_epsilon": 0.2}},
    ),
    _elder(
        "phi",
        "PhiForCausalLM",
        "phi",
        _SIZES
        | {"hidden_act": "gelu_new", "partial_rotary_factor": 0.5, "rope_theta": 100.0, "layer_norm_eps": 0.02}
        | {"num_key_value_heads": None, "qk_layernorm": False, "tie_word_embeddings": False},
        {"rotary": {"partial_rotary_factor": 1.0}, "base": {"rope_theta": 1000.0}},
    ),
    _elder(
        "phi-grouped",
        "PhiForCausalLM",
        "phi",
        _SIZES | {"hidden_act": "gelu", "partial_rotary_factor": 1.0, "layer_norm_eps": 0.02, "num_key_value_heads": 2},
        {"eps": {"layer_norm_eps": 0.2}},
    ),
    _elder(
        "stablelm",
        "StableLmForCausalLM",
        "stablelm",
        _SIZES
        | {"num_key_value_heads": 6, "partial_rotary_factor": 0.25, "rope_theta": 100.0, "layer_norm_eps": 0.02}
        | {"use_qkv_bias": True, "hidden_act": "silu"},
        {"parallel": {"use_parallel_residual": True}, "rotary": {"partial_rotary_factor": 0.75}},
    ),
    _elder(
        "stablelm-parallel",
        "StableLmForCausalLM",
        "stablelm",
        _SIZES
        | {"num_key_value_heads": 3, "layer_norm_eps": 0.02, "use_parallel_residual": True}
        | {"use_qkv_bias": False, "tie_word_embeddings": True},
        {"parallel": {"use_parallel_residual": False}},
    ),
    _elder(
        "cohere",
        "CohereForCausalLM",
        "cohere",
        _SIZES
        | {"logit_scale": 0.3, "rope_theta": 100.0, "layer_norm_eps": 0.02, "use_qk_norm": False}
        | {"num_key_value_heads": 6},
        {"logits": {"logit_scale": 1.0}, "base": {"rope_theta": 1000.0}},
    ),
    _elder(
        "cohere2",
        "Cohere2ForCausalLM",
        "cohere2",
        _SIZES
        | {"logit_scale": 0.3, "rope_theta": 100.0, "layer_norm_eps": 0.02, "sliding_window": 9}
        | {"num_key_value_heads": 2, "num_hidden_layers": 4, "sliding_window_pattern": 3},
        {
            "logits": {"logit_scale": 1.0},
            "base": {"rope_theta": 1000.0},
            "window": {"sliding_window": 11},
            "pattern": {"sliding_window_pattern": 2},
        },
    ),
    _elder(
        "cohere2-biased",
        "Cohere2ForCausalLM",
        "cohere2",
        _SIZES
        | {"attention_bias": True, "sliding_window": 12, "tie_word_embeddings": False, "layer_norm_eps": 0.02}
        | {"logit_scale": 1.5},
        {"logits": {"logit_scale": 1.0}},
    ),
    _elder(
        "nemotron",
        "NemotronForCausalLM",
        "nemotron",
        _SIZES
        | {"num_key_value_heads": 2, "partial_rotary_factor": 0.5, "norm_eps": 0.02, "rope_theta": 100.0}
        | {"hidden_act": "relu2", "head_dim": 12},
        {"eps": {"norm_eps": 0.2}, "rotary": {"partial_rotary_factor": 1.0}},
    ),
    _elder(
        "nemotron-biased",
        "NemotronForCausalLM",
        "nemotron",
        _SIZES
        | {"num_key_value_heads": 6, "norm_eps": 0.02, "attention_bias": True, "mlp_bias": True}
        | {"hidden_act": "relu2", "tie_word_embeddings": True},
        {"activation": {"hidden_act": "relu"}},
    ),
    _elder(
        "bloom",
        "BloomForCausalLM",
        "bloom",
        {"hidden_size": 48, "n_layer": 2, "n_head": 4, "layer_norm_epsilon": 0.02, "seq_length": 512}
        | {"apply_residual_connection_post_layernorm": False, "n_inner": None, "offset_alibi": 100},
        {
            "eps": {"layer_norm_epsilon": 0.2},
            "order": {"apply_residual_connection_post_layernorm": True},
            "slopes": {"n_head": 8},
        },
    ),
    _elder(
        "bloom-heads",  # in no power of two, and the head apart
        "BloomForCausalLM",
        "bloom",
        {"n_embed": 48, "n_layer": 2, "n_head": 6, "layer_norm_epsilon": 0.02, "tie_word_embeddings": False},
        {"slopes": {"n_head": 4}},
    ),
    _elder(
        "mpt",
        "MptForCausalLM",
        "mpt",
        {"d_model": 48, "n_layers": 2, "n_heads": 6, "max_seq_len": 512, "expansion_ratio": 4, "no_bias": True}
        | {"layer_norm_epsilon": 0.02, "attn_config": {"alibi": True, "alibi_bias_max": 8, "clip_qkv": None}},
        {
            "clipping": {"attn_config": {"clip_qkv": 0.5}},
            "scale": {"attn_config": {"softmax_scale": 0.1}},
            "eps": {"layer_norm_epsilon": 0.2},
        },
    ),
    _elder(
        "mpt-untied",
        "MptForCausalLM",
        "mpt",
        {"d_model": 48, "n_layers": 2, "n_heads": 4, "max_seq_len": 512, "tie_word_embeddings": False}
        | {"layer_norm_epsilon": 0.02, "attn_config": {"attn_impl": "torch"}},
        {"slopes": {"n_heads": 8}},
    ),
    _elder(
        "falcon-rw",  # slopes and positions that transformers' bfloat16 holds exactly
        "FalconForCausalLM",
        "falcon",
        _FALCON | {"alibi": True, "num_attention_heads": 4, "multi_query": False, "parallel_attn": False, "bias": True},
        {"alibi": {"alibi": False}},
    ),
]
FAMILIES = {family.name: family for family in _FAMILIES}
WINDOWED = [n for n, f in FAMILIES.items() if (f.text_config.get("sliding_window") or 600) < 40 and n != "qwen2"]


def reference_config(config: dict):
    """What `transformers` understands from a config.json dict: an instance of its own config class."""
    from transformers import AutoConfig

    config = copy.deepcopy(config)
    return AutoConfig.for_model(config.pop("model_type"), **config)


def _attention(config: dict) -> str:
    """Written out; but Falcon's, written out, adds ALiBi in the mask and again to the scores (transformers 5.23)."""
    return "sdpa" if config["model_type"] == "falcon" and config.get("alibi") else "eager"


def _model_class(config):
    import transformers

    return getattr(transformers, config.architectures[0])


def _draw_weights(model: torch.nn.Module, seed: int) -> None:
    """Wide random weights: attention far from uniform, norm weights and biases far from 1 and 0.

    Matrices get std 1.4 / sqrt(fan_in), so activations keep their size and attention scores have a
    standard deviation of about 2; norm weights are spread around their neutral value, and a decoder
    that forgets one, or takes `w` for `1 + w`, is far off.
    """
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        with torch.no_grad():
            if parameter.dim() == 1 and re.search(r"norm|\.ln_", name):
                parameter.copy_(parameter + 0.3 * noise)
            elif parameter.dim() == 1:
                parameter.copy_(0.5 * noise)
            elif re.search(r"embed|wte|wpe", name):
                parameter.copy_(0.4 * noise)
            else:
                parameter.copy_(1.4 / parameter.shape[-1] ** 0.5 * noise)


def make_model(config: dict, seed: int):
    """A `transformers` model of this config.json dict with our wide random weights, fp32, eager."""
    config = reference_config(config)
    model = _model_class(config)._from_config(
        config, dtype=torch.float32, attn_implementation=_attention(config.to_dict())
    )
    _draw_weights(model, seed)
    return model.eval()


def seed_of(name: str) -> int:
    """A seed that stays the same between runs and machines (unlike `hash`)."""
    return zlib.crc32(name.encode())


def save_checkpoint(folder: Path, config: dict, seed: int, max_shard_size: str = "20KB") -> Path:
    """Make a model and let `transformers` save it (several shards at this size, never pickle)."""
    make_model(config, seed).save_pretrained(folder, max_shard_size=max_shard_size)
    assert (folder / "config.json").exists()
    return folder


def load_reference(folder: Path):
    """The saved checkpoint as `transformers` loads it: the oracle of every parity test."""
    config = json.loads((folder / "config.json").read_text())
    import transformers

    model_class = getattr(transformers, config["architectures"][0])
    return model_class.from_pretrained(folder, dtype=torch.float32, attn_implementation=_attention(config)).eval()


def prompt_ids(length: int, seed: int = 0, vocabulary: int = VOCABULARY) -> list[int]:
    """Random token ids that avoid the special ones (0 to 3)."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(4, vocabulary, (length,), generator=generator).tolist()


@torch.no_grad()
def reference_logits(model, ids: list[int], steps: list[int] = ()) -> torch.Tensor:
    """Logits [len(ids) + len(steps), V] of a prompt, then of single tokens through its dynamic cache."""
    from transformers import DynamicCache

    cache = DynamicCache(config=model.config)
    logits = [model(torch.tensor([ids]), past_key_values=cache, use_cache=True).logits[0]]
    for token in steps:
        logits.append(model(torch.tensor([[token]]), past_key_values=cache, use_cache=True).logits[0])
    return torch.cat(logits)


@torch.no_grad()
def reference_greedy(model, ids: list[int], max_new_tokens: int) -> list[int]:
    """Greedy continuation of one prompt, alone, through transformers' dynamic cache; never stops early."""
    from transformers import DynamicCache

    cache, new, step = DynamicCache(config=model.config), [], ids
    for _ in range(max_new_tokens):
        logits = model(torch.tensor([step]), past_key_values=cache, use_cache=True).logits
        new.append(int(logits[0, -1].argmax()))
        step = new[-1:]
    return new
