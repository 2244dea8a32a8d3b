"""A GGUF as the package `gguf` reads it, to compare ours with: gguf.py is not used here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from gguf import MODEL_ARCH, GGUFReader, ReaderTensor, get_tensor_name_map, quants


class Reference:
    """The parts of one model. Names are those of transformers' Llama."""

    def __init__(self, files: list[Path]):
        self._readers = [GGUFReader(str(file)) for file in files]  # they hold the mapped files
        self._tensors: dict[str, ReaderTensor] = {
            tensor.name: tensor for reader in self._readers for tensor in reader.tensors
        }
        layers = self.field("llama.block_count")
        self._names = get_tensor_name_map(MODEL_ARCH.LLAMA, layers)

    def field(self, name: str, default: Any = None) -> Any:
        """A value of the metadata."""
        found = self._readers[0].get_field(name)
        return default if found is None else found.contents()

    def has(self, name: str) -> bool:
        """Whether there is a tensor of a name in transformers."""
        return self._theirs(name) in self._tensors

    def values(self, name: str) -> np.ndarray:
        """A tensor by its name in transformers, dequantized, float32, rows in PyTorch's order."""
        x = self._dequantized(self._theirs(name))
        heads = self.field("llama.attention.head_count")
        if ".k_proj." in name:
            heads = self.field("llama.attention.head_count_kv", heads)
        elif ".q_proj." not in name:
            return x
        half = len(x) // heads // 2
        rows = [
            [h * 2 * half + i * 2 + j for j in (0, 1) for i in range(half)] for h in range(heads)
        ]
        return x[np.array(rows).reshape(-1)]

    def inv_freq(self, head_dim: int) -> np.ndarray:
        """The frequencies of the rotary embedding, float32 [head_dim / 2], from the raw fields."""
        base = self.field("llama.rope.freq_base", 10_000.0)
        freqs = 1 / base ** (np.arange(0, head_dim, 2) / head_dim)
        if "rope_freqs.weight" in self._tensors:
            freqs = freqs / self._dequantized("rope_freqs.weight")
        if self.field("llama.rope.scaling.type", "linear") == "linear":
            old = self.field("llama.rope.scale_linear", 1.0)
            freqs = freqs / self.field("llama.rope.scaling.factor", old)
        return freqs.astype(np.float32)

    def _theirs(self, name: str) -> str | None:
        return self._names.get_name(name, try_suffixes=(".weight", ".bias"))

    def _dequantized(self, name: str | None) -> np.ndarray:
        tensor = self._tensors[name or ""]
        x = tensor.data
        if not np.issubdtype(x.dtype, np.floating):
            x = quants.dequantize(x, tensor.tensor_type)
        return x.astype(np.float32)
