"""Any model, opened as it is: a folder of ours, of mlx-lm's or of PyTorch's, or an id of the hub.

Nothing is written: tensors of PyTorch are renamed and reshaped as they are read, as `convert` does
it, and of an architecture that only mlx-lm knows, as mlx-lm does. What can't be had that way, such
as a GGUF, is converted first.
"""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path

from mlx.utils import tree_flatten

from ..models.checkpoint import Checkpoint
from ..models.source import open_folder
from ..models.weights import weight_files
from ..utils.errors import UserError
from ..utils.files import expanded
from ..utils.safetensors import DTYPES, read_metadata
from . import hub
from .mapping import map_tensors
from .pipeline import understand
from .sources import open_source


def open_model(
    model: str | Path, *, revision: str | None = None, local_files_only: bool = False
) -> Checkpoint:
    """What `models.load.load` and `Session.open` read a model from, its weights not read yet.

    model     a folder, or the id of a model on Hugging Face, which is downloaded into its cache
    revision, local_files_only  see `hub.download`; for ids alone

    UserError, in one line, for whatever can't be opened.
    """
    path = expanded(model)
    name = str(path)
    if not path.is_dir() and hub.is_id(model):
        name = str(model)
        path = hub.download(name, revision, local_files_only=local_files_only)
    elif revision is not None:
        raise UserError(f"a revision is for ids on Hugging Face; {model} is none")
    if path.is_file():
        raise UserError(f"{path} is a file; convert it: mlx-sleep convert {path} FOLDER")
    if not path.is_dir():
        raise UserError(
            f"no model folder at {path}; give a folder with a config.json, or the id of a model "
            "on Hugging Face, such as org/name"
        )
    if (path / "config.json").is_file() and _is_mlx(path):
        return replace(open_folder(path), name=name)
    return _open_torch(path, name)


def _is_mlx(path: Path) -> bool:
    """Whether a folder's tensors are named and shaped as MLX has them."""
    single, index = path / "model.safetensors", path / "model.safetensors.index.json"
    if not single.is_file() and not index.is_file():
        return False
    return read_metadata(weight_files(path)[0]).get("format") == "mlx"


def _open_torch(path: Path, name: str) -> Checkpoint:
    """PyTorch's weights, under our names. Files that MLX can't read are rewritten in a folder that
    is gone when this returns: MLX has them open."""
    with tempfile.TemporaryDirectory(prefix="mlx-sleep-") as scratch:
        source = open_source(path, Path(scratch))
        if source.origins:
            raise UserError(f"{path} holds a GGUF; convert it: mlx-sleep convert {path} FOLDER")
        architecture, config, model = understand(source, None, or_mlx_lm=True)
        wanted = dict(tree_flatten(model.parameters()))
        targets = map_tensors(architecture, config, source.tensors, wanted).targets
    mapped = {target.name: target.array for target in targets}
    tensors = {name: (DTYPES[x.dtype], list(x.shape)) for name, x in mapped.items()}
    return Checkpoint(name, path, config, tensors, source.files, mapped)
