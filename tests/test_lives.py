"""Lives: their truth, their splits, their token arrays."""

from __future__ import annotations

import multiprocessing
import os
import re
import signal
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import pytest

from mlx_sleep.lab import natural
from mlx_sleep.lab.tasks import everyday, words
from mlx_sleep.lab.tasks.life import Exchange, Level
from mlx_sleep.lab.tasks.life_batches import Source, arrays, batch, read_chat, stream
from mlx_sleep.lab.tasks.life_examples import CASES, DAYS, examples
from mlx_sleep.lab.tasks.life_tokens import OPENING
from mlx_sleep.lab.tasks.templates import KEEP, VALUE
from mlx_sleep.utils.errors import UserError
from tests.lives import CHAT, LEVELS, LIBRARY, make, replay

ROOT = Path(__file__).parent.parent
TRAIN, WORDS = make()


@pytest.mark.parametrize("level", LEVELS, ids=lambda level: f"{level.windows} windows")
@pytest.mark.parametrize("split", words.SPLITS)
def test_every_answer_is_what_holds(split, level):
    lives, _ = make(split, seed=1)
    for index in range(144 // level.windows):
        assert replay(lives.life(index, level)) == []


def test_replay_finds_a_false_answer():
    """The judge of the test above is able to say no."""
    level = LEVELS[2]
    for index in range(20):
        life = TRAIN.life(index, level)
        told = next(
            (t for w in life.windows for t in w.turns if t.events and t.kind == "tell"), None
        )
        if told is None:
            continue
        life.windows[0].turns = [t for t in life.windows[0].turns if t is not told]
        if replay(life):
            return
    raise AssertionError("no life missed a fact that was taken out")


def test_same_life_in_any_order():
    first = [TRAIN.life(i, LEVELS[1]).text() for i in (5, 3)]
    again, _ = make()
    assert [again.life(i, LEVELS[1]).text() for i in (3, 5)] == first[::-1]


def test_same_lives_in_every_process():
    """Also where sets and dicts of strings come in another order."""
    code = (
        "import hashlib; from tests.lives import LEVELS, make; lives = make()[0]; "
        "text = ''.join(lives.life(i, LEVELS[i % 4]).text() for i in range(60)); "
        "print(hashlib.sha256(text.encode()).hexdigest())"
    )
    found = {
        subprocess.run(
            [sys.executable, "-c", code],
            cwd=ROOT,
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert len(found) == 1


def test_seed_and_level_change_the_life():
    lives = {make(seed=s)[0].life(0, level).text() for s in (0, 1) for level in LEVELS[:2]}
    assert len(lives) == 4


def test_splits_share_no_value_and_no_wording():
    values: dict[str, set[str]] = {}
    for split in words.SPLITS:
        lives, _ = make(split)
        values[split] = {
            event.value.casefold()
            for index in range(60)
            for window in lives.life(index, LEVELS[3]).windows
            for turn in window.turns
            for event in turn.events
            if event.value and event.key[2] and (event.key[1], event.key[2]) not in RELATIONS
        }
        assert len(values[split]) > 200
    for a, b in (("train", "valid"), ("train", "test"), ("valid", "test")):
        assert not values[a] & values[b]
    for scene in LIBRARY.scenes.values():
        lines = [w for w in (*scene.tells, *(q.wording for q in scene.questions))]
        splits: dict[str, set[str]] = {}
        for line in lines:
            splits.setdefault(line.text, set()).add(line.split)
        assert all(len(found) == 1 for found in splits.values()), scene.id


RELATIONS = {("person.name", "r"), ("pet.name", "r")}  # a sister is a sister in every split


def test_a_wording_is_told_in_its_split_only():
    for split in words.SPLITS:
        for usable in (u for kind in LIBRARY.of(split).values() for u in kind):
            assert {w.split for w in usable.tells} == {split}
            assert {q.wording.split for qs in usable.questions.values() for q in qs} == {split}


def test_most_scenes_can_be_asked_about_in_the_test_split():
    test = sum(len(kind) for kind in LIBRARY.of("test").values())
    assert test > len(LIBRARY.scenes) / 5


def test_no_mark_is_left_in_a_text():
    for index in range(30):
        text = TRAIN.life(index, LEVELS[2]).text()
        assert VALUE not in text and KEEP not in text and "{" not in text


def test_tokens_are_the_turns_in_the_template():
    """Cut or not, the windows together are the turns, each encoded on its own."""
    for index in range(20):
        life = TRAIN.life(index, LEVELS[1])
        text = "".join(WORDS.decode(w.pieces.ids) for w in life.windows)
        turns = [t for w in life.windows for t in w.turns]
        whole = "".join(
            f"<|im_start|>user\n{t.user}<|im_end|>\n<|im_start|>assistant\n{t.reply}<|im_end|>\n"
            for t in turns
        )
        if text.startswith("<|im_start|>system"):
            text = text[text.index("<|im_end|>\n") + len("<|im_end|>\n") :]
        assert text in (whole, whole[: len(text)])


def test_marked_tokens_are_the_value():
    seen = 0
    for index in range(40):
        for window in TRAIN.life(index, LEVELS[3]).windows:
            for turn in window.turns:
                asked = turn.asked
                if not asked or asked.wrong or asked.form not in ("ask", "recall"):
                    continue
                pieces = TRAIN.encoder.turn(turn)
                marked = [i for i, v in zip(pieces.ids, pieces.value, strict=True) if v]
                text = WORDS.decode(marked).strip()
                if asked.told and asked.value:
                    assert asked.value.casefold() in text.casefold()
                    seen += 1
                elif not asked.told:
                    assert text == "You have not told me"
    assert seen > 200


def test_weights():
    kinds: Counter = Counter()
    decided = 0
    for index in range(30):
        for window in TRAIN.life(index, LEVELS[3]).windows:
            for turn in window.turns:
                p = TRAIN.encoder.turn(turn)
                reply = [i for i, r in zip(p.ids, p.reply, strict=True) if r]
                assert WORDS.decode(reply) == turn.reply + "<|im_end|>"
                assert all(w == 0 for w, r in zip(p.weight, p.reply, strict=True) if not r)
                first, *said = (w for w, r in zip(p.weight, p.reply, strict=True) if r)
                decides = bool(turn.asked) and not p.value[p.reply.index(True)]
                assert first == turn.weight * (OPENING if decides else 1)
                assert set(said) == {turn.weight}
                decided += decides
                name = "wrong" if turn.asked and turn.asked.wrong else turn.kind
                kinds[name, turn.weight] += 1
    assert set(kinds) <= {
        ("tell", 0.1), ("fix", 0.1), ("forget", 0.1), ("ask", 1.0), ("wrong", 0.0),
        ("chat", 0.1), ("chat", 0.3),
    }  # fmt: skip
    assert all(n > 10 for n in kinds.values())
    assert 0 < decided < kinds["ask", 1.0] + kinds["wrong", 0.0]


def test_arrays():
    level = LEVELS[1]
    lives = [TRAIN.life(i, level) for i in range(6)]
    out = arrays(lives)
    b, w, t = out["tokens"].shape
    assert (b, w) == (6, level.windows) and t % 16 == 0 and t <= level.window_tokens + 32
    assert out["tokens"].dtype == np.int32 and out["weight"].dtype == np.float32
    for i, life in enumerate(lives):
        for j, window in enumerate(life.windows):
            n = len(window.pieces)
            assert n > 0
            assert out["tokens"][i, j, :n].tolist() == window.pieces.ids
            assert out["mask"][i, j].tolist() == [True] * n + [False] * (t - n)
            assert not out["weight"][i, j, 0]
    for name in ("weight", "value", "reply"):
        assert not out[name][~out["mask"]].any()
    assert not (out["weight"] > 0)[~out["reply"]].any()
    assert not out["value"][~out["reply"]].any()
    same = batch(TRAIN, range(6), level)
    assert all((same[name] == out[name]).all() for name in out)


def test_no_window_is_longer_than_the_level_says():
    long = [[("a question?", "word " * 90)]]
    for level in LEVELS:
        lives, _ = make(chat=[*CHAT, *long])
        for index in range(24 // level.windows + 1):
            for window in lives.life(index, level).windows:
                assert 0 < len(window.pieces) <= level.window_tokens


def test_little_of_a_batch_is_padding():
    out = batch(TRAIN, range(16), Level(windows=4, window_tokens=192))
    assert out["mask"].mean() > 0.75


def test_ordinary_windows_hold_chat_only():
    level = Level(windows=8, ordinary=0.5)
    windows = [w for i in range(20) for w in TRAIN.life(i, level).windows]
    ordinary = [w for w in windows if w.kl]
    assert 50 < len(ordinary) < len(windows) * 0.6
    assert TRAIN.life(0, Level(windows=2, ordinary=1.0)).windows[0].kl  # the first too
    users = {u for c in CHAT for u, _ in c}
    assert all(t.kind == "chat" and t.user in users for w in ordinary for t in w.turns)
    silent, _ = make(chat=())
    assert not any(w.kl for i in range(20) for w in silent.life(i, level).windows)


def test_replies_that_were_cut_off_stand_only_in_windows_held_to_the_base():
    cut = [[Exchange(f"long question {i}?", "A reply that", complete=False)] for i in range(40)]
    lives, _ = make(chat=[*CHAT, *cut])
    windows = [w for i in range(40) for w in lives.life(i, Level(windows=4, ordinary=0.3)).windows]
    long = {w.kl for w in windows for t in w.turns if t.user.startswith("long question")}
    assert long == {True}


def test_everyday_messages_are_many():
    made = list(islice(everyday.prompts(), 4000))
    assert len({text.casefold() for text in made}) == len(made) == 4000
    assert not any(re.search(r"\{\w+\}", text) for text in made)
    assert made[:50] == list(islice(everyday.prompts(), 50))


def test_no_everyday_message_is_tested_on():
    """Whatever fills the slots of a frame: each is turned into a pattern."""
    sections = everyday.sections(everyday.FILE)
    fillings = {
        name: "|".join(re.escape(plain_key(line)) for line in lines)
        for name, lines in sections.items()
        if not name.startswith("frames")
    }
    frames = [f for name, lines in sections.items() if name.startswith("frames") for f in lines]
    asked = [plain_key(text) for text in natural.ordinary()]
    for frame in frames:
        parts = re.split(r"\{(\w+)\}", re.sub(r"(?i)\b(what|who|where)'s\b", r"\1 is", frame))
        parts[::2] = [re.sub(r"\W+", r"\\W*", part) for part in parts[::2]]
        parts[1::2] = [f"({fillings[slot]})" for slot in parts[1::2]]
        pattern = re.compile("".join(parts), re.IGNORECASE)
        assert not [text for text in asked if pattern.fullmatch(text)], frame


def plain_key(text: str) -> str:
    text = re.sub(r"(?i)\b(what|who|where)'s\b", r"\1 is", text)  # writers differ
    return re.sub(r"\W+", " ", text).casefold().strip()


def test_what_is_asked():
    """All kinds of questions come in all ages."""
    level = Level(windows=16, window_tokens=160)
    asked = [
        t.asked for i in range(40) for w in TRAIN.life(i, level).windows for t in w.turns if t.asked
    ]
    share = Counter()
    for a in asked:
        share["untold"] += not a.told
        share["two hops"] += a.hops == 2
        for name in ("wrong", "pronoun", "corrected"):
            share[name] += getattr(a, name)
        share[a.form] += 1
        share["older than 8"] += a.age > 8
    share = {name: n / len(asked) for name, n in share.items()}
    assert 0.13 < share["untold"] < 0.24 and 0.06 < share["wrong"] < 0.13
    assert min(share[n] for n in ("two hops", "pronoun", "corrected", "yes", "no", "q")) > 0.01
    assert share["older than 8"] > 0.08 and share["ask"] > 0.5


def tokenizer_file(path: Path) -> Path:
    """A tokenizer.json of single bytes with ChatML's marks."""
    tokenizers = pytest.importorskip("tokenizers")
    vocab = {c: i for i, c in enumerate(sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    tokenizer.save(str(path / "tokenizer.json"))
    return path / "tokenizer.json"


def test_two_hops_on_demand():
    level = Level(windows=3, window_tokens=160, facts=(2, 6), asking=0.4)
    told = make("train")[0]
    shares = []
    for two_hop in (0.0, 1.0):
        lives = [told.life(i, replace(level, two_hop=two_hop)) for i in range(15)]
        assert not [fault for life in lives for fault in replay(life)]
        asked = [t.asked for life in lives for w in life.windows for t in w.turns if t.asked]
        shares.append(np.mean([a.hops == 2 for a in asked if a.told and a.age]))
    assert shares[0] < 0.25 and shares[1] > 0.5
    assert repr(replace(level, two_hop=1.0)) == repr(level)  # or all other lives would change


def test_old_kinds_have_the_right_pronouns():
    old = [scene for name, scene in LIBRARY.scenes.items() if name.startswith("old.")]
    tells = [w.text for scene in old for w in scene.tells if scene.about in ("person", "pet")]
    assert "I feed {s.o} {v}" in tells and "home for {s.o} is {v}" in tells
    assert not [t for t in tells if re.search(r"\b(of|for|feed) \{s\} (\{v\}|is )", t)]


def test_workers_make_the_same_batches_in_order(tmp_path):
    source = Source(str(tokenizer_file(tmp_path)), "train", chat=CHAT)
    level = Level(windows=2, window_tokens=512)
    jobs = [(range(i, i + 2), level) for i in (0, 2, 4, 6, 8)]
    alone, several = list(stream(source, jobs, 0)), list(stream(source, jobs, 2))
    assert len(alone) == len(several) == 5
    for a, b in zip(alone, several, strict=True):
        assert all((a[name] == b[name]).all() for name in a)


def test_a_model_whose_chats_are_not_in_chatml(tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    file = tmp_path / "tokenizer.json"
    tokenizers.Tokenizer(tokenizers.models.BPE({"a": 0}, [])).save(str(file))
    with pytest.raises(UserError, match=r"no token <\|im_start\|>.*mlx-sleep retrofit"):
        Source(str(file), "train").lives()


def test_a_worker_goes_on_after_ctrl_c(tmp_path):
    """Ctrl-C at a terminal reaches it too; a worker that died would never give its batch."""
    source = Source(str(tokenizer_file(tmp_path)), "train", chat=CHAT)
    level = Level(windows=2, window_tokens=128)
    made = stream(source, [(range(i, i + 1), level) for i in range(4)], 1)
    next(made)
    for worker in multiprocessing.active_children():
        os.kill(worker.pid, signal.SIGINT)
    assert len(list(made)) == 3


def test_value_marks_with_offsets_of_a_tokenizer(tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    file = tokenizer_file(tmp_path)
    lives = Source(str(file), "train").lives()
    decode = tokenizers.Tokenizer.from_file(str(file)).decode
    seen = 0
    for index in range(10):
        for window in lives.life(index, Level(windows=2, window_tokens=512)).windows:
            for turn in window.turns:
                if turn.asked and turn.asked.form == "ask" and turn.asked.value and turn.weight:
                    p = lives.encoder.turn(turn)
                    marked = decode([i for i, v in zip(p.ids, p.value, strict=True) if v])
                    assert turn.asked.value.casefold() in marked.casefold()
                    seen += 1
    assert seen > 8


def test_read_chat(tmp_path):
    path = tmp_path / "chat.jsonl"
    lines = [
        '{"user": "a?", "assistant": "b"}',
        '{"user": "c?", "assistant": "d", "complete": true}',
    ]
    path.write_text("\n".join([*lines, '{"user": "e?", "assistant": "f", "complete": false}']))
    assert read_chat(path) == [[("a?", "b", True)], [("c?", "d", True)], [("e?", "f", False)]]
    path.write_text(lines[0] + '\n{"user": "a"}\n')
    with pytest.raises(UserError, match=r"chat.jsonl, line 2: expected"):
        read_chat(path)
    with pytest.raises(UserError, match="cannot be read"):
        read_chat(tmp_path / "none.jsonl")


def test_level_says_what_is_wrong():
    with pytest.raises(UserError, match="at least 64 tokens"):
        Level(window_tokens=32)


# --- evaluation items ---


@pytest.mark.parametrize("case", CASES)
def test_examples(case):
    lives, words_ = make("test")
    found = list(examples(lives, case, 6))
    again = list(examples(make("test")[0], case, 3))
    assert [e.question for e in again] == [e.question for e in found[:3]]
    for e in found:
        assert words_.decode(e.prompt).endswith("<|im_end|>\n<|im_start|>assistant\n")
        assert e.question in words_.decode(e.prompt)
        assert all(len(w) <= 192 for w in e.windows)
        told = " ".join(words_.decode(w) for w in e.windows).casefold()
        if e.value is None:
            assert e.reply.startswith("You have not told me")
        elif e.value:
            assert e.value.casefold() in told and e.value.casefold() in e.reply.casefold()


@pytest.mark.parametrize("day", DAYS)
def test_re_asked_days(day):
    lives, words_ = make("test")
    for e in examples(lives, f"re_asked_{day}", 4):
        turns = [words_.decode(w).count("<|im_start|>user") for w in e.windows]
        assert len(e.windows) >= day and all(n >= 3 for n in turns[1 - day :][: day - 1])
        assert e.age >= day


def test_after_many_sleeps():
    lives, _ = make("test")
    assert all(5 <= len(e.windows) <= 6 for e in examples(lives, "after_5_sleeps", 4))
    assert all(len(e.windows) >= 16 for e in examples(lives, "after_16_sleeps", 4))


def test_unknown_case():
    with pytest.raises(ValueError, match="never_told"):
        next(examples(TRAIN, "unknown"))


def test_makes_batches_without_mlx():
    """A machine with PyTorch alone makes the same data."""
    code = (
        "import sys\n"
        "for name in ('mlx', 'mlx.core', 'mlx_lm', 'torch', 'tokenizers'):\n"
        "    sys.modules[name] = None\n"
        "from tests.lives import LEVELS, make\n"
        "from mlx_sleep.lab.tasks.life_batches import batch\n"
        "print(batch(make()[0], range(2), LEVELS[0])['tokens'].shape)"
    )
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert run.stdout.startswith("(2, 1, "), run.stderr
