"""A study small enough for tests: its plan, runs and models."""

from __future__ import annotations

import mlx.core as mx
from mlx.utils import tree_flatten

from mlx_sleep.lab.study import models, plan
from mlx_sleep.lab.tasks.rule110 import Rule110

PLAN = {
    "task": "rule110",
    "size": "micro",
    "about": "For tests.",
    "world": {"width": 5, "strings": 2},
    "difficulties": [1, 2],
    "model": {
        "hidden_size": 16,
        "intermediate_size": 16,
        "blocks": 2,
        "hidden_act": "relu",
        "num_attention_heads": 2,
        "linear_num_key_heads": 1,
        "linear_num_value_heads": 1,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
    },
    "trainer": {"muon_lr": 0.02, "adamw_lr": 0.01, "warmup": 2, "cooldown": 0.3},
    "batch": 4,
    "steps": 4,
    "evaluate": {"every": 2, "valid": 6, "test": 10},
    "beyond": {"difficulty": 2, "examples": 6, "thresholds": [0.0, 0.3], "further": [1, 3]},
    "runs": [
        {"model": "hybrid", "passes": [2, 1], "seeds": [0, 1]},
        {"model": "random_passes", "difficulties": [2], "steps": 2},
        {"model": "sliding_warmup", "passes": [2], "difficulties": [2]},
        {"model": "hybrid_flops", "difficulties": [2]},
        {"model": "looped", "difficulties": [2]},
        {"model": "transformer", "difficulties": [2], "seeds": [3]},
        {"model": "transformer_full", "difficulties": [2], "seeds": [3]},
        {"model": "transformer_deep", "difficulties": [2], "steps": 2},
    ],
}


TASK = Rule110(5, 2)


def runs_of(**changes):
    return {r.name: r for r in plan.make_runs({**PLAN, **changes}, TASK)}


def settings_of(name, **changes):
    return runs_of(**changes)[name].settings


def model_of(name, seed=0):
    settings = settings_of(name)
    model = models.build(settings, models.stages_of(settings)[-1], TASK)
    mx.random.seed(seed)
    # Weights large enough that N makes a difference.
    spread = [(n, x + 0.3 * mx.random.normal(x.shape)) for n, x in tree_flatten(model.parameters())]
    model.load_weights(spread)
    return model
