"""The task rule110: labels against the rule's table, cell by cell; batches; bad numbers."""

from __future__ import annotations

import numpy as np
import pytest

from mlx_sleep.lab.tasks.rule110 import ASK, Rule110
from mlx_sleep.lab.tasks.synthetic import draws
from mlx_sleep.utils.errors import UserError

# Wolfram's numbering: the new cell under each neighbourhood, from the bits of 110.
TABLE = {(i >> 2 & 1, i >> 1 & 1, i & 1): 110 >> i & 1 for i in range(8)}


def first_bit(string, steps):
    cells = list(string)
    for _ in range(steps):
        n = len(cells)
        cells = [TABLE[cells[i - 1], cells[i], cells[(i + 1) % n]] for i in range(n)]
    return cells[0]


@pytest.mark.parametrize("width, strings, steps", [(5, 3, 1), (7, 2, 4), (24, 4, 32), (70, 2, 3)])
def test_labels_are_those_of_the_table(width, strings, steps):
    task = Rule110(width, strings)
    batch = task.batch("test", range(6), steps)
    assert batch.context.shape == (6, strings, width) and batch.mask is None
    assert (batch.final[:, 0] == ASK).all() and batch.final.shape == (6, task.final_tokens)
    for context, final in zip(batch.context.tolist(), batch.final.tolist(), strict=True):
        assert final[1:] == [first_bit(string, steps) for string in context]
    assert (batch.question == [-1] + [0] * strings).all()  # one question: all labels or nothing


def test_an_example_depends_on_seed_split_and_index_alone():
    task = Rule110(11, 3)
    whole = task.batch("train", range(20), 3)
    some = task.batch("train", [7, 19, 0], 3)
    for a, b in zip(whole, some, strict=True):
        if a is not None:
            np.testing.assert_array_equal(a[[7, 19, 0]], b)
    # The strings are the same for every t.
    np.testing.assert_array_equal(whole.context, task.batch("train", range(20), 1).context)
    for other in (
        Rule110(11, 3, seed=1).batch("train", range(20), 3),
        task.batch("test", range(20), 3),
    ):
        assert (other.context != whole.context).mean() > 0.3


def test_bits_are_even_and_independent():
    bits = Rule110(16, 4).batch("train", range(2000), 1).context.reshape(2000, 64)
    assert abs(bits.mean(axis=0) - 0.5).max() < 0.06  # 5 standard deviations
    assert abs(np.corrcoef(bits.T) - np.eye(64)).max() < 0.12
    assert len(np.unique(bits, axis=0)) == 2000


def test_draws_are_fixed():
    """The test set is part of the results, so the numbers must not change with the code."""
    assert draws("x", [0, 5], 2).tolist() == FIXED


FIXED = [[0x73F767055A2EF98A, 0x6F58F603580BF618], [0x9EB529557FDD923A, 0x9169F4236F29CDAA]]


def test_a_window_may_hold_several_strings():
    task = Rule110(6, 4, window=12)
    batch = task.batch("test", range(3), 2)
    assert batch.context.shape == (3, 2, 12)
    strings = Rule110(6, 4).batch("test", range(3), 2)
    np.testing.assert_array_equal(batch.context.reshape(3, -1), strings.context.reshape(3, -1))


def test_retention_asks_for_the_first_string():
    task = Rule110(7, 3)
    short, long = (task.retention("test", range(5), 2, further) for further in (1, 9))
    assert short.context.shape == (5, 2, 7) and long.context.shape == (5, 10, 7)
    np.testing.assert_array_equal(short.context[:, 0], long.context[:, 0])
    np.testing.assert_array_equal(short.final, long.final)
    for context, final in zip(long.context.tolist(), long.final.tolist(), strict=True):
        assert final == [ASK, first_bit(context[0], 2)]
    assert (long.context[:, 1:] != long.context[:, :-1]).any(axis=2).all()  # fresh strings
    with pytest.raises(UserError, match="a whole string"):
        Rule110(8, 2, window=4).retention("test", [0], 1, 1)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((2, 4), "width"),
        ((8, 1), "strings must be a whole number >= 2, not 1"),
        ((8, 2, 17), "larger than the context of 16"),
        ((8, 2, 3), "do not divide"),
        ((8, 2, 1), "window must be"),
        ((8.0, 2), "width"),
    ],
)
def test_bad_numbers(arguments, message):
    with pytest.raises(UserError, match=message):
        Rule110(*arguments)


@pytest.mark.parametrize("steps", [0, -1, 1.5, True, None])
def test_bad_steps(steps):
    with pytest.raises(UserError, match="t .steps"):
        Rule110(8, 2).batch("test", [0], steps)
    with pytest.raises(ValueError, match="split"):
        Rule110(8, 2).batch("tests", [0], 1)
