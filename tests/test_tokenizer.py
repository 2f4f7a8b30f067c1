"""Tokenizer, chat templates and streaming text, against transformers and the whole-text decode."""

import json
import random
import re
import shutil

import pytest
import transformers
from tiny_tokenizers import CHATML, LLAMA2_CHAT, TRICKY

from minillm.errors import TokenizerError
from minillm.load.tokenizer import load_tokenizer
from minillm.tokenizer import TextStream

CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "  Hello 🚀 "},
    {"role": "assistant", "content": "Hi."},
    {"role": "user", "content": "And <b>now</b>?"},
]


@pytest.fixture(params=["byte_level", "metaspace"])
def files(request, text_tokenizer_files, metaspace_files):
    return text_tokenizer_files if request.param == "byte_level" else metaspace_files


@pytest.fixture
def tokenizer(files):
    return load_tokenizer(files.folder)


@pytest.fixture
def oracle(files):
    return transformers.PreTrainedTokenizerFast.from_pretrained(files.folder)


def altered(files, tmp_path, **changes):
    """A copy of the tokenizer folder with keys of tokenizer_config.json replaced (None removes)."""
    folder = tmp_path / "tokenizer"
    shutil.copytree(files.folder, folder)
    config = json.loads((folder / "tokenizer_config.json").read_text()) | changes
    config = {key: value for key, value in config.items() if value is not None}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("text", TRICKY)
def test_round_trip_and_agreement(text, tokenizer, oracle):
    ids = tokenizer.encode(text)
    assert ids == oracle.encode(text)
    assert ids[0] == tokenizer.bos_token_id == 1
    assert ids.count(1) == 1
    assert tokenizer.encode(text, add_special_tokens=False) == ids[1:]
    assert tokenizer.decode(ids) == text
    assert tokenizer.eos_token_id == 2


def test_padding_ids_of_the_embedding_decode_to_nothing(tokenizer):
    ids = tokenizer.encode("The wolf")
    assert tokenizer.decode([*ids, tokenizer.vocab_size, tokenizer.vocab_size + 4]) == "The wolf"


def test_add_bos_in_the_config_overrules_the_file(files, tmp_path):
    text = "The wolf"
    plain = load_tokenizer(files.folder).encode(text)
    without = load_tokenizer(altered(files, tmp_path / "a", add_bos_token=False)).encode(text)
    assert without == plain[1:]
    raw = json.loads((files.folder / "tokenizer.json").read_text())
    folder = altered(files, tmp_path / "b", add_bos_token=True)
    (folder / "tokenizer.json").write_text(json.dumps(raw | {"post_processor": None}))
    assert load_tokenizer(folder).encode(text) == plain
    folder = altered(files, tmp_path / "c", add_bos_token=None)
    (folder / "tokenizer.json").write_text(json.dumps(raw | {"post_processor": None}))
    assert load_tokenizer(folder).encode(text) == plain[1:]  # Qwen: nobody asks for a BOS


def test_truncation_and_padding_left_over_from_training_are_ignored(files, tmp_path):
    folder = altered(files, tmp_path)
    raw = json.loads((folder / "tokenizer.json").read_text())
    raw["truncation"] = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
    raw["padding"] = {
        "strategy": {"Fixed": 64}, "direction": "Right", "pad_to_multiple_of": None,
        "pad_id": 0, "pad_type_id": 0, "pad_token": "<pad>",
    }  # fmt: skip
    (folder / "tokenizer.json").write_text(json.dumps(raw))
    assert load_tokenizer(folder).encode(TRICKY[0]) == load_tokenizer(files.folder).encode(TRICKY[0])


# -- chat ------------------------------------------------------------------------------------


@pytest.mark.parametrize("messages", [CHAT, CHAT[1:], CHAT[1:2], CHAT[:2]], ids=["all", "no system", "one", "two"])
@pytest.mark.parametrize("prompt", [True, False])
def test_chat_agrees_with_transformers(messages, prompt, tokenizer, oracle):
    text = oracle.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt)
    assert tokenizer.render_chat(messages, add_generation_prompt=prompt) == text
    ids = oracle.apply_chat_template(messages, add_generation_prompt=prompt, return_dict=False)
    assert tokenizer.encode(text, add_special_tokens=False) == ids
    assert tokenizer.encode_chat(messages) == ids or not prompt


def test_no_second_bos(metaspace_files):
    """The Llama 2 template writes <s> itself; tokenizing it with specials again would double it."""
    tokenizer = load_tokenizer(metaspace_files.folder)
    ids = tokenizer.encode_chat(CHAT[1:2])
    assert (ids[0], ids.count(1)) == (1, 1)
    assert tokenizer.encode(tokenizer.render_chat(CHAT[1:2])).count(1) == 2  # what the trap looks like


