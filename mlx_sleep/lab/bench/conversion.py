"""Memory and time of a conversion (`mlx-sleep bench convert`), with random numbers."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from mlx.utils import tree_flatten

from ...convert.writer import write_shards
from ...models.build import build
from ...utils.errors import UserError
from ...utils.safetensors import Entry

# A process of its own: the peak of a process never falls.
_CONVERT = """
import resource, sys
from mlx_sleep.convert.pipeline import convert
unit = 1 if sys.platform == "darwin" else 1024
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
convert(sys.argv[1], sys.argv[2])
print(before, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit)
"""


def rows(gigabytes: float = 4.0, shard_gigabytes: float = 1.0, folder=None) -> Iterator[dict]:
    """One row: a bfloat16 checkpoint in PyTorch's format, converted.

    checkpoint_bytes  of all its shards
    shard_bytes       of the largest one
    import_bytes      the most that was resident before it began: Python, MLX, their imports
    peak_bytes        the most that was resident
    peak_to_shard     peak_bytes over shard_bytes
    seconds           wall time of the conversion, imports included

    `folder` needs room for the checkpoint twice; None is the system's for temporary files.
    """
    needed = 2.1e9 * gigabytes
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        free = shutil.disk_usage(scratch).free
        if free < needed:
            raise UserError(
                f"{scratch} has {free / 1e9:.0f} GB left and the bench needs {needed / 1e9:.0f}; "
                "give another --folder, or less --gigabytes"
            )
        source, dest = Path(scratch, "checkpoint"), Path(scratch, "model")
        source.mkdir()
        _write_checkpoint(source, gigabytes, int(1e9 * shard_gigabytes))
        sizes = [file.stat().st_size for file in source.glob("*.safetensors")]
        started = time.perf_counter()
        done = subprocess.run(
            [sys.executable, "-c", _CONVERT, str(source), str(dest)],
            capture_output=True,
            text=True,
        )
        if done.returncode:
            raise UserError(f"the conversion failed: {done.stderr.strip().splitlines()[-1]}")
        seconds = time.perf_counter() - started
        before, peak = map(int, done.stdout.split())
        yield {
            "checkpoint_bytes": sum(sizes),
            "shard_bytes": max(sizes),
            "import_bytes": before,
            "peak_bytes": peak,
            "peak_to_shard": peak / max(sizes),
            "seconds": seconds,
        }


def _write_checkpoint(folder: Path, gigabytes: float, shard_bytes: int) -> None:
    """A checkpoint of at least so many gigabytes in the shapes of a model of that size."""
    layers: list[str] = []
    config = {
        "model_type": "sleep_hybrid",
        "vocab_size": 32_768,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_attention_heads": 16,
        "linear_num_key_heads": 8,
        "linear_num_value_heads": 8,
        "linear_key_head_dim": 128,
        "linear_value_head_dim": 256,
        "layer_types": layers,
    }
    shapes: dict[str, tuple[int, ...]] = {}
    while 2 * sum(map(np.prod, shapes.values())) < 1e9 * gigabytes:
        layers += ["attention", "gated_deltanet"]
        parameters = dict(tree_flatten(build(config).parameters()))
        shapes = {name: tuple(x.shape) for name, x in parameters.items()}
    rng = np.random.default_rng(0)

    def entry(name: str, shape: tuple[int, ...]) -> Entry:
        count = int(np.prod(shape))

        def data() -> memoryview:
            # Any 16 bits without the exponent's highest are a finite bfloat16, below 2.
            bits = rng.integers(0, 1 << 16, count, dtype=np.uint16) & 0xBFFF
            return bits.view(np.uint8).data

        return Entry(name, "BF16", list(shape), 2 * count, data)

    entries = [entry(name, shape) for name, shape in shapes.items()]
    write_shards(folder, entries, "pt", shard_bytes=shard_bytes)
    (folder / "config.json").write_text(json.dumps(config))
