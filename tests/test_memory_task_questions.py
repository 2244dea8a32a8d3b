"""The `memory` task's questions: their answers, read from the text alone, and its evaluation."""

from __future__ import annotations

import re
from collections import Counter

import pytest

from mlx_sleep.lab.tasks import phrases
from mlx_sleep.lab.tasks.memory import CASES, Level, correct
from mlx_sleep.lab.tasks.phrases import KINDS, NEVER_TOLD
from tests.memory_tasks import ASSISTANT, LEVELS, SP, USER, task, turns

# --- truth, checked by the text alone ---


def spelled(text):
    """Text without what the noise changes: case, apostrophes of contractions, spelling."""
    text = text.lower().replace("favorite", "favourite").replace("color", "colour")
    return re.sub(r"[^\w ]", "", text.replace("neighbor", "neighbour"))


def patterns():
    """(attribute, regex) of the ways to tell a city or a relation's name, from the phrasings."""
    out = []
    for kind in sorted(KINDS, key=lambda k: k.attr):  # cities first: "Mira is living in Oslo"
        if kind.name not in ("person.city", "kin.name"):
            continue
        subject = "my best friend|my [a-z]+" + ("|[a-z]+" if kind.subject == "person" else "")
        slots = {
            "{v}": "(?P<v>[a-z]+)",
            "{s}": f"(?P<s>{subject})",
            "{p}": f"(?P<s>{subject})s",
            "{t}": "(?P<t>best friend|[a-z]+)",
        }
        for template in kind.tells + kind.changes:
            pieces = re.split(r"(\{\w+\})", template)
            regex = "".join(slots.get(p, re.escape(spelled(p))) for p in pieces)
            out.append((kind.attr, re.compile(regex)))
    return out


PATTERNS = patterns()


def read(sentence):
    """(attribute, subject, value) of a sentence that states a city or a name, else None."""
    for attr, regex in PATTERNS:
        match = regex.fullmatch(spelled(sentence))
        if match:
            found = match.groupdict()
            subject = found.get("s") or "my " + found["t"]
            return attr, phrases.SAME.get(subject, subject), found["v"]
    return None


def read_turn(turn):
    """What `read` finds in each sentence of a message, less its opener."""
    text = turn.user.rstrip(".!")
    openers = phrases.TELL_OPENERS + phrases.FIX_OPENERS
    fitting = [o for o in openers if o and text.lower().startswith(o)]
    text = text[len(max(fitting, key=len, default="")) :]
    return [read(part) for part in re.split(r"\. |,? and |, ", text)]


def test_two_hop_corrected_and_unknown_labels_by_reading_the_text():
    """A reader that knows only sentences finds the same answers about who lives where.

    It follows a conversation until it meets a message about cities or names that it can't read.
    """
    level = Level(
        windows=2,
        window_tokens=128,
        final_tokens=192,
        facts=(6, 7),
        two_hop=1.0,
        correction=0.15,
        unknown=0.4,
        noise=0.0,
    )
    checked = Counter()
    for index in range(1500):
        city, name = {}, {}
        for turn in turns(task(seed=3).conversation(index, level)):
            if turn.kind == "tell":
                if not any(f[1] in ("city", "name") and f[0] != "user" for f in turn.facts):
                    continue
                facts = read_turn(turn)
                if None in facts or len(facts) != len(turn.facts):
                    break
                for attr, subject, value in facts:
                    (city if attr == "city" else name)[subject] = value
            elif turn.asks:
                match = re.search(
                    r"where does (my best friend|my [a-z]+|[a-z]+) live$", spelled(turn.user)
                )
                if not match:
                    continue
                subject = phrases.SAME.get(match.group(1), match.group(1))
                owners = {v: k for k, v in name.items()}
                direct = city.get(subject)
                answer = direct or city.get(name.get(subject)) or city.get(owners.get(subject))
                question = turn.asks
                assert question.told == (answer is not None), (turn, city, name)
                if answer:
                    assert spelled(question.value) == answer
                    assert question.hops == (1 if direct else 2)
                checked[question.case] += 1
    assert min(checked[case] for case in ("known", "two_hop", "never_told")) >= 15, checked


