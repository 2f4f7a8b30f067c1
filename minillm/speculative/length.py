"""How many tokens to draft: of several numbers the best for a row's luck so far, and for what a draft costs."""

import math
from collections.abc import Sequence

AUTO_LENGTHS = (0, 1, 2, 4, 8)  # what "auto" chooses from: few, so that there are few shapes of verify steps
_DECAY = 0.9  # how fast luck is forgotten: about the last ten steps count
_LONGEST_REST = 1024  # steps, unless a try is that dear: a text may begin to repeat itself
_TRIED = 0.02  # the share of its time that a row spends at most on tries that were in vain
# What a step costs beside reading weights, as bytes that could be read meanwhile (some 30 GB/s): the calls of a pass,
# and all that drafts bring with them (a pass of its own where plain steps would be several to a call, judging). Rough,
# but the same everywhere, so that a seed's text depends neither on a clock nor on how steps are run.
PASS_BYTES, JUDGING_BYTES = 3e6, 40e6
WIDER = 0.05  # the share of a pass that one more token of each row adds to it


def pass_bytes(model) -> float:
    """What a pass over one token costs, as bytes that could be read meanwhile: the same to all ranks."""
    return PASS_BYTES + model.ranks.agree(model.weight_bytes)


class AdaptiveDraftLength:
    """How many tokens to draft for one row: of several lengths the best for its luck so far.

    With a chance `a` that a drafted token is accepted, k drafts yield 1 + a + ... + a^k tokens per step on
    average, for the time of one pass of the target and k of the draft (Leviathan et al. 2022, section 3.4).
    `a` is estimated from the row's own recent steps, so that no neighbour changes a row's text, and the times
    from the sizes of the models, so that no clock does. Where no draft pays, none is made, but for one try now
    and then.

    Args:
        lengths: what to choose from.
        cost: of a drafted token, in plain steps of the target.
        judging: what a step with any drafts at all costs on top, likewise.
        rest: steps without drafts before luck is tried again, or more where a try costs over `_TRIED` of them; twice as
            many after each try in vain.
    """

    def __init__(self, lengths: Sequence[int], cost: float, judging: float = 0.0, rest: int = 32):
        self.lengths, self.cost, self.judging = lengths, cost, judging
        self.fewest = min(filter(None, lengths), default=0)  # drafts of a try
        self.shortest_rest = self.rest = max(rest, math.ceil((self.fewest * cost + judging) / _TRIED))
        self.accepted, self.rejected = 2.0, 2.0  # before anything is known: one in two
        self.rested = 0  # steps since the last draft; `rest` is how many there shall be
        self.best = self._best()

    def choose(self) -> int:
        return self.fewest if self.best == 0 and self.rested >= self.rest else self.best

    @property
    def resting(self) -> int:
        """How many steps there are from here on in which nothing is drafted."""
        return max(0, self.rest - self.rested) if self.best == 0 else 0

    def _best(self) -> int:
        rate = self.accepted / (self.accepted + self.rejected)

        def tokens_per_time(k: int) -> float:
            return sum(rate**i for i in range(k + 1)) / (1 + k * self.cost + (k > 0) * self.judging)

        return max(self.lengths, key=tokens_per_time)

    def learn(self, drafted: int, accepted: int) -> None:
        """Count a step. Drafts after the first rejected one tell nothing: they continue a wrong text."""
        tried = self.rested >= self.rest
        self.rested += 1
        if drafted:
            self.accepted = _DECAY * self.accepted + accepted
            self.rejected = _DECAY * self.rejected + (accepted < drafted)
            self.best, self.rested = self._best(), 0
            if accepted:
                self.rest = self.shortest_rest
            elif tried:
                self.rest = max(self.rest, min(2 * self.rest, _LONGEST_REST))
