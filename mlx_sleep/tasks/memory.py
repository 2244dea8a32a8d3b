"""The task `memory`: made conversations in plain English, told facts, and questions about them.

A user tells facts over some consolidation windows and asks about them in a final window. Everything
is a pure function of (seed, split, index, level), the same in every process. The text lives in
phrases.py and words.py; this module decides who says what when, and keeps the truth. It knows a
tokenizer only as a function from text to ids, and no model.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from random import Random
from typing import NamedTuple

import numpy as np

from . import phrases, words
from .phrases import KINDS, NEVER_TOLD, Kind

USER, ASSISTANT, END, PAD = "<|user|>", "<|assistant|>", "<|end|>", "<pad>"

ANSWER_WEIGHT = 1.0
TALK_WEIGHT = 0.2  # acknowledgements and small talk: their choice is partly chance
MID_TURN = 0.1  # share of window boundaries that fall inside a turn, as in a live session
ASKING = 0.15  # share of conversations with questions in their consolidation windows
LATE = 0.2  # share of conversations whose last fact or correction is told in the final window


@dataclass(frozen=True)
class Level:
    """Difficulty of a conversation.

    windows: consolidation windows before the final one (0: everything in one window).
    window_tokens, final_tokens: most tokens of a consolidation window and of the final window.
    facts: least and most facts told. two_hop: chance that a conversation holds chains of two facts.
    correction: chance, for each fact, of being corrected later. unknown: share of questions about
    things never told. small_talk: chance of small talk before each message. noise: share of user
    turns with careless case, punctuation or spelling.
    """

    windows: int = 1
    window_tokens: int = 64
    final_tokens: int = 96
    facts: tuple[int, int] = (2, 4)
    two_hop: float = 0.3
    correction: float = 0.1
    unknown: float = 0.15
    small_talk: float = 0.2
    noise: float = 0.2

    def __post_init__(self):
        object.__setattr__(self, "facts", tuple(self.facts))  # a list, when it comes from JSON
        if min(self.window_tokens, self.final_tokens) < 32:
            raise ValueError("a window of the memory task needs room for 32 tokens")


# What is asked of a trained model: case -> how its conversations are made.
CASES: dict[str, Level] = {
    "same_window": Level(windows=1, facts=(1, 8), correction=0.0),
    "after_1_sleep": Level(windows=1, facts=(1, 8), correction=0.0),
    "after_5_sleeps": Level(windows=5, facts=(20, 20), correction=0.0),
    "corrected": Level(windows=2, facts=(2, 8), correction=0.4),
    "never_told": Level(windows=1, facts=(1, 8)),
    "two_hop": Level(windows=1, facts=(6, 8), two_hop=1.0, correction=0.0),
}


@dataclass(frozen=True)
class Question:
    """case: known, corrected, two_hop or never_told. value: "" when never told. hops: how many
    facts the answer takes."""

    case: str
    text: str
    reply: str
    value: str
    hops: int
    told: bool


@dataclass(frozen=True)
class Turn:
    """What the user says and the assistant replies. kind: tell, talk or ask.

    facts: (subject, attribute, topic, value) of what is told, newest last.
    """

    user: str
    assistant: str
    kind: str
    asks: Question | None = None
    facts: tuple[tuple[str, str, str, str], ...] = ()


@dataclass(frozen=True)
class Conversation:
    """windows: turns of each window, the final one last (a turn cut by a boundary stands where it
    begins). chunks: token ids of the consolidation windows. final: token ids of the final window;
    weights: loss weight for predicting each of them; values: True on value tokens of answers."""

    windows: list[list[Turn]]
    chunks: list[list[int]]
    final: list[int]
    weights: list[float]
    values: list[bool]


@dataclass(frozen=True)
class Example:
    """One evaluation item: windows to consolidate, then context (same window, no sleep; may be
    empty), then the prompt, which ends with <|assistant|>. All are token ids."""

    case: str
    windows: list[list[int]]
    context: list[int]
    prompt: list[int]
    question: Question

    @property
    def reply(self) -> str:
        return self.question.reply

    @property
    def value(self) -> str | None:
        return self.question.value if self.question.told else None


def correct(reply: str, value: str | None) -> bool:
    """Whether `reply` claims exactly `value`, or says that it was never told when value is None.

    Case, outer space and a final full stop are ignored. A canonical reply is one sentence that ends
    with its value; a second sentence, an "or", or words after the value claim more and are wrong.
    """
    text = " ".join(reply.split()).rstrip(" .!").casefold()
    never = NEVER_TOLD.rstrip(".").casefold()
    if value is None:
        return text == never
    if never in text or re.search(r"[.!?;,]|\b(and|or)\b", text):
        return False
    return re.search(rf"(?<!\w){re.escape(value.casefold())}$", text) is not None


# --- facts ---------------------------------------------------------------------------------------


class _Fact(NamedTuple):
    subject: str  # "user", "my sister", "Mirek", "florp"
    kind: Kind
    topic: str  # "colour" of a favourite colour; the relation of a link; else ""
    value: str

    @property
    def key(self) -> tuple[str, str, str]:
        return _key(self.subject, self.kind, self.topic)


def _canonical(subject: str) -> str:
    """One name for each subject: case and "mum" for "mother" make no difference."""
    subject = subject.lower()
    return phrases.SAME.get(subject, subject)


def _key(subject: str, kind: Kind, topic: str) -> tuple[str, str, str]:
    """What a fact is about. A link's topic ("sister") is in its subject already."""
    return _canonical(subject), kind.attr, "" if kind.link else topic


