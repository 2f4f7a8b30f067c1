"""config.json -> ModelConfig, against what transformers' own config classes make of the same file."""

import copy
import dataclasses
import json
import os
import sys
import time

import pytest
import torch
from families import FAMILIES, reference_config
from published_configs import PUBLISHED

from minillm.errors import ConfigError, MinillmError
from minillm.load.config_json import alibi_slopes, generation_defaults, load_config, parse_config
from minillm.model import empty_decoder

CONFIGS = PUBLISHED | {f"tiny {name}": family.config for name, family in FAMILIES.items()}


def either(config, *names, default):
    """The value under the first of these names that has one."""
    return next((value for name in names if (value := getattr(config, name, None)) is not None), default)


def windows_of(reference) -> list[int | None]:
    """The window of each layer as transformers' modelling code uses it."""
    if getattr(reference, "layer_types", None) is None:  # then all layers are alike
        return [getattr(reference, "sliding_window", None)] * reference.num_hidden_layers
    return [reference.sliding_window if t == "sliding_attention" else None for t in reference.layer_types]


def rope_parameters_of(reference) -> list[dict]:
    """transformers' rope_parameters of each layer."""
    if "full_attention" in reference.rope_parameters:
        return [reference.rope_parameters[layer_type] for layer_type in reference.layer_types]
    return [reference.rope_parameters] * reference.num_hidden_layers


@pytest.mark.parametrize("name", CONFIGS)
def test_agrees_with_transformers(name):
    raw = CONFIGS[name]
    ours = parse_config(copy.deepcopy(raw))
    full = reference_config(raw)
    theirs = full.get_text_config()

    assert ours.vocab_size == theirs.vocab_size
    assert ours.hidden_size == theirs.hidden_size
    inner = ("shared_intermediate_size", "intermediate_size", "n_inner", "ffn_dim", "ffn_hidden_size")
    assert ours.intermediate_size == either(theirs, *inner, default=4 * theirs.hidden_size)
    assert ours.num_heads == theirs.num_attention_heads
    if theirs.model_type == "falcon":
        shared = theirs.multi_query and not theirs.new_decoder_architecture
        assert ours.num_kv_heads == (1 if shared else theirs.num_kv_heads)
    else:
        assert ours.num_kv_heads == either(theirs, "num_key_value_heads", default=theirs.num_attention_heads)
    head_dim = getattr(theirs, "head_dim", None) or theirs.hidden_size // theirs.num_attention_heads
    assert ours.head_dim == head_dim
    assert len(ours.layers) == theirs.num_hidden_layers
    residual = getattr(theirs, "residual_multiplier", 1.0)  # Granite's, divided out of stream and eps
    names = ("rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon", "norm_epsilon", "norm_eps")
    assert ours.norm.eps == either(theirs, *names, default=1e-5) / residual**2
    assert ours.tie_word_embeddings == bool(full.tie_word_embeddings)
    if "bos_token_id" in raw.get("text_config", raw):
        assert ours.bos_token_id == theirs.bos_token_id
    stated = [raw.get("eos_token_id"), raw.get("text_config", {}).get("eos_token_id")]  # union of sources
    eos = {id for ids in stated if ids is not None for id in (ids if isinstance(ids, list) else [ids])}
    assert set(ours.eos_token_ids) == eos
    assert ours.dtype == str(full.dtype).removeprefix("torch.")
    activation = either(theirs, "hidden_activation", "hidden_act", "activation_function", "activation", default="gelu")
    tanh = theirs.model_type == "bloom" or activation in ("gelu_pytorch_tanh", "gelu_new")
    assert ours.activation == ("gelu_tanh" if tanh else activation)

    assert [layer.window for layer in ours.layers] == windows_of(theirs)
    scalar = getattr(theirs, "query_pre_attn_scalar", None) or head_dim
    assert {layer.query_scale for layer in ours.layers} == {getattr(theirs, "attention_multiplier", scalar**-0.5)}
    assert {layer.softcap for layer in ours.layers} == {getattr(theirs, "attn_logit_softcapping", None)}
    assert ours.final_softcap == getattr(theirs, "final_logit_softcapping", None)

    if not hasattr(theirs, "rope_parameters"):
        assert {ours.ropes[layer.rope].kind for layer in ours.layers} == {"none"}
        return
    for layer, rope in zip(ours.layers, rope_parameters_of(theirs), strict=True):
        spec = ours.ropes[layer.rope]
        if spec.kind == "none":
            continue
        assert spec.theta == rope["rope_theta"]
        assert spec.kind == rope["rope_type"]
        assert spec.dim == int(head_dim * rope.get("partial_rotary_factor", 1.0))
        if spec.kind in ("linear", "llama3", "yarn"):
            assert spec.factor == rope["factor"]
        if spec.kind in ("llama3", "yarn", "longrope"):
            assert spec.original_length == rope["original_max_position_embeddings"]


