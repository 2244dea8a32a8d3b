"""What matters in a retrofit: short runs that differ from one another in one thing.

    mlx-sleep models get smollm2 FOLDER
    python examples/ablations.py FOLDER --start mlx_sleep/adapters/smollm2 --out ablations
    python examples/ablations.py FOLDER --tokens 1500000 --out starts

Each run is `train_in_pytorch.py retrofit` with the options below and the same seed, so that all
see the same lives in the same order. With --start they go on from a trained adapter, with what it
has at the same blocks; without, they start from nothing, from the host's attention or from random
numbers, on the shortest lives that there are: something is told, the model sleeps, and is asked.
Then each is asked of lives that none was trained on. What was trained before is not trained again,
so that the script can be stopped. It ends with a table, and with ablations.json beside the runs.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch

from mlx_sleep.convert.torch.adapter import read_adapter
from mlx_sleep.convert.torch.base import BaseConfig, read_tokenizer, read_weights
from mlx_sleep.convert.torch.evaluate import predicted, whole
from mlx_sleep.convert.torch.retrofit import Retrofit
from mlx_sleep.lab.statistics import accuracy
from mlx_sleep.lab.tasks.curriculum import level_of, lives_of
from mlx_sleep.lab.tasks.life_batches import Source, stream
from mlx_sleep.training.refusals import REFUSAL, mark_refusals
from mlx_sleep.utils.errors import errors_in_one_line

RUNS = {
    "as it is": "",
    "low-rank changes too": "--lora-rank 16",
    "3 of the layers": "--before 10 18 26",
    "10 layers": "--before 4 6 8 10 14 16 18 20 22 26",
    "only the user's words folded": "--fold user",
    "from the host": "--init host",
    "from random numbers": "--init random",
}
# Stages of the curriculum, and learning rates: with --start, and without.
FURTHER = 1, ["--muon-lr", 2.5e-3, "--adamw-lr", 1e-3]
SHORT = 3, []
TOKENS = 3840  # of a batch to measure on
SEED = 1 << 20  # of the lives to measure on: that of no training


def train(out: Path, model: Path, options: Iterable[object]) -> dict:
    """What is said of the whole run in `out`: trained with these options, if it isn't yet."""
    if not (trained := trained_in(out)):
        trainer = Path(__file__).with_name("train_in_pytorch.py")
        command = [sys.executable, trainer, "retrofit", model, "--out", out, *options]
        command += ["--evaluate-every", 1e9]
        command += ["--resume"] if (out / "recipe.json").exists() else []
        if code := subprocess.run([str(part) for part in command]).returncode:
            sys.exit(code)  # it has said why
        trained = trained_in(out)
    if not trained:  # Ctrl-C stops a run with a checkpoint, and exit status 0
        sys.exit("stopped; the same command goes on")
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    seconds = max(row.get("seconds", 0) for row in rows)
    return {"tokens": trained["tokens"], "seconds": round(seconds)}


def trained_in(out: Path) -> dict | None:
    """What a whole run says of itself; None of one that was stopped, or never started."""
    path = out / "adapter_config.json"
    trained = json.loads(path.read_text())["trained"] if path.exists() else {}
    return trained if trained.get("figures") else None


def load(folder: Path, model: Path) -> Retrofit:
    """The adapter in `folder` on its base."""
    adapter, weights, _ = read_adapter(folder)
    found = Retrofit(
        BaseConfig.from_folder(model), read_weights(model), adapter, dtype=torch.bfloat16
    )
    found.load_state_dict(weights)
    return found


@torch.no_grad()
def measure(model: Retrofit, batches: Iterable[dict[str, np.ndarray]]) -> dict:
    """Values of which all tokens are right, teacher-forced, in the windows after the first; with
    S kept (accuracy, low, high, n) and with S = 0 in each window (zeroed)."""
    hits: list[np.ndarray] = []
    alone: list[np.ndarray] = []
    for arrays in batches:
        value = arrays["value"] & (arrays["weight"] > 0) & ~arrays["refusal"]
        value[:, 0] = False
        if not value.any():
            continue
        hits.append(whole(predicted(model, arrays), value))
        asked = value.any(-1).ravel()  # windows, each of which then stands alone
        first = {name: x.reshape(-1, 1, *x.shape[2:])[asked] for name, x in arrays.items()}
        marks = value.reshape(-1, 1, value.shape[-1])[asked]
        alone.append(whole(predicted(model, first), marks))
    if not hits:
        sys.exit("no question hangs on a value here; measure on more batches")
    right, zeroed = np.concatenate(hits), np.concatenate(alone)
    shares = accuracy(int(right.sum()), right.size)
    return {**shares, "n": right.size, "zeroed": float(zeroed.mean())}


def lives(
    model: Path, stage: int, batches: int, split: str = "valid", values: str = ""
) -> list[dict[str, np.ndarray]]:
    """Batches of lives in the wordings of one split, with its values or those of another."""
    opening = read_tokenizer(model).encode(REFUSAL, add_special_tokens=False).ids
    levels = [level_of(step, stage) for step in range(batches)]
    jobs = [(lives_of(step, level, TOKENS), level) for step, level in enumerate(levels)]
    source = Source(str(model / "tokenizer.json"), split, seed=SEED, values=values)
    made = stream(source, jobs, 0)
    return [{**arrays, "refusal": mark_refusals(arrays, opening)} for arrays in made]


def add_options(parser: argparse.ArgumentParser, runs: dict, tokens: int) -> None:
    parser.add_argument("model", type=Path, help="folder of the base model")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--tokens", type=int, default=tokens, help="of each run")
    parser.add_argument("--batch", type=int, default=2048)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--compile", action="store_true", help="torch.compile")
    parser.add_argument("--only", nargs="+", choices=runs)


def shared(options: argparse.Namespace) -> list[object]:
    """The trainer's options that `add_options` took, but for the tokens."""
    compiled = ["--compile"] * options.compile
    return ["--batch", options.batch, "--seed", options.seed, *compiled]


def table(rows: list[dict], path: Path) -> None:
    """Writes the rows, and prints them."""
    path.write_text(json.dumps(rows, indent=2) + "\n")
    print(f"\n{'':32}{'right':>8}{'95% interval':>16}{'n':>7}{'S zeroed':>10}{'tokens':>11}")
    for row in rows:
        between, tokens = f"{row['low']:.1%} to {row['high']:.1%}", row.get("tokens", 0)
        print(
            f"{row['what']:32}{row['accuracy']:8.1%}{between:>16}{row['n']:7}"
            f"{row['zeroed']:10.1%}{tokens or '':>11}"
        )


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add_options(parser, RUNS, 300_000)
    parser.add_argument("--start", type=Path, help="an adapter to go on from")
    parser.add_argument("--batches", type=int, default=40, help="to measure on")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    stage, rates = FURTHER if options.start else SHORT
    same = [*shared(options), "--tokens", options.tokens, "--shares", *[0] * stage, 1, *rates]
    same += ["--start", options.start] if options.start else []
    batches = lives(options.model, stage, options.batches)
    rows = []
    # A run from nothing is about its start; one from an adapter is not.
    usual = [name for name in RUNS if ("--init" in RUNS[name]) == (options.start is None)]
    for name in options.only or usual:
        out = options.out / name.replace(" ", "-").replace("'", "")
        trained = train(out, options.model, [*same, *RUNS[name].split()])
        figures = measure(load(out, options.model), batches)
        rows.append({"what": name, "options": RUNS[name], **trained, **figures})
    table(rows, options.out / "ablations.json")


if __name__ == "__main__":
    errors_in_one_line()
    main()
