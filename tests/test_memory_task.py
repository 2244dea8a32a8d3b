"""The `memory` task: its words, phrasings, conversations and arrays."""

from __future__ import annotations

import hashlib
import json
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from random import Random

import numpy as np
import pytest

from mlx_sleep.lab.tasks import phrases, words
from mlx_sleep.lab.tasks.memory import CASES, Level, correct
from mlx_sleep.lab.tasks.phrases import KINDS
from mlx_sleep.utils.errors import UserError
from tests.memory_tasks import ASSISTANT, END, LEVELS, PAD, SP, task, turns

# --- splits and words ---


def told_words(split, count=400):
    """All names and values that conversations of `split` tell."""
    level = Level(windows=2, window_tokens=128, facts=(6, 8), correction=0.2)
    found = set()
    for index in range(count):
        for turn in turns(task(split).conversation(index, level)):
            found |= {value.lower() for *_, value in turn.facts}
    return found


def test_splits_share_no_value():
    train, valid, test = (told_words(s) for s in words.SPLITS)
    assert min(len(train), len(valid), len(test)) > 500
    assert not train & valid
    assert not train & test
    assert not valid & test


def test_most_training_values_are_open_vocabulary():
    listed = {word.lower() for each in words.LISTS.values() for word in each}
    values = [
        value.lower().removeprefix("the ")
        for index in range(300)
        for turn in turns(task().conversation(index, LEVELS[2]))
        for *_, value in turn.facts
    ]
    assert np.mean([value not in listed for value in values]) >= 0.6


def test_every_word_list_serves_every_split():
    for kind in words.LISTS:
        for split in words.SPLITS:
            assert words.words(kind, split), (kind, split)


@pytest.mark.parametrize("split", words.SPLITS)
def test_made_up_words_belong_to_their_split(split):
    rng = Random(5)
    made = [words.made_up(rng, split) for _ in range(500)]
    assert {words.split_of(word) for word in made} == {split}
    assert len(set(made)) > 400


# --- phrasings ---


def test_enough_kinds_and_phrasings():
    assert len({kind.name for kind in KINDS}) >= 25
    for kind in KINDS:
        assert len(set(kind.tells)) >= 6, kind.name
        assert len(set(kind.asks)) >= 4, kind.name
        assert all("{v}" in t or "{av}" in t for t in kind.tells + kind.changes), kind.name
        assert not any("v}" in t for t in kind.asks), kind.name
        assert re.search(r"\{a?v\}\.$", kind.reply), kind.name
        if kind.topics:  # every phrasing says which one is meant
            slots = ("{t}", "{s}", "{p}")
            assert all(any(s in t for s in slots) for t in kind.tells + kind.asks), kind.name
    assert len(set(phrases.TALK)) >= 60


def test_replies_of_different_kinds_differ():
    """Two facts about one subject never have the same reply up to the value."""
    seen = Counter()
    for kind in KINDS:
        for topic in kind.topics or ("",):
            head = kind.reply.replace("{av}", "{v}").split("{v}")[0]
            group = {"kin": "person", "petlink": "pet"}.get(kind.subject, kind.subject)
            seen[group, head.replace("{t}", topic), topic if "{t}" not in head else ""] += 1
    assert max(seen.values()) == 1


# --- determinism ---


def test_order_and_process_make_no_difference():
    level = LEVELS[2]
    forward = [task().conversation(i, level) for i in range(6)]
    one = task()
    backward = [one.conversation(i, level) for i in reversed(range(6))][::-1]
    assert forward == backward
    code = (
        "from tests.memory_tasks import LEVELS, task;print(task().conversation(3, LEVELS[2]).final)"
    )
    out = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).parent.parent,
    )
    assert json.loads(out.stdout) == forward[3].final


def test_seed_split_index_and_level_all_matter():
    base = task().conversation(3, LEVELS[2])
    others = [
        task(seed=1).conversation(3, LEVELS[2]),
        task("valid").conversation(3, LEVELS[2]),
        task().conversation(4, LEVELS[2]),
        task().conversation(3, LEVELS[3]),
    ]
    assert all(other != base for other in others)


def test_the_conversations_of_the_committed_figures_stay():
    """What the embedded model was trained and measured on: `asking` is in no seed."""
    told = hashlib.sha256()
    for index in range(10):
        for level in LEVELS[:5]:
            conversation = task("test").conversation(index, level)
            told.update(repr((conversation.chunks, conversation.final)).encode())
    asked = hashlib.sha256()
    for case in CASES:
        for example in task("test").evaluation(case, n=3):
            asked.update(repr((example.windows, example.context, example.prompt)).encode())
    assert told.hexdigest()[:16] == "58638e46c7c5dfc8"
    assert asked.hexdigest()[:16] == "055dcd2ff0e02ed3"


# --- days of questions ---