@pytest.mark.parametrize("name", PUBLISHED)
def test_positions_a_published_model_is_meant_for(name):
    """What the model cards say; stated in the file, except that yarn stretches what the file states."""
    stated = PUBLISHED[name].get("text_config", PUBLISHED[name]).get("max_position_embeddings", 131072)
    meant = 131072 if "yarn" in name else stated
    assert parse_config(PUBLISHED[name]).max_positions == meant


@pytest.mark.parametrize("name", FAMILIES)
def test_both_spellings_give_the_same_config(name, checkpoint):
    """As published (rope_theta, rope_scaling, torch_dtype) and as transformers saves it today."""
    saved = load_config(checkpoint(name))
    published = parse_config(FAMILIES[name].config)
    raw = json.loads((checkpoint(name) / "config.json").read_text())
    spelled = raw.get("text_config", raw)
    older = {"rope_theta", "rope_scaling", "rotary_pct", "rotary_emb_base"} & set(FAMILIES[name].text_config)
    assert "rope_parameters" in spelled or not older  # it really is the other spelling
    assert saved == published


@pytest.mark.parametrize("name", FAMILIES)
def test_config_is_frozen_and_hashable(name):
    config = parse_config(FAMILIES[name].config)
    hash(config)
    for part in (config, config.layers[0], config.ropes[0]):
        with pytest.raises(dataclasses.FrozenInstanceError):
            part.window = 3


def test_first_release_spelling_of_longrope():
    """Phi-3's first files said "su", which transformers 5 no longer reads itself."""
    raw = copy.deepcopy(PUBLISHED["Phi-3-mini-128k-instruct"])
    raw["rope_scaling"]["type"] = "su"
    assert parse_config(raw) == parse_config(PUBLISHED["Phi-3-mini-128k-instruct"])


