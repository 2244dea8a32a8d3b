"""The hand-written conversations and prompts hold what they promise, and replies are judged."""

from __future__ import annotations

import json
from collections import Counter
from importlib.resources import files

import pytest

from mlx_sleep.lab.natural import (
    CASES,
    Question,
    correct,
    load,
    ordinary,
    says_not_told,
    stands,
)

CONVERSATIONS = load()
# Here the new value was told as a relative of the old one, so a right reply may name both.
NAMED_AFTER_THE_OLD = {"n64", "n88"}
QUESTIONS = [question for conversation in CONVERSATIONS for question in conversation.questions]


def told(conversation) -> str:
    return "\n".join(message for window in conversation.windows for message in window)


def ids(conversation) -> str:
    return conversation.id


def test_schema():
    content = json.loads((files("mlx_sleep.lab") / "natural.json").read_text(encoding="utf-8"))
    assert content.keys() == {"about", "version", "conversations"} and content["version"] == 1
    for entry in content["conversations"]:
        assert entry.keys() == {"id", "windows", "questions"}
        for question in entry["questions"]:
            assert question.keys() - {"avoid"} == {"ask", "answers", "case"}
    assert [c.id for c in CONVERSATIONS] == [f"n{i + 1:02}" for i in range(len(CONVERSATIONS))]


def test_counts():
    total = len(QUESTIONS)
    assert total >= 340 and len(CONVERSATIONS) >= 70
    share = {case: count / total for case, count in Counter(q.case for q in QUESTIONS).items()}
    assert share.keys() == set(CASES)
    assert 0.38 <= share["recall"] <= 0.5
    assert 0.1 <= share["never_told"] <= 0.14
    windows = Counter(min(len(c.windows), 3) for c in CONVERSATIONS)
    assert min(windows.values()) >= len(CONVERSATIONS) / 4  # one, two, three or four


def test_yes_and_no_are_balanced():
    answers = Counter(q.answers[0] for q in QUESTIONS if q.case == "yes_no")
    assert answers.keys() == {"yes", "no"} and min(answers.values()) >= 0.4 * answers.total()


@pytest.mark.parametrize("conversation", CONVERSATIONS, ids=ids)
def test_conversation(conversation):
    assert 1 <= len(conversation.windows) <= 4
    for window in conversation.windows:
        assert 2 <= len(window) <= 7 and all(message.strip() for message in window)
        assert len(" ".join(window).split()) <= 180
    assert 5 <= len(conversation.questions) <= 6
    asked = [question.ask.casefold() for question in conversation.questions]
    assert len(set(asked)) == len(asked)


@pytest.mark.parametrize("conversation", CONVERSATIONS, ids=ids)
def test_answers_were_told(conversation):
    text = told(conversation)
    for question in conversation.questions:
        if question.case in ("never_told", "forgotten"):
            assert question.answers is None
            assert all(stands(word, text) for word in question.avoid)
        elif question.case == "yes_no":
            assert question.answers[0] in ("yes", "no")
            assert {"yes": "no", "no": "yes"}[question.answers[0]] in question.avoid
        else:
            assert any(stands(answer, text) for answer in question.answers), question.ask


@pytest.mark.parametrize("conversation", CONVERSATIONS, ids=ids)
def test_a_question_does_not_give_its_answer_away(conversation):
    for question in conversation.questions:
        if question.case != "yes_no":
            assert not correct(question.ask, question), question.ask
        if question.answers is not None:
            assert correct(question.answers[0], question)
            assert not correct("You have not told me that.", question)
            assert not any(correct(word, question) for word in question.avoid)


@pytest.mark.parametrize("conversation", CONVERSATIONS, ids=ids)
def test_a_correction_avoids_the_old_value(conversation):
    for question in conversation.questions:
        if question.case in ("corrected", "correction_of_correction"):
            assert question.avoid or conversation.id in NAMED_AFTER_THE_OLD, question.ask


def test_ordinary_prompts():
    prompts = ordinary()
    assert len(prompts) == len({prompt.casefold() for prompt in prompts}) == 200
    assert all(3 <= len(prompt.split()) <= 60 for prompt in prompts)


