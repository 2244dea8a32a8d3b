"""Training through sleep: Algorithm 1 of arXiv 2605.26099, gradient through all passes.

The optimizer is the paper's: Muon for the matrices of the blocks, AdamW for the rest. A run is a
folder (recipe, metrics, checkpoints) and is resumed from it to the same losses. This file doesn't
know what a task's tokens mean; a task is a function from a step to a list of `Window`.
"""

from __future__ import annotations

import json
import math
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
from mlx.utils import tree_flatten, tree_unflatten

from ..models.base import evict
from ..sleep import passes_over
from ..utils.atomic import fsync_path
from ..utils.errors import UserError


class Window(NamedTuple):
    """One window of a batch.

    tokens     [B, T] int32, padded on the right
    mask       [B, T] bool, or None when nothing is padded
    positions  [B, K] int32: where the loss reads the output; None makes the chunk a consolidation
    targets    [B, K] int32: the tokens to be predicted there
    weights    [B, K] float32: 0 for unused slots
    scored     [B, K] bool: the labels that the reported accuracy counts (the loss does not)
    """

    tokens: mx.array
    mask: mx.array | None = None
    positions: mx.array | None = None
    targets: mx.array | None = None
    weights: mx.array | None = None
    scored: mx.array | None = None


def labelled(tokens, mask, weights, scored=None) -> Window:
    """A prediction chunk from numpy arrays [B, T]: tokens, mask (or None), next-token weights.

    weights is the loss weight of predicting token t from the tokens before it in the same window;
    weights[:, 0] must be zero, since nothing in the window predicts its first token. scored bool
    marks those that the accuracy counts; None is all with a weight.
    """
    if weights[:, 0].any():
        raise ValueError("the first token of a window cannot be predicted from inside it")
    count = int((weights > 0).sum(axis=1).max())
    slots = -(-max(count, 1) // 16) * 16  # few distinct shapes, so few compilations
    slots = min(slots, tokens.shape[1] - 1)
    scored = weights > 0 if scored is None else scored & (weights > 0)
    # The labelled positions of a row first, in order.
    at = np.argsort(weights[:, 1:] <= 0, axis=1, kind="stable")[:, :slots]
    return Window(
        mx.array(tokens.astype(np.int32)),
        None if mask is None else mx.array(mask),
        mx.array(at.astype(np.int32)),
        mx.array(np.take_along_axis(tokens[:, 1:], at, axis=1).astype(np.int32)),
        mx.array(np.take_along_axis(weights[:, 1:], at, axis=1).astype(np.float32)),
        mx.array(np.take_along_axis(scored[:, 1:], at, axis=1)),
    )


def sleep_loss(model, chunks: list[Window], passes: int, block: Callable | None = None):
    """Algorithm 1: (weighted mean cross-entropy, share of the scored labels predicted right).

    A chunk without positions is slept over (N passes, no loss, only S survives it); one with
    positions is run once. S starts at zero and runs on over all chunks; the KV cache doesn't.
    """
    state = model.init_state(chunks[0].tokens.shape[0])
    total = weight = hits = labels = mx.array(0.0)
    for chunk in chunks:
        if chunk.positions is None:
            state = passes_over(model, chunk.tokens, state, passes, chunk.mask, block=block)
            continue
        h, state = model.hidden(chunk.tokens, state, chunk.mask)
        state = evict(state, model.sleep)
        logits = model.head(mx.take_along_axis(h, chunk.positions[..., None], axis=1))
        losses = nn.losses.cross_entropy(logits, chunk.targets)
        total = total + (losses * chunk.weights).sum()
        weight = weight + chunk.weights.sum()
        hits = hits + ((mx.argmax(logits, axis=-1) == chunk.targets) & chunk.scored).sum()
        labels = labels + chunk.scored.sum()
    return total / weight, hits / mx.maximum(labels, 1)


def checkpointed_block(model) -> Callable:
    """`model.block` that keeps only its inputs for the backward pass: memory for time."""

    def block(i, h, state, mask):
        other = {}

        def run(h, arrays, mask):
            h, new = model.block(i, h, {**others(state), **arrays}, mask)
            other.update(others(new))
            return h, arrays_of(new)

        h, new = nn.utils.checkpoint(model.block_modules[i], run)(h, arrays_of(state), mask)
        return h, {**new, **other}

    def arrays_of(state):
        return {name: x for name, x in state.items() if isinstance(x, mx.array)}

    def others(state):
        return {name: x for name, x in state.items() if not isinstance(x, mx.array)}

    return block


def make_optimizer(muon_lr: float, adamw_lr: float, weight_decay: float = 0.0):
    """Muon for the blocks' projection matrices, AdamW for embeddings, norms, gates' biases."""
    muon = optim.Muon(learning_rate=muon_lr, momentum=0.95, weight_decay=0.0)
    adamw = optim.AdamW(learning_rate=adamw_lr, betas=[0.9, 0.95], weight_decay=weight_decay)
    optimizer = optim.MultiOptimizer([muon, adamw], [is_projection])
    optimizer.base_rates = (muon_lr, adamw_lr)
    return optimizer


def is_projection(name: str, x) -> bool:
    """Whether Muon trains this parameter: a matrix of a block that multiplies activations."""
    return x.ndim == 2 and ("proj" in name or "kernel_generator" in name)


def rate_at(step: int, steps: int, warmup: int, cooldown: float) -> float:
    """Trapezoid in [0, 1]: linear up over `warmup` steps, linear down over the last part."""
    down = max(1, int(steps * cooldown))
    return min(1.0, (step + 1) / max(1, warmup), max(0.0, (steps - step) / down))


class Trainer:
    """One training run in a folder.

    `plan(step)` gives (chunks, passes) for this process's share of the batch, by step alone, so
    that a resumed run sees the same data. `settings` are compared on resume: another recipe in
    the same folder is refused.
    """

    def __init__(
        self,
        model,
        folder: Path,
        settings: dict,
        steps: int,
        plan,
        *,
        warmup=100,
        cooldown=0.3,
        muon_lr=2e-3,
        adamw_lr=1e-3,
        weight_decay=0.0,
        clip=1.0,
        checkpoint_passes=False,
        save_every=200,
        group=None,
    ):
        self.model, self.folder, self.settings = model, Path(folder), settings
        self.steps, self.plan, self.clip = steps, plan, clip
        self.warmup, self.cooldown, self.save_every = warmup, cooldown, save_every
        self.optimizer = make_optimizer(muon_lr, adamw_lr, weight_decay)
        self.optimizer.init(model.trainable_parameters())
        self.block = checkpointed_block(model) if checkpoint_passes else None
        self.group = group or mx.distributed.init()
        self.step = 0
        self.tokens = 0
        self._compiled = {}

    def run(self, on_step: Callable[[dict], None] | None = None) -> dict:
        """Trains to the last step, or until interrupted; returns the last metrics row."""
        self._open_folder()
        row = {}
        with open(self.folder / "metrics.jsonl", "a") as metrics:
            ready = self.plan(self.step) if self.step < self.steps else None
            while self.step < self.steps:
                started = time.perf_counter()
                chunks, passes = ready
                loss, right, norm = self._step(chunks, passes)
                mx.async_eval(loss, right, norm, self.model.state, self.optimizer.state)
                # The next batch is made while this one is computed.
                ready = self.plan(self.step + 1) if self.step + 1 < self.steps else None
                mx.eval(loss, right, norm, self.model.state, self.optimizer.state)
                # A gradient that is not finite has spoilt the weights, which the next loss would
                # show, but perhaps behind a checkpoint of them.
                for what, value in (("loss", loss), ("gradient", norm)):
                    if not math.isfinite(value.item()):
                        raise UserError(
                            f"the {what} is not finite at step {self.step + 1}; lower the learning "
                            f"rates in the recipe, and start anew in another --out"
                        )
                self.step += 1
                count = sum(self._real(c) for c in chunks) * self.group.size()
                self.tokens += count
                seconds = time.perf_counter() - started
                row = {
                    "step": self.step,
                    "tokens": self.tokens,
                    "passes": passes,
                    "loss": loss.item(),
                    "accuracy": right.item(),
                    "grad_norm": norm.item(),
                    "tokens_per_second": count / seconds,
                    "seconds": seconds,
                }
                if self.group.rank() == 0:
                    metrics.write(json.dumps(row) + "\n")
                    metrics.flush()
                    if self.step % self.save_every == 0 or self.step == self.steps:
                        self.save()
                if on_step:
                    on_step(row)
        return row

    @staticmethod
    def _real(chunk: Window) -> int:
        return chunk.tokens.size if chunk.mask is None else int(chunk.mask.sum().item())

    def _step(self, chunks, passes):
        """(loss, share of scored labels right, gradient norm), averaged over all processes."""
        rate = rate_at(self.step, self.steps, self.warmup, self.cooldown)
        for o, base in zip(self.optimizer.optimizers, self.optimizer.base_rates, strict=True):
            o.learning_rate = base * rate
        if mx.default_device() == mx.Device(mx.cpu):
            # Compiling a graph of many passes takes seconds for each new shape, and gains nothing
            # where the time goes into products and exponentials.
            return self._update(chunks, passes)
        if passes not in self._compiled:
            state = [self.model.state, self.optimizer.state]
            # Over plain tuples: mx.compile gives containers back as lists, tuples and dicts.
            self._compiled[passes] = mx.compile(
                lambda rows: self._update([Window(*row) for row in rows], passes),
                inputs=state,
                outputs=state,
            )
        return self._compiled[passes]([tuple(chunk) for chunk in chunks])

    def _update(self, chunks, passes):
        grad = nn.value_and_grad(self.model, sleep_loss)
        (loss, right), grads = grad(self.model, chunks, passes, self.block)
        if self.group.size() > 1:
            grads = nn.average_gradients(grads, self.group)
            both = mx.distributed.all_sum(mx.stack([loss, right]), group=self.group)
            loss, right = both / self.group.size()
        grads, norm = optim.clip_grad_norm(grads, self.clip)
        self.optimizer.update(self.model, grads)
        return loss, right, norm

    def _open_folder(self):
        """Starts the folder, or resumes from its checkpoint. UserError when it is another run's."""
        recipe = self.folder / "recipe.json"
        text = json.dumps(self.settings, indent=2, sort_keys=True)
        if recipe.exists():
            try:
                theirs = json.loads(recipe.read_text())
            except ValueError:  # a kill or a full disk cut it short, before the first step
                theirs = None
            if theirs != json.loads(text):
                raise UserError(
                    f"{self.folder} holds a run with another recipe; choose another --out, or "
                    f"remove it"
                )
            try:
                self._load()
            except (OSError, RuntimeError, ValueError) as error:  # MLX raises the last two
                raise UserError(
                    f"the checkpoint in {self.folder} cannot be read ({error}); remove it to "
                    "start from the first step"
                ) from error
        else:
            self.folder.mkdir(parents=True, exist_ok=True)
            if self.group.rank() == 0:
                recipe.write_text(text)
        self._cut_metrics()

    def _cut_metrics(self):
        """Drops the rows behind the checkpoint, and a last row that a crash cut short."""
        path = self.folder / "metrics.jsonl"
        if self.group.rank() or not path.exists():
            return
        rows = []
        for line in path.read_text().splitlines():
            try:
                row = json.loads(line)
            except ValueError:
                break
            if row["step"] > self.step:
                break
            rows.append(line)
        path.write_text("".join(line + "\n" for line in rows))

    def save(self):
        """Writes folder/checkpoint whole or not at all."""
        new, old = self.folder / "checkpoint.new", self.folder / "checkpoint"
        shutil.rmtree(new, ignore_errors=True)
        new.mkdir()
        try:
            for name, tree in (
                ("model", self.model.parameters()),
                ("optimizer", self.optimizer.state),
            ):
                mx.save_safetensors(str(new / f"{name}.safetensors"), dict(tree_flatten(tree)))
        except RuntimeError as error:  # MLX's word for a disk that is full
            raise UserError(
                f"cannot write a checkpoint to {self.folder} ({error}); free some space there, "
                "and the same command goes on from the one before"
            ) from error
        (new / "progress.json").write_text(json.dumps({"step": self.step, "tokens": self.tokens}))
        for file in new.iterdir():
            fsync_path(file)
        aside = self.folder / "checkpoint.old"
        if old.exists():  # else a kill has left `aside` as the only one
            shutil.rmtree(aside, ignore_errors=True)
            old.rename(aside)
        new.rename(old)
        shutil.rmtree(aside, ignore_errors=True)

    def _load(self):
        at = self.folder / "checkpoint"
        if not at.exists() and (self.folder / "checkpoint.old").exists():
            at = self.folder / "checkpoint.old"  # killed between the two renames
        if not at.exists():
            return
        self.model.load_weights(str(at / "model.safetensors"))
        state = tree_unflatten(list(mx.load(str(at / "optimizer.safetensors")).items()))
        self.optimizer.state = state
        progress = json.loads((at / "progress.json").read_text())
        self.step, self.tokens = progress["step"], progress["tokens"]
