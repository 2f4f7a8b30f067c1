"""AdamW, Muon where asked for, and the learning rate over a run."""

import math

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_

from minillm.model import Attention, Decoder


def learning_rate_factor(step: int, steps: int, warmup: int) -> float:
    """Of step 0, 1, ...: a line up to 1 within `warmup` steps, then half a cosine down towards 0 (Loshchilov & Hutter
    2017, SGDR, arXiv:1608.03983)."""
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 + 0.5 * math.cos(math.pi * (step - warmup) / max(1, steps - warmup))


def fused_rows(model: Decoder) -> dict[str, list[int]]:
    """How many rows each matrix has that several of a checkpoint's stand in, by the parameter's name."""
    rows = {}
    for name, module in model.named_modules():
        if isinstance(module, Attention):
            rows[f"{name}.qkv.weight"] = list(module.split)
        if name.endswith(".gate_up"):
            rows[f"{name}.weight"] = [module.out_features // 2] * 2
    return rows


class Optimizer:
    """Of all parameters of a decoder that require a gradient.

    Args:
        learning_rate: the largest, of AdamW (Loshchilov & Hutter 2019, arXiv:1711.05101).
        muon_learning_rate: Muon (Jordan 2024, https://kellerjordan.github.io/posts/muon/) takes the matrices of the
            blocks, with this; None: AdamW takes them too. It makes a matrix's step orthogonal, so it has to see the
            matrices that the model means: q, k and v, gate and up, one by one, though they lie in one tensor.
        weight_decay: of matrices in the blocks, times the learning rate; embeddings, norms and biases have none.
        max_norm: gradients longer than this, all taken together, are shortened to it.
    """

    def __init__(
        self,
        model: Decoder,
        learning_rate: float,
        muon_learning_rate: float | None = None,
        weight_decay: float = 0.1,
        betas: tuple[float, float] = (0.9, 0.95),
        max_norm: float = 1.0,
    ):
        named = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
        matrices = {name: p for name, p in named.items() if p.dim() == 2 and name.startswith("blocks.")}
        others = [p for name, p in named.items() if name not in matrices]
        self.parameters, self.max_norm = list(named.values()), max_norm
        self._parts: list[tuple[nn.Parameter, Tensor, int]] = []  # (a view of rows, of which parameter, from which)
        groups = [{"params": others, "weight_decay": 0.0}]
        self.optimizers: list[torch.optim.Optimizer] = []
        if muon_learning_rate is None:
            groups.append({"params": list(matrices.values()), "weight_decay": weight_decay})
        else:
            fused = fused_rows(model)
            for name, parameter in matrices.items():
                start = 0
                for rows in fused.get(name, [len(parameter)]):
                    view = nn.Parameter(parameter.detach()[start : start + rows])  # shares the parameter's memory
                    self._parts.append((view, parameter, start))
                    start += rows
            parts = [view for view, _, _ in self._parts]
            self.optimizers.append(torch.optim.Muon(parts, lr=muon_learning_rate, weight_decay=weight_decay))
        groups = [group for group in groups if group["params"]]
        if groups:
            self.optimizers.append(torch.optim.AdamW(groups, lr=learning_rate, betas=betas))
        self._rates = [optimizer.param_groups[0]["lr"] for optimizer in self.optimizers]

    def step(self, factor: float) -> float:
        """One step with `factor` times the learning rates; the gradients are gone afterwards. Returns their norm."""
        norm = clip_grad_norm_(self.parameters, self.max_norm, error_if_nonfinite=False)
        for view, parameter, start in self._parts:
            view.grad = None if parameter.grad is None else parameter.grad[start : start + len(view)]
        for optimizer, rate in zip(self.optimizers, self._rates, strict=True):
            for group in optimizer.param_groups:
                group["lr"] = rate * factor
            optimizer.step()
        for parameter in (*self.parameters, *(view for view, _, _ in self._parts)):
            parameter.grad = None
        return float(norm)

    def state_dict(self) -> list[dict]:
        return [optimizer.state_dict() for optimizer in self.optimizers]

    def load_state_dict(self, states: list[dict]) -> None:
        for optimizer, state in zip(self.optimizers, states, strict=True):
            optimizer.load_state_dict(state)
