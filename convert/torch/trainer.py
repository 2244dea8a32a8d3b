"""Trains the sleep layers of a retrofit: a run is a folder, and can be stopped and gone on with.

    folder/recipe.json        the settings; a folder goes on with the same ones alone
    folder/metrics.jsonl      a line for every step, and one for every evaluation
    folder/checkpoint.pt      parameters, optimizers, budget spent, replaced whole
    folder/adapters.safetensors, adapter_config.json    what came of it (adapter.py)

Muon for the projections of the sleep layers, AdamW for the rest. Nothing here knows where the
batches come from.
"""

from __future__ import annotations

import json
import math
import signal
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import torch

from ...training.run_folder import Metrics, check_run
from ...training.schedule import Budget, stage_at, trapezoid
from ...utils import schema
from ...utils.atomic import fsync_path, replace_file
from ...utils.errors import UserError
from ...utils.files import check_zip, one_line, read_json
from ...utils.schema import Range
from .adapter import save_adapter
from .loss import LifeBatch, life_loss
from .muon import Muon
from .retrofit import Retrofit

LOG_EVERY = 10  # steps

Jobs = Iterator[tuple[int, int]]
"""(step, stage of the curriculum) of one batch after another."""
Batches = Callable[[Jobs], Iterable[dict[str, np.ndarray]]]
"""Makes them, in order and perhaps some ahead of time; `LifeBatch.from_arrays` takes each."""


@dataclass(frozen=True)
class Settings:
    """What a run is: shares (of the budget) has an entry for each stage of the curriculum."""

    shares: tuple[float, ...] = (1.0,)
    muon_lr: float = 5e-3
    adamw_lr: float = 2e-3
    lora_lr: float = 5e-4
    warmup: int = 30
    clip: float = 1.0
    value_weight: float = 4.0
    kl_weight: float = 1.0


@dataclass
class _Progress:
    """The counts of a checkpoint; asked are stages of the batches that were under way."""

    step: Annotated[int, Range(0)]
    tokens: Annotated[int, Range(0)]
    seconds: Annotated[float, Range(0)]
    asked: list[Annotated[int, Range(0)]]