class _World:
    """Everything told so far; the newest value of a fact holds."""

    def __init__(self):
        self.facts: dict[tuple[str, str, str], _Fact] = {}
        self.corrected: set[tuple[str, str, str]] = set()
        self.owners: dict[str, str] = {}  # name -> the subject that it names

    def tell(self, fact: _Fact) -> None:
        old = self.facts.get(fact.key)
        if old:
            self.corrected.add(fact.key)
            self.owners.pop(_canonical(old.value), None)
        self.facts[fact.key] = fact
        if fact.kind.link and fact.kind.attr == "name":
            self.owners[_canonical(fact.value)] = fact.subject

    def resolve(self, subject: str, kind: Kind, topic: str) -> tuple[_Fact, int] | None:
        """The fact that answers, and how many facts that takes. Two: "my sister" by her name, a
        name by whose it is, or a made-up word by the word that it is a kind of."""
        subject, attr, topic = _key(subject, kind, topic)
        if (subject, attr, topic) in self.facts:
            return self.facts[subject, attr, topic], 1
        links = [self.facts.get((subject, a, "")) for a in ("name", "kind")]
        others = [link.value for link in links if link and link.kind.link]
        if subject in self.owners:
            others.append(self.owners[subject])
        for other in others:
            fact = self.facts.get((_canonical(other), attr, topic))
            if fact:
                return fact, 2
        return None


def _article(word: str) -> str:
    return f"{'an' if word[:1].lower() in 'aeiou' else 'a'} {word}"


_PLURALS = set("keys glasses gloves headphones scissors savings letters binoculars".split())


def _fill(template: str, subject: str, topic: str, value: str = "") -> str:
    """The sentence in sentence-inner case."""
    return template.format(
        v=value,
        av=_article(value),
        t=topic,
        s=subject,
        p=subject + "'s",
        at=_article(subject),
        be="are" if topic in _PLURALS else "is",
    )


def _upper(text: str) -> str:
    return text[:1].upper() + text[1:]


def _capital(text: str, template: str, kind: Kind) -> str:
    """Upper-cases a sentence's first letter, but never that of a value or of a made-up word."""
    made_up = template.startswith("{s}") and kind.subject in ("word", "verb", "adjective")
    if template.startswith("{v}") or made_up:
        return text
    return _upper(text)


def _reply(kind: Kind, subject: str, topic: str, value: str) -> tuple[str, str]:
    """The canonical reply as (all before the value, the value): the value stands last."""
    spoken = "Your " + subject[3:] if subject.startswith("my ") else subject
    head = kind.reply.split("{v}")[0] if "{v}" in kind.reply else kind.reply.split("{av}")[0]
    head = head.format(
        Y=spoken,
        s=subject,
        t=topic,
        At=_article(subject).capitalize(),
        be="are" if topic in _PLURALS else "is",
    )
    if "{av}" in kind.reply:
        head += _article(value)[: -len(value)]
    return head.rstrip(), value


# --- conversations -------------------------------------------------------------------------------

_BY_SUBJECT: dict[str, list[Kind]] = {}
for _k in KINDS:
    _BY_SUBJECT.setdefault(_k.subject, []).append(_k)
_WEIGHTS = [k.weight for k in KINDS]
_LINKS = {k.subject: k for k in KINDS if k.link}
_PERSON_LIKE = {"person": "kin", "pet": "petlink"}  # a named subject and the link that names it
_CHAINS, _CHAIN_WEIGHTS = (("kin", "person"), ("petlink", "pet"), ("word", "word")), (7, 2, 1)


