"""The converter: every tensor accounted for, nothing half done, there and back to the bit."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten

from mlx_sleep.convert.architectures import architectures, for_ours
from mlx_sleep.convert.export import export
from mlx_sleep.convert.mapping import TensorError
from mlx_sleep.convert.pipeline import REPORT, convert
from mlx_sleep.convert.quantize import NumberTypes
from mlx_sleep.models.load import build, load_model, save
from mlx_sleep.utils.errors import UserError
from tests.checkpoints import CONFIG, FLA, GRANITE, LLAMA, random_weights, run_command, write

TOKENS = mx.array([[5, 31, 7, 7, 22, 3, 19, 30]])


@pytest.fixture
def weights():
    return random_weights(CONFIG)


@pytest.fixture
def checkpoint(tmp_path, weights) -> Path:
    return write(tmp_path / "checkpoint", CONFIG, weights)


@pytest.fixture
def folder(tmp_path) -> Path:
    """A model folder of ours."""
    save(tmp_path / "model", build(CONFIG), CONFIG)
    return tmp_path / "model"


def read(folder: Path) -> dict[str, mx.array]:
    found = {}
    for file in folder.glob("*.safetensors"):
        found.update(mx.load(str(file)))
    return found


def same(a: dict[str, mx.array], b: dict[str, mx.array]) -> bool:
    return a.keys() == b.keys() and all(
        a[n].dtype == b[n].dtype and mx.array_equal(a[n], b[n]).item() for n in a
    )


def close(a: mx.array, b: mx.array, tolerance: float) -> bool:
    return mx.abs(a - b).mean().item() < tolerance * mx.abs(b).mean().item()


def refusal(source: Path, dest: Path, **options) -> str:
    before = sorted(dest.parent.iterdir())
    with pytest.raises(UserError) as caught:
        convert(source, dest, **options)
    assert sorted(dest.parent.iterdir()) == before
    assert "\n" not in str(caught.value)
    return str(caught.value)


# --- there and back -----------------------------------------------------------------------


@pytest.mark.parametrize("config", [CONFIG, FLA, LLAMA, GRANITE], ids=lambda c: c["model_type"])
@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
def test_there_and_back_is_the_identity(tmp_path, config, dtype):
    weights = {name: x.astype(dtype) for name, x in random_weights(config).items()}
    source = write(tmp_path / "theirs", config, weights)
    report = convert(source, tmp_path / "ours")
    names = export(tmp_path / "ours", tmp_path / "again")
    assert same(read(tmp_path / "again"), weights)
    assert sorted(names) == sorted(weights)
    assert {n for row in report.tensors for n in row["from"]} == set(weights)
    # The config too: what was exported is converted to the same model again.
    convert(tmp_path / "again", tmp_path / "ours-again")
    first, again = (load_model(tmp_path / name) for name in ("ours", "ours-again"))
    assert first[1]["fingerprint"] == again[1]["fingerprint"]
    exported = json.loads((tmp_path / "again" / "config.json").read_text())
    assert {name: exported[name] for name in config} == config


def test_every_architecture_says_whether_it_exports():
    for architecture in architectures():
        assert for_ours(architecture.model_type) is architecture
        assert (architecture.to_theirs if architecture.sanitize is None else True) is not None
        assert architecture.can_export or architecture.unsanitize is None


def test_export_refuses_what_it_cannot_undo(checkpoint, tmp_path, folder):
    convert(folder, tmp_path / "small", NumberTypes(bits=4, group_size=32))
    with pytest.raises(UserError, match="is quantized; export the folder that"):
        export(tmp_path / "small", tmp_path / "back")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "lfm2"}))
    with pytest.raises(UserError, match="no exact way back"):
        export(folder, tmp_path / "back")
    assert not (tmp_path / "back").exists()


# --- names ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "rename",
    [
        lambda name: f"module.{name}",
        lambda name: f"_orig_mod.module.{name}",
        lambda name: f"model.{name}",
        lambda name: f"model.model.{name}",
        lambda name: f"student.{name}",
        lambda name: name.replace(".mixer.", "._orig_mod.mixer._fsdp_wrapped_module."),
    ],
)
def test_what_trainers_put_into_names(tmp_path, checkpoint, weights, rename):
    convert(checkpoint, tmp_path / "plain")
    renamed = {rename(name): x for name, x in weights.items()}
    source = write(tmp_path / "trained", CONFIG, renamed)
    report = convert(source, tmp_path / "ours")
    assert same(read(tmp_path / "ours"), read(tmp_path / "plain"))
    assert {row["from"][0] for row in report.tensors} == set(renamed)


@pytest.mark.parametrize("config", [FLA, LLAMA, GRANITE], ids=lambda c: c["model_type"])
def test_the_prefix_of_a_decoder_may_be_missing_or_doubled(tmp_path, config):
    weights = random_weights(config)
    convert(write(tmp_path / "theirs", config, weights), tmp_path / "plain")
    bare = {name.removeprefix("model."): x for name, x in weights.items()}
    double = {f"model.{name}": x for name, x in weights.items()}
    for kind, renamed in (("bare", bare), ("double", double)):
        convert(write(tmp_path / kind, config, renamed), tmp_path / f"ours-{kind}")
        assert same(read(tmp_path / f"ours-{kind}"), read(tmp_path / "plain"))


def test_two_tensors_of_one_name(tmp_path, weights):
    twice = {**weights, "module.norm.weight": weights["norm.weight"] + 1}
    source = write(tmp_path / "twice", CONFIG, twice)
    message = refusal(source, tmp_path / "ours")
    assert "one tensor twice" in message and "module.norm.weight" in message


def test_a_tied_head_goes_and_a_different_one_does_not(tmp_path, weights):
    config = {**CONFIG, "tie_word_embeddings": True}
    tied = {**weights, "lm_head.weight": weights["embed_tokens.weight"]}
    report = convert(write(tmp_path / "tied", config, tied), tmp_path / "ours")
    assert report.dropped == {"lm_head.weight": "tied: equal to the embedding"}
    assert "lm_head.weight" not in read(tmp_path / "ours")
    message = refusal(write(tmp_path / "other", config, weights), tmp_path / "no")
    assert "lm_head.weight differs from embed_tokens.weight" in message


def test_a_missing_head_is_tied_only_where_the_config_is_silent(tmp_path, weights):
    headless = {name: x for name, x in weights.items() if name != "lm_head.weight"}
    silent = {name: x for name, x in CONFIG.items() if name != "tie_word_embeddings"}
    report = convert(write(tmp_path / "silent", silent, headless), tmp_path / "ours")
    assert report.notes == ["no lm_head: taken as tied to the embedding"]
    message = refusal(write(tmp_path / "untied", CONFIG, headless), tmp_path / "no")
    assert "missing: lm_head.weight" in message


def test_every_tensor_that_does_not_fit_is_listed(tmp_path, weights):
    weights["layers.0.mlp.up_projection.weight"] = weights.pop("layers.0.mlp.up_proj.weight")
    weights["layers.1.mixer.rotary_emb.inv_freq"] = mx.ones((8,))  # known to be no weight
    weights["layers.1.mixer.extra"] = mx.ones((8,))
    weights["norm.weight"] = mx.ones((63,))
    weights["layers.1.mixer.A_log"] = mx.ones((4,), mx.int32)
    source = write(tmp_path / "bad", CONFIG, weights)
    with pytest.raises(TensorError) as caught:
        convert(source, tmp_path / "ours")
    assert "1 missing, 2 unexpected, 2 misshapen" in str(caught.value)
    up, projection = "layers.0.mlp.up_proj.weight", "layers.0.mlp.up_projection.weight"
    assert sorted(caught.value.details) == [
        "misshapen: layers.1.mixer.A_log is of type int32",
        "misshapen: norm.weight is [63], not [64]",
        f"missing: {up} (nearest: {projection})",
        f"unexpected: {projection} (nearest: {up})",
        "unexpected: layers.1.mixer.extra",
    ]
    result = run_command(str(source), str(tmp_path / "ours"))
    assert isinstance(result.exception, UserError)
    assert f"missing: {up} (nearest: {projection})\n" in result.stderr


def test_a_tensor_that_sanitize_swallows_is_no_secret(tmp_path):
    """mlx-lm's own code drops some names; ours must say so."""
    weights = random_weights(GRANITE)
    weights["model.layers.0.shared_mlp.extra.weight"] = mx.ones((3, 3))
    message = refusal(write(tmp_path / "theirs", GRANITE, weights), tmp_path / "ours")
    assert "unexpected: model.layers.0.shared_mlp.extra.weight" in message


