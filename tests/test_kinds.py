"""Which models sleep on their own: those that were trained to, as their folders say."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest

from mlx_sleep.cli.model_names import ADAPTERS, choose
from mlx_sleep.cli.sleeping import kind, may_sleep
from mlx_sleep.convert.export import export
from mlx_sleep.convert.opening import open_model
from mlx_sleep.convert.pipeline import convert
from mlx_sleep.convert.quantize import NumberTypes
from mlx_sleep.models.checkpoint import TRAINING, is_trained
from mlx_sleep.models.load import load_model
from tests.checkpoints import CONFIG, FLA, LLAMA, random_weights, write
from tests.fakes import fake_folder

RECORD = {"tokens": 5000, "steps": 7}


def model(fast_weights=True, trained=False):
    return SimpleNamespace(has_fast_weights=fast_weights, trained_to_sleep=trained)


def test_a_line_for_each_kind():
    assert kind(model(trained=True)) == "this model was trained to sleep"
    assert "not trained to sleep" in kind(model()) and "only when its window is full" in kind(
        model()
    )
    assert "only when" not in kind(model(), idle=5)
    assert "mlx-sleep retrofit" in kind(model(fast_weights=False))


def test_who_may_sleep():
    assert may_sleep(model(trained=True)) and may_sleep(model(trained=True), 0)
    assert not may_sleep(model()) and not may_sleep(model(), 0) and may_sleep(model(), 5)
    assert not may_sleep(model(fast_weights=False), 5)


@pytest.mark.parametrize(
    ("record", "trained"),
    [
        (RECORD, True),
        ({"tokens": 0}, False),
        ({"tokens": True}, False),
        ({"tokens": "5000"}, False),
        ({}, False),
        ([5000], False),
        (None, False),
    ],
)
def test_what_counts_as_a_record(record, trained):
    assert is_trained({TRAINING: record}) is trained and not is_trained({})


def test_the_package_s_own_models_are_trained():
    assert load_model(choose("embedded").open())[0].trained_to_sleep
    config = json.loads((ADAPTERS / "smollm2" / "adapter_config.json").read_text())
    assert is_trained({TRAINING: config["trained"]})


@pytest.mark.parametrize("config", [CONFIG, FLA], ids=lambda config: config["model_type"])
def test_the_record_is_kept_on_every_way(tmp_path, config):
    source = write(tmp_path / "torch", {**config, TRAINING: RECORD}, random_weights(config))
    assert load_model(open_model(source))[0].trained_to_sleep
    convert(source, tmp_path / "ours")
    convert(tmp_path / "ours", tmp_path / "half", NumberTypes(dtype="float16"))
    export(tmp_path / "ours", tmp_path / "back")
    for name in ("ours", "half", "back"):
        assert open_model(tmp_path / name).config[TRAINING] == RECORD
    # It is no part of the model's identity: memories stay.
    plain = write(tmp_path / "plain", config, {})
    (plain / "model.safetensors").write_bytes((source / "model.safetensors").read_bytes())
    convert(plain, tmp_path / "without")
    prints = [open_model(tmp_path / name).config["fingerprint"] for name in ("ours", "without")]
    assert prints[0] == prints[1] and not load_model(tmp_path / "without")[0].trained_to_sleep


def test_quantization_keeps_it(tmp_path):
    config = {**LLAMA, "hidden_size": 32, "intermediate_size": 32, TRAINING: RECORD}
    source = write(tmp_path / "torch", config, random_weights(config))
    convert(source, tmp_path / "small", NumberTypes(bits=4, group_size=32))
    assert open_model(tmp_path / "small").config[TRAINING] == RECORD


def test_an_untrained_model_keeps_its_window_at_the_end_of_a_chat(tmp_path, run):
    folder = fake_folder(tmp_path / "m")
    config = json.loads((folder / "config.json").read_text())
    asked = ["--model", folder, "--home", tmp_path, "--max-tokens", "2"]
    code, _, error = run("chat", *asked, "--memory", "trained", stdin=b"hello\n")
    assert code == 0 and not error
    del config[TRAINING]
    (folder / "config.json").write_text(json.dumps(config))
    code, _, error = run("chat", *asked, "--memory", "not", stdin=b"hello\n")
    assert code == 0 and "was not trained to sleep" in error and error.count("\n") == 1
    code, _, error = run("generate", *asked, "--memory", "not", "--prompt", "again")
    assert code == 0 and "was not trained to sleep" in error
    code, _, _ = run("chat", *asked, "--memory", "asked", "--idle", "9", stdin=b"hello\n")
    shown = {
        name: json.loads(run("memory", "show", name, "--home", tmp_path, "--json")[1])
        for name in ("trained", "not", "asked")
    }
    assert [shown[name]["sleeps"] for name in ("trained", "not", "asked")] == [1, 0, 1]
