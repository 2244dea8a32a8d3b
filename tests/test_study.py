"""The study: plans, models, scores, runs that go on, and the tables made of them."""

from __future__ import annotations

import mlx_sleep  # isort: skip  (OpenBLAS before MLX)
import io
import json
import sys

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten
from typer.testing import CliRunner

from mlx_sleep.cli import app
from mlx_sleep.lab.statistics import wilson
from mlx_sleep.lab.study import (
    figures,
    models,
    plan,
    probes,
    records,
    scheduler,
    score,
    table,
    worker,
)
from mlx_sleep.lab.study.task import make_task
from mlx_sleep.lab.tasks.gsm import Gsm, make_tokenizer
from mlx_sleep.lab.tasks.rule110 import Rule110
from mlx_sleep.lab.tasks.synthetic import Batch
from mlx_sleep.models.sleep_hybrid import Model, ModelArgs
from mlx_sleep.sleep import consolidate
from mlx_sleep.utils.errors import UserError

assert mlx_sleep  # imported for its effect

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


# Plans


@pytest.mark.parametrize("task", plan.TASKS)
def test_the_plans_in_the_package(task):
    assert {"tiny", "small", "paper"} <= set(plan.sizes(task))
    for size in plan.sizes(task):
        values = plan.read_plan(task, size)
        assert values["size"] == size
        data = make_task(values)
        runs = plan.make_runs(values, data)
        for one in runs:
            for stage in models.stages_of(one.settings):
                ModelArgs.from_dict(models.config_of(one.settings, stage, data))
        hybrids = [r for r in runs if r.model == "hybrid"]
        passes = {r.passes[0] for r in hybrids}
        assert {1, 4} <= passes
        if size != "paper":  # a point of the headline figure has three seeds
            seeds = {}
            for r in hybrids:
                seeds.setdefault((r.passes, r.difficulty), set()).add(r.seed)
            assert all(len(s) >= 3 for s in seeds.values())
        known = {r.model for r in runs}
        assert {"hybrid_flops", "transformer"} <= known
        assert known & {"transformer_full", "transformer_deep"}


def test_the_papers_sizes():
    rule110 = plan.read_plan("rule110", "paper")
    task = make_task(rule110)
    assert (task.windows * task.window, task.window, rule110["batch"]) == (96, 24, 512)
    assert rule110["model"]["hidden_size"] == 256 and 32 in rule110["difficulties"]
    depo = make_task(plan.read_plan("depo", "paper"))
    assert (depo.windows * depo.window, depo.final_tokens, depo.hops) == (300, 60, 16)
    gsm = make_task(plan.read_plan("gsm", "paper"))
    assert (gsm.least, gsm.most, gsm.window, gsm.ops) == (2000, 3300, 2000, 8)


def test_a_flops_matched_run_has_the_steps_that_n_4_would_cost():
    # 10 tokens are slept over and 3 answered: 43 / 13 of the work of N = 1.
    assert settings_of("hybrid_flops-d2-n1-s0", steps=130)["steps"] == 430


@pytest.mark.parametrize(
    "change, message",
    [
        ({"runs": [{"model": "poet"}]}, "unknown model 'poet'; known: .*hybrid"),
        ({"runs": [{"passes": [1]}]}, "run lacks model"),
        ({"runs": [{"model": "hybrid", "passes": [0]}]}, r"run.passes\[0\] must be >= 1"),
        ({"runs": [{"model": "hybrid", "difficulties": [0]}]}, "t .steps of the automaton"),
        ({"runs": [{"model": "hybrid"}, {"model": "hybrid"}]}, "same run twice"),
        ({"steps": 0}, "steps must be"),
    ],
)
def test_bad_plans(change, message):
    with pytest.raises(UserError, match=message):
        runs_of(**change)


