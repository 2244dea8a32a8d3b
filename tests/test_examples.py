"""The scripts in examples/ run, and the model remembers what it was told in them."""

from __future__ import annotations

import errno
import runpy
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from mlx_sleep.utils import errors
from mlx_sleep.utils.errors import UserError
from tests.test_retrofit import chat_folder

EXAMPLES = Path(__file__).parent.parent / "examples"


def run(name: str, *arguments: str) -> list[str]:
    result = subprocess.run(
        [sys.executable, str(EXAMPLES / name), *arguments],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.splitlines()


def test_remember():
    lines = run("remember.py")
    assert "0 bytes of KV cache left" in lines[2]
    assert lines[3] == "Your dog is called Baruno."
    assert lines[4] == "Your name is Zorvik."


def test_new_words():
    lines = run("new_words.py")
    answers = dict(zip(lines[9:-1:2], lines[10:-1:2], strict=True))
    assert answers == {
        "> What is a florp?": "A florp is a kind of spoon.",
        "> What is a florp made of?": "A florp is made of copper.",
        "> What does it mean to glimber?": "To glimber means to dance.",
        "> What does the word trindle mean?": "The word trindle means happy.",
    }
    assert lines[-1] == "4 of 4 right"


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda p: p.name)
def test_no_example_without_a_test(path):
    tests = [file.read_text() for file in Path(__file__).parent.glob("test_*.py")]
    assert any(f'"{path.name}"' in text for text in tests)


def test_serve_and_ask():
    pytest.importorskip("starlette", reason="the server is an extra: pip install -e '.[serve]'")
    pytest.importorskip("uvicorn")
    lines = run("serve_and_ask.py")
    assert lines[-1] == "Your dog is called Baruno." and "(slept: " in lines[-3]


@pytest.mark.slow
def test_retrofit_a_model(tmp_path):
    model = chat_folder(tmp_path / "model", "llama")
    options = [str(tmp_path / "out"), "--tokens", "600", "--layers", "1", "--batch", "300"]
    lines = run("retrofit_a_model.py", str(model), *options)
    assert lines[0].startswith("step 1,") and any("recall" in line for line in lines)
    assert (tmp_path / "out" / "adapters.safetensors").is_file()


# --- bad input -------------------------------------------------------------------------------

TORCH = pytest.mark.skipif(not find_spec("torch"), reason="needs torch")


@pytest.mark.parametrize(
    "arguments",
    [
        "new_words.py --model nowhere",
        "retrofit_a_model.py nowhere out",
        *(
            pytest.param(arguments, marks=TORCH)
            for arguments in (
                "train_in_pytorch.py retrofit nowhere --out out --tokens 9",
                "ablations.py nowhere --out out",
                "two_hops.py nowhere --start nowhere --out out",
                "generalization.py nowhere nowhere --out out.json",
                "forgetting.py nowhere nowhere --out out.json",
            )
        ),
    ],
    ids=lambda arguments: arguments.split()[0],
)
def test_a_folder_that_is_not_there_is_one_line(arguments, tmp_path, monkeypatch, capsys):
    name, *options = arguments.split()
    monkeypatch.setattr(sys, "excepthook", sys.__excepthook__)
    monkeypatch.setattr(sys, "argv", [name, *options])
    monkeypatch.syspath_prepend(EXAMPLES)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as error:
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
    sys.excepthook(error.type, error.value, error.tb)  # as Python does at the end
    shown = capsys.readouterr().err
    assert shown.startswith("error: ") and "nowhere" in shown and shown.count("\n") == 1


def test_what_ends_a_script(monkeypatch, capsys):
    monkeypatch.setattr(sys, "excepthook", None)
    errors.errors_in_one_line()
    full = OSError(errno.ENOSPC, "No space left on device", "runs/metrics.jsonl")
    for error in (full, ValueError("a bug")):
        sys.excepthook(type(error), error, None)
    first, *bug = capsys.readouterr().err.splitlines()
    assert first == "error: runs/metrics.jsonl: No space left on device; free some space there"
    assert bug == ["ValueError: a bug"]
