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
    spelled: dict[str, str] = field(default_factory=dict)  # a key as it is called here -> as these files call it
    names: dict[str, str] = field(default_factory=dict)  # of tensors, where they are not Llama's; see `tensors.py`
    separate_names: dict[str, str] = field(default_factory=dict)  # other names, where parallel blocks have two norms
    ignored: str = ""  # keys of these files that mean something elsewhere and nothing here
    interleaved: bool = False  # neighbouring channels rotate together
    grouped: bool = False  # q, k and v are one matrix, in which each key head follows the queries that share it
    transposed: bool = False  # matrices are [inputs, outputs]
    position_rows: int = 0  # rows of the table of positions that come before position 0
    windows: str = "none"  # none | all | from_layer (Qwen) | pattern (Gemma) | listed (in `layer_types` only)
    norm_offset: float = 0.0
    norm_in_fp32: bool = False
    layer_norm: bool = False  # in place of RMSNorm
    norm_bias: bool = False
    pre_norm: bool = True
    post_norm: bool = False
    parallel: str | None = (
        None  # "shared" or "separate" norms, or "stated" (Falcon), unless the key `parallel` is false
    )
    qk_norm: str | None = None
    # A bias on all of them, on none, or as the flag of this name in the file says.
    qkv_bias: bool | str = False
    output_bias: bool | str = False
    mlp_bias: bool | str = False
    gated: bool = True
    head_bias: bool = False
    learned_positions: bool = False
    scaled_embedding: bool = False
    multipliers: bool = False  # Granite: on embeddings, scores, what is added to the stream, and logits
    gelu_means_tanh: bool = False
    local_rope: bool = False  # sliding layers have a rotary table of their own
    rotates: str = (
        "all"  # all layers | none | sliding | listed (`no_rope_layers`) | windowed (if there are windows) | stated
    )
    softcaps: bool = False