@pytest.mark.parametrize(
    "text, message",
    [
        ("{", "not valid JSON"),
        ("[1]", "one JSON object"),
        ("{}", "lacks task"),
        (json.dumps({**PLAN, "task": "depo"}), "for the task 'depo'"),
        (json.dumps({**PLAN, "batch": "4"}), "batch must be a whole number"),
        (json.dumps({**PLAN, "evaluate": {"every": 0}}), "evaluate.every"),
    ],
)
def test_bad_plan_files(tmp_path, text, message):
    path = tmp_path / "plan.json"
    path.write_text(text)
    with pytest.raises(UserError, match=message):
        plan.read_plan("rule110", str(path))


def test_other_bad_input(tmp_path):
    with pytest.raises(UserError, match="unknown task 'chess'; known: rule110"):
        plan.read_plan("chess", "tiny")
    with pytest.raises(UserError, match="unknown size 'huge'"):
        plan.read_plan("depo", "huge")
    with pytest.raises(UserError, match="cannot read"):
        plan.read_plan("depo", str(tmp_path / "none.json"))
    with pytest.raises(UserError, match="no run with passes 9; it has: 1, 2"):
        plan.make_runs(PLAN, TASK, passes=[2, 9])
    with pytest.raises(UserError, match="no run with model poet"):
        plan.make_runs(PLAN, TASK, models=["poet"])
    with pytest.raises(UserError, match="together"):
        plan.make_runs(PLAN, TASK, models=["looped"], passes=[2])
    with pytest.raises(UserError, match="does not fit rule110: .*wdith"):
        make_task({**PLAN, "world": {"wdith": 5}})
    gsm = plan.read_plan("gsm", "tiny")
    for world, message in (
        ({"names": 5}, "does not fit gsm"),
        ({"tokens": [5]}, "does not fit gsm"),
        ({"vocab_size": 10}, "no tokenizer with"),
    ):
        with pytest.raises(UserError, match=message):
            make_task({**gsm, "world": {**gsm["world"], **world}})
    with pytest.raises(UserError, match="no multiple of the pattern"):
        settings = settings_of("hybrid-d2-n1-s0", model={**PLAN["model"], "blocks": 3})
        models.build(settings, {}, TASK)
    with pytest.raises(UserError, match="too few for 3 stages"):
        models.stages_of(settings_of("sliding_warmup-d2-n2-s0", steps=1))


# Models


def test_a_looped_model_is_a_deep_one_with_the_same_weights():
    looped = model_of("looped-d2-n1-s0")
    config = models.config_of(settings_of("looped-d2-n1-s0"), {}, TASK)
    deep = Model(ModelArgs.from_dict({**config, "layer_types": config["layer_types"] * 4}))
    weights = dict(tree_flatten(looped.parameters()))
    for name in [n for n in weights if n.startswith("layers.")]:
        _, i, rest = name.split(".", 2)
        weights |= {f"layers.{int(i) + 2 * loop}.{rest}": weights[name] for loop in range(4)}
    deep.load_weights(list(weights.items()))
    tokens = mx.random.randint(0, 3, (2, 9))
    assert looped.num_layers == 8
    for a, b in zip(tree_flatten(looped(tokens)), tree_flatten(deep(tokens)), strict=True):
        assert a[0] == b[0] and np.allclose(a[1], b[1], atol=1e-5)


def test_a_deeper_model_has_as_many_blocks_as_four_passes_run():
    full = model_of("transformer_deep-d2-n1-s0")
    assert full.args.layer_types == ["attention"] * 4 * PLAN["model"]["blocks"]
    assert "fast_weights" not in full(mx.array([[1, 2]]))[1][0]


def test_skipped_blocks_pass_h_through():
    settings = settings_of("sliding_warmup-d2-n2-s0")
    first, warm_up, last = models.stages_of(settings)
    model = models.build(settings, first, TASK)
    h = mx.random.normal((1, 4, 16))
    assert mx.array_equal(model.block(1, h, {})[0], h)
    assert not mx.array_equal(model.block(0, h, {})[0], h)
    assert [s["steps"] for s in (first, warm_up, last)] == [1, 1, 2]
    assert model.sleep.window >= 13 and last["eviction"] == "sliding"

    def trained(stage):
        names = [
            n for n, _ in tree_flatten(models.build(settings, stage, TASK).trainable_parameters())
        ]
        return {n.rsplit(".", 2)[0].partition(".mixer")[0].partition(".mlp")[0] for n in names}

    assert trained(warm_up) == {"layers.1"}
    assert "layers.1" not in trained(first) and "layers.0" in trained(first)
    assert {"layers.0", "layers.1"} <= trained(last)


