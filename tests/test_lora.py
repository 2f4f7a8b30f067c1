"""Adapters: PEFT's give what they give there, merged or beside; ours are PEFT's; they train beside quantized bases."""

import json
import shutil
import warnings

import pytest
import torch
from families import load_reference, prompt_ids, reference_logits
from minillm_kernels import cpu
from minillm_kernels.int4_linear import dequantize_int4
from safetensors.torch import load_file, save_file
from test_train import ROW, packed_batch, some_documents
from test_writing import all_tensors
from transformers.pytorch_utils import Conv1D

from minillm.cache import StaticCache
from minillm.cli.parser import main
from minillm.errors import CheckpointError, ConfigError, RequestError
from minillm.faster.steps import RecordedAhead
from minillm.linear import Linear, QuantizedLinear
from minillm.llm import LLM
from minillm.load.checkpoint import load_decoder
from minillm.load.config_json import load_config
from minillm.load.lora import LoraLinear, load_adapted, merge_checkpoint, read_adapter
from minillm.load.quantized_copy import quantize_checkpoint
from minillm.load.writing import write_decoder
from minillm.measure.bench import format_name
from minillm.ranks.joined import Joined
from minillm.train.attention import PACKED
from minillm.train.loop import Recipe, Training
from minillm.train.lora import add_lora, save_adapter
from minillm.train.loss import ScoredLoss

IDS = prompt_ids(12, seed=1)
# Apart and fused, tied, transposed, grouped, interleaved, nested; OPT's and BLOOM's names.
KINDS = """
    llama3 llama3.2 qwen2 phi3 granite4 gpt2 gpt_bigcode-heads falcon-40b gpt_neox cohere glm gemma3-nested opt bloom
""".split()


def adapted(folder, adapter, dtype=torch.float32, **options):
    return load_adapted(adapter, folder, load_config(folder), dtype, **options)


def our_logits(model):
    cache = StaticCache(model.config, 1, 16, dtype=model.embedding.weight.dtype)
    return model(torch.tensor([IDS]), torch.arange(len(IDS))[None], cache)[0]


def check_close(ours, theirs, plain=None):
    """As in `test_families.py`, relative to the largest logit; `plain` is without an adapter, which does something."""
    assert (ours - theirs).abs().max() < 1e-5 * max(10.0, float(theirs.abs().max()))
    if plain is not None:
        assert (theirs - plain).abs().max() > 1e-2


def with_lora(folder, rank=3, alpha=5.0, quantize=None, **options):
    """As after some training: B is not 0. A quantized head too in int8, as in `widened`."""
    how = dict(attention=PACKED, quantize=quantize, quantize_head=quantize == "int8")
    model = load_decoder(folder, load_config(folder), torch.float32, **how)
    add_lora(model, rank, alpha, **options)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(".B.weight"):
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model.train()


def saved(folder, out, **options):
    out.mkdir(exist_ok=True)
    save_adapter(with_lora(folder, **options), out, str(folder))
    return out


def widened(folder, quantize, out):
    """A checkpoint in full precision with the weights that a quantized one stands for."""
    config = load_config(folder)
    plain = load_decoder(folder, config, torch.float32)
    how = dict(quantize=quantize, quantize_head=quantize == "int8")
    for name, layer in load_decoder(folder, config, torch.float32, **how).named_modules():
        if isinstance(layer, QuantizedLinear):
            codes = [getattr(layer, part) for part in layer.row_dimension]
            eight = layer.row_dimension.keys() == {"weight", "scale"}
            weight = codes[0] * codes[1][:, None] if eight else dequantize_int4(*codes, layer.group_size)
            plain.get_submodule(name).weight.copy_(weight)
    out.mkdir()
    write_decoder(plain, out, json.loads((folder / "config.json").read_text()), torch.float32, folder)
    return out


# ---- PEFT ----


@pytest.mark.parametrize("name", KINDS)
def test_peft_reads_ours(name, checkpoint, tmp_path):
    """One A and B per matrix of the file: PEFT finds all it looks for and no more, and computes what we do."""
    peft = pytest.importorskip("peft")
    adapter = saved(checkpoint(name), tmp_path)
    plain, base = (load_reference(checkpoint(name)) for _ in range(2))
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*(missing|unexpected|Found).*")
        theirs = reference_logits(peft.PeftModel.from_pretrained(base, adapter), IDS)
    check_close(our_logits(adapted(checkpoint(name), adapter)), theirs, reference_logits(plain, IDS))


