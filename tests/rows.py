"""A row of a request, for tests of the loops alone."""

from minillm.decode import Row
from minillm.tokenizer import TextStream


def new_row(prompt, config, budget, eos, tokenizer) -> Row:
    return Row(prompt, budget, eos, TextStream(tokenizer, prompt, config.stops))
