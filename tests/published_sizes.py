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
}  # fmt: skip
