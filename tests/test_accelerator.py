"""What the runtime does on a GPU, without one: `accelerator.py` stands in for it. What kernels compute is not at stake
here (test_kernels_*.py), but when the host waits, what is captured, and which memory a captured step reads."""

import itertools
import sys
import time
import warnings
from types import SimpleNamespace

import pytest
import torch
from accelerator import Accelerator
from families import FAMILIES, prompt_ids
from minillm_kernels.sampling import running_sum, sample
from rows import new_row, sampling_of

from minillm.batch import Batch
from minillm.cache import GPU_MAX_STEP, MAX_STEP, StaticCache
from minillm.cli.commands import how_it_runs
from minillm.decode import prefill
from minillm.errors import BackendError
from minillm.faster.steps import CapturedStep, Steps
from minillm.linear import Int4Linear, Int8Linear
from minillm.llm import LLM
from minillm.load.backends import choose_backend, why_no_kernels
from minillm.load.checkpoint import load_decoder
from minillm.load.config_json import load_config, parse_config
from minillm.load.placement import choose_device
from minillm.load.quantize import fill_rows, quantize_int4, quantize_int8
from minillm.load.tokenizer import load_tokenizer
from minillm.options import GenerationConfig
from minillm.request import Request
from minillm.rope import inverse_frequencies
from minillm.sampling import next_token
from minillm.speculative.drafting import Drafting
from minillm.speculative.proposers import DraftModel, PromptLookup


@pytest.fixture
def accelerator():
    with Accelerator() as made:
        yield made


@pytest.fixture
def decoder(checkpoint, accelerator):
    """decoder(name) -> a fresh one on the accelerator."""

    def load(name="llama3", **options):
        folder = checkpoint(name)
        return accelerator.move(load_decoder(folder, load_config(folder), torch.float32, "cpu", "kernels", **options))

    return load


def oracle(ours, name, row, steps):
    """Logits after each of `steps` more tokens of one row, computed on the CPU."""
    model = ours(name)
    cache = StaticCache(model.config, 1, 64)
    with torch.inference_mode():
        prefill(model, cache, [row], [0])
        return [model(torch.tensor([[7 + i]]), torch.tensor([[len(row) + i]]), cache) for i in range(steps)]


def step_all(accelerator, steps, cache, start, count):
    with torch.inference_mode():
        return [
            steps(accelerator.put(torch.tensor([[7 + i]])), accelerator.put(torch.tensor([[start + i]])), cache).inner
            for i in range(count)
        ]


CLOSE = dict(rtol=0, atol=1e-4)


# ---- captured steps ----


def test_a_captured_step_follows_token_and_position(accelerator, decoder, ours):
    """One capture, then replays; a replay is what the graph recorded and nothing else."""
    steps = Steps(decoder())
    cache, row = StaticCache(steps.config, 1, 64, "cuda"), prompt_ids(9, seed=1)
    with torch.inference_mode():
        prefill(steps, cache, [row], [0])
    for found, expected in zip(step_all(accelerator, steps, cache, 9, 4), oracle(ours, "llama3", row, 4), strict=True):
        torch.testing.assert_close(found, expected, **CLOSE)
    (graph,) = accelerator.graphs
    assert graph.replays == 4
    assert {type(step) for step in steps._recorded[cache].values()} == {CapturedStep}
    assert accelerator.reads == []


def test_a_captured_step_after_reset_and_plan(accelerator, checkpoint, decoder, ours):
    """The rotary tables that a graph reads are filled anew where they lie: a second text of another length is right."""

    def differs(rope) -> bool:
        return rope.follows_length and not torch.equal(*(inverse_frequencies(rope, length) for length in (128, 12)))

    name = next(name for name in FAMILIES if any(map(differs, ours(name).config.ropes)))
    model = decoder(name)
    steps, cache = Steps(model), StaticCache(model.config, 1, 128, "cuda", planned_length=128)
    row = prompt_ids(9, seed=2)
    for planned in (128, 12, 128):
        cache.reset()
        cache.plan(planned)
        with torch.inference_mode():
            prefill(steps, cache, [row], [0])
        found = step_all(accelerator, steps, cache, 9, 2)
        on_cpu, expected = StaticCache(model.config, 1, 128, planned_length=planned), []
        with torch.inference_mode():
            prefill(ours(name), on_cpu, [row], [0])
            for i in range(2):
                expected.append(ours(name)(torch.tensor([[7 + i]]), torch.tensor([[9 + i]]), on_cpu))
        torch.testing.assert_close(found, expected, **CLOSE)
    assert len(accelerator.graphs) == 1


