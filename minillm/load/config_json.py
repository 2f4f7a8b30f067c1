"""`config.json` -> `ModelConfig`.

What a family such as Gemma or Qwen needs comes from its row in `families.py`. The reader below accepts both spellings
found in the wild (`rope_theta` + `rope_scaling`, or the newer `rope_parameters`; `sliding_window_pattern` or
`layer_types`; a nested `text_config`), checks every range, and refuses a key it does not understand: a silent default
is how a model ends up subtly worse than the one its authors trained.
"""

from pathlib import Path
from typing import Any

from minillm.config import LayerSpec, ModelConfig, NormSpec, RopeSpec
from minillm.errors import CheckpointError, ConfigError, RequestError, shown
from minillm.load.families import FAMILIES, Family
from minillm.load.files import read_json
from minillm.load.keys import HARMLESS, NEUTRAL, REFUSED
from minillm.load.reader import LARGEST, Reader
from minillm.options import DTYPES, QUANTIZED_FORMATS, GenerationConfig

_MOST_LAYERS = 1024
_ROPE_KINDS = ("default", "linear", "dynamic", "llama3", "yarn", "longrope", "su")  # Phi-3's first name of longrope
# RoPE parameters that say nothing of text: one position for all three axes of an image, and what `_read` looks at.
_MULTIMODAL = ("mrope_section", "mrope_interleaved", "llama_4_scaling_beta", "max_position_embeddings")


def load_config(folder: str | Path, strict: bool = True) -> ModelConfig:
    """Read `folder/config.json`. See `parse_config`."""
    path = Path(folder) / "config.json"
    raw = read_json(path, ConfigError)
    if not raw:
        raise ConfigError(f"{path} does not exist or is empty: a checkpoint folder holds a config.json")
    return parse_config(raw, strict=strict)


def parse_config(raw: dict[str, Any], strict: bool = True) -> ModelConfig:
    """Turn the dictionary of a supported `config.json` into a `ModelConfig`.

    Raises `ConfigError` naming the key for an unsupported family, a value out of range, two spellings
    that contradict each other, or a key this reader does not understand. `strict=False` lets keys
    nobody here has heard of pass (the result may then differ from the model's authors' intent).
    """
    nested = isinstance(raw.get("text_config"), dict)
    text = raw
    if isinstance(raw.get("attn_config"), dict):
        text = raw["attn_config"] | {key: value for key, value in raw.items() if key != "attn_config"}
    if nested:
        # The outer file describes a vision tower as well; the decoder is entirely in text_config.
        outer = {key: raw[key] for key in ("dtype", "torch_dtype", "quantization_config") if key in raw}
        text = outer | {"model_type": f"{raw.get('model_type')}_text"} | raw["text_config"]
        ids = [*token_ids(text.get("eos_token_id"), "text_config.eos_token_id")]
        ids += token_ids(raw.get("eos_token_id"), "eos_token_id")
        text["eos_token_id"] = list(dict.fromkeys(ids))
        if raw.get("tie_word_embeddings") is not None:
            text["tie_word_embeddings"] = raw["tie_word_embeddings"]  # the head belongs to the outer model
    for why, names in REFUSED.items():
        if text.get("model_type") in names.split():
            raise ConfigError(f"config.json: model_type {text['model_type']!r} {why}")
    model_type = Reader(text, {}).one_of(FAMILIES, "model_type")
    family = FAMILIES[model_type]
    reader = Reader(text, family.defaults, spelled=family.spelled)
    config = _read(reader, model_type, family, nested)
    unread = sorted(set(text) - reader.seen - HARMLESS - set(family.ignored.split()))
    for key in [key for key in unread if key in NEUTRAL]:
        if text[key] not in (None, NEUTRAL[key]):
            raise ConfigError(f"config.json: {key} = {shown(text[key])} is not supported for {model_type}")
        unread.remove(key)
    if unread and strict:
        raise ConfigError(
            f"config.json: not understood: {', '.join(map(shown, unread[:20]))}. A key that changes the computation "
            "must not be ignored; pass strict=False if you know these do not"
        )
    return config