DOG = Question("what's my dog called?", ("Biscuit",), "recall")
DATE = Question("when is the exam?", ("13 May", "May 13", "13th of May"), "recall")
TWELVE = Question("how many eggs?", ("twelve", "12"), "recall")
MOVED = Question("which day is it?", ("Friday",), "corrected", ("Thursday",))
HAM = Question("can I have ham?", ("no", "vegetarian", "don't eat meat"), "yes_no", ("yes",))
WINDOWS = Question("is the flat warm?", ("yes", "warm"), "yes_no", ("no", "not"))
UNTOLD = Question("what's my cat called?", None, "never_told")
PIN = Question("what's my pin?", None, "forgotten", ("4821",))


@pytest.mark.parametrize(
    "reply, question",
    [
        ("Your dog is called BISCUIT.", DOG),
        ("Biscuit's his name", DOG),
        ("It is on May 13, at nine.", DATE),
        ("It's on the 13th of May.", DATE),
        ("You need 12 eggs.", TWELVE),
        ("Twelve.", TWELVE),
        ("It is on Friday.", MOVED),
        ("No, you can't.", HAM),
        ("You do not eat meat.", HAM),
        ("You are a Vegetarian.", HAM),
        ("Yes, it is.", WINDOWS),
        ("You haven't told me what your cat is called.", UNTOLD),
        ("Sorry, I don’t know that.", UNTOLD),
        ("You asked me to forget it.", PIN),
    ],
)
def test_correct(reply, question):
    assert correct(reply, question)


@pytest.mark.parametrize(
    "reply, question",
    [
        ("", DOG),
        ("Your dog is called Bruno.", DOG),
        ("Your dog is called Biscuits.", DOG),
        ("You have not told me about Biscuit.", DOG),
        ("It is on 13 June.", DATE),
        ("You need 120 eggs.", TWELVE),
        ("You need 12.5 eggs.", TWELVE),
        ("It is on Thursday or Friday.", MOVED),
        ("Yes, no problem.", HAM),
        ("Nothing is better than ham.", HAM),
        ("It isn't warm.", WINDOWS),
        ("Your cat is called Biscuit.", UNTOLD),
        ("", UNTOLD),
        ("I don't know, perhaps 4821.", PIN),
        ("Your PIN is 1111.", PIN),
    ],
)
def test_not_correct(reply, question):
    assert not correct(reply, question)


@pytest.mark.parametrize(
    "phrase, text, expected",
    [
        ("9", "at 9:00", True),
        ("9", "at 9 am", True),
        ("9", "at 9am", True),
        ("9", "at 9:30", False),
        ("9", "it costs 4.9", False),
        ("4", "it costs 4.", True),
        ("4.2", "It is 4.2 m.", True),
        ("1200", "it is £1,200.", True),
        ("20 mg", "take 20mg a day", True),
        ("parsnip!99", 'It is "parsnip!99".', True),
        ("no", "nobody knows", False),
        ("not", "it isn’t", True),
    ],
)
def test_stands(phrase, text, expected):
    assert stands(phrase, text) == expected


@pytest.mark.parametrize(
    "reply",
    [
        "You have not told me.",
        "You haven't told me that yet.",
        "you've not told me your cat's name",
        "You never told me that.",
        "You didn't tell me where he lives.",
        "You have never actually mentioned it.",
        "You haven't mentioned a cat.",
        "You did not say.",
        "I don't know.",
        "I do not know what your cat is called.",
        "I really don't know",
        "Don't know, sorry.",
        "Sorry, don't know.",
        "I'm not sure.",
        "I have not been told that.",
        "I wasn't told.",
        "That hasn't been mentioned.",
        "I don't have that information.",
        "I have no idea.",
        "I can't remember that.",
        "I don't remember.",
        "You asked me to forget that.",
        "I have forgotten it, as you asked.",
    ],
)
def test_says_not_told(reply):
    assert says_not_told(reply)


@pytest.mark.parametrize(
    "reply",
    [
        "You told me that it is Biscuit.",
        "She doesn't know about the party.",
        "You do not eat meat.",
        "He is not allowed upstairs.",
        "I don't have a favourite fruit.",
        "There are no cats in the house.",
        "You should not forget the milk.",
        "No, they don't know each other.",
        "He told you to bring snacks.",
    ],
)
def test_does_not_say_not_told(reply):
    assert not says_not_told(reply)
