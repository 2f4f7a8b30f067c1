"""Speculation changes how fast the text comes and nothing else: greedy token for token, sampled in law.

Oracles: plain decoding (itself tested against transformers) for greedy text, exact enumeration for
`verify`, transformers' float64 probabilities for sampling.
"""

import copy
import itertools
import math
import shutil

import pytest
import torch
from families import FAMILIES, make_model, prompt_ids, save_checkpoint
from minillm_kernels import cpu
from minillm_kernels import sampling as kernels
from minillm_kernels.sampling import sample, uniform
from rows import sampling_of

from minillm import LLM, StaticCache
from minillm.cli.parser import main
from minillm.errors import RequestError
from minillm.faster.steps import Steps
from minillm.model import Decoder
from minillm.proposer import Draft
from minillm.sampling import next_token
from minillm.speculative import verify as verifying
from minillm.speculative.length import AUTO_LENGTHS, JUDGING_BYTES, AdaptiveDraftLength
from minillm.speculative.proposers import DRAFT_STREAM, DraftModel, PromptLookup
from minillm.speculative.verify import compare, judge
from minillm.speculative.verify import verify as exact

# -- verify, by enumeration ----------------------------------------------------------------------

D = 4  # every probability below is a multiple of 1/4
# Then every threshold (a ratio of such numbers, or of sums of their differences) is a multiple of 1/12,
# and a function of a uniform number that only jumps there is integrated exactly by 12 midpoints.
CELLS = 12
MIDPOINTS = (torch.arange(CELLS, dtype=torch.float64) + 0.5) / CELLS


def table(V, seed):
    """A distribution over V tokens in multiples of 1/D, many of them zero."""
    counts = torch.bincount(
        torch.randint(0, V, (D,), generator=torch.Generator().manual_seed(seed)), minlength=V
    )  # [V]
    return counts.double() / D


def verify(tokens, q, p, lengths, accept, fresh):
    """As `judge` does: what was drawn from nothing (q None, prompt lookup) is compared with the target's own tokens."""
    if q is None:
        return compare(tokens, sample(p.flatten(0, 1), fresh.flatten()).view_as(fresh), lengths)
    return exact(tokens, q, p, lengths, accept, fresh)


class Tables:
    """A next-token distribution for every text of up to k tokens: a language model, written down."""

    def __init__(self, V, k, seed):
        texts = [text for n in range(k + 1) for text in itertools.product(range(V), repeat=n)]
        self.V, self.of = V, {text: table(V, seed * 1000 + i) for i, text in enumerate(texts)}

    def along(self, text):
        """[len(text) + 1, V]: the distributions met on the way."""
        return torch.stack([self.of[text[:n]] for n in range(len(text) + 1)])

    def law(self, length):
        """The joint law of the first `length` tokens, [V] * length."""
        law = torch.zeros([self.V] * length, dtype=torch.float64)
        for text in itertools.product(range(self.V), repeat=length):
            law[text] = math.prod(float(self.of[text[:n]][text[n]]) for n in range(length))
        return law


def law_of_speculation(target, draft, k, verifier=verify):
    """The law of the first k + 1 tokens when `verifier` checks k drafts, everything random integrated out.

    What follows a rejection comes from later steps; by induction they have the target's law, so the text
    is completed from the target's own tables.
    """
    V = target.V
    law = torch.zeros([V] * (k + 1), dtype=torch.float64)
    # One grid point per combination of acceptance numbers and of the number for the fresh token. Only one
    # fresh token is drawn, so all places may share its number; prompt lookup draws one at each place.
    axes = [MIDPOINTS] * (k + 1) if draft else [(torch.arange(D, dtype=torch.float64) + 0.5) / D] * (k + 1)
    grid = torch.cartesian_prod(*axes)  # [N, k + 1]
    for text in itertools.product(range(V), repeat=k):
        # How likely this text is drafted; a lookup proposes one text, say 11...
        weight = math.prod(float(draft.of[text[:n]][text[n]]) for n in range(k)) if draft else text == (1,) * k
        if weight == 0:
            continue
        N = len(grid)
        accepted, following = verifier(
            torch.tensor([text] * N),
            draft.along(text)[:k].expand(N, k, V) if draft else None,
            target.along(text).expand(N, k + 1, V),
            torch.full((N,), k),
            grid[:, :k],
            grid[:, k:].expand(N, k + 1) if draft else grid,
        )
        for (kept, token), count in count_pairs(accepted, following).items():
            emitted = (*text[:kept], token)
            for rest in itertools.product(range(V), repeat=k - kept):
                share = math.prod(
                    float(target.of[(emitted + rest)[:n]][(emitted + rest)[n]]) for n in range(kept + 1, k + 1)
                )
                law[emitted + rest] += weight * count / N * share
    return law


def count_pairs(first, second):
    pairs, counts = torch.stack((first, second), dim=1).unique(dim=0, return_counts=True)
    return dict(zip(map(tuple, pairs.tolist()), counts.tolist(), strict=True))


SIZES = list(itertools.product((2, 3, 4), (1, 2, 3)))


@pytest.mark.parametrize(("V", "k"), SIZES)
def test_the_joint_law_is_the_targets(V, k):
    for seed in range(10 if k < 3 else 1):
        target, draft = Tables(V, k, seed), Tables(V, k, seed + 100)
        law = law_of_speculation(target, draft, k)
        assert float((law - target.law(k + 1)).abs().max()) < 1e-12


@pytest.mark.parametrize(("V", "k"), SIZES)
def test_the_joint_law_with_prompt_lookup(V, k):
    target = Tables(V, k, seed=7)
    law = law_of_speculation(target, None, k)
    assert float((law - target.law(k + 1)).abs().max()) < 1e-12


def without_residual(draft_tokens, draft_probs, target_probs, lengths, accept, fresh):
    """The classical mistake: after a rejection, draw from p itself."""
    accepted, _ = verify(draft_tokens, draft_probs, target_probs, lengths, accept, fresh)
    rows = torch.arange(len(accepted))
    return accepted, sample(target_probs[rows, accepted], fresh[rows, accepted])


def test_enumeration_finds_a_wrong_verifier():
    target, draft = Tables(3, 2, seed=1), Tables(3, 2, seed=101)
    law = law_of_speculation(target, draft, 2, without_residual)
    assert float((law - target.law(3)).abs().max()) > 0.01


def random_case(B, k, V, seed, temperature=1.0):
    generator = torch.Generator().manual_seed(seed)
    p = torch.softmax(3 * torch.randn(B, k + 1, V, generator=generator) / temperature, -1)
    q = torch.softmax(3 * torch.randn(B, k, V, generator=generator) / temperature, -1)
    tokens = torch.multinomial(q.flatten(0, 1), 1, generator=generator).view(B, k)
    lengths = torch.randint(0, k + 1, (B,), generator=generator)
    uniforms = torch.rand(2, B, k + 1, dtype=torch.float64, generator=generator)
    return tokens, q, p, lengths, uniforms[0, :, :k], uniforms[1]


