"""The command line with a tiny random model, in pipes. At a terminal: test_cli_terminal.py."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time

import pytest

from mlx_sleep.cli import COMMANDS, output, slash, sleeping
from mlx_sleep.cli.terminal import IdleSleeper
from mlx_sleep.memory import show_memory
from mlx_sleep.models.load import save
from mlx_sleep.models.sleep_hybrid import Model, ModelArgs
from mlx_sleep.sleep import SleepCancelled
from mlx_sleep.utils.errors import UserError
from tests.fakes import fake_config, fake_folder, fake_model
from tests.terminal import ENVIRONMENT, PROGRAM


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return fake_folder(tmp_path_factory.mktemp("models") / "tiny", window=400)


@pytest.fixture(scope="module")
def other_model(tmp_path_factory):
    return fake_folder(tmp_path_factory.mktemp("models") / "other", seed=1)


def test_pipe_each_line_is_a_turn_and_the_end_is_a_sleep(run, model, tmp_path):
    options = ("--model", model, "--home", tmp_path, "--max-tokens", 8)
    code, out, error = run("chat", *options, stdin=b"My cat is Zorvi.\n\n/stats\n/nosuch\n")
    assert (code, error) == (0, "")
    assert "\x1b" not in out and "of 400 tokens" in out
    assert "unknown command /nosuch; /help" in out
    memory = show_memory("tiny", tmp_path)
    assert memory.header.sleeps == 1 and memory.pending == 0
    # <|user|>, dummy space and 16 characters, <|assistant|>, at most 8 tokens, <|end|>
    assert 20 <= memory.header.tokens <= 28

    code, out, _ = run("chat", *options, stdin=b"/memory\n/exit\nnot read\n")
    assert out == f"memory 'tiny': {memory.header.tokens} tokens in 1 sleep\n"
    out = run("chat", *options, stdin=b"/forget\n")[1]
    assert "nobody can be asked" in out and "/forget now" in out
    assert show_memory("tiny", tmp_path).header.tokens == memory.header.tokens
    out = run("chat", *options, stdin=b"/forget me not, I said\n/forget zorvi\n/history\n")[1]
    assert "'me not, I said' was never said" in out and "1 turn of 1 would go" in out
    assert "nothing was forgotten: nobody can be asked here" in out and "> My cat is Zorvi." in out
    assert show_memory("tiny", tmp_path).header.tokens == memory.header.tokens
    shown = run("memory", "show", "tiny", "--text", "--home", tmp_path)[1]
    assert shown.startswith("> My cat is Zorvi.\n  ")
    found = run("memory", "search", "tiny", "zorvi", "--home", tmp_path)[1]
    assert found == "> My cat is Zorvi.\n"
    assert "tiny" in run("memory", "list", "--home", tmp_path)[1]
    options_ = options[:-2]
    code, out, _ = run("memory", "rebuild", "tiny", *options_, "--passes", 2)
    assert code == 0 and "rebuilt with" in out and re.search(r": 1 turn, \d+ tokens wait", out)
    assert run("chat", *options, stdin=b"/undo\n")[1] == "undone: My cat is Zorvi.\n"
    run("chat", *options, "--no-transcript", stdin=b"A secret.\n")
    assert "secret" not in run("memory", "show", "tiny", "--text", "--home", tmp_path)[1]
    code, _, error = run("memory", "rebuild", "tiny", *options_)
    assert code == 1 and "heard more than its transcript tells" in error
    assert run("chat", *options, stdin=b"/forget now\n")[1] == "forgotten: the memory is empty\n"
    assert show_memory("tiny", tmp_path).header.tokens == 0


def test_sleep_with_attention_only_ends_nothing(run, model, tmp_path):
    config = {**fake_config(window=400), "layer_types": ["attention"] * 4}
    tiny = Model(ModelArgs.from_dict(config))
    save(tmp_path / "attention", tiny, config, tokenizer_source=model)
    options = ("--model", tmp_path / "attention", "--home", tmp_path, "--max-tokens", 4)
    code, out, error = run("chat", *options, stdin=b"hello\n/sleep\n/memory\n")
    assert (code, error) == (0, "") and "no sleep: this model has attention layers only" in out
    assert "wait for the first sleep" in out.splitlines()[-1]


def test_pipe_non_utf8_is_refused_and_what_was_said_is_kept(refused, model, tmp_path):
    options = ("--model", model, "--home", tmp_path, "--max-tokens", 8)
    error = refused("chat", *options, stdin=b"hello\nna\xefve\n")
    assert "line 2" in error and "UTF-8" in error
    assert show_memory("tiny", tmp_path).pending >= 10
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
    assert b"nobody reads the output" in error and b"'tiny' keeps what was said" in error
    memory = show_memory("tiny", tmp_path)
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
    assert show_memory("tiny", tmp_path).pending >= 8


def test_generate(run, model, tmp_path):
    options = ("--model", model, "--home", tmp_path, "--max-tokens", 8, "--temp", 1)
    _, first, _ = run("generate", *options, "--prompt", "hello", "--seed", 7)
    assert run("generate", *options, "--prompt", "-", "--seed", 7, stdin=b"hello")[1] == first
    assert run("generate", *options, "--prompt", "hello", "--seed", 8)[1] != first
    assert run("generate", *options, "hello", "--seed", 7)[1] == first
    assert run("generate", *options, "-", "--seed", 7, stdin=b"hello")[1] == first
    said = json.loads(run("generate", *options, "hello", "--seed", 7, "--json")[1])
    assert output.clean(said["text"]) + "\n" == first and said["finish_reason"] in (
        "stop",
        "length",
    )
    assert said["prompt_tps"] > 0
    assert not list(tmp_path.iterdir())
    run("generate", *options, "--prompt", "hello", "--memory", "mine")
    assert show_memory("mine", tmp_path).header.sleeps == 1


def test_sleep(run, refused, model, tmp_path):
    options = ("--model", model, "--home", tmp_path)
    assert "no memory 'tiny'" in refused("sleep", *options)
    refused("chat", *options, "--max-tokens", 4, stdin=b"hello\n\xff\n")
    waiting = show_memory("tiny", tmp_path).pending
    _, out, _ = run("sleep", *options, "--passes", 3)
    assert re.match(
        rf"slept: {waiting} tokens folded in 3 passes, KV cache cleared \(.* freed", out
    )
    header = show_memory("tiny", tmp_path).header
    assert (header.tokens, header.sleeps, header.passes) == (waiting, 1, 3)
    assert "nothing to sleep over" in run("sleep", *options)[1]


def test_a_sleep_that_ctrl_c_cancels_says_so(run, refused, model, tmp_path, monkeypatch):
    options = ("--model", model, "--home", tmp_path)
    refused("chat", *options, "--max-tokens", 4, stdin=b"hello\n\xff\n")
    waiting = show_memory("tiny", tmp_path)
    with monkeypatch.context() as patch:
        interrupt = lambda self: signal.raise_signal(signal.SIGINT)  # noqa: E731
        patch.setattr(sleeping.SleepProgress, "step", interrupt)
        assert run("sleep", *options) == (130, "", "sleep cancelled; nothing is lost\n")
    assert show_memory("tiny", tmp_path) == waiting


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["chat", "--bogus"], "No such option: --bogus"),
        (["chat", "--idle", "soon"], "'--idle'"),
        (["generate", "a", "b"], "b"),
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
    assert run("memory", "fork", "tiny", "two", *home)[0] == 0
    assert run("memory", "export", "two", tmp_path / "file", *home)[0] == 0
    assert run("memory", "import", tmp_path / "file", "three", *home)[0] == 0
    listed = json.loads(run("memory", "list", "--json", *home)[1])["memories"]
    assert [memory["name"] for memory in listed] == ["three", "tiny", "two"]
    assert len({(memory["tokens"], memory["sleeps"]) for memory in listed}) == 1
    shown = json.loads(run("memory", "show", "two", "--json", *home)[1])
    assert shown in listed and shown["parent"] == "tiny" and shown["pending"] == 0
    assert "fork of" in run("memory", "show", "two", *home)[1]
    table = run("memory", "list", *home)[1].splitlines()
    assert table[0].split()[:2] == ["NAME", "SLEEPS"] and table[3].split()[:2] == ["two", "1"]

    assert run("memory", "rm", "two", *home, stdin=b"n\n")[0] == 1
    assert show_memory("two", tmp_path).header.sleeps == 1
    assert run("memory", "rm", "two", *home, stdin=b"y\n")[0] == 0
    assert run("memory", "rm", "three", "--yes", *home)[0] == 0
    assert "no memory 'two'" in refused("memory", "show", "two", *home)
    assert "exists already" in refused("memory", "fork", "tiny", "tiny", *home)


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
    assert "prompt is empty" in refused("generate", *options)
    assert "two prompts" in refused("generate", *options, "hello", "--prompt", "hello")
    assert "cannot name a memory" in refused("chat", *options, "--memory", "")
    assert "--idle" in refused("chat", *options, "--idle", -1)
    (tmp_path / "file").write_text("")
    assert "error" in refused("chat", "--model", model, "--home", tmp_path / "file")

    run("chat", *options, "--max-tokens", 4, stdin=b"hello\n")
    before = show_memory("tiny", tmp_path)
    others = ("--model", other_model, "--home", tmp_path)
    error = refused("chat", *others, "--memory", "tiny", stdin=b"hello\n")
    assert "another model" in error and show_memory("tiny", tmp_path) == before
    run("chat", *others, "--max-tokens", 4, stdin=b"hello\n")  # one of its own
    assert show_memory("other", tmp_path).header.model == str(other_model)


def test_version_and_help_are_quick_and_help_has_examples(run):
    assert run("--version")[1].startswith("mlx-sleep ")
    more = ["", "memory list", "memory show", "memory fork", "memory import", "memory rm"]
    asked = [["--version"], *([*c.split(), "--help"] for c in (*more, *COMMANDS))]
    code = (
        "import sys; from mlx_sleep.cli import main\n"
        f"for arguments in {asked}:\n"
        "    sys.argv = ['mlx-sleep', *arguments]\n"
        "    try: main()\n"
        "    except SystemExit as end: assert not end.code, arguments\n"
        "print([name for name in ('mlx.core', 'transformers') if name in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, env=ENVIRONMENT)
    assert out.stdout.splitlines()[-1] == b"[]", out.stderr
    for command in [*more, *COMMANDS]:
        code, out, _ = run(*command.split(), "--help")
        assert code == 0 and "Example" in out, command


def test_words():
    sizes = [output.size(n) for n in (0, 999, 1000, 9949, 9960, 123_456, 999_600, 1_234_567)]
    assert sizes == ["0 B", "999 B", "1.0 KB", "9.9 KB", "10 KB", "123 KB", "1.0 MB", "1.2 MB"]
    assert [output.count(n, "pass") for n in (1, 4)] == ["1 pass", "4 passes"]
    assert output.count(1, "token") == "1 token" and output.count(1234, "token") == "1,234 tokens"
    assert output.clean("a\x1b[31mb\x07\x9bc\n\té…") == "a[31mbc\n\té…"
    turned = "a\u202egpj.exe\u202c \u2066b\u2069\u200f\u061c\r"  # direction marks
    assert output.clean(turned) == "agpj.exe b"
    assert slash.command("/sleep") == "/sleep" and slash.command("/x y") is None
    assert slash.command(" /forget  now ") == "/forget now"
    assert slash.command("/forget  my cat") == "/forget my cat"
    assert slash.command("/history all") and slash.command("/sleep now") is None
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


def test_an_idle_sleep_that_may_not_be_says_why_and_asks_again():
    shown, reasons = [], iter(["on battery", "on battery"])
    session = Broken(UserError("slept"))
    args = session, 0.01, shown.append, shown.append, lambda: next(reasons, "")
    sleeper = IdleSleeper(*args)
    sleeper.start()
    sleeper._ended.wait(20)
    sleeper.stop()
    assert shown == ["no sleep now: on battery; /sleep does it all the same"] * 2 + ["error: slept"]


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
        while not sleeper.stopping:  # until the main thread waits
            time.sleep(0.01)
        signal.pthread_kill(main_thread, signal.SIGINT)
        interrupted.set()

    # A shell that runs the tests in the background has SIGINT ignored, and Python keeps to that.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        threading.Thread(target=interrupt).start()
        with pytest.raises(KeyboardInterrupt):
            sleeper.stop()
    finally:
        signal.signal(signal.SIGINT, before)
    assert finished.is_set()
