"""Templates that would hang or fill the memory are stopped; templates that are used are not.

What a template renders to is in test_tokenizer.py, against transformers.
"""

import json
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from tiny_tokenizers import CHATML, LLAMA2_CHAT

from minillm.errors import TokenizerError
from minillm.load.chat_template import ChatTemplate

CHAT = [{"role": "user", "content": "Hello"}]
BIG = "{% set s = 'a' * 1000000 %}"  # the largest that is made without question is 1 MiB
NUMBERS = "range(99999)|map('string')"

HOSTILE = [
    # loops, calls and recursion without end
    "{% for a in range(99999) %}{% for b in range(99999) %}{% for c in range(9) %}{% endfor %}{% endfor %}{% endfor %}",
    "{% for a in range(99999) %}{% for b in range(99999) if false %}{% endfor %}{% endfor %}",
    "{% for a in range(99999) %}" + "x" * 60000 + "{% endfor %}",
    "{% macro m(n) %}{% if n %}x{{ m(n - 1) }}{{ m(n - 1) }}{% endif %}{% endmacro %}{{ m(60) }}",
    "{% macro m() %}{{ caller() }}{{ caller() }}{% endmacro %}" + "{% call m() %}" * 18 + "x" + "{% endcall %}" * 18,
    "{% for x in [[1]] recursive %}{{ loop([[1]]) }}{{ loop([[1]]) }}{% endfor %}",
    "{% block a %}{{ self.a() }}{{ self.a() }}{% endblock %}",
    "{{ range(99999)|select('in', range(99999)|list)|list }}",
    "{{ " + NUMBERS + "|map(attribute='" + ".".join("0" * 20000) + "')|list }}",
    "{{ " + NUMBERS + "|sort(attribute='" + ",".join("0" * 20000) + "')|list }}",
    "{% set a = 'a' * 900000 %}{% set b = 'a' * 900000 %}" + "{{ a == b }}" * 4000,
    # one operation
    "{{ 'a' * 8000000000 }}",
    "{{ 8000000000 * ['a'] }}",
    "{{ 'a' * true * 99999999999 }}",
    "{{ 'x'|center(10**10) }}",
    "{{ 'x'.ljust(10**10) }}",
    "{{ ('x'|attr('rjust'))(10**10) }}",
    "{{ '%9999999999d' % 1 }}",
    "{{ '%9999999999d'|format(1) }}",
    "{{ '{:9999999999}'.format(1) }}",
    "{{ ('{:9999999999}'|safe).format(1) }}",
    "{{ (1).to_bytes(10**10, 'big') }}",
    "{{ '\t'.expandtabs(10**10) }}",
    "{{ ['a\nb']|map('indent', 10**10)|list }}",
    "{{ 10 ** (10 ** 10) }}",
    "{{ 5|round(-1000000000) }}",
    "{{ lipsum(n=10**9) }}",
    "{{ range(9)|list|tojson(indent='x' * 900000) }}",
    BIG + "{{ s|replace('a', s) }}",
    BIG + "{{ s.replace('a', s) }}",
    BIG + "{{ s|replace(new=s, old='a') }}",
    BIG + "{{ ['a' * 1000000]|map('replace', 'a', s)|list }}",
    BIG + "{{ s.join(s) }}",
    BIG + "{{ " + NUMBERS + "|join(d=s) }}",
    BIG + "{{ (s|safe).join(range(99999)) }}",
    "{{ ('\n' * 1000000)|indent(10**9) }}",
    "{{ ('€' * 400000)|list }}",
    "{{ ('a ' * 400000).split() }}",
    "{{ " + NUMBERS + "|map('list')|sum(start=[]) }}",
    "{{ [1]|batch(10**9, 1)|list }}",
    "{% macro m(a='x' * 9999999999) %}{% endmacro %}{{ m() }}",
    # many operations, each harmless
    "{% set s = 'aaaaaaaa' %}" + "{% set s = s ~ s %}" * 60,
    "{% set s = 'aaaaaaaa' %}" + "{% set s = s + s %}" * 60,
    "{% set ns = namespace(s='aaaaaaaa') %}{% for i in range(99) %}{% set ns.s = ns.s + ns.s %}{% endfor %}",
    "{% set s = [1] %}" + "{% set s = [s, s] %}" * 60 + "{{ s }}",
    "{% set s = (1,) %}" + "{% set s = (s, s) %}" * 60 + "{{ {s: 1} }}",
    "{% set s = {} %}" + "{% set s = {'a': s, 'b': s} %}" * 60 + "{{ s|tojson }}",
    "{% set s = dict() %}" + "{% set s = dict(a=s, b=s) %}" * 60 + "{{ s|string }}",
    "{% set a = 2**1000 %}" + "{% set a = a * a %}" * 100,
    BIG + "".join(f"{{% set a{i} = s[1:] %}}" for i in range(2500)),
    BIG + "{{ s }}" * 9000,
    BIG + "{{ (" + "s ~ " * 10000 + "s)|length }}",
    BIG + "{% set l = [" + "s," * 20000 + "] %}{{ l }}",
    "{% set x %}" + "{{ 'a' * 1000000 }}" * 50 + "{% endset %}",
    "{% set l = [0] * 900000 %}" + "".join(f"{{% set a{i} = l.copy() %}}" for i in range(2000)),
    # a text that would take minutes to tokenize
    "{{ 'word ' * 200000 }}" * 2,
    # the caller's values, and Python
    "{{ dict.update(messages[0], {'role': 'x'}) }}",
    "{{ messages[0].update({'role': 'x'}) }}",
    "{{ {}.fromkeys(range(99999)) }}",
    "{{ environment.charge(-10**12) }}",
    "{{ raise_exception('x' * 900000) }}",
]

