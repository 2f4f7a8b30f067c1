"""What a request that wants drafts gets: its options checked, its proposer, and how much that drafts for each row."""

from collections.abc import Callable

from minillm.cache import StaticCache
from minillm.errors import RequestError, shown
from minillm.options import GenerationConfig
from minillm.proposer import Proposer
from minillm.row import Row
from minillm.speculative.length import AUTO_LENGTHS, JUDGING_BYTES, AdaptiveDraftLength, pass_bytes
from minillm.speculative.proposers import DraftModel, PromptLookup
from minillm.tokenizer import Tokenizer


class Drafting:
    """Who drafts for a request, or for all requests of an engine: `check`, then `make_proposer` once, then `attach` for
    each row.

    Args:
        target, assistant: the `LLM` that generates and the one that drafts for it (or None).
        previous: the proposer of the conversation's last turn: its draft model's cache is used again.
    """

    def __init__(self, target, assistant, previous: Proposer | None = None):
        self.target, self.assistant, self.previous = target, assistant, previous
        self.proposer: PromptLookup | DraftModel | None = None  # None: plain decoding
        self.judging = 0.0  # what a step with drafts costs beside them, in passes of the target

    def check(self, config: GenerationConfig) -> None:
        """Raise `RequestError` where the options about drafts contradict each other or the assistant does not fit."""
        target, assistant = self.target, self.assistant
        asked = assistant is not None or config.num_assistant_tokens is not None
        if asked and config.prompt_lookup_num_tokens is not None:
            both = "assistant_model (with num_assistant_tokens) and prompt_lookup_num_tokens"
            raise RequestError(f"{both} exclude each other: choose who drafts")
        if assistant is None:
            if config.num_assistant_tokens is not None:
                raise RequestError("num_assistant_tokens needs an assistant_model (prompt_lookup_num_tokens does not)")
            return
        if not hasattr(assistant, "steps"):
            raise RequestError(f"assistant_model must be an LLM (LLM.from_pretrained(...)), not {shown(assistant)}")
        _check_same_tokenizer(target.tokenizer, assistant.tokenizer)
        if assistant.model.ranks.joined and not target.model.ranks.joined:  # whose texts need not be the same on each
            raise RequestError("ranks share assistant_model, but not the model: load both with tensor_parallel=True")
        if assistant.device != target.device:
            where = f"assistant_model is on {assistant.device}, the model on {target.device}"
            raise RequestError(f"{where}: load both on one")

    def make_proposer(
        self, config: GenerationConfig, cache: StaticCache, borrow: Callable[..., StaticCache] | None = None
    ) -> None:
        """Make the proposer that is asked for, once it is checked, beside the target's cache; a draft model's own cache
        comes from `borrow(steps, rows, length)` if that is given."""
        assistant, previous = self.assistant, self.previous
        if assistant is None and config.prompt_lookup_num_tokens is None:
            return
        self.judging = JUDGING_BYTES / pass_bytes(self.target.model)
        if assistant is None:
            self.proposer = PromptLookup(cache.device)
            return
        rows, length = cache.batch_size, min(cache.max_cache_len, assistant.config.max_positions)
        if isinstance(previous, DraftModel) and previous.model is assistant.steps:
            own = previous.cache
        elif borrow is not None:
            own = borrow(assistant.steps, rows, length)
        else:
            own = StaticCache(assistant.config, rows, length, assistant.device, assistant.dtype, cache.max_step)
        self.proposer = DraftModel(assistant.steps, self.target.model, own)

    def attach(self, row: Row, config: GenerationConfig, max_step: int) -> None:
        """Let the proposer draft for the row, as much as was asked for; a `RequestError` for more than a step holds."""
        if self.proposer is None:
            return
        lookup, asked = config.prompt_lookup_num_tokens, config.num_assistant_tokens or "auto"
        longest = min(lookup or (1 if asked == "auto" else asked), row.max_new_tokens - 1)
        if longest >= max_step:
            raise RequestError(
                f"{longest} drafted tokens make a step of {longest + 1}, but the cache takes {max_step} per step: "
                f"draft fewer, or pass a StaticCache with max_step={longest + 1}"
            )
        lengths = [longest]
        if lookup is not None:
            lengths = [0, longest]  # where nothing is copied it is of no use
        elif asked == "auto":
            lengths = [length for length in AUTO_LENGTHS if length < max_step]
        row.proposer = self.proposer
        row.draft_length = AdaptiveDraftLength(lengths, self.proposer.cost, self.judging, self.proposer.rest)


def _check_same_tokenizer(target: Tokenizer, draft: Tokenizer) -> None:
    """Raise `RequestError` unless every id means the same token to both, which then share one table of them."""
    if target.vocabulary is draft.vocabulary:
        return
    if target.vocabulary == draft.vocabulary:
        draft.vocabulary = target.vocabulary  # 128,000 tokens take 20 ms to compare: once is enough
        return
    ours, theirs = ({token_id: token for token, token_id in t.vocabulary.items()} for t in (target, draft))
    first = min(token_id for token_id in {*ours, *theirs} if ours.get(token_id) != theirs.get(token_id))
    raise RequestError(
        f"assistant_model has another tokenizer: id {first} is {ours.get(first)!r} for the model ({len(ours)} tokens) "
        f"and {theirs.get(first)!r} for the assistant ({len(theirs)}); a draft needs the same vocabulary"
    )
