"""What a token costs after sleep, and with the whole KV cache kept (`mlx-sleep bench wake`)."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence

import mlx.core as mx

from ...models.base import State, fast_weight_bytes, kv_bytes
from ...sleep import consolidate
from ..statistics import ratio
from ..timing import interleave

PASSES = (1, 2, 4, 8)
HISTORIES = (512, 1024, 2048, 4096, 8192, 16384)
REPLY = 16  # tokens of which the mean time is taken


def rows(
    model,
    passes: Sequence[int] = PASSES,
    histories: Sequence[int] = HISTORIES,
    repeats: int = 5,
) -> Iterator[dict]:
    """For each history, a row for each N and one, with passes 0, for the model that never slept.

    passes            N: the history was slept over, window by window; 0: it is all in the KV cache
    history           tokens read before the answer; random ones, which cost the same as others
    ms_per_token      of single forward passes of a reply, the median over rounds
    ratio_to_n1       over that of N = 1, the median over rounds; None without N = 1
    ratio_to_full_kv  over that of the model that never slept
    state_bytes       bytes of S when the answer begins
    kv_bytes          bytes of the KV cache then
    """
    passes = sorted(set(passes))
    states = {N: model.init_state() for N in (*passes, 0)}
    read = 0
    for history in sorted(set(histories)):
        for start in range(read, history, model.sleep.window):
            count = min(model.sleep.window, history - start)
            tokens = mx.random.randint(0, model.args.vocab_size, (1, count))
            for N, state in states.items():
                if N:
                    states[N], _ = consolidate(model, state, tokens, N)
                else:
                    _, states[N] = model.hidden(tokens, state)
                    mx.eval(states[N])
        read = history
        reply = mx.random.randint(0, model.args.vocab_size, (REPLY + 1, 1, 1))
        clocks = [_reply_clock(model, state, reply) for state in states.values()]
        times = dict(zip(states, interleave(clocks, repeats), strict=True))
        for N, state in states.items():
            yield {
                "passes": N,
                "history": history,
                "ms_per_token": 1e3 * statistics.median(times[N]),
                "ratio_to_n1": ratio(times[N], times[1]) if 1 in times else None,
                "ratio_to_full_kv": ratio(times[N], times[0]),
                "state_bytes": fast_weight_bytes(state),
                "kv_bytes": kv_bytes(state),
            }


def plot(rows: list[dict], axes) -> None:
    """Milliseconds a token over tokens of history, a line for each N and for the whole KV."""
    for N in dict.fromkeys(row["passes"] for row in rows):
        line = [row for row in rows if row["passes"] == N]
        axes.plot(
            [row["history"] for row in line],
            [row["ms_per_token"] for row in line],
            marker="o",
            label=f"after sleep, N = {N}" if N else "whole KV cache",
        )
    axes.set_xscale("log", base=2)
    axes.set_ylim(bottom=0)
    axes.set_xlabel("tokens of history")
    axes.set_ylabel("milliseconds a token")
    axes.legend()


def _reply_clock(model, state: State, tokens: mx.array) -> Callable[[], float]:
    """Seconds a token of a reply [n, 1, 1] that begins at `state`; its first token isn't counted.

    The first one makes room in the KV cache, a copy of it that a chat makes once in 256 tokens.
    """

    def seconds() -> float:
        _, now = model(tokens[0], state)
        mx.eval(now)
        start = time.perf_counter()
        for token in tokens[1:]:
            logits, now = model(token, now)
            mx.eval(logits, now)
        return (time.perf_counter() - start) / (len(tokens) - 1)

    return seconds
