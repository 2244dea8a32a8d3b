"""Sleep layers for a model of yours, by the library: `mlx-sleep retrofit` in thirty lines.

    mlx-sleep models get smollm2
    python examples/retrofit_a_model.py FOLDER my-adapter --tokens 2000000

FOLDER is any Llama-, Qwen3- or Mistral-like chat model. On two CPU cores a million tokens of
SmolLM2-135M take hours, on a Mac's GPU or with examples/train_in_pytorch.py far less.
"""

import argparse
from pathlib import Path

from mlx_sleep import Session, load
from mlx_sleep.convert.insert import new_layers, plan
from mlx_sleep.lab.tasks.chat_source import ChatSource
from mlx_sleep.lab.tasks.curriculum import SHARES, batches, held_out
from mlx_sleep.models.base import SleepConfig
from mlx_sleep.models.weights import weights_digest
from mlx_sleep.training.retrofit import Retrofit, prepare
from mlx_sleep.training.schedule import Budget
from mlx_sleep.utils.errors import errors_in_one_line

errors_in_one_line()
parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("model", type=Path)
parser.add_argument("out", type=Path)
parser.add_argument("--tokens", type=int, default=2_000_000)
parser.add_argument("--layers", type=int, default=6)
parser.add_argument("--batch", type=int, default=4096, help="tokens a step")
options = parser.parse_args()

host, tokenizer, config = load(options.model)
tokenizer = tokenizer.to_train_with()  # thinking is off, where its template can turn it off
layers = plan(host, kind="delta_attention", count=options.layers)
sleep = {"passes": 1, "window": 512, "eviction": "hard"}
host.sleep = SleepConfig(**sleep, loop_range=(layers[0]["before"], host.num_layers))
model = prepare(host, layers, new_layers(host, layers))  # each starts as its block's attention

train, unseen = (ChatSource(tokenizer, split) for split in ("train", "valid"))
run = Retrofit(
    model,
    options.out,
    lambda jobs: batches(train, jobs, options.batch),
    Budget(tokens=options.tokens),
    {
        "sleep_layers": layers,
        "sleep": sleep,
        "base": {"weights": weights_digest(options.model), "name": "mine"},
        "trained": {"thinking": tokenizer.trained},
    },
    shares=SHARES,
    unseen=held_out(unseen, options.batch),
)


def show(row):
    print(", ".join(f"{name} {x:.3g}" for name, x in row.items() if isinstance(x, int | float)))


run.run(on_row=show)
with Session.open(options.model, adapter=options.out, max_tokens=20) as session:
    print(session.ask("My dog is called Baruno."))
    session.sleep()
    print(session.ask("What is my dog called?"))