def test_moved_weights_are_captured_anew(accelerator, decoder):
    """A graph reads the addresses it was captured with: weights that have moved since are noticed."""
    model = decoder()
    steps, cache = Steps(model), StaticCache(model.config, 1, 64, "cuda")
    with torch.inference_mode():
        prefill(steps, cache, [prompt_ids(9, seed=1)], [0])
    before = step_all(accelerator, steps, cache, 9, 2)
    for name, parameter in [*model.head._parameters.items()]:
        if parameter is not None:
            model.head._parameters[name] = accelerator.put(parameter.inner * 2)
    cache.truncate(9)
    after = step_all(accelerator, steps, cache, 9, 2)
    torch.testing.assert_close(after, [2 * logits for logits in before], **CLOSE)
    assert len(accelerator.graphs) == 2


def test_what_cannot_be_captured_runs_as_written(accelerator, decoder, ours):
    """With a warning that names the step and the reason, once."""
    accelerator.fail_capture = True
    steps = Steps(decoder())
    cache, row = StaticCache(steps.config, 1, 64, "cuda"), prompt_ids(9, seed=1)
    with torch.inference_mode():
        prefill(steps, cache, [row], [0])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = step_all(accelerator, steps, cache, 9, 3)
    torch.testing.assert_close(found, oracle(ours, "llama3", row, 3), **CLOSE)
    (warning,) = [w for w in caught if "captured" in str(w.message)]
    assert "[1, 1]" in str(warning.message) and "not permitted" in str(warning.message)


def test_another_device_is_the_current_one_meanwhile(checkpoint, monkeypatch):
    """Streams, graphs and events belong to the current device: on "cuda:1" that is made so, and undone."""
    entered = []

    class Device:
        def __init__(self, device):
            self.device = device

        def __enter__(self):
            entered.append(str(self.device))

        def __exit__(self, *error):
            entered.append("left")

    folder = checkpoint("llama3")
    model = load_decoder(folder, load_config(folder), torch.float32, "cpu", "kernels")
    with Accelerator(index=1) as second, torch.inference_mode():
        steps = Steps(second.move(model))
        cache = StaticCache(steps.config, 1, 32, "cuda:1")
        monkeypatch.setattr(torch.cuda, "device", Device)
        step_all(second, steps, cache, 0, 1)
    assert entered == ["cuda:1", "left"]


def test_cuda_is_the_device_its_tensors_say(accelerator, decoder):
    """StaticCache(device="cuda") is one on "cuda:0", like the weights."""
    model = decoder()
    cache = StaticCache(model.config, 1, 32, device="cuda")
    assert cache.device == model.embedding.weight.device == torch.device("cuda:0")
    cache.check_model(model, 1)


# ---- when the host waits ----


def rows_of(tokenizer, prompts, budget=20, **options):
    config, eos = GenerationConfig(), frozenset([2])
    return [
        new_row(ids, config, budget, eos, tokenizer, device="cuda", seed=seed, **options)
        for seed, ids in enumerate(prompts, start=1)
    ]