def test_the_report_lists_each_tensor(tmp_path):
    weights = random_weights(GRANITE)
    convert(write(tmp_path / "theirs", GRANITE, weights), tmp_path / "ours")
    report = json.loads((tmp_path / "ours" / REPORT).read_text())
    rows = {row["name"]: row for row in report["tensors"]}
    assert rows.keys() == read(tmp_path / "ours").keys()
    gate = rows["model.layers.0.mlp.gate_proj.weight"]
    assert gate["from"] == ["model.layers.0.shared_mlp.input_linear.weight"]
    assert gate["how"] == "computed"
    embedding = rows["model.embed_tokens.weight"]
    assert (embedding["from"], embedding["how"]) == (["model.embed_tokens.weight"], "as it is")


# --- number types --------------------------------------------------------------------------


def rounded(model, bits: int, group_size: int):
    """The same model with float weights that went through quantization and back."""
    weights = []
    for name, x in tree_flatten(model.parameters()):
        if name.endswith(".weight") and x.ndim == 2:
            parts = mx.quantize(x, group_size=group_size, bits=bits)
            x = mx.dequantize(*parts, group_size=group_size, bits=bits)
        weights.append((name, x))
    again = build(CONFIG)
    again.load_weights(weights)
    return again


@pytest.mark.parametrize("bits", [3, 4, 8])
def test_quantized_copy(folder, tmp_path, bits):
    model, _ = load_model(folder)
    report = convert(folder, tmp_path / "small", NumberTypes(bits=bits, group_size=32))
    assert report.skipped == []
    small, config = load_model(tmp_path / "small")
    assert config["quantization"] == {"group_size": 32, "bits": bits, "mode": "affine"}
    names = dict(tree_flatten(small.parameters()))
    assert names["embed_tokens.weight"].dtype == mx.uint32
    assert names["layers.1.mixer.in_proj_qkv.weight"].dtype == mx.uint32
    logits, state = small(TOKENS)
    assert close(logits, rounded(model, bits, 32)(TOKENS)[0], 1e-3)
    assert not close(logits, model(TOKENS)[0], 1e-3)
    assert [s["fast_weights"].dtype for s in state if "fast_weights" in s] == [mx.float32] * 2
    with pytest.raises(UserError, match="quantized already"):
        convert(tmp_path / "small", tmp_path / "smaller", NumberTypes(bits=4))


