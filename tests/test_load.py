"""Model folders: what is saved loads again to the bit; a bad folder is refused in one line."""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace

from mlx_sleep.models.build import get_model_classes
from mlx_sleep.models.load import fingerprint, load, load_model, save
from mlx_sleep.utils.errors import UserError
from tests.checkpoints import CONFIG as UNTIED

CONFIG = {**UNTIED, "tie_word_embeddings": True}
TOKENS = mx.array([[5, 41, 7, 7, 22, 3, 19, 30]])


def make_model(config: dict = CONFIG):
    Model, ModelArgs = get_model_classes(config["model_type"])
    return Model(ModelArgs.from_dict(config))


@pytest.fixture
def model():
    return make_model()


@pytest.fixture
def folder(tmp_path, model) -> Path:
    save(tmp_path / "model", model, CONFIG)
    return tmp_path / "model"


def weights_of(folder: Path) -> dict[str, mx.array]:
    return mx.load(str(folder / "model.safetensors"))


def write_weights(folder: Path, weights: dict[str, mx.array]) -> None:
    mx.save_safetensors(str(folder / "model.safetensors"), weights, {"format": "mlx"})


def set_config(folder: Path, **fields) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **fields}))


def refusal(path) -> str:
    with pytest.raises(UserError) as caught:
        load_model(path)
    message = str(caught.value)
    assert "\n" not in message and len(message) < 600
    return message


# --- what is saved loads again ------------------------------------------------------------


@pytest.mark.parametrize("lazy", [False, True])
def test_a_saved_model_gives_the_same_logits_to_the_bit(folder, model, lazy):
    again, config = load_model(folder, lazy=lazy)
    assert mx.array_equal(model(TOKENS)[0], again(TOKENS)[0])
    assert {name: config[name] for name in CONFIG} == CONFIG
    assert again.sleep.passes == 2 and again.sleep.window == 32


def test_a_folder_is_that_of_the_ecosystem(folder):
    names = {file.name for file in folder.iterdir()}
    assert names == {"config.json", "generation_config.json", "model.safetensors"}
    assert json.loads((folder / "generation_config.json").read_text()) == {"eos_token_id": 3}


def test_shards_with_an_index_load(folder, model):
    weights = sorted(weights_of(folder).items())
    shards = {"model-00001-of-00002.safetensors": weights[::2]}
    shards["model-00002-of-00002.safetensors"] = weights[1::2]
    for name, part in shards.items():
        mx.save_safetensors(str(folder / name), dict(part), {"format": "mlx"})
    index = {"weight_map": {key: name for name, part in shards.items() for key, _ in part}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "model.safetensors").unlink()
    assert mx.array_equal(model(TOKENS)[0], load_model(folder)[0](TOKENS)[0])
    assert fingerprint(folder) == fingerprint(folder)

    (folder / "model-00002-of-00002.safetensors").unlink()
    assert "lacks the weights file model-00002-of-00002" in refusal(folder)
    index["weight_map"]["norm.weight"] = "../model/model-00001-of-00002.safetensors"
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "outside the folder" in refusal(folder)