class Trainer:
    """batches: where they come from. evaluate(model): figures for the log, once at the end and
    every `evaluate_every` seconds. about: more that must be the same when a run is resumed."""

    def __init__(
        self,
        model: Retrofit,
        folder: Path,
        batches: Batches,
        budget: Budget,
        settings: Settings,
        *,
        evaluate: Callable[[Retrofit], dict] | None = None,
        evaluate_every: float = 600.0,
        save_every: float = 300.0,
        about: dict | None = None,
        say: Callable[[str], None] = print,
    ):
        self.model, self.folder, self.batches = model, Path(folder), batches
        self.budget, self.settings, self.say = budget, settings, say
        self.evaluate, self.evaluate_every = evaluate, evaluate_every
        self.save_every = save_every
        self.device = model.embedding.device
        self.recipe = json.loads(json.dumps({**asdict(settings), **(about or {})}))
        projections: list[torch.nn.Parameter] = []
        loras: list[torch.nn.Parameter] = []
        rest: list[torch.nn.Parameter] = []
        for name, p in model.named_parameters():
            kind = loras if "lora" in name else projections if _is_projection(name) else rest
            kind.append(p)
        groups = [{"params": rest, "base": settings.adamw_lr}]
        if loras:
            groups.append({"params": loras, "base": settings.lora_lr})
        self.muon = Muon([{"params": projections, "base": settings.muon_lr}], settings.muon_lr)
        self.adamw = torch.optim.AdamW(
            groups, settings.adamw_lr, betas=(0.9, 0.95), weight_decay=0.0, foreach=True
        )
        self.step, self.tokens, self.seconds = 0, 0, 0.0
        self.asked: deque[int] = deque()  # stages of the batches that are under way
        self.stop = False

    @property
    def progress(self) -> float:
        return self.budget.progress(self.tokens, self.seconds)

    def run(self, resume: bool = False) -> dict:
        """Trains until the budget is spent, or SIGINT or SIGTERM comes: the last figures.

        Either way a checkpoint and the adapter are written; a second signal is a KeyboardInterrupt,
        after which the last checkpoint stands. UserError where the folder holds another run, and at
        a loss or gradient that isn't finite; the checkpoint before it stays.
        """
        self._open(resume)
        before = {s: signal.signal(s, self._interrupted) for s in (signal.SIGINT, signal.SIGTERM)}
        try:
            return self._train()
        except OSError as error:
            raise UserError(
                f"cannot write to {self.folder} ({error}); free some space there, and --resume "
                "goes on from the last checkpoint"
            ) from error
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _interrupted(self, *_) -> None:
        if self.stop:
            raise KeyboardInterrupt
        self.stop = True

    def _train(self) -> dict:
        figures: dict = {}
        made = iter(self.batches(self._jobs()))
        rows: list[dict] = []
        batch = self._take(made)  # before the clock: worker processes take their time to start
        started, spent = time.perf_counter(), self.seconds
        saved = evaluated = started
        metrics = Metrics(self.folder)
        while self.progress < 1 and not self.stop:
            rate = trapezoid(self.step, self.progress, self.settings.warmup)
            loss, norm, sums = self._update(batch, rate)
            self.step += 1
            self.tokens += batch.real
            batch = self._take(made)  # made and copied while the device computes
            self._check(loss, norm)
            self.seconds = spent + time.perf_counter() - started
            row = {
                "step": self.step,
                "tokens": self.tokens,
                "seconds": round(self.seconds, 3),
                "stage": self.stage,
                "rate": rate,
                "loss": loss.item(),
                "grad_norm": norm.item(),
                **{name: x.item() for name, x in sums.items()},
            }
            metrics.append(row)
            rows.append(row)
            if self.step % LOG_EVERY == 0:
                self.say(_line(rows))
                rows = rows[-1:]
            now = time.perf_counter()
            if now - saved > self.save_every:
                self.save()
                saved = now
            if self.evaluate and now - evaluated > self.evaluate_every:
                figures = self._evaluate(metrics, self.evaluate)
                evaluated = time.perf_counter()
                started += evaluated - now  # the budget is for training
        self.save()
        if self.evaluate and not self.stop:
            figures = self._evaluate(metrics, self.evaluate)
        trained = {"tokens": self.tokens, "steps": self.step, "figures": figures}
        save_adapter(self.folder, self.model, trained)
        if self.stop:
            self.say(f"stopped after step {self.step}; the same command with --resume goes on")
        return figures

    def _evaluate(self, metrics: Metrics, evaluate: Callable[[Retrofit], dict]) -> dict:
        figures = evaluate(self.model)
        metrics.append({"step": self.step, "tokens": self.tokens, **figures})
        self.say("evaluation: " + ", ".join(f"{n} {_figure(x)}" for n, x in figures.items()))
        return figures

    # --- one step ---

    def _jobs(self) -> Jobs:
        """What is to be made, without end: after a resumption first what was under way."""
        resumed, self.asked = self.asked, deque()
        while True:
            shares = self.settings.shares
            stage = resumed.popleft() if resumed else stage_at(shares, self.progress)
            self.asked.append(stage)
            yield self.step + len(self.asked) - 1, stage

    def _take(self, made: Iterator[dict[str, np.ndarray]]) -> LifeBatch:
        return LifeBatch.from_arrays(
            next(made), self.device, self.settings.value_weight, self.model.adapter.fold
        )

    def _update(self, batch: LifeBatch, rate: float):
        self.stage = self.asked.popleft()
        for group in (*self.muon.param_groups, *self.adamw.param_groups):
            group["lr"] = group["base"] * rate
        loss, sums = life_loss(self.model, batch, self.settings.kl_weight)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.settings.clip)
        for optimizer in (self.muon, self.adamw):
            optimizer.step()
            optimizer.zero_grad()
        return loss.detach(), norm, sums

    def _check(self, loss, norm) -> None:
        for what, x in (("loss", loss), ("gradient", norm)):
            if not math.isfinite(x.item()):
                raise UserError(
                    f"the {what} is not finite at step {self.step}; lower the learning rates and "
                    f"start again with another --out (the checkpoint before it is kept)"
                )

    # --- the folder ---

    def _open(self, resume: bool) -> None:
        recipe = self.folder / "recipe.json"
        check_run(self.folder, resume)
        if resume:
            if read_json(recipe) != self.recipe:
                raise UserError(
                    f"{self.folder} holds a run with other settings; give the same ones, or "
                    "another --out"
                )
            self._load()
        else:
            self.folder.mkdir(parents=True, exist_ok=True)
            replace_file(recipe, json.dumps(self.recipe, indent=2).encode())
        Metrics(self.folder).keep_until(self.step)

    def save(self) -> None:
        """Writes folder/checkpoint.pt, whole or not at all."""
        new = self.folder / "checkpoint.new"
        state = {
            "model": self.model.state_dict(),
            "muon": self.muon.state_dict(),
            "adamw": self.adamw.state_dict(),
            "step": self.step,
            "tokens": self.tokens,
            "seconds": self.seconds,
            "asked": list(self.asked),
        }
        try:
            torch.save(state, new)
            fsync_path(new)
        except (OSError, RuntimeError) as error:
            raise UserError(
                f"cannot write a checkpoint to {self.folder} ({error}); free some space there, "
                "and --resume goes on from the one before"
            ) from error
        new.replace(self.folder / "checkpoint.pt")

    def _load(self) -> None:
        path = self.folder / "checkpoint.pt"
        if not path.exists():
            return  # stopped before the first one
        try:
            check_zip(path)
            state = torch.load(path, map_location=self.device, weights_only=True)
            self.model.load_state_dict(state["model"])
            self.muon.load_state_dict(state["muon"])
            self.adamw.load_state_dict(state["adamw"])
        except Exception as error:  # torch raises all kinds for damaged files
            reason = one_line(error)[:200]
            raise UserError(
                f"{path} cannot be read ({reason}); remove the folder and start again"
            ) from error
        counts = {name: x for name, x in state.items() if name not in ("model", "muon", "adamw")}
        with schema.naming(path):
            progress = schema.read(_Progress, counts)
        self.step, self.tokens, self.seconds = progress.step, progress.tokens, progress.seconds
        self.asked = deque(progress.asked)