def test_layers_that_do_not_fit_stay_as_they_are(folder, tmp_path):
    report = convert(folder, tmp_path / "small", NumberTypes(bits=8, group_size=64))
    assert report.skipped == [f"layers.{i}.mlp.down_proj" for i in range(3)]  # 96 inputs
    small, _ = load_model(tmp_path / "small")
    assert small.layers[0].mlp.down_proj.weight.dtype == mx.float32
    assert small.layers[0].mlp.up_proj.weight.dtype == mx.uint32


def test_bits_for_single_layers_as_mlx_lm_writes_them(folder, tmp_path):
    layers = (("layers.0.*up_proj", 8), ("up_proj", None), ("embed", 6))
    convert(folder, tmp_path / "small", NumberTypes(bits=4, group_size=32, layers=layers))
    small, config = load_model(tmp_path / "small")
    assert (small.layers[0].mlp.up_proj.bits, small.layers[0].mlp.gate_proj.bits) == (8, 4)
    assert small.layers[1].mlp.up_proj.weight.dtype == mx.float32
    assert small.embed_tokens.bits == 6
    assert config["quantization"]["layers.1.mlp.up_proj"] is False
    assert config["quantization"]["embed_tokens"]["bits"] == 6


def test_a_recipe_of_mlx_lm(folder, tmp_path):
    convert(folder, tmp_path / "small", NumberTypes(recipe="mixed_3_6", group_size=32))
    small, _ = load_model(tmp_path / "small")
    assert (small.layers[0].mlp.up_proj.bits, small.lm_head.bits) == (3, 6)
    assert mx.isfinite(small(TOKENS)[0]).all()


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_copy_in_another_dtype(folder, tmp_path, dtype):
    model, _ = load_model(folder)
    convert(folder, tmp_path / "half", NumberTypes(dtype=dtype))
    half, _ = load_model(tmp_path / "half")
    for name, x in tree_flatten(half.parameters()):
        stays = name.endswith(("A_log", "dt_bias"))
        assert x.dtype == (mx.float32 if stays else getattr(mx, dtype)), name
    logits, state = half(TOKENS)
    assert close(logits, model(TOKENS)[0], 0.1 if dtype == "bfloat16" else 0.02)
    assert all(s["fast_weights"].dtype == mx.float32 for s in state if "fast_weights" in s)


