"""Every supported family against transformers, on the tiny checkpoints of families.py.

First the recipes themselves (would a wrong decoder be noticed?), then ours against theirs.
"""

import copy
import json
import re

import pytest
import torch
from families import (
    FAMILIES,
    load_reference,
    make_model,
    prompt_ids,
    reference_greedy,
    reference_logits,
    save_checkpoint,
    seed_of,
)
from minillm_kernels import cpu

from minillm.cache import StaticCache
from minillm.errors import BackendError
from minillm.faster.steps import Steps
from minillm.llm import LLM
from minillm.load.checkpoint import load_decoder
from minillm.load.config_json import load_config, parse_config
from minillm.measure.describe import facts

PROMPT = prompt_ids(40, seed=1)
FEATURES = [(name, feature) for name, family in FAMILIES.items() for feature in family.features]


@pytest.mark.parametrize("name", FAMILIES)
def test_checkpoint_is_sharded_safetensors_and_loads_in_transformers(name, checkpoint):
    folder = checkpoint(name)
    shards = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"].values()
    assert len(set(shards)) > 1
    assert not list(folder.glob("*.bin"))
    logits = reference_logits(load_reference(folder), PROMPT)
    assert logits.isfinite().all()
    assert logits.std() > 0.5  # not a flat model: arg-maxima and differences mean something


@pytest.mark.parametrize("name", FAMILIES)
def test_noise_floor_is_far_below_the_parity_tolerance(name, checkpoint):
    """fp32 against fp64 of the same reference: what rounding alone does to these logits."""
    model = load_reference(checkpoint(name))
    single = reference_logits(model, PROMPT)
    double = reference_logits(model.double(), PROMPT)
    assert (single - double).abs().max() < 4e-5  # the parity tests allow 1e-4


@pytest.mark.parametrize(("name", "feature"), FEATURES)
def test_feature_moves_the_logits(name, feature):
    """A hundred times the parity tolerance, or the parity test could not see the feature."""
    family = FAMILIES[name]
    plain = reference_logits(make_model(family.config, seed_of(name)), PROMPT)
    altered = make_model(family.with_changes(family.features[feature]), seed_of(name))
    assert (reference_logits(altered, PROMPT) - plain).abs().max() > 1e-2


@pytest.mark.parametrize("name", FAMILIES)
def test_every_weight_moves_the_logits(name, checkpoint):
    """Zeroing any one tensor of the text model changes the logits: none is decoration."""
    model, config = load_reference(checkpoint(name)), load_config(checkpoint(name))
    plain = reference_logits(model, PROMPT)
    for parameter_name, parameter in model.named_parameters():
        if any(part in parameter_name for part in ("vision", "visual", "projector")):
            continue
        if parameter_name.endswith("k_proj.bias"):
            layer = config.layers[int(re.search(r"\d+", parameter_name)[0])]
            if config.ropes[layer.rope].kind == "none":
                continue  # the same for keys of all positions: softmax does not see it
        kept = parameter.detach().clone()
        with torch.no_grad():
            parameter.zero_()
        assert (reference_logits(model, PROMPT) - plain).abs().max() > 1e-2, parameter_name
        with torch.no_grad():
            parameter.copy_(kept)


# ---------------------------------------------------------------------------------------------
# Parity: the same folder, read by us through its own config.json and by transformers.

# Two float32 implementations that add in different orders: `test_noise_floor` above shows that
# rounding alone moves these logits by less than 4e-5 on one side. The wrong feature moves them by
# more than 1e-2 (`test_feature_moves_the_logits`), so 1e-4 separates the two with a wide margin.
TOLERANCE = dict(rtol=0.0, atol=1e-4)
STEPS = prompt_ids(10, seed=2)


def forward(model, cache, ids, start=0):
    """Logits [T, V] of one row's next tokens at positions start, start + 1, ..."""
    position = torch.arange(start, start + len(ids))[None]
    return model(torch.tensor([ids]), position, cache)[0]