LLAMA = FAMILIES["llama2"].config
REJECTED = [
    # (a change to the llama recipe, what the message must name)
    ({"model_type": "mamba"}, "mamba"),
    ({"model_type": None}, "model_type"),
    ({"model_type": "qwen3_moe"}, "mixture of experts"),
    ({"model_type": "mamba2"}, "recurrent state"),
    ({"model_type": "gemma3n_text"}, "between layers"),
    ({"model_type": "t5"}, "encoder"),
    ({"num_experts": 8}, "num_experts"),
    ({"logit_scale": 0.0625}, "logit_scale"),
    ({"hidden_act": "relu"}, "relu"),
    ({"hidden_act": "gelu"}, "gelu"),
    ({"do_layer_norm_before": False}, "do_layer_norm_before"),
    ({"scale_attn_weights": False}, "scale_attn_weights"),
    ({"word_embed_proj_dim": 24}, "word_embed_proj_dim"),
    ({"activation_function": "silu"}, "activation_function"),
    ({"alibi": True}, "alibi"),
    ({"multi_query": True}, "multi_query"),
    ({"new_decoder_architecture": True}, "new_decoder_architecture"),
    ({"use_parallel_residual": True}, "use_parallel_residual"),
    ({"embedding_multiplier": 12.0}, "embedding_multiplier"),
    ({"no_rope_layers": [1, 0]}, "no_rope_layers"),
    ({"clip_qkv": 8.0}, "clip_qkv"),
    ({"hidden_size": None}, "hidden_size"),
    ({"hidden_size": "48"}, "hidden_size"),
    ({"num_hidden_layers": 0}, "num_hidden_layers"),
    ({"num_hidden_layers": -2}, "num_hidden_layers"),
    ({"num_attention_heads": 2.5}, "num_attention_heads"),
    ({"num_key_value_heads": 4}, "num_key_value_heads"),
    ({"num_attention_heads": 5, "num_key_value_heads": 5, "head_dim": None}, "hidden_size"),
    ({"head_dim": 9}, "even"),
    ({"rms_norm_eps": -1e-5}, "rms_norm_eps"),
    ({"rms_norm_eps": float("nan")}, "rms_norm_eps"),
    ({"rope_theta": 0}, "rope_theta"),
    ({"rope_theta": True}, "rope_theta"),
    ({"max_position_embeddings": 0}, "max_position_embeddings"),
    ({"vocab_size": 0}, "vocab_size"),
    ({"eos_token_id": "2"}, "eos_token_id"),
    ({"eos_token_id": [2, -1]}, "eos_token_id"),
    ({"torch_dtype": "int8"}, "int8"),
    ({"tie_word_embeddings": "yes"}, "tie_word_embeddings"),
    ({"rope_interleaved": True}, "rope_interleaved"),
    ({"rope_scaling": {"type": "wavelet", "factor": 2.0}}, "wavelet"),
    ({"rope_scaling": {"type": "linear"}}, "factor"),
    ({"rope_scaling": {"type": "linear", "factor": 0}}, "factor"),
    ({"rope_scaling": {"type": "linear", "factor": 2.0, "speed": 3}}, "speed"),
    ({"rope_scaling": {"type": "llama3", "factor": 8.0}}, "freq_factor"),
    ({"rope_scaling": {"type": "longrope", "short_factor": [1.0], "long_factor": [1.0]}}, "factor"),
    ({"rope_scaling": "linear"}, "rope_scaling"),
    ({"rope_parameters": {"rope_type": "default", "rope_theta": 77.0}}, "rope_theta"),
    ({"layer_types": ["full_attention"]}, "layer_types"),
    ({"layer_types": ["full_attention", "chunked_attention"]}, "chunked_attention"),
    ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "quantization_config"),
    ({"quantization_config": [1]}, "quantization_config"),
    ({"quantization_config": {"quant_method": "minillm", "format": ["int8"]}}, "format"),
    ({"quantization_config": {"quant_method": "minillm", "format": "int3"}}, "int3"),
    ({"quantization_config": {"quant_method": "minillm"}}, "format"),
    # values of other types, and numbers beyond any model
    ({"model_type": []}, "model_type"),
    ({"layer_types": True}, "layer_types"),
    ({"layer_types": [1, []]}, "layer_types"),
    ({"hidden_act": [1]}, "hidden_act"),
    ({"torch_dtype": ["float32"]}, "dtype"),
    ({"rope_scaling": {"type": [1]}}, "rope_type"),
    ({"rope_scaling": {"type": "yarn", "factor": 2.0}, "rope_theta": 1}, "rope_theta"),
    ({"rope_scaling": {"type": "yarn", "factor": 2.0, "beta_fast": 1e308}}, "beta_fast"),
    ({"rope_scaling": {"type": "yarn", "factor": 2.0, "truncate": "no"}}, "truncate"),
    ({"rope_scaling": {"type": "linear", "factor": 1e300}}, "factor"),
    ({"rope_scaling": {"type": "dynamic", "factor": 2.0}, "head_dim": 2}, "dynamic"),
    ({"rope_scaling": {"type": "llama3", "factor": 8.0, "low_freq_factor": 4.0, "high_freq_factor": 4.0}}, "low_freq"),
    ({"rope_scaling": {"type": "longrope", "original_max_position_embeddings": 1}}, "original_max_position"),
    ({"rope_scaling": {"type": "longrope", "short_factor": ["x"] * 5, "long_factor": [1.0] * 5}}, r"short_factor\[0\]"),
    ({"rope_scaling": {"type": "longrope", "short_factor": [1.0] * 5, "long_factor": [float("nan")] * 5}}, "long_fa"),
    ({"num_hidden_layers": 10**5}, "num_hidden_layers"),
    ({"vocab_size": 10**400}, "vocab_size"),
    ({"rms_norm_eps": 10**400}, "rms_norm_eps"),
    ({"num_attention_heads": 2**20, "num_key_value_heads": 2**20, "head_dim": 2**20}, "num_attention_heads"),
    ({"eos_token_id": 2**63}, "eos_token_id"),
    ({"key\nwith a\x1b[2J line": 1}, r"\\n.*\\x1b"),
]