@pytest.mark.parametrize("lookup", [False, True])
def test_rows_with_fewer_drafts_are_as_alone(lookup):
    """Padding beyond a row's drafts changes nothing, whatever it holds."""
    tokens, q, p, lengths, accept, fresh = random_case(B=64, k=4, V=5, seed=1)
    accepted, following = verify(tokens, None if lookup else q, p, lengths, accept, fresh)
    assert {0, 1, 2, 3, 4} == set(lengths.tolist())
    assert len(set(accepted.tolist())) > 2
    for b, n in enumerate(lengths.tolist()):
        row = slice(b, b + 1)
        alone = verify(
            tokens[row, :n],
            None if lookup else q[row, :n],
            p[row, : n + 1],
            lengths[row],
            accept[row, :n],
            fresh[row, : n + 1],
        )
        assert (int(accepted[b]), int(following[b])) == (int(alone[0]), int(alone[1]))


def test_one_hot_distributions_give_the_argmax():
    """Temperature 0: p and q are one-hot, and whatever the numbers, the target's argmax comes out."""
    generator = torch.Generator().manual_seed(3)
    best = torch.randint(0, 3, (500, 5), generator=generator)
    guess = torch.randint(0, 3, (500, 4), generator=generator)
    p, q = (torch.nn.functional.one_hot(ids, 3).float() for ids in (best, guess))
    uniforms = torch.rand(2, 500, 5, dtype=torch.float64, generator=generator)
    uniforms[0, :50], uniforms[1, :50] = 0.0, 1 - 2**-53  # the ends of the range too
    uniforms[0, 50:100], uniforms[1, 50:100] = 1 - 2**-53, 0.0
    right = (guess == best[:, :4]).long().cumprod(1).sum(1)
    for probs in (q, None):
        accepted, following = verify(guess, probs, p, torch.full((500,), 4), uniforms[0, :, :4], uniforms[1])
        assert torch.equal(accepted, right)
        assert torch.equal(following, best.gather(1, right[:, None])[:, 0])


def test_the_token_after_the_drafts_draws_the_number_of_its_own_place():
    """Whether drafts of a model or of the text: a place's number decides there, however many drafts stand before it."""
    even = torch.full((3, 3, 4), 0.25)
    drafts, lengths = torch.tensor([[1, 2], [1, 2], [3, 3]]), torch.tensor([2, 1, 0])
    fresh = torch.tensor([[0.3, 0.6, 0.9], [0.3, 0.9, 0.1], [0.9, 0.1, 0.1]], dtype=torch.float64)  # tokens by quarters
    accept = torch.full((3, 2), 0.5, dtype=torch.float64)
    for q in (even[:, :2], None):
        accepted, token = verify(drafts, q, even, lengths, accept, fresh)
        assert (accepted.tolist(), token.tolist()) == ([2, 1, 0], [3, 3, 3])


def test_a_residual_that_rounds_to_nothing():
    """p and q equal up to rounding, q the larger everywhere: a rejection falls back to p, and no NaN appears."""
    p = torch.tensor([[[0.75, 0.25, 0.0]] * 2])
    q = torch.nextafter(p[:, :1], torch.ones(()))
    almost_one = torch.tensor([[1 - 2**-40]], dtype=torch.float64)
    for u, token in ((0.0, 0), (0.7, 0), (0.8, 1), (1 - 2**-53, 1)):
        fresh = torch.full((1, 2), u, dtype=torch.float64)
        accepted, following = verify(torch.tensor([[0]]), q, p, torch.tensor([1]), almost_one, fresh)
        assert (int(accepted), int(following)) == (0, token)


@pytest.mark.skipif(not cpu.available(), reason="no C compiler")
@pytest.mark.parametrize(
    ("B", "k", "V", "temperature"), [(1, 1, 3, 1.0), (64, 4, 5, 1.0), (300, 8, 700, 0.3), (9, 2, 60_000, 3)]
)
def test_in_c_the_same_drafts_are_kept(B, k, V, temperature):
    """Bit for bit as `verify` with the numbers of seeds and places; drafts of fewer words, in any order of memory."""
    tokens, q, p, lengths, *_ = random_case(B, k, V, seed=V, temperature=temperature)
    q[::3] = p[::3, :k]  # always kept
    q[1::7] = torch.nextafter(q[1::7], torch.ones(()))
    seed, position = torch.randint(-(2**62), 2**62, (2, B))
    place = position[:, None] + torch.arange(k + 1)
    seeds = seed[:, None].expand_as(place)
    kept = set()
    for W in (V, V - 1):
        short, mine = q[:, :, :W], tokens.clamp(max=W - 1)
        accept = uniform(seeds[:, :k], place[:, :k], 2)
        expected = exact(mine, short, p, lengths, accept, uniform(seeds, place))
        turned = short.transpose(0, 1).contiguous().transpose(0, 1)
        for probs in (short, turned, short.transpose(1, 2).contiguous().transpose(1, 2)):
            for ours, theirs in zip(kernels.verify(mine, probs, p, lengths, seed, position, 2), expected, strict=True):
                assert torch.equal(ours, theirs)
        kept |= set(expected[0].tolist())
    assert len(kept) > 1 or B == 1


@pytest.mark.skipif(not cpu.available(), reason="no C compiler")
@pytest.mark.parametrize("W", [4, 5])
def test_a_draft_of_no_numbers_leaves_the_law_of_the_target(W):
    """Whatever its model says, what follows is drawn from p."""
    p = torch.tensor([[0.4, 0.3, 0.2, 0.09, 0.01]]).expand(1000, 2, 5)
    tokens, q, lengths = torch.zeros(1000, 1, dtype=torch.int64), torch.full((1000, 1, W), torch.nan), torch.ones(1000)
    seed, position = torch.arange(1000), torch.zeros(1000, dtype=torch.int64)
    place = position[:, None] + torch.arange(2)
    seeds = seed[:, None].expand(1000, 2)
    accept = uniform(seeds[:, :1], place[:, :1], 2)
    expected = exact(tokens, q, p, lengths.long(), accept, uniform(seeds, place))
    for ours, theirs in zip(kernels.verify(tokens, q, p, lengths.long(), seed, position, 2), expected, strict=True):
        assert torch.equal(ours, theirs)
    assert 300 < (expected[1] == 0).sum() < 500