@pytest.mark.parametrize("name", FAMILIES)
def test_prompt_and_ten_steps(name, ours, reference):
    model = ours(name)
    expected = reference_logits(reference(name), PROMPT, STEPS)
    cache = StaticCache(model.config, 1, 64, planned_length=len(PROMPT))
    logits = [forward(model, cache, PROMPT)]
    logits += [forward(model, cache, [token], 40 + i) for i, token in enumerate(STEPS)]
    torch.testing.assert_close(torch.cat(logits), expected, **TOLERANCE)


@pytest.mark.parametrize("name", FAMILIES)
def test_prompt_in_small_chunks_past_the_wrap(name, ours, reference):
    """max_step 4: sliding layers are rings of window + 3 slots and wrap several times in 50 tokens."""
    model = ours(name)
    ids = PROMPT + STEPS
    cache = StaticCache(model.config, 1, 64, max_step=4, planned_length=len(PROMPT))
    for window in model.config.windows:
        assert window is None or window == 600 or cache.num_slots(window) < 50
    logits = [forward(model, cache, ids[i : i + 4], i) for i in range(0, 50, 4)]
    expected = reference_logits(reference(name), PROMPT, STEPS)
    torch.testing.assert_close(torch.cat(logits), expected, **TOLERANCE)


@pytest.mark.parametrize("attention", ["math", "sdpa"])
@pytest.mark.parametrize("name", FAMILIES)
def test_every_backend(name, attention, checkpoint, reference):
    """Each attention backend, where it can serve the family; where it cannot, it must say so."""
    config = load_config(checkpoint(name))
    if attention == "sdpa" and any(layer.softcap for layer in config.layers):
        with pytest.raises(BackendError, match="softcap"):
            load_decoder(checkpoint(name), config, torch.float32, "cpu", attention=attention)
        return
    model = load_decoder(checkpoint(name), config, torch.float32, "cpu", attention=attention)
    cache = StaticCache(config, 1, 64, planned_length=len(PROMPT))
    logits = forward(model, cache, PROMPT)
    torch.testing.assert_close(logits, reference_logits(reference(name), PROMPT), **TOLERANCE)


@pytest.mark.parametrize("name", FAMILIES)
def test_greedy_batch_of_different_lengths(name, ours, reference):
    """Our rows share a batch and steps; transformers takes them one at a time. Token for token."""
    model = ours(name)
    prompts = [prompt_ids(n, seed=n) for n in (1, 7, 23, 40)]
    expected = [reference_greedy(reference(name), ids, 20) for ids in prompts]
    planned = [len(ids) + 20 for ids in prompts]
    cache = StaticCache(model.config, 4, 64, max_step=8, planned_length=planned)
    rows = greedy_batch(model, cache, prompts, 20)
    assert rows == expected


def greedy_batch(model, cache, prompts, count):
    """Greedy continuation of a padded batch, straight on the decoder: chunked prefill, then single steps."""
    rows, step = len(prompts), cache.max_step
    last = [None] * rows
    for start in range(0, max(map(len, prompts)), step):
        ids = torch.zeros(rows, step, dtype=torch.int64)
        position = torch.full((rows, step), -1)
        for row, prompt in enumerate(prompts):
            chunk = prompt[start : start + step]
            ids[row, : len(chunk)] = torch.tensor(chunk, dtype=torch.int64)
            position[row, : len(chunk)] = torch.arange(start, start + len(chunk))
        logits = model(ids, position, cache)
        for row, prompt in enumerate(prompts):
            if start < len(prompt) <= start + step:
                last[row] = logits[row, len(prompt) - 1 - start].argmax()
    tokens = [[int(token)] for token in last]
    for i in range(count - 1):
        ids = torch.tensor([row[-1:] for row in tokens])
        position = torch.tensor([[len(prompt) + i] for prompt in prompts])
        for row, token in enumerate(model(ids, position, cache)[:, -1].argmax(-1).tolist()):
            tokens[row].append(token)
    return tokens


