"""The task gsm: every answer is found again by reading the text that the tokens spell."""

from __future__ import annotations

import re

import numpy as np
import pytest

from mlx_sleep.lab.tasks.gsm import Gsm, make_tokenizer
from mlx_sleep.utils.errors import UserError

NAME = r"(\w+(?: in [A-Z]\w+ [A-Z]\w+)?)"


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


@pytest.fixture(scope="module")
def task(tokenizer):
    return Gsm(tokenizer, tokens=(110, 180), ops=4, window=60)


def read(text):
    """{name: (function of the values of others, [others])} from the sentences of a context."""
    told = {}
    for sentence in text.split("."):
        sentence = " ".join(sentence.split())
        if m := re.fullmatch(rf"There are as many {NAME} as {NAME} and {NAME} together", sentence):
            told[m[1]] = (lambda a, b: a + b, [m[2], m[3]])
        elif m := re.fullmatch(
            rf"There are as many {NAME} as {NAME} without the number of {NAME}", sentence
        ):
            told[m[1]] = (lambda a, b: a - b, [m[2], m[3]])
        elif m := re.fullmatch(rf"There are (\d+) more {NAME} than {NAME}", sentence):
            told[m[2]] = (lambda a, n=int(m[1]): a + n, [m[3]])
        elif m := re.fullmatch(rf"There are (\d+) fewer {NAME} than {NAME}", sentence):
            told[m[2]] = (lambda a, n=int(m[1]): a - n, [m[3]])
        elif m := re.fullmatch(rf"There are (\d+) times as many {NAME} as {NAME}", sentence):
            told[m[2]] = (lambda a, n=int(m[1]): a * n, [m[3]])
        elif m := re.fullmatch(rf"There are (\d+) {NAME}", sentence):
            told[m[2]] = (lambda n=int(m[1]): n, [])
        else:
            assert "There are" not in sentence, sentence
    return told


def solve(told, name, largest=99):
    """(value, operations) of a quantity: each operation counted once."""
    needed, values = set(), {}

    def value(name):
        if name not in values:
            rule, others = told[name]
            if others:
                needed.add(name)
            values[name] = rule(*map(value, others))
            assert 0 <= values[name] <= largest
        return values[name]

    return value(name), len(needed)


def parts(text):
    """(the name asked for, the context without the question)"""
    asked = re.search(rf"How many {NAME} \?", text)
    return asked[1], text.replace(asked[0], "")


@pytest.mark.parametrize("question", ["first", "last"])
def test_answers_are_those_of_the_text(tokenizer, question):
    task = Gsm(tokenizer, tokens=(110, 180), ops=4, window=60, question=question)
    largest = 0
    for ops in (1, 2, 3, 4):
        for index in range(25):
            context, final, _, [answer] = task.problem("test", index, ops)
            text, last = task.decode(context), task.decode(final)
            assert ("How many" in text) == (question == "first")
            asked, told = parts(text) if question == "first" else (parts(last)[0], text)
            cue = "Answer:" if question == "first" else "?"
            assert last.split(cue)[1].split() == [str(answer)]
            assert final[-1] == task.end
            told = read(told)
            assert solve(told, asked) == (answer, ops)
            assert 110 <= len(context) + 25 and len(context) <= 180
            largest = max(largest, len(told))
    assert largest > 8  # other quantities than those that are needed


@pytest.mark.parametrize("largest, names", [(9, (4, 6)), (20, (24, 0))])
def test_a_small_world(largest, names):
    tokenizer = make_tokenizer(300, names, phrases=True)
    task = Gsm(tokenizer, (40, 64), 3, 32, largest=largest, names=names)
    values, asked_for = set(), set()
    for ops in (1, 2, 3):
        for index in range(100):
            context, _, _, [answer] = task.problem("test", index, ops)
            asked, told = parts(task.decode(context))
            told = read(told)
            assert solve(told, asked, largest) == (answer, ops)
            values.add(answer)
            asked_for |= told.keys()
    assert len(asked_for) == 24 and values >= set(range(10))