@pytest.mark.skipif(not cpu.available(), reason="no C compiler")
def test_what_the_verifier_in_c_refuses():
    tokens, q, p, lengths, *_ = random_case(4, 2, 6, seed=1)
    seed = position = torch.zeros(4, dtype=torch.int64)
    assert kernels.verify(tokens, q, p.double(), lengths, seed, position, 2) is None
    wrong = [
        (tokens[:3], q, p, lengths, seed, position),
        (tokens, q[:, :1], p, lengths, seed, position),
        (tokens, q, p[:, :2], lengths, seed, position),
        (tokens, q, p[:, :, :5], lengths, seed, position),
        (tokens, q, p, lengths.int(), seed, position),
        (tokens, q, p, lengths, seed[:3], position),
        (tokens + 6, q, p, lengths, seed, position),
        (tokens - 6, q, p, lengths, seed, position),
        (tokens, q, p, lengths + 3, seed, position),
        (tokens.float(), q, p, lengths, seed, position),
        (tokens[:, :0], q[:, :0], p[:, :1], lengths * 0, seed, position),
        (tokens, q[0], p, lengths, seed, position),
        (tokens[0], q, p, lengths, seed, position),
        (tokens, q, p[0, 0, 0], lengths, seed, position),
        (tokens, q.to("meta"), p, lengths, seed, position),
    ]
    with pytest.raises(ValueError, match="verify: stream"):
        kernels.verify(tokens, q, p, lengths, seed, position, -1)
    for arguments in wrong:
        with pytest.raises((ValueError, TypeError), match="verify: "):
            kernels.verify(*arguments, 2)


# -- proposers -----------------------------------------------------------------------------------


def look_up(texts, counts):
    lookup, texts = PromptLookup(torch.device("cpu")), dict(enumerate(texts))
    for seat, text in texts.items():
        lookup.start(seat, text, None)
    draft = lookup.propose(texts, counts, sampling_of([0] * len(texts), "cpu"), None)
    return [ids[:n] for ids, n in zip(draft.tokens.tolist(), draft.lengths, strict=True)]


def test_prompt_lookup_proposes_what_followed():
    text = [1, 2, 3, 9, 5, 3, 8, 7, 2, 3, 4, 1, 2, 3]
    assert look_up([text], [4]) == [[9, 5, 3, 8]]  # the 3-gram wins over the later 2-gram and 1-gram
    assert look_up([text[1:]], [4]) == [[4, 1, 2, 3]]  # without it the 2-gram (2, 3), its latest place
    assert look_up([[5, 1, 6, 5, 2, 7, 5]], [2]) == [[2, 7]]  # a 1-gram, the latest of two
    assert look_up([[1, 2, 3]], [4]) == [[]]  # nothing was said twice
    assert look_up([[4]], [4]) == [[]]
    assert look_up([[7, 1, 2, 1, 2]], [5]) == [[1, 2, 1, 2, 1]]  # a copy runs on into itself
    # Rows have their own texts and their own counts.
    assert look_up([text, [1, 2, 3], [5, 5]], [2, 4, 0]) == [[9, 5], [], []]


def test_prompt_lookup_indexes_as_the_text_grows():
    text = prompt_ids(300, seed=1, vocabulary=12)
    growing = PromptLookup(torch.device("cpu"))
    growing.start(0, text[:3], None)
    sampling = sampling_of([0], "cpu")
    for end in [3, 4, 9, 10, 11, 60, 299, 300]:
        draft = growing.propose({0: text[:end]}, [5], sampling, None)
        assert draft.tokens.tolist() == look_up([text[:end]], [5])


def test_prompt_lookup_reads_each_token_once():
    """A step costs what is new, not what the text is long: nothing but the last few words is looked at again."""

    class Watched(list):
        first = 0

        def __getitem__(self, place):
            start = place.start if isinstance(place, slice) else place
            assert start is None or start < 0 or start >= self.first, f"token {start} of {len(self)} was read again"
            return super().__getitem__(place)

    text, lookup = list(range(200)), PromptLookup(torch.device("cpu"))  # nothing is said twice: nothing is copied
    lookup.start(0, text[:150], None)
    sampling = sampling_of([0], "cpu")
    for end in (150, 151, 160):
        watched = Watched(text[:end])
        watched.first = 0 if end == 150 else 150 - 3
        lookup.propose({0: watched}, [3], sampling, None)


def test_auto_drafts_more_where_drafts_are_accepted():
    lucky, unlucky = AdaptiveDraftLength(AUTO_LENGTHS, cost=0.1), AdaptiveDraftLength(AUTO_LENGTHS, cost=0.1)
    for _ in range(20):
        lucky.learn(lucky.choose(), lucky.choose())
        unlucky.learn(unlucky.choose(), 0)
    assert lucky.choose() == 8
    assert unlucky.choose() == 0
    for _ in range(40):  # luck turns
        lucky.learn(lucky.choose(), 0)
    assert lucky.choose() == 0
    assert AdaptiveDraftLength(AUTO_LENGTHS, cost=1.0).choose() == 0  # a draft as slow as its target
    assert (
        AdaptiveDraftLength(AUTO_LENGTHS, cost=0.0, judging=4.0).choose() == 0
    )  # judging costs more than all that it yields
    assert AdaptiveDraftLength([5], cost=1.0).choose() == 5
    # One rejection a step at most: what follows it continues a wrong text and tells nothing.
    late, early = (AdaptiveDraftLength(AUTO_LENGTHS, cost=0.1) for _ in range(2))
    late.learn(2, 1)
    early.learn(8, 1)
    assert (late.accepted, late.rejected) == (early.accepted, early.rejected) == pytest.approx((2.8, 2.8))
    early.learn(0, 0)  # a step without drafts tells nothing either
    assert (late.accepted, late.rejected) == (early.accepted, early.rejected)


def test_the_dearer_a_try_the_longer_the_rest():
    """Tries in vain take a fiftieth of the time at most; a rest that is longer than the longest is not cut short."""
    row = AdaptiveDraftLength([0, 200], cost=0.05, judging=12.0, rest=32)
    assert (row.best, row.rest) == (0, 1100)
    for _ in range(1100):
        assert row.choose() == 0
        row.learn(0, 0)
    assert row.choose() == 200
    row.learn(200, 0)
    assert (row.choose(), row.rest) == (0, 1100)


def test_a_row_that_rests_tries_its_luck_now_and_then():
    """With the smallest draft, and after twice as long each time; where that is accepted it drafts again."""
    row = AdaptiveDraftLength([0, 2, 8], cost=0.4, judging=0.2, rest=64)
    drafts = []
    for _ in range(3200):
        drafts.append(row.choose())
        row.learn(drafts[-1], 0)
    tries = [i for i, k in enumerate(drafts) if k]
    assert (tries[0], set(drafts)) == (64, {0, 2})
    gaps = [late - early for early, late in itertools.pairwise(tries)]
    assert [gap - 1 for gap in gaps if gap > 1] == [128, 256, 512, 1024, 1024]
    for _ in range(1500):
        row.learn(row.choose(), row.choose())
    assert row.choose() == 8


