"""What more passes of a sleep buy a real model: questions that take two facts.

    mlx-sleep models get smollm2 FOLDER
    python examples/two_hops.py FOLDER --start mlx_sleep/adapters/smollm2 --out hops

"my sister is called Mira", "Mira drives a blue van", then a sleep, then "what does my sister
drive?". From one adapter on, each run trains on lives full of such questions: with N = 1, 2 and 4
passes of a sleep over blocks 6 to 26, with the same lives and as many tokens; and with N = 1 for as
many floating-point operations as N = 4 had. Then each is asked in names, values and wordings of the
split `test`. It ends with a table, and with two_hops.json beside the runs.
"""

import argparse
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import numpy as np
from ablations import FURTHER, add_options, load, measure, shared, table, train

from mlx_sleep.convert.torch.base import BaseConfig
from mlx_sleep.lab.tasks.life import Life, Window
from mlx_sleep.lab.tasks.life_batches import Source, arrays
from mlx_sleep.lab.tasks.life_examples import Example, examples
from mlx_sleep.lab.tasks.life_tokens import Pieces
from mlx_sleep.lab.tasks.world import Turn
from mlx_sleep.utils.errors import errors_in_one_line

ROWS = 10  # of a batch to measure on


@dataclass(frozen=True)
class Run:
    """passes: N. flops: N whose floating-point operations it is given (0: as many tokens)."""

    passes: int
    flops: int = 0


RUNS = {
    "N = 1": Run(1),
    "N = 2": Run(2),
    "N = 4": Run(4),
    "N = 1, FLOPs of N = 4": Run(1, flops=4),
}


def cost(passes: int, blocks: int, loop: tuple[int, int]) -> float:
    """Floating-point operations a token, over those of one pass."""
    return 1 + (passes - 1) * (loop[1] - loop[0]) / blocks


def asked(lives, example: Example) -> Life | None:
    """The windows of an example, and its question with the true answer in one more."""
    at = example.reply.casefold().find((example.value or "").casefold())
    if not example.value or at < 0:
        return None
    spans = ((at, at + len(example.value)),)
    question = lives.encoder.turn(Turn(example.question, example.reply, "ask", 1.0, spans))
    told = [Pieces.unlearnt(ids) for ids in example.windows]
    return Life(0, [Window(pieces=window) for window in (*told, question)])


def batches(lives, found: Iterable[Example]) -> list[dict[str, np.ndarray]]:
    """The examples with their true answers; those of a batch have as many windows."""
    usable = [life for example in found if (life := asked(lives, example))]
    usable.sort(key=lambda life: len(life.windows))
    alike = [list(group) for _, group in groupby(usable, lambda life: len(life.windows))]
    made = [arrays(group[i : i + ROWS]) for group in alike for i in range(0, len(group), ROWS)]
    return [{**batch, "refusal": np.zeros_like(batch["value"])} for batch in made]


def unseen(model: Path, count: int, window_tokens: int) -> list[dict[str, np.ndarray]]:
    """Batches of questions of two hops in wordings, names and values of the split `test`."""
    lives = Source(str(model / "tokenizer.json"), "test").lives()
    return batches(lives, examples(lives, "two_hop", count, window_tokens))


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add_options(parser, RUNS, 200_000)
    parser.add_argument("--questions", type=int, default=300, help="to measure on")
    parser.add_argument("--window-tokens", type=int, default=192, help="of what they are about")
    parser.add_argument("--start", type=Path, required=True, help="an adapter of one pass")
    parser.add_argument("--loop-range", type=int, nargs=2, default=(6, 27), metavar=("LO", "HI"))
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    blocks = BaseConfig.from_folder(options.model).num_hidden_layers
    same = [*shared(options), "--start", options.start, "--two-hop", 1, "--shares", 1]
    same += ["--loop-range", *options.loop_range, *FURTHER[1]]
    questions = unseen(options.model, options.questions, options.window_tokens)
    rows = []
    for name in options.only or RUNS:
        run = RUNS[name]
        tokens = round(options.tokens * cost(run.flops or 1, blocks, options.loop_range))
        out = options.out / name.replace(" = ", "").replace(", ", "-").replace(" ", "-")
        given = ["--passes", run.passes, "--tokens", tokens]
        trained = train(out, options.model, [*same, *given])
        spent = trained["tokens"] * cost(run.passes, blocks, options.loop_range)
        figures = measure(load(out, options.model), questions)
        rows.append({"what": name, "passes": run.passes, "cost": spent, **trained, **figures})
    table(rows, options.out / "two_hops.json")


if __name__ == "__main__":
    errors_in_one_line()
    main()
