"""Verdicts: judging, with made-up implementations and clock, and the file that keeps them."""

from __future__ import annotations

import mlx_sleep  # isort: skip  (OpenBLAS before MLX)
import json
import multiprocessing
import os
import stat
from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest

from mlx_sleep.ops import calibration
from mlx_sleep.ops.verdicts import Result, Shape, Trial, Verdict, Verdicts, judge, machine

assert mlx_sleep  # imported for its effect
SHAPE = Shape("gated_delta", "prompt", (2, 2, 64, 64), (mx.bfloat16,) * 6)
VERDICT = Verdict("metal", {"metal": Result(1e-7, 0.5), "chunk": Result(barred="wrong")})


class Clock:
    """A clock that only implementations move."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now

    def form(self, seconds, change=lambda x: x):
        """Doubles its input, in so many seconds, and changes that."""

        def run(case):
            self.now += seconds
            return [change(2 * case[0])]

        return run


@pytest.fixture
def clock():
    return Clock()


def trial(tolerance=1e-4, **forms):
    case = [mx.array([1.0, -2.0])]
    expected = [np.array([2.0, -4.0], np.float32)]
    return Trial(forms, [(case, expected)], case, lambda case, results: case, tolerance)


def fail(_):
    raise RuntimeError("Unable to build metal library\nfrom source")


# --- judging -------------------------------------------------------------------------------


def test_the_fastest_of_the_right_ones_is_taken(clock):
    forms = {"metal": clock.form(2.0), "mlx.fast": clock.form(1.0), "chunk": clock.form(3.0)}
    verdict = judge(trial(**forms), clock)
    assert verdict.taken == "mlx.fast"
    assert verdict.results == {
        "metal": Result(0.0, 2.0),
        "mlx.fast": Result(0.0, 1.0),
        "chunk": Result(0.0, 3.0),
    }


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda x: x + 0.1, "wrong"),
        (lambda x: x * mx.array([1, np.nan]), "not finite"),
        (lambda x: x * np.inf, "not finite"),
        (lambda x: x[:1], "its result is [1], not [2]"),
        (fail, "Unable to build metal library from source"),
    ],
    ids=["wrong", "nan", "infinite", "misshapen", "raises"],
)
def test_what_is_not_right_is_barred_however_fast(clock, change, reason):
    verdict = judge(trial(metal=clock.form(0.1, change), chunk=clock.form(9.0)), clock)
    assert verdict.taken == "chunk" and verdict.results["metal"].barred == reason
    assert verdict.results["metal"].seconds is None


def test_one_wrong_case_of_several_bars(clock):
    both = trial(metal=clock.form(1.0, lambda x: mx.minimum(x, 5)), chunk=clock.form(2.0))
    large = ([mx.array([3.0])], [np.array([6.0], np.float32)])
    verdict = judge(replace(both, cases=[*both.cases, large]), clock)
    assert verdict.taken == "chunk" and verdict.results["metal"].error == pytest.approx(1 / 6)


def test_a_result_too_few_bars(clock):
    verdict = judge(trial(metal=lambda case: [], chunk=clock.form(1.0)), clock)
    assert verdict.taken == "chunk" and verdict.results["metal"].barred


def test_one_that_fails_only_later_is_barred(clock):
    calls = []

    def tired(case):
        calls.append(case)
        if len(calls) > 3:
            raise RuntimeError("out of memory")
        return [2 * case[0]]

    verdict = judge(trial(metal=tired, chunk=clock.form(1.0)), clock)
    assert verdict.taken == "chunk" and verdict.results["metal"].barred == "out of memory"


def test_the_last_is_taken_where_none_is_right(clock):
    verdict = judge(trial(metal=fail, chunk=clock.form(1.0, lambda x: 2 * x)), clock)
    assert verdict.taken == "chunk" and verdict.results["chunk"].barred == "wrong"


def test_the_best_of_several_timings_counts(clock):
    slow = iter([0.0, 50.0])  # not proved on yet, then the first timing is disturbed

    def disturbed(case):
        clock.now += next(slow, 1.0)
        return [2 * case[0]]

    verdict = judge(trial(metal=disturbed, chunk=clock.form(2.0)), clock)
    assert verdict.taken == "metal" and verdict.results["metal"].seconds == 1.0


@pytest.mark.parametrize(
    ("op", "dtype", "allowed"),
    [
        ("gated_delta", mx.float32, 1e-4),
        ("gated_delta", mx.float16, 2**-10),
        ("gated_delta", mx.bfloat16, 2**-7),
        ("gated_delta_net", mx.float32, 1e-4),
        ("gated_delta_net", mx.bfloat16, 2**-5),
        ("short_conv", mx.bfloat16, 2**-5),
    ],
)
def test_tolerances(clock, op, dtype, allowed):
    """One rounding of the largest entry passes, four times what is allowed doesn't."""
    shape = Shape(op, "prompt", (2, 2, 64, 64), (dtype, mx.float32))
    assert calibration.tolerance(shape) == allowed
    for factor, barred in ((0.5, ""), (4, "wrong")):
        form = clock.form(1.0, lambda x, by=factor * allowed: x * (1 + by))
        found = judge(trial(allowed, metal=form, chunk=clock.form(9.0)), clock)
        assert found.results["metal"].barred == barred


