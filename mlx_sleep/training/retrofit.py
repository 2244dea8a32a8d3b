"""Trains sleep layers in a model that stays as it is, or low-rank changes of one that has fast
weights: a run is a folder, and can be gone on with.

    recipe.json                 the settings; a folder goes on with the same ones alone
    metrics.jsonl               a line for every step, and one for every evaluation
    checkpoint/                 parameters, optimizer, budget spent; replaced whole
    adapters.safetensors, adapter_config.json    what came of it (models/adapter.py)

Muon for the matrices of the sleep layers, AdamW for the rest, low-rank changes at a rate of their
own. Several processes (mlx.launch) average their gradients; the first one alone evaluates and
writes. Nothing here knows where the lives come from, or a terminal.
"""

from __future__ import annotations

import json
import math
import shutil
import signal
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
from mlx.utils import tree_flatten, tree_unflatten

from ..models import lora
from ..models.adapter import names_in_model, write_adapter
from ..models.calibrate import calibrate
from ..models.inserted import Inserted
from ..models.weights import load_arrays
from ..utils.atomic import fsync_path, replace_file
from ..utils.errors import UserError
from ..utils.files import one_line, read_json
from ..utils.safetensors import read_header
from ..utils.schema import Range
from . import checkpoints
from .checkpoints import naming_damage, read_progress, write_progress
from .lives import LifeBatch, base_hidden, life_batch, life_loss, predictions
from .run_folder import Metrics, check_run
from .schedule import Budget, stage_at, trapezoid

BITS = 8  # of an adapter's matrices

Jobs = Iterator[tuple[int, int]]
"""(step, stage of the curriculum) of one batch after another."""
Batches = Callable[[Jobs], Iterable[dict[str, np.ndarray]]]
"""Makes them, in order, and each when it is asked for; `life_batch` takes them."""


def prepare(host, layers: list[dict], modules: list, *, gain: float = 0.05, lora_rank: int = 0):
    """The model to train: sleep layers `modules` in `host`, all else frozen; trained in float32.

    layers     `sleep_layers` of a config.json, delta attention all of them
    lora_rank  of changes of the attention from the first sleep layer on; 0 is none
    """
    model = Inserted(host, layers)
    model.sleep_layers = modules
    for layer in modules:
        layer.gain = mx.full(layer.gain.shape, gain)
    if lora_rank:
        _change(host, lora_rank, layers[0]["before"])
    return _frozen_but(model, modules)


def prepare_hybrid(host, *, lora_rank: int):
    """A model with fast weights of its own, to train: low-rank changes of its mixers and its
    attention from the first looped block on, in float32; all else frozen."""
    _change(host, lora_rank, (host.sleep.loop_range or (0,))[0])
    return _frozen_but(host, [])


def _change(host, rank: int, first: int) -> None:
    names = [
        f"layers.{i}.{name}.lora_{part}"
        for i, block in enumerate(host.block_modules)
        if i >= first
        for name in lora.projections(block)
        for part in "ab"
    ]
    if not names:
        raise UserError("the model has no linear layers in its mixers that could be changed")
    lora.attach(host.block_modules, rank, names)


def _frozen_but(model, modules: list):
    model.freeze()
    for layer in modules:
        layer.unfreeze()
    model.unfreeze(keys=["lora_a", "lora_b"], strict=False)
    trained = dict(tree_flatten(model.trainable_parameters()))
    model.load_weights([(n, x.astype(mx.float32)) for n, x in trained.items()], strict=False)
    mx.eval(model.parameters())
    return model


@dataclass
class Progress(checkpoints.Progress):
    """What progress.json says; asked are stages of the batches that were under way."""

    seconds: Annotated[float, Range(0)]
    asked: list[Annotated[int, Range(0)]]


