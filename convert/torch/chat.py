"""Ordinary chat that a base model makes of itself: prompts it finds likely, and its replies.

A model that learns to remember must stay what it was, so it is trained on its own chat too. The
prompts come the Magpie way (arXiv 2406.08464): the model continues the opening of a user's turn.

    python -m mlx_sleep.convert.torch.chat MODEL OUT.jsonl --count 2000
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F

from ...utils.errors import UserError
from .base import BaseConfig, read_tokenizer, read_weights

SYSTEM = (
    "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face"
    "<|im_end|>\n"
)
USER, ASSISTANT, END = "<|im_start|>user\n", "<|im_start|>assistant\n", "<|im_end|>"
PROMPT_TOKENS, REPLY_TOKENS = 80, 160


@dataclass(frozen=True)
class Exchange:
    """complete: the model ended its reply by itself; else it was cut at a limit."""

    user: str
    assistant: str
    complete: bool


class Chatter:
    """Generates with the model of a folder, in batches, in bfloat16 by default."""

    def __init__(self, folder: Path, device: str = "cpu", dtype=torch.bfloat16):
        self.config = c = BaseConfig.from_folder(folder)
        self.tokenizer = read_tokenizer(folder)
        end = self.tokenizer.token_to_id(END)
        if end is None:
            raise UserError(f"the tokenizer in {folder} has no {END}; chat needs ChatML's marks")
        self.end: int = end
        self.device = device
        self.weights = {n: x.to(device, dtype) for n, x in read_weights(folder).items()}
        self.frequencies = c.rope_theta ** (-torch.arange(0, c.head_dim, 2).float() / c.head_dim)

    @torch.inference_mode()
    def continue_(
        self, texts: Sequence[str], limit: int, sample: bool = False
    ) -> list[tuple[str, bool]]:
        """(continuation, whether it ended by itself) of each text, of at most `limit` tokens.

        Greedy, or sampled from the 95% most likely (temperature 1).
        """
        rows = [self.tokenizer.encode(t, add_special_tokens=False).ids for t in texts]
        width = max(map(len, rows))
        c, first = self.config, self.weights["model.norm.weight"]
        shape = (c.num_hidden_layers, 2, len(rows), c.num_key_value_heads, width + limit)
        cache = torch.zeros(*shape, c.head_dim, dtype=first.dtype, device=self.device)
        ids = [[self.end] * (width - len(row)) + row for row in rows]
        padding = torch.tensor([width - len(row) for row in rows], device=self.device)
        tokens = torch.tensor(ids, device=self.device)
        made: list[list[int]] = [[] for _ in rows]
        left = list(range(len(rows)))
        for at in range(width, width + limit):
            logits = self._forward(tokens, cache, at, padding)
            tokens = _draw(logits) if sample else logits.argmax(-1, keepdim=True)
            going = []
            for j, (i, token) in enumerate(zip(left, tokens[:, 0].tolist(), strict=True)):
                made[i].append(token)
                if token != self.end:
                    going.append(j)
            if not going:
                break
            left_now = [left[j] for j in going]
            if len(going) <= 0.8 * len(left):  # finished rows leave the batch, now and then
                kept = torch.tensor(going, device=self.device)
                cache, padding, tokens = cache[:, :, kept], padding[kept], tokens[kept]
                left = left_now
        done = []
        for row in made:
            ended = self.end in row
            row = row[: row.index(self.end)] if ended else row
            done.append((self.tokenizer.decode(row).strip(), ended))
        return done

    def _forward(self, tokens, cache, end: int, padding):
        """Logits [B, V] after tokens [B, T], the columns up to `end`; their k and v are cached.

        cache [L, 2, B, Hkv, S, d]; padding [B]: columns on the left that are none.
        """
        c, w = self.config, self.weights
        B, T = tokens.shape
        columns = torch.arange(end, device=self.device)
        positions = (columns[end - T :] - padding[:, None]).clamp(min=0)
        angle = positions[..., None].float() * self.frequencies.to(self.device)
        angle = torch.cat([angle, angle], -1)[:, None]
        hidden = (columns > columns[end - T :, None]) | (columns < padding[:, None, None])
        mask = torch.zeros(B, T, end, device=self.device).masked_fill_(hidden, -torch.inf)
        mask.clamp_(min=-1e30)  # a row of padding sees nothing, and must not be NaN
        h = w["model.embed_tokens.weight"][tokens]
        for i in range(c.num_hidden_layers):
            layer = f"model.layers.{i}."
            x = F.rms_norm(h, h.shape[-1:], w[layer + "input_layernorm.weight"], c.rms_norm_eps)
            q, k, v = (
                F.linear(x, w[f"{layer}self_attn.{n}_proj.weight"])
                .view(B, T, -1, c.head_dim)
                .transpose(1, 2)
                for n in "qkv"
            )
            cache[i, 0, :, :, end - T : end] = rotate(k, angle)
            cache[i, 1, :, :, end - T : end] = v
            keys, values = cache[i, :, :, :, :end]
            # The queries of a group share its keys: no copies of those.
            q = rotate(q, angle).reshape(B, c.num_key_value_heads, -1, c.head_dim)
            scores = (q @ keys.mT).float().view(B, c.num_attention_heads, T, end)
            scores = (scores * c.head_dim**-0.5 + mask[:, None]).softmax(-1).to(h.dtype)
            o = scores.view(B, c.num_key_value_heads, -1, end) @ values
            o = o.view(B, c.num_attention_heads, T, -1).transpose(1, 2).reshape(B, T, -1)
            h = h + F.linear(o, w[layer + "self_attn.o_proj.weight"])
            norm = w[layer + "post_attention_layernorm.weight"]
            x = F.rms_norm(h, h.shape[-1:], norm, c.rms_norm_eps)
            gate = F.silu(F.linear(x, w[layer + "mlp.gate_proj.weight"]))
            up = F.linear(x, w[layer + "mlp.up_proj.weight"])
            h = h + F.linear(gate * up, w[layer + "mlp.down_proj.weight"])
        h = F.rms_norm(h[:, -1], h.shape[-1:], w["model.norm.weight"], c.rms_norm_eps)
        return F.linear(h, w["model.embed_tokens.weight"])

    def prompts(self, count: int) -> list[str]:
        """At most `count` sampled user messages; those that did not end are dropped."""
        made = self.continue_([SYSTEM + USER] * count, PROMPT_TOKENS, sample=True)
        return [text for text, ended in made if ended and text]

    def replies(self, prompts: Sequence[str], limit: int = REPLY_TOKENS) -> list[Exchange]:
        """The greedy reply to each prompt as the first message of a conversation."""
        texts = [f"{SYSTEM}{USER}{prompt}{END}\n{ASSISTANT}" for prompt in prompts]
        made = self.continue_(texts, limit)
        return [Exchange(p, text, ended) for p, (text, ended) in zip(prompts, made, strict=True)]


def rotate(x, angle):
    """Rotary embedding of x [B, H, T, d] by angle [B, 1, T, d], pairs (i, i + d/2)."""
    a, b = x.chunk(2, -1)
    return x * angle.cos().to(x.dtype) + torch.cat([-b, a], -1) * angle.sin().to(x.dtype)


def _draw(logits, top_p: float = 0.95):
    """One token [B, 1] of each row of logits [B, V], from the likeliest that make up top_p."""
    p, order = logits.float().softmax(-1).sort(-1, descending=True)
    p = p.masked_fill(p.cumsum(-1) - p > top_p, 0)
    return order.gather(-1, torch.multinomial(p, 1))


def degenerate(text: str) -> bool:
    """Whether the text is empty, or says the same four words again and again."""
    words = text.split()
    grams = Counter(zip(words, words[1:], words[2:], words[3:], strict=False))
    return not words or (bool(grams) and max(grams.values()) > 2)


def sound(exchanges: Iterable[Exchange]) -> Iterator[Exchange]:
    """Those without degenerate texts and chat marks, each prompt once."""
    seen: set[str] = set()
    for e in exchanges:
        odd = any(degenerate(t) or "<|" in t for t in (e.user, e.assistant))
        if not odd and e.user not in seen:
            seen.add(e.user)
            yield e


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path, help="folder of the base model")
    parser.add_argument("out", type=Path, help="file of JSON lines: user, assistant, complete")
    parser.add_argument("--count", type=int, default=2000)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--prompts", type=Path, help="answer these (one a line), sample none")
    parser.add_argument("--reply-tokens", type=int, default=REPLY_TOKENS, help="at most")
    options = parser.parse_args(arguments)
    torch.manual_seed(options.seed)
    chatter = Chatter(options.model, "cuda" if torch.cuda.is_available() else "cpu")
    given = options.prompts and iter(options.prompts.read_text().splitlines())
    written, seen = 0, set()
    options.out.parent.mkdir(parents=True, exist_ok=True)
    with open(options.out, "w") as file:
        while written < options.count:
            if given:
                prompts = [p for _, p in zip(range(options.batch), given, strict=False)]
                if not prompts:
                    break
            else:
                prompts = chatter.prompts(options.batch)
            # Replies to prompts of like length need little padding.
            for e in sound(chatter.replies(prompts, options.reply_tokens)):
                if e.user not in seen:
                    seen.add(e.user)
                    file.write(json.dumps(e.__dict__) + "\n")
                    written += 1
            file.flush()
            print(f"{written} of {options.count}", flush=True)


if __name__ == "__main__":
    main()