# --- keeping -------------------------------------------------------------------------------


@pytest.fixture
def file(tmp_path):
    return tmp_path / "cache" / "verdicts.json"


def test_a_verdict_is_kept_for_its_owner_alone(file):
    kept = Verdicts(file, "M1")
    assert kept.get(SHAPE) is None
    kept.put(SHAPE, VERDICT)
    assert kept.get(SHAPE) == VERDICT and Verdicts(file, "M1").get(SHAPE) == VERDICT
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert os.listdir(file.parent) == [file.name]
    assert list(Verdicts(file, "M1").all()) == [
        "gated_delta prompt 2x2x64x64 " + "bfloat16," * 5 + "bfloat16"
    ]


def test_it_is_for_no_other_shape_and_no_other_machine(file):
    Verdicts(file, "M1, mlx 0.32.4").put(SHAPE, VERDICT)
    newer = Verdicts(file, "M1, mlx 0.33.0")
    assert newer.get(SHAPE) is None
    newer.put(SHAPE, Verdict("chunk"))
    assert Verdicts(file, "M1, mlx 0.32.4").get(SHAPE) == VERDICT
    for change in ({"use": "token"}, {"sizes": (2, 4, 64, 64)}, {"dtypes": (mx.float32,) * 6}):
        assert newer.get(SHAPE._replace(**change)) is None


def test_a_machine_is_told_by_its_versions(monkeypatch):
    before = machine()
    assert f"mlx {mx.__version__}" in before and "mlx-sleep " in before
    monkeypatch.setattr("platform.mac_ver", lambda: ("26.1", ("", "", ""), "arm64"))
    assert "macOS 26.1" in machine()


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b'{"M1": {',
        b"\xff\xfe",
        b"[" * 100_000,
        b"[1, 2]",
        b'{"M1": 3}',
        b'{"M1": {"%s": 1}}' % str(SHAPE).encode(),
        b'{"M1": {"%s": {"taken": "metal"}}}' % str(SHAPE).encode(),
        b'{"M1": {"%s": {"taken": "metal", "results": {"metal": {"error": "no", "seconds": 1, '
        b'"barred": ""}}}}}' % str(SHAPE).encode(),
    ],
)
def test_a_damaged_or_foreign_file_is_ignored_and_rewritten(file, text):
    file.parent.mkdir()
    file.write_bytes(text)
    kept = Verdicts(file, "M1")
    assert kept.get(SHAPE) is None
    kept.put(SHAPE, VERDICT)
    assert Verdicts(file, "M1").get(SHAPE) == VERDICT


@pytest.mark.parametrize("broken", ["folder", "parent"])
def test_it_works_where_nothing_can_be_written(tmp_path, broken):
    """root may write into a read-only folder: a folder or a file stands in the way instead."""
    file = tmp_path / "verdicts.json"
    if broken == "folder":
        file.mkdir()
    else:
        (tmp_path / "cache").write_text("")
        file = tmp_path / "cache" / "verdicts.json"
    kept = Verdicts(file, "M1")
    kept.put(SHAPE, VERDICT)
    assert kept.get(SHAPE) == VERDICT and Verdicts(file, "M1").get(SHAPE) is None
    kept.drop(SHAPE)
    assert kept.get(SHAPE) is None


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_read_only_folder(tmp_path):
    tmp_path.chmod(0o500)
    kept = Verdicts(tmp_path / "verdicts.json", "M1")
    kept.put(SHAPE, VERDICT)
    assert kept.get(SHAPE) == VERDICT and not os.listdir(tmp_path)


def _put_many(file, first, barrier):
    kept = Verdicts(file, "M1")
    barrier.wait()
    for i in range(first, first + 20):
        kept.put(SHAPE._replace(sizes=(i, i, 64, 64)), VERDICT)


def test_two_processes_at_once_lose_nothing(file):
    context = multiprocessing.get_context("spawn")
    barrier = context.Barrier(2)
    both = [context.Process(target=_put_many, args=(file, n, barrier)) for n in (0, 100)]
    for process in both:
        process.start()
    for process in both:
        process.join()
        assert process.exitcode == 0
    assert len(json.loads(file.read_bytes())["M1"]) == 40
