"""`minillm finetune` from a checkpoint to a checkpoint: chats come back, a stopped run goes on, errors come first."""

# ruff: noqa: RUF001 (an answer holds unusual characters on purpose)

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from minillm.cli.parser import main
from minillm.errors import CheckpointError, RequestError
from minillm.llm import LLM
from minillm.train import finetune, finetuning
from minillm.train.loop import Training

CHATS = [
    [("Who lived near the forest?", "A little girl."), ("With whom?", "With her grandmother.")],
    [("What did the wolf say?", "Where are you going so early?")],
    [("Who got the daughter?", "The tailor 🚀"), ("And then?", "They lived happily."), ("For long?", "Ever after.")],
    [("Es war einmal", "ein kleines Mädchen – schöne Grüße!")],
    [("Il était une fois", "un roi\n\net une reine.")],
]
LIKE = dict(learning_rate=1e-2, held_out=0, bf16=False)


@pytest.fixture(scope="module")
def chats(tmp_path_factory):
    path = tmp_path_factory.mktemp("chats") / "chats.jsonl"
    roles = ("user", "assistant")
    lines = [
        {"messages": [{"role": roles[i % 2], "content": text} for i, text in enumerate(sum(chat, ()))]}
        for chat in CHATS
    ]
    path.write_text("\n".join(map(json.dumps, lines)))
    return path


@pytest.fixture(scope="module")
def base(quantizable, tmp_path_factory):
    """The tiny checkpoint, which stops at the end of a turn."""
    folder = tmp_path_factory.mktemp("base") / "llama"
    shutil.copytree(quantizable, folder)
    raw = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(raw | {"dtype": "bfloat16"}))
    (folder / "generation_config.json").write_text('{"bos_token_id": 1, "eos_token_id": [2, 3]}')
    return folder


def gives_them_back(llm):
    for chat in CHATS:
        conversation = llm.conversation()
        for question, answer in chat:
            said = conversation.say(question, temperature=0, max_new_tokens=60)
            assert (said.text, said.finish_reason) == (answer, "eos")


def test_overfit_on_five_chats(base, chats, tmp_path):
    """Greedy gives them back, over several turns, and stops; rows are full, so nearly nothing is computed in vain."""
    done = finetune(base, chats, tmp_path / "out", steps=45, **(LIKE | {"held_out": chats}))
    gives_them_back(LLM.from_pretrained(tmp_path / "out"))
    again = finetune(tmp_path / "out", chats, tmp_path / "more", steps=1, **(LIKE | {"held_out": chats}))
    assert done.after == again.before  # the figures are those of what was written, in bfloat16
    assert done.losses[-1] < 0.05 < 3 < done.losses[0]
    assert done.filled == 1
    assert done.steps == len(done.losses) == 45
    assert not (tmp_path / "out.partial").exists()


def test_an_adapter_beside_codes(base, chats, tmp_path):
    """It learns beside int4, is written as PEFT does, and its figures are those of what was written."""
    done = finetune(base, chats, tmp_path / "out", steps=8, lora=4, quantize="int4-g32", **(LIKE | {"held_out": chats}))
    assert done.after < done.before - 0.5
    assert done.losses[-1] < done.losses[0] - 0.5
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"README.md", "adapter_config.json", "adapter_model.safetensors"}
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["base_model_name_or_path"] == str(base)
    assert "library_name: peft" in (tmp_path / "out" / "README.md").read_text()


class Stopped(Exception):
    pass


def stop_at(patch, number, save_every=0.0):
    """Like a kill after this step (`test_train.py` kills processes): nothing is tidied up."""
    step = Training._take_step

    def take(self):
        self.save_every = save_every
        if self.step == number:
            raise Stopped
        return step(self)

    patch.setattr(Training, "_take_step", take)