def test_template_refusals_are_clear(metaspace_files):
    with pytest.raises(TokenizerError, match="must alternate"):
        load_tokenizer(metaspace_files.folder).render_chat([CHAT[1], CHAT[1]])


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.append({'role': 'user', 'content': 'x'}) }}",
        "{{ self.__init__.__globals__ }}",
        "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
        "{% for i in range(1000000000) %}x{% endfor %}",
    ],
)
def test_templates_run_in_the_immutable_sandbox(template, files, tmp_path):
    tokenizer = load_tokenizer(altered(files, tmp_path, chat_template=template))
    with pytest.raises(TokenizerError, match="chat template"):
        tokenizer.render_chat(CHAT)


@pytest.mark.parametrize("template", ["{% for %}", "{{ 1 / 0 }}", "{{ messages[99].role.x.y }}", "{{ nothing() }}"])
def test_broken_templates_are_tokenizer_errors(template, files, tmp_path):
    tokenizer = load_tokenizer(altered(files, tmp_path, chat_template=template))
    with pytest.raises(TokenizerError):
        tokenizer.render_chat(CHAT)


def test_helpers_templates_rely_on(files, tmp_path):
    """raise_exception, strftime_now, tojson without HTML escapes, loop controls, trimmed blocks."""
    template = (
        "{% for m in messages %}\n{% if m.role == 'system' %}{% continue %}{% endif %}\n"
        "    {% if true %}\n{{ {'t': m.content} | tojson }};{% endif %}{% endfor %}{{ strftime_now('%Y') | length }}"
    )
    tokenizer = load_tokenizer(altered(files, tmp_path, chat_template=template))
    oracle = transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path / "tokenizer")
    messages = [CHAT[0], CHAT[3], {"role": "user", "content": "Grüße & <b>"}]
    rendered = tokenizer.render_chat(messages)
    assert rendered == oracle.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert "<b>now</b>" in rendered
    assert "Grüße & <b>" in rendered


def test_where_the_template_is_found(files, tmp_path):
    folder = altered(files, tmp_path / "none", chat_template=None)
    with pytest.raises(TokenizerError, match="chat template"):
        load_tokenizer(folder).render_chat(CHAT)
    (folder / "chat_template.jinja").write_text(CHATML)
    expected = load_tokenizer(folder).render_chat(CHAT)
    assert expected.startswith("<|im_start|>system\nBe brief.<|im_end|>\n")
    named = [{"name": "tool_use", "template": LLAMA2_CHAT}, {"name": "default", "template": CHATML}]
    folder = altered(files, tmp_path / "named", chat_template=named)
    assert load_tokenizer(folder).render_chat(CHAT) == expected


# -- streaming ---------------------------------------------------------------------------------


def stream(tokenizer, context, ids, stops=()):
    """The pieces of a stream, and whether a stop string ended it."""
    text = TextStream(tokenizer, context, stops)
    pieces = []
    for token in ids:
        pieces.append(text.push(token))
        if text.stopped:
            break
    pieces.append(text.finish())
    return pieces, text.stopped


@pytest.mark.parametrize("before", ["", "The wolf said", "从前有一个小女孩", "🚀"])
@pytest.mark.parametrize("text", TRICKY)
def test_pieces_concatenate_to_the_text(text, before, tokenizer):
    """Wherever a prompt ends, the pieces of the rest add up to the rest and never show half a character."""
    text = before + text
    ids = tokenizer.encode(text)
    for size in range(1, len(ids) + 1):
        prompt = tokenizer.decode(ids[:size])
        if prompt.endswith("\ufffd"):
            continue  # a prompt is text, so it does not end inside a character
        pieces, _ = stream(tokenizer, ids[:size], ids[size:])
        assert prompt + "".join(pieces) == text or (prompt == "" and "".join(pieces) == " " + text)


def test_first_word_keeps_its_space(metaspace_files):
    """SentencePiece decoders drop the space that starts a text; an answer is not the start of a text."""
    tokenizer = load_tokenizer(metaspace_files.folder)
    context, whole = tokenizer.encode("The wolf"), tokenizer.encode("The wolf a time")
    assert whole[: len(context)] == context
    assert "".join(stream(tokenizer, context, whole[len(context) :])[0]) == " a time"


