"""Speed of training through sleep, beside the same in PyTorch (`mlx-sleep bench train`).

On the study's `tiny` configuration of rule110: whole steps of the same model, optimizer and all, on
one batch that both have ready. What bounds it, from CPU times on one core of an AMD EPYC at N = 2
with four blocks: the optimizer takes a twentieth of a step and the forward pass two fifths; a Gated
DeltaNet block takes two and a half times as long as an attention block, of which its MLP takes a
tenth. So the small batched products of the gated delta rule and the elementwise work around them
bound it, not the projections.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten

from ...training.trainer import Trainer
from ...utils.errors import UserError
from ...utils.pip import pip_install
from ..statistics import ratio
from ..timing import clock, interleave
from .models import build
from .plan import make_runs, read_plan
from .score import batch_windows
from .task import Task, make_task

PASSES = (1, 2, 4)


def rows(
    passes: Sequence[int] = PASSES, repeats: int = 5, batch: int | None = None
) -> Iterator[dict]:
    """A row for each N.

    passes                     N
    tokens                     of a batch: what is slept over and what is answered
    tokens_per_second          medians over rounds
    torch_tokens_per_second
    ratio                      the time of PyTorch over ours: above 1, ours is faster
    checkpointed_tokens_per_second  ours with `checkpoint_passes`
    peak_bytes, checkpointed_peak_bytes  the most that one step of ours held, model and optimizer
                               included
    """
    torch_step, tensors = _torch()
    plan = read_plan("rule110", "tiny")
    task = make_task(plan)
    run = next(run for run in make_runs(plan, task) if run.model == "hybrid")
    settings = run.settings
    difficulty = settings["difficulty"]
    examples = task.batch("train", range(batch or settings["batch"]), difficulty)
    windows = batch_windows(examples)
    tokens = sum(window.tokens.size for window in windows)

    plain, checkpointed = (_trainer(settings, task, on) for on in (False, True))
    parameters = dict(tree_flatten(plain.model.parameters()))
    weights = {name: np.array(x) for name, x in parameters.items()}
    rates = {key: settings["trainer"][key] for key in ("muon_lr", "adamw_lr")}
    theirs = torch_step(plain.model.args, weights, **rates)
    their_batch = tensors(windows)

    def ours(trainer, N):
        def step():
            return trainer.update(windows, N), trainer.model.state, trainer.optimizer.state

        return step

    for N in passes:
        times = interleave(
            [
                clock(ours(plain, N)),
                clock(lambda N=N: theirs(their_batch, N)),
                clock(ours(checkpointed, N)),
            ],
            repeats,
        )
        fast, other, spared = (tokens / statistics.median(t) for t in times)
        yield {
            "passes": N,
            "tokens": tokens,
            "tokens_per_second": fast,
            "torch_tokens_per_second": other,
            "ratio": ratio(times[1], times[0]),
            "checkpointed_tokens_per_second": spared,
            "peak_bytes": _peak(ours(plain, N)),
            "checkpointed_peak_bytes": _peak(ours(checkpointed, N)),
        }


def plot(rows: list[dict], axes) -> None:
    """Tokens a second over N, ours and theirs."""
    passes = [row["passes"] for row in rows]
    axes.plot(passes, [row["tokens_per_second"] for row in rows], marker="o", label="mlx_sleep")
    theirs = [row["torch_tokens_per_second"] for row in rows]
    axes.plot(passes, theirs, marker="o", label="PyTorch")
    axes.set_ylim(bottom=0)
    axes.set_xlabel("passes N")
    axes.set_ylabel("training tokens a second")
    axes.legend()


def _torch():
    try:
        import torch
    except ImportError:
        raise UserError(
            f"bench train compares with PyTorch: {pip_install('mlx-sleep[torch]')}"
        ) from None
    from ...utils.platform import available_cpus
    from .torch_step import Step, tensors

    torch.set_num_threads(available_cpus())
    return Step, tensors


def _trainer(settings: dict, task: Task, checkpoint_passes: bool) -> Trainer:
    """A trainer that never runs, only steps: nothing is written into its folder."""
    model = build(settings, {}, task)
    rates = {key: settings["trainer"][key] for key in ("muon_lr", "adamw_lr")}
    trainer = Trainer(
        model,
        Path("unused"),
        {},
        1,
        lambda step: ([], 1),
        warmup=0,
        cooldown=1.0,
        checkpoint_passes=checkpoint_passes,
        **rates,
    )
    mx.eval(model.state, trainer.optimizer.state)
    return trainer


def _peak(step) -> int:
    """Bytes that MLX held at most during one step."""
    mx.clear_cache()
    mx.reset_peak_memory()
    mx.eval(step())
    return mx.get_peak_memory()
