"""`mlx-sleep retrofit`: train a model to remember what it is told; the model itself stays."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from ..utils.errors import UserError
from ..utils.files import os_errors_as_user_errors
from .model_names import choose
from .options import LocalFilesOnly, Numbers, Revision, folder_for, numbers
from .output import StatusLine, line, note, progress_bar

if TYPE_CHECKING:  # it imports MLX
    from ..lab.tasks.life import CHAT
    from ..lab.tasks.life_batches import Source
    from ..models.base import SleepModel


def retrofit(
    model: Annotated[
        str,
        typer.Argument(
            help="The model's folder, its id on Hugging Face, or smollm2: Llama, Qwen, Mistral or "
            "Gemma."
        ),
    ],
    out: Annotated[
        Path,
        typer.Option(
            parser=folder_for("--out"),
            metavar="<path>",
            help="The folder of the run, which becomes the adapter.",
        ),
    ],
    hours: Annotated[float | None, typer.Option(help="Hours of training.")] = None,
    tokens: Annotated[
        int | None, typer.Option(help="Tokens of training, in place of hours.")
    ] = None,
    layers: Annotated[
        int | None,
        typer.Option(min=1, help="Sleep layers, evenly spaced. (default: 6)", show_default=False),
    ] = None,
    before: Annotated[
        Numbers | None,
        typer.Option(
            parser=numbers("--before", least=0, example="6,10,14"),
            metavar="N,...",
            help="The blocks to put them before instead, with commas.",
        ),
    ] = None,
    heads: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Heads of a new layer. Fewer are wider, and remember more.",
            show_default="the model's",
        ),
    ] = None,
    head_dim: Annotated[
        int | None,
        typer.Option(min=1, help="Their size.", show_default="such that they start as attention"),
    ] = None,
    passes: Annotated[int, typer.Option(min=1, help="Passes of a sleep.")] = 1,
    loop_range: Annotated[
        Numbers | None,
        typer.Option(
            parser=numbers("--loop-range", least=0, example="6,27"),
            metavar="LO,HI",
            help="The passes run blocks LO to HI - 1.",
            show_default="from the first new layer on",
        ),
    ] = None,
    window: Annotated[int, typer.Option(min=2, help="Tokens of a window, in use.")] = 512,
    fold: Annotated[
        str, typer.Option(help="What is folded into S: all, or user (not the replies).")
    ] = "all",
    init: Annotated[
        str, typer.Option(help="Where the layers start: host (as its attention) or random.")
    ] = "host",
    lora_rank: Annotated[
        int | None,
        typer.Option(
            min=0,
            help="Rank of changes of the model's attention (0: none); of its mixers too where it "
            "has fast weights.",
            show_default="0, with fast weights 16",
        ),
    ] = None,
    batch: Annotated[int, typer.Option(min=64, help="Tokens a step, padding included.")] = 4096,
    ordinary: Annotated[
        int, typer.Option(min=0, help="Ordinary chats to sample from the model and hold it to.")
    ] = 200,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in OUT.")] = False,
    seed: Annotated[
        int, typer.Option(min=0, max=2**32 - 1, help="Of the lives and of the start.")
    ] = 0,
    revision: Revision = None,
    local_files_only: LocalFilesOnly = False,
):
    """Train sleep layers in a model, so that it remembers what it is told.

    The model stays as it is. One that has fast weights of its own (Qwen3.5, Granite-4) gets
    low-rank changes of its mixers and attention, and no new layers. Ctrl-C stops with a
    checkpoint; --resume goes on to the same losses.
    OUT gets metrics.jsonl, and recall.png where matplotlib is installed: value tokens recalled in
    lives of unseen names, with the fast weights kept and with S = 0.

    Several processes or machines train together when mlx.launch starts them.

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

    import mlx.core as mx

    from ..convert.insert import new_layers, plan
    from ..lab.tasks.chat_source import ChatSource
    from ..lab.tasks.curriculum import SHARES, batches, held_out
    from ..models.base import SleepConfig
    from ..models.load import load
    from ..training.refusals import REFUSAL, mark_refusals
    from ..training.retrofit import Retrofit, prepare, prepare_hybrid
    from ..training.run_folder import check_run
    from ..training.schedule import Budget

    check_run(out, resume)
    places = None if before is None else list(before)
    with StatusLine() as status:
        status.show(f"loading {model} ...")
        opened = choose(model, None, revision, local_files_only).open()
        loaded, tokenizer, config = load(opened)
    host, tokenizer = cast("SleepModel", loaded), tokenizer.to_train_with()
    sleep: dict[str, Any] = {
        "passes": passes,
        "window": window,
        "eviction": "hard",
        "fold": fold,
    }
    if host.has_fast_weights:
        configs, rank = [], 16 if lora_rank is None else lora_rank
        if loop_range is not None:
            raise UserError(f"{model} has a range of its own for its passes; omit --loop-range")
        _check_hybrid(model, config, places or heads or head_dim, rank, fold)
        host.sleep = SleepConfig(**sleep, loop_range=host.sleep.loop_range)
    else:
        configs = plan(
            host,
            kind="delta_attention",
            count=layers,
            before=places,
            heads=heads,
            head_dim=head_dim,
            copy=init == "host",
        )
        rank = lora_rank or 0
        first = min(configs[0]["before"], host.num_layers - 1)
        looped = _check_loop(loop_range, [c["before"] for c in configs], host.num_layers)
        if looped:
            sleep["loop_range"] = looped
        host.sleep = SleepConfig(**{"loop_range": (first, host.num_layers), **sleep})
    _check_rank(host, rank)
    pad = config.get("pad_token_id") or 0
    group = mx.distributed.init()
    chat = _ordinary(host, tokenizer, out / "chat.jsonl", ordinary, seed, group)
    # Each process of several makes lives of its own.
    train, valid = (
        cast("Source", ChatSource(tokenizer, split, own, chat, pad))
        for split, own in (("train", seed + (group.rank() << 32)), ("valid", seed))
    )
    opening = tokenizer.encode_text(REFUSAL)

    def marked(made):
        for arrays in made:
            yield {**arrays, "refusal": mark_refusals(arrays, opening)}

    if configs:
        modules = new_layers(host, configs, seed, init == "host")
        begun = "as the attention at their places" if init == "host" else "from random numbers"
        if group.rank() == 0:
            note(f"sleep layers before blocks {[c['before'] for c in configs]} start {begun}")
        trained = prepare(host, configs, modules, lora_rank=rank)
    else:
        trained = prepare_hybrid(host, lora_rank=rank)
    run = Retrofit(
        trained,
        out,
        lambda jobs: marked(batches(train, jobs, batch)),
        Budget(tokens=tokens, seconds=hours and 3600 * hours),
        {
            "sleep_layers": configs,
            "sleep": sleep,
            "generation": {"do_sample": False},
            "lora_rank": rank,
            "base": {"weights": opened.digest(), "name": Path(opened.name).name},
            **({} if tokenizer.trained == "auto" else {"trained": {"thinking": "off"}}),
        },
        shares=SHARES,
        unseen=marked(held_out(valid, batch)),
        settings={"batch": batch, "seed": seed, "init": init, "ordinary": ordinary},
    )
    with _progress(run) as on_row:
        run.run(resume, on_row, _say_that_it_stops)
    if not run.leads:
        return
    _draw(out)
    if run.stopped:
        note(f"stopped after step {run.step}; --resume goes on")
        raise typer.Exit(130)
    line(f"wrote {out}; try: mlx-sleep chat --model {model} --adapter-path {out}")


