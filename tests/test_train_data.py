"""Text and conversations as documents: what is scored is the answers and their end, nothing else."""

# ruff: noqa: RUF001 (a message holds unusual characters on purpose)

import json

import pytest
import tiny_tokenizers
from tokenizers import AddedToken
from tokenizers import Tokenizer as RustTokenizer

from minillm.errors import MinillmError, RequestError, TokenizerError
from minillm.load.chat_template import ChatTemplate
from minillm.load.tokenizer import load_tokenizer
from minillm.tokenizer import Tokenizer
from minillm.train.chat import completion_document, conversation_documents
from minillm.train.data import read_examples, tokenized

# Six chat templates, written from what the models' makers publish of their form.
LLAMA3 = (
    "{% for message in messages %}"
    "{% set content = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' + message['content'] | trim"
    " + '<|eot_id|>' %}{{ bos_token + content if loop.first else content }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
QWEN2 = (  # with the system message it has where none is given
    "{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}"
    "{% endif %}" + tiny_tokenizers.CHATML
)
MISTRAL = (  # no generation prompt; an answer begins with a space
    "{{ bos_token }}{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}{% if message['role'] == 'user' %}"
    "{{ '[INST] ' + message['content'] + ' [/INST]' }}{% else %}{{ ' ' + message['content'] + eos_token }}{% endif %}"
    "{% endfor %}"
)
GEMMA = (  # an answer is the model's; no system message
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}"
    "{% endif %}{% for message in messages %}"
    "{% set role = 'model' if message['role'] == 'assistant' else message['role'] %}"
    "{{ '<start_of_turn>' + role + '\n' + message['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
PHI3 = (  # the end of the text stands after the last message alone, so that no answer's text is repeated
    "{% for message in messages %}{{ '<|' + message['role'] + '|>\n' + message['content'] + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"
)
ZEPHYR = (  # and TinyLlama: marks of roles are no tokens of their own
    "{% for message in messages %}{{ '<|' + message['role'] + '|>\n' + message['content'] + eos_token }}{{ '\n' }}"
    "{% if loop.last and add_generation_prompt %}{{ '<|assistant|>' + '\n' }}{% endif %}{% endfor %}"
)
# It drops thoughts from the answers before the last one: history is not what was said.
THINKING = (
    "{% for message in messages %}{% set content = message['content'] %}"
    "{% if message['role'] == 'assistant' and not loop.last %}{% set content = content.split('</think>')[-1] %}"
    "{% endif %}{{ '<|im_start|>' + message['role'] + '\n' + content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
CASES = {  # template, its special tokens, what ends an answer, kind of tokenizer
    "llama3": (LLAMA3, "<|start_header_id|> <|end_header_id|> <|eot_id|>", "<|eot_id|>", "byte_level"),
    "qwen2": (QWEN2, "", "<|im_end|>", "byte_level"),
    "mistral": (MISTRAL, "[INST] [/INST]", "</s>", "metaspace"),
    "gemma": (GEMMA, "<start_of_turn> <end_of_turn>", "<end_of_turn>", "metaspace"),
    "phi3": (PHI3, "<|user|> <|assistant|> <|end|>", "<|end|>", "metaspace"),
    "zephyr": (ZEPHYR, "", "</s>", "metaspace"),
}
CHAT = [
    {"role": "user", "content": "Who lived near the forest?"},
    {"role": "assistant", "content": "A little girl, with her grandmother."},
    {"role": "user", "content": "And\n\nthe wolf – what did he say?"},
    {"role": "assistant", "content": "Where are you going, Mädchen? 🚀"},
    {"role": "user", "content": "(nobody answers this)"},
]
ANSWERS = [message["content"] for message in CHAT if message["role"] == "assistant"]


@pytest.fixture(scope="session")
def tokenizer_with(text_tokenizer_files, metaspace_files):
    """tokenizer_with(template, special tokens, kind): one of the tiny tokenizers, as that template needs it."""

    def make(template, special="", kind="byte_level"):
        files = {"byte_level": text_tokenizer_files, "metaspace": metaspace_files}[kind]
        rust = RustTokenizer.from_file(str(files.folder / "tokenizer.json"))
        rust.add_special_tokens([AddedToken(word, normalized=False, special=True) for word in special.split()])
        bos, eos = ("<bos>", "<eos>") if kind == "byte_level" else ("<s>", "</s>")
        return Tokenizer(rust, {"bos_token": bos, "eos_token": eos}, None, ChatTemplate(template))

    return make


def parts(document, tokenizer):
    """The text of each run of scored tokens, and of all others."""
    ids, scored = document
    runs, rest = [[]], []
    for place, counts in enumerate(scored):
        (runs[-1] if counts else rest).append(ids[place])
        if not counts and runs[-1]:
            runs.append([])
    return [tokenizer.decode(run, False).strip() for run in runs if run], tokenizer.decode(rest, False)


@pytest.mark.parametrize("name", CASES)
def test_answers_and_their_end_are_scored_and_nothing_else(name, tokenizer_with):
    template, special, end, kind = CASES[name]
    tokenizer = tokenizer_with(template, special, kind)
    ends = {tokenizer.eos_token_id, tokenizer.token_id(end)}
    (document,) = conversation_documents(CHAT, tokenizer, ends)
    said, rest = parts(document, tokenizer)
    assert said == [answer + end for answer in ANSWERS]
    assert not [answer for answer in ANSWERS if answer in rest]
    assert CHAT[2]["content"] in rest
    assert CHAT[4]["content"] not in rest
    # What is scored follows, id for id, what a model is given when it is asked.
    ids, scored = document
    for i in (1, 3):
        given = tokenizer.encode_chat(CHAT[:i])
        assert ids[: len(given)] == given
        assert scored[len(given)]
        assert not scored[len(given) - 1]


def test_an_answer_that_is_not_repeated_is_a_document_of_its_own(tokenizer_with):
    tokenizer = tokenizer_with(THINKING)
    chat = [CHAT[0], CHAT[1] | {"content": "<think>the girl</think>She."}, *CHAT[2:4]]
    first, second = conversation_documents(chat, tokenizer, {tokenizer.token_id("<|im_end|>")})
    said, rest = parts(first, tokenizer)
    assert said == ["<think>the girl</think>She.<|im_end|>"]
    said, rest = parts(second, tokenizer)
    assert said == [ANSWERS[1] + "<|im_end|>"]
    assert "<think>" not in rest
    assert "She.<|im_end|>" in rest


def test_an_answer_without_an_end_is_given_one(tokenizer_with):
    """A template of passages, as the embedded model's: asked for one, it should say it and stop."""
    tokenizer = tokenizer_with("{{ bos_token }}{% for m in messages %}{{ m['content'] + '\n\n' }}{% endfor %}")
    documents = conversation_documents(CHAT, tokenizer, {tokenizer.eos_token_id})
    assert [parts(document, tokenizer)[0] for document in documents] == [[answer + "<eos>"] for answer in ANSWERS]
    assert parts(documents[1], tokenizer)[1] == "<bos>" + "".join(m["content"] + "\n\n" for m in CHAT[:3])


@pytest.mark.parametrize("kind", ["byte_level", "metaspace"])
def test_prompt_and_completion(kind, tokenizer_with):
    tokenizer = tokenizer_with("", kind=kind)
    document = completion_document("Once upon", " a time", tokenizer, {2})
    said, rest = parts(document, tokenizer)
    assert said == [f"a time{tokenizer.decode([2], False)}"]
    assert document[0][: sum(not counts for counts in document[1])] == tokenizer.encode("Once upon")
    assert "time" not in rest


def test_a_token_across_the_border_is_not_learned(tokenizer_with):
    """Asked with "grand", a model says "mother" and not the rest of one token that holds both."""
    tokenizer = tokenizer_with("")
    assert tokenizer.encode("there", False) != tokenizer.encode("th", False) + tokenizer.encode("ere", False)
    ids, _ = completion_document("th", "ere", tokenizer, {2})
    assert ids == [*tokenizer.encode("th"), *tokenizer.encode("ere", False), 2]
    with pytest.raises(TokenizerError, match="no token begins where the answer does"):  # it would put a space there
        completion_document("gran", "d", tokenizer_with("", kind="metaspace"), {2})


# ---- files ----

GOOD = json.dumps({"messages": CHAT})
BAD = {
    "{": "no JSON",
    "[" * 100_000: "no JSON",
    "[1]": "is no object",
    '{"text": "x"}': 'with "prompt" and "completion"',
    '{"messages": "hello"}': "must be a list of objects",
    '{"messages": []}': "no answer to learn",
    '{"messages": [{"role": "user", "content": "x"}]}': "no answer to learn",
    '{"messages": [{"role": "assistant", "content": null}]}': '"content" must be a text, not None',
    '{"messages": [{"content": "x"}]}': '"role" must be a text, not missing',
    '{"messages": [{"role": "assistant", "content": " "}]}': "is empty",
    '{"messages": [{"role": "assistant", "content": "\\ud800"}]}': "not valid Unicode",
    '{"messages": [{"role": "assistant", "content": "a<|im_end|>b"}]}': "would end it",
    '{"prompt": 1, "completion": "x"}': '"prompt" must be a text, not 1',
    '{"prompt": "x", "completion": ""}': "is empty",
    json.dumps({"prompt": "x", "completion": "word " * 100}): "--max-length is 90",
    '{"prompt": "\\u00ff"': "no JSON",
}


@pytest.fixture
def chatml(tokenizer_with):
    return tokenizer_with(tiny_tokenizers.CHATML)


@pytest.mark.parametrize("line", BAD, ids=range(len(BAD)))
def test_what_is_wrong_is_told_with_file_and_line(line, tmp_path, chatml):
    path = tmp_path / "chats.jsonl"
    path.write_text(f'\n{{"prompt": "a", "completion": "b"}}\n{line}\n')
    with pytest.raises(MinillmError) as caught:
        read_examples(path, chatml, {2, 3}, 90)
    assert str(caught.value).startswith(f"{path}:3: ")
    assert BAD[line] in str(caught.value)
    assert len(str(caught.value)) < 600


def test_refused_messages_and_other_files(tmp_path, tokenizer_with, chatml):
    path = tmp_path / "chats.jsonl"
    path.write_text(json.dumps({"messages": [CHAT[1]]}))
    with pytest.raises(TokenizerError, match=r"chats\.jsonl:1: the chat template refused .*alternate"):
        read_examples(path, tokenizer_with(MISTRAL, kind="metaspace"), {2}, 99)
    # It begins an answer otherwise than it asks for one.
    path.write_text(GOOD)
    asks = tokenizer_with(tiny_tokenizers.CHATML + "{% if add_generation_prompt %}<think>{% endif %}")
    with pytest.raises(TokenizerError, match=r"chats\.jsonl:1: .*asks for an answer with '<think>'"):
        read_examples(path, asks, {3}, 999)
    path.write_text("")
    with pytest.raises(RequestError, match="holds no text"):
        read_examples(path, chatml, {3}, 99)
    (tmp_path / "a.txt").write_bytes(b"fine\nnot \xff fine\n")
    with pytest.raises(RequestError, match=r"a\.txt:2: not UTF-8"):
        read_examples(tmp_path, chatml, {3}, 99)
    with pytest.raises(RequestError, match="neither a file nor a folder"):
        read_examples(tmp_path / "nothing", chatml, {3}, 99)


def test_texts_between_separators_and_a_folder(tmp_path, chatml):
    (tmp_path / "b.txt").write_text("\ufeffThe wolf\n\nsaid\n<eos>\n\n<eos>\nto the <eos> girl\n", encoding="utf-8")
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "c.jsonl").write_text(f"{GOOD}\n\n{GOOD}")
    (tmp_path / ".hidden").write_text("no")
    examples = read_examples(tmp_path, chatml, {2, 3}, 999)
    texts = [chatml.decode(example.documents[0][0], False) for example in examples if example.is_text]
    assert texts == ["<bos>The wolf\n\nsaid<eos>", "<bos>to the <eos> girl<eos>"]
    assert [example.text_bytes for example in examples] == [sum(len(a.encode()) for a in ANSWERS)] * 2 + [14, 17]
    assert all(all(example.documents[0][1]) for example in examples if example.is_text)


def make(data, folder, chatml, held_out=0.0, seed=0, max_length=999):
    return tokenized(data, held_out, seed, max_length, chatml, {2, 3}, [], folder)


def test_tokenized_once_and_again_when_something_changed(tmp_path, chatml, monkeypatch):
    data = tmp_path / "chats.jsonl"
    data.write_text("\n".join([GOOD] * 3))
    first = make(data, tmp_path, chatml)[0].digest
    count = len(list(tmp_path.iterdir()))
    assert make(data, tmp_path, chatml)[0].digest == first
    assert len(list(tmp_path.iterdir())) == count
    data.write_text("\n".join([GOOD] * 4))
    assert make(data, tmp_path, chatml)[0].digest != first
    with monkeypatch.context() as patch:  # not made a second time
        patch.setattr("minillm.train.data.read_examples", None)
        make(data, tmp_path, chatml)
        with pytest.raises(TypeError):
            make(data, tmp_path, chatml, max_length=998)
        with pytest.raises(TypeError):
            make(data, tmp_path, chatml, 0.5)


def test_what_is_held_out_is_not_learned(tmp_path, chatml):
    """Whole examples, with all documents of each; of a long text its end; of a file of its own all."""
    data, text = tmp_path / "c.jsonl", tmp_path / "t.txt"
    data.write_text("\n".join(json.dumps({"prompt": f"{i}", "completion": f" number {i}"}) for i in range(20)))
    learned, kept = make(data, tmp_path / ".", chatml, 0.2)

    def said(documents):
        begins = [0, *documents.ends.tolist()]
        return {chatml.decode(documents.ids[a:b].tolist()) for a, b in zip(begins, documents.ends.tolist())}  # noqa: B905

    assert (len(learned), len(kept)) == (16, 4)
    assert len(said(learned) | said(kept)) == 20
    assert said(kept) != said(make(data, tmp_path, chatml, 0.2, seed=1)[1])
    assert learned.text_bytes + kept.text_bytes == sum(len(f" number {i}") for i in range(20))

    text.write_text("Once upon a time. " * 50)
    learned, kept = make(text, tmp_path, chatml, 0.1, max_length=32)
    whole = make(text, tmp_path, chatml, 0.0, max_length=32)[0]
    assert [*learned.ids, *kept.ids] == [*whole.ids]
    assert len(kept.ids) == pytest.approx(len(whole.ids) / 10, abs=1)
    assert learned.text_bytes + kept.text_bytes == whole.text_bytes
    with pytest.raises(RequestError, match="one document cannot be learned and held out"):
        make(text, tmp_path, chatml, 0.1, max_length=9999)
    with pytest.raises(RequestError, match=r"from 0 to below 1, not 1\.5"):
        make(text, tmp_path, chatml, 1.5)
    learned, kept = make(data, tmp_path, chatml, text)
    assert (len(learned), len(kept)) == (20, 1)


def test_the_real_demo_reads_conversations():
    """Its template has no end of an answer; every token of the embedded tokenizer that is scored is the answer's."""
    from minillm.load.hub import DEMOS

    tokenizer = load_tokenizer(DEMOS["demo"])
    documents = conversation_documents(CHAT, tokenizer, {0})
    assert [parts(one, tokenizer)[0] for one in documents] == [[f"{answer}<|endoftext|>"] for answer in ANSWERS]
