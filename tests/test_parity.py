"""`make parity`: its rows, and what it says without torch."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest

from mlx_sleep.utils.errors import UserError
from tests import parity
from tests.parity.__main__ import main


def test_without_torch(monkeypatch):
    monkeypatch.setattr(parity, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="parity needs torch; .*pip install 'mlx-sleep\\[torch\\]'"):
        main([])


def test_with_an_old_transformers(monkeypatch):
    monkeypatch.setattr(parity, "find_spec", lambda name: name)
    monkeypatch.setattr(parity, "version", lambda name: "5.9.1")
    with pytest.raises(UserError, match="parity needs transformers 5.24 or newer"):
        main([])


def test_rows(monkeypatch, capsys):
    def rows(module, architecture):
        yield parity.Case(architecture, "somebody's", "prefill", 2e-6, 1.0)

    module = SimpleNamespace(ARCHITECTURES=("sleep_hybrid", "ouro"))
    monkeypatch.setattr(parity, "rows", rows)
    monkeypatch.setattr(parity, "find_spec", lambda name: name)
    monkeypatch.setattr(parity, "version", lambda name: "5.24.0")
    monkeypatch.setattr(parity, "_modules", lambda: [module])
    main(["ouro", "--json"])
    result = json.loads(capsys.readouterr().out)
    assert result["command"] == "parity" and result["device"]
    assert result["rows"] == [
        {
            "architecture": "ouro",
            "reference": "somebody's",
            "case": "prefill",
            "max_logit_error": 2e-6,
            "greedy_agreement": 1.0,
        }
    ]
    with pytest.raises(UserError) as unknown:
        main(["uoro"])
    assert str(unknown.value) == "no comparison of 'uoro'; there are: sleep_hybrid, ouro"
