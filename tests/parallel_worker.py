"""What test_parallel.py runs on every rank: `torchrun ... parallel_worker.py JOBS OUT`.

JOBS is a JSON list of [name of a function below, its keywords]; what rank r gets from job n is saved as `OUT/n.r.pt`. An
error is a result as well: its type and text.
"""

import json
import sys
from dataclasses import astuple
from pathlib import Path

import torch

from minillm.errors import MinillmError
from minillm.load.checkpoint import load_decoder
from minillm.load.config_json import load_config
from minillm.parallel import ALONE, join

ROWS = (11, 3, 7)  # tokens of ragged rows: beyond a window of 9


@torch.inference_mode()
def ragged_logits(model) -> torch.Tensor:
    """Logits [T, V] of ragged rows: a step with padding, then three single tokens for each row."""
    from minillm.cache import StaticCache

    generator = torch.Generator().manual_seed(5)
    config = model.config
    ids = torch.randint(4, config.vocab_size, (len(ROWS), max(ROWS) + 3), generator=generator)  # [B, T]
    cache = StaticCache(config, len(ROWS), 24, dtype=model.embedding.weight.dtype)
    place = torch.arange(max(ROWS))[None]  # [1, T]
    lengths = torch.tensor(ROWS)[:, None]  # [B, 1]
    position = torch.where(place < lengths, place, -1)  # [B, T]
    logits = [model(ids[:, : max(ROWS)], position, cache)[position >= 0]]
    for step in range(3):
        logits.append(model(ids[:, max(ROWS) + step, None], lengths + step, cache)[:, 0])
    return torch.cat(logits)


def forward(folder: str, ranks=None, dtype: str = "float32", **options):
    """Logits as above, and the weights that the rank holds."""
    config = load_config(folder)
    model = load_decoder(folder, config, getattr(torch, dtype), ranks=ranks or ALONE, **options)
    held = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return ragged_logits(model), {name: tensor.clone() for name, tensor in held.items()}


def main(jobs: str, out: str) -> None:
    torch.set_num_threads(1)
    ranks = join(torch.device("cpu"))
    for number, (name, keywords) in enumerate(json.loads(Path(jobs).read_text())):
        try:
            result = globals()[name](ranks=ranks, **keywords)
        except MinillmError as error:
            result = f"{type(error).__name__}: {error}"
        torch.save(result, Path(out) / f"{number}.{ranks.rank}.pt")


if __name__ == "__main__":
    main(*sys.argv[1:])
