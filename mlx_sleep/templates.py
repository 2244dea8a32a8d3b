"""Chat templates, rendered in a process of their own with a bound on time, memory and output.

It takes a twentieth of a second to start, and is asked when a model is loaded, not in each turn.
"""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
import threading
import time
import weakref
from pathlib import Path
from typing import Any

from mlx_lm.tokenizer_utils import TokenizerWrapper

from .utils import limits
from .utils.errors import UserError

SECONDS = 60.0
"""To wait for the process: a busy machine may be late. Of the processor's time it takes less; see
`template_process.SECONDS`."""

_SCRIPT = Path(__file__).with_name("template_process.py")


class Renderer:
    """Renders templates one after the other, from any thread. The process starts when it is needed,
    and ends when it has been idle for some seconds, or with this object."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None

    def render(self, template: str, variables: dict[str, Any]) -> str:
        """The text; variables are JSON. UserError where the template fails or takes too long."""
        limits.check("the length of the chat template", len(template), limits.TEMPLATE_CHARACTERS)
        request = json.dumps({"template": template, "variables": variables}).encode() + b"\n"
        with self._lock:
            return self._ask(request)

    def _ask(self, request: bytes) -> str:
        try:
            self._send(request)
            reply = json.loads(self._line(SECONDS))
        except (BrokenPipeError, EOFError, ValueError) as error:
            self.close()
            raise UserError(
                "the chat template is not rendered within the time and memory allowed; mend the "
                "template, or use another model"
            ) from error
        except BaseException:  # Ctrl-C: a reply may still come, and is not the next one's
            self.close()
            raise
        if "error" in reply:
            raise UserError(f"the chat template fails: {reply['error']}")
        return reply["text"]

    def close(self) -> None:
        """Ends the process, if there is one."""
        if self._process is not None:
            self._end()
            self._process = None

    def _send(self, request: bytes) -> None:
        for fresh in (self._process is None, True):
            if fresh:
                self.close()
                self._start()
            assert self._process is not None and self._process.stdin is not None
            try:
                self._process.stdin.write(request)
                self._process.stdin.flush()
            except BrokenPipeError:
                if fresh:
                    raise
                continue  # it has been idle, and has ended
            if self._process.poll() is None:
                return

    def _start(self) -> None:
        # Isolated, and in a session of its own, so that Ctrl-C is not also the process's.
        self._process = subprocess.Popen(
            [sys.executable, "-I", str(_SCRIPT)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        self._end = weakref.finalize(self, _end, self._process)
        if self._line(SECONDS).strip() != b"ready":
            raise EOFError

    def _line(self, seconds: float) -> bytes:
        """The next line. EOFError where the process has ended, or takes longer."""
        assert self._process is not None and self._process.stdout is not None
        descriptor, end = self._process.stdout.fileno(), time.monotonic() + seconds
        read = b""
        while not read.endswith(b"\n"):
            left = end - time.monotonic()
            if left <= 0 or not select.select([descriptor], [], [], left)[0]:
                raise EOFError
            more = os.read(descriptor, 1 << 20)
            if not more:
                raise EOFError
            read += more
        return read


_renderer = Renderer()


def bounded(tokenizer: TokenizerWrapper) -> TokenizerWrapper:
    """A copy of mlx-lm's tokenizer whose `apply_chat_template` renders by a `Renderer`."""
    copy = object.__new__(type(tokenizer))
    copy.__dict__.update(tokenizer.__dict__)
    copy._tokenizer = _Bounded(tokenizer._tokenizer)
    return copy


class _Bounded:
    """A tokenizer of transformers with another `apply_chat_template`, which takes the arguments
    that mlx-sleep and mlx-lm give it."""

    def __init__(self, tokenizer: Any):
        self._inner = tokenizer

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def apply_chat_template(
        self,
        conversation: list[dict[str, Any]],
        *,
        tokenize: bool = True,
        add_generation_prompt: bool = False,
        return_dict: bool = False,
        **variables: Any,
    ) -> Any:
        template = self._inner.get_chat_template()
        if not isinstance(template, str):
            raise UserError("the chat template is no text")
        everything = {**self._inner.special_tokens_map, "tools": None, "documents": None}
        everything |= {**variables, "messages": conversation}
        everything["add_generation_prompt"] = add_generation_prompt
        text = _renderer.render(template, everything)
        return self._inner.encode(text, add_special_tokens=False) if tokenize else text


def _end(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.communicate()
