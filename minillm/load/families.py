"""The supported families, a row each: how a `model_type` differs from plain Llama.

Adding a family that needs no new arithmetic means adding a row here. `config_json.py` combines the row with
what the checkpoint's `config.json` says; nothing else in the package knows a family by name.
"""

from dataclasses import dataclass, field, replace
from typing import Any


@dataclass(frozen=True)
class Family:
    """One supported `model_type`: the deltas from plain Llama, and what its files may leave out."""

    defaults: dict[str, Any] = field(default_factory=dict)
    windows: str = "none"  # none | all | from_layer (Qwen) | pattern (Gemma)
    norm_offset: float = 0.0
    norm_in_fp32: bool = False
    pre_norm: bool = True
    post_norm: bool = False
    qk_norm: str | None = None
    bias_keys: bool = False  # obeys attention_bias in the file
    mlp_bias_key: bool = False  # and mlp_bias
    qkv_bias: bool = False
    scaled_embedding: bool = False
    gelu_means_tanh: bool = False
    local_rope: bool = False  # sliding layers have a rotary table of their own
    softcaps: bool = False
    fused: bool = False


_OLMO2 = dict(rms_norm_eps=1e-5, max_position_embeddings=2048)
_PHI3 = dict(rms_norm_eps=1e-5, max_position_embeddings=4096, original_max_position_embeddings=4096)
_QWEN = dict(max_position_embeddings=32768, sliding_window=4096, max_window_layers=28)
_GEMMA = Family(
    dict(head_dim=256, tie_word_embeddings=True, max_position_embeddings=8192, hidden_act="gelu_pytorch_tanh"),
    norm_offset=1.0,
    norm_in_fp32=True,
    bias_keys=True,
    scaled_embedding=True,
    gelu_means_tanh=True,
)
_GEMMA2 = replace(
    _GEMMA,
    defaults=_GEMMA.defaults
    | dict(query_pre_attn_scalar=256, sliding_window=4096, sliding_window_pattern=2)
    | dict(attn_logit_softcapping=50.0, final_logit_softcapping=30.0),
    windows="pattern",
    post_norm=True,
    softcaps=True,
)
_GEMMA3 = replace(
    _GEMMA2,
    # The larger checkpoints nest a text_config that lists only what differs from these.
    defaults=_GEMMA2.defaults
    | dict(vocab_size=262208, hidden_size=2304, intermediate_size=9216, num_hidden_layers=26)
    | dict(num_attention_heads=8, num_key_value_heads=4, max_position_embeddings=131072, rope_theta=1e6)
    | dict(sliding_window_pattern=6, attn_logit_softcapping=None, final_logit_softcapping=None),
    qk_norm="head",
    local_rope=True,
)

FAMILIES: dict[str, Family] = {
    # Llama 1-3.3, TinyLlama, SmolLM2 and Yi all call themselves "llama".
    "llama": Family(dict(max_position_embeddings=2048), bias_keys=True, mlp_bias_key=True),
    "mistral": Family(dict(sliding_window=4096, num_key_value_heads=8, max_position_embeddings=131072), windows="all"),
    "qwen2": Family(_QWEN, windows="from_layer", qkv_bias=True),
    "qwen3": Family(_QWEN | dict(head_dim=128), windows="from_layer", qk_norm="head", bias_keys=True),
    "gemma": _GEMMA,
    "gemma2": _GEMMA2,
    "gemma3_text": _GEMMA3,
    "phi3": Family(_PHI3, windows="all", fused=True),
    "olmo2": Family(_OLMO2, norm_in_fp32=True, pre_norm=False, post_norm=True, qk_norm="full", bias_keys=True),
}

# Keys that never change a forward pass. Anything else unread is an error (or, with strict=False, let by).
HARMLESS = frozenset(
    """
    architectures model_type transformers_version _name_or_path auto_map use_cache cache_implementation
    initializer_range attention_dropout hidden_dropout resid_pdrop embd_pdrop pretraining_tp
    pad_token_id sep_token_id decoder_start_token_id output_attentions output_hidden_states return_dict
    chunk_size_feed_forward is_encoder_decoder is_decoder id2label label2id problem_type torchscript
    attn_implementation _attn_implementation _attn_implementation_autoset max_sequence_length is_llama_config
    transformers.js_config unsloth_fixed unsloth_version torch_dtype
    """.split()
)

# Keys that would change a forward pass, but that this decoder computes only at the value given here
# (where a family has no use for them: attention_bias, say, is obeyed for Llama and must be false for Mistral).
NEUTRAL: dict[str, Any] = {
    "attention_bias": False,
    "mlp_bias": False,
    "lm_head_bias": False,
    "rope_interleaved": False,  # true: pairs of neighbouring channels rotate
    "use_bidirectional_attention": False,
    "attn_logit_softcapping": None,
    "final_logit_softcapping": None,
    "use_sliding_window": False,
    "use_mrope": False,  # multimodal positions
    "full_attn_mod": 1,  # Phi-4-mini's files
    "interpolate_factor": 1,
}
