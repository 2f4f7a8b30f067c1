"""What both attention ops share: a reference that attends for one token, and how far attention may be off."""

import torch
from torch import Tensor

from catalog.entry import rounding, unit


def attend_one_token(q, k, v, distance, scale, softcap, alibi_slopes) -> Tensor:
    """Attention of one token, q [H, D], to the P keys it sees, k and v [KV, P, D], distance [P] <= 0."""
    group = q.shape[0] // k.shape[0]
    k, v = (x.double().repeat_interleave(group, dim=0) for x in (k, v))  # [H, P, D]
    scores = torch.einsum("hd,hpd->hp", q.double(), k) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if alibi_slopes is not None:
        scores = scores + alibi_slopes.double()[:, None] * distance
    return torch.einsum("hp,hpd->hd", scores.softmax(-1), v)  # [H, D]


def attention_bound(expected: Tensor, q: Tensor, k: Tensor, v: Tensor, scale: float, softcap) -> Tensor:
    """Three sources of error, added up.

    - the result is rounded once: unit * |expected|;
    - the probabilities are rounded to v's dtype before they weigh v: unit * sum(p |v|) <= unit * max|v|;
    - a score wrong by d changes every probability by a factor within exp(+-2d), the result by at most
      2 d max|v|. Scores are float32 sums of head_dim products whose roundings behave as a random walk
      (Higham & Mary 2019), so d <= (sqrt(head_dim) + 8) * 2^-24 * the largest score; the 8 covers scaling,
      exponential and rescaling. A tanh written through exp adds an absolute 2^-22 of the softcap.
    """
    q_norm, k_norm = (x.double().nan_to_num(0).norm(dim=-1).amax() for x in (q, k))
    largest_v = v.double().nan_to_num(0).abs().amax()
    largest_score = q_norm * k_norm * scale  # Cauchy-Schwarz: sum of |q k| <= |q| |k|
    score_error = unit(torch.float32) * ((q.shape[-1] ** 0.5 + 8) * largest_score + 4 * (softcap or 0))
    rounded = rounding(expected.nan_to_num(0), q.dtype) + rounding(largest_v, q.dtype)
    return rounded + 2 * score_error * largest_v
