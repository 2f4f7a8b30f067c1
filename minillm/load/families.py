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
    parallel: str | None = None  # shared | separate | stated (Falcon), unless the file's `parallel` is false
    qk_norm: str | None = None
    # A bias on all of them, on none, or as the flag of this name in the file says.
    qkv_bias: bool | str = False
    output_bias: bool | str = False
    mlp_bias: bool | str = False
    gated: bool = True
    head_bias: bool = False
    learned_positions: bool = False
    alibi: bool = False
    embedding_norm: bool = False
    scaled_embedding: bool = False
    multipliers: bool = False  # Granite: on embeddings, scores, what is added to the stream, and logits
    gelu_means_tanh: bool = False
    local_rope: bool = False  # sliding layers have a rotary table of their own
    # all layers | none | sliding | windowed (sliding, if the model has windows) | listed (`no_rope_layers`) | stated
    rotates: str = "all"
    softcaps: bool = False


def _biases(said: bool | str) -> dict[str, bool | str]:
    """All of them, or all as one flag of the file says."""
    return dict(qkv_bias=said, output_bias=said, mlp_bias=said)


_ATTENTION_BIAS = dict(qkv_bias="attention_bias", output_bias="attention_bias")
# Before Llama: LayerNorm with biases, no gate, a head that reads the embedding.
_ELDER = Family(dict(tie_word_embeddings=True, rms_norm_eps=1e-5), layer_norm=True, norm_bias=True, gated=False)
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
    **_biases(True),
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
    **_biases("bias"),
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
        **_biases("use_bias"),
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
        **_biases("use_bias"),
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
        **_biases("enable_bias"),
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
        **_biases(True),
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
    "bloom": replace(
        _ELDER,
        defaults=_ELDER.defaults | dict(hidden_act="gelu_new", max_position_embeddings=2048),
        spelled={
            "hidden_size": "n_embed",
            "num_hidden_layers": "n_layer",
            "num_attention_heads": "n_head",
            "intermediate_size": "n_inner",
            "max_position_embeddings": "seq_length",
            "rms_norm_eps": "layer_norm_epsilon",
        },
        names=_FALCON.names | {"embedding_norm": "transformer.word_embeddings_layernorm"},
        grouped=True,
        embedding_norm=True,
        alibi=True,
        **_biases(True),
    ),
    "mpt": replace(
        _ELDER,
        defaults=_ELDER.defaults | dict(hidden_act="gelu", max_position_embeddings=2048),
        spelled={
            "hidden_size": "d_model",
            "num_hidden_layers": "n_layers",
            "num_attention_heads": "n_heads",
            "max_position_embeddings": "max_seq_len",
            "rms_norm_eps": "layer_norm_epsilon",
        },
        names={
            "embedding": "transformer.wte",
            "norm": "transformer.norm_f",
            "blocks.": "transformer.blocks.",
            "attention_norm": "norm_1",
            "attention.qkv": "attn.Wqkv",
            "attention.output": "attn.out_proj",
            "mlp_norm": "norm_2",
            "mlp.up": "ffn.up_proj",
            "mlp.down": "ffn.down_proj",
        },
        # ALiBi stands in for learned positions, and there are no biases, whatever the file says of them.
        ignored="learned_pos_emb no_bias norm_type attn_impl",
        norm_bias=False,
        alibi=True,
    ),
}
