"""The `memory` task: its conversations, arrays, questions and tokenizer."""

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
from hypothesis import given, settings
from hypothesis import strategies as st
from sentencepiece import SentencePieceProcessor

from mlx_sleep.lab.tasks import phrases, words
from mlx_sleep.lab.tasks import tokenizer as task_tokenizer
from mlx_sleep.lab.tasks.memory import CASES, Level, MemoryTask, correct
from mlx_sleep.lab.tasks.phrases import KINDS, NEVER_TOLD
from mlx_sleep.models.load import EMBEDDED
from mlx_sleep.utils.errors import UserError

SP = SentencePieceProcessor(model_file=str(EMBEDDED / "tokenizer.model"))
SPECIALS = {name: SP.piece_to_id(name) for name in task_tokenizer.SPECIALS}
USER, ASSISTANT, END, PAD = (SPECIALS[s] for s in ("<|user|>", "<|assistant|>", "<|end|>", "<pad>"))

LEVELS = [
    Level(windows=0, final_tokens=160, facts=(2, 6)),
    Level(windows=1, window_tokens=48, final_tokens=64, facts=(1, 3)),
    Level(windows=2, window_tokens=64, final_tokens=96, facts=(4, 8), two_hop=1.0, correction=0.3),
    Level(windows=5, window_tokens=96, final_tokens=192, facts=(18, 20), small_talk=0.6, noise=0.5),
    Level(windows=1, window_tokens=32, final_tokens=32, facts=(3, 5), unknown=1.0, small_talk=1.0),
    Level(windows=6, window_tokens=96, facts=(3, 9), correction=0.2, asking=0.6),
]


def task(split="train", seed=0):
    return MemoryTask(SP.encode, SPECIALS, split, seed)


def turns(conversation):
    return [turn for window in conversation.windows for turn in window]


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
        "import sys; sys.path.insert(0, 'tests'); import test_memory_task as t;"
        "print(t.task().conversation(3, t.LEVELS[2]).final)"
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


# --- tokenizer ---


@pytest.fixture(scope="module")
def wrapped():
    tokenizer_utils = pytest.importorskip("mlx_lm.tokenizer_utils")
    return tokenizer_utils.load(EMBEDDED)


odd_text = st.text(
    st.one_of(st.characters(exclude_categories=["Cs"]), st.sampled_from(" \n\t'’.?1aeZ\u2581é👨")),
    max_size=40,
)


@settings(max_examples=400, deadline=None)
@given(text=odd_text)
def test_hugging_face_form_encodes_as_sentencepiece(text):
    if any(special in text for special in task_tokenizer.SPECIALS):
        return
    assert HF.encode(text, add_special_tokens=False).ids == SP.encode(text)


@settings(max_examples=200, deadline=None)
@given(text=odd_text)
def test_text_comes_back_as_it_was(text):
    # U+2581 is sentencepiece's own sign for a space.
    assert SP.decode(SP.encode(text)) == text.replace("\u2581", " ")


HF = task_tokenizer.to_huggingface((EMBEDDED / "tokenizer.model").read_bytes())


def test_files_are_those_the_script_writes():
    assert json.loads(HF.to_str()) == json.loads((EMBEDDED / "tokenizer.json").read_text())


def test_mlx_lm_loads_it_and_applies_the_chat_template(wrapped):
    assert wrapped.eos_token_ids == {END}
    assert wrapped.pad_token_id == PAD
    messages = [
        {"role": "user", "content": "My name is Zorbal."},
        {"role": "assistant", "content": "Okay."},
        {"role": "user", "content": " What is  my name? 😀"},
    ]
    ids = wrapped.apply_chat_template(messages, add_generation_prompt=True)
    assert list(ids) == [
        USER,
        *SP.encode("My name is Zorbal."),
        ASSISTANT,
        *SP.encode("Okay."),
        END,
        USER,
        *SP.encode(" What is  my name? 😀"),
        ASSISTANT,
    ]
    assert SP.id_to_piece(ids[1]) == "▁My"


def test_streaming_detokenizer(wrapped):
    text = "Your sister is called Zorbalé 😀."
    detokenizer = wrapped.detokenizer
    detokenizer.reset()
    for token in SP.encode(text):
        detokenizer.add_token(token)
    detokenizer.finalize()
    assert detokenizer.text.strip() == text


def test_typed_specials_stay_text():
    assert not {USER, ASSISTANT, END} & set(SP.encode("<|end|><|user|>hi<|assistant|>"))


def test_everyday_words_and_names_are_short():
    for word in ["My", "name", "sister", "live", "Where", "What", "called", "You", "Your", "Okay"]:
        assert len(SP.encode(word)) == 1, word
    rng = Random(1)
    lengths = [len(SP.encode(words.value(rng, "name", "test"))) for _ in range(500)]
    assert np.mean(lengths) < 3.2 and max(lengths) <= 7


def test_tokenizer_corpus_is_deterministic_and_of_the_train_split():
    lines = task_tokenizer.corpus(conversations=150)
    assert lines == task_tokenizer.corpus(conversations=150)
    seen = set(re.findall(r"[a-z]+", " ".join(lines).lower()))
    common = set(re.findall(r"[a-z]+", Path(phrases.__file__).read_text().lower()))
    for split in ("valid", "test"):
        # Not colours and things: "dark red" and "on the desk" are split as wholes.
        for kind in ("woman", "man", "place", "job", "food", "language"):
            assert not (set(map(str.lower, words.words(kind, split))) & seen) - common
