"""Training through sleep: the loop of a run in a folder, resumed from it to the same losses.

It does not know what a task's tokens mean: a task is a function from a step to a batch.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
from mlx.utils import tree_flatten

from ..models.base import SleepModel
from ..models.calibrate import calibrate
from ..utils.errors import UserError
from . import checkpoints
from .checkpoints import Checkpoint
from .losses import checkpointed_block, sleep_loss
from .optimizer import make_optimizer
from .run_folder import Metrics, open_run
from .schedule import rate_at
from .windows import Window

Batch = tuple[list[Window], int]
"""The windows of a batch, and the passes of its sleeps."""


class Trainer:
    """One training run in a folder.

    settings  compared on resume: a folder with others is refused
    batches   step -> Batch: this process's share of the data, by step alone, so that a resumed run
              sees the same
    warmup    steps; cooldown a share of all steps; see `rate_at`
    clip      the largest norm of the gradient
    group     the processes that train together; None is all of `mx.distributed`
    """

    def __init__(
        self,
        model: SleepModel,
        folder: Path,
        settings: dict,
        steps: int,
        batches: Callable[[int], Batch],
        *,
        warmup: int = 100,
        cooldown: float = 0.3,
        muon_lr: float = 2e-3,
        adamw_lr: float = 1e-3,
        weight_decay: float = 0.0,
        clip: float = 1.0,
        checkpoint_passes: bool = False,
        save_every: int = 200,
        group: mx.distributed.Group | None = None,
    ):
        self.model, self.folder, self.settings = model, Path(folder), settings
        self.steps, self.batches, self.clip = steps, batches, clip
        self.warmup, self.cooldown, self.save_every = warmup, cooldown, save_every
        self.rates = muon_lr, adamw_lr
        self.optimizer = make_optimizer(muon_lr, adamw_lr, weight_decay)
        self.optimizer.init(model.trainable_parameters())
        self.block = checkpointed_block(model) if checkpoint_passes else None
        self.group = group or mx.distributed.init()
        # On the CPU a graph of many passes takes seconds to compile for each new shape, and gains
        # nothing where the time goes into products and exponentials.
        self.compiled = mx.default_device() != mx.Device(mx.cpu)
        self.step = 0
        self.tokens = 0
        self._updates: dict[int, Callable] = {}  # compiled, by passes

    def run(self, on_step: Callable[[dict], None] | None = None) -> dict:
        """Trains to the last step, or until interrupted; returns the last row of the metrics.

        UserError for a folder of another run, a damaged checkpoint, a full disk, and a loss or
        gradient that is not finite.
        """
        self.open()
        calibrate(self.model, gradients=True)
        row: dict = {}
        metrics = Metrics(self.folder)
        ready = self.batches(self.step) if self.step < self.steps else None
        while ready is not None:
            started = time.perf_counter()
            windows, passes = ready
            loss, accuracy, norm = self.update(windows, passes)
            mx.async_eval(loss, accuracy, norm, self.model.state, self.optimizer.state)
            # The next batch is made while this one is computed.
            ready = self.batches(self.step + 1) if self.step + 1 < self.steps else None
            mx.eval(loss, accuracy, norm, self.model.state, self.optimizer.state)
            self._check_finite(loss=loss, gradient=norm)
            self.step += 1
            count = sum(window.count_tokens() for window in windows) * self.group.size()
            self.tokens += count
            seconds = time.perf_counter() - started
            row = {
                "step": self.step,
                "tokens": self.tokens,
                "passes": passes,
                "loss": loss.item(),
                "accuracy": accuracy.item(),
                "grad_norm": norm.item(),
                "tokens_per_second": count / seconds,
                "seconds": seconds,
            }
            if self.group.rank() == 0:
                metrics.append(row)
                if self.step % self.save_every == 0 or self.step == self.steps:
                    self.save()
            if on_step:
                on_step(row)
        return row

    def open(self) -> None:
        """Starts the folder, or resumes from its checkpoint. UserError when it is another run's."""
        first = self.group.rank() == 0
        open_run(self.folder, self.settings, write=first)
        if (checkpoint := checkpoints.load(self.folder)) is not None:
            try:
                self.model.load_weights(list(checkpoint.weights.items()))
            except ValueError as error:
                raise UserError(
                    f"the checkpoint in {self.folder} cannot be read: it is of another model; "
                    "remove it to start from the first step"
                ) from error
            self.optimizer.state = checkpoint.optimizer
            self.step, self.tokens = checkpoint.step, checkpoint.tokens
        if first:
            Metrics(self.folder).keep_until(self.step)

    def save(self) -> None:
        """Writes a checkpoint of this step."""
        weights = dict(tree_flatten(self.model.parameters()))
        state = Checkpoint(weights, self.optimizer.state, self.step, self.tokens)
        checkpoints.save(self.folder, state)

    def update(self, windows: list[Window], passes: int) -> tuple[mx.array, mx.array, mx.array]:
        """One step of the optimizer: (loss, accuracy, gradient norm), all processes averaged."""
        rate = rate_at(self.step, self.steps, self.warmup, self.cooldown)
        for optimizer, base in zip(self.optimizer.optimizers, self.rates, strict=True):
            optimizer.learning_rate = base * rate
        if not self.compiled:
            return self._update(windows, passes)
        if passes not in self._updates:
            self._updates[passes] = self._compile(passes)
        return self._updates[passes]([tuple(window) for window in windows])

    def _compile(self, passes: int) -> Callable:
        def update(rows):  # plain tuples: mx.compile knows lists, tuples and dicts alone
            return self._update([Window(*row) for row in rows], passes)

        state = [self.model.state, self.optimizer.state]
        return mx.compile(update, inputs=state, outputs=state)

    def _update(self, windows, passes):
        grad = nn.value_and_grad(self.model, sleep_loss)
        (loss, accuracy), grads = grad(self.model, windows, passes, self.block)
        if self.group.size() > 1:
            grads = nn.average_gradients(grads, self.group)
            both = mx.distributed.all_sum(mx.stack([loss, accuracy]), group=self.group)
            loss, accuracy = both / self.group.size()
        grads, norm = optim.clip_grad_norm(grads, self.clip)
        self.optimizer.update(self.model, grads)
        return loss, accuracy, norm

    def _check_finite(self, **values: mx.array) -> None:
        """A gradient that is not finite has spoilt the weights: stop before they are saved."""
        for what, value in values.items():
            if not math.isfinite(float(value)):
                raise UserError(
                    f"the {what} is not finite at step {self.step + 1}; lower the learning rates "
                    "in the recipe, and start again in another --out"
                )
