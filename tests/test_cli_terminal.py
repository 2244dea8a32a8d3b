"""The chat with a tiny random model, at a real pseudo-terminal."""

from __future__ import annotations

import re
import signal
import time

import pytest

from mlx_sleep.memory import show_memory
from tests.fakes import fake_folder
from tests.terminal import Terminal


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return fake_folder(tmp_path_factory.mktemp("models") / "tiny", window=400)


def test_terminal_idle_sleep_is_shown_and_a_key_cancels_it(model, tmp_path):
    options = ("--model", model, "--home", tmp_path, "--max-tokens", 12, "--idle", 1)
    with Terminal(*options, "--passes", 100) as terminal:
        terminal.wait_for(r"memory 'tiny': empty\n(.*\n)*>\s*window 0/400 tokens, KV cache 0 B")
        terminal.say("hello")
        terminal.wait_for(r"window \d\d/400 tokens, KV cache [\d.]+ KB, sleeps after 1 s")
        terminal.wait_for(r"sleeping: pass \d+/100, \d+%, about [\d.]+ s left")
        pressed = time.monotonic()
        terminal.type("x")
        terminal.wait_for(r"> x\s*sleep cancelled, nothing is lost")
        assert time.monotonic() - pressed < 1
        waiting = show_memory("tiny", tmp_path)
        assert waiting.header.sleeps == 0 and waiting.pending >= 10

        # A half-typed line keeps it awake; without one it tries again.
        end = time.monotonic() + 1.5
        while time.monotonic() < end:
            terminal.read(0.05)
        assert show_memory("tiny", tmp_path).header.sleeps == 0
        terminal.type("\x7f")
        said = rf"slept: {waiting.pending} tokens folded in 100 passes, KV cache cleared"
        terminal.wait_for(said + r" \([\d.]+ KB freed\)\n>")
        terminal.wait_for(r"window 0/400 tokens, KV cache 0 B")
        slept = show_memory("tiny", tmp_path)
        assert (slept.header.sleeps, slept.header.tokens) == (1, waiting.pending)
        terminal.say("/stats")
        assert terminal.leave("\x04") == 0
    with Terminal(*options) as terminal:
        terminal.wait_for(rf"memory 'tiny': {slept.header.tokens} tokens in 1 sleep\n(.*\n)*>\s*w")
        assert terminal.leave("/exit\r") == 0


def test_terminal_ctrl_c_cancels_the_reply_and_twice_leaves(model, tmp_path):
    options = ("--model", model, "--home", tmp_path, "--max-tokens", 100_000, "--idle", 0)
    with Terminal(*options, "--passes", 1) as terminal:
        terminal.wait_for(r">\s*window 0/400")
        terminal.type("hello\r")
        terminal.wait_for(r"> hello\n.{10}")
        terminal.type("\x03")
        terminal.wait_for(r"reply cancelled(.*\n)*>\s*window")
        assert terminal.leave("\x03") == 0
        assert "slept" in str(terminal.screen)
    assert show_memory("tiny", tmp_path).pending == 0


def test_terminal_ctrl_c_cancels_a_sleep_within_a_turn_and_its_progress_is_shown(model, tmp_path):
    options = ("--model", model, "--home", tmp_path, "--max-tokens", 8, "--idle", 0)
    with Terminal(*options, "--passes", 1000, "--window", 40) as terminal:
        terminal.wait_for(r">\s*window 0/40")
        terminal.say("hello")
        for text, outcome in (
            ("how are you doing today?", "sleep cancelled; what you typed was not taken"),
            ("word " * 20, "sleep cancelled; what you typed was not taken"),
        ):
            terminal.type(text + "\r")
            terminal.wait_for(r"sleeping: pass \d+/1000, \d+%, about [\d.]+ s left$")
            terminal.type("\x03")
            terminal.wait_for(rf"{outcome}(.*\n)*>\s*window \d+/40")
            assert "sleeping" not in str(terminal.screen)
            terminal.say("/stats")
            assert show_memory("tiny", tmp_path).header.sleeps == 0
        terminal.type("/forget\r")
        terminal.wait_for("forget all")
        terminal.type("y\n")
        terminal.wait_for(r"memory is empty(.*\n)*>\s*window 0/40")
        terminal.type("word " * 20 + "\r")  # more than a window at once: it is taken
        terminal.wait_for(r"sleeping: pass \d+/1000, \d+%, about [\d.]+ s left$")
        terminal.type("\x03")
        terminal.wait_for(r"reply cancelled; what was said stays said(.*\n)*>\s*window")
        pending = show_memory("tiny", tmp_path).pending
        assert pending > 100
        terminal.type("\x03")
        terminal.wait_for("sleeping: pass")
        assert terminal.leave("\x03") == 0
    assert show_memory("tiny", tmp_path).pending == pending


