"""The config file: what it sets, what is stronger, and files that are wrong."""

from __future__ import annotations

import pytest

from mlx_sleep.cli import config_file, settings, slash
from mlx_sleep.cli.history import KEPT, open_history, remove_history
from mlx_sleep.cli.output import shorten
from mlx_sleep.session import Session
from mlx_sleep.utils.errors import UserError
from tests.fakes import fake_folder, fake_model, fake_tokenizer


@pytest.fixture
def file(tmp_path, monkeypatch):
    path = tmp_path / "folder" / "config.toml"
    monkeypatch.setenv("MLX_SLEEP_CONFIG", str(path))
    return path


def test_settings_are_kept_and_the_rest_of_the_file_stays(file):
    assert config_file.read() == {}
    config_file.put("model", 'a "model"')
    assert file.stat().st_mode & 0o777 == 0o600
    file.write_text("# mine\n" + file.read_text() + "idle = 5  # seconds")
    config_file.put("temp", "0.7")
    config_file.put("temp", "1")
    config_file.put("history", "off")
    text = file.read_text()
    assert text.startswith("# mine\n") and "# seconds\n" in text and text.count("temp") == 1
    assert config_file.read() == {
        "model": 'a "model"',
        "temp": 1,
        "idle": 5,
        "history": False,
    }
    config_file.put("temp", None)
    assert "temp" not in config_file.read()


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("frob", "1"),
        ("temp", "warm"),
        ("temp", "-1"),
        ("top_k", "1.5"),
        ("passes", "0"),
        ("history", "2"),
        ("idle", "1\nmodel = 2"),
    ],
)
def test_a_wrong_setting_is_refused_and_the_file_left(file, key, value):
    config_file.put("model", "embedded")
    before = file.read_bytes()
    with pytest.raises(UserError, match=key):
        config_file.put(key, value)
    assert file.read_bytes() == before


@pytest.mark.parametrize("raw", [b"temp = ", b"temp = 'x'", b"frob = 1", b"\xff", b"[temp]\n"])
def test_a_wrong_file_is_one_line(file, raw):
    file.parent.mkdir()
    file.write_bytes(raw)
    with pytest.raises(UserError, match="config.toml") as error:
        config_file.read()
    assert "\n" not in str(error.value)
    with pytest.raises(UserError):
        config_file.put("model", "embedded")
    assert file.read_bytes() == raw


def test_a_flag_is_stronger_than_the_environment_and_that_than_the_file(
    run, refused, tmp_path, monkeypatch
):
    monkeypatch.setenv("MLX_SLEEP_CONFIG", str(tmp_path / "config.toml"))
    one, two = (fake_folder(tmp_path / name, seed=i) for i, name in enumerate(("one", "two")))
    monkeypatch.setenv("MLX_SLEEP_HOME", str(tmp_path / "home"))
    config_file.put("model", str(one))
    config_file.put("memory", "filed")
    config_file.put("max_tokens", "2")
    run("chat", stdin=b"hello\n")
    assert "filed" in run("memory", "list")[1]
    monkeypatch.setenv("MLX_SLEEP_MODEL", str(two))
    assert "another model" in refused("chat", stdin=b"hello\n")
    assert run("chat", "--model", one, stdin=b"/memory\n")[0] == 0
    monkeypatch.setenv("MLX_SLEEP_MEMORY", "other")
    assert "memory 'other'" in run("chat", stdin=b"/memory\n")[1]
    file = tmp_path / "config.toml"
    file.write_text("frob = 1")
    assert "config.toml: frob" in refused("generate", "hello")
    assert run("config", "path")[1].strip() == str(file)
    assert run("chat", "--help")[0] == 0


