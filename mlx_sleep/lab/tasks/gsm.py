"""The task `gsm`: arithmetic word problems from a random graph of quantities, with filler.

In the manner of GSM-Infinite, as arXiv 2605.26099 uses it: some sentences relate quantities to one
another, the others have nothing to do with the question, and the answer must come at once, with no
chain of thought. The difficulty is the number of operations between the numbers that are told
and the one that is asked for. The question comes before the context (as in the paper) or after
it (harder: a sleep doesn't know what will be asked). All of the context is slept over; only the
answer's window is not, where the paper also predicts from what is left of the context.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable, Sequence
from functools import lru_cache
from random import Random
from typing import NamedTuple

import numpy as np

from ...utils.errors import UserError
from .synthetic import Batch, check_int, check_split

PAD, END = "<pad>", "<end>"
LARGEST = 99  # no quantity is larger, where a plan doesn't say otherwise

ANIMALS = (
    "owls foxes bears wolves hares otters badgers deer moose lynxes herons cranes swans geese "
    "ducks ravens crows eagles hawks frogs toads newts voles moles bats elks goats sheep horses"
).split()
PLACES = (
    "Alder Valley,Birch Hill,Cedar Park,Dune Bay,Elm Wood,Fern Glen,Gull Rock,Heather Moor,"
    "Iris Pond,Juniper Ridge,Kelp Cove,Larch Grove,Maple Field,Nettle Lane,Oak Marsh,Pine Forest,"
    "Quarry Lake,Reed Creek,Sage Plain,Thorn Meadow,Umber Cliff,Violet Dell,Willow Bank,Yew Garden"
).split(",")
FILLER = (
    "It rains often in {}.",
    "A narrow road leads to {}.",
    "Nobody lives in {} any more.",
    "Children like to play in {}.",
    "There is a small museum in {}.",
    "The path through {} is closed in winter.",
    "Painters come to {} for its light.",
)
ALL_NAMES = (len(ANIMALS), len(PLACES))


class Quantity(NamedTuple):
    """A number, and the names of the operations' results that it hangs on, its own among them."""

    value: int
    needs: frozenset = frozenset()


class Problem(NamedTuple):
    """context, final: ids; question: for every id of final, of which answer it is, else -1."""

    context: list[int]
    final: list[int]
    question: list[int]
    answers: list[int]