@pytest.mark.parametrize("question", ["first", "last"])
def test_several_questions(tokenizer, question):
    task = Gsm(tokenizer, (110, 180), 3, 60, question, questions=4)
    asked_ops, asked = set(), set()
    for index in range(50):
        context, final, labels, answers = task.problem("train", index)
        text, last = task.decode(context), task.decode(final)
        assert len(context) <= 180 and len(final) <= task.final_tokens
        names = re.findall(rf"How many {NAME} \?", text if question == "first" else last)
        assert len(set(names)) == len(names) == len(answers) > 1
        told = read(re.sub(rf"How many {NAME} \?", "", text))
        solved = [solve(told, name) for name in names]
        assert [value for value, _ in solved] == answers
        asked_ops |= {ops for _, ops in solved}
        for which, answer in enumerate(answers):  # every one has a label in training
            ids = [i for i, label in zip(final, labels, strict=True) if label == which]
            assert task.decode(ids[:-1]) == str(answer) and ids[-1] == task.end
        # In a test only the problem's own is answered: another's answer could help.
        context, final, labels, [_] = task.problem("test", index, 3)
        assert final.count(task.end) == 1 and set(labels) == {-1, 0}
        asked.add(task.decode(context).count("?"))
    assert asked_ops == {0, 1, 2, 3} and (max(asked) > 1) == (question == "first")
    assert task.batch("test", range(9), 3).question.max() == 0


@pytest.mark.parametrize("phrases", [False, True])
def test_digits_stand_apart(phrases):
    task = Gsm(make_tokenizer(phrases=phrases), (110, 180), 4, 60)
    pieces = [task.decode([i]) for i in range(task.vocab_size)]
    assert all(len(re.findall(r"\d", piece)) < 2 for piece in pieces)
    assert ("There are" in pieces) == phrases


def test_a_batch_has_the_problems_in_its_windows(task):
    batch = task.batch("train", [5, 0, 9], 3)
    assert batch.context.shape == (3, task.windows, task.window)
    assert not batch.mask.all() and batch.final_mask.any(axis=1).all()
    for row, index in enumerate([5, 0, 9]):
        context, final, _, [answer] = task.problem("train", index, 3)
        assert batch.context[row][batch.mask[row]].tolist() == context
        flat = batch.mask[row].reshape(-1)
        assert flat[: len(context)].all()  # padding on the right, in the last windows only
        assert batch.final[row][batch.final_mask[row]].tolist() == final
        labels = batch.final[row][batch.question[row] == 0].tolist()
        assert task.decode(labels[:-1]) == str(answer) and labels[-1] == task.end


def test_an_example_depends_on_seed_split_and_index_alone(task, tokenizer):
    assert task.problem("test", 3) == task.problem("test", 3)
    assert task.problem("train", 3) != task.problem("test", 3)
    assert Gsm(tokenizer, (110, 180), 4, 60, seed=1).problem("test", 3) != task.problem("test", 3)
    assert make_tokenizer() == tokenizer
    answers = [task.problem("train", i).answers[0] for i in range(300)]
    assert max(np.bincount(answers)) < 40  # no answer is right by itself


def test_retention_tells_the_problem_in_the_first_window(tokenizer):
    task = Gsm(tokenizer, tokens=(110, 180), ops=2, window=100)
    batch = task.retention("test", range(4), 2, 3)
    assert batch.context.shape == (4, 4, 100) and batch.mask.all()
    for windows, final, mask in zip(batch.context, batch.final, batch.final_mask, strict=True):
        # The last sentence of the filling may be cut.
        text = task.decode(windows[0].tolist()).rpartition(".")[0] + "."
        asked, told = parts(text)
        value, ops = solve(read(told), asked)
        assert ops == 2
        assert task.decode(final[mask].tolist()) == f"Answer: {value}"
        for later in windows[1:]:
            assert asked not in task.decode(later.tolist())


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"ops": 0}, "ops must be"),
        ({"tokens": (200, 100)}, "fewest, most"),
        ({"window": 300}, "larger than the context, 180"),
        ({"tokens": (20, 60), "ops": 4}, "does not fit 60"),
        ({"question": "middle"}, 'must be "first" or "last"'),
        ({"largest": 0}, "largest quantity must be"),
        ({"names": (1, 5)}, "5 names are too few for 2 operations"),
        ({"names": (2, 99)}, "24 places, not 99"),
        ({"questions": 0}, "questions must be"),
    ],
)
def test_bad_numbers(tokenizer, arguments, message):
    with pytest.raises(UserError, match=message):
        Gsm(tokenizer, **{"tokens": (110, 180), "ops": 2, "window": 60, **arguments})


def test_more_operations_than_the_task_has(task):
    with pytest.raises(UserError, match="5 operations are more than the 4"):
        task.batch("test", [0], 5)