@pytest.mark.parametrize(("change", "named"), REJECTED, ids=[json.dumps(change) for change, _ in REJECTED])
def test_bad_or_unknown_values_are_errors_that_name_them(change, named):
    raw = LLAMA | change
    with pytest.raises(ConfigError, match=named):
        parse_config(raw)


def test_queries_that_grow_with_their_position_are_not_computed_and_never_reached():
    config = parse_config(FAMILIES["ministral3"].config)
    assert config.max_positions == 256  # of 512
    plain = FAMILIES["ministral3"].with_changes({"rope_parameters": {"llama_4_scaling_beta": 0.0}})
    assert parse_config(plain).max_positions == 512


def test_a_head_that_the_outer_file_ties_is_tied():
    raw = FAMILIES["mistral3"].config
    assert not parse_config(raw).tie_word_embeddings
    assert parse_config(raw | {"tie_word_embeddings": True}).tie_word_embeddings
    text = raw["text_config"] | {"tie_word_embeddings": True}
    assert not parse_config(raw | {"text_config": text}).tie_word_embeddings
    assert parse_config({k: v for k, v in raw.items() if "tie" not in k} | {"text_config": text}).tie_word_embeddings


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("smollm3", [True, False, True, True]),
        ("smollm3-interval", [True, False]),
        ("exaone4", [True, True, False, True]),
        ("exaone4-full", [True, True]),
        ("granite4", [True, True]),
        ("granite4-nope", [False, False]),
    ],
)
def test_which_layers_rotate(name, expected):
    config = parse_config(FAMILIES[name].config)
    assert [config.ropes[layer.rope].kind != "none" for layer in config.layers] == expected


@pytest.mark.parametrize("listed", [[1], [1, 0, 2, 1], "1011", [1, 0, None, 1]])
def test_no_rope_layers_that_do_not_fit(listed):
    with pytest.raises(ConfigError, match="no_rope_layers"):
        parse_config(FAMILIES["smollm3"].config | {"no_rope_layers": listed})


def test_an_error_names_the_key_as_the_file_spells_it():
    with pytest.raises(ConfigError, match="shared_intermediate_size"):
        parse_config(FAMILIES["granite4"].config | {"shared_intermediate_size": -1})
    with pytest.raises(ConfigError, match="num_local_experts"):
        parse_config(FAMILIES["granite4"].config | {"num_local_experts": 8})


def test_two_spellings_of_one_value_that_differ_are_refused():
    llama = FAMILIES["llama3"].config
    assert parse_config(llama | {"dtype": "float32", "torch_dtype": "float32"}).dtype == "float32"
    with pytest.raises(ConfigError, match=r"dtype .*float32.*, torch_dtype .*float16"):
        parse_config(llama | {"dtype": "float32", "torch_dtype": "float16"})


def test_what_the_elders_files_leave_out_or_call_otherwise():
    gpt2 = FAMILIES["gpt2"].config
    assert parse_config({k: v for k, v in gpt2.items() if k != "n_inner"}) == parse_config(gpt2)
    with pytest.raises(ConfigError, match="n_embd"):
        parse_config({k: v for k, v in gpt2.items() if k != "n_embd"})
    with pytest.raises(ConfigError, match="do_layer_norm_before"):  # OPT-350m
        parse_config(FAMILIES["opt"].config | {"do_layer_norm_before": False})
    assert parse_config(FAMILIES["starcoder2"].config).activation == "gelu_tanh"  # not what activation_function says
    assert parse_config(FAMILIES["starcoder2-unbiased"].config).activation == "gelu"  # with erf
    assert parse_config(FAMILIES["gemma"].config).activation == "gelu_tanh"  # which says "gelu"
    with pytest.raises(ConfigError, match="use_qk_norm"):
        parse_config(FAMILIES["cohere"].config | {"use_qk_norm": True})


