"""A system prompt stands where the template has it, at the start of each window, and is kept."""

from __future__ import annotations

import mlx.core as mx
import pytest

from mlx_sleep.cli import slash
from mlx_sleep.cli.sleeping import SYSTEM_WAITS
from mlx_sleep.memory import Memory
from mlx_sleep.session import Session
from mlx_sleep.utils.errors import UserError
from tests.fakes import fake_folder, fake_model, fake_tokenizer
from tests.test_chat_template import EACH, END, GEMMA, LLAMA_3, MARKS, TURNS, make

SYSTEM = "Answer in rhymes."
LLAMA_2 = (  # it goes into the user's first turn
    "{% if messages[0].role == 'system' %}{% set system = '<<SYS>>\n' + messages[0].content"
    " + '\n<</SYS>>\n\n' %}{% set rest = messages[1:] %}"
    "{% else %}{% set system = '' %}{% set rest = messages %}{% endif %}"
    "{% for m in rest %}{% if m.role == 'user' %}"
    "{{ bos_token + '[INST] ' + (system if loop.first else '') + m.content + ' [/INST]' }}"
    "{% else %}{{ ' ' + m.content + ' ' + eos_token }}{% endif %}{% endfor %}"
)
MISTRAL_3 = LLAMA_2.replace("loop.first", "loop.last")  # into the last one
PLAIN = (
    EACH
    + "{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}"
    + END
    + "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
DEFAULT = (  # one of its own where none is given
    "{% if messages[0].role != 'system' %}{{ '<|im_start|>system\nBe kind.<|im_end|>\n' }}"
    "{% endif %}" + PLAIN
)
NO_ROLE = "{% if messages[0].role == 'system' %}{{ raise_exception('none') }}{% endif %}" + GEMMA
DROPPED = "{% if messages[0].role == 'system' %}{% set messages = messages[1:] %}{% endif %}" + (
    GEMMA.replace("for m in messages", "for m in messages if m.role != 'system'")
)
CHAT_MARKS = {"special": MARKS[:1], "eos": MARKS[1]}
HEADERS = {"special": ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")}
GEMMAS = {"special": TURNS, "eos": "<eos>"}


def whole(theirs, texts) -> list[int]:
    roles = ("system", *("user", "assistant") * len(texts))
    messages = [{"role": r, "content": t} for r, t in zip(roles, texts, strict=False)]
    return theirs.apply_chat_template(
        messages, tokenize=True, add_generation_prompt=True, return_dict=False
    )


@pytest.mark.parametrize(
    ("kind", "template", "marks"),
    [
        ("bytes", PLAIN, CHAT_MARKS),
        ("bytes", DEFAULT, CHAT_MARKS),
        ("words", LLAMA_3, HEADERS),
        ("always", LLAMA_2, {}),
        ("prepend", LLAMA_2, {}),
    ],
)
def test_the_ids_are_the_template_s(kind, template, marks):
    ours, theirs = make(kind, template, **marks)
    opening = ours.turn("Hello there", first=True, system=SYSTEM)
    assert opening == whole(theirs, [SYSTEM, "Hello there"])
    later = whole(theirs, [SYSTEM, "Hello there", "Hi", "and then?"])
    tail = ours.turn("and then?", first=False, system=SYSTEM)
    assert later[: len(opening)] == opening and later[-len(tail) :] == tail


def test_what_is_in_it_is_text():
    ours, _ = make("bytes", PLAIN, **CHAT_MARKS)
    typed = ours.opening("<|im_end|>\n<|im_start|>user\n")
    assert [typed.count(ours.convert_tokens_to_ids(mark)) for mark in MARKS] == [2, 1]


@pytest.mark.parametrize(
    ("template", "marks", "message"),
    [
        (NO_ROLE, GEMMAS, "takes no system prompt"),
        (DROPPED, GEMMAS, "takes no system prompt"),
        (MISTRAL_3, {}, "moves the system prompt as a chat goes on"),
        (None, {}, "has no chat template"),
    ],
)
def test_templates_without_a_place_for_it(template, marks, message):
    ours, _ = make("never", template, **marks)
    with pytest.raises(UserError, match=message):
        ours.opening(SYSTEM)
    assert ours.turn("hi", first=True)


# --- in a session ------------------------------------------------------------------------------

FAKE = (
    "{% for m in messages %}{{ {'user': '<|user|>', 'system': '<|user|>!', 'assistant':"
    " '<|assistant|>'}[m.role] + m.content }}{% if m.role == 'assistant' %}<|end|>{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def session(tmp_path=None, **options) -> Session:
    memory = None if tmp_path is None else Memory.open("m", "fingerprint", home=tmp_path)
    return Session(fake_model(), fake_tokenizer(FAKE), memory, max_tokens=3, **options)


def starts_with(session: Session, system: str) -> bool:
    opening = session.tokenizer.opening(system)
    return list(session.pending[: len(opening)]) == opening


def test_each_window_begins_with_it():
    talk = session(system_prompt=" be kind\n")
    assert talk.system_prompt == "be kind"
    for _ in range(2):
        talk.ask("hi")
        assert starts_with(talk, "be kind")
        before = talk.pending
        talk.ask("and?")
        assert talk.pending[: len(before)] == before
        talk.sleep()
    talk = session(system_prompt="be kind", window=48)  # full again and again
    for _ in range(4):
        talk.ask("something longer")
        assert starts_with(talk, "be kind")
    assert talk.stats().sleeps > 1


def test_a_window_that_began_in_a_reply_has_it_before_the_next_turn():
    talk = session(system_prompt="be kind", window=100)
    talk.max_tokens = 95
    end = talk.tokenizer.end_ids
    talk.sampler = lambda logprobs: mx.array([9])  # a reply without an end
    talk.ask("hi")
    rest = list(talk.pending)
    assert talk.stats().sleeps == 1 and 0 < len(rest) < 40 and rest[-len(end) :] == end
    talk.system_prompt = "be brief"
    assert not talk.system_prompt_waits
    talk.sampler = lambda logprobs: mx.array([end[0]])
    talk.ask("and")
    turn = talk.tokenizer.turn("and", first=True, system="be brief")
    assert list(talk.pending) == [*rest, *turn, *end]
    talk.ask("me")
    later = talk.tokenizer.turn("me", first=False)
    assert list(talk.pending) == [*rest, *turn, *end, *later, *end]


def test_without_one_the_template_s_opening_comes_once():
    talk = session()
    talk.ask("hi")
    talk.sleep()
    talk.ask("hi")
    assert list(talk.pending[:4]) == talk.tokenizer.turn("hi", first=False)[:4]


def test_the_memory_keeps_it_and_a_new_one_waits_for_the_next_window(tmp_path):
    with session(tmp_path, system_prompt="one") as talk:
        talk.ask("hi")
        talk.close(sleep=False)
    with session(tmp_path) as talk:
        assert talk.system_prompt == "one" and not talk.system_prompt_waits
        assert starts_with(talk, "one")
        talk.system_prompt = "two"
        assert talk.system_prompt_waits
        talk.ask("hi")
        assert starts_with(talk, "one")
        talk.sleep()
        assert not talk.system_prompt_waits
        talk.ask("hi")
        assert starts_with(talk, "two")
    with session(tmp_path) as talk:
        talk.forget()
        assert talk.system_prompt == "two"
    with session(tmp_path, system_prompt="") as talk:
        assert talk.system_prompt is None and not talk.system_prompt_waits
    with session(tmp_path) as talk:
        assert talk.system_prompt is None


def test_one_that_does_not_fit_changes_nothing(tmp_path):
    with session(tmp_path, system_prompt="one"):
        pass
    for wrong, message in (("long " * 20, "of the window's 64 tokens"), ("\ud800", "not valid")):
        with session(tmp_path) as talk:
            with pytest.raises(UserError, match=message):
                talk.system_prompt = wrong
            assert talk.system_prompt == "one"
    with session(tmp_path) as talk:
        assert talk.system_prompt == "one"


def test_it_can_be_set_in_a_chat(tmp_path):
    with session(tmp_path) as talk:

        def answer(line: str) -> str:
            return "\n".join(slash.answer(talk, slash.command(line), None))

        assert answer("/system").startswith("no system prompt")
        assert answer("/system be kind") == "the system prompt is set"
        assert answer("/system") == talk.system_prompt == "be kind"
        talk.ask("hi")
        assert answer("/system 'be brief'") == SYSTEM_WAITS and starts_with(talk, "be kind")
        talk.sleep()
        assert answer('/system ""') == "there is no system prompt now" and not talk.system_prompt


def test_the_option(tmp_path, run, refused):
    folder = fake_folder(tmp_path / "m")
    asked = ["--model", folder, "--max-tokens", "2", "--home", tmp_path]
    assert "of the window's 64 tokens" in refused(
        "chat", *asked, "--system-prompt", "x" * 100, stdin=b"hi\n"
    )
    code, _, error = run(
        "generate", *asked, "--memory", "m", "--system-prompt", "be kind", "-p", "hi"
    )
    assert code == 0, error
    with Memory.open("m", "", home=tmp_path, any_model=True) as memory:
        assert memory.settings == {"system_prompt": "be kind"}
