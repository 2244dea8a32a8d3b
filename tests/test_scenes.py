"""The files that scenes and pools are read from: what they may hold and how faults are told."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_sleep.lab.tasks import scenes, templates
from mlx_sleep.lab.tasks.scenes import Faults, load, read
from mlx_sleep.lab.tasks.sentences import as_user
from mlx_sleep.lab.tasks.templates import Who, fill, parse, plain, sentence_case, spans
from mlx_sleep.utils.errors import UserError

SCENE = """
[me.lives_in]
about: me
weight: 2            # how often
slots: v=town, since=number
tell: I live in {v}
tell: home is {v} since {since}
fix v: we left, {v} is home now
ask v: where do I live?
ask since: since when have I lived there?
say v: You live in {v}.
say since: You have lived there since {since}.
what v: where you live
yes v: do I live in {v}? => Yes, you live in {v}.
no v: do I live in {v~}? => No, you live in {v}.
"""


def folder(path: Path, text: str = SCENE, pools: str = "") -> Path:
    (path / "scenes.txt").write_text(text)
    (path / "pools.txt").write_text(pools)
    return path


def fault(path: Path, text: str, pools: str = "") -> str:
    with pytest.raises(UserError) as error:
        load(folder(path, text, pools))
    return str(error.value)


def test_reads_a_scene(tmp_path):
    found, pools = load(folder(tmp_path))
    scene = found["me.lives_in"]
    assert (scene.about, scene.weight, scene.main) == ("me", 2.0, "v")
    assert scene.slots == {"v": "town", "since": "number"}
    assert [sorted(t.slots) for t in scene.tells] == [["v"], ["since", "v"]]
    assert [(q.kind, q.slot) for q in scene.questions] == [
        ("ask", "v"), ("ask", "since"), ("yes", "v"), ("no", "v"),
    ]  # fmt: skip
    assert set(scene.says) == {"v", "since"} and set(scene.fixes) == {"v"}
    assert "town" in pools and "nowhere" not in pools


LINES = SCENE.splitlines()


@pytest.mark.parametrize(
    "old, new, message",
    [
        ("tell: I live in {v}", "tell: I live in {w}", r"scenes.txt:6: unknown field {w}"),
        ("tell: I live in {v}", "tell: I live in {v", r"scenes.txt:6: a brace without"),
        ("tell: I live in {v}", "told: I live in {v}", r"scenes.txt:6: unknown key told"),
        ("tell: I live in {v}", "tell:", r"scenes.txt:6: nothing after tell:"),
        ("tell: I live in {v}", "I live in {v}", r"scenes.txt:6: not understood: I live"),
        ("about: me", "about: us", r"scenes.txt:3: about is one of me, person"),
        ("about: me", "weight: 3", r"scenes.txt:4: weight is here for the second time"),
        ("v=town", "v=twon", r"scenes.txt:2: \[me.lives_in\] slot v: unknown pool twon"),
        ("v=town", "v town", r"scenes.txt:5: slots are written name=pool, not v town"),
        ("weight: 2 ", "weight: -1", r"scenes.txt:4: weight is a number above 0"),
        ("ask v: where do I live?", "ask v: is it {v}?", r"scenes.txt:9: the question gives its"),
        ("ask v: where do I live?", "ask x: where?", r"scenes.txt:9: the scene has no slot x"),
        ("ask v: where do I live?", "ask: where?", r"scenes.txt:9: ask needs the name of a slot"),
        ("say v: You live in {v}.", "say v: There.", r"scenes.txt:11: the answer does not hold"),
        ("say v: You live in {v}.", "", r"scenes.txt:2: \[me.lives_in\] has no `say v`"),
        ("what v: where you live", "what v: in {v}", r"scenes.txt:13: .* it names no slot"),
        ("{v~}? =>", "{v}? =>", r"scenes.txt:15: a `no` question asks for another value"),
        ("yes v: do I live in {v}? =>", "yes v: do I? =>", r"scenes.txt:14: a `yes` question"),
        ("? => Yes, you live in {v}.", "?", r"scenes.txt:14: yes is written QUESTION => ANSWER"),
        ("fix v: we left, {v} is", "fix v: we left, it is", r"scenes.txt:8: a fix of v says"),
        ("[me.lives_in]", "", r"scenes.txt:3: a scene begins with its name"),
        ("I live in {v}\n", "I live in {v} \N{EN DASH} now\n", r"scenes.txt:6: only printable"),
    ],
)
def test_tells_faults_by_file_and_line(tmp_path, old, new, message):
    assert old in SCENE
    assert re.match(message, fault(tmp_path, SCENE.replace(old, new, 1)))


@pytest.mark.parametrize(
    "about, line, message",
    [
        ("person", "tell: {he} lives in {v}", r"scenes.txt:4: whom .* {s} is missing"),
        ("pet", "q: is {he} old? => No, {he} is not.", r"scenes.txt:4: whom .* {s} is missing"),
        ("word", "ask v: what is that?", r"scenes.txt:4: whom .* {w} is missing"),
    ],
)
def test_a_wording_says_whom_it_is_about(tmp_path, about, line, message):
    text = f"[x]\nabout: {about}\nslots: v=town\n{line}\n"
    assert re.match(message, fault(tmp_path, text))


def test_two_scenes_of_one_name(tmp_path):
    assert "there is a scene me.lives_in already" in fault(tmp_path, SCENE + SCENE)


@pytest.mark.parametrize(
    "pools, message",
    [
        ("apple | pear", r"pools.txt:1: a pool begins with its name"),
        ("[fruit]\n", r"pools.txt:1: pool fruit is empty"),
        ("[town]\nOslo", r"pools.txt:1: there is a pool town already"),
        ("[price]\ncompose: {number} {coin}", r"pools.txt:1: .* unknown pool coin"),
        ("[fruit]\ntell: an apple", r"pools.txt:1: pool fruit has a strange value"),
        ("[spot]\n", r"pools.txt:1: there is a pool spot already"),
        ("[nook]\non the bed | on my bed", r"pools.txt:1: pool nook has a value with my or our"),
    ],
)
def test_faults_of_pools(tmp_path, pools, message):
    assert re.match(message, fault(tmp_path, SCENE, pools))


def test_counts_the_other_faults(tmp_path):
    text = SCENE.replace("tell:", "told:")
    assert "(and 4 more: python -m mlx_sleep.lab.tasks.scenes)" in fault(tmp_path, text)


def test_own_files_have_no_fault():
    found, _ = load()
    assert all(scene.tells and scene.questions for scene in found.values())


_LINE = st.one_of(
    st.text(max_size=40),
    st.sampled_from([*LINES, "[pools]", "a | b", "compose: {a}"]),
    st.builds(
        "{}{}: {}".format,
        st.sampled_from(["tell", "ask v", "say v", "q", "yes v", "slots", "about", "weight"]),
        st.sampled_from(["", " ", " v"]),
        st.text(alphabet="abv{}~'.=> |[]?", max_size=20),
    ),
)


@settings(max_examples=300, deadline=None)
@given(lines=st.lists(_LINE, max_size=12), pools=st.lists(_LINE, max_size=6))
def test_any_text_is_read_or_refused_by_line(tmp_path_factory, lines, pools):
    path = tmp_path_factory.mktemp("language")
    (path / "scenes.txt").write_text("\n".join(lines), encoding="utf-8")
    (path / "pools.txt").write_text("\n".join(pools), encoding="utf-8")
    faults = Faults()
    found, _ = read(path, faults)
    assert all(re.match(r"(scenes|pools)\.txt:\d+: \S", fault) for fault in faults.found)
    said = [x for x in lines if x.strip() and not x.lstrip().startswith("#")]
    assert found or faults.found or not said


def test_not_text(tmp_path):
    (tmp_path / "scenes.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="cannot be read as text"):
        load(tmp_path)


def test_empty_folder(tmp_path):
    with pytest.raises(UserError, match="no .txt files here"):
        load(tmp_path)


# --- templates ---

SISTER = Who.called("my sister", "she")


@pytest.mark.parametrize(
    "text, expected",
    [
        ("{s} lives in {v}", "my sister lives in Oslo"),
        ("{S's} home is {v}", "My sister's home is Oslo"),
        ("I saw {s.o}, {he} lost {his} key {himself}", "I saw my sister, she lost her key herself"),
        ("{he's} in {v's} best street", "she's in Oslo's best street"),
        ("{a x} and {A x}, {X}", "an hour and An hour, Hour"),
        ("not {v~}", "not Rome"),
    ],
)
def test_fields(text, expected):
    parts = parse(text, {"s", "v", "x", *templates.PRONOUNS})
    filled = fill(parts, {"v": "Oslo", "x": "hour"}, SISTER, {"v": "Rome"})
    assert plain(filled) == expected


@pytest.mark.parametrize(
    "word, article",
    [("apple", "an"), ("uniform", "a"), ("umbrella", "an"), ("hour", "an"), ("hotel", "a"),
     ("8 euro note", "an"), ("18-hour day", "an"), ("European", "a"), ("ukulele", "a")],
)  # fmt: skip
def test_articles(word, article):
    assert templates.article(word) == article


def test_value_spans():
    parts = parse("you pay {v} in {x}", {"v", "x"})
    text, found = spans(fill(parts, {"v": "9 euros", "x": "May"}, mark="v"))
    assert text == "you pay 9 euros in May" and [text[a:b] for a, b in found] == ["9 euros"]


def test_sentences_begin_in_upper_case_but_values_do_not():
    parts = parse("so. {v} it is! right", {"v"})
    assert plain(sentence_case(fill(parts, {"v": "mint"}))) == "So. mint it is! Right"


def test_wordings_go_to_splits_by_hash():
    shares = [scenes.split_of(f"wording {i}") for i in range(4000)]
    assert 0.08 < shares.count("test") / 4000 < 0.12
    assert 0.035 < shares.count("valid") / 4000 < 0.065


@pytest.mark.parametrize(
    "said, asked",
    [
        ("where you live", "where I live"),
        ("what you are allergic to", "what I am allergic to"),
        ("who gave you your nickname", "who gave me my nickname"),
        ("when your train goes and what is yours", "when my train goes and what is mine"),
        ("where {s} picks you up", "where {s} picks me up"),
        ("what you call me", "what I call you"),
        ("which of them {s} owes you", "which of them {s} owes me"),
        ("where you were", "where I was"),
    ],
)  # fmt: skip
def test_a_clause_turned_round(said, asked):
    assert as_user(parse(said, {"s"})) == parse(asked, {"s"})