@pytest.mark.parametrize("name", KINDS)
def test_we_read_and_merge_theirs(name, checkpoint, tmp_path):
    """Theirs, with rank-stabilized scaling and one layer left out: merged while loading; and written by `merge`, which
    transformers loads."""
    peft = pytest.importorskip("peft")
    base, plain = (load_reference(checkpoint(name)) for _ in range(2))
    last = [n for n, m in base.named_modules() if ".1." in n and isinstance(m, torch.nn.Linear | Conv1D)]
    asked = peft.LoraConfig(r=4, lora_alpha=7, target_modules=last, init_lora_weights=False, use_rslora=True)
    theirs = peft.get_peft_model(base, asked)
    theirs.save_pretrained(tmp_path / "adapter")
    logits = reference_logits(theirs, IDS)
    check_close(our_logits(adapted(checkpoint(name), tmp_path / "adapter")), logits, reference_logits(plain, IDS))
    assert main(["merge", *map(str, [checkpoint(name), tmp_path / "adapter", tmp_path / "out"])]) == 0
    check_close(reference_logits(load_reference(tmp_path / "out"), IDS), logits)
    merged = dict(theirs.merge_and_unload().named_parameters())
    for tensor, ours in all_tensors(tmp_path / "out").items():
        if tensor in merged:  # a nested file's names are older than its modules'
            assert torch.allclose(ours, merged[tensor], atol=1e-6), tensor
    assert load_config(tmp_path / "out") == load_config(checkpoint(name))


@pytest.mark.parametrize("quantize", ["int8", "int4-g32"])
def test_beside_a_quantized_base(quantize, quantizable, tmp_path):
    """The codes stay, and the product is added: PEFT's logits over the weights that the codes stand for. Kernels round
    activations to 16 bits (`test_families.py`)."""
    peft = pytest.importorskip("peft")
    adapter = saved(quantizable, tmp_path / "adapter", targets=["q_proj", "v_proj", "up_proj", "down_proj"])
    ours = adapted(quantizable, adapter, quantize=quantize, quantize_head=quantize == "int8")
    base = load_reference(widened(quantizable, quantize, tmp_path / "wide"))
    plain = reference_logits(base, IDS)
    theirs = reference_logits(peft.PeftModel.from_pretrained(base, adapter), IDS)
    assert (our_logits(ours) - theirs).abs().max() < 1e-3 * theirs.abs().max()
    assert (theirs - plain).abs().max() > 0.02 * theirs.abs().max()
    beside = [name for name, module in ours.named_modules() if isinstance(module, LoraLinear)]
    assert len(beside) == 6  # qkv, gate_up and down of two blocks
    assert not any(parameter.requires_grad for parameter in ours.parameters())


@pytest.mark.parametrize("name", ["llama3", "phi3", "gpt_neox"])
def test_gradients_are_pefts(name, checkpoint, tmp_path):
    peft = pytest.importorskip("peft")
    model, documents = with_lora(checkpoint(name)), some_documents([17])
    save_adapter(model, tmp_path, "x")
    ScoredLoss(model, 40).backward(packed_batch(documents), 1.0)
    theirs = peft.PeftModel.from_pretrained(load_reference(checkpoint(name)), tmp_path, is_trainable=True)
    ids = documents.ids.long()[None]
    logits = theirs(ids, use_cache=False).logits[0, :-1]
    torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum").backward()
    expected = {n: p.grad for n, p in theirs.named_parameters() if p.requires_grad}
    with torch.no_grad():  # written as adapters are, gradients are in the file's order too
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(parameter.grad)
    save_adapter(model, tmp_path, "x")
    ours = load_file(tmp_path / "adapter_model.safetensors")
    assert len(ours) == len(expected) > 0
    for key, gradient in ours.items():
        there = expected[key.replace(".weight", ".default.weight")]
        assert (gradient - there).abs().max() < 1e-4 * max(1.0, float(there.abs().max())), key


# ---- training ----


