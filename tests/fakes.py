"""A tiny random model with a tokenizer, for tests of everything above the architecture."""

from __future__ import annotations

import json
from pathlib import Path

import mlx.core as mx
from mlx_lm import tokenizer_utils
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from mlx_sleep.chat_template import ChatTokenizer
from mlx_sleep.models.load import save
from mlx_sleep.models.sleep_hybrid import Model, ModelArgs

TEMPLATE = (
    "{% for m in messages %}{{ '<|user|>' if m.role == 'user' else '<|assistant|>' }}"
    "{{ m.content }}{% if m.role == 'assistant' %}<|end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
SPECIAL = ("<|end|>", "<|user|>", "<|assistant|>")


def hf_tokenizer(template: str | None = TEMPLATE, special=SPECIAL) -> PreTrainedTokenizerFast:
    """Byte fallback and letters, as a sentencepiece tokenizer has them; special[0] ends."""
    pieces = ["<unk>", *special, *(f"<0x{b:02X}>" for b in range(256)), "▁"]
    pieces += [chr(c) for c in range(33, 127)]
    tokenizer = Tokenizer(
        models.BPE(
            vocab={piece: i for i, piece in enumerate(pieces)},
            merges=[],
            unk_token="<unk>",
            byte_fallback=True,
        )
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=False)
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    tokenizer.add_special_tokens([AddedToken(s, special=True, normalized=False) for s in special])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=special[0], unk_token="<unk>", chat_template=template
    )


def fake_tokenizer(template: str | None = TEMPLATE, special=SPECIAL) -> ChatTokenizer:
    return ChatTokenizer(
        tokenizer_utils.TokenizerWrapper(
            hf_tokenizer(template, special), tokenizer_utils.SPMStreamingDetokenizer
        )
    )


def fake_config(**sleep) -> dict:
    """A model of four small blocks; the keywords are those of SleepConfig."""
    return {
        "model_type": "sleep_hybrid",
        "vocab_size": 360,
        "hidden_size": 32,
        "intermediate_size": 48,
        "layer_types": ["attention", "gated_deltanet", "attention", "mamba2"],
        "num_attention_heads": 2,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 2,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
        "mamba_num_heads": 2,
        "mamba_head_dim": 8,
        "ssm_state_size": 8,
        "eos_token_id": 1,
        "sleep": {"passes": 2, "window": 64, **sleep},
        "sleep_training": {"tokens": 1},
    }


def fake_model(seed: int = 0, **sleep) -> Model:
    mx.random.seed(seed)
    model = Model(ModelArgs.from_dict(fake_config(**sleep)))
    mx.eval(model.parameters())
    return model


def fake_folder(path: Path, seed: int = 0, **sleep) -> Path:
    """A model folder that the command line can load."""
    source = path.with_name(path.name + "-tokenizer")
    hf_tokenizer().save_pretrained(source)
    (source / "generation_config.json").write_text(
        json.dumps({"eos_token_id": 1, "do_sample": False})
    )
    save(path, fake_model(seed, **sleep), fake_config(**sleep), tokenizer_source=source)
    return path
