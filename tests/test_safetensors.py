"""The safetensors format: what is written is what the libraries read."""

from __future__ import annotations

import io

import mlx.core as mx
import numpy as np
import pytest
from safetensors import safe_open

from mlx_sleep.utils import safetensors
from mlx_sleep.utils.errors import UserError
from mlx_sleep.utils.safetensors import DTYPES, Entry, dtype_name, read_header, write_file


def entry(name: str, x: mx.array) -> Entry:
    data = memoryview(mx.view(x.reshape(-1), mx.uint8))
    return Entry(name, DTYPES[x.dtype], list(x.shape), x.nbytes, lambda: data)


def test_dtypes_have_one_name_in_all_libraries():
    assert [dtype_name(mx.bool_), dtype_name(mx.bfloat16), dtype_name(mx.int64)] == [
        "BOOL",
        "BF16",
        "I64",
    ]
    assert dtype_name(np.dtype("float32")) == "F32" and dtype_name(np.dtype("float64")) is None
    torch = pytest.importorskip("torch")
    assert [dtype_name(torch.bool), dtype_name(torch.bfloat16)] == ["BOOL", "BF16"]
    assert dtype_name(torch.float64) is None and dtype_name(torch.float8_e4m3fn) is None


@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPES.get)
def test_a_file_of_every_dtype(tmp_path, dtype):
    file = tmp_path / "x.safetensors"
    x, empty = mx.array([[0, 1], [1, 1], [0, 0]]).astype(dtype), mx.zeros((0, 4), dtype)
    hashes = write_file(file, [entry("x", x), entry("empty", empty)], "pt")
    assert list(hashes) == ["x", "empty"]
    assert read_header(file) == {"x": (DTYPES[dtype], [3, 2]), "empty": (DTYPES[dtype], [0, 4])}
    arrays, metadata = mx.load(str(file), return_metadata=True)
    assert metadata == {"format": "pt"}
    assert arrays["x"].dtype == dtype and mx.array_equal(arrays["x"], x)
    with safe_open(file, "np") as opened:
        assert set(opened.keys()) == {"x", "empty"}


def test_data_of_another_length_is_refused(tmp_path):
    short = Entry("x", "F32", [2], 8, lambda: memoryview(b"1234"))
    with pytest.raises(UserError, match="x has 4 bytes, not 8"):
        write_file(tmp_path / "x.safetensors", [short], "mlx")


@pytest.mark.parametrize("raw", [b"", b"\x08", b"\xff" * 8, b"\x03" + bytes(7) + b"{}"])
def test_too_short_for_a_header(raw):
    with pytest.raises(ValueError, match="truncated or not a safetensors file"):
        safetensors.read_json_header(io.BytesIO(raw))
