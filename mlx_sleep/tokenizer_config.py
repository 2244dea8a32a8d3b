"""What is checked of a tokenizer's files before transformers reads them: sizes, and the types of
the fields of tokenizer_config.json that a chat depends on."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from .utils import limits, schema

_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "merges.txt", "chat_template.jinja")
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