def _read(reader: Reader, model_type: str, family: Family, nested: bool) -> ModelConfig:
    num_layers = reader.integer("num_hidden_layers", maximum=_MOST_LAYERS)
    hidden_size = reader.integer("hidden_size")
    num_heads = reader.integer("num_attention_heads")
    num_kv_heads = reader.integer("num_key_value_heads", optional=True) or num_heads
    if "multi_query" in family.defaults:
        shared = reader.flag("multi_query")
        if not (family.parallel == "stated" and reader.flag("new_decoder_architecture")):
            num_kv_heads = 1 if shared else num_heads
    head_dim = reader.integer("head_dim", optional=True)
    if head_dim is None:
        if hidden_size % num_heads:
            raise ConfigError(
                f"config.json: hidden_size {hidden_size} is not a multiple of num_attention_heads {num_heads} "
                "and no head_dim is given"
            )
        head_dim = hidden_size // num_heads
    if num_heads % num_kv_heads:
        raise ConfigError(
            f"config.json: num_attention_heads {num_heads} is not a multiple of num_key_value_heads {num_kv_heads}"
        )
    if num_heads * head_dim > LARGEST:
        raise ConfigError(f"config.json: num_attention_heads {num_heads} of head_dim {head_dim} are over {LARGEST}")
    if reader.integer("word_embed_proj_dim", default=hidden_size) != hidden_size:
        raise ConfigError(f"config.json: word_embed_proj_dim other than hidden_size {hidden_size} is not supported")
    max_positions = reader.integer("max_position_embeddings")
    ropes = _ropes(reader, family, head_dim, max_positions)
    # Files of these kinds may state the unstretched length; Gemma 3's state the stretched one.
    if ropes[0].kind in ("linear", "dynamic", "yarn") and not family.local_rope:
        max_positions = max(max_positions, int(ropes[0].original_length * ropes[0].factor))
    scaling = reader.table("rope_parameters") or reader.table("rope_scaling") or {}
    if scaling.get("llama_4_scaling_beta"):
        # Queries grow with their position beyond the original length, and are what they are within it.
        max_positions = ropes[0].original_length
    scalar = reader.number("query_pre_attn_scalar", default=head_dim) if family.softcaps else head_dim
    softcap = reader.number("attn_logit_softcapping", optional=True) if family.softcaps else None
    scale, embedding_scale = scalar**-0.5, hidden_size**0.5 if family.scaled_embedding else 1.0
    eps, logit_scale = reader.number("rms_norm_eps", default=1e-6), 1.0
    if family.multipliers:
        # x + m f(norm(x)), layer after layer, is m times what y + f(norm(y)) makes of x / m; and the norm of m y with
        # eps is the norm of y with eps / m^2. So m costs nothing.
        residual = reader.number("residual_multiplier", default=1.0)
        embedding_scale, eps = reader.number("embedding_multiplier", default=1.0) / residual, eps / residual**2
        scale = reader.number("attention_multiplier", default=1.0)
        logit_scale = 1 / reader.number("logits_scaling", default=1.0)
    if "logit_scale" in family.defaults:
        logit_scale = reader.number("logit_scale")
    slopes: tuple[float, ...] = ()
    if family.alibi or family.parallel == "stated":
        if reader.flag("alibi", default=family.alibi):
            # Falcon adds them before it scales.
            factor = 1.0 if family.alibi else scale
            slopes = tuple(factor * slope for slope in alibi_slopes(num_heads))
        elif family.alibi:
            raise ConfigError(f"config.json: alibi = false is not supported for {model_type}")
    windows = _windows(reader, family, num_layers)
    rotates = [False] * num_layers if slopes else _rotates(reader, family, windows)
    if not all(rotates):
        ropes = (*(ropes if any(rotates) else ()), RopeSpec(theta=1e4, dim=2, kind="none"))
    layers = [
        LayerSpec(
            window,
            rope=len(ropes) - 1 if not rotated else 1 if family.local_rope and window else 0,
            query_scale=scale,
            softcap=softcap,
        )
        for window, rotated in zip(windows, rotates, strict=True)
    ]
    dtypes = {prefix + name: name for prefix in ("", "torch.") for name in DTYPES}

    def bias(of: bool | str) -> bool:
        return reader.flag(of) if isinstance(of, str) else of

    return ModelConfig(
        family=model_type,
        vocab_size=reader.integer("vocab_size"),
        hidden_size=hidden_size,
        intermediate_size=reader.integer("intermediate_size", default=None if family.gated else 4 * hidden_size),
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        max_positions=max_positions,
        layers=tuple(layers),
        ropes=ropes,
        norm=NormSpec(
            eps, family.norm_offset, family.norm_in_fp32 or family.layer_norm, family.layer_norm, family.norm_bias
        ),
        pre_norm=family.pre_norm,
        post_norm=family.post_norm,
        parallel=_parallel(reader, family),
        qk_norm=family.qk_norm,
        qkv_bias=bias(family.qkv_bias),
        output_bias=bias(family.output_bias),
        mlp_bias=bias(family.mlp_bias),
        activation=_activation(reader, family),
        gated=family.gated,
        alibi_slopes=slopes,
        learned_positions=family.learned_positions,
        embedding_scale=embedding_scale,
        embedding_norm=family.embedding_norm,
        rounded_scale=family.scaled_embedding,
        logit_scale=logit_scale,
        final_softcap=reader.number("final_logit_softcapping", optional=True) if family.softcaps else None,
        head_bias=family.head_bias,
        tie_word_embeddings=reader.flag("tie_word_embeddings"),
        nested=nested,
        **_quantization(reader),
        dtype=dtypes.get(reader.one_of(dtypes, "dtype", "torch_dtype", optional=True)),
        bos_token_id=reader.integer("bos_token_id", optional=True, minimum=0),
        eos_token_ids=token_ids(reader.get("eos_token_id"), "config.json: eos_token_id"),
    )


