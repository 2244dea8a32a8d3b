"""What a token of the answer costs after sleep, for the trained models of a study."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import mlx.core as mx

from .bench import wake
from .study.models import build, stages_of
from .study.plan import Run
from .study.task import Task

MODELS = ("hybrid", "looped")


def latency(runs: Sequence[Run], out: Path, task: Task, repeats: int = 5) -> list[dict]:
    """Rows of model, passes (0: the whole context in the KV cache), ms_per_token, state_bytes and
    kv_bytes, after the task's whole context. All N of the hybrid are timed in turn on the model of
    the largest one: neither the shapes of its weights nor its state depend on N."""
    rows = []
    for name in MODELS:
        chosen = [run for run in runs if run.model == name]
        if not chosen:
            continue
        run = max(chosen, key=lambda run: (run.passes, -run.seed))
        model = build(run.settings, stages_of(run.settings)[-1], task)
        weights = out / run.name / "checkpoint" / "model.safetensors"
        if weights.exists():  # a cleaned-up folder has only results; time is the same
            model.load_weights(str(weights))
        mx.eval(model.parameters())
        passes = sorted({n for run in chosen for n in run.passes})
        context = task.windows * task.window
        for row in wake.rows(model, passes, [context], repeats):
            rows.append(
                {
                    "model": name,
                    **{k: row[k] for k in ("passes", "ms_per_token", "state_bytes", "kv_bytes")},
                }
            )
    return rows
