"""config.json -> ModelConfig, against what transformers' own config classes make of the same file."""

import copy
import dataclasses
import json

import pytest
from families import FAMILIES, reference_config
from published_configs import PUBLISHED

from minillm.errors import ConfigError
from minillm.load.config_json import load_config, parse_config

CONFIGS = PUBLISHED | {f"tiny {name}": family.config for name, family in FAMILIES.items()}


def windows_of(reference) -> list[int | None]:
    """The window of each layer as transformers' modelling code uses it."""
    if reference.model_type in ("llama", "gemma", "olmo2"):
        return [None] * reference.num_hidden_layers
    if reference.model_type in ("mistral", "phi3"):
        return [reference.sliding_window] * reference.num_hidden_layers
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
    assert ours.intermediate_size == theirs.intermediate_size
    assert ours.num_heads == theirs.num_attention_heads
    assert ours.num_kv_heads == theirs.num_key_value_heads
    head_dim = getattr(theirs, "head_dim", None) or theirs.hidden_size // theirs.num_attention_heads
    assert ours.head_dim == head_dim
    assert len(ours.layers) == theirs.num_hidden_layers
    assert ours.norm.eps == theirs.rms_norm_eps
    assert ours.tie_word_embeddings == bool(theirs.tie_word_embeddings)
    if "bos_token_id" in raw.get("text_config", raw):
        assert ours.bos_token_id == theirs.bos_token_id
    stated = [raw.get("eos_token_id"), raw.get("text_config", {}).get("eos_token_id")]  # union of sources
    eos = {id for ids in stated if ids is not None for id in (ids if isinstance(ids, list) else [ids])}
    assert set(ours.eos_token_ids) == eos
    assert ours.dtype == str(full.dtype).removeprefix("torch.")
    activation = getattr(theirs, "hidden_activation", None) or theirs.hidden_act
    assert ours.activation == {"silu": "silu", "gelu_pytorch_tanh": "gelu_tanh"}[activation]

    assert [layer.window for layer in ours.layers] == windows_of(theirs)
    scalar = getattr(theirs, "query_pre_attn_scalar", None) or head_dim
    assert {layer.query_scale for layer in ours.layers} == {scalar**-0.5}
    assert {layer.softcap for layer in ours.layers} == {getattr(theirs, "attn_logit_softcapping", None)}
    assert ours.final_softcap == getattr(theirs, "final_logit_softcapping", None)

    for layer, rope in zip(ours.layers, rope_parameters_of(theirs), strict=True):
        spec = ours.ropes[layer.rope]
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
    assert "rope_parameters" in raw.get("text_config", raw)  # it really is the other spelling
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
    ({"num_experts": 8}, "num_experts"),
    ({"logit_scale": 0.0625}, "logit_scale"),
    ({"hidden_act": "relu"}, "relu"),
    ({"hidden_act": "gelu"}, "gelu"),
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
]


@pytest.mark.parametrize(("change", "named"), REJECTED, ids=[json.dumps(change) for change, _ in REJECTED])
def test_bad_or_unknown_values_are_errors_that_name_them(change, named):
    raw = LLAMA | change
    with pytest.raises(ConfigError, match=named):
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


def test_file_errors(tmp_path):
    with pytest.raises(ConfigError, match=r"config\.json"):
        load_config(tmp_path)
    for content in ("{", "[1, 2]", ""):
        (tmp_path / "config.json").write_text(content)
        with pytest.raises(ConfigError, match=r"config\.json"):
            load_config(tmp_path)
    (tmp_path / "config.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match=r"config\.json"):
        load_config(tmp_path)
