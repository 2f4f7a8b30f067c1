"""Weights to begin with, where no checkpoint is."""

import torch

from minillm.model import Decoder, Norm


@torch.no_grad()
def initialize(model: Decoder, seed: int, std: float = 0.02) -> None:
    """Draw every weight of a decoder: the same numbers for a seed on every machine.

    Matrices and embeddings are normal with `std`, but what adds to the residual stream with std / sqrt(2 * layers), so
    that the stream does not grow with depth (Radford et al. 2019, GPT-2, section 2.3). Norms begin as the identity,
    biases at 0.
    """
    generator = torch.Generator("cpu").manual_seed(seed)
    for name, module in model.named_modules():
        if isinstance(module, Norm):
            if module.weight is not None:
                module.weight.fill_(1 - module.spec.offset)
            if module.bias is not None:
                module.bias.zero_()
            continue
        weight, bias = (module._parameters.get(part) for part in ("weight", "bias"))
        if weight is not None and not (name == "head" and model.config.tie_word_embeddings):
            adds = name.endswith((".output", ".down"))
            drawn = torch.randn(weight.shape, generator=generator) * std
            weight.copy_(drawn / (2 * model.config.num_layers) ** 0.5 if adds else drawn)
        if bias is not None:
            bias.zero_()