def _check_hybrid(model: str, config: dict, new, rank: int, fold: str) -> None:
    """UserError for what a model with fast weights of its own cannot be given."""
    if config.get("sleep_layers"):
        raise UserError(
            f"{model} has sleep layers already; train an adapter for the model that they were put "
            "into"
        )
    if new is not None:
        raise UserError(
            f"{model} has fast weights already and gets no new layers; omit --before, --heads and "
            "--head-dim"
        )
    if rank < 1:
        raise UserError(f"{model} has fast weights already: --lora-rank must be at least 1")
    if fold != "all":
        raise UserError(f"{model} folds in all that was said; omit --fold")


def _check_rank(model: SleepModel, rank: int) -> None:
    """UserError for a rank that is none of a low-rank change."""
    import mlx.core as mx

    width = model.embed(mx.zeros((1, 1), mx.int32)).shape[-1]
    if rank > width:
        raise UserError(f"--lora-rank must be at most {width}, the model's width, not {rank}")


def _check_loop(loop_range, places: list[int], blocks: int) -> list[int] | None:
    """The range as a list. UserError where it leaves out a new layer, or is none."""
    if loop_range is None:
        return None
    found = list(loop_range)
    if len(found) != 2 or not found[0] <= min(places) <= max(places) < found[1] <= blocks:
        raise UserError(
            f"--loop-range must be LO,HI with LO at most {min(places)}, and HI from "
            f"{max(places) + 1} to {blocks}: the passes have to run all new layers"
        )
    return found


