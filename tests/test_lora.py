"""Adapters: PEFT's are computed as PEFT does, merged and beside; ours are PEFT's; what they are trained through is exact."""

import pytest
import torch
from families import FAMILIES, load_reference, prompt_ids, reference_logits

from minillm.cache import StaticCache
from minillm.load.checkpoint import load_decoder
from minillm.load.config_json import load_config
from minillm.load.lora import load_adapted
from minillm.train.attention import PACKED
from minillm.train.lora import add_lora, save_adapter

IDS = prompt_ids(12, seed=1)


def our_logits(model):
    cache = StaticCache(model.config, 1, 16, dtype=model.embedding.weight.dtype)
    return model(torch.tensor([IDS]), torch.arange(len(IDS))[None], cache)[0]


def trainable(folder, quantize=None, dtype=torch.float32):
    return load_decoder(folder, load_config(folder), dtype, attention=PACKED, quantize=quantize)


def drawn(model, seed=0):
    """As after some training: B is not 0."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(".B.weight"):
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


def matrices(reference):
    """The names, below a block, of the linear layers of a transformers model's decoder."""
    from transformers.pytorch_utils import Conv1D

    linear = [n for n, m in reference.named_modules() if isinstance(m, torch.nn.Linear | Conv1D)]
    return [n for n in linear if ("vision" not in n and "projector" not in n and ".0." in n + ".") or ".1." in n]


@pytest.mark.parametrize("name", FAMILIES)
def test_theirs_and_ours(name, checkpoint, tmp_path):
    peft = pytest.importorskip("peft")
    source = checkpoint(name)
    model = trainable(source)
    add_lora(model, 3, 5.0)
    drawn(model)
    save_adapter(model, tmp_path, "x")
    plain = reference_logits(load_reference(source), IDS)
    theirs = peft.PeftModel.from_pretrained(load_reference(source), tmp_path)
    logits = reference_logits(theirs, IDS)
    ours = our_logits(load_adapted(tmp_path, source, load_config(source), torch.float32))
    print(float((logits - plain).abs().max()), float((logits - ours).abs().max()), float(logits.abs().max()))
    assert (logits - plain).abs().max() > 1e-2
    assert (logits - ours).abs().max() < 1e-5 * max(10.0, float(logits.abs().max()))