_ATTENTION_BIAS = dict(qkv_bias="attention_bias", output_bias="attention_bias")
# Before Llama: LayerNorm with biases, no gate, a head that reads the embedding.
_ELDER = Family(dict(tie_word_embeddings=True, rms_norm_eps=1e-5), layer_norm=True, norm_bias=True, gated=False)
_ALL_BIASES = dict(qkv_bias=True, output_bias=True, mlp_bias=True)
_GPT2 = replace(
    _ELDER,
    defaults=_ELDER.defaults | dict(hidden_act="gelu_new"),
    spelled={
        "hidden_size": "n_embd",
        "num_hidden_layers": "n_layer",
        "num_attention_heads": "n_head",
        "intermediate_size": "n_inner",
        "max_position_embeddings": "n_positions",
        "hidden_act": "activation_function",
        "rms_norm_eps": "layer_norm_epsilon",
    },
    names={
        "embedding": "transformer.wte",
        "positions": "transformer.wpe",
        "norm": "transformer.ln_f",
        "blocks.": "transformer.h.",
        "attention_norm": "ln_1",
        "attention.qkv": "attn.c_attn",
        "attention.output": "attn.c_proj",
        "mlp_norm": "ln_2",
        "mlp.up": "mlp.c_fc",
        "mlp.down": "mlp.c_proj",
    },
    learned_positions=True,
    rotates="none",
    **_ALL_BIASES,
)
_MEGATRON = {
    "attention.qkv": "self_attention.query_key_value",
    "attention.output": "self_attention.dense",
    "mlp.up": "mlp.dense_h_to_4h",
    "mlp.down": "mlp.dense_4h_to_h",
}
_FALCON = replace(
    _ELDER,
    defaults=_ELDER.defaults | dict(hidden_act="gelu", multi_query=True, max_position_embeddings=2048),
    spelled={
        "intermediate_size": "ffn_hidden_size",
        "num_key_value_heads": "num_kv_heads",
        "hidden_act": "activation",
        "rms_norm_eps": "layer_norm_epsilon",
        "parallel": "parallel_attn",
    },
    names=_MEGATRON
    | {"embedding": "transformer.word_embeddings", "norm": "transformer.ln_f", "blocks.": "transformer.h."},
    separate_names={"attention_norm": "ln_attn", "mlp_norm": "ln_mlp"},
    grouped=True,
    parallel="stated",
    qkv_bias="bias",
    output_bias="bias",
    mlp_bias="bias",
)
_COHERE = Family(
    dict(tie_word_embeddings=True, rms_norm_eps=1e-5, rope_theta=5e5, logit_scale=0.0625),
    spelled={"rms_norm_eps": "layer_norm_eps"},
    ignored="position_embedding_type rotary_pct use_embedding_sharing use_gated_activation use_parallel_block "
    "use_parallel_embedding layer_switch order_of_interleaved_layers",
    layer_norm=True,
    parallel="shared",
    interleaved=True,
    **_ATTENTION_BIAS,
)
_FUSED_MLP = {"mlp.gate_up": "mlp.gate_up_proj"}
_POST_NORMS = {
    "attention_post_norm": "post_attention_layernorm",  # elsewhere the name of the norm before the MLP
    "mlp_norm": "pre_feedforward_layernorm",
    "mlp_post_norm": "post_feedforward_layernorm",
}
_MISTRAL = Family(dict(sliding_window=4096, num_key_value_heads=8, max_position_embeddings=131072), windows="all")
_OLMO2 = Family(
    dict(rms_norm_eps=1e-5, max_position_embeddings=2048),
    norm_in_fp32=True,
    pre_norm=False,
    post_norm=True,
    names=_POST_NORMS,
    qk_norm="full",
    **_ATTENTION_BIAS,
)
_GRANITE = Family(mlp_bias="mlp_bias", multipliers=True, **_ATTENTION_BIAS)
_GLM = Family(
    dict(head_dim=128, num_key_value_heads=2, partial_rotary_factor=0.5, attention_bias=True, rms_norm_eps=1.5625e-7),
    qkv_bias="attention_bias",
    names=_FUSED_MLP,
    interleaved=True,
)
_PHI3 = dict(rms_norm_eps=1e-5, max_position_embeddings=4096, original_max_position_embeddings=4096)
_QWEN = dict(max_position_embeddings=32768, sliding_window=4096, max_window_layers=28)
_QWEN3 = Family(_QWEN | dict(head_dim=128), windows="from_layer", qk_norm="head", **_ATTENTION_BIAS)
_GEMMA = Family(
    dict(head_dim=256, tie_word_embeddings=True, max_position_embeddings=8192, hidden_act="gelu_pytorch_tanh"),
    norm_offset=1.0,
    norm_in_fp32=True,
    **_ATTENTION_BIAS,
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
    names=_POST_NORMS,
    softcaps=True,
)
_GEMMA3 = replace(
    _GEMMA2,
    # The larger checkpoints nest a text_config that lists only what differs from these.
    defaults=_GEMMA2.defaults
    | dict(vocab_size=262208, hidden_size=2304, intermediate_size=9216, num_hidden_layers=26)
    | dict(num_attention_heads=8, num_key_value_heads=4, max_position_embeddings=131072, rope_theta=1e6)
    | dict(rope_local_base_freq=1e4)
    | dict(sliding_window_pattern=6, attn_logit_softcapping=None, final_logit_softcapping=None),
    qk_norm="head",
    local_rope=True,
)