def test_weights_too_large_for_float16(tmp_path, weights):
    weights["norm.weight"] = mx.full((64,), 1e6)
    source = write(tmp_path / "large", CONFIG, weights)
    message = refusal(source, tmp_path / "half", types=NumberTypes(dtype="float16"))
    assert "infinite weights in norm.weight" in message


# --- how it sleeps -------------------------------------------------------------------------


def test_sleep_settings(folder, tmp_path):
    model, _ = load_model(folder)
    sleep = {"passes": 4, "eviction": "sliding", "loop_range": [1, 3]}
    convert(folder, tmp_path / "copy", sleep=sleep)
    copy, _ = load_model(tmp_path / "copy")
    assert (copy.sleep.passes, copy.sleep.window, copy.sleep.eviction) == (4, 32, "sliding")
    assert copy.sleep.loop_range == (1, 3)
    assert mx.array_equal(model(TOKENS)[0], copy(TOKENS)[0])


def test_a_checkpoint_that_was_not_trained_to_sleep_gets_a_wide_window(tmp_path):
    convert(write(tmp_path / "theirs", FLA, random_weights(FLA)), tmp_path / "ours")
    sleep = load_model(tmp_path / "ours")[0].sleep
    assert (sleep.passes, sleep.window, sleep.eviction) == (1, 2048, "hard")


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_inserted_sleep_layers_change_nothing(tmp_path, dtype):
    source = write(tmp_path / "llama", LLAMA, random_weights(LLAMA))
    types = NumberTypes(dtype=dtype)
    convert(source, tmp_path / "plain", types)
    convert(source, tmp_path / "sleeps", types, insert={"count": 2, "kind": "gated_deltanet"})
    plain, _ = load_model(tmp_path / "plain")
    sleeps, config = load_model(tmp_path / "sleeps")
    assert len(config["sleep_layers"]) == 2 and len(sleeps.sleep_layers) == 2
    assert mx.array_equal(plain(TOKENS)[0], sleeps(TOKENS)[0])
    export(tmp_path / "sleeps", tmp_path / "back")
    assert "sleep_layers.1.norm.weight" in read(tmp_path / "back")
    convert(tmp_path / "back", tmp_path / "again")
    assert same(read(tmp_path / "again"), read(tmp_path / "sleeps"))


# --- whole or not at all -------------------------------------------------------------------


def test_shards(tmp_path, checkpoint, weights):
    convert(checkpoint, tmp_path / "ours", shard_bytes=60_000)
    files = sorted(file.name for file in (tmp_path / "ours").glob("*.safetensors"))
    assert len(files) > 2 and files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    assert same(read(tmp_path / "ours"), weights)
    model, _ = load_model(tmp_path / "ours")  # through the index
    export(tmp_path / "ours", tmp_path / "back", shard_bytes=60_000)
    assert same(read(tmp_path / "back"), weights)


