"""Clients that talk to `mlx-sleep serve` while it is killed: is what was acknowledged kept?

    python -m tests.serve_load --memories 50 --clients 4 --kills 5 --seconds 120

Every reply that a client got whole counts its tokens. At the end each memory must hold at least
those, and at most those and the ones of requests that were cut off.
"""

from __future__ import annotations

import argparse
import json
import random
import signal
import subprocess
import tempfile
import threading
import time
from collections import defaultdict
from pathlib import Path

import httpx

from mlx_sleep.memory import show_memory
from tests.terminal import ENVIRONMENT, PROGRAM

LONGEST = 12  # tokens of a reply


class Serving:
    """`mlx-sleep serve` in a process of its own, on a port that stays the same."""

    def __init__(self, model, home, *options):
        # Below the ports that the system gives out: a killed server must get its own again.
        self.port = random.randrange(20_000, 30_000)
        self._command = [*PROGRAM, "serve", "--model", model, "--home", home, "--port", self.port]
        self._command += options
        self.process = None

    @property
    def url(self):
        return f"http://127.0.0.1:{self.port}"

    def start(self):
        self.process = subprocess.Popen(
            list(map(str, self._command)),
            env=ENVIRONMENT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self.model = self.process.stdout.readline().split()[2]
        return self

    def kill(self):
        self.process.kill()
        self.process.wait()

    def end(self, number=signal.SIGTERM):
        """Stops it: (exit code, the rest of its output)."""
        self.process.send_signal(number)
        rest = self.process.communicate(timeout=60)[0]
        return self.process.returncode, rest


class Clients:
    """Threads that talk, each request a new turn of a memory drawn at random."""

    def __init__(self, serving, memories, clients, seed):
        self.serving, self.memories = serving, memories
        self.kept = defaultdict(int)  # memory -> tokens that were acknowledged
        self.cut = defaultdict(int)  # memory -> tokens of requests that nobody answered
        self.answers, self.unanswered, self.refused, self.seconds = 0, 0, 0, []
        self._lock, self._over = threading.Lock(), threading.Event()
        self._threads = [
            threading.Thread(target=self._talk, args=(random.Random(seed + i),))
            for i in range(clients)
        ]
        for thread in self._threads:
            thread.start()

    def stop(self):
        self._over.set()
        for thread in self._threads:
            thread.join()

    def _talk(self, rng):
        with httpx.Client(timeout=60) as http:
            while not self._over.is_set():
                memory = f"user{rng.randrange(self.memories)}"
                self._ask(http, memory, f"My number is {rng.randrange(10**6)}.")

    def _ask(self, http, memory, text):
        body = {
            "model": self.serving.model,
            "messages": [{"role": "user", "content": text}],
            "max_tokens": LONGEST,
            "user": memory,
        }
        started = time.monotonic()
        try:
            answer = http.post(f"{self.serving.url}/v1/chat/completions", json=body)
            answered = answer.json()
        except httpx.ConnectError:  # it is being started
            time.sleep(0.1)
            return
        except (httpx.HTTPError, json.JSONDecodeError):
            with self._lock:
                # A turn is at most as many tokens as characters, and what stands around it.
                self.cut[memory] += len(text) + LONGEST + 16
                self.unanswered += 1
            return
        with self._lock:
            if answer.status_code in (429, 503):
                self.refused += 1
                return
            assert answer.status_code == 200, answered
            usage = answered["usage"]
            read = usage["prompt_tokens"] - usage["prompt_tokens_details"]["cached_tokens"]
            self.kept[memory] += read + usage["completion_tokens"] + 1  # and the reply's end
            self.answers += 1
            self.seconds.append(time.monotonic() - started)


def campaign(model, home, *, memories, clients, kills, seconds, seed=0, options=()):
    """Runs it: figures, and `lost`, the memories that hold too little or too much."""
    rng = random.Random(seed)
    serving = Serving(model, home, "--idle", 0.2, "--sleep-on-battery", *options).start()
    talking = Clients(serving, memories, clients, seed)
    done = 0
    try:
        for _ in range(kills):
            time.sleep(seconds / (kills + 1) * rng.uniform(0.7, 1.0))
            assert serving.process.poll() is None, serving.process.stdout.read()
            serving.kill()
            serving.start()
            done += 1
        time.sleep(seconds / (kills + 1))
    finally:
        talking.stop()
        code, rest = serving.end()
    held, sleeps, wrong = 0, 0, []
    for memory in {*talking.kept, *talking.cut}:
        try:
            listing = show_memory(memory, home)
        except Exception:
            listing = None
        tokens = listing.header.tokens + listing.pending if listing and listing.header else 0
        sleeps += listing.header.sleeps if listing and listing.header else 0
        least = talking.kept[memory]
        if not least <= tokens <= least + talking.cut[memory]:
            wrong.append((memory, tokens, least, talking.cut[memory]))
        held += tokens
    times = sorted(talking.seconds) or [0.0]
    return {
        "answers": talking.answers,
        "unanswered": talking.unanswered,
        "refused": talking.refused,
        "kills": done,
        "memories": len(talking.kept),
        "sleeps": sleeps,
        "tokens": held,
        "median_s": round(times[len(times) // 2], 3),
        "p95_s": round(times[int(0.95 * (len(times) - 1))], 3),
        "exit_code": code,
        "output": rest,
        "lost": wrong,
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="embedded")
    for name, default in (("memories", 50), ("clients", 4), ("kills", 5), ("seconds", 120)):
        parser.add_argument(f"--{name}", type=int, default=default)
    options = vars(parser.parse_args())
    with tempfile.TemporaryDirectory() as home:
        figures = campaign(options.pop("model"), Path(home), **options)
    print(json.dumps(figures, indent=2))
    raise SystemExit(1 if figures["lost"] else 0)


if __name__ == "__main__":
    main()
