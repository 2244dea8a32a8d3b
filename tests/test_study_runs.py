"""Runs of a study: they go on where they stopped, and fail with a reason."""

from __future__ import annotations

import io
import json
import sys

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

from mlx_sleep.lab.study import models, records, scheduler, score, worker
from mlx_sleep.utils.errors import UserError
from tests.studies import PLAN, TASK, model_of, runs_of, settings_of


class Stop(Exception):
    pass


def without_time(result):
    return {k: v for k, v in result.items() if k != "seconds"}


@pytest.mark.parametrize("name", ["random_passes-d2-n1to6-s0", "sliding_warmup-d2-n2-s0"])
def test_a_stopped_run_goes_on_to_the_same_result(tmp_path, monkeypatch, name):
    settings = settings_of(
        name,
        steps=8,
        runs=[
            {"model": n, "passes": [2], "difficulties": [2]}
            for n in ("random_passes", "sliding_warmup")
        ],
    )
    whole = worker.train(settings, tmp_path / "whole")
    on_step, seen = worker.Evaluation.on_step, []

    def stopping(self, row):
        on_step(self, row)
        seen.append(row)
        if len(seen) == 5:  # one step after a checkpoint
            raise Stop

    monkeypatch.setattr(worker.Evaluation, "on_step", stopping)
    with pytest.raises(Stop):
        worker.train(settings, tmp_path / "cut")
    assert not (tmp_path / "cut" / "result.json").exists()
    for path in (tmp_path / "cut").rglob("evaluations.jsonl"):
        with open(path, "a") as file:
            file.write('{"tokens": 9')  # a kill in the middle of a row
            file.write("\n")
    assert without_time(worker.train(settings, tmp_path / "cut")) == without_time(whole)
    monkeypatch.undo()
    monkeypatch.setattr(worker, "_train", None)  # what is done is not done again
    assert worker.train(settings, tmp_path / "cut")["rows"] == whole["rows"]
    assert records.steps_done(tmp_path / "cut") == 8


def test_the_warm_up_moves_the_inserted_layers_alone(tmp_path, monkeypatch):
    make_trainer, batches = worker.make_trainer, []

    def recording(*arguments):
        trainer = make_trainer(*arguments)
        batches.extend(trainer.batches(step)[0][0].tokens for step in range(trainer.steps))
        return trainer

    monkeypatch.setattr(worker, "make_trainer", recording)
    settings = settings_of("sliding_warmup-d2-n2-s0", steps=8)
    result = worker.train(settings, tmp_path)
    context = [np.array(tokens)[:, :5] for tokens in batches]  # stage 1 has all in one window
    fresh = TASK.batch("train", range(8 * 4), 2).context[:, 0]
    np.testing.assert_array_equal(np.concatenate(context), fresh)  # no stage repeats data
    stages = [mx.load(str(tmp_path / f"stage-{i}/checkpoint/model.safetensors")) for i in (1, 2, 3)]
    initial = dict(tree_flatten(models.build(settings, {}, TASK).parameters()))

    def moved(a, b):
        return {
            n.partition(".mixer")[0].partition(".mlp")[0]
            for n in a
            if not mx.array_equal(a[n], b[n])
        }

    assert moved(initial, stages[0]) == {"layers.0", "embed_tokens.weight", "norm.weight"}
    assert moved(stages[0], stages[1]) == {"layers.1"}
    assert moved(stages[1], stages[2]) > {"layers.0", "layers.1"}
    assert result["tokens"] == 8 * 4 * 13
    assert result["retention"] == []  # S alone crosses a boundary with hard eviction only


def test_without_fast_weights_nothing_of_the_context_is_left(tmp_path):
    model = model_of("transformer-d2-n1-s3")
    batch = TASK.batch("test", range(6), 2)
    state = score.sleep_over(model, score.batch_windows(batch)[:-1], 1, 6)
    assert state == [{}, {}]
    full = models.build(
        settings_of("transformer_full-d2-n1-s3"), {}, TASK
    )  # sees it: another context, another answer
    logits = full(score.batch_windows(batch, kept=True)[0].tokens)[0]
    assert np.abs(np.diff(np.array(logits[:, 10]), axis=0)).max() > 1e-4


def test_another_config_is_refused(tmp_path):
    settings = settings_of("hybrid-d2-n1-s0")
    worker.train(settings, tmp_path)
    other = {**settings, "batch": 5}
    with pytest.raises(UserError, match="another config; choose another --out"):
        worker.train(other, tmp_path)
    (tmp_path / "result.json").unlink()  # and so is an unfinished one
    with pytest.raises(UserError, match="another config"):
        records.finished(tmp_path, other)
    assert records.finished(tmp_path, settings) is None
    (tmp_path / "result.json").write_text('{"rows')
    with pytest.raises(UserError, match="is damaged"):
        worker.train(settings, tmp_path)


def test_a_metrics_file_cut_short_is_refused(tmp_path):
    settings = settings_of("hybrid-d2-n1-s0")
    worker.train(settings, tmp_path)
    (tmp_path / "result.json").unlink()
    metrics = tmp_path / "metrics.jsonl"
    lines = metrics.read_text().splitlines(keepends=True)
    metrics.write_text("".join(lines[:2]) + lines[2][:20])
    with pytest.raises(UserError, match="cut short: the checkpoint is at step 4"):
        worker.train(settings, tmp_path)
    metrics.write_text("".join(lines) + '{"step": 5, "lo')  # rows after it are repeated anyway
    worker.train(settings, tmp_path)


def test_a_run_ends_with_the_study_that_started_it(tmp_path, monkeypatch):
    parents = iter([1, 1, 1])  # the third step finds another parent
    monkeypatch.setattr(worker.os, "getppid", lambda: next(parents, 7))
    monkeypatch.setattr(sys, "argv", ["run", str(tmp_path)])
    monkeypatch.setattr(sys, "stdin", io.StringIO(json.dumps(settings_of("hybrid-d2-n1-s0"))))
    with pytest.raises(SystemExit, match="the study that started this run is gone"):
        worker.main()
    assert records.steps_done(tmp_path) == 3 and not (tmp_path / "result.json").exists()


def test_a_run_that_is_at_work_is_left_alone(tmp_path):
    with worker.Lock(tmp_path / "lock"), pytest.raises(UserError, match="is at work in"):
        worker.train(settings_of("hybrid-d2-n1-s0"), tmp_path)


def test_a_run_that_fails_says_which_and_why(tmp_path):
    runs = list(runs_of(trainer={**PLAN["trainer"], "warmth": 3}).values())[:1]
    with pytest.raises(UserError, match="the run hybrid-d1-n2-s0 failed: .*warmth"):
        scheduler.run_all(runs, tmp_path)