@torch.no_grad()
def rounded_to_int8(model):
    """The reference with every matrix of its blocks rounded to 255 steps an output, as the format stores it."""
    model = copy.deepcopy(model)
    for name, module in model.named_modules():
        if type(module).__name__ not in ("Linear", "Conv1D", "FalconLinear") or re.search("lm_head|embed_out", name):
            continue
        outputs = 1 if type(module).__name__ == "Conv1D" else 0  # the dimension that counts them
        scale = module.weight.abs().amax(dim=1 - outputs, keepdim=True) / 127
        module.weight.copy_((module.weight / scale).round() * scale)
    return model


@pytest.mark.parametrize("name", FAMILIES)
def test_int8_is_the_reference_with_rounded_weights(name, checkpoint, reference):
    """Beyond the weights' own rounding only the kernels' activations are rounded, to 16 bits: 1.5e-5 of a row's
    largest for each product, some ten products deep."""
    config = load_config(checkpoint(name))
    model = load_decoder(checkpoint(name), config, torch.float32, "cpu", quantize="int8")
    expected = reference_logits(rounded_to_int8(reference(name)), PROMPT, STEPS)
    cache = StaticCache(config, 1, 64, planned_length=len(PROMPT))
    logits = [forward(model, cache, PROMPT)]
    logits += [forward(model, cache, [token], 40 + i) for i, token in enumerate(STEPS)]
    assert (torch.cat(logits) - expected).abs().max() < 1e-3 * expected.abs().max()


@pytest.mark.skipif(not cpu.available(), reason="no C compiler")
@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_is_recorded_in_int8(name, checkpoint):
    """A replayed step gives the bits of the step as it is written (`test_steps.py` sees to full precision)."""
    config = load_config(checkpoint(name))
    model = load_decoder(checkpoint(name), config, torch.float32, "cpu", quantize="int8")
    steps, logits = Steps(model), []
    for run in (model, steps):
        cache = StaticCache(config, 1, 64, planned_length=50)
        with torch.inference_mode():
            forward(model, cache, PROMPT[:20])
            logits.append(torch.cat([forward(run, cache, [token], 20 + i) for i, token in enumerate(STEPS)]))
    assert [type(step).__name__ for step in steps._recorded[cache].values()] == ["RecordedStep"]
    assert torch.equal(*logits)


IN_BFLOAT16 = "llama3 gemma2 qwen3 olmo2 olmo3 smollm3 granite glm4 arcee starcoder2 gpt2 gpt_bigcode opt"
IN_BFLOAT16 += " gpt_neox falcon-7b falcon-40b phi stablelm cohere2 nemotron bloom mpt"


@pytest.mark.parametrize("name", IN_BFLOAT16.split())
def test_bfloat16_is_as_close_as_transformers_own(name, checkpoint):
    """In bf16 both sides round; ours may stray from the fp32 logits no more than twice as far as theirs."""
    config = load_config(checkpoint(name))
    exact = reference_logits(load_reference(checkpoint(name)), PROMPT)
    theirs = reference_logits(load_reference(checkpoint(name)).to(torch.bfloat16), PROMPT).float()
    model = load_decoder(checkpoint(name), config, torch.bfloat16, "cpu")
    cache = StaticCache(config, 1, 64, dtype=torch.bfloat16, planned_length=len(PROMPT))
    mine = forward(model, cache, PROMPT)
    assert mine.dtype == torch.float32
    assert (mine - exact).square().mean() < 4 * (theirs - exact).square().mean()


@pytest.mark.parametrize("length", [30, 100])
@pytest.mark.parametrize("name", ["phi3", "phi4-mini", "llama-dynamic"])
def test_rope_chosen_by_planned_length(name, length, ours, reference):
    """Within and beyond the original context (64): the prompt alone decides which table transformers uses."""
    model, ids = ours(name), prompt_ids(length, seed=5)
    cache = StaticCache(model.config, 1, 128, planned_length=length)
    expected = reference_logits(reference(name), ids)
    torch.testing.assert_close(forward(model, cache, ids), expected, **TOLERANCE)
    other = StaticCache(model.config, 1, 128, planned_length=100 if length == 30 else 30)
    assert (forward(model, other, ids) - expected).abs().max() > 1e-2  # the choice matters here


