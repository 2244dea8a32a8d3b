"""Chat templates in a process of their own: what transformers gives, in bounds."""

from __future__ import annotations

import json
import os
import signal
import time

import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from mlx_sleep import templates
from mlx_sleep.models.load import load
from mlx_sleep.templates import Renderer
from mlx_sleep.utils import limits
from mlx_sleep.utils.errors import UserError
from tests.fakes import TEMPLATE, fake_folder

MESSAGES = [
    {"role": "user", "content": "<b>Ä</b> & 'so'"},
    {"role": "assistant", "content": "眠り"},
    {"role": "user", "content": "x" * 1000},
]


@pytest.fixture(scope="module")
def renderer():
    return Renderer()


@pytest.mark.parametrize(
    "template",
    [
        TEMPLATE,
        "{% for m in messages %}\n  {%- if loop.last %}\n{{ m.content | upper }}\n{% endif %}\n"
        "{% endfor %}\n{{ messages | tojson }}{{ messages | tojson(indent=2) }}",
        "{% for m in messages %}{% if loop.index > 2 %}{% break %}{% endif %}{{ m['content'] }}"
        "{% generation %}{{ m.role }}{% endgeneration %}{% endfor %}{{ bos_token }}",
        "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}"
        "{{ ns.n * '-' }}{{ '%05d' % ns.n }}{{ 2 ** ns.n }}{{ none is defined }}{{ tools }}",
        "{% macro say(m) %}{{ m.role ~ ': ' ~ m.content.strip() }}{% endmacro %}"
        "{% for m in messages | rejectattr('role', 'equalto', 'user') %}{{ say(m) }}{% endfor %}"
        "{{ messages[0].content.split('&') | join(', ') }}{{ dict(a=1) }}{{ strftime_now('%Y') }}",
    ],
)
def test_the_text_is_that_of_transformers(renderer, template):
    variables = {"bos_token": "<s>", "tools": None, "documents": None}
    ours = renderer.render(template, {"messages": MESSAGES, **variables})
    theirs, _ = render_jinja_template([MESSAGES], chat_template=template, **variables)
    assert ours == theirs[0]


@pytest.mark.parametrize(
    ("template", "says"),
    [
        ("{{ 'a' * 10 ** 9 }}", "a text that is too long"),
        ("{{ [0] * 10 ** 8 }}", "a text that is too long"),
        ("{{ 2 ** 1000000000 }}", "a power that is too large"),
        ("{{ 'a'.center(10 ** 11) }}", "a number that is too large"),
        ("{% for i in range(99999) %}{{ 'a' * 100 }}{% endfor %}", "characters come out"),
        ("{% for i in range(10 ** 9) %}{% endfor %}", "a number that is too large"),
        ("{{ raise_exception('two\nlines') }}", "fails: two lines"),
        ("{{ ''.__class__.__mro__ }}{{ messages.append(1) }}", "unsafe"),
        ("{% for", "unexpected"),
        ("{{ (" * 3000, "fails: "),
    ],
)
def test_what_goes_beyond_the_bounds_is_one_line(renderer, template, says):
    with pytest.raises(UserError, match=says) as caught:
        renderer.render(template, {"messages": []})
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 300
    assert renderer.render("{{ messages }}", {"messages": 1}) == "1"  # it goes on


ENDLESS = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"


def test_a_template_that_does_not_end(tmp_path, monkeypatch):
    monkeypatch.setattr(templates, "SECONDS", 0.5)
    folder = fake_folder(tmp_path / "model")
    file = folder / "tokenizer_config.json"
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    file.write_text(json.dumps({**json.loads(file.read_text()), "chat_template": ENDLESS}))
    with pytest.raises(UserError, match="the chat template is not rendered within"):
        load(folder)


def test_the_process_bounds_the_processor_s_time_itself(tmp_path, monkeypatch):
    """So that a busy machine, where a second of the processor takes many, is given time."""
    script = tmp_path / "script.py"
    script.write_text(
        f"import sys; sys.path.append({str(templates._SCRIPT.parent)!r})\n"
        "import template_process as process; process.SECONDS = 0; process.main()"
    )
    monkeypatch.setattr(templates, "_SCRIPT", script)
    renderer = Renderer()
    renderer.render("", {})
    process = renderer._process
    with pytest.raises(UserError, match="the chat template is not rendered within"):
        renderer.render(ENDLESS, {})
    assert process.returncode == -signal.SIGXCPU


def test_nothing_is_left_running(renderer, monkeypatch):
    monkeypatch.setattr(templates, "SECONDS", 0.3)
    renderer.render("", {})
    process = renderer._process
    with pytest.raises(UserError):
        renderer.render(ENDLESS, {})
    assert process.poll() == -signal.SIGKILL


def test_a_process_that_has_ended_is_started_again(renderer):
    renderer.render("", {})
    os.kill(renderer._process.pid, signal.SIGKILL)
    time.sleep(0.05)
    assert renderer.render("{{ 1 + 1 }}", {}) == "2"


def test_a_template_of_many_characters(renderer):
    with pytest.raises(UserError, match="the length of the chat template is .* --no-limits"):
        renderer.render(" " * (limits.TEMPLATE_CHARACTERS + 1), {})
