"""A tokenizer's files before transformers reads them: their sizes, and the types of those fields of
tokenizer_config.json that a chat depends on. And what is said when transformers can't read them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from .utils import limits, schema
from .utils.files import one_line

TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json")
"""A folder without any of these has no tokenizer."""

_FILES = (*TOKENIZERS, "merges.txt", "chat_template.jinja")
_Token = str | dict | None  # a dict has its content and flags


@dataclass
class _Fields:
    tokenizer_class: str | None = None
    chat_template: str | list[dict] | None = None
    bos_token: _Token = None
    eos_token: _Token = None
    unk_token: _Token = None
    pad_token: _Token = None
    add_bos_token: bool | None = None
    add_eos_token: bool | None = None
    add_prefix_space: bool | None = None
    clean_up_tokenization_spaces: bool | None = None
    legacy: bool | None = None
    model_max_length: float | None = None
    added_tokens_decoder: dict[str, dict] | None = None


def check_files(folder: Path) -> None:
    """UserError for a file that is too large, and for a field of a wrong type."""
    for file in (folder / name for name in _FILES):
        if file.is_file():
            size = file.stat().st_size
            limits.check(f"the size of {file}", size, limits.TOKENIZER_BYTES)
    if (folder / "tokenizer_config.json").is_file():
        schema.read_file(_Fields, folder / "tokenizer_config.json")


def why(folder: Path, error: BaseException) -> str:
    """What is wrong with the files that made transformers fail so, and what to do, in one line."""
    text = one_line(error)
    if "trust_remote_code" in text:
        return (
            "it is Python code of the model's own, which is not run; use a copy of the model whose "
            "tokenizer transformers has"
        )
    if text.startswith("Couldn't instantiate the backend tokenizer"):  # from what it could be
        found = " and ".join(name for name in TOKENIZERS if (folder / name).is_file())
        return (
            f"there is no tokenizer.json, and transformers makes no tokenizer of {found}; download "
            "all the model's files again"
        )
    if isinstance(error, (AttributeError, LookupError, TypeError)):  # 'added_tokens', and no more
        text = f"{type(error).__name__}: {text}"
    if isinstance(error, ImportError):  # it says what to install
        return text[:200]
    return f"{text[:200]}; download its files again"
