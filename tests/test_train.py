"""Training: packed rows give the gradients of separate documents and of transformers; a killed run loses nothing."""

import copy
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from families import FAMILIES, load_reference, prompt_ids
from hypothesis import given, settings
from hypothesis import strategies as st

from minillm.errors import BackendError, CacheError, NumericalError, RequestError
from minillm.load.checkpoint import load_decoder
from minillm.load.config_json import load_config, parse_config
from minillm.model import empty_decoder
from minillm.train import attention
from minillm.train.attention import PACKED, Packed, packed_mask
from minillm.train.documents import load_documents, make_documents, save_documents
from minillm.train.initialize import initialize
from minillm.train.loop import Recipe, Training
from minillm.train.loss import Objective, ScoredLoss
from minillm.train.optimizer import Optimizer, fused_rows, learning_rate_factor
from minillm.train.packing import Rows, cut, fill, pack

ROW = 40
LENGTHS = (17, 5, 16, 40, 2, 30, 11)  # ids of the documents; windows (9) and rows are shorter than some


def some_documents(lengths=LENGTHS, seed=0, scored=None, vocabulary=131):
    ids = [prompt_ids(n, seed=seed + i, vocabulary=vocabulary) for i, n in enumerate(lengths)]
    masks = scored or [[True] * n for n in lengths]
    return make_documents(zip(ids, masks, strict=True), text_bytes=100)


def packed_batch(documents, length=ROW):
    return fill(documents, pack(cut(documents, length), length), length)


def trainable(folder, **options):
    model = load_decoder(folder, load_config(folder), torch.float32, attention=PACKED)
    return model.requires_grad_(True).train()


def tiny(changes=(), seed=1, name="llama3"):
    model = empty_decoder(parse_config(FAMILIES[name].with_changes(dict(changes))), torch.float32, PACKED, device="cpu")
    initialize(model, seed, std=0.2)
    return model.train()


def gradients(model):
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.requires_grad}


# ---- packing ----


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(2, 50), min_size=1, max_size=30), st.integers(1, 20), st.integers(0, 3))
def test_an_epoch_scores_every_token_once_with_its_own_past(lengths, row, epoch):
    """Whatever the lengths: the labels of an epoch are the documents' ids, each document's without its first."""
    ends = torch.tensor(lengths).cumsum(0)
    documents = make_documents(
        (([*range(end - n, end)], [True] * n) for end, n in zip(ends.tolist(), lengths, strict=True)), 1
    )
    rows = Rows(documents, row, seed=3)
    rows.start(epoch, 0)
    batch = rows.next(len(rows.order))
    assert batch.ids.shape == (len(rows.order), row)
    firsts = {end - n for end, n in zip(ends.tolist(), lengths, strict=True)}
    assert sorted(batch.labels[batch.scored].tolist()) == [i for i in range(int(ends[-1])) if i not in firsts]
    assert torch.equal(batch.labels[batch.scored], batch.ids[batch.scored] + 1)  # ids are numbered through
    place = torch.arange(row).expand_as(batch.position)
    begin = place - batch.position  # every piece is one run of ids, from position 0
    assert bool((begin >= 0).all())
    assert bool((batch.position[:, 0] == 0).all())
    assert not {int(end) - 1 for end in ends} & set(batch.ids.flatten().tolist())  # a last id is a label only
    inside = batch.scored & (batch.position > 0)
    assert torch.equal(batch.ids[inside], batch.ids.roll(1, 1)[inside] + 1)


def test_rows_go_on_where_they_stood_and_epochs_differ():
    documents = some_documents()
    straight, resumed = Rows(documents, ROW, seed=1), Rows(documents, ROW, seed=1)
    epoch = len(straight.order)
    first = straight.next(epoch + 1)  # into the second epoch
    resumed.start(straight.epoch, straight.cursor)
    assert (straight.epoch, straight.cursor) == (1, 1)
    assert torch.equal(straight.next(3).ids, resumed.next(3).ids)
    assert not torch.equal(first.ids[:epoch], Rows(documents, ROW, seed=2).next(epoch).ids)


def test_best_fit_wastes_less_than_one_row_after_another():
    lengths = torch.randint(20, 400, (300,), generator=torch.Generator().manual_seed(0)).tolist()
    rows = pack([(0, n) for n in lengths], 512)
    assert sum(lengths) / (512 * len(rows)) > 0.98
    assert all(sum(stop for _, stop in row) <= 512 for row in rows)