def _windows(reader: Reader, family: Family, num_layers: int) -> list[int | None]:
    """The sliding window of each layer: by name where `layer_types` lists them, else by the family's rule."""
    window = reader.integer("sliding_window", optional=True)
    first_window = reader.integer("max_window_layers", default=num_layers, minimum=0)
    if family.windows == "from_layer" and not reader.flag("use_sliding_window"):
        window = None
    names = reader.get("layer_types")
    reader.get("sliding_window_pattern", "_sliding_window_pattern")  # of no interest (and "LLLG") beside a list
    if names is None and family.windows != "listed":
        pattern = reader.integer("sliding_window_pattern", "_sliding_window_pattern", default=1)
        slides = {
            "none": lambda layer: False,
            "all": lambda layer: True,
            "from_layer": lambda layer: layer >= first_window,
            "pattern": lambda layer: (layer + 1) % pattern != 0,
        }[family.windows]
        return [window if slides(layer) else None for layer in range(num_layers)]
    kinds = ("full_attention", "sliding_attention", "attention")
    if not isinstance(names, list) or len(names) != num_layers or any(name not in kinds for name in names):
        raise ConfigError(
            f"config.json: layer_types must name full_attention or sliding_attention for each of {num_layers} "
            f"layers, not {shown(names)}"
        )
    if "sliding_attention" in names and window is None:
        raise ConfigError("config.json: layer_types has sliding_attention but sliding_window is null")
    return [window if name == "sliding_attention" else None for name in names]


def alibi_slopes(heads: int) -> tuple[float, ...]:
    """Of n heads, a power of two, 2 ** (-8 / n) and its powers down to 2 ** -8; of another number, what n heads have
    and then every second of 2 n (Press et al. 2022, arXiv:2108.12409)."""
    power = 1 << heads.bit_length() - 1  # the largest up to `heads`

    def slopes(count: int) -> list[float]:
        return [2.0 ** (-8 * (head + 1) / count) for head in range(count)]

    return tuple((slopes(power) + slopes(2 * power)[::2])[:heads])


def _parallel(reader: Reader, family: Family) -> str | None:
    """Whether attention and MLP read the same stream, and through how many norms."""
    if family.parallel is None:
        return None
    norms = family.parallel
    if norms == "stated":
        newer = reader.flag("new_decoder_architecture")
        count = reader.integer("num_ln_in_parallel_attn", default=2 if newer else 1, maximum=2)
        norms = "separate" if newer and count == 2 else "shared"
    return norms if reader.flag("parallel", default=True) else None