@dataclass(eq=False)
class _Draft:
    """Turns that stay together, with the facts that each tells."""

    turns: list[Turn]
    facts: list[tuple[_Fact, ...]]
    needs: tuple[str, str, str] | None = None  # a correction needs its fact told before
    tokens: list[list[int]] = field(default_factory=list)

    @property
    def size(self) -> int:
        return sum(map(len, self.tokens))


class MemoryTask:
    """Conversations of one split.

    encode: text -> token ids, of a segment on its own. specials: ids of <|user|>, <|assistant|>,
    <|end|> and <pad>. split: train, valid or test.
    """

    def __init__(
        self,
        encode: Callable[[str], list[int]],
        specials: Mapping[str, int],
        split: str,
        seed: int = 0,
    ):
        if split not in words.SPLITS:
            raise ValueError(f"split must be one of {words.SPLITS}, not {split!r}")
        self.encode = encode
        self.split = split
        self.seed = seed
        self.user, self.assistant = specials[USER], specials[ASSISTANT]
        self.end, self.pad = specials[END], specials[PAD]
        self._cache: dict[str, list[int]] = {}

    # --- tokens ---

    def _encode_often(self, text: str) -> list[int]:
        """encode() for texts that come back: openings of replies, small talk."""
        ids = self._cache.get(text)
        if ids is None:
            if len(self._cache) > 20_000:
                self._cache.clear()
            ids = self._cache[text] = self.encode(text)
        return ids

    def turn_tokens(self, turn: Turn) -> list[int]:
        """<|user|> TEXT <|assistant|> REPLY <|end|> as ids."""
        reply = self.encode(turn.assistant) if turn.asks else self._encode_often(turn.assistant)
        return [self.user, *self.encode(turn.user), self.assistant, *reply, self.end]

    def prompt_tokens(self, text: str) -> list[int]:
        return [self.user, *self.encode(text), self.assistant]

    def marks(self, turn: Turn, tokens: list[int]) -> tuple[list[float], list[bool]]:
        """Loss weights and value marks of one turn's tokens."""
        start = tokens.index(self.assistant) + 1
        weight = ANSWER_WEIGHT if turn.kind == "ask" else TALK_WEIGHT
        weights = [0.0] * start + [weight] * (len(tokens) - start)
        values = [False] * len(tokens)
        if turn.asks and turn.asks.told:
            value = turn.asks.value
            head = turn.asks.reply[: -len(value) - 1].rstrip()
            first = start + len(self._encode_often(head))
            for i in range(first, first + len(self.encode(value))):
                values[i] = True
        return weights, values

    # --- public ---

    def rng(self, index: int, level: object) -> Random:
        text = repr((self.seed, self.split, index, level)).encode()
        return Random(int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little"))

    def conversation(self, index: int, level: Level) -> Conversation:
        """The conversation of this index: the same in every process, in any order of calls."""
        return _Writer(self, level, self.rng(index, level)).conversation()

    def batch(self, indices: Sequence[int], level: Level) -> dict[str, np.ndarray]:
        """Arrays for a training step; B conversations, W windows of L tokens, F final tokens.

        tokens [B, W, L] int32 padded on the right, mask [B, W, L] bool (True: a real token);
        final_tokens [B, F] int32, final_mask [B, F] bool, final_loss [B, F] float32 (entry t weighs
        predicting token t from those before it), final_value [B, F] bool (value tokens of answers).
        """
        b, w, n, f = len(indices), level.windows, level.window_tokens, level.final_tokens
        out = {
            "tokens": np.full((b, w, n), self.pad, np.int32),
            "mask": np.zeros((b, w, n), bool),
            "final_tokens": np.full((b, f), self.pad, np.int32),
            "final_mask": np.zeros((b, f), bool),
            "final_loss": np.zeros((b, f), np.float32),
            "final_value": np.zeros((b, f), bool),
        }
        for row, index in enumerate(indices):
            conversation = self.conversation(int(index), level)
            for j, chunk in enumerate(conversation.chunks):
                out["tokens"][row, j, : len(chunk)] = chunk
                out["mask"][row, j, : len(chunk)] = True
            size = len(conversation.final)
            out["final_tokens"][row, :size] = conversation.final
            out["final_mask"][row, :size] = True
            out["final_loss"][row, :size] = conversation.weights
            out["final_value"][row, :size] = conversation.values
        return out

    def evaluation(self, case: str, n: int = 500, window_tokens: int = 128) -> Iterator[Example]:
        """`n` conversations of `case` with one question each, all facts told (see CASES).

        window_tokens: most tokens of a window (with its question, for same_window). The same
        examples in every process; the i-th doesn't depend on n. ValueError for an unknown case.
        """
        if case not in CASES:
            raise ValueError(f"case must be one of {', '.join(CASES)}, not {case!r}")
        level = replace(CASES[case], window_tokens=window_tokens)
        for index in range(n):
            for attempt in range(1000):  # until a conversation fits its windows and has such a fact
                writer = _Writer(self, level, self.rng(index, (case, attempt, level)))
                example = writer.example(case)
                if example is not None:
                    yield example
                    break
            else:
                raise ValueError(f"{case} does not fit windows of {window_tokens} tokens")


class _Writer:
    """Writes one conversation."""

    def __init__(self, task: MemoryTask, level: Level, rng: Random):
        self.task, self.level, self.rng = task, level, rng
        self.world = _World()  # what has been placed so far
        self.used: set[str] = set()  # values and made-up subjects, all distinct
        self.planned: dict[tuple[str, str, str], _Fact] = {}  # what the drafts tell in the end
        self.people: dict[str, str] = {}  # subject -> person, pet or word

    # --- facts ---

    def value(self, kind: Kind, topic: str = "") -> str:
        """A value that this conversation has not used yet (unless its list is used up)."""
        pool = kind.pool
        if topic in phrases.MALE or topic in phrases.FEMALE:
            pool = "man" if topic in phrases.MALE else "woman"
        for _ in range(100):
            value = words.value(self.rng, pool, self.task.split)
            if value.lower() not in self.used:
                break
        self.used.add(value.lower())
        return value

    def fresh_word(self) -> str:
        while True:
            word = words.made_up(self.rng, self.task.split)
            if word not in self.used:
                self.used.add(word)
                return word

    def subject(self, kind: Kind, topic: str) -> str:
        """A subject for a single fact of `kind`; people are known by a relation or by a name."""
        rng = self.rng
        if kind.subject == "user":
            return "user"
        if kind.subject in ("kin", "petlink", "thinglink"):
            return "my " + topic
        if kind.subject in ("word", "verb", "adjective"):
            known = [s for s, c in self.people.items() if c == "word"]
            if kind.subject == "word" and known and rng.random() < 0.4:
                return rng.choice(known)
            return self.fresh_word()
        known = [s for s, c in self.people.items() if c == kind.subject]
        if known and rng.random() < 0.6:
            return rng.choice(known)
        if rng.random() < 0.5:
            return "my " + rng.choice(_LINKS[_PERSON_LIKE[kind.subject]].topics)
        return self.value(_LINKS["kin"])

    def plan(self, kind: Kind, subject: str, topic: str, value: str | None = None) -> _Fact | None:
        """A new fact, unless this subject's attribute is taken already, directly or by its name."""
        key = _key(subject, kind, topic)
        if key in self.planned:
            return None
        fact = _Fact(subject, kind, topic, value or self.value(kind, topic))
        self.planned[key] = fact
        if kind.subject in ("person", "pet", "word"):
            self.people[subject] = kind.subject
        if kind.link and kind.subject in ("kin", "petlink"):
            named = "person" if kind.subject == "kin" else "pet"
            self.people[subject] = self.people[fact.value] = named
        return fact

    def single(self) -> _Fact | None:
        """A fact of a random kind; None where it would tell again what is planned already."""
        kind = self.rng.choices(KINDS, _WEIGHTS)[0]
        topic = self.rng.choice(kind.topics) if kind.topics else ""
        subject = self.subject(kind, topic)
        probe = _World()
        for fact in self.planned.values():
            probe.tell(fact)
        if probe.resolve(subject, kind, topic):
            return None  # told already, or told about the same one under another name
        return self.plan(kind, subject, topic)

    def chains(self, count: int) -> list[tuple[_Fact, _Fact]]:
        """Up to `count` pairs (link, attribute of the linked name), all of one attribute, so that
        the answer can't be told from the attribute alone."""
        rng = self.rng
        link_class, attr_class = rng.choices(_CHAINS, _CHAIN_WEIGHTS)[0]
        link = _LINKS[link_class]
        kinds = [k for k in _BY_SUBJECT[attr_class] if not k.link]
        kind = rng.choices(kinds, [k.weight for k in kinds])[0]
        pairs = []
        for topic in rng.sample(link.topics, count) if link.topics else [""] * count:
            if topic:
                first = self.plan(link, "my " + topic, topic)
            else:  # "a florp is a kind of dask"
                first = self.plan(link, self.fresh_word(), "", self.fresh_word())
            if first is None:  # "my mum" beside "my mother"
                continue
            pairs.append((first, self.plan(kind, first.value, "")))
        return pairs

    # --- sentences ---

    def noisy(self, text: str, names: Sequence[str] = ()) -> tuple[str, bool]:
        """`text` as a careless writer types it; the flag says that names were lower-cased too."""
        rng = self.rng
        if rng.random() >= self.level.noise:
            return text, False
        lowered = False
        if rng.random() < 0.55:
            lowered = rng.random() < 0.4
            if lowered or not names:
                text = text.lower()
            else:
                kept = "|".join(re.escape(n) for n in sorted(names, key=len, reverse=True))
                text = re.sub(
                    rf"({kept})|([^\W\d_]+)", lambda m: m.group(1) or m.group(2).lower(), text
                )
        if rng.random() < 0.6:
            text = text.rstrip(".?!")
        if rng.random() < 0.4:
            # A possessive keeps its apostrophe: "mireks" would be another name.
            text = re.sub(
                r"(?i)\b(i'm|(what|who|where|when|name|it)'s|(don|can)'t)\b",
                lambda m: m.group(0).replace("'", ""),
                text,
            )
        if rng.random() < 0.3:
            text = (
                text.replace("avourite", "avorite")
                .replace("colour", "color")
                .replace("neighbour", "neighbor")
            )
        return text, lowered

    def sentence(self, fact: _Fact, subject: str | None = None) -> tuple[str, str]:
        """(sentence in inner case, its template)"""
        template = self.rng.choice(fact.kind.tells)
        while fact.topic in phrases.ONLY_ONE and template.startswith("I have a {t}"):
            template = self.rng.choice(fact.kind.tells)
        return _fill(template, subject or fact.subject, fact.topic, fact.value), template

    def told_turn(
        self, text: str, facts: Sequence[_Fact], acks: Sequence[str]
    ) -> tuple[Turn, tuple[_Fact, ...]]:
        """A tell turn, and its facts as they were typed."""
        names = [f.value for f in facts] + [f.subject for f in facts if f.subject[:3] != "my "]
        typed, lowered = self.noisy(text, names)
        if lowered:
            facts = [f._replace(value=f.value.lower()) for f in facts]
        ack = self.rng.choice(acks)
        if len(facts) == 1 and facts[0].kind.name == "user.name" and self.rng.random() < 0.3:
            ack = self.rng.choice(phrases.GREETINGS).format(v=facts[0].value)
        records = tuple((*f.key, f.value) for f in facts)
        return Turn(typed, ack, "tell", None, records), tuple(facts)

    def message(self, facts: Sequence[_Fact], merge: bool = False) -> _Draft:
        """One message that tells 1..3 facts."""
        rng = self.rng
        if merge:  # "My sister Mira lives in Oslo."
            link, fact = facts
            text = _upper(self.sentence(fact, f"{link.subject} {link.value}")[0]) + "."
        else:
            parts = [self.sentence(f) for f in facts]
            if rng.random() < 0.15:
                opener = rng.choice(phrases.TELL_OPENERS)
                text = _upper(opener) + parts[0][0]
            else:
                text = _capital(*parts[0], facts[0].kind)
            for (part, template), fact in zip(parts[1:], facts[1:], strict=True):
                if rng.random() < 0.6:
                    text += rng.choice((" and ", " and ", ", and ", ", ")) + part
                else:
                    text += ". " + _capital(part, template, fact.kind)
            text += "!" if rng.random() < 0.04 else "."
        turn, typed = self.told_turn(text, facts, phrases.ACKS)
        return _Draft([turn], [typed])

    def correction(self, fact: _Fact) -> _Draft:
        """A message that replaces the value of `fact`."""
        rng = self.rng
        new = fact._replace(value=self.value(fact.kind, fact.topic))
        self.planned[fact.key] = new
        changes = fact.kind.changes
        if changes and rng.random() < 0.6:
            template = rng.choice(changes)
            text = _fill(template, fact.subject, fact.topic, new.value)
        else:
            text, template = self.sentence(new)
        opener = rng.choice(phrases.FIX_OPENERS)
        if not opener and template not in changes:
            opener = "actually, "  # without a sign it would read like a second fact
        text = _upper(opener) + text if opener else _capital(text, template, fact.kind)
        turn, typed = self.told_turn(text + ".", [new], phrases.FIX_ACKS)
        return _Draft([turn], [typed], needs=fact.key)

    def quick_fix(self, draft: _Draft, fact: _Fact) -> None:
        """Adds "sorry, I meant X" right after the only fact of `draft`."""
        new = fact._replace(value=self.value(fact.kind, fact.topic))
        self.planned[fact.key] = new
        shown = _article(new.value) if "{av}" in fact.kind.reply else new.value
        template = self.rng.choice(phrases.FIX_SHORT)
        text = template.format(x=shown)
        if not template.startswith("{x}"):
            text = _upper(text)
        turn, typed = self.told_turn(text + ".", [new], phrases.FIX_ACKS)
        draft.turns.append(turn)
        draft.facts.append(typed)

    # --- the plan of a conversation ---

    def drafts(self) -> list[_Draft]:
        """The messages that tell this conversation's facts and corrections, in order."""
        rng, level = self.rng, self.level
        total = rng.randint(*level.facts)
        groups: list[list[_Fact]] = []
        merged: list[tuple[_Fact, _Fact]] = []
        left = total
        if left >= 4 and rng.random() < level.two_hop:
            for pair in self.chains(min(rng.randint(3, 4), left // 2)):
                left -= 2
                if pair[0].topic and rng.random() < 0.1:
                    merged.append(pair)
                else:
                    groups += [[pair[0]], [pair[1]]]
        attempts = 0
        while left > 0 and attempts < 200:
            attempts += 1
            fact = self.single()
            if fact is not None:
                groups.append([fact])
                left -= 1
        rng.shuffle(groups)
        drafts: list[_Draft] = []
        i = 0
        while i < len(groups):
            size = rng.choices((1, 2, 3), (60, 32, 8))[0]
            facts = [g[0] for g in groups[i : i + size]]
            i += size
            drafts.append(self.message(facts))
        for pair in merged:
            drafts.insert(rng.randint(0, len(drafts)), self.message(pair, merge=True))
        for draft in list(drafts):
            for fact in draft.facts[0]:
                # A link whose name has facts of its own stays: who would those be about?
                named = fact.kind.link and _canonical(fact.value) in {k[0] for k in self.planned}
                if named or rng.random() >= level.correction:
                    continue
                if len(draft.facts[0]) == 1 and len(draft.turns) == 1 and rng.random() < 0.3:
                    self.quick_fix(draft, fact)
                    continue
                fix = self.correction(fact)
                drafts.insert(rng.randint(drafts.index(draft) + 1, len(drafts)), fix)
        for draft in drafts:
            self.measure(draft)
        return drafts

    def measure(self, draft: _Draft) -> _Draft:
        draft.tokens = [self.task.turn_tokens(t) for t in draft.turns]
        return draft

    def talk(self) -> _Draft:
        user, assistant = self.rng.choice(phrases.TALK)
        text = _upper(user)
        if text[-1] not in "?!":
            text += "." if self.rng.random() < 0.8 else "!"
        return self.measure(_Draft([Turn(self.noisy(text)[0], assistant, "talk")], [()]))

    # --- questions ---

    def question(self, kind: Kind, subject: str, topic: str) -> Question:
        """The question in some phrasing, answered from the world as it is now."""
        rng = self.rng
        found = self.world.resolve(subject, kind, topic)
        if rng.random() < 0.15:
            template = rng.choice(phrases.RECALL)
            text = template.format(x=_fill(kind.phrase, subject, topic))
            # "I forgot where I live" and "tell me my name" end with a full stop.
            mark = "?" if template.split()[0] in ("do", "can", "what", "could") else "."
        else:
            text, mark = _fill(rng.choice(kind.asks), subject, topic), "?"
            if rng.random() < 0.12:
                text = rng.choice(phrases.ASK_OPENERS) + text
        names = [] if subject == "user" or subject.startswith("my ") else [subject]
        text, lowered = self.noisy(_upper(text) + mark, names)
        if found is None:
            return Question("never_told", text, NEVER_TOLD, "", 0, False)
        fact, hops = found
        head, value = _reply(kind, subject.lower() if lowered else subject, topic, fact.value)
        known = "corrected" if fact.key in self.world.corrected else "known"
        case = "two_hop" if hops == 2 else known
        return Question(case, text, f"{head} {value}.", value, hops, True)

    def about(self, fact: _Fact) -> tuple[Kind, str, str]:
        """What to ask for `fact`; by the relation of its subject, which takes two hops, if any."""
        owner = self.world.owners.get(_canonical(fact.subject))
        if owner and self.level.two_hop and self.rng.random() < 0.65:
            return fact.kind, owner, fact.topic
        return fact.kind, fact.subject, fact.topic

    def unknown(self) -> tuple[Kind, str, str] | None:
        """Something never told: near to what was told in 4 of 5 cases."""
        rng = self.rng
        facts = list(self.world.facts.values())
        for _ in range(20):
            r = rng.random()
            if facts and r < 0.5:  # the same attribute of another subject
                kind = rng.choice(facts).kind
                if rng.random() < 0.2:
                    twins = [k for k in KINDS if k.attr == kind.attr and k.subject != kind.subject]
                    kind = rng.choice(twins) if twins else kind
                topic = rng.choice(kind.topics) if kind.topics else ""
                subject = self.other_subject(kind, topic)
            elif facts and r < 0.8:  # another attribute of the same subject
                fact = rng.choice(facts)
                subject, topic = fact.subject, ""
                group = self.people.get(subject, fact.kind.subject)
                options = [k for k in _BY_SUBJECT.get(group, ()) if not k.topics]
                if not options:
                    continue
                kind = rng.choice(options)
                if kind.subject in ("verb", "adjective"):
                    continue
            else:
                kind = rng.choices(KINDS, _WEIGHTS)[0]
                topic = rng.choice(kind.topics) if kind.topics else ""
                subject = self.other_subject(kind, topic)
            near = set().union(*(n for n in phrases.NEAR if subject in n)) - {subject}
            if near & {f.subject for f in facts}:
                continue
            if self.world.resolve(subject, kind, topic) is None:
                return kind, subject, topic
        return None

    def other_subject(self, kind: Kind, topic: str) -> str:
        rng = self.rng
        if kind.subject == "user":
            return "user"
        if kind.subject in ("kin", "petlink", "thinglink"):
            return "my " + topic
        if kind.subject in ("verb", "adjective"):
            return words.made_up(rng, self.task.split)
        known = [
            f.subject
            for f in self.world.facts.values()
            if self.people.get(f.subject) == kind.subject
        ]
        if known and rng.random() < 0.6:
            return rng.choice(known)
        if kind.subject == "word":
            return words.made_up(rng, self.task.split)
        if rng.random() < 0.7:
            return "my " + rng.choice(_LINKS[_PERSON_LIKE[kind.subject]].topics)
        return words.value(rng, "name", self.task.split)

    def ask(self, kind: Kind, subject: str, topic: str) -> _Draft:
        question = self.question(kind, subject, topic)
        turn = Turn(question.text, question.reply, "ask", question)
        return self.measure(_Draft([turn], [()]))

    # --- windows ---

    def place(self, draft: _Draft, turns: list[Turn], tokens: list[list[int]]) -> int:
        """Adds the draft to a window, tells the world, and returns its tokens' number."""
        turns += draft.turns
        tokens += draft.tokens
        for facts in draft.facts:
            for fact in facts:
                self.world.tell(fact)
        return draft.size

    def conversation(self) -> Conversation:
        rng, level = self.rng, self.level
        drafts = self.drafts()
        late = []
        if not level.windows:
            drafts, late = [], drafts
        elif len(drafts) > 1 and rng.random() < LATE:
            late = [drafts.pop()]
        windows, chunks = self.told(drafts)
        turns, tokens = self.final_window(late)
        windows.append(turns)
        final, weights, values = [], [], []
        for turn, ids in zip(turns, tokens, strict=True):
            w, v = self.task.marks(turn, ids)
            final += ids
            weights += w
            values += v
        return Conversation(windows, chunks, final, weights, values)

    def told(self, drafts: list[_Draft]) -> tuple[list[list[Turn]], list[list[int]]]:
        """The consolidation windows: their turns and their token ids."""
        windows, chunks = [], []
        for turns, tokens in self.consolidation_windows(drafts):
            windows.append(turns)
            chunks.append([i for ids in tokens for i in ids])
        self.cut_turns(windows, chunks)
        return windows, chunks

    def consolidation_windows(
        self, drafts: list[_Draft]
    ) -> Iterator[tuple[list[Turn], list[list[int]]]]:
        """Spreads the drafts over the windows by their capacities and yields each window's (turns,
        their tokens). What does not fit in the end stays untold."""
        rng, level = self.rng, self.level
        total = sum(d.size for d in drafts)
        caps = [int(level.window_tokens * rng.uniform(0.4, 1.0)) for _ in range(level.windows)]
        if total > 0.9 * sum(caps):
            caps = [level.window_tokens] * level.windows
        asking = rng.random() < ASKING
        queue: list[_Draft] = []
        ahead, seen, end = list(drafts), 0, 0
        for number, cap in enumerate(caps):
            end += cap
            last = number == len(caps) - 1
            while ahead and (last or seen + ahead[0].size / 2 <= total * end / sum(caps)):
                seen += ahead[0].size
                queue.append(ahead.pop(0))
            turns: list[Turn] = []
            tokens: list[list[int]] = []
            used, waiting = 0, []
            for draft in queue:
                limit = level.window_tokens if last or not turns else cap
                if draft.size > level.window_tokens or self.orphan(draft):
                    continue
                if waiting or used + draft.size > limit:
                    waiting.append(draft)  # and all after it: their order matters
                    continue
                extra = None
                if rng.random() < level.small_talk:
                    extra = self.talk()
                elif asking and self.world.facts and rng.random() < 0.3:
                    extra = self.ask(*self.about(rng.choice(list(self.world.facts.values()))))
                if extra and used + extra.size + draft.size <= cap and total < 0.8 * sum(caps):
                    used += self.place(extra, turns, tokens)
                used += self.place(draft, turns, tokens)
            queue = waiting
            while not turns or rng.random() < level.small_talk:
                extra = self.talk()
                if turns and used + extra.size > cap:
                    break
                used += self.place(extra, turns, tokens)
            yield turns, tokens

    def orphan(self, draft: _Draft) -> bool:
        """Whether `draft` corrects a fact that was never placed."""
        return draft.needs is not None and draft.needs not in self.world.facts

    def cut_turns(self, windows: list[list[Turn]], chunks: list[list[int]]) -> None:
        """Moves the head of a window's first turn to the end of the window before, now and then."""
        level, rng = self.level, self.rng
        for i in range(len(chunks) - 1):
            if rng.random() >= MID_TURN or len(windows[i + 1]) < 2:
                continue
            length = chunks[i + 1].index(self.task.end)  # of the first turn, less its <|end|>
            room = min(length, level.window_tokens - len(chunks[i]))
            if room > 0:
                cut = rng.randint(1, room)
                chunks[i] += chunks[i + 1][:cut]
                chunks[i + 1] = chunks[i + 1][cut:]
                windows[i].append(windows[i + 1].pop(0))

    def final_window(self, pending: list[_Draft]) -> tuple[list[Turn], list[list[int]]]:
        """Fills the final window with questions, one for each fact, between them those of the
        pending drafts that fit. Returns its turns and their tokens."""
        rng, level = self.rng, self.level
        turns: list[Turn] = []
        tokens: list[list[int]] = []
        asked: set[tuple[str, str, str]] = set()
        used, unknowns, misses = 0, 0, 0
        tell_rate = 0.4 if level.windows else 0.75
        while misses < 3:
            left = [f for key, f in self.world.facts.items() if key not in asked]
            if pending and (not self.world.facts or rng.random() < tell_rate):
                draft = pending.pop(0)
                if self.orphan(draft) or used + draft.size > 0.6 * level.final_tokens:
                    continue
                asked -= {fact.key for facts in draft.facts for fact in facts}
                used += self.place(draft, turns, tokens)
                continue
            fact = None
            # Their share stays level.unknown even where few facts are left to ask for.
            enough = unknowns * (1 - level.unknown) > level.unknown * len(asked)
            if rng.random() < 0.25 * level.small_talk:
                draft = self.talk()
            elif left and (enough or rng.random() >= level.unknown):
                fact = rng.choice(left)
                draft = self.ask(*self.about(fact))
            elif level.unknown and not enough and (choice := self.unknown()):
                draft = self.ask(*choice)
            elif pending:
                continue
            else:
                break
            if used + draft.size > level.final_tokens:
                misses += 1
                continue
            used += self.place(draft, turns, tokens)
            if fact:
                asked.add(fact.key)
            elif draft.turns[0].asks:
                unknowns += 1
        return turns, tokens

    def example(self, case: str) -> Example | None:
        """The evaluation item of this conversation; None where a fact found no room, or where it
        holds nothing that `case` could ask for."""
        rng = self.rng
        turns, chunks = self.told(self.drafts())
        if self.world.facts.keys() != self.planned.keys():
            return None
        if case == "never_told":
            choice = self.unknown()
            if choice is None:
                return None
            question = self.question(*choice)
        else:
            together = {frozenset(f[:3] for f in t.facts) for window in turns for t in window}
            queries = []
            for key, fact in self.world.facts.items():
                if case == "corrected" and key not in self.world.corrected:
                    continue
                subject = fact.subject
                if case == "two_hop":
                    owner = self.world.owners.get(_canonical(subject))
                    # Both facts in one sentence would be one hop.
                    if owner is None or any(
                        {key, (_canonical(owner), "name", "")} <= both for both in together
                    ):
                        continue
                    subject = owner
                queries.append((fact.kind, subject, fact.topic))
            if not queries:
                return None
            question = self.question(*rng.choice(queries))
        prompt = self.task.prompt_tokens(question.text)
        if case != "same_window":
            return Example(case, chunks, [], prompt, question)
        if len(chunks[0]) + len(prompt) > self.level.window_tokens:
            return None
        return Example(case, [], chunks[0], prompt, question)