@pytest.mark.parametrize("name", FAMILIES)
def test_long_prompt(name, ours, reference):
    """150 tokens at once and far past every window; beyond the original context of the scaled ropes."""
    model, ids = ours(name), prompt_ids(150, seed=6)
    cache = StaticCache(model.config, 1, 160, planned_length=150)
    torch.testing.assert_close(forward(model, cache, ids), reference_logits(reference(name), ids), **TOLERANCE)


@pytest.mark.parametrize("name", ["gpt2", "opt", "bloom", "falcon-7b"])
def test_drafts_batches_and_the_last_learned_position(name, text_tokenizer_files, tmp_path):
    """Through the front door: a list of prompts and prompt lookup, up to the last position that there is."""
    places = {"gpt2": "n_positions", "bloom": "seq_length"}.get(name, "max_position_embeddings")
    config = FAMILIES[name].with_changes({"vocab_size": text_tokenizer_files.vocabulary, places: 40})
    folder = save_checkpoint(tmp_path / name, config, seed_of(name))
    text_tokenizer_files.copy_to(folder)
    if name == "bloom":  # transformers does not write the key, whose absence means 2,048
        raw = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(raw | {places: 40}))
    llm, model = LLM.from_pretrained(folder, dtype="float32", device="cpu"), load_reference(folder)
    prompts = [prompt_ids(n, seed=n, vocabulary=90) for n in (3, 21, 12)]
    expected = [reference_greedy(model, ids, 40 - len(ids)) for ids in prompts]
    for extra in ({}, {"prompt_lookup_num_tokens": 3}):
        options = dict(temperature=0, eos_token_id=[]) | extra
        rows = llm.generate(prompts, max_new_tokens=19, **options)
        assert [row.token_ids for row in rows] == [ids[:19] for ids in expected]
        assert llm.generate(prompts[0], max_new_tokens=37, **options).token_ids == expected[0]


@pytest.mark.parametrize("name", ["gpt2", "opt", "falcon-40b", "bloom", "cohere2", "nemotron", "granite"])
def test_gradients_are_the_references(name, checkpoint):
    """What fine-tuning needs: the gradient of a loss by the embedding, through every part of the decoder."""
    theirs, config = load_reference(checkpoint(name)), load_config(checkpoint(name))
    model = load_decoder(checkpoint(name), config, torch.float32, "cpu", attention="math").requires_grad_(True)
    ids = torch.tensor([PROMPT])
    theirs(ids).logits.square().mean().backward()
    model(ids, torch.arange(40)[None], StaticCache(config, 1, 40)).square().mean().backward()
    expected = theirs.get_input_embeddings().weight.grad
    assert (model.embedding.weight.grad - expected).abs().max() < 1e-4 * expected.abs().max()


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("gpt2", ["512, learned", "192 wide, gelu_tanh, no gate", "LayerNorm before", "2 of 2 layers"]),
        ("bloom", ["512, ALiBi"]),
        ("cohere2", ["base 100, 8 channels", "1 of 4 layers", "one for both"]),
        ("falcon-40b", ["both of the same stream", "GQA, 3 queries per key"]),
        ("gpt_bigcode", ["MQA"]),
        ("gemma3", ["base 50, 16 channels"]),
    ],
)
def test_what_inspect_says_of_a_family(name, shown):
    told = " | ".join(value for _, value in facts(parse_config(FAMILIES[name].config), torch.float32))
    assert [words for words in shown if words not in told] == []


def test_a_cast_leaves_slopes_as_they_are(ours):
    """In bfloat16 a slope would be off by 0.4 %: at a distance of 1,000, by more than a score is worth."""
    decoder = copy.deepcopy(ours("bloom"))
    before = decoder.blocks[0].attention.slopes.clone()
    decoder.to(torch.bfloat16)
    assert decoder.blocks[0].attention.slopes.dtype == torch.float32
    assert torch.equal(decoder.blocks[0].attention.slopes, before)
