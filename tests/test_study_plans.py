"""Plans of studies: those in the package, and bad ones."""

from __future__ import annotations

import json

import pytest

from mlx_sleep.lab.study import models, plan
from mlx_sleep.lab.study.task import make_task
from mlx_sleep.models.sleep_hybrid import ModelArgs
from mlx_sleep.utils.errors import UserError
from tests.studies import PLAN, TASK, runs_of, settings_of


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
