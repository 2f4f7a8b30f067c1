"""Rotary tables against transformers: inverse frequencies, attention scaling, angles, beyond the context."""

import copy

import pytest
import torch
from families import FAMILIES, reference_config
from published_configs import PUBLISHED

from minillm.load.config_json import parse_config
from minillm.rope import attention_scale, cos_sin, inverse_frequencies, rotary_table, rotate

ORIGINAL = 64
LENGTHS = [1, 16, 32, 33, 64, 65, 100, 511, 2048]  # below, at and beyond the original contexts
_SHORT = [1.0, 1.1, 1.3, 1.7, 2.0]
_LONG = [1.5, 2.0, 4.0, 8.0, 16.0]
VARIANTS = {
    "default": None,
    "linear": {"type": "linear", "factor": 4.0},
    "dynamic": {"type": "dynamic", "factor": 3.0},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    },
    "llama3 narrow": {
        "rope_type": "llama3",
        "factor": 32.0,
        "low_freq_factor": 0.5,
        "high_freq_factor": 1.5,
        "original_max_position_embeddings": 48,
    },
    "yarn": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
    "yarn betas": {
        "rope_type": "yarn",
        "factor": 2.0,
        "original_max_position_embeddings": 32,
        "beta_fast": 8.0,
        "beta_slow": 0.5,
    },
    "yarn not truncated": {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 32,
        "beta_fast": 4.0,
        "truncate": False,
    },
    "yarn mscale": {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 32,
        "mscale": 1.2,
        "mscale_all_dim": 0.7,
    },
    "yarn attention factor": {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 32,
        "attention_factor": 0.77,
    },
    "longrope": {
        "rope_type": "longrope",
        "factor": 4.0,
        "original_max_position_embeddings": 32,
        "short_factor": _SHORT,
        "long_factor": _LONG,
    },
    "longrope no factor": {
        "rope_type": "longrope",
        "original_max_position_embeddings": 32,
        "short_factor": _SHORT,
        "long_factor": _LONG,
    },
    "longrope attention factor": {
        "rope_type": "longrope",
        "original_max_position_embeddings": 32,
        "short_factor": _SHORT,
        "long_factor": _LONG,
        "attention_factor": 1.19,
    },
}


def llama_with(scaling: dict | None, theta: float = 1000.0) -> dict:
    """The tiny Llama (head_dim 10) with this rope_scaling; 64 stated positions."""
    return FAMILIES["llama2"].with_changes(
        {"rope_scaling": scaling, "rope_theta": theta, "max_position_embeddings": ORIGINAL}
    )


