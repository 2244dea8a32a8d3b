"""The command line with a tiny random model: in pipes, and at a real pseudo-terminal."""

from __future__ import annotations

import fcntl
import io
import json
import os
import pty
import re
import select
import signal
import struct
import subprocess
import sys
import termios
import threading
import time

import pytest
from fakes import fake_folder, fake_model

from mlx_sleep.cli import COMMANDS, common, main, slash
from mlx_sleep.cli.terminal import IdleSleeper
from mlx_sleep.errors import UserError
from mlx_sleep.memory import show_memory
from mlx_sleep.sleep import SleepCancelled

PROGRAM = [sys.executable, "-c", "from mlx_sleep.cli import main; main()"]
ENVIRONMENT = {**os.environ, "TERM": "xterm-256color"}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return fake_folder(tmp_path_factory.mktemp("models") / "tiny", window=400)


@pytest.fixture(scope="module")
def other_model(tmp_path_factory):
    return fake_folder(tmp_path_factory.mktemp("models") / "other", seed=1)


@pytest.fixture
def run(monkeypatch, capsys):
    """Runs the command line in this process: (exit code, standard output, standard error)."""

    def run(*arguments, stdin: bytes = b""):
        monkeypatch.setattr(sys, "argv", ["mlx-sleep", *map(str, arguments)])
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin)))
        with pytest.raises(SystemExit) as end:
            main()
        return end.value.code or 0, *capsys.readouterr()

    return run


@pytest.fixture
def refused(run):
    """Runs a command that must fail with one line on standard error, and gives that line."""

    def refused(*arguments, stdin: bytes = b""):
        code, _, error = run(*arguments, stdin=stdin)
        assert code == 1 and error.startswith("error: ") and error.count("\n") == 1
        return error

    return refused


class Screen:
    """The little of a terminal that prompt_toolkit and rich use: text, cursor moves, erasing."""

    ESCAPE = re.compile(r"\x1b\[([?>]?)([\d;]*)([A-Za-z])")

    def __init__(self):
        self.lines, self.row, self.column, self.rest = [[]], 0, 0, ""
        self.wants_position = False

    def feed(self, text: str):
        text, at = self.rest + text, 0
        while at < len(text):
            character = text[at]
            if character == "\x1b":
                match = self.ESCAPE.match(text, at)
                if match is None and len(text) - at < 16:
                    break  # the rest of it comes with the next read
                if match:
                    self._escape(match[1], match[2], match[3])
                at = match.end() if match else at + 1
                continue
            if character == "\r":
                self.column = 0
            elif character == "\n":
                self._move(self.row + 1, self.column)
            elif character == "\b":
                self.column -= 1
            elif character >= " ":
                line = self.lines[self.row]
                line += " " * (self.column + 1 - len(line))
                line[self.column] = character
                self.column += 1
            at += 1
        self.rest = text[at:]

    def _move(self, row, column):
        self.row, self.column = max(0, row), max(0, column)
        while len(self.lines) <= self.row:
            self.lines.append([])

    def _escape(self, private, digits, letter):
        number = int(digits.split(";")[0] or 0)
        if private:
            return
        if letter == "n":
            self.wants_position = True
        elif letter in "AB":
            self._move(self.row + max(1, number) * (1 if letter == "B" else -1), self.column)
        elif letter in "CD":
            self._move(self.row, self.column + max(1, number) * (1 if letter == "C" else -1))
        elif letter == "K":
            del self.lines[self.row][self.column :]
        elif letter == "J":
            del self.lines[self.row][self.column :]
            del self.lines[self.row + 1 :]

    def __str__(self):
        return "\n".join("".join(line).rstrip() for line in self.lines)


