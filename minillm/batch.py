"""Batch: the one loop of decoding, whose rows join and leave ("continuous batching").

A decode step is bound by reading the weights, and reads them once however many rows step together. So whoever is
there shares the steps, and nobody waits for the longest answer: a row leaves when its own text ends, and the next one
takes its seat while the others go on (Yu et al. 2022, Orca, "iteration-level scheduling"). Everything is this loop:
one prompt is a batch of one row, a list is rows of one request, plain decoding is speculation with zero drafts.

A *tick* runs a step for all rows that talk (of one token each, or of a token and its drafts), seats those that wait,
feeds chunks of their prompts, and looks at what came out.

What a row says does not depend on its neighbours, to the last bit as long as a pass has at most 16 tokens (the seats up
to the highest in use, rounded up to 1, 2, 4, 8, ..., times one, or drafts and one; above, other products add up in
another order): its prompt is fed by itself in chunks whose borders are the row's own, its random numbers follow from
its seed and positions, and it is sampled with rows of the same filters only.
"""

import math
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import takewhile

import torch
import torch.nn.functional as F
from torch import Tensor

from minillm.attention import FEW_ROWS
from minillm.cache import StaticCache, upload
from minillm.decode import read_chunk, reuse_prefix
from minillm.errors import NumericalError
from minillm.model import Decoder
from minillm.proposer import Draft, no_draft, with_drafts
from minillm.row import Group, Row
from minillm.sampling import Sampling, largest_of, next_token


@dataclass
class _Result:
    """What a step gave to a group, on its device."""

    rows: list[Row]
    proposed: list[int]  # drafts per row
    tokens: Tensor  # [R, k + 1], or of n steps [R, n]
    accepted: Tensor  # [R], how many of the drafts
    largest: Tensor  # [R, 1 | n], the largest logit of each step: NaN if any logit is
    logprobs: Tensor | None  # [R, k + 1 | n]