def reference_frequencies(config, seq_len: int, layer_type: str | None = None):
    """transformers' (inverse frequencies, attention scaling) for a text of seq_len tokens."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
    from transformers.models.gemma3.modeling_gemma3 import Gemma3RotaryEmbedding
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding
    from transformers.models.phi3.modeling_phi3 import Phi3RotaryEmbedding

    rope = config.rope_parameters[layer_type] if layer_type else config.rope_parameters
    if rope["rope_type"] == "default":
        owner = {"phi3": Phi3RotaryEmbedding, "gemma3_text": Gemma3RotaryEmbedding}
        embedding = owner.get(config.model_type, LlamaRotaryEmbedding)
        keywords = {"layer_type": layer_type} if layer_type else {}
        return embedding.compute_default_rope_parameters(config, **keywords)
    return ROPE_INIT_FUNCTIONS[rope["rope_type"]](config, "cpu", seq_len=seq_len, layer_type=layer_type)


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("theta", [2.0, 1000.0, 500000.0])  # at 2 yarn's ramp would end beyond the last channel
@pytest.mark.parametrize("variant", VARIANTS)
def test_variants_agree_with_transformers(variant, theta, length):
    raw = llama_with(VARIANTS[variant], theta)
    (spec,) = parse_config(copy.deepcopy(raw)).ropes
    expected, scale = reference_frequencies(reference_config(raw), length)
    # float32 powers and one or two divisions: a few units in the last place (2^-23 = 1.2e-7).
    torch.testing.assert_close(inverse_frequencies(spec, length), expected, rtol=1e-6, atol=0.0)
    assert attention_scale(spec) == pytest.approx(scale, rel=1e-12)


def test_variants_differ_from_each_other():
    """Or agreeing with the reference would prove nothing: each variant moves some frequency by over 1 %."""
    length = 100
    default = inverse_frequencies(parse_config(llama_with(None)).ropes[0], length)
    for variant, scaling in VARIANTS.items():
        if scaling is not None:
            frequencies = inverse_frequencies(parse_config(llama_with(scaling)).ropes[0], length)
            assert ((frequencies / default - 1).abs() > 0.01).any(), variant


def test_only_dynamic_and_longrope_depend_on_the_length():
    for variant, scaling in VARIANTS.items():
        (spec,) = parse_config(llama_with(scaling)).ropes
        same = torch.equal(inverse_frequencies(spec, 20), inverse_frequencies(spec, 300))
        assert same == (spec.kind not in ("dynamic", "longrope")), variant


@pytest.mark.parametrize("name", PUBLISHED)
@pytest.mark.parametrize("length", [10, 5000, 200000])
def test_published_models(name, length):
    raw = PUBLISHED[name]
    ours = parse_config(raw)
    theirs = reference_config(raw).get_text_config()
    nested = "full_attention" in theirs.rope_parameters
    for index, layer in enumerate(ours.layers):
        layer_type = theirs.layer_types[index] if nested else None
        expected, scale = reference_frequencies(theirs, length, layer_type)
        spec = ours.ropes[layer.rope]
        torch.testing.assert_close(inverse_frequencies(spec, length), expected, rtol=1e-6, atol=0.0)
        assert attention_scale(spec) == pytest.approx(scale, rel=1e-12)


def turned(x, table, position):
    """x [B, T, H, D] rotated by the angles at position [B, T]."""
    return rotate(x, *(part[:, :, None] for part in cos_sin(table, position)))


@pytest.mark.parametrize("variant", ["default", "yarn", "longrope"])
def test_rotation_agrees_with_transformers(variant):
    """cos, sin and the rotation of q, far beyond the original context."""
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

    raw = llama_with(VARIANTS[variant])
    config = parse_config(raw)
    length = 300
    q = torch.randn(1, length, 3, config.head_dim, generator=torch.Generator().manual_seed(0))  # [B, T, H, D]
    position = torch.arange(length)[None]  # [1, T]
    table = rotary_table(config.ropes[0], [length], "cpu")
    ours = turned(q, table, position)

    embedding = LlamaRotaryEmbedding(reference_config(raw))
    cos, sin = embedding(q, position)
    theirs, _ = apply_rotary_pos_emb(q, q, cos, sin, unsqueeze_dim=2)
    # An angle of 300 radians has a float32 spacing of 3e-5; both sides round the same product.
    torch.testing.assert_close(ours, theirs, rtol=0.0, atol=1e-4)


def test_partial_rotation_leaves_the_rest_alone():
    config = parse_config(FAMILIES["phi4-mini"].config)
    (spec,) = config.ropes
    assert (spec.dim, config.head_dim) == (12, 16)
    q = torch.randn(1, 5, 2, 16)
    table = rotary_table(spec, [5], "cpu")
    rotated = turned(q, table, torch.arange(5)[None])
    assert torch.equal(rotated[..., 12:], q[..., 12:])
    assert not torch.allclose(rotated[:, 1:, :, :12], q[:, 1:, :, :12])
    # A rotation keeps lengths, up to longrope's factor on cos and sin.
    expected = q[..., :12].norm(dim=-1) * attention_scale(spec)
    torch.testing.assert_close(rotated[..., :12].norm(dim=-1), expected)


@pytest.mark.parametrize("variant", ["dynamic", "longrope"])
def test_rows_have_their_own_clock(variant):
    """Two rows planned for different lengths get different frequencies, each its own."""
    (spec,) = parse_config(llama_with(VARIANTS[variant])).ropes
    table = rotary_table(spec, [20, 400], "cpu")
    position = torch.tensor([[7], [7]])
    cos, _ = cos_sin(table, position)
    for row, length in enumerate((20, 400)):
        alone = rotary_table(spec, [length], "cpu")
        torch.testing.assert_close(cos[row : row + 1], cos_sin(alone, position[:1])[0])
    assert not torch.allclose(cos[0], cos[1])


def test_score_depends_on_the_distance_only():
    (spec,) = parse_config(llama_with(None)).ropes
    table = rotary_table(spec, [64], "cpu")
    q, k = torch.randn(2, 1, 1, 1, 10)

    def score(query_position, key_position):
        pairs = ((q, query_position), (k, key_position))
        first, second = (turned(x, table, torch.tensor([[p]])) for x, p in pairs)
        return (first * second).sum()

    torch.testing.assert_close(score(20, 13), score(50, 43), rtol=1e-4, atol=1e-5)
    assert (score(20, 13) - score(20, 12)).abs() > 1e-4
