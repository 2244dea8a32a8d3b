"""Train a model that sleeps in PyTorch, and talk to it here.

The toy task: the model is told three facts ("amy blue tom red eva grey"), sleeps over them, and
is asked for one ("tom"). Nothing but the fast weights crosses the sleep, so what it answers it
has learned to fold into them. The steps are Algorithm 1 of arXiv 2605.26099: windows without a
loss are consolidated in N passes, windows with one are run once, and the gradient goes through
all of it.

    python examples/train_in_pytorch.py --out trained
    mlx-sleep convert trained remembers --verify
    mlx-sleep chat --model remembers        # amy blue tom red eva grey, then /sleep, then tom

The model's definition is one file that needs only PyTorch,
convert/torch/sleep_hybrid.py: copy it to the machine that you train on.
"""

import argparse
import json
from pathlib import Path

import torch
from safetensors.torch import save_model
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.nn import functional as F

from mlx_sleep.convert.torch.sleep_hybrid import SleepHybrid

NAMES = "amy tom eva max ida leo zoe ben".split()
COLOURS = "blue red grey green white black pink gold".split()
WORDS = ["<unk>", "<end>", *NAMES, *COLOURS]
END, FACTS = 1, 3

CONFIG = {
    "model_type": "sleep_hybrid",
    "vocab_size": len(WORDS),
    "hidden_size": 64,
    "intermediate_size": 128,
    "layer_types": ["attention", "gated_deltanet"],
    "num_attention_heads": 2,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
    "linear_key_head_dim": 32,
    "linear_value_head_dim": 32,
    "tie_word_embeddings": True,
    "eos_token_id": END,
    "sleep": {"passes": 2, "window": 2 * FACTS + 1, "eviction": "hard"},
}


def examples(batch):
    """(facts [B, 2 * FACTS + 1], ended by <end>; question and answer [B, 3]), token ids."""
    names = torch.stack([torch.randperm(len(NAMES))[:FACTS] for _ in range(batch)]) + 2
    colours = torch.randint(len(COLOURS), (batch, FACTS)) + 2 + len(NAMES)
    end = torch.full((batch, 1), END)
    facts = torch.cat([torch.stack([names, colours], -1).flatten(1), end], 1)
    asked = torch.randint(FACTS, (batch, 1))
    return facts, torch.cat([names.gather(1, asked), colours.gather(1, asked), end], 1)


def loss_of(model, facts, answer):
    """Cross-entropy of the answer behind the sleep, and of saying nothing to the facts."""
    fresh = model.fresh()
    told, _ = model(facts[:, :-1], fresh)
    state = model.consolidate(facts, fresh)  # N passes, no loss
    logits, _ = model(answer[:, :-1], state)  # one pass, as in use
    right = (logits[:, 0].argmax(-1) == answer[:, 1]).float().mean()
    loss = F.cross_entropy(logits.flatten(0, 1), answer[:, 1:].flatten())
    return loss + F.cross_entropy(told[:, -1], facts[:, -1]), right


def save(model, folder):
    """The folder that `mlx-sleep convert` takes: weights, config, and any usual tokenizer."""
    folder.mkdir(parents=True, exist_ok=True)
    save_model(model, str(folder / "model.safetensors"))  # tied weights are saved once
    (folder / "config.json").write_text(json.dumps(CONFIG, indent=2))
    vocabulary = {word: i for i, word in enumerate(WORDS)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<end>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    torch.manual_seed(0)
    model = SleepHybrid(CONFIG)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for step in range(1, options.steps + 1):
        loss, right = loss_of(model, *examples(32))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 50 == 0 or step == options.steps:
            print(
                f"step {step}: loss {loss.item():.3f}, right answers {right.item():.0%}", flush=True
            )
    save(model, options.out)


if __name__ == "__main__":
    main()