def test_a_stopped_run_goes_on_and_ends_in_the_same_bits(base, chats, tmp_path, monkeypatch):
    """Stopped twice, once in a later epoch and once while it wrote the result on a full disk."""
    options = LIKE | dict(epochs=6, rows=2, max_length=100, seed=3, held_out=0.2)
    whole = finetune(base, chats, tmp_path / "whole", **options)
    assert whole.steps > 6
    for number in (2, 5):
        with monkeypatch.context() as patch, pytest.raises(Stopped):
            stop_at(patch, number)
            finetune(base, chats, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()
    with pytest.raises(RequestError, match=r"out\.partial holds another run, .*--seed 3.*: give that command"):
        finetune(base, chats, tmp_path / "out", **(options | {"seed": 4}))

    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(finetuning, "write_decoder", full)
        with pytest.raises(CheckpointError, match="No space left"):
            finetune(base, chats, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()
    steps = []
    monkeypatch.setattr(Training, "_take_step", steps.append)  # there are none left to take
    again = finetune(base, chats, tmp_path / "out", **options)
    assert not steps
    assert (again.losses, again.before, again.after) == (whole.losses, whole.before, whole.after)
    ours, theirs = (load_file(tmp_path / name / "model.safetensors") for name in ("out", "whole"))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "whole"]


def test_other_data_under_the_same_name_are_another_run(base, chats, tmp_path, monkeypatch):
    data = tmp_path / "chats.jsonl"
    data.write_bytes(chats.read_bytes())
    with monkeypatch.context() as patch, pytest.raises(Stopped):
        stop_at(patch, 2)
        finetune(base, data, tmp_path / "out", steps=9, **LIKE)
    data.write_text(chats.read_text().replace("wolf", "fox"))
    with pytest.raises(RequestError, match=r"is not what it was when the run .* began"):
        finetune(base, data, tmp_path / "out", steps=9, **LIKE)


def test_a_full_disk_says_so(base, chats, tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(RequestError, match=r"out\.partial cannot be written .*No space.* make room"):
        finetune(base, chats, tmp_path / "out", steps=1, **LIKE)


def test_how_long_is_said_in_steps_epochs_or_minutes(base, chats, tmp_path, monkeypatch):
    runs = dict(steps=dict(steps=3), epochs=dict(epochs=2.5), once={}, minutes=dict(minutes=1e-9))
    done = {name: finetune(base, chats, tmp_path / name, rows=1, **how, **LIKE) for name, how in runs.items()}
    epoch = done["once"].steps
    assert done["steps"].steps == 3
    assert done["epochs"].steps == -(-5 * epoch // 2)
    assert done["once"].epochs == 1.0
    assert done["minutes"].steps == 1
    assert done["steps"].before is None
    # By the clock: two seconds for a pass, 8 rows of which are a step.
    ticks = iter(range(0, 1000, 2))
    monkeypatch.setattr(finetuning.time, "perf_counter", lambda: next(ticks))
    run = finetuning._Run(str(base), chats, tmp_path / "x", finetuning.Options(minutes=4.0, rows=1, **LIKE))
    assert run._steps(run._model()) == 120


@pytest.mark.parametrize(
    "options, said",
    [
        (dict(steps=1, epochs=2), "give one of them"),
        (dict(steps=0), "steps must be above 0, not 0"),
        (dict(learning_rate=float("nan")), "learning_rate must be above 0"),
        (dict(rows=4, rows_at_once=3), "rows_at_once 3 must divide the 4 rows"),
        (dict(max_length=4096), "max_length 4096 is over the model's"),
        (dict(quantize="int8"), "only an adapter beside them"),
        (dict(epoch=1), "unknown option 'epoch'"),
        (dict(held_out="nowhere"), "nowhere is neither a file nor a folder"),
        (dict(held_out=1), "from 0 to below 1"),
    ],
)
def test_wrong_options(options, said, base, chats, tmp_path):
    with pytest.raises(RequestError, match=said):
        finetune(base, chats, tmp_path / "out", **(dict(max_length=100, rows=4) | options))


def test_a_result_is_never_overwritten(base, chats, tmp_path):
    (tmp_path / "mine").write_text("")
    with pytest.raises(CheckpointError, match="exists already"):
        finetune(base, chats, tmp_path, steps=1)
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_the_command(base, chats, tmp_path, capsys, monkeypatch):
    """It prints what it did and where it is, and draws the loss; its card has the command and the figures."""
    words = ["finetune", str(base), str(chats), str(tmp_path / "out"), "--steps", "2", "--no-bf16", "--held-out", "0.4"]
    assert main([*words, "--plot", str(tmp_path / "loss.png")]) == 0
    out = capsys.readouterr().out
    assert out.splitlines()[-1] == str(tmp_path / "out")
    assert "bits per byte before" in out
    assert (tmp_path / "loss.png").read_bytes()[1:4] == b"PNG"
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"minillm {' '.join(words[:4])} --steps 2 --held-out 0.4 --no-bf16" in card
    assert all(line in card for line in out.splitlines()[:-1])
    assert main(words) == 1
    assert "exists already" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert main([*words[:3], str(tmp_path / "b"), "--plot", "x.png"]) == 1
    assert "needs matplotlib" in capsys.readouterr().err
    assert not (tmp_path / "b.partial").exists()


def test_a_folder_of_somebody_elses_is_left_alone(tmp_path):
    """OUT.partial is made by a run and removed by it: not where it is another's, nor what another put there."""
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "thesis.txt").write_text("all of it")
    data = tmp_path / "tales.txt"
    data.write_text("Once upon a time there was a fox.\n" * 4)
    with pytest.raises(RequestError, match="holds no run of minillm"):
        finetune("demo", data, tmp_path / "out", steps=1, rows=1, held_out=0)
    assert (tmp_path / "out.partial" / "thesis.txt").read_text() == "all of it"
    (tmp_path / "mine.partial").mkdir()
    (tmp_path / "mine.partial" / "run.json.part").write_text("")  # killed in its first moment
    finetune("demo", data, tmp_path / "mine", steps=1, rows=1, max_length=32, held_out=0)
    assert not (tmp_path / "mine.partial").exists()