def test_models_of_all_n_start_alike_and_see_the_same_data(tmp_path):
    def start(name):
        settings = settings_of(name)
        model = models.build(settings, {}, TASK)
        trainer = worker.make_trainer(settings, {"steps": 4}, TASK, model, tmp_path, 0, False)
        windows, passes = trainer.batches(3)
        return tree_flatten(model.parameters()), [w.tokens for w in windows], passes

    (a, x, n), (b, y, m), (c, z, _) = (
        start(f"hybrid-d2-n{passes}-s{seed}") for passes, seed in ((1, 0), (2, 0), (1, 1))
    )
    assert (n, m) == (1, 2)
    assert all(mx.array_equal(p, q) for (_, p), (_, q) in zip(a, b, strict=True))
    assert all(mx.array_equal(p, q) for p, q in zip(x, y, strict=True))
    assert not mx.array_equal(a[0][1], c[0][1]) and not mx.array_equal(x[0], z[0])


# Scores


class Oracle:
    """Predicts the next token as it is given, or the one above it where `errors` says so."""

    def __init__(self, errors):
        self.errors = mx.array(errors)

    def hidden(self, tokens, state, mask=None):
        following = mx.concatenate([tokens[:, 1:], tokens[:, :1]], axis=1)
        wrong = mx.concatenate([self.errors[:, 1:], self.errors[:, :1]], axis=1)
        return mx.eye(9)[following + wrong], state

    def head(self, h):
        return h


def test_a_question_is_right_when_all_its_tokens_are():
    question = np.array([[-1, 0, 0, -1, 1], [-1, 0, 0, -1, 1], [-1, 0, 0, -1, 1]])
    final = np.array([[5, 1, 2, 6, 3]] * 3, np.int32)
    batch = Batch(np.zeros((3, 1, 2), np.int32), None, final, None, question)
    errors = np.zeros((3, 5), np.int32)
    errors[1, 2] = 1  # the second token of the first answer
    errors[2, 4] = errors[2, 3] = 1  # the second answer; position 3 is nobody's label
    got = score.correct_answers(Oracle(errors), batch, [])
    assert got.tolist() == [[True, True], [False, True], [True, False]]


def test_keeping_the_context_is_one_window_without_gaps():
    task = Gsm(make_tokenizer(), tokens=(60, 110), ops=2, window=40)
    batch = task.batch("test", range(4), 2)
    (chunk,) = score.batch_windows(batch, kept=True)
    for row in range(4):
        context, final, _, [answer] = task.problem("test", row, 2)
        n = len(context) + len(final)
        assert chunk.tokens[row, :n].tolist() == context + final
        assert chunk.mask[row].tolist() == [True] * n + [False] * (chunk.mask.shape[1] - n)
        used = [int(t) for t, w in zip(chunk.targets[row], chunk.weights[row], strict=True) if w]
        assert used == final[-len(used) :] and len(used) == len(str(answer)) + 1


def test_examine_counts_examples():
    model = model_of("hybrid-d2-n2-s0")
    got = score.examine(model, TASK, "test", 12, 2, 2)
    right = 0
    for i in range(12):
        batch = TASK.batch("test", [i], 2)
        state = model.init_state()
        for w in range(2):
            state, _ = consolidate(model, state, mx.array(batch.context[:, w]), 2)
        logits, _ = model(mx.array(batch.final), state)
        said = mx.argmax(logits[0, :-1], axis=-1).tolist()
        right += said == batch.final[0, 1:].tolist()
    assert got["accuracy"] == right / 12
    assert (got["low"], got["high"]) == wilson(right, 12)