@pytest.mark.parametrize("heads", [1, 4, 6, 8, 12, 71])
def test_alibi_slopes_are_blooms_and_mpts(heads):
    from transformers.models.bloom.modeling_bloom import build_alibi_tensor
    from transformers.models.mpt.modeling_mpt import build_mpt_alibi_tensor

    slopes = torch.tensor(alibi_slopes(heads))
    bloom = build_alibi_tensor(torch.ones(1, 2, dtype=torch.int64), heads, torch.float32)[:, 0, 1]  # of position 1
    mpt = -build_mpt_alibi_tensor(heads, 2)[:, 0, 0]  # one position back
    torch.testing.assert_close(slopes, bloom, rtol=1e-6, atol=0)
    torch.testing.assert_close(slopes.sort()[0], mpt.sort()[0], rtol=1e-6, atol=0)


def test_what_stands_in_attn_config_is_read():
    mpt = FAMILIES["mpt"].config
    for change in ({"clip_qkv": 6.0}, {"alibi": False}, {"prefix_lm": True}, {"alibi_bias_max": 4}, {"novelty": 1}):
        with pytest.raises(ConfigError, match=next(iter(change))):
            parse_config(mpt | {"attn_config": mpt["attn_config"] | change})


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("gpt_neox", "separate"),
        ("gpt_neox-behind", None),
        ("falcon-7b", "shared"),
        ("falcon-40b", "separate"),
        ("falcon-11b", "shared"),
        ("falcon-behind", None),
        ("phi", "shared"),
        ("stablelm", None),
        ("stablelm-parallel", "shared"),
        ("cohere2", "shared"),
        ("llama3", None),
    ],
)
def test_how_attention_and_mlp_stand_to_each_other(name, expected):
    assert parse_config(FAMILIES[name].config).parallel == expected


def test_layers_that_must_be_listed_are_not_guessed():
    raw = {key: value for key, value in FAMILIES["cwm"].config.items() if key != "layer_types"}
    with pytest.raises(ConfigError, match="layer_types"):
        parse_config(raw)


def test_missing_sizes_are_errors():
    for key in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"):
        raw = {k: v for k, v in LLAMA.items() if k != key}
        with pytest.raises(ConfigError, match=key):
            parse_config(raw)


def test_every_unknown_key_is_listed_and_strict_false_lets_it_by():
    raw = LLAMA | {"novel_attention": True, "another_novelty": 3}
    with pytest.raises(ConfigError, match=r"another_novelty.*novel_attention"):
        parse_config(raw)
    assert parse_config(raw, strict=False) == parse_config(LLAMA)


def test_strict_false_does_not_excuse_bad_values():
    with pytest.raises(ConfigError, match=r"head_dim|even"):
        parse_config(LLAMA | {"head_dim": 9}, strict=False)


def test_an_unknown_key_inside_text_config_is_found():
    raw = copy.deepcopy(FAMILIES["gemma3-nested"].config)
    raw["text_config"]["novel_attention"] = True
    with pytest.raises(ConfigError, match="novel_attention"):
        parse_config(raw)


def test_parsing_leaves_the_dictionary_alone():
    for raw in CONFIGS.values():
        before = copy.deepcopy(raw)
        parse_config(raw)
        assert raw == before


@pytest.mark.parametrize("value", [5, None, "x", []])
def test_rope_parameters_of_a_layer_type_must_be_an_object(value):
    raw = copy.deepcopy(FAMILIES["gemma3-nested"].config)["text_config"] | {"model_type": "gemma3_text"}
    for name in ("full_attention", "sliding_attention"):
        both = {"full_attention": {"rope_type": "default"}, "sliding_attention": {"rope_type": "default"}}
        with pytest.raises(ConfigError, match=name):
            parse_config(raw | {"rope_parameters": both | {name: value}})


