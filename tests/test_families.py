"""The tiny checkpoints themselves: do they run in transformers, and would a wrong decoder be noticed?"""

import json

import pytest
import torch

from families import (
    FAMILIES,
    load_reference,
    make_model,
    prompt_ids,
    reference_logits,
    seed_of,
)

PROMPT = prompt_ids(40, seed=1)
FEATURES = [(name, feature) for name, family in FAMILIES.items() for feature in family.features]


@pytest.mark.parametrize("name", FAMILIES)
def test_checkpoint_is_sharded_safetensors_and_loads_in_transformers(name, checkpoint):
    folder = checkpoint(name)
    shards = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"].values()
    assert len(set(shards)) > 1
    assert not list(folder.glob("*.bin"))
    logits = reference_logits(load_reference(folder), PROMPT)
    assert logits.isfinite().all()
    assert logits.std() > 0.5  # not a flat model: arg-maxima and differences mean something


@pytest.mark.parametrize("name", FAMILIES)
def test_noise_floor_is_far_below_the_parity_tolerance(name, checkpoint):
    """fp32 against fp64 of the same reference: what rounding alone does to these logits."""
    model = load_reference(checkpoint(name))
    single = reference_logits(model, PROMPT)
    double = reference_logits(model.double(), PROMPT)
    assert (single - double).abs().max() < 4e-5  # the parity tests allow 1e-4


@pytest.mark.parametrize("name, feature", FEATURES)
def test_feature_moves_the_logits(name, feature):
    """A hundred times the parity tolerance, or the parity test could not see the feature."""
    family = FAMILIES[name]
    plain = reference_logits(make_model(family.config, seed_of(name)), PROMPT)
    altered = make_model(family.with_changes(family.features[feature]), seed_of(name))
    assert (reference_logits(altered, PROMPT) - plain).abs().max() > 1e-2


@pytest.mark.parametrize("name", FAMILIES)
def test_every_weight_moves_the_logits(name, checkpoint):
    """Zeroing any one tensor of the text model changes the logits: none is decoration."""
    model = load_reference(checkpoint(name))
    plain = reference_logits(model, PROMPT)
    for parameter_name, parameter in model.named_parameters():
        if "vision" in parameter_name or "projector" in parameter_name:
            continue
        kept = parameter.detach().clone()
        with torch.no_grad():
            parameter.zero_()
        # Keys of a softmax may shift by a constant without effect, so a k bias may move them least.
        assert (reference_logits(model, PROMPT) - plain).abs().max() > 1e-2, parameter_name
        with torch.no_grad():
            parameter.copy_(kept)
