"""The models of the study: the hybrid of `models/sleep_hybrid.py`, and what it is compared to."""

from __future__ import annotations

import mlx.core as mx

from ...models.sleep_hybrid import Model, ModelArgs
from ...utils.errors import UserError
from .task import Task


class StudyModel(Model):
    """The hybrid with two changes that only a comparison needs.

    loops    every forward pass, asleep or awake, runs the blocks this often: a model so many times
             as deep, with shared weights but with S and KV of its own for each (loop, block)
    skipped  layer types whose blocks pass h through: what the model was before they were inserted
    """

    def __init__(self, args: ModelArgs, loops: int = 1, skipped: tuple[str, ...] = ()):
        super().__init__(args)
        self._blocks = loops * len(args.layer_types)
        self._skipped = [kind in skipped for kind in args.layer_types]

    def block(self, i, h, layer_state, mask=None):
        i %= len(self.layers)
        return (h, layer_state) if self._skipped[i] else self.layers[i](h, layer_state, mask)


def stages_of(settings: dict) -> list[dict]:
    """The stages of a run, each with its number of steps; one for most models."""
    stages = settings["variant"].get("stages", [{}])
    steps, done, share = settings["steps"], 0, 0.0
    result: list[dict] = []
    for stage in stages:
        share += stage.get("share", 1.0)
        until = steps if len(result) + 1 == len(stages) else round(share * steps)
        result.append({**stage, "steps": until - done})
        done = until
    if any(stage["steps"] < 1 for stage in result):
        raise UserError(f"{steps} steps are too few for {len(stages)} stages")
    return result


def keeps_context(settings: dict, stage: dict) -> bool:
    """Whether the whole context is in the window of the answer, and nothing is slept over."""
    return stage.get("context", settings["variant"].get("context", "evicted")) == "kept"


def config_of(settings: dict, stage: dict, task: Task) -> dict:
    """The contents of config.json for a run's model in one stage."""
    sizes = {key: value for key, value in settings["model"].items() if key != "blocks"}
    pattern = settings["variant"]["layers"]
    blocks = settings["model"]["blocks"] * settings["variant"].get("deeper", 1)
    if blocks % len(pattern):
        raise UserError(f"{blocks} blocks are no multiple of the pattern {', '.join(pattern)}")
    window = task.window
    if keeps_context(settings, stage):
        window = task.windows * task.window + task.final_tokens
    return {
        "model_type": "sleep_hybrid",
        "vocab_size": task.vocab_size,
        **sizes,
        "layer_types": pattern * (blocks // len(pattern)),
        "sleep": {
            "passes": max(settings["passes"]),
            "window": window,
            "eviction": stage.get("eviction", "hard"),
        },
    }


def build(settings: dict, stage: dict, task: Task) -> StudyModel:
    """A model with random weights from the run's seed; what the stage does not train is frozen."""
    mx.random.seed(settings["seed"])
    args = ModelArgs.from_dict(config_of(settings, stage, task))
    loops = settings["variant"].get("loops", 1)
    model = StudyModel(args, loops, tuple(stage.get("skipped", ())))
    trained = stage.get("trained")
    if trained is not None:  # layer types; embeddings and norms then stay as they are
        model.freeze()
        for kind, layer in zip(args.layer_types, model.layers, strict=True):
            if kind in trained:
                layer.unfreeze()
    elif stage.get("skipped"):
        for kind, layer in zip(args.layer_types, model.layers, strict=True):
            if kind in stage["skipped"]:
                layer.freeze()
    return model