def test_terminal_ctrl_c_over_a_half_typed_line_is_about_that_line(model, tmp_path):
    with Terminal("--model", model, "--home", tmp_path, "--idle", 0) as terminal:
        terminal.wait_for(r">\s*window 0/400")
        for text in ("half", "another"):
            terminal.type(text)
            terminal.wait_for(rf"> {text}")
            terminal.type("\x03")
            terminal.wait_for(rf"> {text}\nCtrl-C again leaves(.*\n)*>\s*window")
        assert terminal.leave("\x03") == 0


def test_a_key_cancels_a_sleep_on_a_dumb_terminal_too(model, tmp_path):
    options = ("--model", model, "--home", tmp_path, "--max-tokens", 8, "--idle", 1)
    with Terminal(*options, "--passes", 20, term="dumb") as terminal:
        terminal.wait_for(r"/help lists(.*\n)*>")
        terminal.type("hello\r")
        terminal.wait_for(r"(?s)> hello\n.+\n>")
        for _ in range(8):  # a key comes more often than the idle time ends
            terminal.type("x")
            end = time.monotonic() + 0.5
            while time.monotonic() < end:
                terminal.read(0.05)
        assert show_memory("tiny", tmp_path).header.sleeps == 0
        assert "slept" not in str(terminal.screen)
        terminal.type("\x7f" * 8)
        terminal.wait_for(r"slept: \d+ tokens", 60)  # left alone, it does


def test_terminal_ctrl_c_while_leaving_keeps_the_journal(model, tmp_path):
    options = ("--model", model, "--home", tmp_path, "--max-tokens", 12, "--idle", 0)
    with Terminal(*options, "--passes", 1000) as terminal:
        terminal.wait_for(r">\s*window 0/400")
        terminal.say("hello")
        terminal.type("\x03")
        terminal.wait_for("Ctrl-C again leaves")
        terminal.wait_for(r">\s*window")
        terminal.type("\x03")
        terminal.wait_for("sleeping: pass")
        assert terminal.leave("\x03") == 0
        kept = re.search(r"left without sleeping; (\d+) tokens kept", str(terminal.screen))
    memory = show_memory("tiny", tmp_path)
    assert memory.header.sleeps == 0 and memory.pending == int(kept[1])


def test_terminal_kill_9_in_a_reply(model, tmp_path):
    options = ("--model", model, "--home", tmp_path, "--idle", 0)
    with Terminal(*options, "--max-tokens", 100_000) as terminal:
        terminal.wait_for(r">\s*window 0/400")
        terminal.type("hello\r")
        terminal.wait_for(r"> hello\n.{10}")
        terminal.process.send_signal(signal.SIGKILL)
        terminal.process.wait()
    killed = show_memory("tiny", tmp_path)
    # <|user|>, dummy space and "hello", <|assistant|>: the turn; a reply is written at its end.
    assert killed.problem is None and killed.header.tokens + killed.pending >= 8
    with Terminal(*options, "--max-tokens", 8) as terminal:
        # One token more: the reply that was being written has got its end.
        pending, tokens = killed.pending + 1, killed.header.tokens
        waits = f"{pending} tokens wait" if not tokens else f"{tokens} tokens in .* {pending} more"
        terminal.wait_for(f"memory 'tiny': {waits}")
        terminal.wait_for(r">\s*window")
        terminal.say("are you there?")
        assert terminal.leave("\x04") == 0
    assert show_memory("tiny", tmp_path).pending == 0


