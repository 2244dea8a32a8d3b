"""The tokenizer inside a GGUF file, as files that the ecosystem reads.

Two kinds are known: byte-level BPE ("gpt2"), written as tokenizer.json, and sentencepiece
("llama"), written as tokenizer.model. The chat template goes into tokenizer_config.json.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..models.folder import write_json
from ..utils.errors import UserError, is_failure
from ..utils.files import one_line

_NORMAL, _CONTROL, _USER_DEFINED = 1, 3, 4  # tokenizer.ggml.token_type

_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_LLAMA_3 = ("llama-bpe", "llama3", "llama-v3")
# tokenizer.ggml.pre -> how text is split before BPE: a regular expression, or as by GPT-2, with
# each digit alone (True) or not (False).
_SPLITS: dict[str, str | bool] = {
    "gpt-2": False,
    "gpt2": False,
    **dict.fromkeys(_LLAMA_3, _WORDS % "{1,3}"),
    "qwen2": _WORDS % "",
    "refact": True,
    "smollm": True,
    "starcoder": True,
}


def write(metadata: dict, folder: Path, file: Path) -> list[str]:
    """Write the tokenizer's files of a GGUF's metadata (plain Python values) into `folder`.

    Returns notes on what was missing. UserError for a tokenizer that is damaged or not known.
    """
    values = {
        name.removeprefix("tokenizer.ggml."): value
        for name, value in metadata.items()
        if name.startswith("tokenizer.ggml.")
    }
    if "tokens" not in values:
        raise UserError(f"{file} holds no tokenizer; download it again")
    _check(values, file)
    kind = values.get("model")
    notes = []
    if kind == "gpt2":
        if "pre" not in values:
            notes.append(
                f"{file.name} does not say how text is split into words (tokenizer.ggml.pre): "
                "split as by GPT-2, which is wrong for most models"
            )
        _write_bpe(values, folder / "tokenizer.json", file)
        config: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast"}
    elif kind == "llama":
        _write_sentencepiece(values, folder / "tokenizer.model", file)
        config = {
            "tokenizer_class": "LlamaTokenizer",
            "add_prefix_space": values.get("add_space_prefix", True),
            "legacy": False,
        }
    else:
        raise UserError(f"{file} has a tokenizer of kind {kind!r}; only gpt2 and llama can be read")
    tokens = values["tokens"]
    for name, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")):
        if (token := values.get(f"{key}_token_id")) is not None:
            config[f"{name}_token"] = tokens[token]
    config["add_bos_token"] = _adds_bos(values)
    config["add_eos_token"] = values.get("add_eos_token", False)
    config["clean_up_tokenization_spaces"] = False
    template = metadata.get("tokenizer.chat_template")
    if template and isinstance(template, str):
        config["chat_template"] = template
    write_json(folder / "tokenizer_config.json", config)
    return notes


def _check(values: dict, file: Path) -> None:
    """UserError unless each value is of its kind, lists are of one length, and ids are tokens."""
    tokens = values["tokens"]
    count = len(tokens)
    lists: dict[str, tuple[type, int | None]] = {"tokens": (str, count), "scores": (float, count)}
    lists |= {"token_type": (int, count), "merges": (str, None)}
    wrong = [
        name
        for name, (kind, length) in lists.items()
        if name in values
        and not (
            isinstance(values[name], list)
            and all(type(x) is kind for x in values[name])
            and len(values[name]) == (length or len(values[name]))
        )
    ]
    wrong += [
        name
        for name, x in values.items()
        if name.endswith("_token_id") and not (type(x) is int and 0 <= x < len(tokens))
    ]
    wrong += [
        name
        for name in ("add_bos_token", "add_eos_token", "add_space_prefix")
        if type(values.get(name, True)) is not bool
    ]
    if wrong or not tokens:
        name = wrong[0] if wrong else "tokens"
        raise UserError(f"{file} has a damaged tokenizer.ggml.{name}; download it again")


def _adds_bos(values: dict) -> bool:
    # As llama.cpp, which adds it to Llama 3's text where the file doesn't say.
    default = values["model"] == "llama" or values.get("pre") in _LLAMA_3
    return values.get("add_bos_token", default) and "bos_token_id" in values


def _write_bpe(values: dict, out: Path, file: Path) -> None:
    from tokenizers import (
        AddedToken,
        Regex,
        Tokenizer,
        decoders,
        models,
        pre_tokenizers,
        processors,
    )

    name = values.get("pre", "gpt-2")
    if not isinstance(name, str) or name not in _SPLITS:
        known = ", ".join(_SPLITS)
        raise UserError(f"{file} cuts text into words by {name!r}; known ways: {known}")
    tokens, types = values["tokens"], values.get("token_type") or [_NORMAL] * len(values["tokens"])
    if len(set(tokens)) < len(tokens):
        raise UserError(f"{file} has a damaged tokenizer; download it again")
    vocab = {token: i for i, token in enumerate(tokens)}
    merges = [tuple(merge.split(" ", 1)) for merge in values.get("merges", [])]
    ignore = name in _LLAMA_3  # whole words of the vocabulary need no merges
    try:
        tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, ignore_merges=ignore))
    except BaseException as error:  # the library raises plain Exceptions, or panics
        if not is_failure(error):
            raise
        raise UserError(f"{file} has a damaged tokenizer: {one_line(error)}") from error
    split = _SPLITS[name]
    words: list[pre_tokenizers.PreTokenizer]
    if isinstance(split, str):
        words = [pre_tokenizers.Split(Regex(split), "isolated")]
    else:
        words = [pre_tokenizers.Digits(individual_digits=True)] if split else []
    byte_level = pre_tokenizers.ByteLevel(
        add_prefix_space=False, use_regex=not isinstance(split, str)
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*words, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    for token, kind in zip(tokens, types, strict=True):
        if kind == _CONTROL:
            tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True)])
        elif kind == _USER_DEFINED:
            tokenizer.add_tokens([AddedToken(token, normalized=False)])
    if _adds_bos(values):
        bos = values["bos_token_id"]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{tokens[bos]}:0 $A:0",
            pair=f"{tokens[bos]}:0 $A:0 {tokens[bos]}:1 $B:1",
            special_tokens=[(tokens[bos], bos)],
        )
    tokenizer.save(str(out))


def _write_sentencepiece(values: dict, out: Path, file: Path) -> None:
    """GGUF keeps sentencepiece's pieces, scores and types as they were."""
    from sentencepiece import sentencepiece_model_pb2 as proto

    model = proto.ModelProto()
    types = values.get("token_type") or [_NORMAL] * len(values["tokens"])
    scores = values.get("scores") or [0.0] * len(values["tokens"])
    try:
        for token, score, kind in zip(values["tokens"], scores, types, strict=True):
            model.pieces.add(piece=token, score=score, type=kind)
    except ValueError as error:
        raise UserError(f"{file} has a damaged tokenizer: {one_line(error)}") from error
    spec = model.trainer_spec
    spec.model_type, spec.vocab_size = proto.TrainerSpec.BPE, len(values["tokens"])
    spec.byte_fallback = 6 in types
    for name, key in (("unk_id", "unknown"), ("bos_id", "bos"), ("eos_id", "eos")):
        if (token := values.get(f"{key}_token_id")) is not None:
            setattr(spec, name, token)
    spec.pad_id = values.get("padding_token_id", -1)
    normalizer = model.normalizer_spec
    normalizer.name = "identity"
    normalizer.add_dummy_prefix = values.get("add_space_prefix", True)
    normalizer.remove_extra_whitespaces = False
    normalizer.escape_whitespaces = True
    out.write_bytes(model.SerializeToString())