class Terminal:
    """A chat at a pseudo-terminal: type into it, wait for words on its screen."""

    def __init__(self, *arguments, term: str = "xterm-256color"):
        self.master, slave = pty.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 60, 250, 0, 0))

        def own_terminal():
            os.setsid()
            fcntl.ioctl(slave, termios.TIOCSCTTY, 0)

        self.process = subprocess.Popen(
            [*PROGRAM, "chat", *map(str, arguments)],
            stdin=slave,
            stdout=slave,
            stderr=slave,
            env={**ENVIRONMENT, "TERM": term},
            preexec_fn=own_terminal,
        )
        os.close(slave)
        self.screen = Screen()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        os.close(self.master)

    def type(self, text: str):
        os.write(self.master, text.encode())

    def read(self, seconds: float) -> bool:
        """Takes what has come within some time. False when the other side is gone."""
        if select.select([self.master], [], [], seconds)[0]:
            try:
                data = os.read(self.master, 65536)
            except OSError:
                return False
            self.screen.feed(data.decode(errors="replace"))
            if self.screen.wants_position:
                self.screen.wants_position = False
                self.type(f"\x1b[{self.screen.row + 1};{self.screen.column + 1}R")
            return bool(data)
        return True

    def wait_for(self, words: str, seconds: float = 20) -> str:
        """The screen once it matches a regular expression."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            alive = self.read(0.05)
            if re.search(words, str(self.screen)):
                return str(self.screen)
            if not alive:
                break
        raise AssertionError(f"no {words!r} on the screen:\n{self.screen}")

    def say(self, text: str):
        """A turn or command, and all that comes of it: an empty prompt and its status line."""
        self.type(text + "\r")
        self.wait_for(rf"(?s)> {re.escape(text)}\n.*\n>\s*window")

    def leave(self, keys: str = "", seconds: float = 20) -> int:
        """The exit code, once the process has ended by itself."""
        self.type(keys)
        end = time.monotonic() + seconds
        while self.process.poll() is None and time.monotonic() < end:
            self.read(0.05)
        while self.read(0) and select.select([self.master], [], [], 0)[0]:
            pass
        assert self.process.poll() is not None, f"still running:\n{self.screen}"
        return self.process.returncode


# --- in a pipe -----------------------------------------------------------------------------


def test_pipe_each_line_is_a_turn_and_the_end_is_a_sleep(run, model, tmp_path):
    options = ("--model", model, "--home", tmp_path, "--max-tokens", 8)
    code, out, error = run("chat", *options, stdin=b"My cat is Zorvi.\n\n/stats\n/nosuch\n")
    assert (code, error) == (0, "")
    assert "\x1b" not in out and "of 400 tokens" in out
    assert "unknown command /nosuch; /help" in out
    memory = show_memory("default", tmp_path)
    assert memory.header.sleeps == 1 and memory.pending == 0
    # <|user|>, dummy space and 16 characters, <|assistant|>, at most 8 tokens, <|end|>
    assert 20 <= memory.header.tokens <= 28

    code, out, _ = run("chat", *options, stdin=b"/memory\n/exit\nnot read\n")
    assert out == f"memory 'default': {memory.header.tokens} tokens in 1 sleep\n"
    run("chat", *options, stdin=b"/forget\n")
    assert show_memory("default", tmp_path).header.tokens == 0


def test_pipe_non_utf8_is_refused_and_what_was_said_is_kept(refused, model, tmp_path):
    options = ("--model", model, "--home", tmp_path, "--max-tokens", 8)
    error = refused("chat", *options, stdin=b"hello\nna\xefve\n")
    assert "line 2" in error and "UTF-8" in error
    assert show_memory("default", tmp_path).pending >= 10
    assert "UTF-8" in refused("generate", *options, "--prompt", "-", stdin=b"\xff")
    assert "UTF-8" in refused("generate", *options, "--prompt", "a\udcffb")


def test_pipe_that_nobody_reads_any_more(model, tmp_path):
    options = ["--model", model, "--home", tmp_path, "--max-tokens", "8"]
    process = subprocess.Popen(
        [*PROGRAM, "chat", *options],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=ENVIRONMENT,
    )
    process.stdout.close()
    _, error = process.communicate(b"hello\nyou\n")
    assert process.returncode != 0 and error.count(b"\n") == 1
    assert b"nobody reads the output" in error and b"'default' keeps what was said" in error
    memory = show_memory("default", tmp_path)
    assert memory.header.sleeps == 1 and memory.header.tokens >= 8 and memory.pending == 0


@pytest.mark.parametrize("closed", [(0,), (1,), (2,), (0, 1, 2)])
def test_closed_streams_are_the_null_device(model, tmp_path, closed):
    """Python has None for them, MLX cannot read a file numbered 0."""
    command = [*PROGRAM, "generate", "--model", model, "--home", tmp_path, "--max-tokens", "4"]
    done = subprocess.run(
        [*map(str, command), "--memory", "mine", "--prompt", "hello"],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        env=ENVIRONMENT,
        preexec_fn=lambda: [os.close(number) for number in closed],
    )
    assert (done.returncode, done.stderr) == (0, b"")
    assert show_memory("mine", tmp_path).header.sleeps == 1


def test_an_error_is_not_printed_to_standard_output_when_standard_error_is_closed():
    done = subprocess.run(
        [*PROGRAM, "generate", "--prompt", ""],
        stdout=subprocess.PIPE,
        env=ENVIRONMENT,
        preexec_fn=lambda: os.close(2),
    )
    assert (done.returncode, done.stdout) == (1, b"")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full here")
def test_output_on_a_full_disk_is_one_line_and_what_was_said_is_kept(model, tmp_path):
    options = ["--model", str(model), "--home", str(tmp_path), "--max-tokens", "8"]
    for command in (["chat", *options], ["memory", "list", "--home", str(tmp_path)]):
        with open("/dev/full", "wb") as full:
            done = subprocess.run(
                [*PROGRAM, *command],
                input=b"hello\n",
                stdout=full,
                stderr=subprocess.PIPE,
                env=ENVIRONMENT,
            )
        assert done.returncode == 1 and done.stderr.count(b"\n") == 1
        assert done.stderr.startswith(b"error: standard") and b"free some space" in done.stderr
    assert show_memory("default", tmp_path).pending >= 8


def test_generate(run, model, tmp_path):
    options = ("--model", model, "--home", tmp_path, "--max-tokens", 8, "--temp", 1)
    _, first, _ = run("generate", *options, "--prompt", "hello", "--seed", 7)
    assert run("generate", *options, "--prompt", "-", "--seed", 7, stdin=b"hello")[1] == first
    assert run("generate", *options, "--prompt", "hello", "--seed", 8)[1] != first
    assert not list(tmp_path.iterdir())
    run("generate", *options, "--prompt", "hello", "--memory", "mine")
    assert show_memory("mine", tmp_path).header.sleeps == 1


def test_sleep(run, refused, model, tmp_path):
    options = ("--model", model, "--home", tmp_path)
    assert "no memory 'default'" in refused("sleep", *options)
    refused("chat", *options, "--max-tokens", 4, stdin=b"hello\n\xff\n")
    waiting = show_memory("default", tmp_path).pending
    _, out, _ = run("sleep", *options, "--passes", 3)
    assert re.match(
        rf"slept: {waiting} tokens folded in 3 passes, KV cache cleared \(.* freed", out
    )
    header = show_memory("default", tmp_path).header
    assert (header.tokens, header.sleeps, header.passes) == (waiting, 1, 3)
    assert "nothing to sleep over" in run("sleep", *options)[1]


def test_a_sleep_that_ctrl_c_cancels_says_so(run, refused, model, tmp_path, monkeypatch):
    options = ("--model", model, "--home", tmp_path)
    refused("chat", *options, "--max-tokens", 4, stdin=b"hello\n\xff\n")
    waiting = show_memory("default", tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(common.Progress, "step", lambda self: signal.raise_signal(signal.SIGINT))
        assert run("sleep", *options) == (130, "", "sleep cancelled; nothing is lost\n")
    assert show_memory("default", tmp_path) == waiting


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["chat", "--bogus"], "No such option: --bogus"),
        (["chat", "--idle", "soon"], "'--idle'"),
        (["generate"], "'--prompt'"),
        (["chat", "--seed"], "--seed"),
        (["frob"], "'frob'"),
        (["memory", "frob"], "'frob'"),
    ],
)
def test_an_option_that_cannot_be_read_is_one_line(run, arguments, words):
    code, out, error = run(*arguments)
    assert (code, out) == (2, "")
    assert error.startswith("error: ") and error.count("\n") == 1
    assert words in error and error.endswith("--help\n")


def test_a_group_called_alone_shows_its_commands(run):
    for group, command in (([], "convert"), (["memory"], "list")):
        _, out, error = run(*group)
        assert command in out and error == ""


def test_memory_commands(run, refused, model, tmp_path):
    home = ("--home", tmp_path)
    assert "no memories" in run("memory", "list", *home)[1]
    run("chat", "--model", model, *home, "--max-tokens", 4, stdin=b"hello\n")
    assert run("memory", "fork", "default", "two", *home)[0] == 0
    assert run("memory", "export", "two", tmp_path / "file", *home)[0] == 0
    assert run("memory", "import", tmp_path / "file", "three", *home)[0] == 0
    listed = json.loads(run("memory", "list", "--json", *home)[1])["memories"]
    assert [memory["name"] for memory in listed] == ["default", "three", "two"]
    assert len({(memory["tokens"], memory["sleeps"]) for memory in listed}) == 1
    shown = json.loads(run("memory", "show", "two", "--json", *home)[1])
    assert shown in listed and shown["parent"] == "default" and shown["pending"] == 0
    assert "fork of" in run("memory", "show", "two", *home)[1]
    table = run("memory", "list", *home)[1].splitlines()
    assert table[0].split()[:2] == ["NAME", "SLEEPS"] and table[3].split()[:2] == ["two", "1"]

    assert run("memory", "rm", "two", *home, stdin=b"n\n")[0] == 1
    assert show_memory("two", tmp_path).header.sleeps == 1
    assert run("memory", "rm", "two", *home, stdin=b"y\n")[0] == 0
    assert run("memory", "rm", "three", "--yes", *home)[0] == 0
    assert "no memory 'two'" in refused("memory", "show", "two", *home)
    assert "exists already" in refused("memory", "fork", "default", "default", *home)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--passes", 0), "passes must be a whole number >= 1"),
        (("--window", 1), "window must be a whole number >= 2"),
        (("--max-tokens", 0), "max tokens must be at least 1"),
        (("--temp", -1), "temperature"),
        (("--temp", "nan"), "temperature"),
        (("--top-p", 1.5), "top-p"),
        (("--seed", -1), "seed"),
        (("--memory", "../etc"), "cannot name a memory"),
        (("--model", "no/such/folder"), "no model folder"),
    ],
)
def test_bad_options(refused, model, tmp_path, options, words):
    for command in (("chat",), ("generate", "--prompt", "hello")):
        assert words in refused(*command, "--model", model, "--home", tmp_path, *options)


def test_bad_input(refused, run, model, other_model, tmp_path):
    options = ("--model", model, "--home", tmp_path)
    assert "prompt is empty" in refused("generate", *options, "--prompt", " \n")
    assert "--idle" in refused("chat", *options, "--idle", -1)
    (tmp_path / "file").write_text("")
    assert "error" in refused("chat", "--model", model, "--home", tmp_path / "file")

    run("chat", *options, "--max-tokens", 4, stdin=b"hello\n")
    before = show_memory("default", tmp_path)
    error = refused("chat", "--model", other_model, "--home", tmp_path, stdin=b"hello\n")
    assert "another model" in error and show_memory("default", tmp_path) == before


def test_version_and_help_are_quick_and_help_has_examples(run):
    assert run("--version")[1].startswith("mlx-sleep ")
    code = "import sys; from mlx_sleep.cli import main; sys.argv = ['x', 'chat', '--help']\n"
    code += "try: main()\nexcept SystemExit: print('mlx.core' in sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, env=ENVIRONMENT)
    assert out.stdout.splitlines()[-1] == b"False"
    more = ["", "memory list", "memory show", "memory fork", "memory import", "memory rm"]
    for command in [*more, *COMMANDS]:
        code, out, _ = run(*command.split(), "--help")
        assert code == 0 and "Example" in out, command


def test_words():
    sizes = [common.size(n) for n in (0, 999, 1000, 9949, 9960, 123_456, 999_600, 1_234_567)]
    assert sizes == ["0 B", "999 B", "1.0 KB", "9.9 KB", "10 KB", "123 KB", "1.0 MB", "1.2 MB"]
    assert [common.count(n, "pass") for n in (1, 4)] == ["1 pass", "4 passes"]
    assert common.count(1, "token") == "1 token" and common.count(1234, "token") == "1,234 tokens"
    assert common.printable("a\x1b[31mb\x07\x9bc\n\té…") == "a[31mbc\n\té…"
    assert slash.command("/sleep") == "/sleep" and slash.command("/x y") == "/x"
    assert slash.command("/") == "/"
    assert slash.command("/etc/hosts is a file") is None
    assert slash.command("hello /sleep") is None


class Broken:
    """A session whose sleep raises."""

    passes, pending = 2, (1, 2)

    def __init__(self, error):
        self.model, self.error, self.calls = fake_model(), error, 0

    def sleep(self, on_pass, should_stop):
        self.calls += 1
        raise self.error


def test_an_idle_sleep_that_fails_is_shown_once_and_a_bug_is_raised():
    shown = []
    session = Broken(UserError("the disk is full"))
    sleeper = IdleSleeper(session, 0.01, shown.append, shown.append)
    sleeper.start()
    time.sleep(0.2)
    sleeper.stop()
    assert shown == ["error: the disk is full"] and session.calls == 1

    sleeper = IdleSleeper(Broken(KeyError("bug")), 0.01, shown.append, shown.append)
    sleeper.start()
    time.sleep(0.2)
    with pytest.raises(KeyError):
        sleeper.stop()

    session = Broken(KeyError("not reached"))
    sleeper = IdleSleeper(session, 0, shown.append, shown.append)  # 0 is never
    sleeper.start()
    time.sleep(0.1)
    sleeper.stop()
    assert session.calls == 0


def test_ctrl_c_never_leaves_the_session_to_two_threads():
    session = Broken(None)
    sleeping, interrupted, finished = (threading.Event() for _ in range(3))

    def sleep(on_pass, should_stop):
        sleeping.set()
        assert interrupted.wait(20)  # one block of a large model
        time.sleep(0.2)
        finished.set()
        raise SleepCancelled

    session.sleep = sleep
    sleeper = IdleSleeper(session, 0.01, lambda text: None, lambda text: None)
    sleeper.start()
    assert sleeping.wait(20)
    main_thread = threading.main_thread().ident

    def interrupt():
        while not sleeper._stopped:  # until the main thread waits
            time.sleep(0.01)
        signal.pthread_kill(main_thread, signal.SIGINT)
        interrupted.set()

    threading.Thread(target=interrupt).start()
    with pytest.raises(KeyboardInterrupt):
        sleeper.stop()
    assert finished.is_set()


# --- at a terminal -------------------------------------------------------------------------


def test_terminal_idle_sleep_is_shown_and_a_key_cancels_it(model, tmp_path):
    options = ("--model", model, "--home", tmp_path, "--max-tokens", 12, "--idle", 1)
    with Terminal(*options, "--passes", 100) as terminal:
        terminal.wait_for(r"memory 'default': empty\n(.*\n)*>\s*window 0/400 tokens, KV cache 0 B")
        terminal.say("hello")
        terminal.wait_for(r"window \d\d/400 tokens, KV cache [\d.]+ KB, sleeps after 1 s")
        terminal.wait_for(r"sleeping: pass \d+/100, \d+%, about [\d.]+ s left")
        pressed = time.monotonic()
        terminal.type("x")
        terminal.wait_for(r"> x\s*sleep cancelled, nothing is lost")
        assert time.monotonic() - pressed < 1
        waiting = show_memory("default", tmp_path)
        assert waiting.header.sleeps == 0 and waiting.pending >= 10

        # It tries again, and tells above the half-typed line, which is kept.
        said = rf"slept: {waiting.pending} tokens folded in 100 passes, KV cache cleared"
        terminal.wait_for(said + r" \([\d.]+ KB freed\)\n> x")
        terminal.wait_for(r"window 0/400 tokens, KV cache 0 B")
        slept = show_memory("default", tmp_path)
        assert (slept.header.sleeps, slept.header.tokens) == (1, waiting.pending)
        terminal.type("\x7f")
        terminal.say("/stats")
        assert terminal.leave("\x04") == 0
    with Terminal(*options) as terminal:
        terminal.wait_for(
            rf"memory 'default': {slept.header.tokens} tokens in 1 sleep\n(.*\n)*>\s*w"
        )
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
    assert show_memory("default", tmp_path).pending == 0


def test_terminal_ctrl_c_cancels_a_sleep_within_a_turn_and_its_progress_is_shown(model, tmp_path):
    options = ("--model", model, "--home", tmp_path, "--max-tokens", 8, "--idle", 0)
    with Terminal(*options, "--passes", 2000, "--window", 40) as terminal:
        terminal.wait_for(r">\s*window 0/40")
        terminal.say("hello")
        for text, outcome in (
            ("how are you doing today?", "sleep cancelled; what you typed was not taken"),
            ("word " * 20, "sleep cancelled; what you typed was not taken"),
        ):
            terminal.type(text + "\r")
            terminal.wait_for(r"sleeping: pass \d+/2000, \d+%, about [\d.]+ s left$")
            terminal.type("\x03")
            terminal.wait_for(rf"{outcome}(.*\n)*>\s*window \d+/40")
            assert "sleeping" not in str(terminal.screen)
            terminal.say("/stats")
            assert show_memory("default", tmp_path).header.sleeps == 0
        terminal.type("/forget\r")
        terminal.wait_for("forget all")
        terminal.type("y\n")
        terminal.wait_for(r"memory is empty(.*\n)*>\s*window 0/40")
        terminal.type("word " * 20 + "\r")  # more than a window at once: it is taken
        terminal.wait_for(r"sleeping: pass \d+/2000, \d+%, about [\d.]+ s left$")
        terminal.type("\x03")
        terminal.wait_for(r"reply cancelled; what was said stays said(.*\n)*>\s*window")
        pending = show_memory("default", tmp_path).pending
        assert pending > 100
        terminal.type("\x03")
        terminal.wait_for("sleeping: pass")
        assert terminal.leave("\x03") == 0
    assert show_memory("default", tmp_path).pending == pending


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
        assert show_memory("default", tmp_path).header.sleeps == 0
        assert "slept" not in str(terminal.screen)
        terminal.wait_for(r"slept: \d+ tokens", 60)  # left alone, it does


def test_terminal_ctrl_c_while_leaving_keeps_the_journal(model, tmp_path):
    options = ("--model", model, "--home", tmp_path, "--max-tokens", 12, "--idle", 0)
    with Terminal(*options, "--passes", 5000) as terminal:
        terminal.wait_for(r">\s*window 0/400")
        terminal.say("hello")
        terminal.type("\x03")
        terminal.wait_for("Ctrl-C again leaves")
        terminal.wait_for(r">\s*window")
        terminal.type("\x03")
        terminal.wait_for("sleeping: pass")
        assert terminal.leave("\x03") == 0
        kept = re.search(r"left without sleeping; (\d+) tokens kept", str(terminal.screen))
    memory = show_memory("default", tmp_path)
    assert memory.header.sleeps == 0 and memory.pending == int(kept[1])


def test_terminal_kill_9_in_a_reply(model, tmp_path):
    options = ("--model", model, "--home", tmp_path, "--idle", 0)
    with Terminal(*options, "--max-tokens", 100_000) as terminal:
        terminal.wait_for(r">\s*window 0/400")
        terminal.type("hello\r")
        terminal.wait_for(r"> hello\n.{10}")
        terminal.process.send_signal(signal.SIGKILL)
        terminal.process.wait()
    killed = show_memory("default", tmp_path)
    assert killed.problem is None and killed.header.tokens + killed.pending >= 9
    with Terminal(*options, "--max-tokens", 8) as terminal:
        # One token more: the reply that was being written has got its end.
        pending, tokens = killed.pending + 1, killed.header.tokens
        waits = f"{pending} tokens wait" if not tokens else f"{tokens} tokens in .* {pending} more"
        terminal.wait_for(f"memory 'default': {waits}")
        terminal.wait_for(r">\s*window")
        terminal.say("are you there?")
        assert terminal.leave("\x04") == 0
    assert show_memory("default", tmp_path).pending == 0


def test_terminal_forget_asks_and_a_second_chat_is_refused(refused, model, tmp_path):
    options = ("--model", model, "--home", tmp_path)
    with Terminal(*options, "--max-tokens", 8, "--idle", 0) as terminal:
        terminal.wait_for(r">\s*window 0/400")
        terminal.say("hello")
        assert "in use" in refused("chat", *options, stdin=b"hello\n")
        terminal.type("/forget\r")
        terminal.wait_for(r"forget all of memory 'default'\?")
        terminal.type("n\n")
        terminal.wait_for(r"nothing was forgotten(.*\n)*>\s*window \d\d/400")
        terminal.type("/forget\r")
        terminal.wait_for(r"(?s)nothing was forgotten.*forget all of memory 'default'\?")
        terminal.type("y\n")
        terminal.wait_for(r"memory is empty(.*\n)*>\s*window 0/400")
        assert terminal.leave("\x04") == 0
    memory = show_memory("default", tmp_path)
    assert memory.pending == 0 and memory.header.tokens == 0
