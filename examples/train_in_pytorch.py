"""Train a model that sleeps in PyTorch, and talk to it here.

    python examples/train_in_pytorch.py toy --out trained
    mlx-sleep convert trained remembers --verify
    mlx-sleep chat --model remembers        # amy blue tom red eva grey, then /sleep, then tom

The toy task: the model is told three facts ("amy blue tom red eva grey"), sleeps over them, and
is asked for one ("tom"). Nothing but the fast weights crosses the sleep, so what it answers it
has learned to fold into them. The steps are Algorithm 1 of arXiv 2605.26099: windows without a
loss are consolidated in N passes, windows with one are run once, and the gradient goes through
all of it. The model's definition is one file that needs only PyTorch,
convert/torch/sleep_hybrid.py: copy it to the machine that you train on.

    mlx-sleep models get smollm2
    python examples/train_in_pytorch.py retrofit MODEL --out adapter --hours 1

A retrofit trains sleep layers in a model that stays frozen, so that it remembers what it is told
(convert/torch/retrofit.py). MODEL is a folder: a Llama-like model of Hugging Face, or one that
`mlx-sleep` wrote. Ctrl-C stops it with a checkpoint; --resume goes on.
"""

import argparse
import json
import math
from collections.abc import Iterator
from dataclasses import asdict, replace
from hashlib import sha256
from importlib.util import find_spec
from pathlib import Path

import torch
from safetensors.torch import save_model
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.nn import functional as F

from mlx_sleep.convert.heads import heads_of
from mlx_sleep.convert.torch.adapter import read_adapter
from mlx_sleep.convert.torch.base import BaseConfig, read_tokenizer, read_weights
from mlx_sleep.convert.torch.carry import carry_over
from mlx_sleep.convert.torch.delta_rule import best_rule
from mlx_sleep.convert.torch.evaluate import evaluate
from mlx_sleep.convert.torch.loss import LifeBatch
from mlx_sleep.convert.torch.retrofit import AdapterConfig, Retrofit
from mlx_sleep.convert.torch.sleep_hybrid import SleepHybrid
from mlx_sleep.convert.torch.soften import soften
from mlx_sleep.convert.torch.trainer import Settings, Trainer
from mlx_sleep.lab.tasks.curriculum import SHARES, batches, held_out
from mlx_sleep.lab.tasks.life_batches import Source, read_chat
from mlx_sleep.training.refusals import REFUSAL, mark_refusals
from mlx_sleep.training.schedule import Budget
from mlx_sleep.utils.errors import UserError, errors_in_one_line

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
    """Cross-entropy of the answer after the sleep, and of saying nothing to the facts."""
    fresh = model.fresh()
    told, _ = model(facts[:, :-1], fresh)
    state = model.consolidate(facts, fresh)  # N passes, no loss
    logits, _ = model(answer[:, :-1], state)  # one pass, as in use
    right = (logits[:, 0].argmax(-1) == answer[:, 1]).float().mean()
    loss = F.cross_entropy(logits.flatten(0, 1), answer[:, 1:].flatten())
    return loss + F.cross_entropy(told[:, -1], facts[:, -1]), right