FAMILIES: dict[str, Family] = {
    # Llama 1-3.3, TinyLlama, SmolLM2 and Yi all call themselves "llama".
    "llama": Family(dict(max_position_embeddings=2048), mlp_bias="mlp_bias", **_ATTENTION_BIAS),
    "mistral": _MISTRAL,
    "ministral": _MISTRAL,
    "ministral3": replace(_MISTRAL, defaults=dict(rms_norm_eps=1e-5, head_dim=128, num_key_value_heads=8)),
    "qwen2": Family(_QWEN, windows="from_layer", qkv_bias=True),
    "qwen3": _QWEN3,
    "qwen3_vl_text": _QWEN3,
    "gemma": _GEMMA,
    "gemma2": _GEMMA2,
    "gemma3_text": _GEMMA3,
    "phi3": Family(_PHI3, windows="all", names=_FUSED_MLP | {"attention.qkv": "self_attn.qkv_proj"}),
    "olmo2": _OLMO2,
    "olmo3": replace(
        _OLMO2,
        defaults=_OLMO2.defaults | dict(sliding_window=4096, sliding_window_pattern=4, rope_theta=5e5),
        windows="pattern",
        local_rope=True,
    ),
    "seed_oss": Family(
        dict(attention_bias=True, head_dim=128),
        qkv_bias="attention_bias",
        output_bias="attention_out_bias",
        mlp_bias="mlp_bias",
    ),
    "cwm": Family(dict(rms_norm_eps=1e-5, head_dim=128, sliding_window=8192), windows="listed"),
    "smollm3": Family(
        dict(num_key_value_heads=4, tie_word_embeddings=True, rope_theta=2e6),
        rotates="listed",
        mlp_bias="mlp_bias",
        **_ATTENTION_BIAS,
    ),
    "exaone4": Family(
        dict(rms_norm_eps=1e-5, sliding_window=4096, sliding_window_pattern=4),
        windows="pattern",
        rotates="windowed",
        pre_norm=False,
        post_norm=True,
        qk_norm="head",
        names=_POST_NORMS,
    ),
    "granite": _GRANITE,
    "granitemoehybrid": replace(
        _GRANITE,
        spelled={"intermediate_size": "shared_intermediate_size"},
        names={"mlp.gate_up": "shared_mlp.input_linear", "mlp.down": "shared_mlp.output_linear"},
        mlp_bias=False,
        windows="listed",
        rotates="stated",
    ),
    "glm": _GLM,
    "glm4": replace(
        _GLM,
        post_norm=True,
        names=_FUSED_MLP | {"attention_post_norm": "post_self_attn_layernorm", "mlp_post_norm": "post_mlp_layernorm"},
    ),
    "ernie4_5": Family(
        dict(rms_norm_eps=1e-5, head_dim=128, num_key_value_heads=2, tie_word_embeddings=True, rope_theta=5e5),
        qkv_bias="use_bias",
        output_bias="use_bias",
        mlp_bias="use_bias",
        interleaved=True,
    ),
    "helium": Family(
        dict(rms_norm_eps=1e-8, head_dim=128, rope_theta=1e5),
        qkv_bias="attention_bias",
        mlp_bias="mlp_bias",
        interleaved=True,
    ),
    "arcee": Family(dict(hidden_act="relu2", rms_norm_eps=1e-5), gated=False, mlp_bias="mlp_bias", **_ATTENTION_BIAS),
    "starcoder2": replace(
        _ELDER,
        defaults=_ELDER.defaults | dict(num_key_value_heads=2, hidden_act="gelu_new"),
        spelled={"rms_norm_eps": "norm_epsilon"},
        names={"mlp.up": "mlp.c_fc", "mlp.down": "mlp.c_proj"},
        ignored="activation_function layer_norm_epsilon scale_attn_weights",
        windows="all",
        qkv_bias="use_bias",
        output_bias="use_bias",
        mlp_bias="use_bias",
    ),
    "gpt2": replace(_GPT2, transposed=True),
    "gpt_bigcode": replace(_GPT2, defaults=_GPT2.defaults | dict(multi_query=True), grouped=True),
    "opt": replace(
        _ELDER,
        defaults=_ELDER.defaults | dict(enable_bias=True, hidden_act="relu"),
        spelled={"intermediate_size": "ffn_dim", "hidden_act": "activation_function"},
        names={
            "embedding": "model.decoder.embed_tokens",
            "positions": "model.decoder.embed_positions",
            "norm": "model.decoder.final_layer_norm",
            "blocks.": "model.decoder.layers.",
            "attention_norm": "self_attn_layer_norm",
            "attention.output": "self_attn.out_proj",
            "mlp_norm": "final_layer_norm",
            "mlp.up": "fc1",
            "mlp.down": "fc2",
        },
        learned_positions=True,
        position_rows=2,
        rotates="none",
        qkv_bias="enable_bias",
        output_bias="enable_bias",
        mlp_bias="enable_bias",
    ),
    "gpt_neox": replace(
        _ELDER,
        defaults=dict(rms_norm_eps=1e-5, hidden_act="gelu", partial_rotary_factor=0.25, attention_bias=True),
        spelled={
            "rms_norm_eps": "layer_norm_eps",
            "partial_rotary_factor": "rotary_pct",
            "rope_theta": "rotary_emb_base",
            "parallel": "use_parallel_residual",
        },
        names=_MEGATRON
        | {
            "embedding": "gpt_neox.embed_in",
            "norm": "gpt_neox.final_layer_norm",
            "blocks.": "gpt_neox.layers.",
            "attention.qkv": "attention.query_key_value",
            "attention.output": "attention.dense",
        },
        grouped=True,
        parallel="separate",
        mlp_bias=True,
        **_ATTENTION_BIAS,
    ),
    "falcon": _FALCON,
    "phi": replace(
        _ELDER,
        defaults=dict(
            rms_norm_eps=1e-5, hidden_act="gelu_new", partial_rotary_factor=0.5, max_position_embeddings=2048
        ),
        spelled={"rms_norm_eps": "layer_norm_eps"},
        names={
            "norm": "model.final_layernorm",
            "attention.output": "self_attn.dense",
            "mlp.up": "mlp.fc1",
            "mlp.down": "mlp.fc2",
        },
        parallel="shared",
        head_bias=True,
        **_ALL_BIASES,
    ),
    "stablelm": Family(
        dict(rms_norm_eps=1e-5, partial_rotary_factor=0.25, parallel=False),
        spelled={"rms_norm_eps": "layer_norm_eps", "parallel": "use_parallel_residual"},
        layer_norm=True,
        norm_bias=True,
        parallel="shared",
        qkv_bias="use_qkv_bias",
    ),
    "cohere": _COHERE,
    "cohere2": replace(
        _COHERE,
        defaults=_COHERE.defaults | dict(sliding_window=4096, sliding_window_pattern=4, rope_theta=1e4),
        windows="pattern",
        rotates="sliding",
    ),
    "nemotron": Family(
        dict(rms_norm_eps=1e-5, hidden_act="relu2", partial_rotary_factor=0.5),
        spelled={"rms_norm_eps": "norm_eps"},
        layer_norm=True,
        norm_bias=True,
        norm_offset=1.0,
        gated=False,
        mlp_bias="mlp_bias",
        **_ATTENTION_BIAS,
    ),
}

