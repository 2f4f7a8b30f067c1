"""More published `config.json` files, each with the number of parameters its model card gives.

Written down from memory (facts; what a reader must let pass is kept, what only training used is not). Some of the
larger files state little; what they leave out comes from the families' defaults.
"""


def _file(architecture: str, model_type: str, **keys) -> dict:
    return {"architectures": [architecture], "model_type": model_type, "torch_dtype": "bfloat16", **keys}


def _sizes(d: int, f: int, layers: int, heads: int, kv: int, vocabulary: int, **keys) -> dict:
    return {
        "hidden_size": d,
        "intermediate_size": f,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv,
        "vocab_size": vocabulary,
        "hidden_act": "silu",
        "use_cache": True,
        "initializer_range": 0.02,
    } | keys


# name -> (config.json, parameters of the text model in billions as published)
SIZES = {
    "Mistral-Small-3.1-24B": (
        _file(
            "Mistral3ForConditionalGeneration",
            "mistral3",
            image_token_index=10,
            multimodal_projector_bias=False,
            projector_hidden_act="gelu",
            spatial_merge_size=2,
            vision_feature_layer=-1,
            vision_config={"model_type": "pixtral"},
            text_config=_sizes(
                5120, 32768, 40, 32, 8, 131072, model_type="mistral", head_dim=128, max_position_embeddings=131072,
                rms_norm_eps=1e-05, rope_theta=1000000000.0, sliding_window=None, attention_dropout=0.0,
            ),
            tie_word_embeddings=False,
        ),
        23.57,
    ),
    "Ministral-3-3B": (
        _file(
            "Mistral3ForConditionalGeneration",
            "mistral3",
            image_token_index=10,
            vision_config={"model_type": "pixtral"},
            text_config=_sizes(
                3072, 9216, 26, 32, 8, 131072, model_type="ministral3", head_dim=128, max_position_embeddings=262144,
                rms_norm_eps=1e-05, sliding_window=None, tie_word_embeddings=True,
                rope_parameters={
                    "beta_fast": 32.0, "beta_slow": 1.0, "factor": 16.0, "llama_4_scaling_beta": 0.1, "mscale": 1.0,
                    "mscale_all_dim": 1.0, "original_max_position_embeddings": 16384, "rope_theta": 1000000.0,
                    "rope_type": "yarn", "type": "yarn",
                },
            ),
            tie_word_embeddings=True,
        ),
        3.43,
    ),
    "Olmo-3-1025-7B": (
        _file(
            "Olmo3ForCausalLM",
            "olmo3",
            **_sizes(4096, 11008, 32, 32, 32, 100278, max_position_embeddings=65536, rms_norm_eps=1e-06),
            attention_bias=False,
            eos_token_id=100257,
            pad_token_id=100277,
            layer_types=(["sliding_attention"] * 3 + ["full_attention"]) * 8,
            rope_scaling={
                "attention_factor": 1.2079441541679836, "beta_fast": 32.0, "beta_slow": 1.0, "factor": 8.0,
                "original_max_position_embeddings": 8192, "rope_type": "yarn",
            },
            rope_theta=500000,
            sliding_window=4096,
            tie_word_embeddings=False,
        ),
        7.30,
    ),
    "Seed-OSS-36B-Base": (
        _file(
            "SeedOssForCausalLM",
            "seed_oss",
            **_sizes(5120, 27648, 64, 80, 8, 155136, max_position_embeddings=524288, rms_norm_eps=1e-06, head_dim=128),
            attention_bias=True,
            attention_out_bias=False,
            attention_dropout=0.1,
            residual_dropout=0.1,
            mlp_bias=False,
            rope_scaling={"rope_type": "default"},
            rope_theta=10000000.0,
            tie_word_embeddings=False,
        ),
        36.15,
    ),
    "Qwen3-VL-4B-Instruct": (
        _file(
            "Qwen3VLForConditionalGeneration",
            "qwen3_vl",
            image_token_id=151655,
            video_token_id=151656,
            vision_start_token_id=151652,
            vision_end_token_id=151653,
            vision_config={"model_type": "qwen3_vl", "deepstack_visual_indexes": [5, 11, 17]},
            text_config=_sizes(
                2560, 9728, 36, 32, 8, 151936, model_type="qwen3_vl_text", head_dim=128, attention_bias=False,
                max_position_embeddings=262144, rms_norm_eps=1e-06, rope_theta=5000000, tie_word_embeddings=True,
                rope_scaling={"mrope_interleaved": True, "mrope_section": [24, 20, 20], "rope_type": "default"},
                bos_token_id=151643, eos_token_id=151645, attention_dropout=0.0, dtype="bfloat16",
            ),
            tie_word_embeddings=True,
        ),
        4.02,
    ),
    "cwm": (
        _file(
            "CwmForCausalLM",
            "cwm",
            **_sizes(6144, 21504, 64, 48, 8, 128256, max_position_embeddings=131072, rms_norm_eps=1e-05, head_dim=128),
            layer_types=(["full_attention"] + ["sliding_attention"] * 3) * 16,
            rope_scaling={
                "factor": 16.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0,
                "original_max_position_embeddings": 8192, "rope_type": "llama3",
            },
            rope_theta=1000000.0,
            sliding_window=8192,
            tie_word_embeddings=False,
        ),
        32.6,
    ),
    "SmolLM3-3B": (
        _file(
            "SmolLM3ForCausalLM", "smollm3",
            **_sizes(2048, 11008, 36, 16, 4, 128256, max_position_embeddings=65536, rms_norm_eps=1e-06),
            attention_bias=False, mlp_bias=False, no_rope_layer_interval=4, no_rope_layers=[1, 1, 1, 0] * 9,
            layer_types=["full_attention"] * 36, rope_scaling=None, rope_theta=5000000.0, sliding_window=None,
            use_sliding_window=False, max_window_layers=28, pretraining_tp=2, tie_word_embeddings=True,
            bos_token_id=128000, eos_token_id=128012,
        ),
        3.08,
    ),
    "EXAONE-4.0-1.2B": (
        _file(
            "Exaone4ForCausalLM", "exaone4",
            **_sizes(2048, 4096, 30, 32, 8, 102400, max_position_embeddings=65536, rms_norm_eps=1e-05, head_dim=64),
            attention_dropout=0.0, layer_types=["full_attention"] * 30, rope_theta=1000000, sliding_window=None,
            sliding_window_pattern=None, tie_word_embeddings=True, bos_token_id=1, eos_token_id=361, pad_token_id=0,
            rope_scaling={
                "factor": 16.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0,
                "original_max_position_embeddings": 8192, "rope_type": "llama3",
            },
        ),
        1.28,
    ),
    "EXAONE-4.0-32B": (
        _file(
            "Exaone4ForCausalLM", "exaone4",
            **_sizes(5120, 27392, 64, 40, 8, 102400, max_position_embeddings=131072, rms_norm_eps=1e-05, head_dim=128),
            layer_types=(["sliding_attention"] * 3 + ["full_attention"]) * 16, rope_theta=1000000,
            sliding_window=4096, sliding_window_pattern="LLLG", tie_word_embeddings=False,
            rope_scaling={
                "factor": 16.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0,
                "original_max_position_embeddings": 8192, "rope_type": "llama3",
            },
        ),
        32.0,
    ),
    "granite-3.3-2b-instruct": (
        _file(
            "GraniteForCausalLM", "granite",
            **_sizes(2048, 8192, 40, 32, 8, 49159, max_position_embeddings=131072, rms_norm_eps=1e-05),
            attention_bias=False, mlp_bias=False, attention_multiplier=0.015625, embedding_multiplier=12.0,
            logits_scaling=8.0, residual_multiplier=0.22, rope_scaling=None, rope_theta=10000000.0,
            tie_word_embeddings=True,
        ),
        2.53,
    ),
    "GLM-4-9B-0414": (
        _file(
            "Glm4ForCausalLM", "glm4",
            **_sizes(4096, 13696, 40, 32, 2, 151552, max_position_embeddings=32768, rms_norm_eps=1e-05, head_dim=128),
            attention_bias=True, attention_dropout=0.0, partial_rotary_factor=0.5, rope_theta=10000.0,
            tie_word_embeddings=False, eos_token_id=[151329, 151336, 151338], pad_token_id=151329,
        ),
        9.40,
    ),
    "glm-4-9b-chat-hf": (
        _file(
            "GlmForCausalLM", "glm",
            **_sizes(
                4096, 13696, 40, 32, 2, 151552, max_position_embeddings=131072, rms_norm_eps=1.5625e-07, head_dim=128
            ),
            attention_bias=True, partial_rotary_factor=0.5, rope_theta=10000.0, tie_word_embeddings=False,
        ),
        9.40,
    ),
    "ERNIE-4.5-0.3B-PT": (
        _file(
            "Ernie4_5ForCausalLM", "ernie4_5",
            **_sizes(1024, 3072, 18, 16, 2, 103424, max_position_embeddings=131072, rms_norm_eps=1e-05, head_dim=128),
            rope_scaling=None, rope_theta=500000.0, tie_word_embeddings=True, use_bias=False,
        ),
        0.36,
    ),
    "helium-1-2b": (
        _file(
            "HeliumForCausalLM", "helium",
            **_sizes(2048, 8192, 28, 16, 8, 64000, max_position_embeddings=4096, rms_norm_eps=1e-08, head_dim=128),
            attention_bias=False, mlp_bias=False, rope_theta=20000.0, tie_word_embeddings=False,
        ),
        2.02,
    ),
    "AFM-4.5B": (
        _file(
            "ArceeForCausalLM", "arcee",
            **_sizes(2560, 18432, 36, 20, 4, 128004, max_position_embeddings=65536, rms_norm_eps=1e-05, head_dim=128)
            | {"hidden_act": "relu2"},
            attention_bias=False, mlp_bias=False, rope_theta=10000.0, tie_word_embeddings=False,
            bos_token_id=128000, eos_token_id=128003,
            rope_scaling={
                "beta_fast": 32.0, "beta_slow": 1.0, "factor": 20.0, "mscale": 1.0,
                "original_max_position_embeddings": 4096, "rope_type": "yarn", "type": "yarn",
            },
        ),
        4.62,
    ),
    "starcoder2-3b": (
        _file(
            "Starcoder2ForCausalLM", "starcoder2",
            **_sizes(3072, 12288, 30, 24, 2, 49152, max_position_embeddings=16384)
            | {"hidden_act": "gelu_pytorch_tanh"},
            activation_function="gelu", attention_softmax_in_fp32=True, scale_attention_softmax_in_fp32=True,
            scale_attn_weights=True, layer_norm_epsilon=1e-05, norm_epsilon=1e-05, mlp_type="default",
            norm_type="layer_norm", rope_theta=999999.4420358813, sliding_window=4096, use_bias=True,
            attention_dropout=0.1, residual_dropout=0.1, embedding_dropout=0.1, bos_token_id=0, eos_token_id=0,
        ),
        3.03,
    ),
    "gpt2": (
        {
            "activation_function": "gelu_new", "architectures": ["GPT2LMHeadModel"], "attn_pdrop": 0.1,
            "bos_token_id": 50256, "embd_pdrop": 0.1, "eos_token_id": 50256, "initializer_range": 0.02,
            "layer_norm_epsilon": 1e-05, "model_type": "gpt2", "n_ctx": 1024, "n_embd": 768, "n_head": 12,
            "n_layer": 12, "n_positions": 1024, "resid_pdrop": 0.1, "summary_activation": None,
            "summary_first_dropout": 0.1, "summary_proj_to_labels": True, "summary_type": "cls_index",
            "summary_use_proj": True, "vocab_size": 50257,
            "task_specific_params": {"text-generation": {"do_sample": True, "max_length": 50}},
        },
        0.124,
    ),
    "gpt2-xl": (
        {
            "activation_function": "gelu_new", "architectures": ["GPT2LMHeadModel"], "bos_token_id": 50256,
            "eos_token_id": 50256, "layer_norm_epsilon": 1e-05, "model_type": "gpt2", "n_ctx": 1024, "n_embd": 1600,
            "n_head": 25, "n_layer": 48, "n_positions": 1024, "output_past": True, "vocab_size": 50257,
        },
        1.558,
    ),
    "octocoder": (
        {
            "activation_function": "gelu", "architectures": ["GPTBigCodeForCausalLM"],
            "attention_softmax_in_fp32": True,
            "attn_pdrop": 0.1, "bos_token_id": 0, "embd_pdrop": 0.1, "eos_token_id": 0, "inference_runner": 0,
            "initializer_range": 0.02, "layer_norm_epsilon": 1e-05, "max_batch_size": None,
            "max_sequence_length": None, "model_type": "gpt_bigcode", "multi_query": True, "n_embd": 6144,
            "n_head": 48, "n_inner": 24576, "n_layer": 40, "n_positions": 8192, "pad_key_length": True,
            "pre_allocate_kv_cache": False, "resid_pdrop": 0.1, "scale_attention_softmax_in_fp32": True,
            "scale_attn_weights": True, "summary_type": "cls_index", "torch_dtype": "float32",
            "validate_runner_input": True, "vocab_size": 49152, "use_cache": True,
        },
        15.52,
    ),
    "opt-125m": (
        {
            "_remove_final_layer_norm": False, "activation_dropout": 0.0, "activation_function": "relu",
            "architectures": ["OPTForCausalLM"], "attention_dropout": 0.0, "bos_token_id": 2,
            "do_layer_norm_before": True, "dropout": 0.1, "eos_token_id": 2, "ffn_dim": 3072, "hidden_size": 768,
            "init_std": 0.02, "layerdrop": 0.0, "max_position_embeddings": 2048, "model_type": "opt",
            "num_attention_heads": 12, "num_hidden_layers": 12, "pad_token_id": 1, "prefix": "</s>",
            "torch_dtype": "float16", "use_cache": True, "vocab_size": 50272, "word_embed_proj_dim": 768,
        },
        0.125,
    ),
    "pythia-160m": (
        {
            "architectures": ["GPTNeoXForCausalLM"], "bos_token_id": 0, "eos_token_id": 0, "hidden_act": "gelu",
            "hidden_size": 768, "initializer_range": 0.02, "intermediate_size": 3072, "layer_norm_eps": 1e-05,
            "max_position_embeddings": 2048, "model_type": "gpt_neox", "num_attention_heads": 12,
            "num_hidden_layers": 12, "rotary_emb_base": 10000, "rotary_pct": 0.25, "tie_word_embeddings": False,
            "torch_dtype": "float16", "use_cache": True, "use_parallel_residual": True, "vocab_size": 50304,
        },
        0.162,
    ),
    "falcon-7b": (
        {
            "alibi": False, "apply_residual_connection_post_layernorm": False, "architectures": ["FalconForCausalLM"],
            "attention_dropout": 0.0, "auto_map": {}, "bias": False, "bos_token_id": 11, "eos_token_id": 11,
            "hidden_dropout": 0.0, "hidden_size": 4544, "initializer_range": 0.02, "layer_norm_epsilon": 1e-05,
            "model_type": "falcon", "multi_query": True, "new_decoder_architecture": False, "num_attention_heads": 71,
            "num_hidden_layers": 32, "parallel_attn": True, "torch_dtype": "bfloat16", "use_cache": True,
            "vocab_size": 65024,
        },
        6.92,
    ),
    "falcon-40b": (
        {
            "alibi": False, "apply_residual_connection_post_layernorm": False, "architectures": ["FalconForCausalLM"],
            "bias": False, "bos_token_id": 11, "eos_token_id": 11, "hidden_size": 8192, "layer_norm_epsilon": 1e-05,
            "model_type": "falcon", "multi_query": True, "new_decoder_architecture": True, "num_attention_heads": 128,
            "num_hidden_layers": 60, "num_kv_heads": 8, "parallel_attn": True, "vocab_size": 65024,
        },
        41.3,
    ),
    "falcon-11B": (
        {
            "activation": "gelu", "alibi": False, "architectures": ["FalconForCausalLM"], "bias": False,
            "bos_token_id": 11, "eos_token_id": 11, "ffn_hidden_size": 16384, "hidden_size": 4096,
            "layer_norm_epsilon": 1e-05, "max_position_embeddings": 8192, "model_type": "falcon", "multi_query": True,
            "new_decoder_architecture": True, "num_attention_heads": 32, "num_hidden_layers": 60, "num_kv_heads": 8,
            "num_ln_in_parallel_attn": 1, "parallel_attn": True, "rope_scaling": None, "rope_theta": 500042.0,
            "tie_word_embeddings": False, "vocab_size": 65024,
        },
        11.10,
    ),
    "phi-2": (
        _file(
            "PhiForCausalLM", "phi",
            **_sizes(2560, 10240, 32, 32, 32, 51200, max_position_embeddings=2048, layer_norm_eps=1e-05)
            | {"hidden_act": "gelu_new"},
            embd_pdrop=0.0, resid_pdrop=0.1, partial_rotary_factor=0.4, qk_layernorm=False, rope_scaling=None,
            rope_theta=10000.0, tie_word_embeddings=False, bos_token_id=50256, eos_token_id=50256,
        ),
        2.78,
    ),
    "stablelm-2-1_6b": (
        _file(
            "StableLmForCausalLM", "stablelm",
            **_sizes(2048, 5632, 24, 32, 32, 100352, max_position_embeddings=4096, layer_norm_eps=1e-05),
            partial_rotary_factor=0.25, rope_theta=10000, use_qkv_bias=True, tie_word_embeddings=False,
            bos_token_id=100257, eos_token_id=100257,
        ),
        1.64,
    ),
    "c4ai-command-r-v01": (
        _file(
            "CohereForCausalLM", "cohere",
            **_sizes(8192, 22528, 40, 64, 64, 256000, max_position_embeddings=8192, layer_norm_eps=1e-05),
            attention_bias=False, attention_dropout=0.0, logit_scale=0.0625, rope_theta=8000000.0, use_qk_norm=False,
            model_max_length=131072, bos_token_id=5, eos_token_id=255001, pad_token_id=0,
        ),
        34.98,
    ),
    "c4ai-command-r7b-12-2024": (
        _file(
            "Cohere2ForCausalLM", "cohere2",
            **_sizes(4096, 14336, 32, 32, 8, 256000, max_position_embeddings=132096, layer_norm_eps=1e-05),
            attention_bias=False, attention_dropout=0.0, cache_implementation="hybrid", head_dim=128, layer_switch=4,
            logit_scale=0.25, order_of_interleaved_layers="local_attn_first", position_embedding_type="rope_gptj",
            rope_scaling=None, rope_theta=50000, rotary_pct=1.0, sliding_window=4096, sliding_window_pattern=4,
            use_embedding_sharing=True, use_gated_activation=True, use_parallel_block=True,
            use_parallel_embedding=True, bos_token_id=5, eos_token_id=255001, pad_token_id=0,
        ),
        8.03,
    ),
    "Minitron-4B-Base": (
        _file(
            "NemotronForCausalLM", "nemotron",
            **_sizes(3072, 9216, 32, 24, 8, 256000, max_position_embeddings=4096, norm_eps=1e-05, head_dim=128)
            | {"hidden_act": "relu2"},
            attention_bias=False, mlp_bias=False, partial_rotary_factor=0.5, rope_theta=10000,
            tie_word_embeddings=False, bos_token_id=2, eos_token_id=3,
        ),
        4.19,
    ),
    "bloom-560m": (
        {
            "apply_residual_connection_post_layernorm": False, "attention_dropout": 0.0,
            "architectures": ["BloomForCausalLM"], "attention_softmax_in_fp32": True, "bias_dropout_fusion": True,
            "bos_token_id": 1, "eos_token_id": 2, "hidden_dropout": 0.0, "initializer_range": 0.02,
            "layer_norm_epsilon": 1e-05, "masked_softmax_fusion": True, "model_type": "bloom", "n_embed": 1024,
            "n_inner": None, "n_layer": 24, "num_attention_heads": 16, "offset_alibi": 100, "pad_token_id": 3,
            "pretraining_tp": 1, "seq_length": 2048, "skip_bias_add": True, "skip_bias_add_qkv": False,
            "unk_token_id": 0, "use_cache": True, "vocab_size": 250880,
        },
        0.559,
    ),
    "mpt-7b": (
        {
            "architectures": ["MPTForCausalLM"],
            "attn_config": {
                "alibi": True, "alibi_bias_max": 8, "attn_impl": "torch", "attn_pdrop": 0,
                "attn_type": "multihead_attention", "attn_uses_sequence_id": False, "clip_qkv": None,
                "prefix_lm": False, "qk_ln": False, "softmax_scale": None,
            },
            "auto_map": {}, "d_model": 4096, "emb_pdrop": 0, "embedding_fraction": 1.0, "expansion_ratio": 4,
            "init_config": {"name": "kaiming_normal_"}, "init_device": "cpu", "learned_pos_emb": True,
            "logit_scale": None, "max_seq_len": 2048, "model_type": "mpt", "n_heads": 32, "n_layers": 32,
            "no_bias": True, "norm_type": "low_precision_layernorm", "resid_pdrop": 0,
            "tokenizer_name": "EleutherAI/gpt-neox-20b", "torch_dtype": "bfloat16", "use_cache": False, "verbose": 0,
            "vocab_size": 50432,
        },
        6.65,
    ),
    "falcon-rw-1b": (
        {
            "alibi": True, "apply_residual_connection_post_layernorm": False, "architectures": ["FalconForCausalLM"],
            "bias": True, "bos_token_id": 1, "eos_token_id": 2, "hidden_size": 2048, "layer_norm_epsilon": 1e-05,
            "model_type": "falcon", "multi_query": False, "new_decoder_architecture": False,
            "num_attention_heads": 32, "num_hidden_layers": 24, "parallel_attn": False, "vocab_size": 50304,
        },
        1.31,
    ),
    "granite-4.0-350m": (
        _file(
            "GraniteMoeHybridForCausalLM", "granitemoehybrid",
            **_sizes(1024, 2048, 28, 16, 4, 100352, max_position_embeddings=32768, rms_norm_eps=1e-05),
            attention_bias=False, attention_multiplier=0.015625, embedding_multiplier=12, logits_scaling=4,
            residual_multiplier=0.246, layer_types=["attention"] * 28, num_experts_per_tok=0, num_local_experts=0,
            normalization_function="rmsnorm", position_embedding_type="rope", rope_scaling=None, rope_theta=10000000,
            router_aux_loss_coef=0.01, output_router_logits=False, shared_intermediate_size=2048,
            tie_word_embeddings=True, bos_token_id=100257, eos_token_id=100257, pad_token_id=100256,
            mamba_chunk_size=256, mamba_conv_bias=True, mamba_d_conv=4, mamba_d_head=16, mamba_d_state=256,
            mamba_expand=2, mamba_n_groups=1, mamba_n_heads=128, mamba_proj_bias=False, init_method="mup",
        ),
        0.352,
    ),
    "Ministral-8B-Instruct-2410": (
        _file(
            "MinistralForCausalLM", "ministral",
            **_sizes(4096, 12288, 36, 32, 8, 131072, max_position_embeddings=32768, rms_norm_eps=1e-05, head_dim=128),
            layer_types=(["full_attention"] + ["sliding_attention"] * 3) * 9, rope_theta=100000000.0,
            sliding_window=32768, tie_word_embeddings=False, bos_token_id=1, eos_token_id=2, attention_dropout=0.0,
        ),
        8.02,
    ),
}  # fmt: skip