def test_corrections_change_the_value_and_the_newest_is_asked():
    level = Level(windows=2, window_tokens=128, final_tokens=160, facts=(3, 6), correction=0.6)
    corrected = 0
    for index in range(200):
        newest, count = {}, Counter()
        for turn in turns(task(seed=5).conversation(index, level)):
            for subject, attr, topic, value in turn.facts:
                key = subject, attr, topic
                assert newest.get(key, "").lower() != value.lower()
                assert spelled(value) in spelled(turn.user)
                newest[key] = value
                count[key] += 1
            if turn.asks and turn.asks.told:
                assert turn.asks.value in newest.values()
            if turn.asks and turn.asks.case == "corrected":
                assert count[next(k for k, v in newest.items() if v == turn.asks.value)] >= 2
                corrected += 1
    assert corrected > 50


def test_never_told_questions_sound_like_the_others():
    asked, unknown = Counter(), Counter()
    for index in range(400):
        for turn in turns(task().conversation(index, LEVELS[2])):
            if turn.asks:
                opening = " ".join(turn.user.lower().split()[:2])
                (asked if turn.asks.told else unknown)[opening] += 1
    common = [w for w, n in unknown.most_common(8)]
    assert all(asked[w] > 0 for w in common)


# --- evaluation ---

WINDOWS = {"same_window": 0, "after_5_sleeps": 5, "corrected": 2}
WINDOWS |= {f"re_asked_{days}": days for days in (1, 4, 8, 16)}


@pytest.mark.parametrize("case", CASES)
def test_evaluation(case):
    one = task("test", seed=9)
    examples = list(one.evaluation(case, n=40))
    assert examples == list(task("test", seed=9).evaluation(case, n=40))
    assert examples[:5] == list(one.evaluation(case, n=5))
    assert len({e.question.text + e.reply for e in examples}) > 25
    for example in examples:
        assert example.prompt[0] == USER and example.prompt[-1] == ASSISTANT
        assert SP.decode(example.prompt[1:-1]) == example.question.text
        assert len(example.windows) == WINDOWS.get(case, 1)
        assert all(0 < len(w) <= 128 for w in example.windows)
        assert correct(example.reply, example.value)
        told = " ".join(SP.decode(w) for w in example.windows) + SP.decode(example.context)
        if case == "same_window":
            assert 0 < len(example.context) + len(example.prompt) <= 128
        else:
            assert example.context == []
        if case == "never_told":
            assert example.reply == NEVER_TOLD and example.value is None
        elif len(example.windows) < 2:
            assert example.value in told
        assert example.question.case == {
            "never_told": "never_told",
            "corrected": "corrected",
            "two_hop": "two_hop",
        }.get(case, "known")


def test_five_sleeps_tell_twenty_facts():
    for index in range(10):
        told = set()
        level = CASES["after_5_sleeps"]
        assert level.facts == (20, 20)
        long = Level(**{**level.__dict__, "window_tokens": 128})
        for turn in turns(task("test").conversation(index, long)):
            told |= {f[:3] for f in turn.facts}
        assert 15 <= len(told) <= 20


@pytest.mark.parametrize(
    ("reply", "value", "right"),
    [
        ("You live in Bergen.", "Bergen", True),
        (" you live in bergen", "Bergen", True),
        ("You live in Bergendal.", "Bergen", False),
        ("You live in Oldbergen.", "Bergen", False),
        ("You live in Oslo or Bergen.", "Bergen", False),
        ("You live in Bergen. You work in Bergen.", "Bergen", False),
        ("You have not told me that.", "Bergen", False),
        ("You have not told me that.", "that", False),
        ("You have not told me that.", None, True),
        ("You have not told me.", None, False),
        ("You live in Bergen.", None, False),
        ("", "Bergen", False),
        ("Your door code is 4731.", "473", False),
        ("Your keys are in the drawer.", "in the drawer", True),
        ("Your password is a+b.", "a+b", True),
    ],
)
def test_correct(reply, value, right):
    assert correct(reply, value) is right
