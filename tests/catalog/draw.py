"""draw: a token for each row, at which the sum of the probabilities passes the row's random number."""

import torch
from minillm_kernels.sampling import draw

from catalog.entry import Entry, Results


def draw_inputs(case: dict, dtype: torch.dtype, device, generator: torch.Generator) -> dict:
    """Always float32, whatever the activations are."""
    shape = case["shape"]
    probs = torch.rand(shape, generator=generator, device=device)
    probs = probs * (torch.rand(shape, generator=generator, device=device) < case.get("share", 1.0))
    seed, position = (
        torch.randint(low, 2**40, shape[:1], generator=generator, device=device, dtype=torch.int64)
        for low in (-(2**40), 0)
    )
    return {"probs": probs, "seed": seed, "position": position, "stream": case.get("stream", 0)}


def splitmix64(z: int) -> int:
    """SplitMix64's finaliser after one increment, on Python's own integers."""
    z = (z + 0x9E3779B97F4A7C15) % 2**64
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) % 2**64
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) % 2**64
    return z ^ (z >> 31)


def draw_reference(probs, seed, position, stream) -> Results:
    tokens = []
    for row, s, p in zip(probs.double(), seed.tolist(), position.tolist(), strict=True):
        u = (splitmix64(splitmix64(splitmix64(s % 2**64) ^ p % 2**64) ^ stream) >> 11) * 2.0**-53
        cumulative = row.cumsum(0)
        passed = (cumulative > u * cumulative[-1]).nonzero()
        tokens.append(int(passed[0]) if len(passed) else len(row) - 1)
    return (torch.tensor(tokens, dtype=torch.int64, device=probs.device),)


def draw_bounds(expected, **_) -> Results:
    """None: a border between two tokens is as good as never within 2^-44 of a random number."""
    return (torch.zeros_like(expected[0], dtype=torch.float64),)


ENTRY = Entry(
    op=draw,
    make_inputs=draw_inputs,
    reference=draw_reference,
    bounds=draw_bounds,
    bytes_moved=lambda probs, **_: probs.numel() * probs.element_size(),
    dtypes=("float32",),
    small_cases={
        "a few tokens": dict(shape=(7, 5)),
        "most are impossible": dict(shape=(6, 300), share=0.02, stream=1),
        "a long vocabulary": dict(shape=(5, 9001), stream=5),
        "one token": dict(shape=(2, 1)),
    },
    model_cases={
        "Llama-3, 1 row": dict(shape=(1, 128256)),
        "Llama-2, 16 rows": dict(shape=(16, 32000)),
    },
)
