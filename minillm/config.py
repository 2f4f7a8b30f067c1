"""What the decoder reads: one frozen `ModelConfig` with one `LayerSpec` per layer.

There is a single decoder (`model.py`) and nothing about a family reaches it but these values. `load/config_json.py`
makes them from a checkpoint's `config.json`.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class RopeSpec:
    """How positions turn into rotation angles (the arithmetic is in `rope.py`)."""

    theta: float  # base of the geometric series of wavelengths
    dim: int  # how many of a head's channels rotate: even, <= head_dim (partial rotary)
    kind: str = "default"  # default | linear | dynamic | llama3 | yarn | longrope | none: nothing turns
    factor: float = 1.0  # how far the context is stretched
    original_length: int = 0  # positions the model was trained on before stretching
    low_freq_factor: float = 1.0  # llama3: wavelengths longer than length / low are divided by factor
    high_freq_factor: float = 4.0  # llama3: wavelengths shorter than length / high stay
    beta_fast: float = 32.0  # yarn: rotations over the original context above which nothing changes
    beta_slow: float = 1.0  # yarn: rotations below which positions are interpolated
    truncate: bool = True  # yarn: round the two borders to whole channels
    mscale: float | None = None  # yarn: see rope.attention_scale
    mscale_all_dim: float | None = None
    attention_factor: float | None = None  # yarn, longrope: overrides the derived scale of cos and sin
    short_factor: tuple[float, ...] = ()  # longrope: a divisor per frequency, within original_length
    long_factor: tuple[float, ...] = ()  # longrope: the same, beyond it

    @property
    def follows_length(self) -> bool:
        """Whether the rotation depends on how long a text is planned to get."""
        return self.kind in ("dynamic", "longrope")


@dataclass(frozen=True)
class LayerSpec:
    """What differs from layer to layer."""

    window: int | None  # a query sees keys with position > its own - window; None: all before it
    rope: int  # index into ModelConfig.ropes
    query_scale: float  # attention scores are multiplied by this
    softcap: float | None  # scores become cap * tanh(scores / cap); None: left alone


@dataclass(frozen=True)
class NormSpec:
    """RMSNorm as a family computes it: x / rms(x) * (offset + weight); or LayerNorm, which centres x first."""

    eps: float
    offset: float = 0.0  # Gemma stores weight - 1
    multiply_in_fp32: bool = False  # Gemma, OLMo2: weight in fp32, then the cast; Llama: cast, then weight
    center: bool = False  # LayerNorm: x less its mean (always multiplied in fp32)
    bias: bool = False  # and with a bias at the end


@dataclass(frozen=True)
class ModelConfig:
    """Everything the decoder needs to know. Sizes are counts, not bytes."""

    family: str
    vocab_size: int  # rows of the embedding; may exceed the tokenizer's vocabulary (padding)
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_positions: int  # the longest sequence the model is meant for, scaling included
    layers: tuple[LayerSpec, ...]
    ropes: tuple[RopeSpec, ...]
    norm: NormSpec
    pre_norm: bool  # a norm before attention and MLP
    post_norm: bool  # a norm after them, before the residual sum
    parallel: str | None  # MLP beside attention, not behind it, with the same norm ("shared") or its own ("separate")
    qk_norm: str | None  # None | "head": over each head | "full": over the whole projection
    qkv_bias: bool
    output_bias: bool
    mlp_bias: bool
    activation: str  # "silu" | "gelu_tanh", and without a gate "gelu" | "relu" | "relu2"
    gated: bool  # the MLP multiplies activation(gate x) by up x; or it has no gate
    alibi_slopes: tuple[float, ...]  # scores fall by this for each position between query and key, per head; (): not
    learned_positions: bool  # a vector for each position is added to the embeddings
    embedding_scale: float  # embeddings are multiplied by this,
    rounded_scale: bool  # rounded to the model's dtype (Gemma) or not,
    embedding_norm: bool  # and normed (BLOOM)
    logit_scale: float  # and logits by this
    final_softcap: float | None
    head_bias: bool
    tie_word_embeddings: bool  # the head reads the embedding matrix
    nested: bool  # the decoder is the text half of a larger checkpoint (`text_config`)
    quantization: str | None  # the file holds quantized matrices: "int8", "int4-g64", ... (`minillm quantize`)
    quantized_head: bool  # and an int8 head
    dtype: str | None  # as the file says: "float32", "bfloat16" or "float16"
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]

    @property
    def num_layers(self) -> int:
        return len(self.layers)

    @property
    def windows(self) -> tuple[int | None, ...]:
        """The distinct windows, in order of first use; most models have one."""
        return tuple(dict.fromkeys(layer.window for layer in self.layers))