def _rotates(reader: Reader, family: Family, windows: list[int | None]) -> list[bool]:
    """Which layers rotate their queries and keys."""
    if family.rotates == "listed":
        interval = reader.integer("no_rope_layer_interval", default=4)
        listed = reader.get("no_rope_layers")  # its name says the opposite: 1 where the layer rotates
        if listed is None:
            return [(layer + 1) % interval != 0 for layer in range(len(windows))]
        if not isinstance(listed, list) or len(listed) < len(windows) or any(flag not in (0, 1) for flag in listed):
            raise ConfigError(f"config.json: no_rope_layers must list 0 or 1 for each layer, not {shown(listed)}")
        return [flag == 1 for flag in listed[: len(windows)]]
    if family.rotates == "stated":
        return [reader.one_of(("rope", "nope"), "position_embedding_type", default="nope") == "rope"] * len(windows)
    if family.rotates == "none":
        return [False] * len(windows)
    if family.rotates == "sliding":
        return [window is not None for window in windows]
    sliding_only = family.rotates == "windowed" and reader.get("sliding_window") is not None
    return [window is not None or not sliding_only for window in windows]


def _ropes(reader: Reader, family: Family, head_dim: int, max_positions: int) -> tuple[RopeSpec, ...]:
    """The rotary tables: one, or (global, local) where sliding layers have their own."""
    original = reader.integer("original_max_position_embeddings", optional=True)
    theta = reader.number("rope_theta", default=1e4)
    partial = reader.number("partial_rotary_factor", default=1.0)
    common = dict(rope_theta=theta, partial_rotary_factor=partial, original_max_position_embeddings=original)
    local = common | dict(rope_theta=reader.number("rope_local_base_freq", default=theta))
    scaling, newer = reader.table("rope_scaling"), reader.table("rope_parameters")
    if newer is None:
        tables = [common | (scaling or {}), local]
    elif family.local_rope and "full_attention" in newer:
        by_layer = [newer["full_attention"], newer.get("sliding_attention", {})]
        if not all(isinstance(table, dict) for table in by_layer):
            raise ConfigError(f"config.json: rope_parameters must hold an object per layer type, not {shown(newer)}")
        tables = [common | table for table in by_layer]
    else:
        if "rope_theta" in reader.raw and newer.get("rope_theta", theta) != theta:
            raise ConfigError(
                f"config.json: rope_theta {theta} contradicts rope_parameters.rope_theta {shown(newer['rope_theta'])}"
            )
        tables = [common | newer, local]
    return tuple(_rope(table, head_dim, max_positions) for table in tables[: 1 + family.local_rope])


