"""The decoder: Norm, Attention, MLP, Block, Decoder, smallest first.

One class serves every family; what differs comes from `ModelConfig` as data. A forward pass takes
token ids, the position of each, and the cache: nothing else, no state kept between calls.

Shapes: B rows, T tokens of this step, d hidden_size, H query heads, KV key/value heads, D head_dim,
F intermediate_size, V vocab_size, S cache slots.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from minillm.attention import MATH, Backend, Rotary
from minillm.cache import KeyView, StaticCache
from minillm.config import LayerSpec, ModelConfig, NormSpec
from minillm.errors import ConfigError
from minillm.linear import Linear, QuantizedLinear, activate, make_linear, parse_quantize
from minillm.parallel import ALONE, Ranks
from minillm.rope import cos_sin

# Builds an empty projection: (in_features, out_features, bias) -> layer.
LinearFactory = Callable[[int, int, bool], Linear | QuantizedLinear]


@dataclass(frozen=True)
class Parts:
    """What the modules of a decoder are made of."""

    backend: Backend
    linear: LinearFactory
    head: LinearFactory
    dtype: torch.dtype
    ranks: Ranks = ALONE  # with whom the model is shared


class Norm(nn.Module):
    """A norm over the last dimension, as the backend computes it; x as it is where a family has none."""

    def __init__(self, size: int, spec: NormSpec, parts: Parts, present: bool = True, split: bool = False):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size, dtype=parts.dtype)) if present else None
        self.bias = nn.Parameter(torch.empty(size, dtype=parts.dtype)) if present and spec.bias else None
        self.spec, self.backend = spec, parts.ranks.across(parts.backend) if split else parts.backend

    def forward(self, x: Tensor) -> Tensor:
        return x if self.weight is None else self.backend.norm(x, self.weight, self.bias, self.spec)

    def add(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        """Add to the residual stream and norm the sum: (norm(x + residual), x + residual)."""
        return self.backend.add_norm(x, residual, self.weight, self.bias, self.spec)


class Attention(nn.Module):
    """Project to queries, keys and values; rotate; remember; attend; project back."""

    def __init__(self, config: ModelConfig, spec: LayerSpec, index: int, parts: Parts):
        super().__init__()
        self.num_heads, self.num_kv_heads, self.head_dim = config.num_heads, config.num_kv_heads, config.head_dim
        self.spec, self.index, self.backend, self.qk_norm = spec, index, parts.backend, config.qk_norm
        q_size, kv_size = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        self.split = (q_size, kv_size, kv_size)
        slopes = torch.tensor(config.alibi_slopes, dtype=torch.float32) if config.alibi_slopes else None  # [H]
        self.register_buffer("slopes", slopes, persistent=False)
        # One matrix for q, k and v: a decode step is bound by reading weights, and one read beats three.
        self.qkv = parts.linear(config.hidden_size, sum(self.split), config.qkv_bias)
        self.output = parts.linear(q_size, config.hidden_size, config.output_bias and parts.ranks.first)  # added once
        if self.qk_norm is not None:
            whole = self.qk_norm == "full"
            self.q_norm = Norm(q_size if whole else config.head_dim, config.norm, parts, split=whole)
            self.k_norm = Norm(kv_size if whole else config.head_dim, config.norm, parts, split=whole)

    def _apply(self, fn, recurse=True):
        """A cast like `.to(bfloat16)` leaves slopes alone, as integers: they multiply distances as long as the text."""
        if self.slopes is not None:
            self.slopes = self.slopes.view(torch.int32)
        super()._apply(fn, recurse)
        if self.slopes is not None:
            self.slopes = self.slopes.view(torch.float32)
        return self

    def forward(self, x: Tensor, rotary: Rotary, view: KeyView, cache: StaticCache) -> Tensor:
        B, T, _ = x.shape
        q, k, v = self.qkv(x).split(self.split, dim=-1)  # [B, T, H * D], [B, T, KV * D] twice
        if self.qk_norm == "full":
            q, k = self.q_norm(q), self.k_norm(k)
        q = q.reshape(B, T, self.num_heads, self.head_dim)
        k = k.reshape(B, T, self.num_kv_heads, self.head_dim)
        v = v.reshape(B, T, self.num_kv_heads, self.head_dim)
        if self.qk_norm == "head":
            q, k = self.q_norm(q), self.k_norm(k)
        keys, values = cache.keys[self.index], cache.values[self.index]  # [B, KV, S + 1, D]
        q, keys, values = self.backend.rotate_and_write(q, k, v, rotary, keys, values, view)  # q [B, T, H, D]
        attended = self.backend.attend(q, keys, values, view, self.spec, self.slopes)  # [B, T, H * D]
        return self.output(attended)  # [B, T, d]


class MLP(nn.Module):
    """Feed-forward: down(activation(gate x) * up x) (Shazeer 2020, GLU variants, arXiv:2002.05202), or without a gate
    down(activation(up x))."""

    def __init__(self, config: ModelConfig, parts: Parts):
        super().__init__()
        self.gated, self.activation = config.gated, config.activation
        if self.gated:
            self.gate_up = parts.linear(config.hidden_size, 2 * config.intermediate_size, config.mlp_bias)
        else:
            self.up = parts.linear(config.hidden_size, config.intermediate_size, config.mlp_bias)
        self.down = parts.linear(config.intermediate_size, config.hidden_size, config.mlp_bias and parts.ranks.first)

    def forward(self, x: Tensor) -> Tensor:
        if not self.gated:
            return self.down(activate(self.up(x), self.activation))  # [B, T, F] -> [B, T, d]
        # gate and up are one matrix, read once; the product of both comes out without a trip through memory.
        return self.down(self.gate_up.gated(x, self.activation))  # [B, T, F] -> [B, T, d]


class Block(nn.Module):
    """One layer: attention and MLP, each added to the residual stream, with norms before and/or after."""

    def __init__(self, config: ModelConfig, index: int, parts: Parts):
        super().__init__()
        norm = partial(Norm, config.hidden_size, config.norm, parts)
        self.attention_norm = norm(config.pre_norm)
        self.attention = Attention(config, config.layers[index], index, parts)
        self.attention_post_norm = norm(config.post_norm)
        self.mlp_norm = norm(config.pre_norm and config.parallel != "shared")
        self.mlp = MLP(config, parts)
        self.mlp_post_norm = norm(config.post_norm)
        self.parallel, self.ranks = config.parallel, parts.ranks

    def forward(
        self, x: Tensor, update: Tensor | None, rotary: Rotary, view: KeyView, cache: StaticCache
    ) -> tuple[Tensor, Tensor]:
        """x is the residual stream, update what the sublayer before adds to it: both `[B, T, d]`, in and out.

        The sum is left to the norm that follows, which has to read both anyway. Where ranks share the model, each has
        a part of what a sublayer adds, and `ranks.sum` makes it whole.
        """
        normed, x = (self.attention_norm(x), x) if update is None else self.attention_norm.add(update, x)
        attended = self.attention(normed, rotary, view, cache)
        if self.parallel is not None:  # both read the same stream, and their sum is added to it; no post-norms
            normed = normed if self.parallel == "shared" else self.mlp_norm(x)
            return x, self.ranks.sum(self.mlp_post_norm.add(attended, self.mlp(normed))[0])
        normed, x = self.mlp_norm.add(self.attention_post_norm(self.ranks.sum(attended)), x)
        return x, self.mlp_post_norm(self.ranks.sum(self.mlp(normed)))


class Decoder(nn.Module):
    """A causal language model over a `StaticCache`.

    Build it through `load.checkpoint.load_decoder`; built directly its weights are uninitialised.
    """

    at_once = 0  # decode steps that one call makes, see `faster.steps.Steps`; 0: choosing is not recorded

    def __init__(self, config: ModelConfig, parts: Parts):
        super().__init__()
        self.config, self.backend, self.ranks, dtype = config, parts.backend, parts.ranks, parts.dtype
        self.moves = 0  # how often all weights were moved or cast at once: `faster.steps` then records anew
        # Gemma multiplies by sqrt(d) rounded to the model's dtype, and was trained with that rounding.
        scale = torch.tensor(config.embedding_scale, dtype=dtype, device="cpu").item()
        self.embedding_scale = scale if config.rounded_scale else config.embedding_scale
        # from_pretrained: the plain constructor draws random weights, which on a meta device imports half of torch.
        embedding = torch.empty(config.vocab_size, config.hidden_size, dtype=dtype)
        self.embedding = nn.Embedding.from_pretrained(embedding, freeze=False)
        self.positions = None
        if config.learned_positions:
            learned = torch.empty(config.max_positions, config.hidden_size, dtype=dtype)
            self.positions = nn.Embedding.from_pretrained(learned, freeze=False)
        self.embedding_norm = Norm(config.hidden_size, config.norm, parts, config.embedding_norm)
        self.blocks = nn.ModuleList(Block(config, i, parts) for i in range(config.num_layers))
        self.norm = Norm(config.hidden_size, config.norm, parts)
        self.head = parts.head(config.hidden_size, len(self.ranks.vocabulary(config)), config.head_bias)
        if config.tie_word_embeddings and isinstance(self.head, Linear):  # a quantized head has its own copy
            self.head = self.ranks.tie(self.head, self.embedding)

    def forward(self, input_ids: Tensor, cache_position: Tensor, cache: StaticCache) -> Tensor:
        """Logits of the next token after every input token.

        Args:
            input_ids: `[B, T]` int64.
            cache_position: `[B, T]` int64, the position of each token in its row, ascending; -1 marks
                padding, which may stand anywhere and is neither stored nor seen.
            cache: holds the tokens before these; gains these. T <= cache.max_step.

        Returns `[B, T, V]` float32 (padding positions hold finite nonsense). Raises `CacheError` for a step that
        the cache cannot take.
        """
        with self.own_dtypes(), cache.writing(self, input_ids, cache_position):
            x, rotary = self.embed(input_ids, cache_position, cache)
            return self.logits(self.walk(x, rotary, cache_position, cache))

    def embed(self, input_ids: Tensor, cache_position: Tensor, cache: StaticCache) -> tuple[Tensor, list[Rotary]]:
        """What the blocks work on: embeddings `[B, T, d]`, and the angles of each rotary table."""
        x = self.embedding(input_ids)  # [B, T, d]
        if self.embedding_scale != 1.0:
            x = x * self.embedding_scale
        if self.positions is not None:
            x = x + self.positions(cache_position.clamp(min=0))  # [B, T, d]; of padding nobody sees it
        return self.embedding_norm(x), [cos_sin(table, cache_position) for table in cache.rotary]

    def walk(
        self,
        x: Tensor,
        rotary: list[Rotary],
        cache_position: Tensor,
        cache: StaticCache,
        bound: int | None = None,
        from_start: bool = False,
    ) -> Tensor:
        """Through all blocks and the last norm, `[B, T, d]` to `[B, T, d]`, within `cache.writing`: where all the time
        goes. `bound` and `from_start` as for `cache.view`."""
        views = {w: cache.view(cache_position, w, bound, from_start) for w in self.config.windows}
        update = None  # nothing stands before the first block
        for block, spec in zip(self.blocks, self.config.layers, strict=True):
            x, update = block(x, update, rotary[spec.rope], views[spec.window], cache)
        return self.norm.add(update, x)[0]

    def logits(self, hidden: Tensor) -> Tensor:
        """Project hidden states `[..., d]` to logits `[..., V]` in float32."""
        return self.finish(self.ranks.gather(self.head(hidden), self.config.vocab_size).float())

    def finish(self, logits: Tensor) -> Tensor:
        """What a family does to its logits `[..., V]` float32 at the very end."""
        cap, scale = self.config.final_softcap, self.config.logit_scale
        logits = logits if scale == 1.0 else logits * scale
        return logits if cap is None else cap * torch.tanh(logits / cap)

    @property
    def weight_bytes(self) -> int:
        """Bytes of all weights, a matrix that embedding and head share once."""
        return sum({id(tensor): tensor.nbytes for tensor in self._held()[1]}.values())

    def own_dtypes(self) -> AbstractContextManager:
        """Around arithmetic: only a decoder in training takes the dtypes that a caller's `torch.autocast` chooses."""
        device = self.embedding.weight.device.type
        foreign = torch.is_autocast_enabled(device) and not self.training
        return torch.autocast(device, enabled=False) if foreign else nullcontext()

    def _apply(self, fn, recurse=True):
        self.moves += 1
        return super()._apply(fn, recurse)

    def _held(self) -> tuple[list[nn.Module], list[Tensor]]:
        """All modules and their tensors, in a tenth of the time of `self.modules()`."""
        modules: list[nn.Module] = [self]
        for module in modules:  # the list grows while it is walked
            if module._modules:
                modules += module._modules.values()
        held = [named for module in modules for named in (module._parameters, module._buffers) if named]
        return modules, [tensor for named in held for tensor in named.values() if tensor is not None]

    def fingerprint(self) -> tuple:
        """Where the weights lie, how often each was written to, and last whether anybody has hooked a module: equal as
        long as the same is computed by a step that is replayed."""
        modules, tensors = self._held()
        versions = [0 if t.is_inference() else t._version for t in tensors]
        everywhere = nn.modules.module
        hooks = (everywhere._global_forward_hooks, everywhere._global_forward_pre_hooks)
        hooked = any(hooks) or any(m._forward_hooks or m._forward_pre_hooks for m in modules)
        return (*map(Tensor.data_ptr, tensors), *versions, hooked)


def empty_decoder(
    config: ModelConfig,
    dtype: torch.dtype,
    backend: Backend = MATH,
    quantize: str | None = None,
    quantize_head: bool = False,
    device: torch.device | str = "meta",
    ranks: Ranks = ALONE,
) -> Decoder:
    """The decoder with uninitialised weights; on the "meta" device without any memory behind them at all.

    `quantize` ("int8", "int4-g64", ...) is for the linear layers, `quantize_head` takes the output head to
    int8; embedding and norms stay in `dtype`. A checkpoint that is quantized already says both itself. `config` is the
    whole model's, of which a rank holds its share.
    """
    if config.quantization is not None:
        if quantize is not None or quantize_head:
            raise ConfigError(f"the checkpoint is quantized already ({config.quantization}): load it without quantize")
        quantize, quantize_head = config.quantization, config.quantized_head
    spec = parse_quantize(quantize)
    head_spec = parse_quantize("int8" if quantize_head else None)
    linear, head = (partial(make_linear, dtype=dtype, spec=one) for one in (spec, head_spec))
    config = ranks.narrow(config)
    with torch.device(device):
        return Decoder(config, Parts(backend, linear, head, dtype, ranks))