def test_pieces_come_as_soon_as_they_can(tokenizer):
    """Nothing is held back longer than a character takes: after each whole character the text is out."""
    text = "a🚀b从c"
    ids = tokenizer.encode(text)
    streaming, shown = TextStream(tokenizer, ids[:1]), ""
    for count, token in enumerate(ids[1:], start=2):
        shown += streaming.push(token)
        complete = tokenizer.decode(ids[:count])
        if not complete.endswith("\ufffd"):
            assert shown.strip() == complete.strip()
    assert (shown + streaming.finish()).strip() == text


@pytest.mark.parametrize("seed", range(30))
def test_random_tokens(seed, text_tokenizer_files):
    """A model may produce any bytes. Every piece is final, and together they are the whole decode."""
    tokenizer = load_tokenizer(text_tokenizer_files.folder)
    random_ = random.Random(seed)
    ids = [random_.randrange(5, tokenizer.vocab_size) for _ in range(60)]
    context = [1, *(random_.randrange(5, 260) for _ in range(random_.randrange(8)))]
    if tokenizer.decode(context).endswith("\ufffd"):
        context += tokenizer.encode("end", add_special_tokens=False)
    whole = tokenizer.decode(context + ids)[len(tokenizer.decode(context)) :]
    assert "".join(stream(tokenizer, context, ids)[0]) == whole


@pytest.mark.parametrize("stop", ["wolf", "f s", "little girl:", ":", "The wolf said", " early in the", "🚀", "小女"])
def test_stop_strings_span_tokens(stop, tokenizer):
    """The text ends just before the stop string, and no beginning of it was ever shown."""
    text = "The wolf said to the little girl: where are you going so early in the morning? 🚀 小女孩"
    ids = tokenizer.encode(text)
    pieces, stopped = stream(tokenizer, ids[:1], ids[1:], [stop])
    assert stopped
    assert "".join(pieces).strip() == text[: text.index(stop)].strip()


def test_the_stop_string_completed_first_counts(tokenizer):
    text = "The wolf said to the little girl: where"
    ids = tokenizer.encode(text)
    pieces, _ = stream(tokenizer, ids[:1], ids[1:], ["little girl", "said to the", "wolf said to the little girl: w"])
    assert "".join(pieces).strip() == "The wolf"
    pieces, stopped = stream(tokenizer, ids[:1], ids[1:], ["never", "wherever", "girl: where "])
    assert not stopped
    assert "".join(pieces).strip() == text  # what had been held back as a possible beginning came out


@pytest.mark.parametrize("seed", range(10))
def test_stop_strings_property(seed, tokenizer):
    """Random substrings as stop strings: always cut at the earliest completion, never shown early."""
    random_ = random.Random(seed)
    text = TRICKY[random_.randrange(7)]
    ids = tokenizer.encode(text)
    shown_without = "".join(stream(tokenizer, ids[:1], ids[1:])[0])
    begin = random_.randrange(len(shown_without) - 6)
    stops = [shown_without[begin : begin + random_.randrange(1, 6)], shown_without[-8:-3]]
    end, cut = min((shown_without.index(s) + len(s), -len(s)) for s in stops)
    pieces, stopped = stream(tokenizer, ids[:1], ids[1:], stops)
    assert stopped
    assert "".join(pieces) == shown_without[: end + cut]


# -- files that are wrong ----------------------------------------------------------------------


def test_file_errors(files, tmp_path):
    with pytest.raises(TokenizerError, match=r"tokenizer\.json"):
        load_tokenizer(tmp_path)
    folder = altered(files, tmp_path)
    (folder / "tokenizer_config.json").write_text("{")
    with pytest.raises(TokenizerError, match=r"tokenizer_config\.json"):
        load_tokenizer(folder)
    (folder / "tokenizer_config.json").write_text("[]")
    with pytest.raises(TokenizerError, match=r"tokenizer_config\.json"):
        load_tokenizer(folder)
    (folder / "tokenizer_config.json").unlink()  # optional: raw text still works
    assert load_tokenizer(folder).encode("The wolf") == load_tokenizer(files.folder).encode("The wolf")
    (folder / "tokenizer.json").write_text('{"model": 3}')
    with pytest.raises(TokenizerError, match=r"tokenizer\.json"):
        load_tokenizer(folder)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"bos_token": 5}, "bos_token"),
        ({"bos_token": {"content": ["<s>"]}}, "bos_token"),
        ({"eos_token": [["</s>"]]}, "eos_token"),
        ({"eos_token": "\ud800"}, "eos_token"),
        ({"add_bos_token": "yes"}, "add_bos_token"),
        ({"add_bos_token": [1]}, "add_bos_token"),
        ({"chat_template": 5}, "chat_template"),
        ({"chat_template": {"default": "x"}}, "chat_template"),
        ({"chat_template": [{"name": "default", "template": 5}]}, "chat_template"),
        ({"chat_template": "x" * 100000}, "chat_template"),
    ],
    ids=str,
)
def test_values_of_other_types(change, named, files, tmp_path):
    with pytest.raises(TokenizerError, match=named):
        load_tokenizer(altered(files, tmp_path, **change))


