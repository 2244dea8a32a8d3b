"""The `memory` task with the embedded model's tokenizer, and levels of its conversations."""

from __future__ import annotations

from sentencepiece import SentencePieceProcessor

from mlx_sleep.lab.tasks import tokenizer as task_tokenizer
from mlx_sleep.lab.tasks.memory import Level, MemoryTask
from mlx_sleep.models.load import EMBEDDED

SP = SentencePieceProcessor(model_file=str(EMBEDDED / "tokenizer.model"))
SPECIALS = {name: SP.piece_to_id(name) for name in task_tokenizer.SPECIALS}
USER, ASSISTANT, END, PAD = (SPECIALS[s] for s in ("<|user|>", "<|assistant|>", "<|end|>", "<pad>"))

LEVELS = [
    Level(windows=0, final_tokens=160, facts=(2, 6)),
    Level(windows=1, window_tokens=48, final_tokens=64, facts=(1, 3)),
    Level(windows=2, window_tokens=64, final_tokens=96, facts=(4, 8), two_hop=1.0, correction=0.3),
    Level(windows=5, window_tokens=96, final_tokens=192, facts=(18, 20), small_talk=0.6, noise=0.5),
    Level(windows=1, window_tokens=32, final_tokens=32, facts=(3, 5), unknown=1.0, small_talk=1.0),
    Level(windows=6, window_tokens=96, facts=(3, 9), correction=0.2, asking=0.6),
]


def task(split="train", seed=0):
    return MemoryTask(SP.encode, SPECIALS, split, seed)


def turns(conversation):
    return [turn for window in conversation.windows for turn in window]
