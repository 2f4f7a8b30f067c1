"""A row of a request, and how to sample, for tests of the loop alone."""

from minillm.options import GenerationConfig
from minillm.row import Row
from minillm.sampling import Sampling
from minillm.tokenizer import TextStream


def sampling_of(seeds, device, **options) -> Sampling:
    """The same options of `GenerationConfig` for a row with each of these seeds."""
    return Sampling.of(GenerationConfig(**options), seeds, device)


def new_row(prompt, config, budget, eos, tokenizer, device="cpu", **options) -> Row:
    """`options` as for `sampling_of`, or fields of `Row`; a row has a seed of 0 unless one is given."""
    fields = {name: options.pop(name) for name in [*options] if name in Row.__dataclass_fields__}
    sampling = sampling_of([options.pop("seed", 0)], device, **options)
    return Row(prompt, budget, eos, TextStream(tokenizer, prompt, config.stops), sampling, **fields)
