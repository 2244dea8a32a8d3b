"""`mlx-sleep retrofit`: train sleep layers in a model that stays as it is."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

import typer

from ..utils.errors import UserError
from .model_names import choose
from .options import LocalFilesOnly, Numbers, Revision, numbers
from .output import line, note, progress_bar

if TYPE_CHECKING:  # it imports MLX
    from ..lab.tasks.life_batches import Source
    from ..models.base import SleepModel


def retrofit(
    model: Annotated[
        str,
        typer.Argument(
            help="The model's folder, its id on Hugging Face, or smollm2: Llama, Qwen or Mistral."
        ),
    ],
    out: Annotated[Path, typer.Option(help="The folder of the run, which becomes the adapter.")],
    hours: Annotated[float | None, typer.Option(help="Hours of training.")] = None,
    tokens: Annotated[
        int | None, typer.Option(help="Tokens of training, in place of hours.")
    ] = None,
    layers: Annotated[int, typer.Option(min=1, help="Sleep layers, evenly spaced.")] = 6,
    before: Annotated[
        Numbers | None,
        typer.Option(
            parser=numbers("--before", least=0, example="6,10,14"),
            metavar="N,...",
            help="The blocks to put them before instead, with commas.",
        ),
    ] = None,
    passes: Annotated[int, typer.Option(min=1, help="Passes of a sleep.")] = 1,
    window: Annotated[int, typer.Option(min=2, help="Tokens of a window, in use.")] = 512,
    fold: Annotated[
        str, typer.Option(help="What is folded into S: all, or user (not the replies).")
    ] = "all",
    init: Annotated[
        str, typer.Option(help="Where the layers start: host (as its attention) or random.")
    ] = "host",
    lora_rank: Annotated[
        int, typer.Option(min=0, help="Rank of changes of the model's attention; 0 is none.")
    ] = 0,
    batch: Annotated[int, typer.Option(min=64, help="Tokens a step, padding included.")] = 4096,
    ordinary: Annotated[
        int, typer.Option(min=0, help="Ordinary chats to sample from the model and hold it to.")
    ] = 200,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in OUT.")] = False,
    seed: Annotated[int, typer.Option(help="Of the lives and of the start.")] = 0,
    revision: Revision = None,
    local_files_only: LocalFilesOnly = False,
):
    """Train sleep layers in a model, so that it remembers what it is told.

    The model stays as it is. Ctrl-C stops with a checkpoint; --resume goes on to the same losses.
    OUT gets metrics.jsonl, and recall.png where matplotlib is installed: value tokens recalled in
    lives of unseen names, with the fast weights kept and with S = 0.

    Example: mlx-sleep retrofit smollm2 --out my-adapter --hours 8
    """
    if (hours is None) == (tokens is None):
        raise UserError("give --hours or --tokens, one of them")
    if hours is not None and not 0 < hours < float("inf"):
        raise UserError(f"--hours must be above 0, not {hours}")
    if tokens is not None and tokens < 1:
        raise UserError(f"--tokens must be at least 1, not {tokens}")
    if init not in ("host", "random"):
        raise UserError(f"--init must be host or random, not {init!r}")

    from ..convert.insert import new_layers, plan
    from ..lab.tasks.chat_source import ChatSource
    from ..lab.tasks.curriculum import SHARES, batches, held_out
    from ..models.base import SleepConfig
    from ..models.load import load
    from ..training.refusals import REFUSAL, mark_refusals
    from ..training.retrofit import Retrofit, prepare
    from ..training.schedule import Budget

    places = None if before is None else list(before)
    opened = choose(model, None, revision, local_files_only).open()
    loaded, tokenizer, config = load(opened)
    host = cast("SleepModel", loaded)
    if host.has_fast_weights:
        raise UserError(f"{model} has fast weights already; retrofit takes models without")
    configs = plan(host, kind="delta_attention", count=layers, before=places)
    loop_range = (min(configs[0]["before"], host.num_layers - 1), host.num_layers)
    host.sleep = SleepConfig(passes, window, "hard", loop_range, fold=fold)
    pad = config.get("pad_token_id") or 0
    chat = _ordinary(host, tokenizer, out / "chat.jsonl", ordinary, seed)
    train, valid = (
        cast("Source", ChatSource(tokenizer, split, seed, chat, pad))
        for split in ("train", "valid")
    )
    opening = tokenizer.encode_text(REFUSAL)

    def marked(made):
        for arrays in made:
            yield {**arrays, "refusal": mark_refusals(arrays, opening)}

    run = Retrofit(
        prepare(
            host, configs, new_layers(host, configs, seed, init == "host"), lora_rank=lora_rank
        ),
        out,
        lambda jobs: marked(batches(train, jobs, batch)),
        Budget(tokens=tokens, seconds=hours and 3600 * hours),
        {
            "sleep_layers": configs,
            "sleep": {"passes": passes, "window": window, "eviction": "hard", "fold": fold},
            "generation": {"do_sample": False},
            "lora_rank": lora_rank,
            "base": {"weights": opened.digest(), "name": Path(opened.name).name},
        },
        shares=SHARES,
        unseen=marked(held_out(valid, batch)),
        settings={"batch": batch, "seed": seed, "init": init},
    )
    with _progress(run) as on_row:
        run.run(resume, on_row)
    _draw(out)
    if run.stopped:
        note(f"stopped after step {run.step}; --resume goes on")
        raise typer.Exit(130)
    line(f"wrote {out}; try: mlx-sleep chat --model {model} --adapter-path {out}")


def _ordinary(model, tokenizer, file: Path, count: int, seed: int) -> list[list[tuple[str, str]]]:
    """Chats that the model makes of itself, or those that an earlier start of the run made."""
    from ..lab.tasks.life_batches import read_chat
    from ..training.ordinary import sample_chat

    tokenizer.parts  # noqa: B018 - a template that can't be used shows before the wait
    if count and not file.exists():
        with progress_bar("sampling ordinary chat", total=count, unit="chats") as update:
            pairs = sample_chat(model, tokenizer, count, seed, on_done=update)
        file.parent.mkdir(parents=True, exist_ok=True)
        lines = [json.dumps({"user": user, "assistant": reply}) + "\n" for user, reply in pairs]
        new = file.with_suffix(".new")
        new.write_text("".join(lines), encoding="utf-8")
        new.replace(file)
    return read_chat(file) if count else []


@contextlib.contextmanager
def _progress(run) -> Iterator[Callable[[dict], None]]:
    """A bar on a terminal, a line now and then in a log; every evaluation is a point of the
    picture."""
    terminal, recall = sys.stderr.isatty(), ""
    with progress_bar("training", total=100, unit="%") as update:

        def on_row(row):
            nonlocal recall
            if "recall" in row:
                recall = f"recall {row['recall']:.1%}, with S zeroed {row['zeroed']:.1%}"
                text = recall
                _draw(run.folder)
            elif "loss" not in row:
                return
            else:
                speed = f"{row['tokens_per_second']:,.0f} tokens/s"
                text = f"loss {row['loss']:.3f}, kl {row['kl']:.3f}, {speed}"
            update(round(100 * run.progress), text=f"{text}  {recall if text != recall else ''}")
            if not terminal and ("recall" in row or row["step"] % 10 == 0):
                note(f"step {row['step']}: {text}")

        yield on_row


def _draw(folder: Path) -> None:
    """recall.png: the evaluations so far, where matplotlib is installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    rows = [row for row in rows if "recall" in row]
    if not rows:
        return
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    at = [row["tokens"] / 1e6 for row in rows]
    axes.plot(at, [row["recall"] for row in rows], marker="o", label="S kept")
    axes.plot(at, [row["zeroed"] for row in rows], marker="o", label="S = 0")
    axes.set_xlabel("million tokens")
    axes.set_ylabel("value tokens recalled, unseen names")
    axes.set_ylim(0, 1)
    axes.legend()
    figure.savefig(folder / "recall.png", dpi=150)
