"""What the loop knows of speculative decoding: somebody cheap proposes what comes next, and every proposal is judged.

How to guess, how much, and why judging leaves the law of the text alone is the wing `speculative/`. A loop without a
proposer is plain decoding.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from minillm.sampling import Sampling


@dataclass(frozen=True)
class Draft:
    """Proposals for the next places of every row; rows may have fewer than k."""

    tokens: Tensor  # [R, k] int64, beyond a row's length any id that could be drafted
    # [R, k, W]: the distribution each token was drawn from, of the first W tokens; None where nothing was drawn. The
    # next draft for rows of the same filters overwrites it.
    probs: Tensor | None
    lengths: list[int]  # how many of the k each row proposes
    counts: Tensor  # [R] int64, the same where the tokens are


class Proposer(Protocol):
    """Somebody cheap who guesses what comes next, for the rows of one batch."""

    def start(self, seat: int, prompt: list[int], planned_length: int | None) -> None:
        """A row with this prompt takes this seat; see `row.Row` for its planned length."""

    def read(self, seat: int, beginning: list[int]) -> None:
        """The target has read so much of its row's prompt. Only called for rows that will get drafts."""

    def propose(self, texts: dict[int, list[int]], counts: list[int], sampling: Sampling, seen: Tensor | None) -> Draft:
        """For each seat up to as many tokens as `counts` says, to follow its text: all ids of that row so far.

        `sampling` and `seen [R, V]` (with a repetition penalty) are those rows'. Seats ascend.
        """

    def judge(
        self, logits: Tensor, draft: Draft, start: Tensor, sampling: Sampling, seen: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """How many drafts each row keeps by the target's logits `[R, k + 1, V]`, and the token that follows them, `[R]`
        int64 both; the first would stand at `start [R]`. By `speculative.verify.judge` for all: it is a method since
        the road imports no wing."""


class DraftLength(Protocol):
    """How many tokens are drafted for one row."""

    resting: int  # steps from here on in which nothing is drafted

    def choose(self) -> int:
        """Tokens to draft in the next step."""

    def learn(self, drafted: int, accepted: int) -> None:
        """What came of a step."""


def no_draft(rows: int, device: torch.device) -> Draft:
    nothing = torch.zeros(rows, 1, dtype=torch.int64, device=device)
    return Draft(nothing[:, :0], None, [0] * rows, nothing[:, 0])


def with_drafts(drafts: Sequence[tuple], width: int, ids: Tensor, fed: Tensor) -> tuple[Tensor, Tensor]:
    """Behind `ids` and where they are fed, `[n, 1]` each, the drafts of some rows, (their index, `Draft`) each: both
    `[n, width]`, -1 where a row has none."""
    drafted = F.pad(ids, (0, width - 1))  # [n, T]
    count = torch.zeros_like(ids)  # [n, 1], drafts of each row
    for index, draft in drafts:
        drafted[index, 1 : 1 + draft.tokens.shape[1]] = draft.tokens
        count[index, 0] = draft.counts
    column = torch.arange(width, device=ids.device)  # [T]
    return drafted, torch.where((fed < 0) | (column > count), -1, fed + column)
