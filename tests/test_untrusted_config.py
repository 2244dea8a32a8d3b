"""Files with a wrong value: one line with the file and the field, and nothing is computed."""

from __future__ import annotations

import json
import os
import shutil
from typing import Any

import pytest

from mlx_sleep.convert.pipeline import convert
from mlx_sleep.models.load import build, load
from mlx_sleep.utils import limits, schema
from mlx_sleep.utils.errors import UserError
from mlx_sleep.utils.files import read_json
from tests.checkpoints import GRANITE, LLAMA
from tests.fakes import fake_config, fake_folder
from tests.test_parity_jet_nemotron import TIED as JET


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    return fake_folder(tmp_path_factory.mktemp("untrusted") / "model")


@pytest.fixture
def folder(original, tmp_path):
    return shutil.copytree(original, tmp_path / "model")


def edit(file, **fields):
    values = json.loads(file.read_text()) if file.exists() else {}
    file.write_text(json.dumps({**values, **fields}))


def refusal(do, *arguments) -> str:
    with pytest.raises(UserError) as caught:
        do(*arguments)
    assert type(caught.value) is UserError and "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("file", "field", "value"),
    [
        ("generation_config.json", "eos_token_id", 1.5),
        ("generation_config.json", "eos_token_id", ["2"]),
        ("config.json", "eos_token_id", {"id": 2}),
        ("config.json", "sleep", 5),
        ("config.json", "sleep.a", {"a": 1}),
        ("config.json", "sleep.passes", {"passes": "4"}),
        ("config.json", "sleep.loop_range", {"loop_range": [0, 1, 2]}),
        ("config.json", "sleep.carry_conv", {"carry_conv": "yes"}),
        ("config.json", "max_position_embeddings", "128"),
        ("config.json", "text_config", [1]),
        ("config.json", "rope_theta", "1e4"),
        ("config.json", "hidden_size", 32.0),
        ("config.json", "hidden_size", True),
        ("config.json", "linear_num_key_heads", 0),
        ("config.json", "layer_types[1]", ["attention", 1]),
        ("config.json", "quantization.bits", {"group_size": 64}),
        ("config.json", "quantization.group_size", {"group_size": "64", "bits": 4}),
        ("config.json", "sleep_layers", {"before": 1}),
        ("config.json", "rms_norm_eps", float("nan")),
        ("tokenizer_config.json", "eos_token", 5),
        ("tokenizer_config.json", "chat_template", {"default": ""}),
        ("tokenizer_config.json", "add_bos_token", "true"),
        ("tokenizer_config.json", "added_tokens_decoder.1", {"1": "<|end|>"}),
    ],
)
def test_a_wrong_field_is_named(folder, file, field, value):
    name, _, rest = field.partition(".")
    edit(folder / file, **{name.partition("[")[0]: value})
    message = refusal(load, folder)
    assert message.startswith(str(folder / file))
    assert field in message or rest and f"lacks {rest}" in message


@pytest.mark.parametrize(
    ("config", "changes", "says"),
    [
        (GRANITE, {"logits_scaling": None}, "logits_scaling must be a number, not null"),
        (GRANITE, {"mamba_n_heads": "2"}, "mamba_n_heads must be a whole number"),
        (LLAMA, {"attention_bias": "false"}, "attention_bias must be true or false"),
        (LLAMA, {"num_hidden_layers": "2"}, "num_hidden_layers must be a whole number"),
        (JET, {"layer_types": None}, "layer_types must be a list of strings, not null"),
        (JET, {"efficient_attention_config": {"jet": 5}}, "efficient_attention_config.jet must"),
        ({}, {"loop_range": [1]}, "unknown model_type"),
    ],
)
def test_of_other_architectures(config, changes, says):
    assert says in refusal(build, {**config, **changes})


def test_null_is_what_was_not_set(folder):
    edit(folder / "config.json", text_config=None, quantization=None, num_key_value_heads=None)
    edit(folder / "generation_config.json", eos_token_id=None)
    _, tokenizer, _ = load(folder)
    assert tokenizer.eos_token_ids == {1}


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"layer_types": ["attention"] * 2000}, "the length of layer_types is 2,000"),
        ({"hidden_size": 2**31}, "hidden_size is 2,147,483,648"),
        ({"vocab_size": 10**30}, "vocab_size is a number of more than 18 digits"),
        ({"sleep": {"passes": 10**6}}, "the number of sleep passes is 1,000,000"),
        ({"model_type": "ouro", "num_hidden_layers": 2**31}, "num_hidden_layers is 2,147,483,648"),
    ],
)
def test_sizes_beyond_the_limits(folder, changes, what):
    edit(folder / "config.json", **changes)
    message = refusal(load, folder)
    assert what in message and "--no-limits" in message


def test_limits_can_be_lifted(monkeypatch):
    many = {**fake_config(), "layer_types": ["attention"] * (limits.LAYERS + 1)}
    refusal(build, many)
    monkeypatch.setenv(limits.VARIABLE, "1")
    assert build(many).num_layers == limits.LAYERS + 1


def test_an_architecture_that_would_exit(folder):
    edit(folder / "config.json", model_type="olmo")  # mlx-lm's module calls sys.exit
    assert 'unknown model_type "olmo"' in refusal(load, folder)


def test_convert_names_the_field_too(folder, tmp_path):
    edit(folder / "config.json", rope_parameters=[5])
    message = refusal(convert, folder, tmp_path / "out")
    assert f"{folder / 'config.json'}: rope_parameters must be an object" in message


def test_a_pipe_is_no_file(tmp_path):
    os.mkfifo(tmp_path / "config.json")
    assert "no ordinary file" in refusal(read_json, tmp_path / "config.json")


def test_a_file_of_many_bytes(tmp_path, monkeypatch):
    monkeypatch.setattr(limits, "JSON_BYTES", 5)
    (tmp_path / "a.json").write_text('{"a": 1}')
    assert "is 8, more than 5" in refusal(read_json, tmp_path / "a.json")


def test_kinds():
    for kind, right, wrong in [
        (int, 3, [True, 3.0, "3", None]),
        (float, 3, [float("inf"), "3", True]),
        (str, "a", [1, "\ud800"]),
        (list[int], [1], ["1", [1.5], {}]),
        (dict[str, int], {"a": 1}, [[], {"a": "b"}]),
        (tuple[int, int], [1, 2], [[1], [1, 2, 3], ["a", 1]]),
        (int | None, None, ["", []]),
    ]:
        schema.check(kind, right, "x")
        for value in wrong:
            found: Any = value
            assert refusal(schema.check, kind, found, "x").startswith("x")
