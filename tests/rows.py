"""A row of a request, for tests of the loop alone."""

from minillm.row import Row
from minillm.sampling import Sampling
from minillm.tokenizer import TextStream


def new_row(prompt, config, budget, eos, tokenizer, device="cpu", **options) -> Row:
    """`options` as for `Sampling.uniform_rows`, or fields of `Row`; a row has a seed of 0 unless one is given."""
    fields = {name: options.pop(name) for name in [*options] if name in Row.__dataclass_fields__}
    sampling = Sampling.uniform_rows([options.pop("seed", 0)], device, **options)
    return Row(prompt, budget, eos, TextStream(tokenizer, prompt, config.stops), sampling, **fields)
