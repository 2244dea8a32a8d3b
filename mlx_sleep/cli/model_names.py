"""Which model a command means: a folder, an id on Hugging Face, a name of ours, or none given."""

from __future__ import annotations

import os
import re
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from ..utils.errors import UserError
from ..utils.files import expanded
from .output import note

if TYPE_CHECKING:  # it imports MLX
    from ..models.checkpoint import Checkpoint

DEFAULT = "smollm2"
"""The model of a chat that names none, if it was fetched and the package has an adapter for it."""

ADAPTERS = Path(__file__).parent.parent / "adapters"


class Chosen(NamedTuple):
    """A model's folder or id (None is the embedded model), its adapter's, and what to call both.

    revision, local_files_only  of an id: see `mlx_sleep.convert.hub.download`
    """

    path: Path | None
    adapter: Path | None
    name: str
    revision: str | None = None
    local_files_only: bool = False

    def open(self) -> Checkpoint:
        """The model, opened and not read; one of Hugging Face is downloaded first, if need be."""
        if self.path is None:
            from ..models.load import EMBEDDED
            from ..models.source import open_folder

            return open_folder(EMBEDDED)
        from ..convert.downloads import DOWNLOADS
        from ..convert.opening import open_model

        opened = open_model(
            self.path, revision=self.revision, local_files_only=self.local_files_only
        )
        return replace(opened, name=self.name) if self.name in DOWNLOADS else opened

    @property
    def memory(self) -> str:
        """The memory of a chat that names none: a memory belongs to one model, so each has its own.

        The embedded model's is `default`. Another's has the last part of the model's name, which
        is a folder's or an id's, with the adapter's and the revision.
        """
        from ..convert.downloads import DOWNLOADS

        if self.path is None:
            return "default"
        if self.name in DOWNLOADS:
            return self.name
        parts = [os.path.basename(os.path.abspath(os.path.expanduser(self.name)))]
        if self.adapter is not None:
            parts.append(os.path.basename(os.path.abspath(self.adapter)))
        if self.revision is not None:
            parts.append(self.revision)
        name = re.sub(r"[^A-Za-z0-9._-]+", "-", "-".join(parts))
        return name.lstrip("._-")[:64] or "model"


def folder_of(name: str) -> Path:
    """Where `models get` puts a model when it isn't told."""
    from ..memory import data_dir

    return data_dir() / "models" / name


def choose(
    model: str | None,
    adapter_path: str | None = None,
    revision: str | None = None,
    local_files_only: bool = False,
) -> Chosen:
    """The model of --model and --adapter-path. UserError for a name that wasn't fetched.

    "embedded" is the small demonstration; another name comes with the package's adapter, if there
    is one. Without --model it is DEFAULT with its adapter; the embedded model where one of them is
    missing, which is then said in one line.
    """
    from ..convert.downloads import DOWNLOADS

    adapter = None if adapter_path is None else expanded(adapter_path)
    if revision is not None and (model is None or model in ("embedded", *DOWNLOADS)):
        raise UserError("--revision is for ids on Hugging Face; give one with --model")
    if model is None:
        if adapter is not None:
            raise UserError("--adapter-path needs --model, the model that it was trained in")
        fetched, own = folder_of(DEFAULT), ADAPTERS / DEFAULT
        if not own.is_dir():
            return Chosen(None, None, "embedded")
        if not fetched.is_dir():
            note(
                f"{DEFAULT} is not here, so this is the small demonstration; "
                f"mlx-sleep models get {DEFAULT} fetches it"
            )
            return Chosen(None, None, "embedded")
        return Chosen(fetched, own, DEFAULT)
    path = expanded(model)
    if model == "embedded" and not path.is_dir():
        if adapter is not None:
            raise UserError(
                "the embedded model takes no adapter; give the model that the adapter was "
                "trained in with --model"
            )
        return Chosen(None, None, model)
    if model not in DOWNLOADS or path.is_dir():
        return Chosen(path, adapter, model, revision, local_files_only)
    path = folder_of(model)
    if not path.is_dir():
        raise UserError(f"{model} is not here yet; fetch it: mlx-sleep models get {model}")
    if adapter is None and (ADAPTERS / model).is_dir():
        adapter = ADAPTERS / model
    return Chosen(path, adapter, model)
