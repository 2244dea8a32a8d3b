"""A process that runs the cases that it is told: `worker.py KIND SEED FOLDER`, numbers on stdin.

Before a case it writes `begin N`, after it `end N WHAT`; WHAT is refused, accepted, or a fault.
"""

from __future__ import annotations

import contextlib
import io
import os
import sys
import traceback
from pathlib import Path
from random import Random

from mlx_sleep.utils.errors import UserError

from .targets import PLANTED, TARGETS, Nonsense, copy


def main(kind: str, seed: str, folder: str) -> None:
    target = PLANTED if kind == "planted" else TARGETS[kind]
    report = os.fdopen(os.dup(1), "w")  # libraries print
    os.dup2(2, 1)
    sound = Path(folder) / "sound"
    if not sound.exists():
        sound.mkdir()
        target.prepare(sound)
        if kind != "planted":
            target.open(copy(sound, Path(folder) / "as-it-is"))  # what isn't damaged is accepted
    for line in sys.stdin:
        number = int(line)
        print("begin", number, file=report, flush=True)
        found = run(target, kind, seed, number, sound, Path(folder) / f"case-{os.getpid()}")
        print("end", number, " ".join(found.split()), file=report, flush=True)


def run(target, kind: str, seed: str, number: int, sound: Path, case: Path) -> str:
    """One case: what came of it."""
    copy(sound, case)
    target.damage(case, Random(f"{kind}/{seed}/{number}"))
    said = io.StringIO()
    try:
        with contextlib.redirect_stdout(said):
            target.open(case)
    except UserError as error:
        message = str(error)
        one_line = message and "\n" not in message and len(message) < 2000
        return "refused" if one_line else f"fault: a message of several lines: {message!r:.200}"
    except Nonsense as error:
        return f"fault: accepted: {error}"
    except BaseException as error:  # a panic of the tokenizers library is no Exception
        if isinstance(error, KeyboardInterrupt):
            raise
        at = traceback.extract_tb(error.__traceback__)
        ours = [f for f in at if "mlx_sleep" in f.filename or "convert/" in f.filename] or at
        where = f"{Path(ours[-1].filename).name}:{ours[-1].lineno}"
        return f"fault: {type(error).__name__} at {where}: {str(error)[:200]}"
    return "accepted"


if __name__ == "__main__":
    main(*sys.argv[1:])