@pytest.mark.parametrize("quantize", ["int8", "int4-g64"])
def test_gradients_through_a_quantized_base(quantize, quantizable, tmp_path):
    """As through the weights that the codes stand for."""
    gradients, documents = [], some_documents([30, 17])
    for model in (
        with_lora(quantizable, quantize=quantize),
        with_lora(widened(quantizable, quantize, tmp_path / "wide")),
    ):
        ScoredLoss(model, 40).backward(packed_batch(documents), 1.0)
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    for name, ours in gradients[0].items():
        theirs = gradients[1][name]
        assert (ours - theirs).abs().max() < 1e-4 * max(1.0, float(theirs.abs().max())), name


def test_a_run_goes_on_and_leaves_the_base_alone(quantizable, tmp_path):
    """The same loop: killed after two steps, the same call ends in the same bits. Compute in bfloat16, int8 base, one
    matrix for Muon."""

    def run(folder, quantize="int8"):
        folder.mkdir(exist_ok=True)
        model = load_decoder(quantizable, load_config(quantizable), torch.bfloat16, attention=PACKED, quantize=quantize)
        add_lora(model, 4, targets=["q_proj", "up_proj"])
        recipe = Recipe(6, ROW, rows=2, rows_at_once=2, learning_rate=1e-3, muon_learning_rate=0.02)
        return Training(model, some_documents(), recipe, folder / "state.pt", save_every=0.0)

    whole, broken = run(tmp_path / "whole"), run(tmp_path / "broken")
    before = {
        name: t.clone() for name, t in whole.model.state_dict().items() if ".A." not in name and ".B." not in name
    }
    list(whole)
    for step in broken:
        if step.number == 2:
            break
    resumed = run(tmp_path / "broken")
    assert resumed.step == 2
    losses = [step.loss for step in resumed]
    assert len(losses) == 4
    after = resumed.model.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    trained = {name: p for name, p in whole.model.named_parameters() if p.requires_grad}
    assert len(trained) == 2 * 2 * 2
    assert all(torch.equal(after[name], p) and p.abs().max() > 0 for name, p in trained.items())


def test_what_add_lora_refuses(checkpoint):
    model = load_decoder(checkpoint("llama3"), load_config(checkpoint("llama3")), torch.float32, attention=PACKED)
    for asked, told in (
        (dict(rank=0), "rank must be a whole number from 1"),
        (dict(rank=2, alpha=0.0), "alpha positive"),
        (dict(rank=2, targets=["q_proj", "query"]), r"\['query'\] name no matrix.*down_proj"),
        (dict(rank=2, targets=[]), "name no matrix"),
        (dict(rank=2, targets=["lm_head"]), "name no matrix"),
    ):
        with pytest.raises(RequestError, match=told):
            add_lora(model, **asked)
    with pytest.raises(RequestError, match="nothing to save"):
        save_adapter(model, checkpoint("llama3"), "x")
    add_lora(model, 2)
    with pytest.raises(RequestError, match="an adapter beside it already"):
        add_lora(model, 2)


# ---- use ----


@pytest.fixture(scope="module")
def text_adapter(quantizable, tmp_path_factory):
    return saved(quantizable, tmp_path_factory.mktemp("adapter") / "adapter", rank=8, alpha=24.0)


@pytest.mark.parametrize("quantize", [None, "int8", "int4"])
def test_every_way_of_generating(quantize, quantizable, text_adapter):
    """Recorded or not, alone, in a batch, with drafts, in a conversation: the same text, which is the adapter's."""
    load = lambda **options: LLM.from_pretrained(quantizable, quantize=quantize, device="cpu", **options)  # noqa: E731
    llm, eager, base = load(adapter=text_adapter), load(adapter=text_adapter, compile=False), load()
    assert format_name(llm) == ("float32" if quantize is None else "int8" if quantize == "int8" else "int4-g64")
    prompts = ["Once upon a time", "The wolf said to the wolf said"]
    asked = dict(max_new_tokens=16, eos_token_id=[])
    alone = [llm.generate(prompt, **asked).token_ids for prompt in prompts]
    assert alone != [base.generate(prompt, **asked).token_ids for prompt in prompts]
    cache = StaticCache(llm.config, 1, 64)
    assert llm.generate(prompts[0], cache=cache, **asked).token_ids == alone[0]
    if cpu.available():
        assert {type(step) for step in llm.steps._recorded[cache].values()} == {RecordedAhead}
    assert [one.token_ids for one in eager.generate(prompts, **asked)] == alone
    assert [one.token_ids for one in llm.generate(prompts, **asked)] == alone
    assert [llm.generate(prompt, assistant_model=base, **asked).token_ids for prompt in prompts] == alone
    assert llm.generate(prompts[1], prompt_lookup_num_tokens=3, **asked).token_ids == alone[1]
    assert llm.conversation(**asked).say("Hello").token_ids == eager.conversation(**asked).say("Hello").token_ids