@pytest.mark.parametrize("bits", [None, 4])
def test_no_more_than_a_few_tensors_are_in_memory(tmp_path, bits):
    config = {**LLAMA, "hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 12}
    weights = random_weights(config)
    source = write(tmp_path / "theirs", config, weights)
    largest, total = (f(x.nbytes for x in weights.values()) for f in (max, sum))
    del weights
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    convert(source, tmp_path / "ours", NumberTypes(bits=bits, group_size=32))
    assert mx.get_peak_memory() - before < 3 * largest < total / 8


def test_a_conversion_that_was_killed_leaves_nothing_that_looks_finished(tmp_path, checkpoint):
    code = (
        "import os, signal, sys\n"
        "from mlx_sleep.convert.pipeline import convert\n"
        "def on_bytes(done, total):\n"
        "    if 2 * done > total: os.kill(os.getpid(), signal.SIGKILL)\n"
        "convert(sys.argv[1], sys.argv[2], on_bytes=on_bytes)\n"
    )
    dest = tmp_path / "ours"
    done = subprocess.run([sys.executable, "-c", code, str(checkpoint), str(dest)])
    assert done.returncode == -signal.SIGKILL
    assert not dest.exists()
    assert len([p for p in tmp_path.iterdir() if p.name.startswith(".ours.")]) == 1
    convert(checkpoint, dest)
    load_model(dest)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint", "ours"]


def test_a_full_disk_is_told(tmp_path, checkpoint):
    """A file size limit stands in for it; SIGXFSZ would kill, so it is ignored."""
    code = (
        "import resource, signal, sys\n"
        "from mlx_sleep.convert.pipeline import convert\n"
        "from mlx_sleep.utils.errors import UserError\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))\n"
        "try: convert(sys.argv[1], sys.argv[2])\n"
        "except UserError as error: print(error)\n"
    )
    dest = tmp_path / "ours"
    command = [sys.executable, "-c", code, str(checkpoint), str(dest)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert f"cannot write the model folder {dest}: File too large" in done.stdout
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint"]


def test_no_room_left_is_told_with_what_to_do(tmp_path, checkpoint, monkeypatch):
    from mlx_sleep.convert import pipeline

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(pipeline, "write_shards", full)
    assert "No space left on device; free some space there" in refusal(checkpoint, tmp_path / "o")


# --- bad input -----------------------------------------------------------------------------


def test_bad_places(tmp_path, checkpoint):
    assert "exists already" in refusal(checkpoint, checkpoint)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write the model folder"):
        convert(checkpoint, tmp_path / "file" / "ours")
    assert "no model folder or file at" in refusal(tmp_path / "nowhere", tmp_path / "ours")
    assert "none of the files that can be converted" in refusal(tmp_path / "file", tmp_path / "o")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bits": 7}, "2, 3, 4, 5, 6 or 8 bits"),
        ({"bits": 4, "group_size": 48}, "32, 64 or 128"),
        ({"recipe": "mixed_1_2"}, "unknown recipe"),
        ({"dtype": "int8"}, "unknown dtype"),
        ({"layers": (("up_proj", 8),)}, "add -q"),
        ({"bits": 4, "layers": (("(", 8),)}, "not a regular expression"),
    ],
)
def test_bad_number_types(options, message):
    with pytest.raises(UserError, match=message):
        NumberTypes(**options)


@pytest.mark.parametrize(
    ("sleep", "message"),
    [
        ({"passes": 0}, "passes"),
        ({"window": 1}, "window"),
        ({"eviction": "soft"}, "eviction"),
        ({"loop_range": [1, 9]}, "loop_range ends at 9"),
    ],
)
def test_bad_sleep_settings(checkpoint, tmp_path, sleep, message):
    assert message in refusal(checkpoint, tmp_path / "ours", sleep=sleep)


