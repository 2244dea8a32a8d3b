"""The task depo: answers found by walking along the edges that the tokens tell."""

from __future__ import annotations

import numpy as np
import pytest

from mlx_sleep.lab.tasks.depo import ANSWER, PAD, Depo
from mlx_sleep.utils.errors import UserError

TASKS = {
    "one token a name": dict(nodes=(5, 9), hops=4, queries=3, name_tokens=1, alphabet=20, window=6),
    "two": dict(nodes=(4, 7), hops=3, queries=5, name_tokens=2, alphabet=6, window=14),
}


def edges_of(task, tokens):
    """(padding tokens on the left, {name: next name}) as the tokens of one context tell them."""
    n = task.name_tokens
    pads = next((i for i, t in enumerate(tokens) if t != PAD), len(tokens))
    told = tokens[pads:]
    assert len(told) % (2 * n) == 0 and PAD not in told
    pairs = [tuple(told[i : i + 2 * n]) for i in range(0, len(told), 2 * n)]
    return pads, {p[:n]: p[n:] for p in pairs}, pairs


def queries_of(task, final):
    n, size = task.name_tokens, task.query_tokens
    for i in range(0, len(final), size):
        k, start, answer = final[i] - 1, final[i + 1 : i + 1 + n], final[i + size - n : i + size]
        assert final[i + 1 + n] == ANSWER
        yield k, tuple(start), tuple(answer)


@pytest.mark.parametrize("name", TASKS)
def test_answers_are_k_hops_on(name):
    task = Depo(**TASKS[name])
    batch = task.batch("test", range(40))
    assert batch.context.shape == (40, task.windows, task.window)
    assert batch.final.shape == (40, task.final_tokens)
    sizes, hops = set(), []
    for context, final in zip(batch.context, batch.final.tolist(), strict=True):
        pads, following, pairs = edges_of(task, context.reshape(-1).tolist())
        assert len(following) == len(pairs)
        sizes.add(len(pairs))
        assert pads == (task.high - len(pairs)) * 2 * task.name_tokens
        # One cycle over all nodes.
        node, seen = pairs[0][: task.name_tokens], set()
        while node not in seen:
            seen.add(node)
            node = following[node]
        assert len(seen) == len(pairs) and node == pairs[0][: task.name_tokens]
        for k, start, answer in queries_of(task, final):
            for _ in range(k):
                start = following[start]
            assert start == answer
            hops.append(k)
    assert sizes == set(range(task.low, task.high + 1))
    assert set(hops) == set(range(1, task.hops + 1))
    assert batch.context.max() < task.vocab_size and batch.final.max() < task.vocab_size


def test_edges_are_in_random_order():
    task = Depo(nodes=(8, 8), hops=2, name_tokens=1, alphabet=30, window=4)
    follows = 0
    for context in task.batch("train", range(200)).context.reshape(200, -1).tolist():
        _, _, pairs = edges_of(task, context)
        follows += sum(a[1] == b[0] for a, b in zip(pairs, pairs[1:], strict=False))
    assert abs(follows / (200 * 7) - 1 / 7) < 0.05


def test_questions_and_labels():
    task = Depo(**TASKS["two"])
    question = task.batch("test", [3]).question[0].reshape(task.queries, -1)
    for q, row in enumerate(question.tolist()):
        assert row == [-1] * (task.query_tokens - 2) + [q, q]


def test_a_test_asks_one_question_of_the_difficulty():
    task = Depo(**TASKS["one token a name"])
    batch = task.batch("test", range(8), 3)
    assert batch.final.shape == batch.question.shape == (8, task.query_tokens)
    assert {k for f in batch.final.tolist() for k, _, _ in queries_of(task, f)} == {3}
    # The same cycles for every k, so that only the question changes.
    np.testing.assert_array_equal(batch.context, task.batch("test", range(8), 1).context)


def test_an_example_depends_on_seed_split_and_index_alone():
    task = Depo(**TASKS["two"])
    whole, some = task.batch("train", range(9)), task.batch("train", [8, 2])
    for a, b in ((whole.context, some.context), (whole.final, some.final)):
        np.testing.assert_array_equal(a[[8, 2]], b)
    assert (task.batch("valid", range(9)).context != whole.context).mean() > 0.3
    assert (Depo(**TASKS["two"], seed=2).batch("train", range(9)).final != whole.final).any()


@pytest.mark.parametrize("name", TASKS)
def test_retention_asks_about_the_first_window(name):
    task = Depo(**TASKS[name])
    batch = task.retention("test", range(6), 1, 5)
    assert batch.context.shape == (6, 6, task.window)
    for context, final in zip(batch.context.tolist(), batch.final.tolist(), strict=True):
        _, following, _ = edges_of(task, context[0])
        for _, start, answer in queries_of(task, final):
            assert following[start] == answer
        for later in context[1:]:
            _, others, _ = edges_of(task, later)
            assert len(others) == len(following) and not set(others) & set(following)
    with pytest.raises(UserError, match="cycle that fits one window"):
        task.retention("test", [0], 3, 1)


def test_the_papers_size():
    task = Depo()
    assert (task.windows, task.window, task.final_tokens) == (4, 75, 60)
    assert task.batch("test", range(2)).context.shape == (2, 4, 75)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"nodes": (1, 9)}, "whole number >= 2, not 1"),
        ({"nodes": (9, 5)}, "fewest, most"),
        ({"hops": 5}, "go round a cycle of 5"),
        ({"hops": 0}, "hops must be"),
        ({"alphabet": 8}, "too few for 9 nodes"),
        ({"window": 20}, "larger than the context of 18"),
        ({"window": 4}, "do not divide"),
        ({"queries": 0}, "queries"),
    ],
)
def test_bad_numbers(change, message):
    with pytest.raises(UserError, match=message):
        Depo(**{**TASKS["one token a name"], **change})


def test_more_hops_than_the_task_has():
    with pytest.raises(UserError, match="5 hops are more than the 4"):
        Depo(**TASKS["one token a name"]).batch("test", [0], 5)