@pytest.mark.parametrize(
    "sampled", [{}, dict(temperature=0.9, top_k=20, top_p=0.9, min_p=0.01, repetition_penalty=1.2)]
)
def test_the_host_reads_once_a_look(accelerator, decoder, text_tokenizer_files, sampled):
    """20 tokens: one after the prompts, then eight steps to a look, whatever the filters."""
    steps, tokenizer = Steps(decoder()), load_tokenizer(text_tokenizer_files.folder)
    rows = rows_of(tokenizer, [prompt_ids(5, seed=1), prompt_ids(11, seed=2)], wants_logprobs=True, **sampled)
    loop = Batch(steps, StaticCache(steps.config, 2, 64, "cuda"), rows).run()
    counts = []
    for _ in loop:
        counts.append(len(accelerator.reads))
    longest = max(len(row.token_ids) for row in rows)
    assert len(counts) == 1 + -(-(longest - 1) // 8)
    per_tick = [later - earlier for earlier, later in itertools.pairwise(counts)]
    assert per_tick and all(reads <= 1 for reads in per_tick), accelerator.reads


def attach(rows, proposer, model, config):
    drafting = Drafting(SimpleNamespace(model=model), None)
    drafting.proposer = proposer
    for row in rows:
        drafting.attach(row, config, 64)


@pytest.mark.parametrize("who", ["lookup", "draft"])
def test_a_verify_step_reads_once(accelerator, decoder, text_tokenizer_files, who):
    """Drafting and judging ask the device for nothing: the look is the only read, the uploads are few."""
    steps, tokenizer = Steps(decoder()), load_tokenizer(text_tokenizer_files.folder)
    prompts = [(prompt_ids(6, seed=1) * 3)[:16], (prompt_ids(5, seed=2) * 3)[:13]]
    cache = StaticCache(steps.config, 2, 64, "cuda")
    proposer = PromptLookup(cache.device)
    options = dict(prompt_lookup_num_tokens=3)
    if who == "draft":
        draft = Steps(decoder())
        proposer = DraftModel(draft, steps.model, StaticCache(draft.config, 2, 64, "cuda"))
        options = dict(num_assistant_tokens=3)
    rows = rows_of(tokenizer, prompts)

    attach(rows, proposer, steps.model, GenerationConfig(**options))
    counts, uploads, drafted = [], [], []
    for _ in Batch(steps, cache, rows).run():
        counts.append(len(accelerator.reads))
        uploads.append(len(accelerator.uploads))
        drafted.append(sum(row.drafted for row in rows))
    ticks = [
        (counts[i + 1] - counts[i], uploads[i + 1] - uploads[i])
        for i in range(len(counts) - 1)
        if drafted[i + 1] > drafted[i]
    ]
    assert len(ticks) >= 2
    assert all(reads <= 1 for reads, _ in ticks), accelerator.reads
    assert sorted(up for _, up in ticks)[len(ticks) // 2] <= 6  # one for the lookup, the draft's and the cut
    assert all(row.finish_reason for row in rows)


def test_drafts_say_what_the_cpu_says(accelerator, decoder, ours, text_tokenizer_files):
    """The host keeps the draft's lengths by itself: the texts, and how many drafts are accepted, stay the same."""
    tokenizer, said = load_tokenizer(text_tokenizer_files.folder), []
    prompts = [(prompt_ids(6, seed=1) * 3)[:16], (prompt_ids(5, seed=2) * 3)[:13]]
    for model, device in ((decoder(), "cuda"), (ours("llama3"), "cpu")):
        cache = StaticCache(model.config, 2, 64, device)
        proposer = DraftModel(Steps(model), model, StaticCache(model.config, 2, 64, device))
        rows = [
            new_row(ids, GenerationConfig(), 20, frozenset([2]), tokenizer, device=device, seed=1) for ids in prompts
        ]
        attach(rows, proposer, model, GenerationConfig(num_assistant_tokens=3))
        for _ in Batch(model, cache, rows).run():
            pass
        said.append([(row.token_ids, sum(row.from_draft)) for row in rows])
        assert all(sum(row.from_draft) > 5 for row in rows)  # the model agrees with itself
        assert cache.token_ids == [row.prompt + row.token_ids[:-1] for row in rows]
    assert said[0] == said[1]


# ---- honest times ----


@pytest.mark.parametrize("look_every", [1, 8])
@pytest.mark.parametrize("budget", [1, 7, 8, 25])
def test_times_are_those_of_the_steps(look_every, budget, ours, text_tokenizer_files, monkeypatch):
    """Steps of a known length: the first token is there after the prompt's pass, each other one a step later, however
    seldom one looks."""
    model, tokenizer, pause = ours("llama3"), load_tokenizer(text_tokenizer_files.folder), 0.004
    clock = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])
    walk = type(model).walk

    def slow(self, *arguments, **keywords):
        clock[0] += pause
        return walk(self, *arguments, **keywords)

    monkeypatch.setattr(type(model), "walk", slow)
    row = new_row(prompt_ids(9, seed=1), GenerationConfig(), budget, frozenset(), tokenizer, device="cpu", seed=1)
    batch = Batch(model, StaticCache(model.config, 1, 64), [row])
    batch.look_every = look_every
    for _ in batch.run():
        pass
    assert len(row.token_ids) == budget
    assert row.first_at - row.started == pytest.approx(pause)
    assert row.last_at - row.first_at == pytest.approx((budget - 1) * pause)