# -- greedy: token for token ---------------------------------------------------------------------


def noisy(llm, scale, seed=0):
    """A draft that agrees with `llm` now and then: the same weights with noise on them."""
    other = copy.copy(llm)
    other.steps = Steps(copy.deepcopy(llm.model))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in other.model.parameters():
            parameter += scale * parameter.std() * torch.randn(parameter.shape, generator=generator)
    return other


@pytest.fixture(scope="module")
def targets(llm, window_llm, text_checkpoint):
    int8 = LLM.from_pretrained(text_checkpoint, dtype="float32", device="cpu", quantize="int8")
    return {"full": llm, "window": window_llm, "int8": int8}


@pytest.fixture(scope="module")
def drafts(llm, window_llm):
    """Options per (target, who drafts), and the acceptance rates over all of k = 1..8 that show it is what it says."""
    full, window = noisy(llm, 0.05), noisy(window_llm, 0.05)
    return {
        ("full", "same"): (dict(assistant_model=llm), 1.0, 1.0),
        ("window", "same"): (dict(assistant_model=window_llm), 1.0, 1.0),
        ("full", "noise"): (dict(assistant_model=full), 0.1, 0.9),
        ("window", "noise"): (dict(assistant_model=window), 0.1, 0.9),
        ("full", "unrelated"): (dict(assistant_model=window_llm), 0.0, 0.1),  # and it has a smaller vocabulary
        ("window", "unrelated"): (dict(assistant_model=llm), 0.0, 0.1),  # and it has a larger one
        ("int8", "same"): (dict(assistant_model=llm), 0.8, 0.99),  # the weights it was rounded from
    }


PROMPTS = [
    "The wolf said",
    "T",
    "Once upon a time there was a little girl who lived near the",
    "从前有一个 🚀",
    "king and queen and king",
]


def with_cache(llm, prompts, max_step=256, **options):
    """Generate with a cache of 160 slots whose rings are as small as `max_step` allows."""
    cache = StaticCache(llm.config, len(prompts), 160, dtype=llm.dtype, max_step=max_step)
    out = llm.generate(prompts, cache=cache, **options)
    # Whatever was accepted and rejected, the cache holds the text but for the newest token.
    texts = [llm.tokenizer.encode(p) if isinstance(p, str) else p for p in prompts]
    assert cache.token_ids == [ids + o.token_ids[:-1] for ids, o in zip(texts, out, strict=True)]
    return out


def same(first, second):
    assert [o.token_ids for o in first] == [o.token_ids for o in second]
    assert [(o.text, o.finish_reason) for o in first] == [(o.text, o.finish_reason) for o in second]


@pytest.fixture(scope="module")
def plain(targets):
    """plain(target) -> greedy completions of PROMPTS, 40 tokens, no EOS, decoded one by one."""
    options = dict(max_new_tokens=40, eos_token_id=[], temperature=0)
    found = {name: llm.generate(PROMPTS, **options) for name, llm in targets.items()}
    return lambda name: found[name]


@pytest.mark.parametrize(
    ("target", "who"),
    [*itertools.product(["full", "window"], ["same", "noise", "unrelated"]), ("int8", "same")],
)
def test_greedy_with_a_draft_model_equals_plain(target, who, targets, drafts, plain):
    """Prompts of different length, more drafts per step than the window's slack could hide, past the ring's wrap."""
    llm, (draft, low, high) = targets[target], drafts[target, who]
    drafted = accepted = 0
    for k in (1, 4, 8) if who == "unrelated" else range(1, 9):
        options = dict(max_new_tokens=40, eos_token_id=[], temperature=0, num_assistant_tokens=k, **draft)
        out = with_cache(llm, PROMPTS, max_step=k + 1, **options)
        same(out, plain(target))
        for o in out:
            assert o.stats.accepted == sum(o.from_draft) == o.stats.new_tokens - o.stats.target_steps
            assert o.stats.drafted <= k * (o.stats.target_steps - 1)
            drafted, accepted = drafted + o.stats.drafted, accepted + o.stats.accepted
        if k in (1, 4, 8):
            for number in (0, 3):
                one = with_cache(llm, PROMPTS[number : number + 1], max_step=k + 1, **options)
                same(one, plain(target)[number : number + 1])
                assert one[0].stats.drafted == out[number].stats.drafted
        if low == 1:  # every draft accepted: nothing but budget ends a step early
            assert all(o.stats.target_steps == 1 + math.ceil(39 / (k + 1)) for o in out)
    assert low <= accepted / drafted <= high