def _ordinary(model, tokenizer, file: Path, count: int, seed: int, group) -> CHAT:
    """Chats that the model makes of itself, or those that an earlier start of the run made.

    The first process makes them, and the others of `group` wait.
    """
    import mlx.core as mx

    from ..lab.tasks.life_batches import read_chat
    from ..training.ordinary import sample_chat
    from ..utils.atomic import replace_file

    tokenizer.parts  # noqa: B018 - a template that can't be used shows before the wait
    if count and not file.exists() and group.rank() == 0:
        # Tried first: the sampling takes minutes.
        with os_errors_as_user_errors(f"cannot write to {file.parent}", "choose another --out"):
            file.parent.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=file.parent).close()
        with progress_bar("sampling ordinary chat", total=count, unit="chats") as update:
            pairs = sample_chat(model, tokenizer, count, seed, on_done=update)
        if len(pairs) < count:
            note(
                f"only {len(pairs)} of {count} ordinary chats came to an end: "
                + ("the model is held to these" if pairs else "nothing holds the model to its base")
            )
        lines = [json.dumps({"user": user, "assistant": reply}) + "\n" for user, reply in pairs]
        with os_errors_as_user_errors(f"cannot write {file}", "choose another --out"):
            replace_file(file, "".join(lines).encode())
    if group.size() > 1:
        mx.eval(mx.distributed.all_sum(mx.array(1), group=group))
    return read_chat(file) if count else []


def _say_that_it_stops() -> None:
    """In a signal handler, where a print may meet a print."""
    os.write(2, b"\nstopping after this step; Ctrl-C again stops at once\n")


@contextlib.contextmanager
def _progress(run) -> Iterator[Callable[[dict], None]]:
    """A bar on a terminal, a line now and then in a log; every evaluation is a point of the
    picture."""
    terminal, recall = sys.stderr.isatty(), ""
    if not run.leads:
        yield lambda row: None
        return
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
    from ..training.run_folder import read_rows

    rows = [row for row in read_rows(folder / "metrics.jsonl") if "recall" in row]
    if not rows:
        return
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    at = [row["tokens"] / 1e6 for row in rows]
    for name, label in (("recall", "S kept"), ("zeroed", "S = 0")):
        axes.plot(at, [100 * row[name] for row in rows], marker="o", label=label)
    axes.set_title("What is recalled after sleep, in lives of unseen names")
    axes.set_xlabel("training tokens (millions)")
    axes.set_ylabel("value tokens right (%)")
    axes.set_ylim(0, 100)
    axes.legend()
    figure.savefig(folder / "recall.png", dpi=150)