@pytest.mark.parametrize("name", ["gpt_neox", "cohere", "gpt2"])
def test_beside_a_quantized_copy(name, checkpoint, tmp_path):
    """A copy is in our order, its adapter in that of the original's file."""
    adapter = saved(checkpoint(name), tmp_path / "adapter")
    quantize_checkpoint(checkpoint(name), tmp_path / "copy", "int8")
    ours = our_logits(adapted(tmp_path / "copy", adapter))
    assert torch.equal(ours, our_logits(adapted(checkpoint(name), adapter, quantize="int8")))
    whole = our_logits(adapted(checkpoint(name), adapter))
    assert (ours - whole).abs().max() < 0.1 * whole.abs().max()
    with pytest.raises(CheckpointError, match=r"copy is quantized \(int8\): merge.*it was made from"):
        merge_checkpoint(tmp_path / "copy", adapter, tmp_path / "out")


def test_a_head_with_an_adapter_and_dtypes(quantizable, tmp_path):
    """lm_head alone, in bfloat16: in the matrix it is rounded once; beside an int8 head it is not."""
    generator = torch.Generator().manual_seed(1)
    vocabulary = load_config(quantizable).vocab_size
    tensors = {"A": torch.randn(2, 64, generator=generator), "B": torch.randn(vocabulary, 2, generator=generator)}
    tensors = {f"base_model.model.lm_head.lora_{side}.weight": t.half() for side, t in tensors.items()}
    write_adapter(tmp_path, tensors, lora_alpha=1)
    head, (b, a) = all_tensors(quantizable)["lm_head.weight"], reversed(tensors.values())
    expected = head + 0.5 * b.float() @ a.float()
    plain = adapted(quantizable, tmp_path, torch.bfloat16)
    assert torch.equal(plain.head.weight, expected.bfloat16())
    beside = adapted(quantizable, tmp_path, quantize_head=True)
    assert isinstance(beside.head, LoraLinear)
    assert isinstance(beside.blocks[0].mlp.down, Linear)
    exact = our_logits(adapted(quantizable, tmp_path))
    assert (our_logits(beside) - exact).abs().max() < 0.02 * exact.abs().max()


# ---- what is refused ----


def write_adapter(folder, tensors, **config):
    plain = dict(peft_type="LORA", task_type="CAUSAL_LM", r=2, lora_alpha=4, target_modules=["q_proj"], bias="none")
    (folder / "adapter_config.json").write_text(json.dumps(plain | config))
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder


def a_pair(changes=()):
    key = "base_model.model.model.layers.0.self_attn.q_proj.lora_{}.weight"
    pair = {key.format("A"): torch.randn(2, 48), key.format("B"): torch.randn(72, 2)}
    return {name: tensor for name, tensor in (pair | dict(changes)).items() if tensor is not None}


BAD_CONFIGS = {
    "peft_type must be one of the supported LORA, not 'IA3'": dict(peft_type="IA3"),
    "task_type must be": dict(task_type="SEQ_CLS"),
    "use_dora True: not supported": dict(use_dora=True),
    "bias 'lora_only': not supported": dict(bias="lora_only"),
    "lora_bias True": dict(lora_bias=True),
    "rank_pattern {'q_proj': 4}, alpha_pattern": dict(rank_pattern={"q_proj": 4}, alpha_pattern={"q_proj": 4}),
    "modules_to_save": dict(modules_to_save=["lm_head"]),
    "layer_replication": dict(layer_replication=[[0, 1]]),
    "trainable_token_indices": dict(trainable_token_indices=[3]),
    "alora_invocation_tokens": dict(alora_invocation_tokens=[3, 4]),
    "made_up_next_year": dict(made_up_next_year=1),
    "init_lora_weights 'pissa_niter_4' changes the base": dict(init_lora_weights="pissa_niter_4"),
    "r must be a whole number": dict(r=0),
    "lora_alpha must be a number": dict(lora_alpha="16"),
    "use_rslora must be true or false": dict(use_rslora="yes"),
}


