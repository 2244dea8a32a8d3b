"""Chat models asked after sleep: in a session's tokens, row by row; and models by their names."""

from __future__ import annotations

import json
import shutil

import mlx.core as mx
import pytest
from typer.testing import CliRunner

from mlx_sleep import opening
from mlx_sleep.cli import app, model_names
from mlx_sleep.cli.model_names import Chosen, choose, folder_of
from mlx_sleep.lab.evaluate_chat import (
    _Chat,
    evaluate_base,
    evaluate_lives,
    evaluate_natural,
)
from mlx_sleep.lab.tasks.chat_source import ChatSource
from mlx_sleep.models.load import EMBEDDED, load
from mlx_sleep.session import Session
from mlx_sleep.utils.errors import UserError
from tests.test_adapter import adapter_folder
from tests.test_retrofit import chat_folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("chat")
    base = chat_folder(root / "model", "llama")
    loud, _, _ = adapter_folder(root / "loud", base, fold="user")

    def silence(weights):
        for name in ("sleep_layers.0.gain", "sleep_layers.1.gain"):
            weights[name] = mx.zeros_like(weights[name])

    silent, _, _ = adapter_folder(root / "silent", base, change=silence)
    return base, loud, silent


def test_several_conversations_at_once_are_sessions(folders, monkeypatch):
    """The same ids and the same S as one session each, whose replies end at other times."""
    base, loud, _ = folders
    model, tokenizer, _ = load(base, adapter=loud)
    said = [["my dog is called Rex", "hello"], ["the code is 4821 and my name is Zoe"]]
    later = [["i moved to Oslo"], ["thanks", "good night"]]
    chat, limit = _Chat(model, tokenizer), 5
    monkeypatch.setattr("mlx_sleep.lab.evaluate_chat.REPLY_TOKENS", limit)
    state = model.init_state(2)
    heard = []
    for w, window in enumerate((said, later)):
        heard.append(chat.converse(state, window, first=w == 0))
        state = chat.sleep(state, heard[-1], 2)
    for row in range(2):
        session = Session(model, tokenizer, passes=2, window=500, max_tokens=limit)
        for w, window in enumerate((said, later)):
            for text in window[row]:
                session.ask(text)
            assert list(session.pending) == heard[w][row]
            session.sleep()
        answer = session.ask("who am i?")
        mine = [{n: x[row : row + 1] for n, x in layer.items()} for layer in state]
        monkeypatch.setattr("mlx_sleep.lab.evaluate_chat.ANSWER_TOKENS", limit)
        prompt = tokenizer.turn("who am i?", first=False)
        (reply,) = chat.answers(mine, [prompt])
        assert reply == answer


def test_rows_about_lives_and_natural_conversations(folders):
    base, loud, _ = folders
    model, tokenizer, _ = load(base, adapter=loud)
    lives = ChatSource(tokenizer, "test").lives()
    (row,) = evaluate_lives(model, tokenizer, lives, cases=["never_told"], passes=[1], n=3, batch=2)
    assert (row["case"], row["n"], row["passes"]) == ("never_told", 3, 1)
    assert 0 <= row["low"] <= row["accuracy"] <= row["high"] <= 1
    old, *ages = evaluate_lives(
        model, tokenizer, lives, cases=["after_16_sleeps"], passes=[1], n=2, batch=2
    )
    assert old["n"] == 2 == sum(row["n"] for row in ages)
    assert all(row["case"].startswith("after_16_sleeps/age_") for row in ages)
    done = []
    rows = list(
        evaluate_natural(model, tokenizer, passes=[1], limit=2, on_done=lambda *at: done.append(at))
    )
    whole = next(row for row in rows if row["case"] == "natural")
    assert whole["n"] == sum(row["n"] for row in rows if row is not whole) == done[-1][0]
    assert done[-1][0] == done[-1][1] >= 10


def test_a_silent_adapter_is_its_base(folders):
    """Same greedy tokens and perplexity, memory empty or full; a loud one is further away."""
    base, loud, silent = folders
    figures = {}
    for name, adapter in (("silent", silent), ("loud", loud)):
        model, tokenizer, _ = load(base, adapter=adapter)
        lives = ChatSource(tokenizer, "test").lives()
        figures[name] = evaluate_base(model, tokenizer, lives, n=4, batch=3)
    memory, *rest = figures["silent"]
    assert [row["memory"] for row in figures["silent"]] == ["base", "empty", "full"]
    for row in rest:
        assert row["agreement"] == memory["agreement"] > 0.9
        assert row["perplexity"] == pytest.approx(memory["perplexity"], rel=1e-3)
    assert figures["loud"][1]["perplexity"] > memory["perplexity"]