@pytest.fixture(scope="module")
def copier(tmp_path_factory, text_tokenizer_files):
    """A model that copies: two attention layers whose weights are written down (an induction head).

    The hidden state has three parts: the token, the one before it, and what to say. The first layer looks
    one position back (its query is its key turned back by one position) and notes the token it finds. The
    second looks for the place whose note is the current token, and says the token that stands there.
    """
    vocabulary, part = text_tokenizer_files.vocabulary, 64
    config = FAMILIES["qwen2"].with_changes(
        {
            "vocab_size": vocabulary,
            "hidden_size": 3 * part,
            "num_attention_heads": 1,
            "num_key_value_heads": 1,
            "head_dim": part,
            "rope_theta": 1e6,
            "tie_word_embeddings": False,
        }
    )
    model = make_model(config, seed=1)
    generator = torch.Generator().manual_seed(2)
    words = torch.randint(0, 2, (vocabulary, part), generator=generator) * 2.0 - 1  # [V, part], nearly orthogonal
    token, before, said = (slice(i * part, (i + 1) * part) for i in range(3))
    turn = 1e6 ** -(torch.arange(part // 2) / (part // 2))  # radians per position of each pair
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.fill_(1.0)
        model.model.embed_tokens.weight[:, token] = words
        model.lm_head.weight[:, said] = words
        back, match = (layer.self_attn for layer in model.model.layers)
        back.k_proj.bias[: part // 2] = 20.0
        back.q_proj.bias[:] = 20.0 * torch.cat((turn.cos(), -turn.sin()))
        back.v_proj.weight[:, token] = torch.eye(part)
        back.o_proj.weight[before] = torch.eye(part)
        match.q_proj.weight[:, token] = 3.0 * torch.eye(part)
        match.k_proj.weight[:, before] = 3.0 * torch.eye(part)
        match.v_proj.weight[:, token] = torch.eye(part)
        match.o_proj.weight[said] = torch.eye(part)
    folder = tmp_path_factory.mktemp("copier") / "qwen2"
    model.save_pretrained(folder)
    text_tokenizer_files.copy_to(folder)
    return LLM.from_pretrained(folder, dtype="float32", device="cpu")


def test_copying_takes_less_than_half_the_steps(copier):
    passage = (4 + torch.randperm(300, generator=torch.Generator().manual_seed(3))[:60]).tolist()
    prompts = [passage + passage[:8], passage + passage[20:21]]
    options = dict(max_new_tokens=39, eos_token_id=[], temperature=0)
    expected = copier.generate(prompts, **options)
    assert [o.token_ids for o in expected] == [passage[8:47], passage[21:60]]  # it does copy
    assert all(o.stats.tokens_per_target_step == 1 for o in expected)
    out = copier.generate(prompts, prompt_lookup_num_tokens=4, **options)
    same(out, expected)
    assert all(o.stats.tokens_per_target_step >= 2 for o in out)
    assert all(o.stats.target_steps == 1 + math.ceil(38 / 5) for o in out)  # every proposal is right


@pytest.mark.parametrize("target", ["full", "window", "int8"])
def test_greedy_with_prompt_lookup_equals_plain(target, targets):
    llm = targets[target]
    # Every prompt twice, so that there is something to look up, right or wrong.
    prompts = [llm.tokenizer.encode(p + p) for p in PROMPTS]
    options = dict(max_new_tokens=40, eos_token_id=[], temperature=0)
    expected = llm.generate(prompts, **options)
    for k in (1, 2, 3, 5, 8):
        out = with_cache(llm, prompts, max_step=k + 1, prompt_lookup_num_tokens=k, **options)
        same(out, expected)
        one = with_cache(llm, prompts[2:3], max_step=k + 1, prompt_lookup_num_tokens=k, **options)
        same(one, expected[2:3])
        drafted, accepted = (sum(getattr(o.stats, name) for o in out) for name in ("drafted", "accepted"))
        assert accepted < drafted


@pytest.mark.parametrize("who", ["same", "noise"])
def test_eos_at_every_place_of_an_accepted_run(who, targets, drafts, plain):
    llm, (draft, _, _) = targets["window"], drafts["window", who]
    stopped_at = set()
    for place in range(14):
        eos = [o.token_ids[place] for o in plain("window")]
        for row, token in enumerate(eos):
            options = dict(max_new_tokens=40, eos_token_id=token, temperature=0)
            out = with_cache(llm, PROMPTS[row : row + 1], max_step=5, num_assistant_tokens=4, **options, **draft)
            same(out, llm.generate(PROMPTS[row : row + 1], **options))
            assert out[0].finish_reason == "eos"
            stopped_at.add(out[0].stats.new_tokens)
        # All rows at once, each ending where it meets any of them.
        options = dict(max_new_tokens=40, eos_token_id=eos, temperature=0)
        same(
            with_cache(llm, PROMPTS, max_step=5, num_assistant_tokens=4, **options, **draft),
            llm.generate(PROMPTS, **options),
        )
    assert stopped_at >= set(range(1, 11))  # the first token, then two whole runs of k + 1


@pytest.mark.parametrize("who", ["same", "noise"])
def test_budgets_around_one_run(who, targets, drafts, plain):
    llm, (draft, _, _) = targets["full"], drafts["full", who]
    for budget in range(1, 9):
        out = llm.generate(PROMPTS, max_new_tokens=budget, eos_token_id=[], num_assistant_tokens=5, **draft)
        assert [o.token_ids for o in out] == [o.token_ids[:budget] for o in plain("full")]
        assert all(o.finish_reason == "length" for o in out)
        # Never more drafts than could become text.
        assert who != "same" or all(o.stats.drafted == o.stats.accepted for o in out)


@pytest.mark.parametrize("who", ["same", "noise"])
def test_stop_strings_across_tokens(who, targets, drafts, plain):
    llm, (draft, _, _) = targets["full"], drafts["full", who]
    for row in (0, 2, 4):
        text = plain("full")[row].text
        for place in range(0, len(text) - 5, 7):
            stop = text[place : place + 5]
            options = dict(max_new_tokens=40, eos_token_id=[], temperature=0, stop_strings=stop)
            expected = llm.generate(PROMPTS[row], **options)
            assert expected.finish_reason == "stop_string"
            out = llm.generate(PROMPTS[row], num_assistant_tokens=4, **options, **draft)
            same([out], [expected])
            pieces = list(llm.stream(PROMPTS[row], num_assistant_tokens=4, **options, **draft))
            assert "".join(pieces) == expected.text


def test_rows_that_finish_at_different_times(targets, drafts, plain):
    """A stop string per row's text ends one row early; the others go on as if nothing had happened."""
    llm, (draft, _, _) = targets["window"], drafts["window", "noise"]
    ends = [o.token_ids[3 + 7 * row] for row, o in enumerate(plain("window"))]
    options = dict(max_new_tokens=40, eos_token_id=ends, temperature=0)
    expected = llm.generate(PROMPTS, **options)
    assert len({o.stats.new_tokens for o in expected}) >= 3
    same(with_cache(llm, PROMPTS, max_step=7, num_assistant_tokens=6, **options, **draft), expected)


@pytest.fixture
def cheap_drafts(targets, monkeypatch):
    """Drafts as large as the target would make "auto" rest for ever; let it believe they are a tenth of 10 GB."""
    large = [llm.model for llm in targets.values()]
    cheap = property(lambda model: 10**10 if any(model is m for m in large) else 10**9)
    monkeypatch.setattr(Decoder, "weight_bytes", cheap)


def test_auto_equals_plain(targets, drafts, plain, cheap_drafts):
    for target, who in drafts:
        options = dict(max_new_tokens=40, eos_token_id=[], temperature=0)
        out = targets[target].generate(PROMPTS, **options, **drafts[target, who][0])
        same(out, plain(target))
        if who == "noise":  # the lengths do vary
            assert len({o.stats.drafted for o in out}) > 1


def test_nobody_drafts_where_it_cannot_pay(llm, monkeypatch):
    """A tiny model's step is cheaper than judging: "auto" and prompt lookup leave it at that, a number is obeyed."""
    monkeypatch.setattr("minillm.speculative.drafting.JUDGING_BYTES", JUDGING_BYTES)
    options = dict(max_new_tokens=30, eos_token_id=[], temperature=0)
    for who, drafted in (
        (dict(assistant_model=llm), False),
        (dict(prompt_lookup_num_tokens=2), False),
        (dict(assistant_model=llm, num_assistant_tokens=2), True),
    ):
        out = llm.generate("The wolf said the wolf said", **options, **who)
        assert (out.stats.drafted > 0) == drafted


def test_auto_learns_in_the_loop(llm, cheap_drafts):
    """A draft that is never right is soon asked for nothing; one that always is, for more."""
    options = dict(max_new_tokens=40, eos_token_id=[], temperature=0)
    for scale, low, high in ((0.0, 4, 8), (5.0, 0, 1.3)):
        for out in llm.generate(PROMPTS, assistant_model=noisy(llm, scale), **options):
            assert low <= out.stats.drafted / out.stats.target_steps <= high


def test_auto_drafts_no_more_than_a_step_takes(llm, cheap_drafts):
    """A draft that is always right would be asked for 8."""
    options = dict(max_new_tokens=40, eos_token_id=[], temperature=0)
    out = with_cache(llm, PROMPTS, max_step=4, assistant_model=noisy(llm, 0.0), **options)
    same(out, llm.generate(PROMPTS, **options))
    assert all(1 < o.stats.drafted / o.stats.target_steps <= 2 for o in out)  # 1 or 2 at a time


def test_repetition_penalty_knows_the_drafts(targets, drafts):
    options = dict(max_new_tokens=40, eos_token_id=[], temperature=0, repetition_penalty=1.5)
    for target, who in (("full", "same"), ("full", "noise"), ("window", "unrelated")):
        llm, (draft, _, _) = targets[target], drafts[target, who]
        expected = llm.generate(PROMPTS, **options)
        assert [o.token_ids for o in expected] != [
            o.token_ids for o in llm.generate(PROMPTS, **options | dict(repetition_penalty=1.0))
        ]
        out = llm.generate(PROMPTS, num_assistant_tokens=4, **options, **draft)
        same(out, expected)
        if who == "same":  # the draft counts its own tokens as the target does
            assert all(o.stats.acceptance_rate == 1 for o in out)
        same(llm.generate(PROMPTS, prompt_lookup_num_tokens=4, **options), expected)


def test_logprobs_are_the_models_own(llm, drafts):
    options = dict(max_new_tokens=30, eos_token_id=[], temperature=0, logprobs=True)
    expected = llm.generate(PROMPTS, **options)
    out = llm.generate(PROMPTS, num_assistant_tokens=3, **options, **drafts["full", "noise"][0])
    for ours, theirs in zip(out, expected, strict=True):
        # Steps of 1 and of 4 tokens add up in another order: a few float32 roundings of logits near 10.
        torch.testing.assert_close(torch.tensor(ours.logprobs), torch.tensor(theirs.logprobs), atol=1e-4, rtol=0)


# -- the draft's cache ---------------------------------------------------------------------------


def test_the_draft_never_misses_a_key(llm):
    """After steps that accepted everything, the draft's keys are what reading the text at once gives."""
    rows = [llm.tokenizer.encode(p) for p in PROMPTS[:3]]
    cache = StaticCache(llm.config, 3, 100, dtype=llm.dtype)
    drafter = DraftModel(llm.steps, llm.model, cache)
    sampling = sampling_of([0] * 3, "cpu")
    texts = [list(ids) for ids in rows]
    with torch.inference_mode():
        for _ in range(4):
            for text, bonus in zip(texts, (10, 11, 12), strict=True):
                text.append(bonus)  # what the target adds of its own
            draft = drafter.propose(dict(enumerate(texts)), [3, 3, 3], sampling, None)
            for text, ids in zip(texts, draft.tokens.tolist(), strict=True):
                text += ids
        drafter.propose({b: [*text, 13] for b, text in enumerate(texts)}, [1, 1, 1], sampling, None)
        for b, text in enumerate(texts):
            whole, length = StaticCache(llm.config, 1, 100, dtype=llm.dtype), len(text) + 1
            llm.model(torch.tensor([[*text, 13]]), torch.arange(length)[None], whole)
            for ours, theirs in zip(cache.keys + cache.values, whole.keys + whole.values, strict=True):
                # Float32 sums in another order, through two layers, of values around 1.
                torch.testing.assert_close(ours[b, :, :length], theirs[0, :, :length], atol=2e-5, rtol=0)
    assert cache.token_ids == [[*text, 13] for text in texts]


def test_a_draft_that_has_rested_forgets_what_was_rejected(llm):
    """Its cache holds drafts; when the text has gone on without it, nobody knows which of them were taken."""
    text, cache = llm.tokenizer.encode(PROMPTS[0]), StaticCache(llm.config, 1, 100, dtype=llm.dtype)
    drafter, sampling = DraftModel(llm.steps, llm.model, cache), sampling_of([0], "cpu")
    with torch.inference_mode():
        for count in (4, 1, 3):
            proposed = drafter.propose({0: text}, [count], sampling, None).tokens[0].tolist()
            text += [(token + 1) % llm.config.vocab_size for token in proposed] + [10, 11, 12]
        drafter.propose({0: text}, [1], sampling, None)
    assert cache.token_ids == [text]


@pytest.mark.parametrize("count", [1, 2, 4])
def test_whatever_was_accepted_the_next_draft_continues_the_text(llm, count):
    """As a draft model that meets the text for the first time."""
    sampling = sampling_of([0], "cpu")

    def drafter():
        return DraftModel(llm.steps, llm.model, StaticCache(llm.config, 1, 100, dtype=llm.dtype))

    with torch.inference_mode():
        for accepted in range(count + 1):
            one, text = drafter(), llm.tokenizer.encode(PROMPTS[0])
            text += [*one.propose({0: text}, [count], sampling, None).tokens[0].tolist()[:accepted], 11]
            ours, theirs = (d.propose({0: text}, [3], sampling, None).tokens.tolist() for d in (one, drafter()))
            assert ours == theirs, accepted


def test_ids_the_draft_cannot_read(llm, window_llm, text_tokenizer_files):
    """The target's padded ids lie beyond the draft's embedding; they may stand in a prompt all the same."""
    odd = llm.config.vocab_size - 1
    assert odd >= window_llm.config.vocab_size
    prompt = [5, odd, 6, odd]
    options = dict(max_new_tokens=20, eos_token_id=[], temperature=0)
    out = llm.generate(prompt, assistant_model=window_llm, num_assistant_tokens=3, **options)
    assert out.token_ids == llm.generate(prompt, **options).token_ids
    # The other way round the draft's surplus ids have no place in the target's distribution.
    drafter = DraftModel(llm.steps, window_llm.model, StaticCache(llm.config, 1, 64))
    hot = sampling_of([1], "cpu", temperature=50.0)  # nearly uniform
    with torch.inference_mode():
        draft = drafter.propose({0: [5]}, [8], hot, None)
    assert draft.probs.shape == (1, 8, window_llm.config.vocab_size)
    torch.testing.assert_close(draft.probs.sum(-1), torch.ones(1, 8))


def test_a_text_that_outgrows_the_draft(llm, tmp_path, text_tokenizer_files):
    config = FAMILIES["llama3"].with_changes(
        {"vocab_size": text_tokenizer_files.vocabulary, "max_position_embeddings": 24, "rope_scaling": None}
    )
    save_checkpoint(tmp_path / "short", config, seed=5)
    text_tokenizer_files.copy_to(tmp_path / "short")
    short = LLM.from_pretrained(tmp_path / "short", dtype="float32", device="cpu")
    assert short.config.max_positions == 24
    options = dict(max_new_tokens=40, eos_token_id=[], temperature=0)
    out = llm.generate(PROMPTS, assistant_model=short, num_assistant_tokens=4, **options)
    same(out, llm.generate(PROMPTS, **options))
    own = with_cache(llm, PROMPTS, assistant_model=short, num_assistant_tokens=4, **options)  # its draft has another
    same(own, out)
    for said in (out, own):
        assert [o.stats.drafted > 0 for o in said] == [o.stats.prompt_tokens < 24 for o in said]
    assert out[1].stats.drafted < 4 * (out[1].stats.target_steps - 1)


def test_a_conversation_keeps_both_caches(llm, drafts, monkeypatch):
    draft = drafts["full", "noise"][0]["assistant_model"]
    options = dict(max_new_tokens=12, temperature=0)
    chat, expected = (
        llm.conversation(assistant_model=draft, num_assistant_tokens=3, **options),
        llm.conversation(**options),
    )
    fed = []
    embed = draft.steps.embed

    def spy(input_ids, cache_position, cache):
        fed.append(int(cache_position[cache_position >= 0].min()))
        return embed(input_ids, cache_position, cache)

    monkeypatch.setattr(draft.steps, "embed", spy)
    for turn, message in enumerate(["Hello wolf", "Where are you going?", "So early in the morning?"]):
        fed.clear()
        out = chat.say(message)
        assert out.token_ids == expected.say(message).token_ids
        assert out.stats.drafted > 0
        assert (min(fed) == 0) == (turn == 0)  # only the first turn reads the text from its beginning
    assert chat.messages == expected.messages


def test_the_draft_turns_by_the_clock_of_the_target(checkpoint, text_tokenizer_files, tmp_path):
    """longrope, beside a cache of one's own: its tables are those for the whole cache, not for this prompt's length."""
    folder = shutil.copytree(checkpoint("phi3"), tmp_path / "phi3")
    text_tokenizer_files.copy_to(folder)
    phi = LLM.from_pretrained(folder, dtype="float32", device="cpu")
    options = dict(max_new_tokens=20, eos_token_id=[], temperature=0, assistant_model=phi, num_assistant_tokens=3)
    for length in (40, 200):  # within and beyond the original 64 positions
        out = phi.generate(list(range(5, 20)), cache=StaticCache(phi.config, 1, length), **options)
        assert out.stats.acceptance_rate == 1


def test_a_cache_of_ones_own_is_continued(window_llm, drafts):
    """Stopped in the middle and called again with the longer prompt: as if never stopped."""
    draft = drafts["window", "noise"][0]
    options = dict(eos_token_id=[], temperature=0, num_assistant_tokens=3, **draft)
    ids = [window_llm.tokenizer.encode(p) for p in PROMPTS]
    cache = StaticCache(window_llm.config, len(ids), 100, dtype=window_llm.dtype, max_step=4)
    first = window_llm.generate(ids, max_new_tokens=15, cache=cache, **options)
    longer = [a + o.token_ids for a, o in zip(ids, first, strict=True)]
    second = window_llm.generate(longer, max_new_tokens=15, cache=cache, **options)
    assert [o.stats.reused_tokens for o in second] == [len(text) - 1 for text in longer]
    whole = window_llm.generate(ids, max_new_tokens=30, eos_token_id=[], temperature=0)
    assert [a.token_ids + b.token_ids for a, b in zip(first, second, strict=True)] == [o.token_ids for o in whole]


# -- sampling ------------------------------------------------------------------------------------

SAMPLED = dict(max_new_tokens=30, eos_token_id=[], temperature=0.9, top_p=0.95)


@pytest.mark.parametrize("asked", [3, "auto"])
def test_the_same_seed_gives_the_same_text_in_any_batch(asked, targets, drafts, cheap_drafts):
    for target in ("full", "window"):
        llm = targets[target]
        options = dict(num_assistant_tokens=asked, **drafts[target, "noise"][0], **SAMPLED)
        together = llm.generate(PROMPTS, seed=[1, 2, 3, 4, 5], **options)
        alone = [llm.generate(prompt, seed=seed, **options) for seed, prompt in enumerate(PROMPTS, start=1)]
        same(together, alone)
        assert [o.stats.drafted for o in together] == [o.stats.drafted for o in alone]
        assert 0 < sum(o.stats.accepted for o in together) < sum(o.stats.drafted for o in together)
        again = llm.generate(PROMPTS[::-1], seed=[5, 4, 3, 2, 1], **options)
        same(together, again[::-1])
        other = llm.generate(PROMPTS, seed=6, **options)
        assert all(a.token_ids != b.token_ids for a, b in zip(other, together, strict=True))


def test_prompt_lookup_samples_exactly_the_plain_text(targets):
    """It draws the target's own tokens with plain decoding's numbers: seeds mean the same in both."""
    for llm in targets.values():
        prompts = [p + " " + p for p in PROMPTS]
        options = dict(seed=[1, 2, 3, 4, 5], **SAMPLED | dict(temperature=0.5))
        out = llm.generate(prompts, prompt_lookup_num_tokens=3, **options)
        same(out, llm.generate(prompts, **options))
        assert sum(o.stats.drafted for o in out) > 0


@pytest.mark.parametrize(
    "filters", [dict(top_p=0.9), dict(top_k=50, min_p=0.02), dict(top_k=50, top_p=0.9, min_p=0.02)]
)
def test_the_target_draws_what_plain_decoding_draws(filters):
    """In a long vocabulary, at each place of each row, whether its logits are sure or not: a seed means one text."""
    rows, k, vocabulary = 4, 3, 40_000
    logits = torch.randn(rows, k + 1, vocabulary, generator=torch.Generator().manual_seed(0))
    logits *= torch.tensor([6.0, 3.0, 1.0, 0.0])[:, None, None]
    sampling = sampling_of(range(rows), "cpu", temperature=0.8, **filters)
    start = torch.tensor([5, 900, 17, 33])
    own = torch.stack([next_token(logits[:, i], sampling, start + i) for i in range(k + 1)], dim=1)  # [B, k + 1]
    right = torch.tensor([0, 1, 2, 3])  # how many drafts are the target's own tokens
    drafts = torch.where(torch.arange(k) < right[:, None], own[:, :k], own[:, :k] + 1)
    accepted, following = judge(logits, Draft(drafts, None, [k] * rows, torch.full((rows,), k)), start, sampling, None)
    assert accepted.tolist() == right.tolist()
    assert following.tolist() == own.gather(1, right[:, None])[:, 0].tolist()


KINDS = 3  # top_k: three tokens can come at each place
LENGTH = 3  # after the first token, which prefill gives


@pytest.fixture(scope="module")
def sampling_truth(text_reference):
    """Joint law of four tokens after a prompt under top-3 sampling, from transformers in float64."""
    model, prompt = copy.deepcopy(text_reference).double(), [1, 70, 81, 92]
    law = {(): 1.0}
    for _ in range(1 + LENGTH):
        grown = {}
        for text, share in law.items():
            with torch.no_grad():
                logits = model(torch.tensor([[*prompt, *text]])).logits[0, -1] / 1.3
            best = logits.topk(KINDS)
            for token, p in zip(best.indices.tolist(), best.values.softmax(-1).tolist(), strict=True):
                grown[(*text, token)] = share * p
        law = grown
    return prompt, law


def chi_square_p_value(law, texts):
    """How likely a sample this far from the law is, if it has that law; cells below 8 expected are merged."""
    counts = dict.fromkeys(law, 0)
    for text in texts:
        counts[text] += 1  # a KeyError would be a token of probability zero
    cells = sorted(law, key=law.get)
    merged, expected, observed = [], 0.0, 0
    for cell in cells:
        expected, observed = expected + len(texts) * law[cell], observed + counts[cell]
        if expected >= 8:
            merged.append((expected, observed))
            expected, observed = 0.0, 0
    merged[-1] = (merged[-1][0] + expected, merged[-1][1] + observed)
    statistic = sum((o - e) ** 2 / e for e, o in merged)
    freedom = torch.tensor((len(merged) - 1) / 2, dtype=torch.float64)
    return float(torch.special.gammaincc(freedom, torch.tensor(statistic / 2, dtype=torch.float64)))


def sampled_texts(llm, draft, prompt, rows, k=2):
    """Many rows of one batch, each with its own seed."""
    out = llm.generate(
        [prompt] * rows,
        seed=list(range(rows)),
        assistant_model=draft,
        num_assistant_tokens=k,
        max_new_tokens=1 + LENGTH,
        eos_token_id=[],
        temperature=1.3,
        top_k=KINDS,
    )
    rate = sum(o.stats.accepted for o in out) / sum(o.stats.drafted for o in out)
    assert 0.2 < rate < 0.8  # accepting and rejecting both matter
    return [tuple(o.token_ids) for o in out]


FALSE_ALARM = 1e-6
ROWS = 6000


def test_sampled_tokens_have_the_targets_law(llm, drafts, sampling_truth):
    prompt, law = sampling_truth
    texts = sampled_texts(llm, drafts["full", "noise"][0]["assistant_model"], prompt, ROWS)
    assert chi_square_p_value(law, texts) > FALSE_ALARM


@pytest.mark.parametrize("mistake", ["no residual", "acceptance draws the draft's number again"])
def test_the_chi_square_test_finds_a_biased_verifier(mistake, llm, drafts, sampling_truth, monkeypatch):
    if mistake == "no residual":
        monkeypatch.setattr(kernels, "verify", lambda *_: None)
        monkeypatch.setattr(verifying, "verify", without_residual)
    else:
        monkeypatch.setattr(verifying, "_ACCEPT_STREAM", DRAFT_STREAM)
    prompt, law = sampling_truth
    texts = sampled_texts(llm, drafts["full", "noise"][0]["assistant_model"], prompt, ROWS)
    assert chi_square_p_value(law, texts) < FALSE_ALARM


# -- options -------------------------------------------------------------------------------------


def test_options_that_cannot_be(llm, metaspace_files, tmp_path):
    config = FAMILIES["llama2"].with_changes({"vocab_size": metaspace_files.vocabulary})
    save_checkpoint(tmp_path / "other", config, seed=1)
    metaspace_files.copy_to(tmp_path / "other")
    other = LLM.from_pretrained(tmp_path / "other", dtype="float32", device="cpu")
    cache = StaticCache(llm.config, 1, 64, dtype=llm.dtype, max_step=4)
    cases = [
        (dict(assistant_model=llm, prompt_lookup_num_tokens=3), "exclude each other"),
        (dict(num_assistant_tokens=3), "needs an assistant_model"),
        (dict(assistant_model="demo-draft"), "must be an LLM"),
        (dict(assistant_model=llm, num_assistant_tokens=0), "num_assistant_tokens must be"),
        (dict(assistant_model=llm, num_assistant_tokens="some"), '"auto"'),
        (dict(prompt_lookup_num_tokens=0), "prompt_lookup_num_tokens must be"),
        (dict(prompt_lookup_num_tokens=True), "prompt_lookup_num_tokens must be"),
        (dict(assistant_model=other), "another tokenizer: id 0 is '<pad>' for the model"),
        (dict(assistant_model=llm, num_assistant_tokens=4, cache=cache), "max_step=5"),
        (dict(prompt_lookup_num_tokens=4, cache=cache), "max_step=5"),
    ]
    for options, words in cases:
        with pytest.raises(RequestError, match=words):
            llm.generate("The wolf", max_new_tokens=10, **options)
    # What fits, fits: the drafts a short answer can use at most, and as many as the step has room for.
    llm.generate("The wolf", max_new_tokens=4, cache=cache, assistant_model=llm, num_assistant_tokens=4)
    llm.generate("The wolf", max_new_tokens=10, cache=cache, assistant_model=llm)


# -- the command line ----------------------------------------------------------------------------


def test_the_command_line_marks_accepted_drafts(llm, text_checkpoint, capsys):
    prompt, options = "The wolf [said]", ["--max-new-tokens", "20", "--temperature", "0"]
    arguments = ["generate", prompt, "--model", str(text_checkpoint), "--device", "cpu", *options]
    assert main([*arguments, "--draft-model", str(text_checkpoint), "--num-assistant-tokens", "3", "--show-draft"]) == 0
    shown, notice = capsys.readouterr()
    out = llm.generate(prompt, max_new_tokens=20, temperature=0, assistant_model=llm, num_assistant_tokens=3)
    assert shown.startswith(prompt)
    assert shown.count("[") - prompt.count("[") - out.text.count("[") == out.stats.target_steps - 1
    assert shown.replace("[", "").replace("]", "") == (prompt + out.text + "\n").replace("[", "").replace("]", "")
    assert f"{out.stats.accepted} of {out.stats.drafted} drafted tokens accepted (100%)" in notice
    assert main([*arguments, "--show-draft"]) == 1
    assert "--draft-model" in capsys.readouterr().err
    assert main([*arguments, "--show-draft", "--stream", "--prompt-lookup-num-tokens", "3"]) == 1
    assert "leave out --stream" in capsys.readouterr().err
    assert main([*arguments, "--no-stream", "--prompt-lookup-num-tokens", "3", "--stop", "x"]) == 0
    assert capsys.readouterr().out == prompt + llm.generate(prompt, max_new_tokens=20, stop_strings="x").text + "\n"
