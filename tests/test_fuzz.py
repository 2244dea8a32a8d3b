"""Damaged files of every kind end in one line, or are accepted for a reason (tests/fuzz)."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from random import Random

import pytest

from tests.fuzz.__main__ import run
from tests.fuzz.targets import FAULTS, TARGETS

COUNT = 300
KINDS = [kind for kind in TARGETS if kind != "bin" or find_spec("torch")]


@pytest.fixture(scope="module")
def results():
    """Of all kinds, two at a time."""
    with ThreadPoolExecutor(2) as pool:
        found = pool.map(lambda kind: run(kind, list(range(COUNT))), KINDS)
        return dict(zip(KINDS, found, strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_no_signal_no_traceback_and_no_accepted_nonsense(results, kind):
    assert results[kind].faults == []
    counts = results[kind].counts
    # Much of a database is room that nothing is read from.
    assert counts.total() == COUNT and counts["refused"] > COUNT // (6 if kind == "store" else 4)


def test_faults_are_found():
    found = run("planted", list(range(12)), seconds=3)
    planted = {n: Random(f"planted/0/{n}").choice(FAULTS) for n in range(12)}
    assert set(planted.values()) == set(FAULTS)
    said = {
        "signal": "SIGSEGV",
        "traceback": "TypeError at targets.py",
        "nonsense": "accepted: planted",
        "two lines": "a message of several lines",
        "no end": "not done after 3 s",
    }
    faults = dict(found.faults)
    assert faults.keys() == {n for n, fault in planted.items() if fault != "none"}
    assert all(faults[n].startswith(said[planted[n]]) for n in faults)
    assert found.counts == {"accepted": list(planted.values()).count("none")}