def test_documents_on_disk(tmp_path):
    documents = some_documents()
    path = tmp_path / "documents.safetensors"
    save_documents(documents, path)
    loaded = load_documents(path)
    assert loaded.digest == documents.digest
    assert torch.equal(loaded.ids, documents.ids)
    assert torch.equal(loaded.scored, documents.scored)
    assert documents.digest != some_documents(seed=1).digest
    path.write_bytes(b"no")
    with pytest.raises(RequestError, match=r"documents\.safetensors"):
        load_documents(path)
    for bad in (([1], [True]), ([1, 2], [True, False]), ([1, 2], [True])):
        with pytest.raises(RequestError, match="document 1"):
            make_documents([([1, 2], [True, True]), bad], 1)


# ---- gradients ----


def reference_gradients(folder, documents, tmp_path):
    """What transformers makes of the documents one by one: our decoder with the gradients as its weights."""
    theirs = load_reference(folder).requires_grad_(True)
    total, begin = 0.0, 0
    for end in documents.ends.tolist():
        ids = documents.ids[begin:end].long()[None]
        logits = theirs(ids, use_cache=False).logits[0, :-1]
        nats = torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="none")
        total += nats[documents.scored[begin + 1 : end]].sum()
        begin = end
    (total / int(documents.scored.sum())).backward()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.copy_(torch.zeros_like(parameter) if parameter.grad is None else parameter.grad)
    theirs.save_pretrained(tmp_path / "gradients")
    return load_decoder(tmp_path / "gradients", load_config(tmp_path / "gradients"), torch.float32), float(
        total.detach()
    )


@pytest.mark.parametrize("name", FAMILIES)
def test_packed_gradients_are_those_of_transformers(name, checkpoint, tmp_path):
    """Documents of several lengths side by side, some tokens unscored, against transformers, one document at a time.

    Both add float32 in different orders: 1e-4 of the largest gradient of a tensor, as for the logits; a document seen
    by its neighbour, or a forgotten position, moves them by more than a tenth (the test after this one).
    """
    lengths = LENGTHS if name != "llama-dynamic" else (17, 5)
    scored = [[i % 5 != 2 for i in range(n)] for n in lengths]
    documents = some_documents(lengths, scored=scored)
    expected, total = reference_gradients(checkpoint(name), documents, tmp_path)
    model = trainable(checkpoint(name))
    loss = ScoredLoss(model, ROW)
    batch = packed_batch(documents)
    assert batch.ids.shape[0] < len(lengths)  # something shares a row
    assert loss.backward(batch, 1 / int(batch.scored.sum())) == pytest.approx(total, rel=1e-5)
    wanted = dict(expected.named_parameters())
    for parameter, gradient in gradients(model).items():
        largest = wanted[parameter].abs().max()
        assert largest > 0 or "qkv.bias" in parameter or "k_norm" in parameter, parameter
        assert (gradient - wanted[parameter]).abs().max() < 1e-4 * largest + 1e-7, parameter


@pytest.mark.parametrize("name", ["llama3", "gemma2", "bloom", "cohere2"])
@pytest.mark.parametrize("masked", [False, True])
def test_packed_is_separate_and_nothing_crosses(name, masked, checkpoint, monkeypatch):
    """By document and by mask: the same gradients as one document to a row; and a changed token changes not a bit of
    what other documents in its row compute."""
    if masked:
        monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
        monkeypatch.setattr(attention, "_BLOCK", 7)
        monkeypatch.setattr(attention, "_BLOCKS", 6)  # of 7 queries, and a last one of 5
    documents, model = some_documents(), trainable(checkpoint(name))
    loss = ScoredLoss(model, ROW)
    batch = packed_batch(documents)
    loss.backward(batch, 1.0)
    packed = gradients(model)
    model.zero_grad()
    for piece in cut(documents, ROW):
        loss.backward(fill(documents, [[piece]], ROW), 1.0)
    for parameter, gradient in gradients(model).items():
        assert (gradient - packed[parameter]).abs().max() < 2e-5 * gradient.abs().max() + 1e-6, parameter

    before = loss.hidden(batch).detach()
    changed = copy.deepcopy(batch)
    row, column = next((r, c) for r, c in (batch.position == 1).nonzero().tolist() if c > 1)
    changed.ids[row, column] += 1
    moved = (loss.hidden(changed).detach() != before).any(-1).view(batch.ids.shape)
    assert moved[row, column:].any()
    document = (batch.position == 0).cumsum(1)
    assert bool((document[moved.nonzero(as_tuple=True)] == document[row, column]).all())
    assert moved.any(1).nonzero().flatten().tolist() == [row]