class Gsm:
    """Problems of 1 to `ops` operations in contexts of tokens[0] to tokens[1] tokens.

    tokenizer  a serialized sentencepiece model (`make_tokenizer`)
    window     tokens between two sleeps
    question   "first" or "last": before or after the context
    largest    no quantity is larger, or below 0
    names      how many animals and places there are: the number of quantities is their product;
               with 0 places it is the first, "owls" instead of "owls in Alder Valley"
    questions  asked of each context: the problem's, and others that take 0 to `ops` operations.
               A test has the problem's alone to answer, for one answer helps with another.
    An answer is right when all digits and END are. UserError for numbers out of range, and for
    contexts too short for a problem.
    """

    trained_apart = False

    def __init__(
        self,
        tokenizer: bytes,
        tokens: Sequence[int] = (2000, 3300),
        ops: int = 8,
        window: int = 2000,
        question: str = "first",
        largest: int = LARGEST,
        names: Sequence[int] = ALL_NAMES,
        questions: int = 1,
        seed: int = 0,
    ):
        from sentencepiece import SentencePieceProcessor

        self.least, self.most = (check_int("the tokens of a context", n, 1) for n in tokens)
        if self.least > self.most:
            raise UserError(f"tokens must be [fewest, most], not {list(tokens)}")
        self.ops = check_int("ops", ops, 1)
        self.window = check_int("the window", window, 2)
        if window > self.most:
            raise UserError(f"a window of {window} tokens is larger than the context, {self.most}")
        if question not in ("first", "last"):
            raise UserError(f'question must be "first" or "last", not {question!r}')
        self.question, self.seed = question, seed
        self.largest = check_int("the largest quantity", largest, 1)
        self.names = name_list(*names)
        if len(self.names) < 3 * ops:
            raise UserError(f"{len(self.names)} names are too few for {ops} operations of 3")
        self.questions = check_int("questions", questions, 1)
        self.windows = -(-self.most // window)
        sp = SentencePieceProcessor(model_proto=tokenizer)
        self.decode, self.vocab_size = sp.decode, sp.vocab_size()
        self.pad, self.end = sp.piece_to_id(PAD), sp.piece_to_id(END)
        # Sentences are made of few pieces of text, each encoded once and on its own.
        self._encode: Callable[[str], tuple[int, ...]] = lru_cache(None)(
            lambda text: tuple(sp.encode(text))
        )
        self._asking = max(len(self._question(name)) for name in self.names)
        cue = max(len(self._cue(name)) for name in self.names)
        self.final_tokens = questions * (cue + len(self._number(largest)) + 1)
        for index in range(8):  # the longest problems must fit
            self.problem("valid", index, self.ops)

    def check(self, difficulty: int | None) -> None:
        if difficulty is not None and check_int("ops", difficulty, 1) > self.ops:
            raise UserError(f"{difficulty} operations are more than the {self.ops} of this task")

    def problem(self, split: str, index: int, ops: int | None = None) -> Problem:
        """One example; None draws 1 to `ops` operations, and all questions are to be answered."""
        return self._problem(split, index, ops, 0)

    def batch(self, split: str, indices: Sequence[int], difficulty: int | None = None) -> Batch:
        """The examples `indices`; None mixes 1 to `ops` operations, evenly.

        With a difficulty it is a test, of one question an example.
        """
        return self._batch(split, indices, difficulty, self.windows, 0)

    def retention(self, split: str, indices: Sequence[int], difficulty: int, further: int) -> Batch:
        """Problems that fit one window, then `further` windows of sentences on other places."""
        return self._batch(split, indices, difficulty, 1 + further, further)

    def _batch(self, split, indices, difficulty, windows, further) -> Batch:
        check_split(split)
        self.check(difficulty)
        B, room = len(indices), windows * self.window
        context = np.full((B, room), self.pad, np.int32)
        mask = np.zeros((B, room), bool)
        final = np.full((B, self.final_tokens), self.pad, np.int32)
        final_mask = np.zeros(final.shape, bool)
        question = np.full(final.shape, -1, np.int32)
        for row, index in enumerate(indices):
            told, asked, labels, _ = self._problem(split, int(index), difficulty, further)
            context[row, : len(told)], mask[row, : len(told)] = told, True
            final[row, : len(asked)], final_mask[row, : len(asked)] = asked, True
            question[row, : len(asked)] = labels
        shape = (B, windows, self.window)
        return Batch(context.reshape(shape), mask.reshape(shape), final, final_mask, question)

    def _problem(self, split: str, index: int, ops: int | None, further: int) -> Problem:
        text = repr(("gsm", self.seed, split, index, ops, further)).encode()
        draw = Random(int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little"))
        names = list(self.names)
        draw.shuffle(names)
        told, quantities, name = graph(draw, ops or draw.randint(1, self.ops), names, self.largest)
        sentences = [self._sentence(parts) for parts in told]
        least = sum(map(len, sentences))
        # With further windows, the whole problem is in the first one and the only one asked for.
        count = 1 if further else self.questions
        if self.question == "first":
            least += count * self._asking
        room = self.window if further else self.most
        if least > room:
            raise UserError(
                f"a problem of {least} tokens does not fit {room}; raise tokens or the window, or "
                "lower ops"
            )
        length = room if further else max(least, draw.randint(self.least, self.most))
        filler, others = self._filler(draw, names, length - least)
        sentences += filler
        quantities |= others
        draw.shuffle(sentences)
        asked = self._asked(draw, quantities, name, count)
        context = []
        if self.question == "first":
            context += [i for other in asked for i in self._question(other)]
        context += [i for sentence in sentences for i in sentence]
        for w in range(1, 1 + further):
            context += self._filling(draw, w * self.window - len(context))
            more, _ = self._filler(draw, names, self.window)
            context += [i for sentence in more for i in sentence]
        if further:
            context += self._filling(draw, (1 + further) * self.window - len(context))
        if ops is not None:  # a test
            asked = [name]
        final, labels = [], []
        for which, other in enumerate(asked):
            lead = self._cue(other)
            answer = [*self._number(quantities[other].value), self.end]
            final += lead + answer
            labels += [-1] * len(lead) + [which] * len(answer)
        return Problem(context, final, labels, [quantities[other].value for other in asked])

    def _asked(self, draw: Random, quantities: dict, name: tuple, count: int) -> list[tuple]:
        """The names that are asked for, that of the problem among them, in random order."""
        others = [
            other for other, q in quantities.items() if other != name and len(q.needs) <= self.ops
        ]
        asked = [name, *draw.sample(others, min(count - 1, len(others)))]
        draw.shuffle(asked)
        return asked

    def _filling(self, draw: Random, count: int) -> list[int]:
        """Exactly `count` tokens: neutral sentences, the last one cut."""
        ids: list[int] = []
        while len(ids) < count:
            ids += self._sentence(_neutral(draw))
        return ids[:count]

    def _filler(self, draw: Random, names: list, room: int) -> tuple[list[list[int]], dict]:
        """(sentences of other quantities, and of none, in at most `room` tokens; the quantities)"""
        sentences: list[list[int]] = []
        quantities: dict = {}
        while True:
            name = quantity = None
            if draw.random() < 0.3 or not names:
                parts = _neutral(draw)
            else:
                name = names.pop()
                if quantities and draw.random() < 0.6:
                    other = draw.choice(list(quantities))
                    parts, quantity = _extend(draw, name, other, quantities, self.largest)
                else:
                    parts, quantity = _leaf(draw, name, self.largest)
            sentence = self._sentence(parts)
            room -= len(sentence)
            if room < 0:
                return sentences, quantities
            sentences.append(sentence)
            if name:
                quantities[name] = quantity

    def _sentence(self, parts: Sequence) -> list[int]:
        """The ids of pieces of text, numbers and names (animal, place)."""
        ids: list[int] = []
        for part in parts:
            if isinstance(part, int):
                ids += self._number(part)
            elif isinstance(part, tuple):
                ids += self._encode(" in ".join(part))
            else:
                ids += self._encode(part)
        return ids

    def _number(self, value: int) -> list[int]:
        return list(self._encode(str(value)))

    def _question(self, name: tuple) -> list[int]:
        return self._sentence(("How many", name, "?"))

    def _cue(self, name: tuple) -> list[int]:
        """What comes before an answer: the question, or the quantity that it is the number of."""
        if self.question == "last":
            return self._question(name)
        return self._sentence(("Answer:",) if self.questions == 1 else (name, "?"))


def name_list(animals: int, places: int) -> list[tuple[str, ...]]:
    """The names (animal, place) of a task with so many of each, or (animal,) with 0 places.

    UserError for more than there are.
    """
    for what, count, least, known in (
        ("animals", animals, 1, ANIMALS),
        ("places", places, 0, PLACES),
    ):
        if check_int(what, count, least) > len(known):
            raise UserError(f"there are {len(known)} {what}, not {count}")
    if not places:
        return [(a,) for a in ANIMALS[:animals]]
    return [(a, p) for a in ANIMALS[:animals] for p in PLACES[:places]]


def graph(draw: Random, ops: int, names: list, largest: int = LARGEST) -> tuple[list, dict, tuple]:
    """(sentences as parts, name -> Quantity, the name asked for) of a problem of `ops` operations.

    Every operation is needed: a result goes into a later one, and the last is the answer. Names
    are popped from `names`. An operation begins a branch of its own, goes on from the result of
    one, or merges two, as long as enough operations are left to merge them all.
    """
    told: list = []
    quantities: dict = {}
    open_ends: list = []  # names of results that nothing has used

    def leaf():
        name = names.pop()
        parts, quantities[name] = _leaf(draw, name, largest)
        told.append(parts)
        return name

    for left in range(ops - 1, -1, -1):  # operations after this one
        kinds = []
        if len(open_ends) <= left:
            kinds.append("begin")
        if 1 <= len(open_ends) <= left + 1:
            kinds.append("extend")
        if len(open_ends) >= 2:
            kinds.append("merge")
        kind = draw.choice(kinds)
        if kind == "merge":
            draw.shuffle(open_ends)
            a, b = open_ends.pop(), open_ends.pop()
        else:
            a = leaf() if kind == "begin" else open_ends.pop(draw.randrange(len(open_ends)))
            b = leaf() if draw.random() < 0.5 else None
        name = names.pop()
        if b is None:
            parts, quantities[name] = _extend(draw, name, a, quantities, largest)
        else:
            parts, quantities[name] = _combine(draw, name, a, b, quantities, largest)
        told.append(parts)
        open_ends.append(name)
    return told, quantities, open_ends.pop()


def _neutral(draw: Random) -> tuple:
    before, after = draw.choice(FILLER).split("{}")
    return tuple(part for part in (before.strip(), draw.choice(PLACES), after.strip()) if part)


def _leaf(draw: Random, name: tuple, largest: int) -> tuple[tuple, Quantity]:
    """The sentence that tells a number outright, and the quantity."""
    value = draw.randint(1, min(9, largest))
    return ("There are", value, name, "."), Quantity(value)


def _extend(
    draw: Random, name: tuple, other: tuple, quantities: dict, largest: int
) -> tuple[tuple, Quantity]:
    """An operation on the quantity called other and a number."""
    value, needs = quantities[other]
    # So that what is added, or what is taken away, is never too much.
    by = draw.randint(1, min(9, max(value, largest - value)))
    times = draw.randint(2, 3)
    choices = []
    if value + by <= largest:
        choices.append((("There are", by, "more", name, "than", other, "."), value + by))
    if value - by >= 0:
        choices.append((("There are", by, "fewer", name, "than", other, "."), value - by))
    if value * times <= largest:
        text = ("There are", times, "times as many", name, "as", other, ".")
        choices.append((text, value * times))
    parts, value = draw.choice(choices)
    return parts, Quantity(value, needs | {name})


def _combine(
    draw: Random, name: tuple, a: tuple, b: tuple, quantities: dict, largest: int
) -> tuple[tuple, Quantity]:
    """An operation on the quantities called a and b."""
    first, second = sorted((a, b), key=lambda other: -quantities[other].value)
    (x, some), (y, more) = quantities[first], quantities[second]
    needs = some | more | {name}
    if x + y <= largest and draw.random() < 0.6:
        one, two = draw.sample([a, b], 2)
        text = ("There are as many", name, "as", one, "and", two, "together.")
        return text, Quantity(x + y, needs)
    text = ("There are as many", name, "as", first, "without the number of", second, ".")
    return text, Quantity(x - y, needs)


def make_tokenizer(
    vocab_size: int = 400,
    names: Sequence[int] = ALL_NAMES,
    phrases: bool = False,
) -> bytes:
    """A serialized sentencepiece BPE model of the task's words, digits kept apart.

    phrases: a piece may be several words, as "There are". The same sentencepiece makes the same
    model; a study keeps it in its folder all the same.
    """
    import sentencepiece

    draw = Random(11)
    lines = [str(number) for number in range(LARGEST + 1)] * 10
    known = name_list(*names)
    for _ in range(1000):
        told, _, asked = graph(draw, draw.randint(1, 8), draw.choices(known, k=40))
        for parts in (*told, _neutral(draw), ("How many", asked, "?", "Answer:")):
            for part in parts:
                lines.append(" in ".join(part) if isinstance(part, tuple) else str(part))
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_writer=model,
        model_type="bpe",
        vocab_size=vocab_size,
        split_digits=True,
        split_by_whitespace=not phrases,
        normalization_rule_name="identity",
        character_coverage=1.0,
        unk_id=0,
        pad_id=1,
        pad_piece=PAD,
        bos_id=-1,
        eos_id=-1,
        control_symbols=[END],
        # Without these a number would begin with a piece that is a space and nothing else.
        user_defined_symbols=[f"\N{LOWER ONE EIGHTH BLOCK}{digit}" for digit in range(10)],
        num_threads=1,
        minloglevel=2,
    )
    return model.getvalue()