class Batch:
    """The rows that share one model and one cache, and the loop over them.

    Args:
        model: a `Decoder`, or `faster.steps.Steps`.
        cache: a seat for every row of it. A row with a planned length reuses a prefix in whole chunks of
            `cache.max_step` only, which leaves its bits alone; one without (the cache is the caller's) token by token.
        rows: who waits for a seat, in this order. More may be appended to `waiting` between two ticks.
        one_request: the rows belong together: all that have a seat are read before the first step, and an error of one
            ends the loop. Otherwise a tick feeds one chunk in all, so that nobody waits longer, and an error
            of what a row says (its logits, its text) stays with it.
    """

    def __init__(self, model: Decoder, cache: StaticCache, rows: Iterable[Row] = (), one_request: bool = True):
        device = cache.device
        self.model, self.cache, self.one_request = model, cache, one_request
        # Steps between two looks at what came out. An accelerator works through a queue, and each look waits until that
        # is empty: there it is worth running a few steps past a row's end (as it is for small models: `model.at_once`).
        self.look_every = 1 if device.type == "cpu" else 8
        self.waiting = deque(rows)
        self.seats: list[Row | None] = [None] * cache.batch_size
        self._unread: deque[Row] = deque()  # rows with a seat whose prompts are not fed yet
        self._chunks: list[list[int]] = [[] for _ in self.seats]  # the whole chunks of a prompt that a seat begins with
        self._token = torch.zeros(cache.batch_size, dtype=torch.int64, device=device)  # [B], the newest, not fed yet
        self._position = torch.zeros_like(self._token)  # [B], of the next token
        self._idle = torch.ones_like(self._token, dtype=torch.bool)  # [B], seats of nobody who talks
        self._seen: Tensor | None = None  # [B, V] bool, for repetition penalties
        self._groups: list[Group] | None = []  # of the rows that talk; None when they have changed
        self._results: list[_Result] = []

    def run(self) -> Iterator[list[Row]]:
        """Tick until nobody is left; yields after each tick the rows that ended in it.

        The cache's rows hold every token but each row's last, whose keys nobody has needed yet. Raises
        `NumericalError` where logits are infinite or not a number.
        """
        who = f"a request of {len(self.waiting)} rows" if self.one_request else f"{len(self.seats)} seats"
        with self.cache.hold.by(f"{who}, running in thread {threading.current_thread().name!r}"):
            while self.waiting or any(self.seats):
                # Not across the yield: there the mode would leak into the caller's code.
                with torch.inference_mode(), self.cache.hold.turn():
                    ended = [self._cancel(row) for row in self.seats if row is not None and row.cancelled]
                    self._step()
                    while self.waiting and None in self.seats:
                        self._join(self.waiting.popleft())
                    fed = 0
                    while self._unread:
                        row = self._unread[0]
                        chunk = row.prompt[row.read : row.read + self.cache.max_step]
                        fed += len(chunk)
                        if fed > self.cache.max_step and not self.one_request:
                            break  # a chunk in all, of one prompt or of several short ones: nobody waits for more
                        hidden = read_chunk(self.model, self._alone(row.seat), chunk, row.read)  # [1, d]
                        self._after_chunk(row, chunk, hidden)
                    ended += self._look()
                yield ended

    def _alone(self, seat: int) -> StaticCache:
        return self.cache.rows(seat, seat + 1)

    # ---- joining and leaving ----

    def _join(self, row: Row) -> None:
        """Give the row a seat, one that holds the beginning of its prompt if there is one."""
        free = [seat for seat, other in enumerate(self.seats) if other is None]
        if not self.cache.hold.same_weights(self.model.fingerprint()):
            for seat in free:  # their keys were made by others
                self._alone(seat).reset()
            self._chunks = [[] for _ in self.seats]  # so were some of those that a running row goes on from
        if row.planned_length is None:
            row.seat = free[0]
            row.read = reuse_prefix(self._alone(row.seat), row.prompt)
        else:
            row.seat, row.read = self._reuse_chunks(row.prompt, free)
            if row.read == 0:
                self._alone(row.seat).plan(row.planned_length)
        if row.proposer is not None:
            row.proposer.start(row.seat, row.prompt, row.planned_length)
        row.reused, row.started = row.read, time.perf_counter()
        self.seats[row.seat] = row
        self._unread.append(row)

    def _reuse_chunks(self, prompt: list[int], free: list[int]) -> tuple[int, int]:
        """The free seat that is best for a prompt, and how many tokens of it this holds now, in whole chunks.

        Only what was fed in chunks from the start has the bits that feeding it again would give. What the seat of a
        running row holds is copied.
        """
        step, follows = self.cache.max_step, any(spec.follows_length for spec in self.cache.config.ropes)

        def shared(seat: int) -> int:
            held, n = self._chunks[seat], 0
            while n + step < len(prompt) and n < len(held) and held[n : n + step] == prompt[n : n + step]:
                n += step
            # Keys that were rotated for another length are of no use.
            return n if n and not follows and self._alone(seat).can_truncate(0, n) else 0

        counts = [shared(seat) for seat in range(len(self.seats))]
        seat, count = max(free, key=counts.__getitem__), max(counts)
        if count > counts[seat]:
            self.cache.copy_row(counts.index(count), seat)
        self._alone(seat).truncate(count)
        self._chunks[seat] = prompt[:count]
        return seat, count

    def _after_chunk(self, row: Row, chunk: list[int], hidden: Tensor) -> None:
        """A chunk of the row's prompt is read, and `hidden [1, d]` came out."""
        row.read += len(chunk)
        held = self._chunks[row.seat]
        if row.planned_length and len(held) + self.cache.max_step == row.read:
            held += chunk
        if row.proposer is not None and row.draft_length.choose():
            row.proposer.read(row.seat, row.prompt[: row.read])
        if row.read == len(row.prompt):
            self._first_token(self._unread.popleft(), hidden)

    def _first_token(self, row: Row, hidden: Tensor) -> None:
        """The prompt is read, and `hidden [1, d]` came out: choose the row's first token."""
        seat = row.seat
        with self.model.own_dtypes():
            logits = self.model.logits(hidden)[:, None]  # [1, 1, V]
        if row.sampling.repetition_penalty is not None:
            if self._seen is None:
                shape = len(self.seats), logits.shape[-1]
                self._seen = torch.zeros(shape, dtype=torch.bool, device=logits.device)  # [B, V]
            self._seen[seat] = False
            self._seen[seat, torch.tensor(row.prompt, device=logits.device)] = True
        self._position[seat] = len(row.prompt)
        self._idle[seat] = False
        group = self._group([row])
        self._choose(group, group.undrafted, logits)
        self._groups = None

    def _leave(self, row: Row) -> Row:
        """The row's seat is free; what it has said stays in the cache for whoever goes on from there."""
        if row in self._unread:
            self._unread.remove(row)
            self._empty(row.seat)  # nobody has seen whether its keys are numbers
        self.seats[row.seat] = None
        self._idle[row.seat] = True
        self._groups = None
        return row

    def _empty(self, seat: int) -> None:
        self._alone(seat).reset()
        self._chunks[seat] = []

    def _cancel(self, row: Row) -> Row:
        try:
            row.finish("cancelled")
        except Exception as error:
            self._fail(row, error)
        return self._leave(row)

    def _fail(self, row: Row, error: Exception) -> None:
        if self.one_request:
            raise error
        row.error, row.finish_reason = error, "error"

    # ---- a step ----

    def _group(self, rows: list[Row]) -> Group:
        device, seats = self.cache.device, [row.seat for row in rows]
        neighbours = seats == [*range(seats[0], seats[0] + len(seats))]
        index = slice(seats[0], seats[-1] + 1) if neighbours else torch.tensor(seats, device=device)  # [R]
        widest = max(len(row.eos_token_ids) for row in rows)
        eos = [[*row.eos_token_ids, *[-1] * (widest - len(row.eos_token_ids))] for row in rows]
        return Group(
            rows,
            index,
            Sampling.together([row.sampling for row in rows]),
            no_draft(len(rows), device),
            rows[0].proposer,
            torch.tensor(eos, dtype=torch.int64, device=device),
            torch.tensor([len(row.prompt) + row.max_new_tokens - 1 for row in rows], device=device),
        )

    def _regroup(self) -> None:
        alike: dict[tuple, list[Row]] = {}
        talking = [row for row in self.seats if row is not None and row.token_ids]
        for row in talking:
            alike.setdefault((row.sampling.filters, id(row.proposer)), []).append(row)
        self._groups = [self._group(rows) for rows in alike.values()]
        self._part = self.cache.first_rows(talking[-1].seat + 1) if talking else self.cache

    def _step(self) -> None:
        """One token, or one and its drafts, for every row that talks; several where nobody looks and nobody drafts."""
        if self._groups is None:
            self._regroup()
        if not self._groups:
            return
        pairs = [(group, self._propose(group)) for group in self._groups]
        passes = [pairs]
        if self._part.batch_size * self._width(pairs) > FEW_ROWS:
            # From here on sums depend on the shape of a step: those who draft shall not choose it for all.
            passes = [[pair for pair in pairs if (pair[1].tokens.shape[1] == 0) == plain] for plain in (True, False)]
        rows = [row for group in self._groups for row in group.rows]
        left = max(row.max_new_tokens - len(row.token_ids) for row in rows)
        resting = min((row.draft_length.resting for row in rows if row.proposer), default=left)
        # A stop string is only seen at the look, after the row has gone on: the cache must be able to forget that.
        unwatched = min(left, resting, self.cache.max_step)  # steps in which nobody has a say; 0 where somebody drafts
        at_once = min(self.model.at_once, unwatched, unwatched if self.one_request else 1)  # or others wait to join
        alike = len(self._groups) == 1 and rows[0].sampling.repetition_penalty is None
        if self.look_every == 1 and at_once > 0 and alike:
            return self._ahead(self._groups[0], at_once)
        steps = max(1, min(self.look_every, unwatched))
        for _ in range(steps):
            for some in filter(None, passes):
                self._pass(some)
            if steps > 1:
                for group, _ in pairs:
                    # What `Row.commit` will say of it, but for stop strings: so that it writes no keys until then.
                    done = (group.of(self._token)[:, None] == group.eos).any(dim=1)  # [R]
                    self._idle[group.index] |= done | (group.of(self._position) > group.last)

    def _ahead(self, group: Group, steps: int) -> None:
        """Steps as one call, for the rows that talk: past the end of one it says what nobody hears."""
        # The positions as the host knows them: on a CPU it has looked.
        table = [[-1] * steps + [0] * steps for _ in range(self._part.batch_size)]
        for row in group.rows:
            first, end = len(row.ids), len(row.prompt) + row.max_new_tokens
            place = [*range(first, first + steps)]
            table[row.seat] = [at - 1 if at < end else -1 for at in place] + place
        fed, place = upload(table, self.cache.device).split(steps, dim=1)  # [n, k] each
        sampling, size = group.sampling.of_rows(group.index, len(table)), self.model.config.vocab_size
        token = self._token[: len(table), None]  # [n, 1]
        tokens, logits = self.model.ahead(token, fed, place, self._part, sampling, 0, size, logits=True)
        tokens, logits = group.of(tokens.t()), group.of(logits.transpose(0, 1))  # [R, k], [R, k, V]
        self._token[group.index] = tokens[:, -1]
        self._position[group.index] += steps
        self._note(
            group, group.undrafted, tokens, torch.zeros_like(tokens[:, 0]), logits, group.largest(tokens, logits)
        )

    def _pass(self, pairs: list[tuple[Group, Draft]]) -> None:
        """One pass of the model for these groups and their drafts; everybody else's seat is padding."""
        n = self._part.batch_size
        token, position, idle = self._token[:n], self._position[:n], self._idle[:n]  # [n] each, n <= B
        if len(pairs) < len(self._groups):
            talking = torch.zeros_like(idle)  # [n]
            for group, _ in pairs:
                talking[group.index] = True
            idle = idle | ~talking
        ids, fed = token[:, None], torch.where(idle, -1, position - 1)[:, None]  # [n, 1]
        width = self._width(pairs)
        if width > 1:
            ids, fed = with_drafts([(group.index, draft) for group, draft in pairs], width, ids, fed)  # [n, T]
        logits = self.model(ids, fed, self._part)  # [n, T, V]
        for group, draft in pairs:
            self._choose(group, draft, group.of(logits)[:, : draft.tokens.shape[1] + 1])

    def _propose(self, group: Group) -> Draft:
        if group.proposer is None:
            return group.undrafted
        # The last token of a row's budget needs no draft: every step yields one token of its own.
        counts = [min(r.draft_length.choose(), r.max_new_tokens - len(r.token_ids) - 1) for r in group.rows]
        if not any(counts):
            return group.undrafted
        seen = None if group.sampling.repetition_penalty is None else group.of(self._seen)  # [R, V]
        return group.proposer.propose({row.seat: row.ids for row in group.rows}, counts, group.sampling, seen)

    def _width(self, pairs: list[tuple[Group, Draft]]) -> int:
        """T of a pass: what the rows wanted to draft, whatever was found, so that its shape does not follow their luck;
        where nothing was found at all it is a plain step."""
        if not any(draft.tokens.shape[1] for _, draft in pairs):
            return 1
        return 1 + max(row.draft_length.choose() for group, _ in pairs if group.proposer for row in group.rows)

    def _choose(self, group: Group, draft: Draft, logits: Tensor) -> None:
        """Judge what a pass says, `logits [R, k + 1, V]`, of drafts `[R, k]` and what follows them."""
        index, sampling, place = group.index, group.sampling, group.of(self._position)  # place [R]
        seen = None if sampling.repetition_penalty is None else group.of(self._seen)  # [R, V]
        if draft.tokens.shape[1] == 0:
            token = next_token(logits[:, 0], sampling, place, seen)  # [R]
            token = self.model.ranks.of_first(token)
            accepted, tokens = torch.zeros_like(token), token[:, None]  # [R], [R, 1]
            largest = group.largest(tokens, logits)  # [R, 1]
        else:
            judged = group.proposer.judge(logits, draft, place, sampling, seen)
            accepted, token = map(self.model.ranks.of_first, judged)  # [R] each
            column = torch.arange(logits.shape[1], device=place.device)  # [k + 1]
            tokens = torch.where(column < accepted[:, None], F.pad(draft.tokens, (0, 1)), token[:, None])  # [R, k + 1]
            # Behind a rejected draft nobody reads.
            heeded = largest_of(logits).masked_fill(column > accepted[:, None], 0.0)  # [R, k + 1]
            largest = heeded.amax(dim=1, keepdim=True)  # [R, 1]
        if seen is not None:
            self._seen[index] = seen.scatter(1, tokens, True)
        self._token[index] = token
        self._position[index] = place + accepted + 1
        self._note(group, draft, tokens, accepted, logits, largest)

    def _note(
        self, group: Group, draft: Draft, tokens: Tensor, accepted: Tensor, logits: Tensor, largest: Tensor
    ) -> None:
        """Keep for the next look what it says of a group: see `_Result`; logits are `[R, k + 1 | n, V]`."""
        logprobs = None
        if any(row.wants_logprobs for row in group.rows):
            logprobs = logits.log_softmax(dim=-1).gather(2, tokens[:, :, None])[:, :, 0]  # [R, k + 1 | n]
        self._results.append(_Result(group.rows, draft.lengths, tokens, accepted, largest, logprobs))

    # ---- looking at it ----

    def _look(self) -> list[Row]:
        """Commit what came out since the last look; returns the rows that ended with it."""
        results, self._results = self._results, []
        wanted = [tensor for r in results for tensor in (r.tokens, r.accepted, r.largest, r.logprobs)]
        host = iter(_to_host([tensor for tensor in wanted if tensor is not None]))
        rows, past = {}, False
        for result in results:
            tokens, accepted, largest = next(host), next(host), next(host)
            logprobs = [()] * len(tokens) if result.logprobs is None else next(host)
            for i, row in enumerate(result.rows):
                rows[row] = None
                said = tokens[i], logprobs[i] if row.wants_logprobs else (), accepted[i]
                past |= self._hear(row, *said, largest[i], result.proposed[i])
        if past:
            # Forget rejected drafts and what came after a row's end. The newest token is not in the cache yet.
            self.cache.cut({row.seat: len(row.ids) - 1 for row in rows})
        return [self._leave(row) for row in rows if row.finish_reason is not None]

    def _hear(self, row: Row, tokens: list, logprobs: Sequence, accepted: int, largest: list, proposed: int) -> bool:
        """Commit what a step, or several, said to a row; returns whether they went on past its end or a draft."""
        if row.finish_reason is not None:  # it has gone on unseen
            return True
        sound = sum(1 for _ in takewhile(math.isfinite, largest))  # steps whose logits are numbers
        count = 0
        try:
            if sound:
                count = row.commit(tokens[: accepted + sound], logprobs, accepted)
        except Exception as error:
            self._fail(row, error)
            return False
        if sound < len(largest) and row.finish_reason is None:
            self._spoilt(row)
            return False
        row.drafted += proposed
        for _ in range(len(largest) if row.draft_length else 0):
            row.draft_length.learn(proposed, accepted)
        return count < proposed + len(largest)

    def _spoilt(self, row: Row) -> None:
        """The row's logits are no numbers."""
        if self.one_request:
            self.cache.reset()  # the caller's: an error leaves it empty, not half filled
        else:
            self._empty(row.seat)  # its keys may be no numbers either
        problem = NumericalError(
            f"row {row.number}, new token {len(row.token_ids) + 1}: the model's logits are infinite or not a number: "
            "activations exceed their dtype, or weights are damaged; try dtype='float32' or 'bfloat16'"
        )
        self._fail(row, problem)


def _to_host(tensors: list[Tensor]) -> list[list]:
    """Tensors as lists. From an accelerator all at once, since each reading waits for it: float64 holds ids exactly."""
    if not tensors or tensors[0].device.type == "cpu":
        return [tensor.tolist() for tensor in tensors]
    flat = torch.cat([tensor.double().flatten() for tensor in tensors]).cpu()
    parts = flat.split([tensor.numel() for tensor in tensors])
    return [part.view(t.shape).to(t.dtype).tolist() for part, t in zip(parts, tensors, strict=True)]