def save(model, folder, tokens):
    """The folder that `mlx-sleep convert` takes: weights, config, and any usual tokenizer.

    sleep_training says that it was trained to sleep, and on how many tokens.
    """
    folder.mkdir(parents=True, exist_ok=True)
    save_model(model, str(folder / "model.safetensors"))  # tied weights are saved once
    (folder / "config.json").write_text(
        json.dumps({**CONFIG, "sleep_training": {"tokens": tokens}}, indent=2)
    )
    (folder / "generation_config.json").write_text(json.dumps({"do_sample": False}))
    vocabulary = {word: i for i, word in enumerate(WORDS)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<end>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def toy(options):
    torch.manual_seed(0)
    model = SleepHybrid(CONFIG)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    tokens = 0
    for step in range(1, options.steps + 1):
        facts, answer = examples(32)
        tokens += facts.numel() + answer.numel()
        loss, right = loss_of(model, facts, answer)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 50 == 0 or step == options.steps:
            print(
                f"step {step}: loss {loss.item():.3f}, right answers {right.item():.0%}", flush=True
            )
    save(model, options.out, tokens)


def check(options):
    """UserError for a number that is none of its option."""
    least = {"tokens": 1, "batch": 1, "workers": 0, "heads": 1, "head_dim": 1, "passes": 1}
    for name, low in {**least, "lora_rank": 0, "seed": 0}.items():
        x = getattr(options, name)
        if x is not None and x < low:
            raise UserError(f"--{name.replace('_', '-')} must be at least {low}, not {x}")
    for name in ("hours", "muon_lr", "adamw_lr", "read_eps"):
        x = getattr(options, name)
        if x is not None and not 0 < x < math.inf:
            raise UserError(f"--{name.replace('_', '-')} must be above 0, not {x}")
    if not math.isfinite(options.gain):
        raise UserError(f"--gain must be a number, not {options.gain}")
    if not 0 <= options.two_hop <= 1:
        raise UserError(f"--two-hop must be from 0 to 1, not {options.two_hop}")
    shares = options.shares
    if len(shares) > len(SHARES) or not min(shares) >= 0 or not 0 < sum(shares) < math.inf:
        raise UserError(f"--shares takes up to {len(SHARES)} numbers >= 0, and not only zeros")


def digest_of(folder):
    """That of the base's weights, without which no other folder of the same model takes the
    adapter; "" where there is no MLX to read them as `mlx-sleep` does."""
    if not find_spec("mlx"):
        return ""
    from mlx_sleep.convert.opening import open_model

    return open_model(folder).digest()


def retrofit(options):
    check(options)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    base = BaseConfig.from_folder(options.model)
    base = replace(base, weights=digest_of(options.model))
    started, weights = None, None
    if options.start:
        started, weights, _ = read_adapter(options.start)
    before = options.before or (started.before if started else AdapterConfig.before)
    heads = options.heads or (started and started.num_heads)
    head_dim = options.head_dim or (started and started.head_dim)
    host, copy = (base.num_attention_heads, base.head_dim), options.init == "host"
    eps = started.read_eps if started else options.read_eps
    adapter = AdapterConfig(
        before=tuple(before),
        **heads_of(host, heads, head_dim, copy),
        passes=options.passes,
        fold=options.fold,
        lora_rank=options.lora_rank,
        read_eps=eps if options.read_eps is None else options.read_eps,
        loop_range=options.loop_range and tuple(options.loop_range),
    )
    shares = [*options.shares, *[0.0] * (len(SHARES) - len(options.shares))]
    torch.manual_seed(options.seed)
    model = Retrofit(
        base,
        read_weights(options.model),
        replace(adapter, read_eps=eps),
        gain=options.gain,
        copy=copy,
        seed=options.seed,
        device=device,
        dtype=torch.bfloat16,
        rule=best_rule(device),
    )
    if started and weights is not None:
        carry_over(model, started, weights)
    else:
        begun = "as the attention at their places" if copy else "from random numbers"
        print(f"sleep layers before blocks {[*adapter.before]} start {begun}", flush=True)
    if device == "cuda":
        torch.set_float32_matmul_precision("high")
    chat = read_chat(options.chat) if options.chat else ()
    opening = read_tokenizer(options.model).encode(REFUSAL, add_special_tokens=False).ids
    tokenizer = str(options.model / "tokenizer.json")
    train, valid = (Source(tokenizer, split, options.seed, chat) for split in ("train", "valid"))

    def marked(batches) -> Iterator[dict]:
        for arrays in batches:
            yield {**arrays, "refusal": mark_refusals(arrays, opening)}

    if eps != adapter.read_eps:
        arrays = next(iter(batches(train, [(0, 1)], options.batch)))
        soften(model, adapter.read_eps, LifeBatch.from_arrays(arrays, device, fold=adapter.fold))
    if options.compile:
        model.compile()
    unseen = list(marked(held_out(valid)))
    about = {
        "model": base.fingerprint or base.name,
        "batch": options.batch,
        "seed": options.seed,
        "gain": options.gain,
        "init": options.init,
        "start": options.start and str(options.start),
        **({"chat": sha256(options.chat.read_bytes()).hexdigest()} if options.chat else {}),
        "adapter": asdict(adapter),
        **({"two_hop": options.two_hop} if options.two_hop else {}),
    }
    trainer = Trainer(
        model,
        options.out,
        lambda jobs: marked(batches(train, jobs, options.batch, options.workers, options.two_hop)),
        Budget(tokens=options.tokens, seconds=options.hours and options.hours * 3600),
        Settings(tuple(shares), muon_lr=options.muon_lr, adamw_lr=options.adamw_lr),
        evaluate=lambda model: evaluate(model, unseen),
        evaluate_every=options.evaluate_every,
        about=about,
        say=lambda line: print(line, flush=True),
    )
    trainer.run(options.resume)


def main():
    parser = argparse.ArgumentParser(description="Train a model that sleeps, in PyTorch.")
    commands = parser.add_subparsers(dest="command", required=True)
    small = commands.add_parser("toy", help="a tiny model on a toy task, in a minute")
    small.add_argument("--steps", type=int, default=400)
    small.add_argument("--out", type=Path, required=True)
    large = commands.add_parser("retrofit", help="sleep layers in a frozen model")
    large.add_argument("model", type=Path, help="folder of the base model")
    large.add_argument("--out", type=Path, required=True, help="folder of the run")
    budget = large.add_mutually_exclusive_group(required=True)
    budget.add_argument("--hours", type=float)
    budget.add_argument("--tokens", type=int)
    large.add_argument("--resume", action="store_true", help="go on with the run in --out")
    large.add_argument("--start", type=Path, help="an adapter to begin with (new optimizers)")
    large.add_argument("--batch", type=int, default=4096, help="tokens a step, with padding")
    large.add_argument("--shares", type=float, nargs="+", default=SHARES, help="of the stages")
    large.add_argument(
        "--two-hop", type=float, default=0.0, help="share of facts and questions of two hops"
    )
    large.add_argument(
        "--before",
        type=int,
        nargs="+",
        help="blocks with a sleep layer (default: 6 10 14 18 22 26)",
    )
    large.add_argument("--heads", type=int, help="of a sleep layer (default: the base's)")
    large.add_argument("--head-dim", type=int, help="their size")
    large.add_argument("--passes", type=int, default=1, help="passes of a sleep (N)")
    large.add_argument(
        "--loop-range",
        type=int,
        nargs=2,
        metavar=("LO", "HI"),
        help="blocks [LO, HI) of the passes (default: from the first sleep layer on)",
    )
    large.add_argument("--fold", choices=("all", "user"), default="all", help="what S is made of")
    large.add_argument(
        "--init", choices=("host", "random"), default="host", help="what the layers start as"
    )
    large.add_argument("--lora-rank", type=int, default=0)
    large.add_argument("--read-eps", type=float, help="epsilon of the norm of what is read from S")
    large.add_argument("--gain", type=float, default=0.05, help="of the new layers at the start")
    large.add_argument("--muon-lr", type=float, default=5e-3)
    large.add_argument("--adamw-lr", type=float, default=2e-3)
    large.add_argument(
        "--chat", type=Path, help="ordinary chat of the base (convert/torch/chat.py)"
    )
    large.add_argument("--workers", type=int, default=0, help="processes that make batches")
    large.add_argument("--evaluate-every", type=float, default=600, help="seconds")
    large.add_argument("--compile", action="store_true", help="torch.compile")
    large.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    {"toy": toy, "retrofit": retrofit}[options.command](options)


if __name__ == "__main__":
    errors_in_one_line()
    main()