def test_the_mask_is_what_it_says():
    position = torch.tensor([[0, 1, 2, 0, 1, 0]])
    seen = [[query for query in range(6) if packed_mask(position, 2)[0, key, query]] for key in range(6)]
    assert seen == [[0], [0, 1], [1, 2], [3], [3, 4], [5]]


def test_microbatches_recomputing_and_unscored_rows_agree():
    """The mean is over the scored tokens of the whole step, however it is cut; and recomputing changes no bit."""
    scored = [[i > (n if n == 30 else n // 3) for i in range(n)] for n in LENGTHS if n != 30]
    documents = some_documents([n for n in LENGTHS if n != 30], scored=[[*m[:-1], True] for m in scored])
    batch = packed_batch(documents)
    results = []
    for rows, recompute in ((len(batch.ids), False), (1, False), (1, True)):
        model = tiny()
        loss = ScoredLoss(model, ROW, recompute=recompute)
        scale = 1 / int(batch.scored.sum())
        nats = sum(loss.backward(batch.rows(n, n + rows), scale) for n in range(0, len(batch.ids), rows))
        results.append((nats, gradients(model)))
    (whole, at_once), (parts, one_by_one), (_, recomputed) = results
    assert whole == pytest.approx(parts, rel=1e-6)
    for name, gradient in at_once.items():
        assert (gradient - one_by_one[name]).abs().max() < 1e-5 * gradient.abs().max() + 1e-8
        assert torch.equal(one_by_one[name], recomputed[name])


def test_pieces_of_the_head_add_up(monkeypatch):
    documents = some_documents()
    batch, found = packed_batch(documents), []
    for piece in (64, 4096):
        model = tiny()
        loss = ScoredLoss(model, ROW)
        loss.piece = piece
        found.append((loss.backward(batch, 0.01), gradients(model)))
        assert loss.total(batch) == pytest.approx(found[-1][0], rel=1e-6)
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-6)
    for name, gradient in found[0][1].items():
        torch.testing.assert_close(gradient, found[1][1][name], rtol=1e-4, atol=1e-6)


def test_another_objective():
    """Learning a teacher's distribution: its own gives no gradient, and the loss is its entropy."""
    model, teacher = tiny(), tiny().requires_grad_(False)
    theirs = ScoredLoss(teacher, ROW)

    def loss(logits, hidden):
        return -(teacher.logits(hidden).softmax(-1) * logits.log_softmax(-1)).sum(-1)

    ours = ScoredLoss(model, ROW, objective=Objective(theirs.hidden, loss))
    batch = packed_batch(some_documents())
    nats = ours.backward(batch, 1.0)
    probabilities = teacher.logits(theirs.hidden(batch))[batch.scored.flatten()].softmax(-1)
    assert nats == pytest.approx(float(-(probabilities * probabilities.log()).sum()), rel=1e-5)
    assert max(float(gradient.abs().max()) for gradient in gradients(model).values()) < 1e-3


@pytest.mark.parametrize("name", ["kernels", "math", "sdpa"])
def test_a_backend_that_cannot_be_trained_is_refused_by_name(name, checkpoint):
    config = load_config(checkpoint("llama3"))
    model = load_decoder(checkpoint("llama3"), config, torch.float32, attention=name)
    with pytest.raises(BackendError, match=rf"attention='{name}' cannot be trained"):
        ScoredLoss(model, ROW).total(packed_batch(some_documents()))


def test_learned_positions_end_somewhere(checkpoint):
    with pytest.raises(CacheError, match="512 positions"):
        Packed(load_config(checkpoint("gpt2")), 513)


def test_bits_per_byte_is_of_windows_without_overlap():
    """By hand: every token but the first is predicted once, from what stands before it in its window."""
    model, documents = tiny(), some_documents([97])
    nats = 0.0
    for start in range(0, 96, ROW):
        ids = documents.ids[start : start + ROW + 1].long()[None]
        packed = Packed(model.config, ROW)
        logits = model(ids[:, :-1], torch.arange(ids.shape[1] - 1)[None], packed)
        nats += torch.nn.functional.cross_entropy(logits[0], ids[0, 1:], reduction="sum").item()
    loss = ScoredLoss(model, ROW)
    assert loss.bits_per_byte(documents, rows=2) == pytest.approx(nats / 0.6931471805599453 / 100, rel=1e-5)


def test_autocast_is_taken_in_training_alone():
    """A host's autocast does not choose for a decoder that generates (`test_soundness.py`); here it is asked for."""
    model, batch = tiny(), packed_batch(some_documents())
    exact, rounded = (ScoredLoss(model, ROW, bfloat16=on).total(batch) for on in (False, True))
    assert exact != rounded
    assert exact == pytest.approx(rounded, rel=0.02)
    with torch.autocast("cpu", torch.bfloat16):
        logits = [model(batch.ids, batch.position, Packed(model.config, ROW)) for model in (tiny().eval(), tiny())]
    assert not torch.equal(*logits)
    assert torch.equal(logits[0], model(batch.ids, batch.position, Packed(model.config, ROW)))


# ---- compiled ----


def test_one_graph_whatever_the_packing(monkeypatch):
    """Traced and differentiated as for the compiler; making its kernels takes most of a minute."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    one_layer = {"num_hidden_layers": 1}
    eager, model = tiny(one_layer), tiny(one_layer)
    ours, plain = ScoredLoss(model, ROW, compile=True), ScoredLoss(eager, ROW)
    ours.piece = plain.piece = 64
    for lengths in (LENGTHS, (40, 7, 9, 10, 11, 12, 20, 33), (2, 3, 4, 5, 40, 40, 30, 25)):
        batch = packed_batch(some_documents(lengths)).rows(0, 3)
        for loss in (ours, plain):
            loss.model.zero_grad()
            loss.backward(batch, 0.01)
        expected = gradients(eager)
        for name, gradient in gradients(model).items():
            assert (gradient - expected[name]).abs().max() < 1e-4 * expected[name].abs().max() + 1e-7, name
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2  # the blocks, and the head


@torch.no_grad()
def test_compiled_nothing_crosses():
    """Forward alone, compiled to the end: as it is without, and a changed token changes its own document only."""
    torch._dynamo.reset()
    model, batch = tiny({"num_hidden_layers": 1}), packed_batch(some_documents())
    ours = ScoredLoss(model, ROW, compile=True)
    hidden = ours.hidden(batch)
    torch.testing.assert_close(hidden, ScoredLoss(model, ROW).hidden(batch), rtol=1e-5, atol=1e-5)
    row, column = next((r, c) for r, c in (batch.position == 1).nonzero().tolist() if c > 1)
    batch.ids[row, column] += 1
    moved = (ours.hidden(batch) != hidden).any(-1).view(batch.ids.shape)
    document = (batch.position == 0).cumsum(1)
    assert moved.any(1).nonzero().flatten().tolist() == [row]
    assert bool((document[moved.nonzero(as_tuple=True)] == document[row, column]).all())


# ---- optimizer ----


def test_damaged_files_of_the_compiler_are_told_with_a_way_out(checkpoint, monkeypatch):
    """As a process leaves them that is killed while it compiles."""
    from torch._inductor.exc import InductorError

    def broken(*_):
        raise InductorError(ImportError("/cache/ab/kernel.main.so: file too short"), None)

    monkeypatch.setattr(torch, "compile", lambda *_, **__: broken)
    model = load_decoder(checkpoint("llama2"), load_config(checkpoint("llama2")), torch.float32, attention=PACKED)
    with pytest.raises(
        BackendError, match=r"file too short; if .* damaged, remove that folder and try again, or do not compile"
    ):
        ScoredLoss(model, ROW, compile=True).total(packed_batch(some_documents()))


def test_muon_sees_the_matrices_the_model_means():
    """Of fused rows each part by itself: as torch's Muon on matrices that lie apart, and AdamW on the rest."""
    model = tiny()
    rows = fused_rows(model)
    assert rows["blocks.0.attention.qkv.weight"] == [96, 48, 48]
    optimizer = Optimizer(model, 0.01, muon_learning_rate=0.02, weight_decay=0.1, max_norm=1e9)
    apart, rest = {}, {}
    for name, parameter in model.named_parameters():
        matrix = parameter.dim() == 2 and name.startswith("blocks.")
        parts = parameter.detach().clone().split(rows.get(name, [len(parameter)]))
        (apart if matrix else rest)[name] = [torch.nn.Parameter(part.clone()) for part in parts]
    muon = torch.optim.Muon([p for parts in apart.values() for p in parts], lr=0.02, weight_decay=0.1)
    adam = torch.optim.AdamW(
        [p for parts in rest.values() for p in parts], lr=0.01, betas=(0.9, 0.95), weight_decay=0.0
    )
    generator = torch.Generator().manual_seed(0)
    for _ in range(3):
        for name, parameter in model.named_parameters():
            parameter.grad = torch.randn(parameter.shape, generator=generator)
            pieces = parameter.grad.clone().split(rows.get(name, [len(parameter)]))
            for part, gradient in zip((apart | rest)[name], pieces, strict=True):
                part.grad = gradient
        optimizer.step(1.0)
        muon.step()
        adam.step()
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, torch.cat([*(apart | rest)[name]])), name


def test_learning_rate_rises_and_falls():
    factors = [learning_rate_factor(step, 100, 10) for step in range(100)]
    assert factors[0] == pytest.approx(0.1)
    assert factors[9] == factors[10] == 1.0
    assert factors[55] == pytest.approx(0.5)
    assert 0 < factors[99] < 1e-3
    assert learning_rate_factor(0, 1, 0) == 1.0


def test_initial_weights_are_a_seeds_own_and_neutral(checkpoint):
    first, again, other = tiny(seed=1), tiny(seed=1), tiny(seed=2)
    assert torch.equal(first.blocks[1].mlp.down.weight, again.blocks[1].mlp.down.weight)
    assert not torch.equal(first.blocks[1].mlp.down.weight, other.blocks[1].mlp.down.weight)
    gemma = tiny(name="gemma2")
    x = torch.randn(2, 3, 48)
    normed = gemma.blocks[0].mlp_norm(x)
    assert (normed.square().mean(-1) - 1).abs().max() < 0.1  # eps is 0.02 in the recipes


# ---- the loop ----

RUN = """
import os, signal, sys, torch, torch._dynamo
from pathlib import Path
torch.set_num_threads(1)
sys.path.insert(0, {tests!r})
from test_train import some_run
for stop in (2, 6, 13):
    heard, told = os.pipe()
    run = os.fork()  # importing takes seconds; nothing has been computed in this process
    if run == 0:
        try:
            for step in some_run(Path(sys.argv[1])):
                os.write(told, f"{{step.number}} {{step.epoch}}\\n".encode())
        finally:
            os._exit(0)
    os.close(told)
    for line in os.fdopen(heard):
        print(line, end="")
        if int(line.split()[0]) == stop:
            os.kill(run, signal.SIGKILL)
    print("ended by", -os.waitstatus_to_exitcode(os.waitpid(run, 0)[1]), flush=True)
"""


def some_run(folder):
    """Eighteen steps, over three epochs, with a state after each."""
    documents = some_documents([30, 12, 50, 41, 9, 22] * 4)
    recipe = Recipe(steps=18, length=40, rows=4, rows_at_once=2, learning_rate=1e-3, muon_learning_rate=0.02)
    return Training(tiny(), documents, recipe, folder / "state.pt", save_every=0.0)


def test_killed_three_times_it_ends_in_the_same_bits(tmp_path):
    """kill -9 wherever it is just then, once in a later epoch; and while it writes, which leaves the state before."""
    script = tmp_path / "run.py"
    script.write_text(RUN.format(tests=str(Path(__file__).parent)))
    done = subprocess.run([sys.executable, script, tmp_path], capture_output=True, text=True, timeout=120)
    runs = done.stdout.split(f"ended by {int(signal.SIGKILL)}\n")
    assert (len(runs), runs[3]) == (4, ""), done.stderr
    steps = [line.split() for run in runs for line in run.splitlines()]
    numbers = [int(number) for number, _ in steps]
    assert numbers == sorted({*numbers})  # each goes on after the state of the last step that was told, or later
    assert {2, 6, 13} <= {*numbers}
    assert float(steps[-1][1]) > 2
    (tmp_path / "state.pt.part").write_bytes(b"half a state")
    (tmp_path / "whole").mkdir()
    killed, whole = some_run(tmp_path), some_run(tmp_path / "whole")
    resumed = killed.step
    assert 13 <= resumed < 18
    assert [step.number for step in killed] == list(range(resumed + 1, 19))
    assert [step.number for step in whole] == list(range(1, 19))
    for (name, ours), theirs in zip(whole.model.named_parameters(), killed.model.parameters(), strict=True):
        assert torch.equal(ours, theirs), name


def short_run(tmp_path, model=None, steps=4, **changes):
    recipe = Recipe(steps=steps, length=ROW, rows=2, rows_at_once=2, learning_rate=1e-3, bfloat16=False, **changes)
    return Training(model or tiny(), some_documents(), recipe, tmp_path / "state.pt", save_every=0.0)


def test_it_learns(tmp_path):
    losses = [step.loss for step in short_run(tmp_path, steps=40, muon_learning_rate=0.02)]
    assert losses[0] > 4
    assert losses[-1] < 0.5


def test_rows_at_once_agree():
    """The loop's mean is over a whole step: as many forward passes as you like, with more and fewer scored tokens."""
    scored, steps = [[i % 2 == 1 or n > 20 for i in range(n)] for n in LENGTHS], []
    for rows_at_once in (1, 4):
        recipe = Recipe(3, ROW, rows=4, rows_at_once=rows_at_once, learning_rate=1e-3, bfloat16=False)
        for step in Training(tiny(), some_documents(scored=scored), recipe):
            steps.append((step.loss, step.gradient_norm))
    for one_by_one, at_once in zip(steps[:3], steps[3:], strict=True):
        assert one_by_one == pytest.approx(at_once, rel=1e-4)


def test_a_full_disk_loses_nothing(tmp_path, monkeypatch):
    training = iter(run := short_run(tmp_path))
    next(training)
    before = (tmp_path / "state.pt").read_bytes()
    plain = torch.save

    def full(content, file):
        plain({}, file)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(RequestError, match=r"state\.pt cannot be written.*No space left.*make room"):
        next(training)
    assert (tmp_path / "state.pt").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["state.pt"]
    monkeypatch.undo()
    assert run.step == 2
    again = short_run(tmp_path)
    assert again.step == 1
    assert [step.number for step in again] == [2, 3, 4]


def test_the_state_of_another_run_is_refused(tmp_path):
    list(short_run(tmp_path))
    assert list(short_run(tmp_path)) == []  # it was done
    with pytest.raises(RequestError, match=r"another run \(steps 4, not 5\)"):
        short_run(tmp_path, steps=5)
    frozen = tiny()
    frozen.embedding.requires_grad_(False)
    with pytest.raises(RequestError, match=r"another run \(parameters\)"):
        short_run(tmp_path, frozen)
    (tmp_path / "state.pt").write_bytes(b"no state")
    with pytest.raises(RequestError, match="no state of a training run"):
        short_run(tmp_path)


def test_what_is_frozen_stays_and_is_not_saved(tmp_path):
    model = tiny()
    model.requires_grad_(False)
    model.blocks[0].mlp.requires_grad_(True)
    before = copy.deepcopy(model.state_dict())
    list(short_run(tmp_path, model))
    changed = [name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])]
    assert changed == ["blocks.0.mlp.gate_up.weight", "blocks.0.mlp.down.weight"]
    assert (tmp_path / "state.pt").stat().st_size < 12 * 4 * (144 * 48 + 48 * 72)


def test_errors_say_what_is_wrong(tmp_path):
    model = tiny()
    with pytest.raises(RequestError, match="token ids from 4 to 200"):
        recipe = Recipe(steps=1, length=ROW, rows=1, rows_at_once=1, learning_rate=1e-3)
        Training(model, make_documents([([4, 200], [True, True])], 1), recipe)
    with pytest.raises(RequestError, match="rows_at_once 3 must divide the 4 rows"):
        Recipe(steps=1, length=8, rows=4, rows_at_once=3, learning_rate=1e-3)
    with torch.no_grad():
        model.norm.weight.fill_(float("nan"))
    with pytest.raises(NumericalError, match="step 1: the loss is nan"):
        list(short_run(tmp_path, model))
    assert not list(tmp_path.iterdir())