@pytest.mark.parametrize("told", BAD_CONFIGS)
def test_configs_that_are_not_plain_lora(told, checkpoint, tmp_path):
    config = load_config(checkpoint("llama3.2"))
    read_adapter(write_adapter(tmp_path, a_pair()), config)
    write_adapter(tmp_path, a_pair(), **BAD_CONFIGS[told])
    with pytest.raises(ConfigError, match=rf"adapter_config\.json: .*{told}"):
        read_adapter(tmp_path, config)


A, B = a_pair()
BAD_TENSORS = {
    rf"{A} has shape \[4, 48\], expected \[2, 48\]": {A: torch.zeros(4, 48)},
    rf"{A} has shape \[2, 64\], expected \[2, 48\]": {A: torch.zeros(2, 64)},
    rf"{B} has shape \[2, 72\], expected \[72, 2\]": {B: torch.zeros(2, 72)},
    rf"{B} is I8, expected F32": {B: torch.zeros(72, 2, dtype=torch.int8)},
    rf"{A} stands alone": {B: None},
    "are one matrix": {A.removeprefix("base_model.model."): torch.zeros(2, 48)},
    "it adapts nothing": {A: None, B: None},
    "layers.7.*adapts none of the model": {A.replace("layers.0", "layers.7"): torch.zeros(2, 48)},
    "lm_head.*the head is tied": {"base_model.model.lm_head.lora_A.weight": torch.zeros(2, 48)},
    "lora_magnitude_vector' adapts none": {A.replace("A.weight", "magnitude_vector"): torch.zeros(96)},
    "embed_tokens.* adapts none": {"base_model.model.model.embed_tokens.lora_embedding_A": torch.zeros(2, 131)},
    r"embed_tokens\.weight' adapts none": {"base_model.model.model.embed_tokens.weight": torch.zeros(131, 48)},
    "holds NaN": {A: torch.full((2, 48), float("nan"))},
}


@pytest.mark.parametrize("told", BAD_TENSORS)
def test_tensors_that_do_not_fit(told, checkpoint, tmp_path):
    with pytest.raises(CheckpointError, match=told):
        read_adapter(write_adapter(tmp_path, a_pair(BAD_TENSORS[told])), load_config(checkpoint("llama3.2")))


def test_folders_that_are_no_adapter(quantizable, text_adapter, checkpoint, tmp_path, capsys):
    with pytest.raises(CheckpointError, match=r"adapter_config\.json is missing"):
        LLM.from_pretrained(quantizable, adapter=tmp_path)
    with pytest.raises(CheckpointError, match="no folder 'nowhere/to/be'"):
        LLM.from_pretrained(quantizable, adapter="nowhere/to/be")
    shutil.copy(text_adapter / "adapter_config.json", tmp_path)
    (tmp_path / "adapter_model.bin").write_bytes(b"pickle")
    with pytest.raises(CheckpointError, match=r"no adapter_model\.safetensors \(adapter_model\.bin is pickle"):
        read_adapter(tmp_path, load_config(quantizable))
    (tmp_path / "adapter_model.safetensors").write_bytes(b"no tensors")
    with pytest.raises(CheckpointError, match="not a readable safetensors file"):
        read_adapter(tmp_path, load_config(quantizable))
    with pytest.raises(CheckpointError, match="is no adapter for this model"):
        read_adapter(text_adapter, load_config(checkpoint("llama3")))
    arguments = ["generate", "x", "--model", str(quantizable), "--max-new-tokens", "2", "--adapter"]
    assert main([*arguments, str(tmp_path)]) == 1
    assert capsys.readouterr().err.count("\n") == 1
    assert main([*arguments, str(text_adapter)]) == 0
    assert main(["inspect", *arguments[2:4], "--adapter", str(text_adapter)]) == 0
    assert "rank 8, scale 3, 14 matrices" in capsys.readouterr().out


def test_ranks_that_share_a_model_take_no_adapter(tmp_path):
    with pytest.raises(ConfigError, match="minillm merge"):
        load_adapted(tmp_path, tmp_path, None, torch.float32, ranks=Joined(0, 2))