def test_terminal_forget_asks_and_a_second_chat_is_refused(refused, model, tmp_path):
    options = ("--model", model, "--home", tmp_path)
    with Terminal(*options, "--max-tokens", 8, "--idle", 0) as terminal:
        terminal.wait_for(r">\s*window 0/400")
        terminal.say("hello")
        assert "in use" in refused("chat", *options, stdin=b"hello\n")
        terminal.type("/forget\r")
        terminal.wait_for(r"forget all of memory 'tiny'\?")
        terminal.type("n\n")
        terminal.wait_for(r"nothing was forgotten(.*\n)*>\s*window \d\d/400")
        terminal.type("/forget\r")
        terminal.wait_for(r"(?s)nothing was forgotten.*forget all of memory 'tiny'\?")
        terminal.type("y\n")
        terminal.wait_for(r"memory is empty(.*\n)*>\s*window 0/400")
        assert terminal.leave("\x04") == 0
    memory = show_memory("tiny", tmp_path)
    assert memory.pending == 0 and memory.header.tokens == 0


def test_lines_history_completion_and_words_to_leave(model, tmp_path):
    options = ("--model", model, "--home", tmp_path, "--max-tokens", 4, "--idle", 0)
    with Terminal(*options) as terminal:
        terminal.wait_for(r">\s*window 0/400")
        terminal.type("one\\\r")
        terminal.wait_for(r"> one\n")
        terminal.type("two\x1b\rthree\r")
        terminal.wait_for(r"> one\n  two\n  three\n(.*\n)*cut at 4 tokens.*\n>\s*window")
        terminal.type("/sta\t\r")
        terminal.wait_for(r"> /stats\n(.*\n)*last reply .* tokens/s said(.*\n)*>\s*window")
        terminal.type("/SLEP\r")
        terminal.wait_for(r"did you mean /sleep\?(.*\n)*>\s*window")
        terminal.type("/set max_tokens 2\r")
        terminal.wait_for(r"max_tokens is 2(.*\n)*>\s*window")
        assert terminal.leave("exit\r") == 0
    history = tmp_path / "memories" / "tiny.history"
    assert history.stat().st_mode & 0o777 == 0o600 and "+three\n" in history.read_text()
    with Terminal(*options) as terminal:
        terminal.wait_for(r"tiny'(.*\n)*>\s*window")
        terminal.type("\x1b[A\x1b[A")
        terminal.wait_for(r"> /set max_tokens 2")
        terminal.type("\x15/forget now\r")
        terminal.wait_for(r"memory is empty(.*\n)*>\s*window")
        assert terminal.leave("/bye\r") == 0
    assert "three" not in history.read_text()
    with Terminal(*options, "--no-history") as terminal:
        terminal.wait_for(r"tiny'(.*\n)*>\s*window")
        assert terminal.leave("/quit\r") == 0
    assert "quit" not in history.read_text()


def test_a_narrow_status_is_short_and_ctrl_z_is_not_typed(model, tmp_path):
    options = ("--model", model, "--home", tmp_path, "--max-tokens", 4, "--idle", 60)
    with Terminal(*options, columns=40) as terminal:
        terminal.wait_for(r">\s*window 0/400 tokens")
        terminal.type("hello\r")
        terminal.wait_for(r"> hello\n(.*\n)*>\s*window \d\d/400 tokens, KV cache [\d.]+ KB")
        assert "sleeps after" not in str(terminal.screen)
        terminal.type("half\x1a")
        # It stops the process where a shell could start it again; here there is none.
        terminal.type(" a line")
        terminal.wait_for(r"> half a line")
        terminal.type("\x15")
        assert terminal.leave("\x04") == 0