def _rope(table: dict[str, Any], head_dim: int, max_positions: int) -> RopeSpec:
    values = Reader(table, {}, where="RoPE parameters")
    kind = values.one_of(_ROPE_KINDS, "rope_type", "type", default="default")
    kind = "longrope" if kind == "su" else kind
    dim = int(head_dim * values.number("partial_rotary_factor", default=1.0))
    if dim % 2 or not 0 < dim <= head_dim:
        raise ConfigError(f"config.json: {dim} rotary channels of a head of {head_dim}: must be even and fit")
    if kind == "dynamic" and dim == 2:
        raise ConfigError("config.json: dynamic RoPE needs more than 2 rotary channels")
    original = values.integer("original_max_position_embeddings", default=max_positions, minimum=2)
    # A file that stretches the context without saying how far means max / original.
    factors = {"default": 1.0, "yarn": max_positions / original, "longrope": max_positions / original}
    values.seen.update(_MULTIMODAL)
    lists = {}
    for name in ("short_factor", "long_factor"):
        entries = values.get(name)
        if kind != "longrope":
            continue  # other kinds may list them, and have no use for them
        if not isinstance(entries, list) or len(entries) != dim // 2:
            raise ConfigError(f"config.json: longrope {name} must list {dim // 2} positive numbers")
        each = Reader({f"{name}[{i}]": entry for i, entry in enumerate(entries)}, {}, where="RoPE parameters")
        lists[name] = tuple(each.number(entry) for entry in each.raw)
    spec = RopeSpec(
        # One clock for all channels, or one that runs backwards, was never trained.
        theta=values.number("rope_theta", minimum=1.001),
        dim=dim,
        kind=kind,
        factor=values.number("factor", default=factors.get(kind), maximum=1e6),
        original_length=original,
        low_freq_factor=values.number("low_freq_factor", default=None if kind == "llama3" else 1.0),
        high_freq_factor=values.number("high_freq_factor", default=None if kind == "llama3" else 4.0),
        beta_fast=values.number("beta_fast", default=32.0),
        beta_slow=values.number("beta_slow", default=1.0),
        truncate=values.flag("truncate", default=True),
        mscale=values.number("mscale", optional=True, minimum=0.0),
        mscale_all_dim=values.number("mscale_all_dim", optional=True, minimum=0.0),
        attention_factor=values.number("attention_factor", optional=True),
        **lists,
    )
    if kind == "llama3" and not spec.low_freq_factor < spec.high_freq_factor:
        raise ConfigError(f"config.json: low_freq_factor {spec.low_freq_factor} must be below high_freq_factor")
    if unknown := sorted(set(table) - values.seen):
        raise ConfigError(f"config.json: RoPE parameters not understood: {', '.join(map(shown, unknown))}")
    return spec


def _activation(reader: Reader, family: Family) -> str:
    names = {"silu": "silu", "swish": "silu", "gelu_pytorch_tanh": "gelu_tanh", "gelu_new": "gelu_tanh"}
    if not family.gated:
        names |= {"gelu_fast": "gelu_tanh", "gelu": "gelu", "relu": "relu", "relu2": "relu2"}
    if family.gelu_means_tanh:
        names["gelu"] = "gelu_tanh"  # Gemma's first files say "gelu"; the model was trained with tanh
    older = reader.one_of(names, "hidden_act", default="silu")
    return names[reader.one_of(names, "hidden_activation", default=older)]  # Gemma renamed the key


def _quantization(reader: Reader) -> dict[str, Any]:
    table = reader.get("quantization_config")
    if table is None:
        return dict(quantization=None, quantized_head=False)
    method = table.get("quant_method") if isinstance(table, dict) else table
    if method != "minillm":
        raise ConfigError(
            f"config.json: quantization_config of {shown(method)} is not supported: give the unquantized checkpoint "
            'and quantize it here (quantize="int8", or `minillm quantize`)'
        )
    values = Reader(table, {}, where="quantization_config")
    return dict(quantization=values.one_of(QUANTIZED_FORMATS, "format"), quantized_head=values.flag("head"))


def token_ids(value: Any, where: str) -> tuple[int, ...]:
    """A token id, a list of them, or nothing, as a tuple; `where` names the source in the error."""
    ids = [] if value is None else value if isinstance(value, list | tuple) else [value]
    if not all(type(token) is int and 0 <= token < 2**31 for token in ids):
        raise ConfigError(f"{where} must be a token id or a list of them, not {shown(value)}")
    return tuple(ids)


def generation_defaults(folder: Path, config: ModelConfig, tokenizer_eos: int | None) -> GenerationConfig:
    """The checkpoint's own sampling defaults, and the union of every EOS id it names anywhere."""
    path = folder / "generation_config.json"
    raw = read_json(path, CheckpointError)
    eos = [*config.eos_token_ids, *token_ids(raw.get("eos_token_id"), f"{path}: eos_token_id")]
    if tokenizer_eos is not None:
        eos.append(tokenizer_eos)
    names = ("do_sample", "temperature", "top_k", "top_p", "min_p", "repetition_penalty", "max_new_tokens")
    values = {name: raw[name] for name in names if raw.get(name) is not None}
    try:
        return GenerationConfig(**values, eos_token_id=list(dict.fromkeys(eos)))
    except RequestError as error:
        raise CheckpointError(f"{path}: {error}") from None
