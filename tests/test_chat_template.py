"""A chat's ids, turn by turn, are those of transformers for the whole chat; what is typed is text.

The tokenizers are small ones, trained here, of the kinds that published models have.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path

import pytest
from mlx_lm import tokenizer_utils
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import PreTrainedTokenizerFast

from mlx_sleep.chat_template import ChatTokenizer
from mlx_sleep.utils.errors import UserError

CORPUS = [(Path(__file__).parents[1] / name).read_text() for name in ("README.md", "LICENSE")]
LETTERS = [chr(c) for c in range(33, 127)]
GPT4 = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"

EACH = "{% for m in messages %}"
END = "{% endfor %}"
LLAMA_2 = EACH + (
    "{% if m.role == 'user' %}{{ bos_token + '[INST] ' + m.content.strip() + ' [/INST]' }}"
    "{% else %}{{ ' ' + m.content.strip() + ' ' + eos_token }}{% endif %}" + END
)
MISTRAL = (
    "{{ bos_token }}"
    + EACH
    + (
        "{% if m.role == 'user' %}{{ '[INST] ' + m.content + ' [/INST]' }}"
        "{% else %}{{ m.content + eos_token + ' ' }}{% endif %}" + END
    )
)
ZEPHYR = EACH + (
    "{{ '<|' + m.role + '|>\n' + m.content + eos_token + '\n' }}"
    + END
    + "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
VICUNA = (
    "{{ bos_token + 'A chat of a user and an assistant. ' }}"
    + EACH
    + (
        "{% if m.role == 'user' %}{{ 'USER: ' + m.content + ' ASSISTANT:' }}"
        "{% else %}{{ ' ' + m.content + eos_token }}{% endif %}" + END
    )
)
WITHOUT_MARKS = EACH + (
    "{{ {'user': 'User', 'assistant': 'Assistant'}[m.role] + ': ' + m.content + '\n' }}"
    + END
    + "{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)
LLAMA_3 = EACH + (
    "{% if loop.first %}{{ bos_token }}{% endif %}{{ '<|start_header_id|>' + m.role"
    " + '<|end_header_id|>\n\n' + m.content | trim + '<|eot_id|>' }}"
    + END
    + "{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
PROMPT = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
CHATML = EACH + (
    "{% if loop.first %}{{ '<|im_start|>system\nBe kind.<|im_end|>\n' }}{% endif %}"
    "{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}" + END + PROMPT
)
BETWEEN = EACH + (  # closes a reply only when more follows
    "{{ '<|im_start|>' + m.role + '\n' + m.content }}"
    "{% if not loop.last or add_generation_prompt %}{{ '<|im_end|>\n' }}{% endif %}" + END + PROMPT
)
GEMMA = (
    "{{ bos_token }}"
    + EACH
    + (
        "{{ '<start_of_turn>' + {'user': 'user', 'assistant': 'model'}[m.role] + '\n'"
        " + m.content | trim + '<end_of_turn>\n' }}"
        + END
        + "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
    )
)
PHI_3 = EACH + (
    "{{ '<|' + m.role + '|>\n' + m.content + '<|end|>\n' }}"
    + END
    + "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)

CHAT = (
    "Hello there",
    "Fine, thank you.",
    "my cat's 3 years old\nand grey",
    "I see (really)",
    "ok?",
)
MORE = ("日本語 🙂", "Ça va.", "a  b\n\n\nc", "1, 2", "[x]")


@functools.cache
def trained(kind: str) -> Tokenizer:
    if kind == "unigram":
        tokenizer = Tokenizer(models.Unigram())
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
        trainer = trainers.UnigramTrainer(
            vocab_size=500,
            initial_alphabet=LETTERS,
            special_tokens=["<unk>", "<s>", "</s>"],
            unk_token="<unk>",
        )
        decoder = decoders.Metaspace(prepend_scheme="always")
    elif kind in ("bytes", "words"):
        tokenizer = Tokenizer(models.BPE(ignore_merges=kind == "words"))
        if kind == "words":
            split = pre_tokenizers.Split(Regex(GPT4), "isolated")
            byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
            tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
        else:
            tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        trainer = trainers.BpeTrainer(
            vocab_size=600, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
        )
        decoder = decoders.ByteLevel()
    else:  # sentencepiece's BPE
        tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
        names = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256))]
        trainer = trainers.BpeTrainer(
            vocab_size=900, initial_alphabet=["▁", *LETTERS], special_tokens=names
        )
        steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
        decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)])
    # To sentencepiece a new line is a byte, or unknown.
    corpus = CORPUS if kind in ("bytes", "words") else [t.replace("\n", " ") for t in CORPUS]
    tokenizer.train_from_iterator(corpus, trainer)
    tokenizer.decoder = decoder
    kept = json.loads(tokenizer.to_str())
    kept["added_tokens"] = [t for t in kept["added_tokens"] if not t["content"].startswith("<0x")]
    tokenizer = Tokenizer.from_str(json.dumps(kept))
    if kind == "prepend":  # as the first conversions of Llama
        tokenizer.pre_tokenizer = None
        tokenizer.normalizer = normalizers.Sequence(
            [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
        )
    elif kind in ("first", "never"):
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=kind, split=False)
    return tokenizer


def make(kind: str, template: str | None, special=(), plain=(), eos="</s>", **how):
    """(ours, transformers' own); special and plain are added tokens."""
    tokenizer = Tokenizer.from_str(trained(kind).to_str())
    how = {"normalized": False, **how}
    tokenizer.add_special_tokens([AddedToken(s, **how) for s in ("<s>", eos, *special)])
    tokenizer.add_tokens([AddedToken(s, **how) for s in plain])
    theirs = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token=eos, chat_template=template
    )
    return ChatTokenizer(tokenizer_utils.TokenizerWrapper(theirs)), theirs


