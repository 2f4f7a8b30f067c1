"""Keys of `config.json` that a family may have no use for, and families that are refused.

What is in none of these tables, and not asked for by the reader, is an error: a key that changes the computation must
not be ignored.
"""

from typing import Any

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
    seq_length offset_alibi skip_bias_add skip_bias_add_qkv masked_softmax_fusion bias_dropout_fusion slow_but_exact
    unk_token_id emb_pdrop init_config init_device tokenizer_name verbose
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
    "qk_ln": False,
    "clip_qkv": None,
    "alibi_bias_max": 8,
    "prefix_lm": False,
    "attn_uses_sequence_id": False,
    "attn_type": "multihead_attention",
    "softmax_scale": None,
    "expansion_ratio": 4,
    "embedding_fraction": 1.0,
    "logit_scale": None,
    "qk_layernorm": False,
    "mlp_type": "default",
    "norm_type": "layer_norm",
    "use_mrope": False,  # multimodal positions
    "attention_out_bias": False,
    "full_attn_mod": 1,  # Phi-4-mini's files
    "interpolate_factor": 1,
}
