"""Recipes, plans, and what a run leaves in its folder: wrong values are named, damage is told."""

from __future__ import annotations

import json

import mlx.core as mx
import pytest

from mlx_sleep.lab.study import plan, records
from mlx_sleep.models.adapter import CONFIG, FORMAT, WEIGHTS, open_adapter
from mlx_sleep.training import checkpoints
from mlx_sleep.training.checkpoints import Checkpoint
from mlx_sleep.training.recipe import RECIPES, read_recipe
from mlx_sleep.training.run_folder import Metrics, read_rows
from mlx_sleep.utils.errors import UserError

RECIPE = json.loads((RECIPES / "embedded.json").read_text())
PLAN = json.loads((plan.CONFIGS / "rule110_tiny.json").read_text())
STAGE = RECIPE["stages"][0]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"stages": [{n: x for n, x in STAGE.items() if n != "passes"}]}, "stages[0] lacks passes"),
        ({"stages": [{n: x for n, x in STAGE.items() if n != "level"}]}, "stages[0] lacks level"),
        ({"stages": {"0": STAGE}}, "stages must be a list"),
        ({"stages": []}, "the length of stages must be >= 1"),
        ({"stages": [{**STAGE, "passes": [1, "2"]}]}, "stages[0].passes[1] must be a whole number"),
        ({"batch": "4"}, "batch must be a whole number"),
        ({"optimizer": {"lr": 1.0}}, "optimizer.lr is not a known field; known: adamw_lr"),
        ({"optimizer": None}, "optimizer must be an object, not null"),
        ({"seed": 1.5}, "seed must be a whole number"),
        ({"task": ["memory"]}, "task must be a string"),
    ],
)
def test_a_wrong_field_of_a_recipe_is_named(tmp_path, change, says):
    file = tmp_path / "bad.json"
    file.write_text(json.dumps({**RECIPE, **change}))
    with pytest.raises(UserError) as caught:
        read_recipe(str(file))
    assert str(caught.value).startswith(f"{file}: ") and says in str(caught.value)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"evaluate": {"every": 50, "valid": 1}}, "evaluate lacks test"),
        ({"difficulties": "1"}, "difficulties must be a list of whole numbers"),
        ({"runs": [{"model": "hybrid", "passes": "2"}]}, "runs[0].passes must be a list"),
        ({"runs": [{"model": ["hybrid"]}]}, "runs[0].model must be a string"),
        ({"beyond": {"thresholds": ["0.1"]}}, "beyond.thresholds[0] must be a number"),
    ],
)
def test_a_wrong_field_of_a_plan_is_named(tmp_path, change, says):
    file = tmp_path / "bad.json"
    file.write_text(json.dumps({**PLAN, **change}))
    with pytest.raises(UserError) as caught:
        plan.read_plan("rule110", str(file))
    assert str(caught.value).startswith(f"{file}: ") and says in str(caught.value)


@pytest.fixture
def run(tmp_path):
    weights = {"w": mx.arange(6.0).reshape(2, 3)}
    checkpoints.save(tmp_path, Checkpoint(weights, {"m": mx.ones((4,))}, 3, 120))
    return tmp_path


def test_a_checkpoint_there_and_back(run):
    found = checkpoints.load(run)
    assert (found.step, found.tokens) == (3, 120)
    assert found.weights["w"].tolist() == [[0, 1, 2], [3, 4, 5]]


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors"])
def test_a_bit_of_a_checkpoint(run, name):
    file = run / "checkpoint" / name
    raw = bytearray(file.read_bytes())
    raw[-1] ^= 1
    file.write_bytes(raw)
    with pytest.raises(UserError, match="cannot be read: .* its checksum is another; remove it"):
        checkpoints.load(run)


@pytest.mark.parametrize(
    "text", ["{}", "null", "7", '{"step": "3", "tokens": 1}', '{"step": 3}', "{", '{"step": -1}']
)
def test_progress_that_is_none(run, text):
    (run / "checkpoint" / "progress.json").write_text(text)
    with pytest.raises(UserError, match="progress.json"):
        checkpoints.load(run)
    with pytest.raises(UserError, match="progress.json"):
        records.check_metrics(run)


def test_a_changed_count_is_damage(run):
    file = run / "checkpoint" / "progress.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "step": 2}))
    with pytest.raises(UserError, match="its checksum is another"):
        checkpoints.load(run)


def test_a_checkpoint_of_an_earlier_version_has_no_checksum(run):
    (run / "checkpoint" / "progress.json").write_text('{"step": 5, "tokens": 6}')
    assert checkpoints.load(run).step == 5


@pytest.mark.parametrize("bad", ["7", "null", "[1]", '{"step": "1"}', "{", '{"st', "\xff"])
def test_rows_end_where_one_is_none(tmp_path, bad):
    file = tmp_path / "metrics.jsonl"
    good = [{"step": 1, "seconds": 2.0}, {"step": 2, "seconds": 1.0}]
    lines = [json.dumps(good[0]), json.dumps(good[1]), bad, json.dumps({"step": 3})]
    file.write_bytes("\n".join(lines).encode("latin-1"))
    assert read_rows(file) == good and records.training_seconds(tmp_path) == 3.0
    Metrics(tmp_path).keep_until(1)
    assert [json.loads(line) for line in file.read_text().splitlines()] == good[:1]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"base": {"weights": 5}}, "base.weights must be a string"),
        ({"sleep": 5}, "sleep must be an object"),
        ({"sleep": {"passes": "1"}}, "sleep.passes must be a whole number"),
        ({"sleep_layers": [{"before": "1", "kind": "jet"}]}, "sleep_layers[0].before must be"),
        ({"sleep_layers": [5]}, "sleep_layers[0] must be an object"),
        ({"quantization": {"bits": 8}}, "quantization lacks group_size"),
        ({"lora_rank": 1.5}, "lora_rank must be a whole number"),
    ],
)
def test_a_wrong_field_of_an_adapter_is_named(tmp_path, change, says):
    config = {"format": FORMAT, "base": {"weights": "0"}, "sleep_layers": []}
    (tmp_path / CONFIG).write_text(json.dumps({**config, **change}))
    mx.save_safetensors(str(tmp_path / WEIGHTS), {})
    with pytest.raises(UserError) as caught:
        open_adapter(tmp_path)
    assert str(caught.value).startswith(f"{tmp_path / CONFIG}: ") and says in str(caught.value)