def whole(theirs, texts) -> list[int]:
    roles = ("user", "assistant") * len(texts)
    messages = [{"role": r, "content": t} for r, t in zip(roles, texts, strict=False)]
    return theirs.apply_chat_template(
        messages, tokenize=True, add_generation_prompt=True, return_dict=False
    )


HEADERS = ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
MARKS = ("<|im_start|>", "<|im_end|>")
TURNS = ("<start_of_turn>", "<end_of_turn>")
SENTENCEPIECE = ("prepend", "always", "first", "never", "unigram")
CASES = {
    **{
        f"{name}, {kind}": (kind, template, {})
        for kind in SENTENCEPIECE
        for name, template in {
            "Llama 2": LLAMA_2,
            "Mistral": MISTRAL,
            "Zephyr": ZEPHYR,
            "Vicuna": VICUNA,
            "no marks": WITHOUT_MARKS,
        }.items()
    },
    "Gemma": ("never", GEMMA, {"special": TURNS, "eos": "<eos>", "plain": ("▁▁", "\n\n\n")}),
    "ChatML, prepend": ("prepend", CHATML, {"plain": MARKS}),
    "ChatML, first": ("first", CHATML, {"plain": MARKS}),
    "Phi 3": (
        "prepend",
        PHI_3,
        {"special": ("<|user|>", "<|assistant|>", "<|end|>"), "rstrip": True},
    ),
    "Llama 3": ("words", LLAMA_3, {"special": HEADERS, "eos": "<|end_of_text|>"}),
    "ChatML": ("bytes", CHATML, {"special": MARKS[:1], "eos": MARKS[1]}),
    "ChatML, added": ("bytes", CHATML, {"plain": MARKS}),
    "ChatML, between": ("words", BETWEEN, {"special": MARKS[:1], "eos": MARKS[1]}),
    "ChatML, between, other eos": ("words", BETWEEN, {"special": MARKS}),
    "indented": ("bytes", CHATML, {"special": MARKS, "plain": ("  ", "    ", "\t\t")}),
}


@pytest.mark.parametrize("chat", (CHAT, MORE), ids=("chat", "more"))
@pytest.mark.parametrize("case", CASES)
def test_turn_by_turn_as_the_whole_chat(case, chat):
    kind, template, options = CASES[case]
    ours, theirs = make(kind, template, **options)
    ids = ours.turn(chat[0], first=True)
    assert ids == whole(theirs, chat[:1])
    for n in (3, 5):
        wanted = whole(theirs, chat[:n])
        tail = ours.end_ids + ours.turn(chat[n - 1], first=False)
        assert wanted[: len(ids)] == ids and wanted[-len(tail) :] == tail
        reply = wanted[len(ids) : -len(tail)]
        if kind != "unigram":  # which has no bytes for what it doesn't know
            assert theirs.decode(reply).strip() == chat[n - 2]
        ids = [*ids, *reply, *tail]
        assert ids == wanted


