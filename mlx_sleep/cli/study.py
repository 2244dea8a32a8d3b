"""`mlx-sleep study`: the paper's experiments, trained and measured on this machine."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..utils.errors import UserError
from .options import Json, Numbers, names, numbers
from .output import StatusLine, count, line, note, print_json

if TYPE_CHECKING:  # it imports MLX
    from ..lab.study.plan import Run


def study(
    task: Annotated[str, typer.Argument(help="The task: rule110, depo or gsm.")],
    size: Annotated[
        str, typer.Option(help="tiny, small, paper (gsm: tiny_last too), or a .json plan.")
    ] = "tiny",
    out: Annotated[
        Path | None,
        typer.Option(help="The study's folder. (default: runs/study-TASK-SIZE)"),
    ] = None,
    jobs: Annotated[
        int | None,
        typer.Option(help="Runs at a time. (default: one a CPU; one on a GPU)"),
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="Only these models, with commas. (default: all)")
    ] = None,
    passes: Annotated[
        Numbers | None,
        typer.Option(
            parser=numbers("--passes"),
            metavar="N,...",
            help="Only runs with these N, as in 1,4. (default: all)",
        ),
    ] = None,
    figures: Annotated[
        bool, typer.Option("--figures", help="Draw the figures too. Needs matplotlib.")
    ] = False,
    json: Json = False,
):
    """Train and compare models that sleep longer or shorter, as the paper does.

    OUT gets a folder for each run, results.json, results.md and, with --figures, the figures.
    Kill it at any time: the same command goes on, and does nothing twice.

    Example: mlx-sleep study rule110 --size tiny --figures
    """
    from ..lab.latency import latency
    from ..lab.study import figures as drawing
    from ..lab.study import scheduler, table
    from ..lab.study.plan import make_runs, read_plan
    from ..lab.study.score import constant
    from ..lab.study.task import TOKENIZER, make_task
    from ..utils.platform import device

    if jobs is not None and jobs < 1:
        raise UserError("--jobs must be at least 1")
    if figures:
        drawing.check()
    plan = read_plan(task, size)
    out = out or Path("runs") / f"study-{task}-{plan['size']}"
    scheduler.make_folder(out)
    data = make_task(plan, out / TOKENIZER)
    runs = make_runs(
        plan,
        data,
        models=names(model),
        passes=list(passes) if passes else None,
    )
    show = _Progress(len(runs), quiet=json)
    try:
        results = scheduler.run_all(
            runs, out, jobs or scheduler.default_jobs(), show.on_change, show.on_done
        )
    except KeyboardInterrupt:
        show.status.clear()
        note(f"stopped; the same command goes on from {out}")
        raise typer.Exit(130) from None
    show.status.clear()
    n = plan["evaluate"]["test"]
    extra = {
        "device": device(),
        "always": {str(d): constant(data, n, d) for d in plan["difficulties"]},
        "latency": latency(runs, out, data),
    }
    found = table.collect(plan, runs, results, extra)
    table.write(out, found, plan)
    made = drawing.draw(found, out) if figures else []
    if json:
        print_json(found)
        return
    line(table.markdown(found, plan))
    line(f"wrote {', '.join(str(out / f) for f in ('results.json', 'results.md'))}")
    for path in made:
        line(f"wrote {path}")


class _Progress:
    """A line for each run that ends; on a terminal, below them, what is running."""

    def __init__(self, total: int, quiet: bool):
        self.total, self.done, self.quiet = total, 0, quiet
        self.status = StatusLine()

    def on_change(self, waiting: Sequence, running: Sequence, done: int) -> None:
        self.done = done
        if not self.quiet:
            now = ", ".join(f"{run.name} {step}/{run.settings['steps']}" for run, step in running)
            self.status.show(f"{done}/{self.total} runs done; {now}")

    def on_done(self, run: Run, result: dict) -> None:
        self.done += 1
        if self.quiet:
            return
        self.status.clear()
        got = ", ".join(
            f"{row['accuracy']:.1%} at {row['difficulty']}, N = {row['passes']}"
            for row in result["rows"][:6]
        )
        left = count(self.total - self.done, "run") + " left"
        note(f"{run.name}: {got} ({result['seconds'] / 60:.1f} min; {left})")