def test_set():
    session = Session(fake_model(), fake_tokenizer())
    assert settings.change(session, "temp 0.7") == "temp is 0.7"
    assert settings.change(session, "top-p=0.9") == "top_p is 0.9"
    assert settings.change(session, "temperature 1.5") == "temp is 1.5"
    settings.change(session, "max_tokens 3")
    settings.change(session, "passes 3")
    settings.change(session, "seed 5")
    settings.change(session, "thinking auto")
    assert session.sampling.temp == 1.5 and session.sampling.top_p == 0.9
    assert (session.max_tokens, session.passes) == (3, 3)
    for wrong in (
        "frob 1",
        "temp",
        "temp warm",
        "temp -1",
        "top_k 2.5",
        "max_tokens 0",
        "passes 0",
        "thinking",
        "thinking loudly",
        "thinking on",  # the template has no switch
    ):
        with pytest.raises(UserError):
            settings.change(session, wrong)
    assert (session.max_tokens, session.passes, session.sampling.temp) == (3, 3, 1.5)
    assert "temp                1.5" in list(slash.answer(session, "/set", None))


def test_commands():
    known = {
        "/SLEEP": "/sleep",
        "/?": "/help",
        "/Quit": "/exit",
        "/bye": "/exit",
        "/set": "/set",
        "/set  temp 0.7": "/set temp 0.7",
        "/forget NOW": "/forget now",
        " /System  Be kind.\n\nBe  brief. ": "/system Be kind.\n\nBe  brief.",
        "/slep": "/slep",
    }
    assert {text: slash.command(text) for text in known} == known
    assert slash.command("/settle this, please") is slash.command("/usr/bin") is None
    session = Session(fake_model(), fake_tokenizer())
    (said,) = slash.answer(session, "/slep", None)
    assert said == "unknown command /slep; did you mean /sleep? /help lists them"
    texts = ('"a b"', "''", 'say "no"', '"', "")
    assert [slash._unquoted(text) for text in texts] == ["a b", "", 'say "no"', '"', ""]
    assert "/exit" in slash.completions("") and "temp" in slash.completions("/set ")
    assert set(slash.completions("/set thinking ")) == {"auto", "on", "off"}
    assert set(slash.COMMANDS) >= {"/sleep", "/set", "/help"}


def test_a_status_is_shortened_part_by_part():
    status = "window 134/256 tokens, KV cache 123 KB, sleeps after 10 s without a key"
    assert shorten(status, 80) == status
    assert shorten(status, 40) == "window 134/256 tokens, KV cache 123 KB"
    assert shorten("sleep cancelled, nothing is lost; again after 10 s", 40) == (
        "sleep cancelled, nothing is lost"
    )
    assert shorten("window 134", 5) == "wind…"


def test_history_is_private_and_bounded_and_never_in_the_way(tmp_path, capsys):
    file = tmp_path / "work.history"
    history = open_history(file)
    for line in ("one", "two\nlines"):
        history.append_string(line)
    assert file.stat().st_mode & 0o777 == 0o600
    assert list(open_history(file).load_history_strings()) == ["two\nlines", "one"]
    for i in range(2 * KEPT):
        history.store_string(str(i))
    kept = list(open_history(file).load_history_strings())
    assert len(kept) == KEPT and kept[0] == str(2 * KEPT - 1)
    remove_history(file)
    assert not file.exists()

    for wrong in (tmp_path, tmp_path / "link"):
        (tmp_path / "link").symlink_to(tmp_path / "elsewhere") if wrong != tmp_path else None
        open_history(wrong).append_string("kept nowhere")
        assert "no history" in capsys.readouterr().err
    assert not (tmp_path / "elsewhere").exists()
    open_history(None).append_string("kept nowhere")


def test_a_memory_is_rebuilt_with_the_model_of_the_file(file, tmp_path, run, monkeypatch):
    monkeypatch.delenv("MLX_SLEEP_MODEL", raising=False)
    model = fake_folder(tmp_path / "tiny", window=400)
    config_file.put("model", str(model))
    home = ("--home", tmp_path)
    assert run("chat", *home, "--max-tokens", 4, stdin=b"hello\n")[0] == 0
    out = run("memory", "rebuild", "tiny", *home)[1]
    assert f"rebuilt with {model}: 1 turn" in out
    file.write_text("wrong")
    assert run("memory", "list", *home)[0] == 0
    assert run("memory", "rebuild", "tiny", *home)[0] == 1