def test_days_of_questions_only():
    """After the first window nothing is told, and every reply is the true one."""
    level = Level(windows=8, window_tokens=128, facts=(2, 8), correction=0.2, asking=1.0)
    kinds: Counter[str] = Counter()
    again = []
    for index in range(40):
        first, *days, final = task().conversation(index, level).windows
        newest = {f[:3]: f[3] for turn in first for f in turn.facts}
        for turn in [turn for window in days for turn in window]:
            assert turn.kind != "tell" and not turn.facts
            kinds[turn.asks.case if turn.asks else turn.kind] += 1
            if turn.asks and turn.asks.told:
                assert turn.asks.value in newest.values() and turn.asks.value in turn.assistant
        if newest and not any(turn.kind == "tell" for turn in final):
            asked = Counter(t.asks.value for d in days for t in d if t.asks and t.asks.told)
            again.append(np.mean([asked[value] for value in newest.values()]))
    assert min(kinds[case] for case in ("known", "corrected", "never_told", "talk")) > 20
    assert len(again) > 20 and np.mean(again) > 3


def test_asking_is_a_chance_of_each_window_but_the_first():
    level = Level(windows=5, window_tokens=96, facts=(12, 12), small_talk=0.0, asking=0.5)
    only_asks = np.array(
        [
            [all(turn.asks for turn in window) for window in conversation.windows[:-1]]
            for conversation in (task().conversation(index, level) for index in range(60))
        ]
    )
    assert not only_asks[:, 0].any()
    assert ((only_asks.mean(axis=0) > 0.3) & (only_asks.mean(axis=0) < 0.7))[1:].all()


@pytest.mark.parametrize("days", [1, 4, 16])
def test_facts_asked_for_again_each_day(days):
    for example in task("test").evaluation(f"re_asked_{days}", n=15):
        first, *later = (SP.decode(window) for window in example.windows)
        assert len(later) == days - 1
        assert example.value in first
        assert all(3 < window.count(END) <= 7 for window in example.windows[1:])
        assert np.mean([example.value in window for window in [first, *later]]) > 0.6


# --- arrays ---


@pytest.mark.parametrize("level", LEVELS)
def test_batch_holds_the_conversations(level):
    indices = [7, 0, 12, 3] * 5
    batch = task().batch(indices, level)
    shape = (20, level.windows, level.window_tokens)
    assert batch["tokens"].shape == batch["mask"].shape == shape
    assert batch["tokens"].dtype == batch["final_tokens"].dtype == np.int32
    assert batch["final_loss"].dtype == np.float32
    for name in ("final_tokens", "final_mask", "final_loss", "final_value"):
        assert batch[name].shape == (20, level.final_tokens)
    for row, index in enumerate(indices):
        conversation = task().conversation(index, level)
        for chunk, tokens, mask in zip(
            conversation.chunks, batch["tokens"][row], batch["mask"][row], strict=True
        ):
            assert 0 < len(chunk) <= level.window_tokens
            assert tokens[mask].tolist() == chunk
            assert (tokens[~mask] == PAD).all()
        final = batch["final_tokens"][row]
        mask = batch["final_mask"][row]
        assert 0 < mask.sum() <= level.final_tokens
        assert final[mask].tolist() == conversation.final
        assert batch["final_loss"][row][~mask].sum() == 0


@pytest.mark.parametrize("level", LEVELS)
def test_tokens_are_the_turns(level):
    """Each window's tokens are its turns' tokens; a turn may be cut where a window ends."""
    for index in range(30):
        one = task()
        conversation = one.conversation(index, level)
        spoken = [t for turn in turns(conversation) for t in one.encoder.turn_tokens(turn)]
        chunks = [t for chunk in conversation.chunks for t in chunk]
        assert chunks + conversation.final == spoken


def test_some_windows_end_inside_a_turn():
    ends = [
        chunk[-1] == END
        for index in range(60)
        for chunk in task().conversation(index, LEVELS[3]).chunks[:-1]
    ]
    assert 0.8 < np.mean(ends) < 0.99


@pytest.mark.parametrize("level", LEVELS)
def test_loss_covers_replies_and_values_are_the_values(level):
    answers = 0
    for index in range(30):
        conversation = task().conversation(index, level)
        final, weights = conversation.final, conversation.weights
        speaking = False  # recomputed from the special tokens alone
        expected = []
        for token in final:
            expected.append(speaking)
            speaking = (speaking or token == ASSISTANT) and token != END
        assert [w > 0 for w in weights] == expected
        # Runs of value tokens decode to the values of the questions, in order.
        runs, run = [], []
        for token, flag, weight in zip(final, conversation.values, weights, strict=True):
            if flag:
                assert weight == 1
                run.append(token)
            elif run:
                runs.append(SP.decode(run))
                run = []
        told = [t.asks for t in conversation.windows[-1] if t.asks and t.asks.told]
        assert runs == [question.value for question in told]
        answers += len(told)
    assert answers > 10 or level.unknown == 1


def test_replies_are_short_and_end_with_the_value():
    lengths = []
    for index in range(150):
        for turn in turns(task().conversation(index, LEVELS[2])):
            if turn.asks:
                assert turn.assistant == turn.asks.reply
                assert correct(turn.assistant, turn.asks.value if turn.asks.told else None)
                lengths.append(len(SP.encode(turn.assistant)))
    assert np.mean(lengths) < 9.5


@pytest.mark.parametrize("bad", [{"window_tokens": 8}, {"final_tokens": 31}])
def test_a_window_without_room_is_refused(bad):
    with pytest.raises(UserError, match="32 tokens"):
        Level(**bad)


def test_unknown_split_and_case_are_refused():
    with pytest.raises(ValueError, match="split"):
        task("dev")
    with pytest.raises(ValueError, match="case"):
        next(task("test").evaluation("two_hops"))
