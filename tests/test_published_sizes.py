"""Published files of many families: each parses, and gives the published number of parameters."""

import copy
import math

import pytest
import torch
from families import reference_config
from published_sizes import SIZES

from minillm.load.config_json import parse_config
from minillm.load.families import FAMILIES
from minillm.measure.memory import parameter_count
from minillm.model import empty_decoder


@pytest.mark.parametrize("name", SIZES)
def test_published_number_of_parameters(name):
    raw, billions = SIZES[name]
    before = copy.deepcopy(raw)
    config = parse_config(raw)
    assert raw == before
    count = parameter_count(empty_decoder(config, torch.bfloat16))
    half = 0.51 * 10.0 ** -len(str(billions).partition(".")[2])  # of the last digit that is given
    assert math.isclose(count / 1e9, billions, abs_tol=half)


@pytest.mark.parametrize("name", [name for name, (raw, _) in SIZES.items() if "text_config" not in raw])
def test_parameters_are_counted_as_transformers_counts_them(name):
    import transformers

    raw, _ = SIZES[name]
    with torch.device("meta"):
        theirs = getattr(transformers, raw["architectures"][0].replace("MPT", "Mpt"))(reference_config(raw))
    config = parse_config(raw)
    # OPT's file has two rows of positions that nobody reads, and that are not loaded.
    unread = FAMILIES[config.family].position_rows * config.hidden_size
    expected = sum(p.numel() for p in theirs.parameters()) - unread
    assert parameter_count(empty_decoder(config, torch.float32)) == expected