# ---- sampling ----


def test_sums_over_a_long_vocabulary_do_not_depend_on_the_order(accelerator):
    """On a GPU in whole numbers, in pieces: the same to the bit for any batch, and as good as float64."""
    generator = torch.Generator().manual_seed(0)
    for size in (1, 1023, 1024, 1025, 128_256):
        probs = (torch.randn(3, size, generator=generator) * 4).softmax(dim=-1)
        found = running_sum(accelerator.put(probs)).inner
        exact = probs.double().cumsum(dim=-1)
        assert found.shape == exact.shape
        assert (found - exact).abs().max() < size * 2**-45 + 2**-50
        backwards = running_sum(accelerator.put(probs.flip(-1))).inner
        assert torch.equal(found[:, -1], backwards[:, -1])  # whole numbers: in any order
    rare = torch.zeros(1, 5000).index_fill(1, torch.tensor([4321]), 1e-9)
    assert sample(accelerator.put(rare), accelerator.put(torch.tensor([0.7]).double())).inner.tolist() == [4321]


def test_a_long_vocabulary_is_sampled_as_on_a_cpu(accelerator):
    logits = torch.randn(4, 128_256, generator=torch.Generator().manual_seed(1)) * 4
    place = torch.arange(4)
    for options in (dict(), dict(top_k=50), dict(top_p=0.9), dict(top_k=50, top_p=0.9), dict(min_p=0.02)):
        chosen = [sampling_of(range(4), device, temperature=0.9, **options) for device in ("cpu", "cuda")]
        found = next_token(accelerator.put(logits), chosen[1], accelerator.put(place)).inner
        assert torch.equal(found, next_token(logits, chosen[0], place)), options
    assert accelerator.reads == []


def test_a_token_is_two_launches(accelerator):
    logits, place = accelerator.put(torch.randn(2, 999)), accelerator.put(torch.arange(2))
    every = sampling_of([1, 2], "cuda", temperature=0.8, top_k=50, top_p=0.9, min_p=0.02)
    accelerator.tape = []
    next_token(logits, every, place)
    assert [function.name() for function, *_ in accelerator.tape] == ["minillm::probabilities", "minillm::draw"]


# ---- requests ----


@pytest.fixture
def llm(accelerator, decoder, text_tokenizer_files):
    model = decoder()
    return LLM(model, load_tokenizer(text_tokenizer_files.folder), model.config, GenerationConfig())


def test_requests_without_a_cache_capture_once(accelerator, llm, ours):
    """The last request's cache is kept, and with it its captured steps; a longer request makes a larger one."""
    plain = LLM(ours("llama3"), llm.tokenizer, llm.config, GenerationConfig())
    for seed, length in enumerate((5, 9, 30)):
        ids = prompt_ids(length, seed=seed)
        answer = llm.generate(ids, max_new_tokens=6)
        assert answer.token_ids == plain.generate(ids, max_new_tokens=6).token_ids
    assert len(accelerator.graphs) == 1
    first = Request(llm, prompt_ids(5, seed=1), None, None, Drafting(llm, None), dict(max_new_tokens=4))
    second = Request(llm, prompt_ids(5, seed=1), None, None, Drafting(llm, None), dict(max_new_tokens=4))
    assert first.batch.cache is not second.batch.cache  # two at a time


def test_chunks_are_long_on_a_gpu(accelerator, ours):
    config = ours("llama3").config
    assert StaticCache(config, 1, 4096, "cuda").max_step == GPU_MAX_STEP == 2048
    assert StaticCache(config, 1, 4096).max_step == MAX_STEP == 256


