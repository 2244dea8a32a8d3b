"""Records a chat as it runs, and draws it: docs/images/chat-light.svg and chat-dark.svg.

    python docs/scripts/record.py           # types chat_session.txt into mlx-sleep, with SmolLM2
    python docs/scripts/record.py --draw    # what follows from docs/results/chat.cast, again

Needs `pip install -e '.[docs]'`. docs/results/chat.cast keeps what the terminal was sent, with
the times, and chat.txt its text, from which the README's session is taken. The memory is a new
one in a folder that is removed in the end. Replies are greedy: the same model says the same.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from recording.cast import Cast
from recording.screen import transcript
from recording.svg import THEMES, draw
from recording.typist import record

from mlx_sleep.memory.location import data_dir

DOCS = Path(__file__).resolve().parents[1]
SCRIPT = Path(__file__).with_name("chat_session.txt")
CAST, TEXT = DOCS / "results" / "chat.cast", DOCS / "results" / "chat.txt"
README = DOCS.parent / "README.md"
SHELL = ["bash", "--noprofile", "--norc", "-i"]


def record_chat() -> Cast:
    """A shell in which chat_session.txt is typed. The user's models are there, and no memory."""
    program = Path(sys.executable).with_name("mlx-sleep")
    if not (data_dir() / "models" / "smollm2").is_dir():
        subprocess.run([program, "models", "get", "smollm2"], check=True)
    cast = Cast(columns=80, rows=24, title="mlx-sleep chat", pause=1.0)
    with tempfile.TemporaryDirectory() as home:
        os.symlink(data_dir() / "models", Path(home, "models"))
        env = {
            **os.environ,
            "MLX_SLEEP_HOME": home,
            "MLX_SLEEP_CONFIG": f"{home}/config.toml",
            "PATH": f"{program.parent}:{os.environ['PATH']}",
            "PS1": "$ ",
            "TERM": "xterm-256color",
            "HISTFILE": "",
            "BASH_SILENCE_DEPRECATION_WARNING": "1",  # macOS
        }
        record(SHELL, SCRIPT.read_text(encoding="utf-8"), cast, env, limit=180)
    return cast


def excerpt(text: str) -> str:
    """The lines of a session that the README has room for: what was said, and the first sleep."""
    slept = [line for line in text.splitlines() if line.startswith("slept:")]
    notes = {"this model was trained to sleep", "/help lists the commands", "> /exit", "$"}
    kept = [line for line in text.splitlines() if line not in notes | set(slept[1:])]
    return "".join(f"{line}\n" for line in kept)


def main() -> None:
    if "--draw" not in sys.argv:
        record_chat().write(CAST)
    cast = Cast.read(CAST)
    text = transcript(cast)
    TEXT.write_text(text, encoding="utf-8")
    for theme in THEMES:
        (DOCS / "images" / f"chat-{theme}.svg").write_text(draw(cast, theme), encoding="utf-8")
    page = README.read_text(encoding="utf-8")
    session = re.compile(r"(?<=^```\n)\$ mlx-sleep chat\n.*?(?=^```$)", re.DOTALL | re.MULTILINE)
    README.write_text(session.sub(lambda _: excerpt(text), page, count=1), encoding="utf-8")
    print(text, end="")


if __name__ == "__main__":
    main()