def test_a_folder_with_its_tokenizer(tmp_path, model):
    source = tmp_path / "source"
    source.mkdir()
    words = ["<unk>", "sleep", "well", "<end>"]
    tokenizer = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.save(str(source / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<end>"}
    (source / "tokenizer_config.json").write_text(json.dumps(settings))
    (source / "notes.txt").write_text("not part of a model")

    save(tmp_path / "model", model, CONFIG, tokenizer_source=source)
    assert not (tmp_path / "model" / "notes.txt").exists()
    again, tokenizer, config = load(tmp_path / "model")
    assert tokenizer.encode_text("sleep well") == [1, 2]
    assert 3 in tokenizer.stop_ids
    assert again.args.vocab_size == config["vocab_size"] == 48


def test_token_ids_for_which_the_model_has_no_rows(tmp_path, model):
    rows = model.vocab_rows
    assert rows == CONFIG["vocab_size"] == 48
    for mark, fits in ((rows - 1, True), (rows, False)):
        words = ["<unk>", *(f"w{i}" for i in range(1, mark))]
        tokenizer = Tokenizer(WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
        tokenizer.pre_tokenizer = Whitespace()
        tokenizer.add_special_tokens(["<end>", "<never used>"])
        source = tmp_path / f"source{mark}"
        source.mkdir()
        tokenizer.save(str(source / "tokenizer.json"))
        settings = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "chat_template": "{% for m in messages %}{{ m.content }}<end>{% endfor %}",
        }
        (source / "tokenizer_config.json").write_text(json.dumps(settings))
        folder = tmp_path / f"model{mark}"
        save(folder, model, CONFIG, tokenizer_source=source)
        if fits:  # <never used> has no row, and can't be typed
            assert load(folder)[1].end_ids == [mark]
            continue
        with pytest.raises(UserError, match="go up to 48, and the model has 48") as caught:
            load(folder)
        assert "\n" not in str(caught.value)


def test_names_outside_ascii(tmp_path, model):
    save(tmp_path / "Schlüsse 眠り", model, CONFIG)
    again, _ = load_model(str(tmp_path / "Schlüsse 眠り"))
    assert mx.array_equal(model(TOKENS)[0], again(TOKENS)[0])


# --- save: whole or not at all ------------------------------------------------------------


def test_save_refuses_an_existing_place(folder, model):
    before = (folder / "model.safetensors").read_bytes()
    with pytest.raises(UserError, match="exists already"):
        save(folder, make_model(), CONFIG)
    assert (folder / "model.safetensors").read_bytes() == before


def test_save_overwrites_when_asked(folder):
    other = make_model()
    save(folder, other, CONFIG, overwrite=True)
    assert mx.array_equal(other(TOKENS)[0], load_model(folder)[0](TOKENS)[0])
    assert [file.name for file in folder.parent.iterdir()] == [folder.name]


@pytest.mark.parametrize("fails_at", [1, 2])
def test_a_failed_rename_leaves_the_old_folder(folder, monkeypatch, fails_at):
    before = (folder / "model.safetensors").read_bytes()
    rename, calls = os.rename, []

    def fail(source, target):
        calls.append(source)
        if len(calls) == fails_at:
            raise OSError(28, "No space left on device")
        rename(source, target)

    monkeypatch.setattr(os, "rename", fail)
    with pytest.raises(UserError, match="No space left"):
        save(folder, make_model(), CONFIG, overwrite=True)
    assert (folder / "model.safetensors").read_bytes() == before
    assert [file.name for file in folder.parent.iterdir()] == [folder.name]


def test_a_short_write_leaves_nothing(tmp_path):
    """A file size limit stands in for a full disk."""
    code = (
        "import resource, sys, json\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))\n"
        "from mlx_sleep.utils.errors import UserError\n"
        "from mlx_sleep.models.build import get_model_classes\n"
        "from mlx_sleep.models.load import save\n"
        "config = json.loads(sys.argv[2])\n"
        "Model, ModelArgs = get_model_classes(config['model_type'])\n"
        "try: save(sys.argv[1], Model(ModelArgs.from_dict(config)), config)\n"
        "except UserError as error: print(error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "model"), json.dumps(CONFIG)],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert str(tmp_path / "model") in done.stdout and ".tmp" not in done.stdout
    assert list(tmp_path.iterdir()) == []


def test_save_refuses_what_would_not_load(tmp_path, model):
    with pytest.raises(UserError, match="do not fit its config"):
        save(tmp_path / "model", model, {**CONFIG, "intermediate_size": 80})
    model.norm.weight = mx.full((64,), float("inf"))
    with pytest.raises(UserError, match="infinite weights in norm.weight"):
        save(tmp_path / "model", model, CONFIG)
    assert list(tmp_path.iterdir()) == []


# --- bad folders --------------------------------------------------------------------------


def test_missing_folder_and_missing_files(tmp_path, folder):
    assert "no model folder at" in refusal(tmp_path / "nowhere")
    assert "no model folder at" in refusal(folder / "config.json")
    with pytest.raises(UserError, match="has no tokenizer: it needs one of"):
        load(folder)
    (folder / "model.safetensors").unlink()
    assert "neither model.safetensors nor" in refusal(folder)
    (folder / "config.json").unlink()
    assert "has no config.json" in refusal(folder)


@pytest.mark.parametrize(
    "text", [b"", b"{", b"[1]", b"\xff\xfe", b"[" * 100_000, b'{"model_type": "sleep_hybrid",}']
)
def test_config_that_is_not_a_json_object(folder, text):
    (folder / "config.json").write_bytes(text)
    assert "config.json" in refusal(folder)


@pytest.mark.parametrize("model_type", ["lama", "../sleep_hybrid", "base", None, ["sleep_hybrid"]])
def test_unknown_model_type(folder, model_type):
    set_config(folder, model_type=model_type)
    message = refusal(folder)
    assert "unknown model_type" in message and "sleep_hybrid" in message


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("sleep", {"window": 1}),
        ("sleep", {"passes": 0}),
        ("sleep", {"passes": "4"}),
        ("sleep", {"eviction": "soft"}),
        ("sleep", {"loop_range": [2, 9]}),
        ("sleep", {"loop_range": [1]}),
        ("sleep", {"pases": 2}),
        ("sleep", 4),
        ("hidden_size", "64"),
        ("hidden_size", -64),
        ("num_attention_heads", 0),
        ("layer_types", 5),
        ("layer_types", ["attention", "rnn"]),
        ("quantization", {"bits": 4}),
        ("quantization", [4, 64]),
    ],
)
def test_config_values_that_make_no_model(folder, field, value):
    set_config(folder, **{field: value})
    assert "config.json" in refusal(folder)


def test_missing_tensors_name_the_nearest(folder):
    weights = weights_of(folder)
    weights["layers.0.mlp.up_projection.weight"] = weights.pop("layers.0.mlp.up_proj.weight")
    write_weights(folder, weights)
    message = refusal(folder)
    assert "lacks weights: layers.0.mlp.up_proj.weight" in message
    assert "nearest to layers.0.mlp.up_proj.weight is layers.0.mlp.up_projection.weight" in message


def test_many_missing_tensors_are_counted(folder):
    weights = {n: x for n, x in weights_of(folder).items() if not n.startswith("layers.1")}
    gone = len(weights_of(folder)) - len(weights)
    write_weights(folder, weights)
    assert f"and {gone - 3} more" in refusal(folder)


def test_unexpected_tensors(folder):
    write_weights(folder, {**weights_of(folder), "lm_head.weight": mx.ones((48, 64))})
    assert "does not ask for: lm_head.weight" in refusal(folder)


def test_misshapen_tensors(folder):
    weights = weights_of(folder)
    weights["norm.weight"] = mx.ones((63,))
    weights["layers.1.mixer.A_log"] = mx.ones((4,), mx.uint32)
    write_weights(folder, weights)
    message = refusal(folder)
    assert "norm.weight is [63], not [64]" in message
    assert "layers.1.mixer.A_log is of type U32" in message


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16])
def test_weights_that_are_not_finite(folder, value, dtype):
    weights = weights_of(folder)
    name = "layers.2.mixer.out_proj.weight"
    bad = weights[name].astype(dtype)
    bad[3, 5] = value
    write_weights(folder, {**weights, name: bad})
    assert f"NaN or infinite weights in {name}" in refusal(folder)
    load_model(folder, lazy=True)  # doesn't read them


