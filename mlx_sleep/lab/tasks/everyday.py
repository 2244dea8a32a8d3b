"""Ordinary messages to an assistant: short ones, as people type them, that memory has no part in.

A model that learns to remember must go on answering these as its base does. The base's replies
come from `convert/torch/chat.py` (--prompts); the frames and what fills them are in everyday.txt.

    python -m mlx_sleep.lab.tasks.everyday 3000 > prompts.txt
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator
from random import Random

from .noise import Style, typed
from .speech import sections

FILE = "everyday.txt"
_SLOT = re.compile(r"\{(\w+)\}")
# Kinds of messages, by how often people send them. "talk" has few frames, so few different ones.
KINDS = {"fact": 40, "how": 22, "write": 17, "work": 13, "talk": 8}


def prompts(seed: int = 0, careless: float = 0.35) -> Iterator[str]:
    """Different messages without end, or until hardly any are left; careless: share of writers."""
    lines, rng = sections(FILE), Random(f"everyday/{seed}")
    seen: set[str] = set()
    failures = 0
    while failures < 1000:
        kind = rng.choices(list(KINDS), list(KINDS.values()))[0]
        frame = rng.choice(lines[f"frames {kind}"])
        text = _SLOT.sub(lambda m: rng.choice(lines[m[1]]), frame)
        if rng.random() < 0.6:
            text = text[:1].upper() + text[1:]
        text = typed(rng, Style.draw(rng, careless), text, lower_values=False)
        key = re.sub(r"\W+", " ", text).casefold().strip()
        if key in seen:
            failures += 1
            continue
        failures = 0
        seen.add(key)
        yield text


def main() -> None:
    parser = argparse.ArgumentParser(prog="everyday", description="Prints ordinary messages.")
    parser.add_argument("count", type=int)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    for _, text in zip(range(args.count), prompts(args.seed), strict=False):
        print(text)


if __name__ == "__main__":
    main()
