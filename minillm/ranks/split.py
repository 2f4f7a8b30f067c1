"""What a rank holds: the answers of `parallel.Ranks` for a share of the model."""

from dataclasses import dataclass, replace

from torch import Tensor, nn

from minillm.config import ModelConfig
from minillm.errors import ConfigError
from minillm.linear import Linear, parse_quantize
from minillm.parallel import Ranks


@dataclass(frozen=True)
class Split(Ranks):
    """Number `rank` of `count`, which speaks with nobody: what such a rank would hold."""

    rank: int
    count: int

    def __deepcopy__(self, memo) -> "Split":
        return self

    def narrow(self, config: ModelConfig) -> ModelConfig:
        """Raises `ConfigError` for a number of ranks that does not divide the model."""
        if problem := _misfit(config, self.count):
            fitting = ", ".join(str(n) for n in range(1, config.num_heads + 1) if not _misfit(config, n))
            raise ConfigError(f"the model cannot be split over {self.count} ranks: {problem}; it can over {fitting}")
        heads = config.num_heads // self.count
        return replace(
            config,
            num_heads=heads,
            num_kv_heads=max(1, config.num_kv_heads // self.count),
            intermediate_size=config.intermediate_size // self.count,
            alibi_slopes=config.alibi_slopes[self.rank * heads : (self.rank + 1) * heads],
        )

    def vocabulary(self, config: ModelConfig) -> range:
        return self._ids(config.vocab_size)

    def tie(self, head: nn.Module, embedding: nn.Embedding) -> nn.Module:
        if self.count == 1:
            return super().tie(head, embedding)
        return TiedRows(embedding, self._ids(embedding.num_embeddings), head.bias)

    def _ids(self, size: int) -> range:
        """Of a vocabulary of this size: equal parts, the last one shorter where it is odd."""
        share = -(-size // self.count)
        return range(self.rank * share, min((self.rank + 1) * share, size))


def _misfit(config: ModelConfig, count: int) -> str | None:
    """Why a model cannot be split over so many ranks."""
    for name in ("num_heads", "intermediate_size"):
        if getattr(config, name) % count:
            return f"{name} {getattr(config, name)} is not a multiple of {count}"
    if config.num_kv_heads % count and count % config.num_kv_heads:
        return f"of num_kv_heads {config.num_kv_heads} and {count} neither divides the other"
    if (count - 1) * -(-config.vocab_size // count) >= config.vocab_size:
        return f"vocab_size {config.vocab_size} leaves nothing for the last one"
    stored = parse_quantize(config.quantization)
    for inputs in (config.num_heads * config.head_dim, config.intermediate_size):
        if stored is not None and stored.group_size and inputs // count % stored.group_size:
            return f"the file's groups of {stored.group_size} do not divide a share of {inputs} inputs"
    return None


class TiedRows(Linear):
    """A rank's part of a head that reads the embedding: some of its rows, wherever they lie."""

    def __init__(self, embedding: nn.Embedding, rows: range, bias: nn.Parameter | None):
        nn.Module.__init__(self)
        self.embedding, self.rows, self.bias = embedding, rows, bias

    @property
    def weight(self) -> Tensor:
        return self.embedding.weight[self.rows.start : self.rows.stop]  # [V / R, d]
