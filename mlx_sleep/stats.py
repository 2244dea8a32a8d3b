"""The figures of a session."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Stats:
    """Counters of a session. Tokens and sleeps count over the whole life of its memory.

    window_tokens       tokens in the window, not yet consolidated
    window              tokens that the window can hold
    passes              N of the next sleep
    kv_bytes            bytes of the KV cache in use
    fast_weight_bytes   bytes of S, whatever it remembers
    tokens              tokens consolidated so far
    sleeps              sleeps so far
    prompt_tps          tokens a second at which the last turn was read; None before the first
    generation_tps      ... at which its reply came after the first token; None for less than two
    """

    window_tokens: int
    window: int
    passes: int
    kv_bytes: int
    fast_weight_bytes: int
    tokens: int
    sleeps: int
    prompt_tps: float | None = field(default=None, compare=False)
    generation_tps: float | None = field(default=None, compare=False)
