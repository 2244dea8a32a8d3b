"""PyTorch's own files (.bin, .pt, .pth): state dicts, read without running what they hold.

torch is an optional extra, imported when such a file is read.
"""

from __future__ import annotations

import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..utils.errors import UserError
from ..utils.files import check_zip, one_line
from ..utils.pip import pip_install
from ..utils.safetensors import Entry, dtype_name, write_file

# Where trainers put the state dict in a checkpoint that holds more.
_KEYS = ("model", "state_dict", "model_state_dict", "module", "net", "weights")

# Types that MLX doesn't have; foreign_types.py reads them.
_FOREIGN = {"float64": "F64", "float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2"}


def stage(file: Path, folder: Path) -> tuple[Path, list[str]]:
    """Rewrite a file of PyTorch as safetensors in `folder`: its path, and what was left out.

    MLX reads safetensors lazily and pickles not at all. Tensors are copied one at a time out of
    the mapped file. UserError for a pickle that would run code, and without torch.
    """
    state, notes = find_state_dict(_read(file), file)
    entries = [_entry(name, x, file) for name, x in state.items()]
    del state
    staged = folder / f"{file.name}.safetensors"
    write_file(staged, entries, "pt")
    return staged, notes


def find_state_dict(value: Any, file: Path) -> tuple[dict[str, Any], list[str]]:
    """(name -> tensor, notes on what else is there) in what a trainer saved."""
    import torch

    notes: list[str] = []
    for _ in range(4):
        if not isinstance(value, Mapping):
            raise UserError(f"{file} holds a {type(value).__name__}, not a state dict of tensors")
        tensors = {str(name): x for name, x in value.items() if isinstance(x, torch.Tensor)}
        nested = [key for key in _KEYS if isinstance(value.get(key), Mapping)]
        if tensors or not nested:
            others = [str(name) for name in value if str(name) not in tensors]
            if not tensors:
                raise UserError(f"{file} holds no tensors; its entries are: {', '.join(others)}")
            notes += [f"{file.name}: not a tensor: {name}" for name in others]
            return tensors, notes
        notes += [f"{file.name}: beside the weights: {key}" for key in value if key != nested[0]]
        value = value[nested[0]]
    raise UserError(f"{file} nests its state dict too deep; save model.state_dict() alone")


def _read(file: Path) -> Any:
    try:
        import torch
    except ImportError:
        raise UserError(
            f"{file.name} is a file of PyTorch: {pip_install('mlx-sleep[torch]')}, "
            "or save the model as safetensors"
        ) from None
    try:
        if zipfile.is_zipfile(file):
            check_zip(file)
        try:
            return torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        except (RuntimeError, ValueError) as error:
            if "mmap" not in str(error):  # files from before PyTorch 1.6 cannot be mapped
                raise
            return torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise UserError(
            f"{file} is refused: it is damaged, or a pickle of more than tensors, which could run "
            "code; save model.state_dict() alone, best as safetensors"
        ) from error
    except OSError as error:
        raise UserError(f"cannot read {file}: {one_line(error)}") from error
    except Exception as error:  # torch raises all kinds for damaged files
        raise UserError(f"{file} is truncated or damaged: {one_line(error)[:200]}") from error


def _entry(name: str, x: Any, file: Path) -> Entry:
    import torch

    kind = str(x.dtype).removeprefix("torch.")
    dtype = dtype_name(x.dtype) or _FOREIGN.get(kind)
    if dtype is None or x.layout != torch.strided:
        raise UserError(f"{file}: {name} is {kind}; convert it to float32 before saving")

    def data() -> memoryview:
        flat = x.detach().contiguous().reshape(-1)
        return memoryview(flat.view(torch.uint8).numpy())

    return Entry(name, dtype, list(x.shape), x.numel() * x.element_size(), data)
