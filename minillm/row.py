"""Row: one prompt on its way to an answer, and when it has arrived. Group: rows that are alike."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor

from minillm.proposer import Draft, DraftLength, Proposer
from minillm.sampling import Sampling, largest_of
from minillm.tokenizer import TextStream


@dataclass(eq=False)
class Row:
    """One prompt on its way: what was asked, what has been said, and whether it is finished."""

    prompt: list[int]
    max_new_tokens: int
    eos_token_ids: frozenset[int]
    stream: TextStream
    sampling: Sampling  # [1] each
    wants_logprobs: bool = False
    number: int = 0  # in its request
    planned_length: int | None = None  # for its rotary tables; None: what the cache was made for
    proposer: Proposer | None = None  # who drafts for it,
    draft_length: DraftLength | None = None  # and how much

    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    text: str = ""
    finish_reason: str | None = None  # None while running; "eos", "stop_string", "length", "cancelled" or "error"
    error: Exception | None = None  # why it could not go on
    cancelled: bool = False  # its caller wants no more: set by any thread, heeded at the next tick
    seat: int = -1  # its row of the cache
    read: int = 0  # tokens of the prompt that the cache holds,
    reused: int = 0  # those of them that it held before
    target_steps: int = 0  # forward passes of the model that gave this row tokens, prefill's included
    drafted: int = 0  # tokens that were proposed to this row
    from_draft: list[bool] = field(default_factory=list)  # for each of token_ids, whether it was one of them
    started: float = 0.0  # seconds of `time.perf_counter`: when it got its seat,
    first_at: float = 0.0  # when its first new token was there,
    last_at: float = 0.0  # and the newest

    def __post_init__(self):
        self.ids = list(self.prompt)  # prompt and answer

    def commit(self, tokens: Sequence[int], logprobs: Sequence[float] = (), drafts: int = 0) -> int:
        """Accept what forward passes gave, token by token, until the row is finished; returns how many.

        Every way of generating ends here, so that none can differ about when to stop. The EOS token is
        counted among `token_ids` but is no text; text ends before a stop string. The first `drafts` of the
        tokens were proposed by a draft, and one pass gave them and the next; each other token took a pass.
        """
        self.last_at = time.perf_counter()
        self.first_at = self.first_at or self.last_at
        for count, token in enumerate(tokens):
            if self.finish_reason is not None:
                return count
            self.target_steps += count == 0 or count > drafts
            self.ids.append(token)
            self.token_ids.append(token)
            self.from_draft.append(count < drafts)
            self.logprobs.extend(logprobs[count : count + 1])
            if token in self.eos_token_ids:
                self.finish("eos")
            else:
                self.text += self.stream.push(token)
                if self.stream.stopped:
                    self.finish("stop_string")
                elif len(self.token_ids) == self.max_new_tokens:
                    self.finish("length")
        return len(tokens)

    def finish(self, reason: str) -> None:
        self.text += self.stream.finish()
        # What was held back may have completed one.
        self.finish_reason = "stop_string" if self.stream.stopped else reason


@dataclass
class Group:
    """Rows that are judged together: they use the same filters, and the same proposer drafts for them."""

    rows: list[Row]
    index: slice | Tensor  # [R], their seats
    sampling: Sampling
    undrafted: Draft
    proposer: Proposer | None
    eos: Tensor  # [R, E], padded with -1
    last: Tensor  # [R], where the last token of each row's budget stands

    def of(self, x: Tensor) -> Tensor:
        """These rows of `x [B, ...]`. Not x[index]: for that PyTorch wakes its threads, and waits for busy cores."""
        return x[self.index] if isinstance(self.index, slice) else x.index_select(0, self.index)

    def largest(self, tokens: Tensor, logits: Tensor) -> Tensor:
        """One of the logits `[R, n, V]` that `tokens [R, n]` were chosen from, `[R, n]`: finite only if all are, except
        -infinity. Who is greedy has found it already."""
        if self.sampling.temperature is None:
            return logits.gather(2, tokens[:, :, None])[:, :, 0]
        return largest_of(logits)