def test_bad_checkpoints(tmp_path, weights):
    source = write(tmp_path / "bad", {**CONFIG, "model_type": "lama"}, weights)
    message = refusal(source, tmp_path / "ours")
    assert "cannot convert model_type 'lama'" in message and "sleep_hybrid" in message

    write(source, {**CONFIG, "quantization_config": {"quant_method": "gptq"}}, weights)
    assert "quantized for PyTorch" in refusal(source, tmp_path / "ours")

    for value in (float("nan"), float("inf")):
        bad = mx.array(weights["norm.weight"])
        bad[5] = value
        write(source, CONFIG, {**weights, "norm.weight": bad})
        assert "NaN or infinite weights in norm.weight" in refusal(source, tmp_path / "ours")

    (source / "model.safetensors").unlink()
    assert "has no weights" in refusal(source, tmp_path / "ours")
    (source / "config.json").unlink()
    assert "has no config.json" in refusal(source, tmp_path / "ours")


def test_configs_that_lack_what_a_mapping_needs(tmp_path):
    weights = random_weights(GRANITE)
    config = {name: x for name, x in GRANITE.items() if name != "layer_types"}
    source = write(tmp_path / "theirs", config, weights)
    assert "lacks 'layer_types'" in refusal(source, tmp_path / "ours")
    write(source, {**GRANITE, "layer_types": 5}, weights)
    assert "layer_types must be a list of strings, not 5" in refusal(source, tmp_path / "ours")


def test_bad_shards(tmp_path, weights):
    source = write(tmp_path / "bad", CONFIG, {})
    (source / "model.safetensors").unlink()
    names, parts = ("a.safetensors", "b.safetensors"), ({}, {})
    for i, (name, x) in enumerate(sorted(weights.items())):
        parts[i % 2][name] = x
    for file, part in zip(names, parts, strict=True):
        mx.save_safetensors(str(source / file), part, {"format": "pt"})
    assert "several weights files and no index" in refusal(source, tmp_path / "ours")

    index = {n: file for file, part in zip(names, parts, strict=True) for n in part}

    def write_index(weight_map):
        text = json.dumps({"weight_map": weight_map})
        (source / "model.safetensors.index.json").write_text(text)

    write_index(index)
    convert(source, tmp_path / "good")
    write_index({**index, "norm.weight": "../bad/a.safetensors"})
    assert "outside the folder" in refusal(source, tmp_path / "ours")
    write_index({**index, "norm.weight": "c.safetensors"})
    assert "lacks the weights file c.safetensors" in refusal(source, tmp_path / "ours")
    write_index(index)
    mx.save_safetensors(str(source / "b.safetensors"), {**parts[1], **parts[0]})
    assert "repeats the tensor" in refusal(source, tmp_path / "ours")
    whole = (source / "a.safetensors").read_bytes()
    (source / "a.safetensors").write_bytes(whole[:-1])
    assert "truncated: 1 bytes are missing" in refusal(source, tmp_path / "ours")


def test_a_name_that_occurs_twice_in_a_header(checkpoint, tmp_path):
    file = checkpoint / "model.safetensors"
    whole = file.read_bytes()
    twice = whole.replace(b'"layers.1.mlp.up_proj.weight"', b'"layers.0.mlp.up_proj.weight"')
    file.write_bytes(twice)
    assert len(twice) == len(whole)
    assert "damaged header" in refusal(checkpoint, tmp_path / "ours")


def test_a_hub_that_cannot_be_reached(tmp_path, monkeypatch):
    import huggingface_hub

    def unreachable(*_, **__):
        raise ConnectionError("Name or service not known\nand more")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", unreachable)
    message = refusal("nobody/nothing", tmp_path / "ours")
    assert "cannot get nobody/nothing from Hugging Face: Name or service not known" in message


def test_a_hub_model_is_a_folder_like_any_other(tmp_path, monkeypatch, checkpoint, weights):
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: str(checkpoint))
    convert("some/body", tmp_path / "ours")
    assert same(read(tmp_path / "ours"), weights)