def test_lengths_do_not_count_the_bin(accelerator, decoder):
    """A full row beside padding: column `max_cache_len` is where padding goes, and no token."""
    model = decoder()
    cache = StaticCache(model.config, 2, 4, "cuda")
    ids, position = [[5, 6, 7, 8], [5, 0, 0, 0]], [[0, 1, 2, 3], [0, -1, -1, -1]]
    with torch.inference_mode():
        model(accelerator.put(torch.tensor(ids)), accelerator.put(torch.tensor(position)), cache)
        padding = [[9], [9]], [[-1], [-1]]
        model(*(accelerator.put(torch.tensor(rows)) for rows in padding), cache)
    assert cache.lengths == [4, 1]


# ---- choices ----


def test_auto_on_a_gpu_is_our_kernels_and_else_says_why(monkeypatch):
    monkeypatch.setattr("minillm.measure.bench.device_name", str)
    gpu = torch.device("cuda")
    for name in FAMILIES:  # windows, softcap, and all the rest
        assert choose_backend("auto", parse_config(FAMILIES[name].config), gpu).name == "kernels", name
    llama = parse_config(FAMILIES["llama2"].config)
    assert dict(how_it_runs(llama, gpu, "auto", "auto"))["attention by"] == "kernels"
    wide = parse_config(FAMILIES["llama2"].config | {"head_dim": 288})
    assert "288" in dict(how_it_runs(wide, gpu, "auto", "auto"))["attention by"]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    old = torch.device("cuda", 5)  # no other test asks about this one: the answer is kept
    assert "8.0" in why_no_kernels(llama, old) and "7.5" in why_no_kernels(llama, old)
    assert choose_backend("auto", llama, old).name == "sdpa"
    assert choose_backend("auto", parse_config(FAMILIES["gemma2"].config), old).name == "math"
    with pytest.raises(BackendError, match=r"capability 8\.0.*'auto'"):
        choose_backend("kernels", llama, old)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.delitem(sys.modules, "triton", raising=False)
    assert "Triton" in why_no_kernels(llama, gpu)


def test_an_amd_gpu_takes_no_row_of_an_nvidia_chip(monkeypatch):
    """gfx90a calls itself (9, 0), as an H100 does, and has 64 KiB of shared memory."""
    from minillm_kernels import launch

    llama = parse_config(FAMILIES["llama2"].config)
    monkeypatch.setattr(torch.version, "hip", "6.3")
    assert "NVIDIA" in why_no_kernels(llama, torch.device("cuda"))
    assert choose_backend("auto", llama, torch.device("cuda")).name == "sdpa"
    with pytest.raises(RuntimeError, match="NVIDIA"):
        launch.architecture(torch.device("cuda", 6))


def test_a_device_without_float64_is_refused_by_name(monkeypatch):
    """Apple's GPUs: sampling needs it."""
    zeros = torch.zeros

    def without(*arguments, **keywords):
        if keywords.get("dtype") is torch.float64:
            raise TypeError("Cannot convert a MPS Tensor to float64 dtype as the MPS framework doesn't support float64")
        return zeros(1)

    monkeypatch.setattr(torch, "zeros", without)
    with pytest.raises(BackendError, match=r"mps.*float64"):
        choose_device("mps")


@pytest.mark.parametrize("word", ["efficient", "cudnn"])
def test_an_implementation_of_sdpa_that_a_cpu_lacks(word):
    with pytest.raises(BackendError, match="GPU only"):
        choose_backend(f"sdpa:{word}", parse_config(FAMILIES["llama2"].config), "cpu")


# ---- quantizing ----


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_weights_are_quantized_where_the_layer_is(accelerator, kind):
    """On the accelerator, in large pieces, and to the same codes as on a CPU."""
    weight = torch.randn(64, 128, generator=torch.Generator().manual_seed(0))
    layer = Int8Linear(128, 64, False, torch.float32) if kind == "int8" else Int4Linear(128, 64, False, torch.float32)
    accelerator.move(layer)
    ran = []
    run = accelerator.run

    def noting(function, arguments, keywords):
        ran.append(function._schema.name)
        return run(function, arguments, keywords)

    accelerator.run = noting
    fill_rows(layer, 0, weight)
    assert "aten::round_" in ran
    expected = quantize_int8(weight) if kind == "int8" else quantize_int4(weight, 64)
    for name, part in zip(layer.row_dimension, expected, strict=True):
        assert torch.equal(getattr(layer, name).inner, part), name