RUN = """
import json, sys, threading, time
from minillm.load.chat_template import ChatTemplate
from minillm.errors import TokenizerError

def peak():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM"))

chat, good, templates = json.load(sys.stdin)
expected = ChatTemplate(good).render(chat)
before, answers = peak(), []

def attack():  # not the main thread: no signal would help
    for source in templates:
        started, template, message = time.thread_time(), ChatTemplate(source), None
        try:
            template.render(chat)
        except TokenizerError as error:
            message = str(error)
        answers.append((message, time.thread_time() - started))
        assert ChatTemplate(good).render(chat) == expected

thread = threading.Thread(target=attack)
thread.start()
thread.join()
print(json.dumps([answers, peak() - before]))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/status")
def test_hostile_templates_are_stopped_in_time_and_memory_and_the_next_call_is_fine():
    done = subprocess.run(
        [sys.executable, "-c", RUN],
        input=json.dumps([CHAT, CHATML, HOSTILE]),
        cwd=Path(__file__).parent.parent,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    answers, peak = json.loads(done.stdout)
    assert len(answers) == len(HOSTILE)
    for source, (message, seconds) in zip(HOSTILE, answers, strict=True):
        assert message is not None, source[:200]
        assert len(message) < 500
        assert seconds < 2, source[:200]
    assert peak < 256 * 2**20


def test_a_template_that_went_over_its_account_starts_afresh():
    template = ChatTemplate("{% for i in range(messages[0].n) %}{{ 'x' * 999999 }}{% endfor %}ok")
    with pytest.raises(TokenizerError, match="than any conversation"):
        template.render([{"n": 99999}])
    assert template.render([{"n": 0}]) == "ok"


def test_messages_that_hold_themselves():
    message = {"role": "user", "content": "x"}
    message["self"] = message
    with pytest.raises(TokenizerError, match="larger"):
        ChatTemplate(CHATML).render([message])


def test_threads_have_an_account_each():
    source, answers = "{% for i in range(9999) %}{{ messages[0].name }}{% endfor %}", {}
    template = ChatTemplate(source)

    def render(name):
        answers[name] = template.render([{"name": name}])

    threads = [threading.Thread(target=render, args=(name,)) for name in "abcdef"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert answers == {name: name * 9999 for name in "abcdef"}


def test_a_long_conversation_has_room():
    """2,000 messages of 1 kB each, and a document of 8 MB: the account grows with what is given."""
    long = [{"role": role, "content": "word " * 200} for role in ("user", "assistant") * 1000]
    for source in (CHATML, LLAMA2_CHAT):
        assert len(ChatTemplate(source).render(long, bos_token="<s>", eos_token="</s>")) > 2e6
    document = [{"role": "user", "content": "日本 🚀 " * 10**6}]
    assert len(ChatTemplate(CHATML).render(document)) > 5e6


# As published templates do: tools, thoughts cut out of earlier turns, the last user turn looked up, macros.
WORKING = """{%- macro block(name, text) -%}<{{ name }}>{{ text | trim }}</{{ name }}>{%- endmacro -%}
{%- set ns = namespace(last=0, seen=[]) -%}
{%- if tools is defined and tools %}{% for tool in tools %}{{ tool | tojson(indent=2) }}{% endfor %}{% endif -%}
{%- for message in messages[::-1] -%}{%- if message.role == 'user' and not ns.last -%}
{%- set ns.last = messages | length - 1 - loop.index0 -%}{%- endif -%}{%- endfor -%}
{%- for message in messages -%}
{%- set text = message.content if message.content is string else message.content | map(attribute='text') | join('') -%}
{%- if message['role'] == 'assistant' and '</think>' in text -%}
{%- set text = text.split('</think>')[-1].lstrip('\\n') -%}{%- endif -%}
{{ block(message.role | upper, text.replace('|', '/')) }}{{ '*' * 3 if loop.index0 == ns.last else '' }}
{%- set ns.seen = ns.seen + [message.role] -%}
{%- endfor -%}
{{ ns.seen | unique | list | join(', ') ~ ' ' ~ (ns.seen | select('equalto', 'user') | list | count) }}
{%- for key, value in {'b': 1, 'a': 2}.items() | sort %} {{ key }}={{ value }}{% endfor %}"""


def test_what_published_templates_use_works():
    chat = [
        {"role": "user", "content": " a|b "},
        {"role": "assistant", "content": "<think>hm</think>\nYes."},
        {"role": "user", "content": [{"type": "text", "text": "And"}, {"type": "text", "text": " c?"}]},
    ]
    text = ChatTemplate(WORKING).render(chat, tools=[{"name": "f"}])
    assert text == (
        '{\n  "name": "f"\n}<USER>a/b</USER><ASSISTANT>Yes.</ASSISTANT><USER>And c?</USER>***user, assistant 2 a=2 b=1'
    )


def test_a_normal_rendering_is_quick():
    """Compiled once; then a conversation of ten messages takes a fraction of a millisecond, the best of many."""
    chat = [{"role": role, "content": "Hello there. " * 20} for role in ("user", "assistant") * 5]
    template, seconds = ChatTemplate(WORKING), []
    for _ in range(20):
        started = time.thread_time()
        template.render(chat)
        seconds.append(time.thread_time() - started)
    assert min(seconds) < 0.003