def test_an_error_is_one_short_line_whatever_the_file_holds():
    deep = value = []
    for _ in range(50):
        value.append([[0] * 1000])
        value = value[-1]
    for raw in ({"model_type": "x\n" * 10**6}, {"model_type": deep}, LLAMA | {"x" * 10**6: 1, "vocab_size": 3}):
        with pytest.raises(ConfigError) as caught:
            parse_config(raw)
        assert len(str(caught.value)) < 1000
        assert "\n" not in str(caught.value)


def test_file_errors(tmp_path):
    with pytest.raises(ConfigError, match=r"config\.json"):
        load_config(tmp_path)
    deep = '{"a": ' * 100 + "1" + "}" * 100
    long_number = json.dumps(LLAMA)[:-1] + ', "rope_theta": 1' + "0" * 5000 + "}"
    for content in ("{", "[1, 2]", "", "{}", "[" * 10**6, '{"a":' * 10**5, deep, long_number, '"\\ud800"'):
        (tmp_path / "config.json").write_text(content)
        with pytest.raises(ConfigError, match=r"config\.json"):
            load_config(tmp_path)
    for content in (b"\xff\xfe\x00", b" " * 2**23 + b"{}"):
        (tmp_path / "config.json").write_bytes(content)
        with pytest.raises(ConfigError, match=r"config\.json"):
            load_config(tmp_path)
    (tmp_path / "config.json").unlink()
    (tmp_path / "config.json").mkdir()
    with pytest.raises(ConfigError, match=r"config\.json is not a file"):
        load_config(tmp_path)


@pytest.mark.skipif(sys.platform == "win32", reason="no pipes in folders")
def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "config.json")
    with pytest.raises(ConfigError, match=r"config\.json is not a file"):
        load_config(tmp_path)


def test_numbers_no_float_holds_are_refused(tmp_path):
    for number in ("1e400", "-1e400", "NaN", "Infinity", "1" + "0" * 400):
        (tmp_path / "config.json").write_text(json.dumps(LLAMA)[:-1] + f', "rms_norm_eps": {number}}}')
        with pytest.raises(ConfigError, match="rms_norm_eps"):
            load_config(tmp_path)


def test_the_most_layers_a_config_may_name_are_built_in_a_second():
    """What `minillm memory` and `inspect` do without weights at hand."""
    config = parse_config(LLAMA | {"num_hidden_layers": 1024})
    started = time.thread_time()
    empty_decoder(config, torch.float32)
    assert time.thread_time() - started < 3  # 0.4 s on a quiet machine


@pytest.mark.parametrize(
    "content", ["[", "[1]", '{"eos_token_id": [[1]]}', '{"temperature": 1e400}', '{"top_k": {}}', '{"x": ' * 100]
)
def test_generation_defaults_that_cannot_be_used(content, tmp_path):
    (tmp_path / "generation_config.json").write_text(content)
    with pytest.raises(MinillmError, match=r"generation_config\.json"):
        generation_defaults(tmp_path, parse_config(LLAMA), None)


def test_biases_of_mistral_are_refused_and_of_llama_obeyed():
    assert parse_config(LLAMA | {"attention_bias": True, "mlp_bias": True}).mlp_bias
    mistral = PUBLISHED["Mistral-7B-v0.1"]
    for key in ("attention_bias", "mlp_bias"):
        assert parse_config(mistral | {key: False}) == parse_config(mistral)
        with pytest.raises(ConfigError, match=key):
            parse_config(mistral | {key: True})


def test_what_mistral_files_leave_out():
    """The first release says nothing of its eight key/value heads, window or positions."""
    left_out = ("sliding_window", "num_key_value_heads", "max_position_embeddings")
    raw = {key: value for key, value in PUBLISHED["Mistral-7B-v0.1"].items() if key not in left_out}
    config = parse_config(raw | {"num_attention_heads": 16, "head_dim": 8})
    theirs = reference_config(raw | {"num_attention_heads": 16, "head_dim": 8})
    assert config.num_kv_heads == theirs.num_key_value_heads == 8
    assert {layer.window for layer in config.layers} == {theirs.sliding_window} == {4096}
    assert config.max_positions == theirs.max_position_embeddings
