"""Models on Hugging Face's hub, downloaded into its cache by huggingface_hub, or found there."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable
from pathlib import Path

from ..utils.errors import UserError
from ..utils.files import reading

_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
# As mlx-lm has them, without Python code and what lies in folders, which is of other formats: what
# mlx-lm has cached is then all that is needed here.
_FILES = ("*.json", "*.jinja", "*.txt", "*.jsonl", "tokenizer.model", "*.tiktoken")
_SAFETENSORS = (*_FILES, "model*.safetensors")
_TORCH = (*_FILES, "pytorch_model*.bin")


def is_id(model: str | Path) -> bool:
    """Whether this is the id of a model, org/name, and no path that somebody has begun."""
    return bool(_ID.fullmatch(str(model))) and not Path(model).expanduser().parent.is_dir()


def download(model: str, revision: str | None = None, *, local_files_only: bool = False) -> Path:
    """The folder in Hugging Face's cache of the model with this id, with the files that are needed.

    revision          a branch, a tag or a commit; None is the newest
    local_files_only  ask nobody: what is in the cache is taken, or nothing

    Without a network, too, what is in the cache is taken. Progress is shown on a terminal.
    UserError, with what to do next, for an id that isn't there, or can't be had.
    """
    path = _fetch(model, revision, local_files_only, _SAFETENSORS)
    if not any(path.glob("model*.safetensors")):
        path = _fetch(model, revision, local_files_only, _TORCH)
        if not any(path.glob("pytorch_model*.bin")):
            raise UserError(
                f"{model} has no weights that mlx-sleep reads, no model.safetensors and no "
                "pytorch_model.bin; choose another repository of this model"
            )
    with reading(path):
        return path


def _fetch(model: str, revision: str | None, local: bool, patterns: Iterable[str]) -> Path:
    from huggingface_hub import errors, snapshot_download, utils

    if sys.stderr.isatty():
        utils.enable_progress_bars()
    else:
        utils.disable_progress_bars()
    try:
        found = snapshot_download(
            model,
            revision=revision,
            allow_patterns=list(patterns),
            ignore_patterns=["*/*"],
            local_files_only=local,
        )
        return Path(found)
    except errors.GatedRepoError as error:
        raise UserError(
            f"{model} is gated: ask for access at https://huggingface.co/{model}, then log in with "
            "`hf auth login`"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise UserError(f"{model} has no revision {revision!r}; look for it on its page") from error
    except errors.RepositoryNotFoundError as error:
        raise UserError(
            f"Hugging Face has no model {model}, or it is private; check the name, or log in with "
            "`hf auth login`"
        ) from error
    except errors.LocalEntryNotFoundError as error:  # an interrupted download is one, too
        what = "is not in Hugging Face's cache, or not all of it"
        if local:
            raise UserError(
                f"{model} {what}; download it without --local-files-only, or check --revision"
            ) from error
        raise UserError(
            f"{model} {what}, and Hugging Face cannot be reached; try again with a network, or "
            "give a local folder"
        ) from error
    except Exception as error:  # of httpx, of the file system, or of the hub itself
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        raise UserError(
            f"cannot get {model} from Hugging Face: {reason[:160]}; check the name and the "
            "network, or give a local folder"
        ) from error