@pytest.mark.parametrize("case", [name for name in CASES if "no marks" not in name])
def test_a_reply_stops_at_the_templates_own_mark_which_is_there_once(case):
    kind, template, options = CASES[case]
    ours, _ = make(kind, template, **options)
    name = next(m for m in (*HEADERS, *MARKS, *TURNS, "<|end|>", "</s>") if m in ENDS[template])
    mark = ours.convert_tokens_to_ids(name)
    assert mark in ours.stop_ids and ours.end_ids.count(mark) == 1
    assert not set(ours.end_ids) & set(ours.stop_ids - {mark})


ENDS = {
    CHATML: MARKS[1:],
    BETWEEN: MARKS[1:],
    LLAMA_3: HEADERS[2:],
    GEMMA: TURNS[1:],
    PHI_3: ("<|end|>",),
    **dict.fromkeys((LLAMA_2, MISTRAL, ZEPHYR, VICUNA), ("</s>",)),
}


@pytest.mark.parametrize("case", CASES)
def test_what_is_typed_is_text(case):
    kind, template, options = CASES[case]
    ours, theirs = make(kind, template, **options)
    names = ["<unk>", *theirs.all_special_tokens, *theirs.get_added_vocab()]
    for name in names:
        if not name.replace("▁", " ").strip() or (kind == "unigram" and name == "<unk>"):
            continue
        token = theirs.convert_tokens_to_ids(name)
        for typed in (name, f"a{name}b", f"a {name} {name}"):
            assert token not in ours.encode_text(typed)
            for first in (True, False):
                plain = ours.turn("x", first)
                assert ours.turn(typed, first).count(token) == plain.count(token)
            if kind != "unigram":
                assert theirs.decode(ours.encode_text(typed)).removeprefix(" ") == typed


def test_white_space_that_is_an_added_token_stays_one():
    ours, theirs = make(*CASES["indented"][:2], **CASES["indented"][2])
    text = "if x:\n    y"
    assert theirs.convert_tokens_to_ids("    ") in ours.encode_text(text)
    assert ours.encode_text(text) == theirs.encode(text, add_special_tokens=False)


def test_a_base_model_gets_bos_where_its_tokenizer_adds_it():
    for kind in ("bytes", "first", "prepend"):
        ours, theirs = make(kind, None)
        assert ours.turn("Once upon", first=True) == theirs.encode("Once upon")
        theirs.backend_tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", theirs.bos_token_id)]
        )
        ours = ChatTokenizer(tokenizer_utils.TokenizerWrapper(theirs))
        ids = ours.turn("Once upon", first=True)
        assert ids[0] == theirs.bos_token_id and ids == theirs.encode("Once upon")
        assert theirs.bos_token_id not in ours.turn("a time", first=False)
        assert ours.end_ids == [theirs.eos_token_id]


@pytest.mark.parametrize(
    "template",
    (
        EACH + "{% if loop.last %}{{ 'Be kind. ' }}{% endif %}{{ m.content + eos_token }}" + END,
        EACH + "{{ loop.length ~ m.content + eos_token }}" + END,
        "{{ messages[-1].content }}",
    ),
)
def test_a_template_that_rewrites_the_past_is_refused(template):
    with pytest.raises(UserError, match="this model's chat template") as caught:
        make("bytes", template)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", ("bytes", "words", *SENTENCEPIECE))
def test_a_streamed_text_is_that_of_all_ids(kind, rng):
    ours, theirs = make(kind, None, special=MARKS)
    texts = ("café", "Привет мир", "日本語", "ok 🙂 👩‍👧 ok", " a list:\n  indented", "\ufffd?")
    replies = [ours.encode_text(text) for text in texts]
    replies += [ids[:-1] for ids in replies]  # cut, perhaps within a character
    replies += [rng.integers(0, len(ours), 30).tolist() for _ in range(200)]
    replies += [rng.integers(0, 260, 30).tolist() for _ in range(200)]  # of bytes
    for ids in replies:
        stream, pieces = ours.detokenizer, []
        for token in ids:
            stream.add_token(token)
            pieces.append(stream.last_segment)
        stream.finalize()
        assert "".join([*pieces, stream.last_segment]) == theirs.decode(ids)
    stream, shown = ours.detokenizer, []
    for token in ours.encode_text("one two")[:-1]:
        stream.add_token(token)
        shown.append(stream.last_segment)
    assert any(shown)  # not only at the end
