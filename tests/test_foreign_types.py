"""Number types that MLX doesn't have, against PyTorch's own casts. Needs torch."""

from __future__ import annotations

import json
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

torch = pytest.importorskip("torch")

from mlx_sleep.convert import foreign_types  # noqa: E402
from mlx_sleep.convert.pipeline import convert  # noqa: E402
from mlx_sleep.models.load import load_model  # noqa: E402
from mlx_sleep.utils.errors import UserError  # noqa: E402
from tests.checkpoints import LLAMA, random_weights  # noqa: E402

NAME = "model.layers.0.mlp.up_proj.weight"  # [20, 24]
FP8 = {"F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2}
BLOCKS = {"quant_method": "fp8", "weight_block_size": [16, 16]}


@pytest.mark.parametrize("name", FP8)
def test_every_byte_of_fp8(name):
    want = torch.arange(256).to(torch.uint8).view(FP8[name]).float().numpy()
    assert np.array_equal(foreign_types._TABLES[name], want, equal_nan=True)


def write(folder: Path, changed: dict, quantization: dict | None = None, suffix="safetensors"):
    """A checkpoint in which some tensors are PyTorch's."""
    from safetensors.torch import save_file

    weights = {n: torch.from_numpy(np.array(x)) for n, x in random_weights(LLAMA).items()}
    weights |= changed
    folder.mkdir()
    config = {**LLAMA, **({"quantization_config": quantization} if quantization else {})}
    (folder / "config.json").write_text(json.dumps(config))
    if suffix == "safetensors":
        save_file(weights, folder / "model.safetensors", {"format": "pt"})
    else:
        torch.save(weights, folder / f"pytorch_model.{suffix}")
    return folder


def result(folder: Path) -> mx.array:
    load_model(folder)
    return mx.load(str(folder / "model.safetensors"))[NAME]


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_float64_becomes_float32(tmp_path, suffix):
    x = torch.randn(20, 24, dtype=torch.float64)
    convert(write(tmp_path / "theirs", {NAME: x}, suffix=suffix), tmp_path / "ours")
    got = result(tmp_path / "ours")
    assert got.dtype == mx.float32 and np.array_equal(np.array(got), x.float().numpy())


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
@pytest.mark.parametrize("dtype", FP8.values())
@pytest.mark.parametrize(
    ("name", "shape", "quantization"),
    [
        ("_scale_inv", (2, 2), BLOCKS),
        ("_scale", (20, 1), {"quant_method": "compressed-tensors", "format": "float-quantized"}),
        ("_scale", (), {"quant_method": "fp8"}),
        (None, (), None),
    ],
)
def test_fp8_with_its_scales_becomes_bfloat16(tmp_path, suffix, dtype, name, shape, quantization):
    x = torch.randn(20, 24).to(dtype)
    scale = torch.rand(shape) + 0.5
    changed, want = {NAME: x}, x.float()
    if name:
        changed |= {NAME + name: scale, NAME.replace("weight", "input_scale"): torch.ones(())}
    if shape == (2, 2):
        for i in range(20):
            for j in range(24):
                want[i, j] *= scale[i // 16, j // 16]
    elif name:
        want = want * scale
    report = convert(write(tmp_path / "theirs", changed, quantization, suffix), tmp_path / "ours")
    assert {row["how"] for row in report.tensors if row["name"] == NAME} == {"dequantized"}
    got = result(tmp_path / "ours")
    assert got.dtype == mx.bfloat16
    assert np.array_equal(np.array(got.astype(mx.float32)), want.bfloat16().float().numpy())
    assert "quantization_config" not in json.loads((tmp_path / "ours" / "config.json").read_text())


@pytest.mark.parametrize(
    ("scale", "quantization", "message"),
    [
        ((3, 2), BLOCKS, r"the scales of .*up_proj.weight, \[3, 2\], do not fit its shape"),
        ((2, 2), {**BLOCKS, "weight_block_size": 16}, "weight_block_size must be two numbers"),
        ((2, 2), {"quant_method": "gptq"}, "is quantized for PyTorch"),
    ],
)
def test_what_does_not_fit_is_refused(tmp_path, scale, quantization, message):
    changed = {NAME: torch.zeros(20, 24).to(torch.float8_e4m3fn)}
    changed[f"{NAME}_scale_inv"] = torch.ones(scale)
    with pytest.raises(UserError, match=message):
        convert(write(tmp_path / "theirs", changed, quantization), tmp_path / "ours")


def test_other_types_are_refused_by_name(tmp_path):
    changed = {NAME: torch.zeros(20, 24, dtype=torch.complex64)}
    with pytest.raises(UserError, match=f"{NAME} has type C64; known types: .*F64, F8_E4M3"):
        convert(write(tmp_path / "theirs", changed), tmp_path / "ours")