def test_constant_is_the_share_of_the_commonest_answer():
    labels = [tuple(f) for f in TASK.batch("test", range(50), 2).final[:, 1:].tolist()]
    assert score.constant(TASK, 50, 2) == max(labels.count(x) for x in labels) / 50


def test_each_row_stops_when_its_own_s_is_still():
    model = model_of("random_passes-d2-n1to6-s0")
    batch = TASK.batch("test", range(8), 2)
    chunk = score.batch_windows(batch)[0]
    moves = []
    for row in range(8):
        _, report = consolidate(model, model.init_state(), chunk.tokens[row : row + 1], 5)
        moves.append(report.moved)
    threshold = float(np.median([m[2] for m in moves]))  # some stop by pass 3, some later
    expected = [next((n for n, x in enumerate(m, 1) if x < threshold), 5) for m in moves]
    assert len(set(expected)) > 1
    state, used = probes.sleep_until_still(model, chunk, model.init_state(8), 5, threshold)
    assert used.tolist() == expected
    for row, n in enumerate(expected):
        alone, _ = consolidate(model, model.init_state(), chunk.tokens[row : row + 1], n)
        np.testing.assert_allclose(
            state[1]["fast_weights"][row], alone[1]["fast_weights"][0], atol=1e-5
        )


def test_halting_at_its_ends_is_a_fixed_n():
    model = model_of("random_passes-d2-n1to6-s0")
    never, at_once = probes.halting(model, TASK, 20, 2, 4, [0.0, 1e9])
    assert (never["mean_passes"], at_once["mean_passes"]) == (4, 1)
    for row, passes in ((never, 4), (at_once, 1)):
        fixed = score.examine(model, TASK, "test", 20, 2, passes)
        assert {k: row[k] for k in fixed} == fixed


# Runs


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