def _is_projection(name: str) -> bool:
    """Whether Muon trains it: the square projections of a sleep layer, and not its gates' rows."""
    projections = ("q_proj", "k_proj", "v_proj", "g_proj", "o_proj")
    return name.split(".")[-2] in projections


def _line(rows: Sequence[dict]) -> str:
    """The log line of some steps; the first row is only where the clock started, if it can be."""
    counted = rows[1:] if len(rows) > LOG_EVERY else rows

    def share(what: str) -> str:
        n = sum(row[what] for row in counted)
        return f"{sum(row[what + '_right'] for row in counted) / n:.3f}" if n else "-"

    seconds = rows[-1]["seconds"] - rows[0]["seconds"]
    speed = (rows[-1]["tokens"] - rows[0]["tokens"]) / max(seconds, 1e-9)
    mean = {n: sum(row[n] for row in counted) / len(counted) for n in ("loss", "kl")}
    last = rows[-1]
    return (
        f"step {last['step']}: loss {mean['loss']:.3f}, kl {mean['kl']:.3f}, values right "
        f"{share('values')}, refusals right {share('refusals')}, stage {last['stage']}, "
        f"{last['tokens'] / 1e6:.2f}M tokens, {speed:.0f} tokens/s, {last['seconds']:.0f} s"
    )


def _figure(x) -> str:
    return f"{x:.3f}" if isinstance(x, float) else str(x)
