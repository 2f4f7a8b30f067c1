"""Which part of every tensor a rank (`parallel.py`) holds, and which bytes of the files that is."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from minillm.config import ModelConfig
from minillm.load.tensors import Destination, is_transposed
from minillm.parallel import Ranks


@dataclass(frozen=True)
class Share:
    """What a rank holds of a module's tensors, counted in the whole module."""

    rows: tuple[range, ...] | None = None  # outputs, ascending; None: all
    columns: range | None = None  # inputs; None: all


def share(config: ModelConfig, ranks: Ranks, module: str) -> Share:
    """What a rank holds of the module with this path in the decoder of the whole `config`.

    Where there are fewer key heads than ranks, several hold the same one.
    """
    D, q_size, kv_size = config.head_dim, config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    queries, hidden = _part(q_size, ranks), _part(config.intermediate_size, ranks)
    key_head, key_heads = ranks.rank * config.num_kv_heads // ranks.count, max(1, config.num_kv_heads // ranks.count)
    keys = range(key_head * D, (key_head + key_heads) * D)
    full = config.qk_norm == "full"
    return {
        "qkv": Share((queries, _shifted(keys, q_size), _shifted(keys, q_size + kv_size))),
        "q_norm": Share((queries,) if full else None),
        "k_norm": Share((keys,) if full else None),
        "output": Share(columns=queries),
        "gate_up": Share((hidden, _shifted(hidden, config.intermediate_size))),
        "up": Share((hidden,)),
        "down": Share(columns=hidden),
        "head": Share((ranks.vocabulary(config),)),
    }.get(module.rpartition(".")[2], Share())


def _part(size: int, ranks: Ranks) -> range:
    return range(ranks.rank * size // ranks.count, (ranks.rank + 1) * size // ranks.count)


def _shifted(numbers: range, by: int) -> range:
    return range(numbers.start + by, numbers.stop + by)


@dataclass(frozen=True)
class Cut:
    """What a rank reads of one tensor of a file."""

    runs: list[slice]  # of rows, as the file numbers them,
    row_dimension: int  # which this dimension of the tensor counts
    columns: slice | None  # of its other dimension; None: all
    order: Tensor | None  # of the rows read, to become ours; None: as they are
    transposed: bool  # the file's matrix is [inputs, outputs]

    def read(self, stored) -> Tensor:
        """The rank's part, in our order; `stored` is what safetensors' `get_slice` gives."""
        parts = []
        for run in self.runs:
            index = [slice(None)] * len(stored.get_shape())
            index[self.row_dimension] = run
            if self.columns is not None:
                index[1 - self.row_dimension] = self.columns
            parts.append(stored[tuple(index)])
        tensor = parts[0] if len(parts) == 1 else torch.cat(parts, dim=self.row_dimension)
        tensor = tensor if self.order is None else tensor.index_select(self.row_dimension, self.order)
        return (tensor.t() if self.transposed else tensor).contiguous()


def share_places(
    whole_places: dict[str, Destination], whole: nn.Module, mine: nn.Module, config: ModelConfig, ranks: Ranks
) -> tuple[dict[str, Destination], dict[str, Cut]]:
    """Of the places in the whole model: where each tensor goes in a rank's, and how those are cut that it shares.

    `config` is the whole model's; `whole` and `mine` are both decoders, with or without memory.
    """
    places, cuts = {}, {}
    for name, place in whole_places.items():
        part = share(config, ranks, place.module)
        if place.tensor == "bias" and mine.get_submodule(place.module).bias is None:
            continue  # a bias that another rank adds
        places[name] = place
        if part.rows is not None or part.columns is not None:
            cuts[name], start = _cut(place, part, whole.get_submodule(place.module), config)
            places[name] = replace(place, start=start, arrange=None)
    return places, cuts


def _cut(place: Destination, part: Share, module: nn.Module, config: ModelConfig) -> tuple[Cut, int]:
    """How a tensor is cut, and where its rows begin in the rank's own."""
    flat = len(place.shape) == 1
    transposed = not flat and is_transposed(config, place.module)
    dimension = 1 - place.dimension if transposed else place.dimension
    rows, start = torch.arange(place.shape[dimension]), place.start
    if place.arrange is not None and not transposed:
        rows = place.arrange(rows)  # at the place of each of our rows the number of the file's
    if part.rows is not None:
        wanted = torch.cat([torch.arange(run.start, run.stop) for run in part.rows])
        start = int((wanted < place.start).sum())
        rows = rows[wanted[(wanted >= place.start) & (wanted < place.start + len(rows))] - place.start]
    ascending, order = rows.sort()
    breaks = (ascending.diff() != 1).nonzero()[:, 0] + 1
    runs = [slice(int(run[0]), int(run[-1]) + 1) for run in ascending.tensor_split(breaks)]
    columns = None
    if part.columns is not None and not flat:
        size = place.shape[1 - dimension]  # inputs, or what is packed of them, or groups
        columns = slice(*(end * size // module.in_features for end in (part.columns.start, part.columns.stop)))
    return Cut(runs, dimension, columns, None if torch.equal(ascending, rows) else order.argsort(), transposed), start