def test_the_largest_finite_weights_are_let_through(folder):
    for dtype, largest in ((mx.float16, 65504.0), (mx.float32, 3.4e38), (mx.bfloat16, 3.3e38)):
        weights = weights_of(folder)
        weights["norm.weight"] = mx.full((64,), -largest).astype(dtype)
        write_weights(folder, weights)
        load_model(folder)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_truncated_weights(data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("truncated") / "model"
    save(folder, make_model(), CONFIG)
    whole = (folder / "model.safetensors").read_bytes()
    header = 8 + struct.unpack("<Q", whole[:8])[0]
    last = len(whole) - 1
    edges = st.integers(0, 16) | st.integers(header - 8, header + 8) | st.just(last)
    kept = data.draw(edges | st.integers(0, last))
    (folder / "model.safetensors").write_bytes(whole[:kept])
    assert "truncated" in refusal(folder)


@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_a_damaged_header_is_refused_or_harmless(data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("damaged") / "model"
    save(folder, make_model(), CONFIG)
    whole = bytearray((folder / "model.safetensors").read_bytes())
    header = 8 + struct.unpack("<Q", whole[:8])[0]
    for _ in range(data.draw(st.integers(1, 3))):
        whole[data.draw(st.integers(0, header - 1))] = data.draw(st.integers(0, 255))
    (folder / "model.safetensors").write_bytes(whole)
    try:
        load_model(folder)
    except UserError as error:
        assert "\n" not in str(error)


def test_a_header_that_points_elsewhere(folder):
    def write(entry):
        header = json.dumps({"norm.weight": entry}).encode()
        raw = struct.pack("<Q", len(header)) + header + bytes(256)
        (folder / "model.safetensors").write_bytes(raw)
        return refusal(folder)

    entry = {"dtype": "F32", "shape": [64], "data_offsets": [0, 256]}
    assert "lacks weights" in write(entry)  # a sound header
    assert "damaged" in write({**entry, "data_offsets": [-256, 0]})
    assert "damaged" in write({**entry, "data_offsets": [0, 128]})
    assert "damaged" in write({**entry, "shape": [-8, -8]})
    assert "truncated" in write({**entry, "data_offsets": [256, 512]})
    assert "known types" in write({**entry, "dtype": "F64"})


# --- fingerprint --------------------------------------------------------------------------


def test_fingerprint_is_that_of_the_model(folder, tmp_path, model):
    identity = fingerprint(folder)
    assert json.loads((folder / "config.json").read_text())["fingerprint"] == identity
    save(tmp_path / "copy", model, {**CONFIG, "note": "not a field of the model"})
    assert fingerprint(tmp_path / "copy") == identity

    set_config(folder, rope_theta=20_000.0)
    assert fingerprint(folder) != identity
    weights = weights_of(tmp_path / "copy")
    weights["norm.weight"][7] = 1.5
    write_weights(tmp_path / "copy", weights)
    assert fingerprint(tmp_path / "copy") != identity


def test_fingerprint_of_a_large_file_samples_it(tmp_path):
    config = {**CONFIG, "vocab_size": 60_000}  # 15 MB
    save(tmp_path / "model", make_model(config), config)
    identity = fingerprint(tmp_path / "model")
    file = tmp_path / "model" / "model.safetensors"
    size = file.stat().st_size
    assert size > 3 * 64 * 64 * 1024
    header = 8 + struct.unpack("<Q", file.read_bytes()[:8])[0]
    for at in (header, size - 1):  # the first and the last block
        raw = bytearray(file.read_bytes())
        raw[at] ^= 1
        file.write_bytes(raw)
        assert fingerprint(tmp_path / "model") != identity
        identity = fingerprint(tmp_path / "model")