class Retrofit:
    """One training run in a folder.

    batches   where the lives come from: see `Batches`
    config    adapter_config.json, without what the run adds
    shares    of the budget, for each stage of the curriculum
    unseen    lives to evaluate on
    every     seconds between two evaluations, each with a checkpoint before it
    settings  what else must be the same when a run is resumed
    """

    def __init__(
        self,
        model,
        folder: Path,
        batches: Batches,
        budget: Budget,
        config: dict,
        *,
        shares=(1.0,),
        unseen: Iterable[dict[str, np.ndarray]] = (),
        muon_lr: float = 5e-3,
        adamw_lr: float = 2e-3,
        lora_lr: float = 5e-4,
        warmup: int = 30,
        clip: float = 1.0,
        every: float = 300.0,
        settings: dict | None = None,
    ):
        self.model, self.folder, self.batches = model, Path(folder), batches
        self.budget, self.config, self.shares = budget, config, tuple(shares)
        self.unseen, self.every, self.clip, self.warmup = list(unseen), every, clip, warmup
        self.rates = (muon_lr, lora_lr, adamw_lr)
        self.recipe = json.loads(
            json.dumps({"rates": self.rates, "adapter": config, "shares": self.shares})
        )
        self.recipe |= json.loads(json.dumps(settings or {}))
        muon = optim.Muon(learning_rate=muon_lr, momentum=0.95, weight_decay=0.0)
        adamws = [
            optim.AdamW(learning_rate=rate, betas=[0.9, 0.95], weight_decay=0.0)
            for rate in self.rates[1:]
        ]
        self.optimizer = optim.MultiOptimizer([muon, *adamws], [is_projection, is_low_rank])
        self.optimizer.init(model.trainable_parameters())
        self.passes, self.fold = model.sleep.passes, model.sleep.fold
        self.group = mx.distributed.init()
        self.step, self.tokens, self.seconds, self.stage = 0, 0, 0.0, 0
        self.figures: dict[str, float] = {}
        self.asked: deque[int] = deque()  # stages of the batches that are under way
        self.told_to_stop = self.stopped = False
        self._on_stop: Callable[[], None] = lambda: None

    @property
    def leads(self) -> bool:
        """Whether this is the process that evaluates and writes: the only one, or the first."""
        return self.group.rank() == 0

    @property
    def progress(self) -> float:
        """The share of the budget that is spent, in [0, 1]."""
        return self.budget.progress(self.tokens, self.seconds)

    def run(
        self,
        resume: bool = False,
        on_row: Callable[[dict], None] = lambda row: None,
        on_stop: Callable[[], None] = lambda: None,
    ) -> None:
        """Trains until the budget is spent, or SIGINT or SIGTERM comes; `stopped` tells.

        on_row is given every row of metrics.jsonl; on_stop is called by the signal, within its
        handler. Either way a checkpoint and the adapter are written; a second signal is a
        KeyboardInterrupt, after which the last checkpoint stands. UserError where the folder holds
        another run, and at a loss or a gradient that isn't finite: the checkpoint before it stays.
        """
        self._open(resume)
        self._on_stop = on_stop
        self._agree_on_start()
        before = {s: signal.signal(s, self._interrupted) for s in (signal.SIGINT, signal.SIGTERM)}
        try:
            self._train(on_row)
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _interrupted(self, *_) -> None:
        if self.told_to_stop:
            raise KeyboardInterrupt
        self.told_to_stop = True
        self._on_stop()

    def _stops(self) -> bool:
        if self.group.size() == 1:  # several agree on it in `_agree`
            self.stopped = self.told_to_stop
        return self.stopped

    def _train(self, on_row: Callable[[dict], None]) -> None:
        calibrate(self.model, gradients=True)
        made = iter(self.batches(self._jobs()))
        evaluated = time.perf_counter()
        metrics = Metrics(self.folder)

        def note(row):
            if self.leads:
                metrics.append(row)
                on_row(row)

        while self.progress < 1 and not self._stops():
            started = time.perf_counter()
            note(self._update(life_batch(next(made), self.fold), started))
            if self.leads and time.perf_counter() - evaluated > self.every:
                self.save()
                note(self.evaluate())
                evaluated = time.perf_counter()
        if not self.leads:
            return
        self.save()
        if not self.stopped:
            note(self.evaluate())
        self._write_adapter()

    def _jobs(self) -> Jobs:
        """What is to be made, without end: after a resumption first what was under way."""
        resumed, self.asked = self.asked, deque()
        while True:
            stage = resumed.popleft() if resumed else stage_at(self.shares, self.progress)
            self.asked.append(stage)
            yield self.step + len(self.asked) - 1, stage

    def _update(self, batch: LifeBatch, started: float) -> dict:
        """One step: its row of the metrics. UserError where it is not finite."""
        self.stage = self.asked.popleft()
        rate = trapezoid(self.step, self.progress, self.warmup)
        for optimizer, base in zip(self.optimizer.optimizers, self.rates, strict=True):
            optimizer.learning_rate = base * rate
        base = base_hidden(self.model, batch)
        grad = nn.value_and_grad(self.model, life_loss)
        (loss, hits, kl), grads = grad(self.model, batch, base, self.passes)
        grads = nn.average_gradients(grads, self.group)
        grads, norm = optim.clip_grad_norm(grads, self.clip)
        for what, x in (("loss", loss), ("gradient", norm)):
            if not math.isfinite(x.item()):
                raise UserError(
                    f"the {what} is not finite at step {self.step + 1}; start again with another "
                    "--out and a larger --batch (the checkpoint before it is kept)"
                )
        self.optimizer.update(self.model, grads)
        mx.eval(self.model.trainable_parameters(), self.optimizer.state)
        real, seconds = self._agree(batch.real, time.perf_counter() - started)
        self.step, self.tokens = self.step + 1, self.tokens + real
        self.seconds += seconds
        values = int(np.array(batch.value).sum())
        return {
            "step": self.step,
            "tokens": self.tokens,
            "seconds": round(self.seconds, 3),
            "stage": self.stage,
            "loss": loss.item(),
            "kl": kl.item(),
            "accuracy": hits.item() / values if values else None,
            "grad_norm": norm.item(),
            "tokens_per_second": real / seconds,
        }

    def _agree_on_start(self) -> None:
        """The first process's parameters in all of them."""
        if self.group.size() == 1:
            return
        named = dict(tree_flatten(self.model.trainable_parameters()))
        own = {n: x if self.leads else mx.zeros_like(x) for n, x in named.items()}
        same = [(n, mx.distributed.all_sum(x, group=self.group)) for n, x in own.items()]
        self.model.load_weights(same, strict=False)
        mx.eval(self.model.trainable_parameters())

    def _agree(self, real: int, seconds: float) -> tuple[int, float]:
        """(tokens of a step in all processes, its mean seconds); all stop where one was told to.

        They must spend the budget alike: rates, stages and the last step follow from it.
        """
        if self.group.size() == 1:
            return real, seconds
        own = mx.array([real, seconds, self.told_to_stop], mx.float32)
        tokens, total, stops = np.array(mx.distributed.all_sum(own, group=self.group))
        self.stopped = bool(stops)
        return int(tokens), float(total) / self.group.size()

    def evaluate(self) -> dict:
        """Shares of tokens predicted right in the unseen lives: of values, with S kept from window
        to window (`recall`) and with S = 0 at the start of each (`zeroed`), and of `refusals`."""
        right = dict.fromkeys(("recall", "zeroed", "refusals"), 0.0)
        values = refusals = 0.0
        for arrays in self.unseen:
            kept = life_batch(arrays, self.fold)
            hits = predictions(self.model, kept, self.passes)
            right["recall"] += np.array(hits & kept.value).sum()
            right["refusals"] += np.array(hits & kept.refusal).sum()
            values += np.array(kept.value).sum()
            refusals += np.array(kept.refusal).sum()
            apart = {n: x.reshape(-1, 1, *x.shape[2:]) for n, x in arrays.items()}
            alone = life_batch(apart, self.fold)
            hits = predictions(self.model, alone, self.passes)
            right["zeroed"] += np.array(hits & alone.value).sum()
        of = {"recall": values, "zeroed": values, "refusals": refusals}
        self.figures = {name: float(right[name] / of[name]) for name in right if of[name]}
        return {"step": self.step, "tokens": self.tokens, **self.figures}

    # --- the folder ---------------------------------------------------------------------------

    def _open(self, resume: bool) -> None:
        recipe = self.folder / "recipe.json"
        if not self.leads:
            if resume:
                self._load()
            return
        check_run(self.folder, resume)
        if resume:
            if read_json(recipe) != self.recipe:
                raise UserError(
                    f"{self.folder} holds a run with other settings; give the same ones, or "
                    "another --out"
                )
            self._load()
        else:
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
                replace_file(recipe, json.dumps(self.recipe, indent=2).encode())
            except OSError as error:
                raise UserError(
                    f"cannot write to {self.folder}: {one_line(error)}; choose another --out"
                ) from error
        Metrics(self.folder).keep_until(self.step)

    def save(self) -> None:
        """Writes folder/checkpoint, whole or not at all."""
        new, old = self.folder / "checkpoint.new", self.folder / "checkpoint"
        progress = {
            "step": self.step,
            "tokens": self.tokens,
            "seconds": self.seconds,
            "asked": list(self.asked),
        }
        try:
            shutil.rmtree(new, ignore_errors=True)
            new.mkdir()
            for name, tree in (
                ("model", self.model.trainable_parameters()),
                ("optimizer", self.optimizer.state),
            ):
                mx.save_safetensors(str(new / f"{name}.safetensors"), dict(tree_flatten(tree)))
            write_progress(new, progress)
            for file in new.iterdir():
                fsync_path(file)
            aside = self.folder / "checkpoint.old"
            if old.exists():
                shutil.rmtree(aside, ignore_errors=True)
                old.rename(aside)
            new.rename(old)
            shutil.rmtree(aside, ignore_errors=True)
        except (OSError, RuntimeError) as error:  # MLX raises the second for a full disk
            raise UserError(
                f"cannot write a checkpoint to {self.folder} ({one_line(error)}); free some space "
                "there, and --resume goes on from the one before"
            ) from error

    def _load(self) -> None:
        at = self.folder / "checkpoint"
        if not at.exists():
            at = self.folder / "checkpoint.old"  # killed between the two renames
        if not at.exists():
            return  # stopped before the first one
        with naming_damage(self.folder, "remove the folder and start again"):
            progress = read_progress(at, Progress)
            for name in ("model", "optimizer"):
                read_header(at / f"{name}.safetensors")  # checks it: MLX's reader trusts it
            self.model.load_weights(str(at / "model.safetensors"), strict=False)
            state = load_arrays(at / "optimizer.safetensors")
            self.optimizer.state = tree_unflatten(list(state.items()))
            mx.eval(self.model.trainable_parameters(), self.optimizer.state)
        self.step, self.tokens = progress.step, progress.tokens
        self.seconds, self.asked = progress.seconds, deque(progress.asked)

    def _write_adapter(self) -> None:
        parameters = dict(tree_flatten(self.model.trainable_parameters()))
        weights = {stored: parameters[n] for stored, n in names_in_model(parameters).items()}
        trained = {**self.config.get("trained", {}), "tokens": self.tokens, "steps": self.step}
        trained["figures"] = self.figures
        write_adapter(self.folder, weights, {**self.config, "trained": trained}, bits=BITS)


def is_projection(name: str, x) -> bool:
    """Whether Muon trains it: the square projections of a sleep layer, and not its gates' rows."""
    projections = ("q_proj", "k_proj", "v_proj", "g_proj", "o_proj")
    parts = name.split(".")
    return parts[0] == "sleep_layers" and parts[-2] in projections


def is_low_rank(name: str, x) -> bool:
    """Whether it is of a low-rank change (models/lora.py)."""
    return lora.canonical(name) is not None
