"""What a sleep costs the memory of the sleeps before: recall of a fact, and what each head keeps.

    mlx-sleep models get smollm2 FOLDER
    python examples/forgetting.py FOLDER mlx_sleep/adapters/smollm2 --out forgetting.json

20 facts are told over five windows, with a sleep after each, and one is asked for. The same
question is asked of a model that slept over the fact's own window alone, over those before it too,
or over those after it. Then, for each sleep layer, how many of its heads still hold half of what a
window wrote when the next one has been slept over. The last needs no question: the delta rule is
linear in S, so that what is left of a window is what the next ones make of it with values of zero.
"""

import argparse
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from ablations import load, measure, table
from two_hops import batches

from mlx_sleep.convert.torch.loss import LifeBatch
from mlx_sleep.convert.torch.retrofit import Retrofit
from mlx_sleep.lab.tasks.life_batches import Source
from mlx_sleep.lab.tasks.life_examples import examples
from mlx_sleep.utils.errors import errors_in_one_line

CASE = "after_5_sleeps"
HISTORIES: dict[str, Callable[[list, int], list]] = {
    "its own window": lambda windows, age: windows[-age:][:1],
    "the windows before it too": lambda windows, age: windows[: len(windows) - age + 1],
    "the windows after it too": lambda windows, age: windows[-age:],
    "all": lambda windows, age: windows,
}


@torch.no_grad()
def kept(model: Retrofit, batch: dict[str, np.ndarray]) -> np.ndarray:
    """|S of the first window alone, after the second| over |it before|: [layers, heads], a mean
    over the rows. What the second window writes is left out, not what it erases."""
    rule, shares = model.rule, []
    windows, T = batch["tokens"].shape[1:]
    assert windows > 1, "nothing is slept over after the first window"

    def watched(q, k, v, g, beta, S):
        first, second = ([x[:, i * T :][:, :T] for x in (q, k, v, g, beta)] for i in (0, 1))
        told = rule(*first, S)[1]
        second[2] = torch.zeros_like(second[2])
        left = rule(*second, told)[1]
        shares.append((left.flatten(2).norm(dim=-1) / told.flatten(2).norm(dim=-1)).mean(0))
        return rule(q, k, v, g, beta, S)

    model.rule = watched
    try:
        ready = LifeBatch.from_arrays(batch, model.embedding.device, fold=model.adapter.fold)
        model.hidden(ready.tokens, ready.mask, writes=ready.writes)
    finally:
        model.rule = rule
    return torch.stack(shares).numpy()


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model", type=Path, help="folder of the base model")
    parser.add_argument("adapter", type=Path, help="of one pass")
    parser.add_argument("--out", type=Path, required=True, help="a .json file")
    parser.add_argument("--questions", type=int, default=100)
    parser.add_argument("--window-tokens", type=int, default=192)
    parser.add_argument("--split", default="test", choices=("train", "valid", "test"))
    options = parser.parse_args()
    model = load(options.adapter, options.model)
    lives = Source(str(options.model / "tokenizer.json"), options.split).lives()
    found = list(examples(lives, CASE, options.questions, options.window_tokens))
    rows = []
    for what, of in HISTORIES.items():
        these = [replace(e, windows=of(e.windows, e.age)) for e in found]
        rows.append({"what": what, **measure(model, batches(lives, these))})
    table(rows, options.out)
    shares = kept(model, batches(lives, found)[-1])
    layers = [
        {"before": before, "heads": len(row), "keep": int((row > 0.5).sum()), "most": row.max()}
        for before, row in zip(model.adapter.before, shares.astype(float), strict=True)
    ]
    print("\nsleep layer     heads that keep half of a window over the next    the best keeps")
    for row in layers:
        print(f"before {row['before']:<9}{row['keep']:>4} of {row['heads']:<40}{row['most']:.0%}")
    options.out.write_text(json.dumps({"recall": rows, "layers": layers}, indent=2) + "\n")


if __name__ == "__main__":
    errors_in_one_line()
    main()