def test_the_command(folders):
    base, loud, _ = folders
    options = ["--model", str(base), "--adapter-path", str(loud), "--n", "2", "--json"]
    asked = ["eval", "memory", *options, "--case", "never_told", "--passes", "1,2"]
    done = CliRunner().invoke(app, asked)
    assert done.exit_code == 0, done.exception
    rows = json.loads(done.stdout)["rows"]
    assert [(row["model"], row["passes"]) for row in rows] == [(str(base), 1), (str(base), 2)]
    done = CliRunner().invoke(app, ["eval", "base", *options])
    assert [row["memory"] for row in json.loads(done.stdout)["rows"]] == ["base", "empty", "full"]
    for wrong, message in (
        (["eval", "memory", *options, "--case", "all"], "unknown case"),
        (["eval", "base", "--model", str(base)], "no sleep layers|nothing to sleep into"),
        (["eval", "sleep"], "unknown task"),
    ):
        with pytest.raises(UserError, match=message):
            CliRunner().invoke(app, wrong, catch_exceptions=False)


# --- models by their names ---------------------------------------------------------------------


def test_which_model_is_meant(tmp_path, folders, monkeypatch, capsys):
    base, loud, _ = folders
    monkeypatch.setenv("MLX_SLEEP_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(model_names, "ADAPTERS", tmp_path / "adapters")
    assert choose(None) == Chosen(None, None, "embedded") and not capsys.readouterr().err
    with pytest.raises(UserError, match="models get smollm2"):
        choose("smollm2")
    with pytest.raises(UserError, match="needs --model"):
        choose(None, str(loud))
    assert choose(str(base), str(loud)) == Chosen(base, loud, str(base))
    own = tmp_path / "adapters" / "smollm2"
    own.mkdir(parents=True)
    assert choose(None).path is None  # the package has an adapter, but the base isn't here
    said = capsys.readouterr().err
    assert "models get smollm2" in said and said.count("\n") == 1
    folder_of("smollm2").mkdir(parents=True)
    assert choose(None) == choose("smollm2") == Chosen(folder_of("smollm2"), own, "smollm2")
    assert choose("smollm2", str(loud)).adapter == loud
    assert choose("embedded") == Chosen(None, None, "embedded")
    assert choose("embedded").open().path == EMBEDDED
    with pytest.raises(UserError, match="takes no adapter"):
        choose("embedded", str(loud))
    # A memory belongs to one model: what the demonstration remembers stays its own.
    assert choose(None).memory == "smollm2"
    assert choose("embedded").memory == "default"
    assert choose(str(base)).memory == base.name
    assert choose(str(base), str(loud)).memory == f"{base.name}-{loud.name}"
    assert choose("org/Tiny-0.1B", revision="v2").memory == "Tiny-0.1B-v2"
    monkeypatch.chdir(tmp_path)
    assert choose(".").memory == tmp_path.name and choose("/_ü").memory == "model"


def test_a_memory_of_the_package_s_model_names_no_folders(tmp_path, folders, monkeypatch):
    base, loud, _ = folders
    monkeypatch.setenv("MLX_SLEEP_HOME", str(tmp_path / "home"))
    for module, name in ((model_names, "ADAPTERS"), (opening, "OWN_ADAPTERS")):
        monkeypatch.setattr(module, name, tmp_path / "adapters")
    shutil.copytree(base, folder_of("smollm2"))
    shutil.copytree(loud, tmp_path / "adapters" / "smollm2")
    chosen = choose("smollm2")
    with Session.open(chosen.open(), "m", adapter=chosen.adapter) as session:
        assert session.memory.header.model == "smollm2"


def test_a_named_model_is_fetched_once(tmp_path, monkeypatch):
    monkeypatch.setenv("MLX_SLEEP_HOME", str(tmp_path))
    folder_of("smollm2").mkdir(parents=True)
    done = CliRunner().invoke(app, ["models", "get", "smollm2"])
    assert done.exit_code == 0 and "here already" in done.stdout