# The command


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """A study of five runs, two at a time: its folder, and what the command printed."""
    folder = tmp_path_factory.mktemp("study")
    (folder / "plan.json").write_text(json.dumps(PLAN))
    command = [
        "study",
        "rule110",
        "--size",
        str(folder / "plan.json"),
        "--out",
        str(folder / "out"),
    ]
    command += ["--jobs", "2", "--model", "hybrid,looped", "--passes", "1"]
    done = CliRunner().invoke(app, command, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return folder, command, done


def test_results_have_the_rows_of_the_runs(study):
    folder, _, done = study
    found = json.loads((folder / "out" / "results.json").read_text())
    keys = "task size model difficulty passes seed tokens accuracy low high".split()
    assert all(list(row) == keys for row in found["rows"] + found["curve"])
    points = [(r["model"], r["difficulty"], r["passes"], r["seed"]) for r in found["rows"]]
    assert sorted(points) == [
        *(("hybrid", d, 1, s) for d in (1, 2) for s in (0, 1)),
        ("looped", 2, 1, 0),
    ]
    assert {r["tokens"] for r in found["rows"]} == {4 * 4 * 13}
    assert sorted({r["tokens"] for r in found["curve"]}) == [2 * 4 * 13, 4 * 4 * 13]
    for row in found["rows"]:
        assert 0 <= row["low"] <= row["accuracy"] <= row["high"] <= 1
        name = f"{row['model']}-d{row['difficulty']}-n1-s{row['seed']}"
        assert (folder / "out" / name / "metrics.jsonl").read_text().count("\n") == 4
    assert [(r["model"], r["passes"]) for r in found["latency"]] == [
        ("hybrid", 1),
        ("hybrid", 0),
        ("looped", 1),
        ("looped", 0),
    ]
    text = (folder / "out" / "results.md").read_text()
    assert text in done.output and "| looped | 1 |" in text and "t = 2 (always:" in text


def test_a_second_study_does_nothing_twice(study, monkeypatch):
    folder, command, _ = study
    monkeypatch.setattr(scheduler, "_start", None)
    done = CliRunner().invoke(app, [*command, "--json"], catch_exceptions=False)
    found = json.loads(done.stdout)
    assert found == json.loads((folder / "out" / "results.json").read_text())
    (folder / "plan.json").write_text(json.dumps({**PLAN, "batch": 8}))
    with pytest.raises(UserError, match="another config"):
        CliRunner().invoke(app, command, catch_exceptions=False)
    (folder / "plan.json").write_text(json.dumps(PLAN))


def test_figures_without_matplotlib(study, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(UserError, match="pip install 'mlx-sleep\\[plot\\]'"):
        CliRunner().invoke(app, [*study[1], "--figures"], catch_exceptions=False)


def test_a_study_of_two_points_has_no_figures(study, tmp_path):
    pytest.importorskip("matplotlib")
    found = json.loads((study[0] / "out" / "results.json").read_text())
    assert figures.draw(found, tmp_path) == []


def test_figures(tmp_path):
    pytest.importorskip("matplotlib")
    hybrid = [
        {
            "model": "hybrid",
            "seed": seed,
            "difficulty": 2,
            "passes": N,
            "accuracy": 0.2 * N + seed / 20,
        }
        for N in (1, 2, 4)
        for seed in (0, 1)
    ]
    flops = {"model": "hybrid_flops", "seed": 0, "difficulty": 2, "passes": 1, "accuracy": 0.9}
    found = {
        "task": "rule110",
        "always": {"2": 0.16},
        "rows": [*hybrid, flops],
        "curve": [{**row, "tokens": tokens} for row in hybrid for tokens in (1e6, 2e6, 3e6)],
        "retention": [
            {**row, "model": model, "further": further}
            for row in hybrid
            for further in (1, 2, 4)
            for model in ("hybrid", "transformer")
        ],
    }
    paths = figures.draw(found, tmp_path)
    assert [p.name for p in paths] == ["passes.png", "tokens.png", "retention.png"]
    assert all(p.read_bytes().startswith(b"\x89PNG") for p in paths)
    (panel,) = figures.passes(found).axes
    assert panel.get_title() == "t = 2" and panel.get_ylabel() == "accuracy (%)"
    seeds, alone = panel.collections
    # Side by side, and the mean through the middle.
    assert np.allclose(seeds.get_offsets()[:2], [[0.965, 0.2], [1.035, 0.25]])
    line, square, guessing = panel.lines
    assert np.allclose(line.get_xydata(), [[1, 0.225], [2, 0.425], [4, 0.825]])
    assert len(alone.get_offsets()) == 1 and square.get_linestyle() == "None"
    assert guessing.get_ydata() == [0.16, 0.16]


def test_a_curve_joins_seeds_by_examination():
    # Padding makes the numbers of tokens differ from seed to seed.
    rows = [
        {"seed": seed, "tokens": tokens, "accuracy": accuracy}
        for seed, tokens, accuracy in (
            (0, 21e6, 0.5),
            (0, 10e6, 0.1),
            (1, 11e6, 0.3),
            (1, 20e6, 0.7),
        )
    ]
    assert figures._examinations(rows) == [[(10, 0.1), (11, 0.3)], [(21, 0.5), (20, 0.7)]]


def test_bad_options():
    for options, message in ((["--jobs", "0"], "--jobs"), (["--passes", "9"], "passes 9")):
        with pytest.raises(UserError, match=message):
            CliRunner().invoke(app, ["study", "rule110", *options], catch_exceptions=False)


def test_pooled_rows_put_the_seeds_together():
    rows = [
        {"passes": 1, "seed": 1, "accuracy": 0.5, "tokens": 10},
        {"passes": 1, "seed": 0, "accuracy": 0.3, "tokens": 10},
        {"passes": 2, "seed": 0, "accuracy": 1.0, "tokens": 20},
    ]
    one, two = table.pooled(rows, ("passes",), 50)
    assert one["accuracy"] == pytest.approx(0.4) and one["seeds"] == [0.3, 0.5]
    assert (one["low"], one["high"]) == pytest.approx(wilson(40, 100))
    assert two["tokens"] == 20 and (two["low"], two["high"]) == wilson(50, 50)