# What other decoders need that this one does not have; a `model_type` is refused with the sentence it stands under.
REFUSED = {
    "is a mixture of experts: which weights a token reads depends on the token, and this decoder reads all of them": """
        mixtral qwen2_moe qwen3_moe qwen3_vl_moe qwen3_vl_moe_text gpt_oss granitemoe granitemoeshared olmoe phimoe dbrx
        deepseek_v2 deepseek_v3 deepseek_v32 deepseek_v4 glm4_moe ernie4_5_moe minimax minimax_m2 dots1 exaone_moe
        hunyuan_v1_moe llama4 llama4_text flex_olmo solar_open mistral4 longcat_flash cohere2_moe
    """,
    "keeps a recurrent state beside keys and values, which cannot be rolled back as this cache is": """
        mamba mamba2 jamba bamba falcon_h1 falcon_mamba zamba zamba2 nemotron_h rwkv recurrent_gemma lfm2 lfm2_moe
        qwen3_next qwen3_5 qwen3_5_text qwen3_5_moe kimi_linear olmo_hybrid xlstm
    """,
    "shares keys and values between layers, or has heads of another size in each, where this cache has one of each": """
        gemma3n gemma3n_text gemma4 gemma4_text
    """,
    "is not a decoder alone: this runtime has no encoder": "t5 mt5 umt5 bart t5gemma bert roberta modernbert whisper",
}

# Keys that never change a forward pass. Anything else unread is an error (or, with strict=False, let by).
HARMLESS = frozenset(
    """
    architectures model_type transformers_version _name_or_path auto_map use_cache cache_implementation
    initializer_range attention_dropout hidden_dropout resid_pdrop embd_pdrop pretraining_tp
    pad_token_id sep_token_id decoder_start_token_id output_attentions output_hidden_states return_dict
    chunk_size_feed_forward is_encoder_decoder is_decoder id2label label2id problem_type torchscript
    attn_implementation _attn_implementation _attn_implementation_autoset max_sequence_length is_llama_config
    transformers.js_config unsloth_fixed unsloth_version torch_dtype residual_dropout
    num_experts_per_tok output_router_logits router_aux_loss_coef mamba_n_heads mamba_n_groups mamba_d_state
    mamba_d_head mamba_d_conv mamba_expand mamba_chunk_size mamba_conv_bias mamba_proj_bias time_step_limit
    summary_type summary_use_proj summary_activation summary_proj_to_labels summary_first_dropout n_ctx
    task_specific_params reorder_and_upcast_attn attention_softmax_in_fp32 scale_attention_softmax_in_fp32 attn_pdrop
    inference_runner max_batch_size pad_key_length pre_allocate_kv_cache validate_runner_input embedding_dropout dropout
    classifier_dropout activation_dropout layerdrop init_std prefix output_past model_max_length
    time_step_min time_step_max shared_intermediate_size normalization_function init_method
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
    "num_local_experts": 0,
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
    "add_cross_attention": False,
    "do_layer_norm_before": True,  # false in OPT-350m alone
    "_remove_final_layer_norm": False,
    "layer_norm_elementwise_affine": True,
    "apply_residual_connection_post_layernorm": False,
    "alibi": False,
    "use_qk_norm": False,
    "qk_layernorm": False,
    "mlp_type": "default",
    "norm_type": "layer_norm",
    "use_mrope": False,  # multimodal positions
    "attention_out_bias": False,
    "full_attn_mod": 1,  # Phi-4-mini's files
    "interpolate_factor": 1,
}
