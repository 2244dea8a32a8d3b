"""What is damaged, how it is opened, and what an accepted file must still be.

A target makes its sound files once in a folder (`prepare`), damages a copy of them by the number of
a case, and opens it. `open` raises UserError where the file is refused. Where it is accepted, it
raises Nonsense unless what was read could be meant: ids have rows, numbers are finite, and what a
checksum covers is what was written.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import NamedTuple

from mlx_sleep.utils.errors import UserError

from .mutate import damage_bytes, damage_json, damage_text

TEXT = "The cat's name is Zorvi."


class Nonsense(Exception):
    """A damaged file that was accepted, and is not what it could have been meant to be."""


class Target(NamedTuple):
    """prepare(folder) writes sound files; damage(copy, draw) changes a copy of that folder;
    open(copy) uses it."""

    prepare: Callable[[Path], None]
    damage: Callable[[Path, Random], None]
    open: Callable[[Path], None]


# --- model folders -----------------------------------------------------------------------------


def _model(folder: Path) -> None:
    from tests.fakes import fake_folder

    fake_folder(folder / "model")


def _open_model(folder: Path) -> None:
    from mlx_sleep.models.load import load

    _use(*load(folder / "model")[:2])


def _use(model, tokenizer) -> None:
    """A turn, a sleep and a step: all ids have rows, and logits are finite."""
    import mlx.core as mx

    ids = tokenizer.turn(TEXT, first=True)[:20]
    if not ids or max(ids) >= model.vocab_rows or min(ids) < 0:
        raise Nonsense(f"ids {ids} of a model with {model.vocab_rows}")
    logits, _ = model(mx.array([ids]))
    if not mx.isfinite(logits).all().item():
        raise Nonsense("the logits are not finite")
    if not isinstance(tokenizer.decode(ids), str):
        raise Nonsense("what is decoded is no text")


def _config(folder: Path, draw: Random) -> None:
    """config.json; a value of another type must be refused where anything reads it."""
    file = folder / "model" / draw.choice(("config.json",) * 5 + ("generation_config.json",))
    file.write_bytes(damage_text(file.read_bytes(), draw))


def _open_config(folder: Path) -> None:
    from mlx_sleep.models.sleep_hybrid import ModelArgs

    _open_model(folder)
    read = json.loads((folder / "model" / "config.json").read_text())
    for name, kind in (("vocab_size", int), ("rope_theta", float), ("qk_norm", bool)):
        value = read.get(name)
        if value is not None and not isinstance(value, (kind, int) if kind is float else kind):
            raise Nonsense(f"{name} is {value!r}")
    assert ModelArgs.from_dict(read).vocab_size == read["vocab_size"]


def _header(folder: Path, draw: Random) -> None:
    file = folder / "model" / "model.safetensors"
    raw = file.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    if draw.random() < 0.5:
        file.write_bytes(damage_bytes(raw, draw, 0, 8 + length))
        return
    head = damage_json(raw[8 : 8 + length], draw)[0].encode("utf-8", "surrogatepass")
    file.write_bytes(len(head).to_bytes(8, "little") + head + raw[8 + length :])


def _tokenizer(folder: Path, draw: Random) -> None:
    files = ("tokenizer.json", "tokenizer_config.json")
    name = draw.choice(files)
    file = folder / "model" / name
    fields = json.loads(file.read_bytes())
    if name == files[1] and draw.random() < 0.3 and "chat_template" in fields:
        template = damage_bytes(fields["chat_template"].encode(), draw).decode(errors="replace")
        file.write_text(json.dumps({**fields, "chat_template": template}))
    else:
        file.write_bytes(damage_text(file.read_bytes(), draw))
    template_file = folder / "model" / "chat_template.jinja"
    if template_file.exists() and draw.random() < 0.2:
        template_file.write_bytes(damage_bytes(template_file.read_bytes(), draw))


# --- what is converted -------------------------------------------------------------------------


def _gguf(folder: Path) -> None:
    import mlx.core as mx

    from mlx_sleep.models.load import build
    from tests import ggufs

    mx.random.seed(0)
    tensors = ggufs.tensors(build(ggufs.CONFIG))
    ggufs.write(
        folder / "m.gguf", tensors, {**ggufs.metadata(ggufs.CONFIG), **ggufs.bpe_metadata()}
    )


def _damage_gguf(folder: Path, draw: Random) -> None:
    file = folder / "m.gguf"
    raw = file.read_bytes()
    header = raw.find(b"blk.1.ffn_down.weight") + 64  # beyond it are weights: any value is one
    file.write_bytes(damage_bytes(raw, draw, 0, header))


def _convert(name: str) -> Callable[[Path], None]:
    def open(folder: Path) -> None:
        from mlx_sleep.convert.pipeline import convert
        from mlx_sleep.models.load import load

        out = folder / "out"
        try:
            convert(folder / name, out)
        finally:
            if not (out / "config.json").exists() and out.exists():
                raise Nonsense("a folder that is half written")
        _use(*load(out)[:2])

    return open


def _bin(folder: Path) -> None:
    import mlx.core as mx
    import torch
    from mlx.utils import tree_flatten

    from mlx_sleep.models.load import build
    from tests.checkpoints import LLAMA
    from tests.fakes import hf_tokenizer

    (folder / "theirs").mkdir()
    mx.random.seed(0)
    config = {**LLAMA, "vocab_size": 360}
    arrays = tree_flatten(build(config).parameters())
    state = {name: torch.tensor(x.tolist()) for name, x in arrays}
    torch.save(state, folder / "theirs" / "pytorch_model.bin")
    (folder / "theirs" / "config.json").write_text(json.dumps(config))
    hf_tokenizer().save_pretrained(folder / "theirs")


def _damage_bin(folder: Path, draw: Random) -> None:
    file = folder / "theirs" / "pytorch_model.bin"
    raw = file.read_bytes()
    # The pickle is at the start, the archive's directory at the end; weights lie between.
    ends = draw.choice(((0, 4000), (len(raw) - 4000, len(raw)), (0, len(raw))))
    file.write_bytes(damage_bytes(raw, draw, *ends))


# --- memories ----------------------------------------------------------------------------------


def _memory(folder: Path) -> None:
    from mlx_sleep.memory import export_memory

    session = _session(folder)
    session.ask(TEXT)
    session.sleep()
    session.ask("And the dog is called Biscuit.")
    session.close(sleep=False)
    (folder / "lasting").write_text(json.dumps(_content(folder)))
    export_memory("ada", folder / "ada.exported", folder / "home")


def _session(folder: Path, name: str = "ada"):
    from mlx_sleep.memory import Memory
    from mlx_sleep.session import Session
    from tests.fakes import fake_model, fake_tokenizer

    memory = Memory.open(name, "0" * 64, model="fake", home=folder / "home")
    try:
        return Session(fake_model(), fake_tokenizer(), memory, max_tokens=8)
    except BaseException:
        memory.close()
        raise


def _content(folder: Path, name: str = "ada") -> dict:
    """What a memory holds: tokens that wait for a sleep, and sums over S."""
    import mlx.core as mx

    session = _session(folder, name)
    try:
        layers = [layer["fast_weights"] for layer in session.snapshot if "fast_weights" in layer]
        sums = [mx.sum(mx.abs(x)).item() for x in layers]
        return {"pending": list(session.pending), "fast_weights": sums}
    finally:
        session.close(sleep=False)


def _same(folder: Path, name: str) -> None:
    """Nothing that was said is lost or changed, but for a last record that was cut short."""
    lasting, found = json.loads((folder / "lasting").read_text()), _content(folder, name)
    if found["fast_weights"] != lasting["fast_weights"]:
        raise Nonsense("the fast weights are others")
    kept, end = found["pending"], _end_ids()
    kept = kept[: len(kept) - len(end)] if kept[len(kept) - len(end) :] == end else kept
    if kept != lasting["pending"][: len(kept)]:
        raise Nonsense("the tokens that wait for a sleep are others")


def _end_ids() -> list[int]:
    from tests.fakes import fake_tokenizer

    return list(fake_tokenizer().end_ids)


def _damage_export(folder: Path, draw: Random) -> None:
    file = folder / "ada.exported"
    file.write_bytes(damage_bytes(file.read_bytes(), draw))


def _import(folder: Path) -> None:
    from mlx_sleep.memory import import_memory

    import_memory(folder / "ada.exported", "eve", folder / "home")
    _same(folder, "eve")


def _damage_store(folder: Path, draw: Random) -> None:
    files = [f for f in sorted((folder / "home").rglob("ada*")) if f.is_file()]
    file = draw.choice([f for f in files if f.stat().st_size])
    file.write_bytes(damage_bytes(file.read_bytes(), draw))


def _open_store(folder: Path) -> None:
    _same(folder, "ada")


TARGETS = {
    "config": Target(_model, _config, _open_config),
    "safetensors": Target(_model, _header, _open_model),
    "tokenizer": Target(_model, _tokenizer, _open_model),
    "gguf": Target(_gguf, _damage_gguf, _convert("m.gguf")),
    "bin": Target(_bin, _damage_bin, _convert("theirs")),
    "memory": Target(_memory, _damage_export, _import),
    "store": Target(_memory, _damage_store, _open_store),
}


# --- faults, to see that they are found --------------------------------------------------------

FAULTS = ("signal", "traceback", "nonsense", "two lines", "no end", "none")


def _plant(folder: Path, draw: Random) -> None:
    (folder / "fault").write_text(draw.choice(FAULTS))


def _planted(folder: Path) -> None:
    match (folder / "fault").read_text():
        case "signal":
            os.kill(os.getpid(), signal.SIGSEGV)
        case "traceback":
            raise TypeError("planted")
        case "nonsense":
            raise Nonsense("planted")
        case "two lines":
            raise UserError("planted\nplanted")
        case "no end":
            time.sleep(1e6)


PLANTED = Target(lambda folder: None, _plant, _planted)


def copy(sound: Path, case: Path) -> Path:
    """A fresh copy of the sound files."""
    shutil.rmtree(case, ignore_errors=True)
    return shutil.copytree(sound, case)
