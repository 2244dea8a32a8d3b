"""Makes the tokenizer of the `memory` task: sentencepiece BPE with byte fallback.

    python -m mlx_sleep.lab.tasks.tokenizer OUT_DIR [--vocab-size 2048]

Writes tokenizer.model, the same tokenizer in Hugging Face form (tokenizer.json,
tokenizer_config.json, special_tokens_map.json) and its chat template. Trained on the train split
only, so that no piece is a whole word of the test split. Same input, same files. Text is not
normalised: any string comes back as it was. Knows nothing of models.
"""

from __future__ import annotations

import argparse
import io
import json
from pathlib import Path
from random import Random

import sentencepiece

from . import phrases, words
from .memory import ASSISTANT, END, PAD, USER, Level, MemoryTask

UNKNOWN = "<unk>"
SPECIALS = (UNKNOWN, PAD, USER, ASSISTANT, END)  # ids 0..4

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'user' %}{{ '<|user|>' + message['content'] }}"
    "{% elif message['role'] == 'assistant' %}"
    "{{ '<|assistant|>' + message['content'] + '<|end|>' }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def _words(text: str) -> list[int]:
    return [0] * len(text.split())


def corpus(conversations: int = 6000, seed: int = 7) -> list[str]:
    """Training text: conversations of the train split, their words alone, and plain words."""
    # Of the tokens only their number matters here.
    task = MemoryTask(_words, {USER: 1, ASSISTANT: 2, END: 3, PAD: 4}, "train", seed)
    lines = []
    for index in range(conversations):
        # Few questions: their wording is soon learned, names need the room.
        level = Level(windows=1, window_tokens=120, final_tokens=60, facts=(4, 8))
        for window in task.conversation(index, level).windows:
            for turn in window:
                lines += [turn.user, turn.assistant]
                lines += [record[-1] for record in turn.facts]
    rng = Random(seed)
    for kind in words.LISTS:
        lines += 3 * [w for w in words.words(kind, "train")]
    for _ in range(40_000):  # made-up words in both cases, alone: the pieces they share
        word = words.made_up(rng, "train")
        lines.append(word.title() if rng.random() < 0.7 else word)
    lines += 20 * [text for pair in phrases.TALK for text in pair]
    return lines


def train(vocab_size: int = 2048) -> bytes:
    """The serialized sentencepiece model."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(corpus()),
        model_writer=model,
        model_type="bpe",
        vocab_size=vocab_size,
        byte_fallback=True,
        split_digits=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        add_dummy_prefix=True,
        character_coverage=1.0,
        unk_id=0,
        unk_piece=UNKNOWN,
        pad_id=1,
        pad_piece=PAD,
        bos_id=-1,
        eos_id=-1,
        # Control symbols: text that happens to contain "<|end|>" never becomes one.
        control_symbols=[USER, ASSISTANT, END],
        num_threads=1,
        input_sentence_size=0,
        shuffle_input_sentence=False,
        minloglevel=2,
    )
    return model.getvalue()


def to_huggingface(model: bytes):
    """The same tokenizer as a `tokenizers.Tokenizer`: every pair of pieces whose union is a piece
    is a merge, ranked as sentencepiece ranks the union."""
    from tokenizers import AddedToken, Tokenizer, decoders, normalizers
    from tokenizers.models import BPE

    sp = sentencepiece.SentencePieceProcessor(model_proto=model)
    vocab = {sp.id_to_piece(i): i for i in range(sp.vocab_size())}
    merges = []
    for i in range(sp.vocab_size()):
        piece = sp.id_to_piece(i)
        if len(piece) < 2 or sp.is_byte(i) or sp.is_control(i) or sp.is_unknown(i):
            continue
        splits = [(piece[:k], piece[k:]) for k in range(1, len(piece))]
        splits = [(a, b) for a, b in splits if a in vocab and b in vocab]
        merges += sorted(splits, key=lambda s: (vocab[s[0]], vocab[s[1]]))
    tokenizer = Tokenizer(BPE(vocab, merges, unk_token=UNKNOWN, fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    tokenizer.add_special_tokens([AddedToken(s, special=True, normalized=False) for s in SPECIALS])
    return tokenizer


def write(out: Path, vocab_size: int = 2048) -> None:
    """Trains and writes all files into `out`."""
    out.mkdir(parents=True, exist_ok=True)
    model = train(vocab_size)
    (out / "tokenizer.model").write_bytes(model)
    to_huggingface(model).save(str(out / "tokenizer.json"))
    names = {"unk_token": UNKNOWN, "pad_token": PAD, "eos_token": END}
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **names,
        "additional_special_tokens": [USER, ASSISTANT],
        "clean_up_tokenization_spaces": False,
        "model_max_length": 1_000_000,
        "chat_template": CHAT_TEMPLATE,
    }
    dump(out / "tokenizer_config.json", config)
    dump(out / "special_tokens_map.json", {**names, "additional_special_tokens": [USER, ASSISTANT]})


def dump(path: Path, data: dict) -> None:
    path.write_text(json.dumps(data, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--vocab-size", type=int, default=2048)
    args = parser.parse_args()
    write(args.out, args.vocab_size)


if __name__ == "__main__":
    main()
