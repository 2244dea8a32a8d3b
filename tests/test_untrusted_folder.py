"""A model folder with Python code in it: none of it runs, and nobody is asked."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time

import pytest

from mlx_sleep.convert.pipeline import convert
from mlx_sleep.memory import show_memory
from mlx_sleep.utils.errors import UserError
from tests.fakes import fake_folder
from tests.terminal import ENVIRONMENT, PROGRAM

MAPS = {
    "config.json": {"AutoConfig": "evil.Config", "AutoTokenizer": "evil.Tok"},
    "tokenizer_config.json": {"AutoTokenizer": [None, "evil.Tok"]},
}


@pytest.fixture
def folder(tmp_path):
    path = fake_folder(tmp_path / "evil-model", window=400)
    (path / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nraise SystemExit\n")
    for name, auto_map in MAPS.items():
        edit(path / name, auto_map=auto_map)
    return path


def edit(file, **fields):
    file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))


def chat(folder, home, lines: bytes):
    options = ["--model", folder, "--home", home, "--max-tokens", "4"]
    command = [*map(str, PROGRAM), "chat", *map(str, options)]
    return subprocess.run(command, input=lines, capture_output=True, env=ENVIRONMENT)


def test_a_chat_in_a_pipe_reads_its_lines_itself(folder, tmp_path):
    done = chat(folder, tmp_path / "home", b"y\n/stats\n")
    assert (done.returncode, done.stderr) == (0, b"")
    assert not (tmp_path / "ran").exists() and b"[y/N]" not in done.stdout
    # <|user|>, dummy space and "y", <|assistant|>, at most 4 tokens, <|end|>: it was a turn
    assert 5 <= show_memory("evil-model", tmp_path / "home").header.tokens <= 9


def test_a_tokenizer_that_needs_the_code_is_refused(folder, tmp_path):
    edit(folder / "tokenizer_config.json", tokenizer_class="NoSuchTokenizer")
    (folder / "tokenizer.json").unlink()
    (folder / "vocab.json").write_text("{}")
    done = chat(folder, tmp_path / "home", b"y\nhello\n")
    assert done.returncode == 1 and done.stderr.count(b"\n") == 1
    assert done.stderr.startswith(b"error: the tokenizer in ") and b"[y/N]" not in done.stdout
    assert not (tmp_path / "ran").exists()


def test_the_fields_that_name_code_are_not_copied(folder, tmp_path):
    convert(folder, tmp_path / "copy")
    for name in MAPS:
        kept = json.loads((folder / name).read_text())
        del kept["auto_map"]
        kept.pop("fingerprint", None)  # also of how the weights lie in their file
        copied = json.loads((tmp_path / "copy" / name).read_text())
        copied.pop("fingerprint", None)
        assert copied == kept
    assert not list((tmp_path / "copy").glob("*.py"))


def test_ids_without_rows_are_refused_by_convert_too(folder, tmp_path):
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary |= {f"word{i}": i for i in range(len(vocabulary), 400)}
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(UserError, match="its ids go up to 399, and the model has 360"):
        convert(folder, tmp_path / "copy")
    assert not (tmp_path / "copy").exists()


def test_a_line_of_a_megabyte_is_refused_at_once(folder, tmp_path):
    (folder / "evil.py").unlink()
    started = time.monotonic()
    done = chat(folder, tmp_path / "home", b"x" * 1_000_000 + b"\nhello\n")
    assert b"the length of the text is 1,000,000, more than 100,000" in done.stderr
    assert time.monotonic() - started < 60  # on a busy machine; not minutes


@pytest.mark.parametrize("after", [0.03, 0.1, 0.3])
def test_ctrl_c_while_it_starts(after, tmp_path):
    # A test run in the background hands an ignored SIGINT on.
    code = "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler); "
    code += "sys.argv = ['mlx-sleep', 'doctor']; from mlx_sleep_start import main; "
    code += "print('up', flush=True); main()"
    started = subprocess.Popen(
        [sys.executable, "-c", code],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=ENVIRONMENT,
        cwd=tmp_path,
    )
    assert started.stdout.readline() == b"up\n"
    time.sleep(after)
    started.send_signal(signal.SIGINT)
    _, errors = started.communicate()
    assert started.returncode in (130, 1) and b"Traceback" not in errors