@pytest.mark.parametrize("template", [[5], [{"name": ["default"]}], [{"name": "tool_use", "template": "x"}], [], ""])
def test_no_template_among_the_named_ones(template, files, tmp_path):
    with pytest.raises(TokenizerError, match="no chat template"):
        load_tokenizer(altered(files, tmp_path, chat_template=template)).render_chat(CHAT)


@pytest.mark.parametrize(
    "name", ["tokenizer.json", "tokenizer_config.json", "chat_template.json", "chat_template.jinja"]
)
def test_files_that_hold_no_text(name, files, tmp_path):
    folder = altered(files, tmp_path)
    (folder / name).write_bytes(b"\xff\xfe{}")
    with pytest.raises(TokenizerError, match=re.escape(name)):
        load_tokenizer(folder)
    (folder / name).unlink()
    (folder / name).mkdir()
    with pytest.raises(TokenizerError, match=re.escape(name)):
        load_tokenizer(folder)


def test_files_too_large_or_too_deep(files, tmp_path):
    for name, content in [
        ("chat_template.jinja", "x" * 100000),
        ("chat_template.json", "[" * 100000),
        ("tokenizer_config.json", '{"x": ' * 100 + "1" + "}" * 100),
        ("tokenizer_config.json", " " * 2**23),
        ("tokenizer.json", "[" * 100000),
    ]:
        folder = altered(files, tmp_path / name / str(len(content)))
        (folder / name).write_text(content)
        with pytest.raises(TokenizerError, match=re.escape(name)):
            load_tokenizer(folder)


def test_a_tokenizer_without_a_token_for_unknown_words(files, tmp_path):
    folder = altered(files, tmp_path)
    model = {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "[UNK]"}
    (folder / "tokenizer.json").write_text(json.dumps({"version": "1.0", "model": model, "added_tokens": []}))
    with pytest.raises(TokenizerError, match="UNK"):
        load_tokenizer(folder).encode("b")


def test_a_panic_of_the_library_is_our_error(files, tmp_path):
    folder = altered(files, tmp_path)
    raw = json.loads((folder / "tokenizer.json").read_text())
    raw["post_processor"]["special_tokens"] = {}  # what the template needs is not there
    (folder / "tokenizer.json").write_text(json.dumps(raw))
    with pytest.raises(TokenizerError):
        load_tokenizer(folder).encode("The wolf")


def test_a_literal_bos_in_the_text_is_the_users(metaspace_files, tmp_path):
    """With add_bos_token false nothing is added, whatever tokenizer.json says, and nothing the user wrote is lost."""
    raw = json.loads((metaspace_files.folder / "tokenizer.json").read_text())
    for name, processor in (("adds", raw["post_processor"]), ("adds none", None)):
        folder = altered(metaspace_files, tmp_path / name, add_bos_token=False)
        (folder / "tokenizer.json").write_text(json.dumps(raw | {"post_processor": processor}))
        tokenizer = load_tokenizer(folder)
        for text, count in (("wolf", 0), ("<s> wolf", 1), ("<s><s> wolf", 2), ("<s>", 1), ("", 0)):
            ids = tokenizer.encode(text)
            assert ids == tokenizer.encode(text, add_special_tokens=False)
            assert ids.count(tokenizer.bos_token_id) == count


def test_text_that_is_not_unicode(tokenizer):
    with pytest.raises(TokenizerError, match="Unicode"):
        tokenizer.encode("half a surrogate \ud83d")


def test_replaces_that_multiply_are_refused(metaspace_files, tmp_path):
    """Three of a thousand characters each made 16 GB of one letter, and the library aborts the process."""
    for part, steps in (("normalizer", "normalizers"), ("decoder", "decoders")):
        folder = tmp_path / part
        shutil.copytree(metaspace_files.folder, folder)
        content = json.loads((folder / "tokenizer.json").read_text())
        bomb = {"type": "Replace", "pattern": {"String": "a"}, "content": "a" * 1000}
        content[part] = {"type": "Sequence", steps: [bomb, {"type": "Sequence", steps: [bomb, bomb]}]}
        (folder / "tokenizer.json").write_text(json.dumps(content))
        with pytest.raises(TokenizerError, match="Replace steps may make a text over 1000 times as long"):
            load_tokenizer(folder)
