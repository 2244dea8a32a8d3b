"""Retrofits in MLX: windows in parallel, the loss, runs that stop and go on."""

from __future__ import annotations

import json
import os
import signal
from functools import cache
from importlib.resources import files

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast
from typer.testing import CliRunner

from mlx_sleep.cli import app
from mlx_sleep.convert.insert import new_layers, plan
from mlx_sleep.models.load import build, fingerprint, fuse, load, load_model, save
from mlx_sleep.session import Session
from mlx_sleep.sleep import consolidate
from mlx_sleep.training.lives import LifeBatch, base_hidden, life_batch, life_hidden, life_loss
from mlx_sleep.training.retrofit import Retrofit, prepare
from mlx_sleep.training.schedule import Budget
from mlx_sleep.utils.errors import UserError
from tests.test_adapter import CONFIG, base_folder
from tests.test_thoughts import NONE, TEMPLATES

B, W, T = 2, 3, 16
SLEEP = {"passes": 1, "window": 64, "eviction": "hard"}


def model_of(model_type="llama", passes=1, gain=0.5, lora_rank=0, fold="all"):
    mx.random.seed(3)
    config = {**CONFIG, "model_type": model_type, "vocab_size": 50}
    config["sleep"] = {**SLEEP, "passes": passes, "loop_range": [1, 3]}
    host = build(config)
    layers = plan(host, kind="delta_attention", before=[1, 2])
    return prepare(host, layers, new_layers(host, layers), gain=gain, lora_rank=lora_rank)


def lives(rng, rows=B, windows=W, width=T):
    """Random arrays as the engine of lives makes them: padded on the right, odd lengths."""
    lengths = rng.integers(4, width + 1, (rows, windows))
    mask = np.arange(width) < lengths[..., None]
    reply = mask & (rng.random(mask.shape) < 0.5)
    weight = np.where(reply, rng.choice([0.0, 0.1, 1.0], mask.shape), 0.0).astype(np.float32)
    weight[..., 0] = 0
    weight[0, 0, 1] = 1
    kl = np.zeros((rows, windows), bool)
    kl[-1, -1] = True
    reply[-1, -1, 1] = True
    return {
        "tokens": np.where(mask, rng.integers(3, 50, mask.shape), 0).astype(np.int32),
        "mask": mask,
        "weight": weight,
        "value": (weight == 1) & (rng.random(mask.shape) < 0.8),
        "reply": reply,
        "kl": kl,
    }


@pytest.mark.parametrize("model_type", ["llama", "qwen3"])
@pytest.mark.parametrize("passes", [1, 2])
def test_windows_are_those_of_a_sleeping_model(rng, model_type, passes):
    """h of every real token equals that of `consolidate` after each window, one life at a time."""
    model, arrays = model_of(model_type, passes), lives(rng)
    h = life_hidden(model, mx.array(arrays["tokens"]), mx.array(arrays["mask"]), passes)
    for b in range(B):
        state = model.init_state()
        for w in range(W):
            tokens = mx.array(arrays["tokens"][b, w][arrays["mask"][b, w]])[None]
            wanted, _ = model.hidden(tokens, state)
            np.testing.assert_allclose(h[b, w, : tokens.size], wanted[0], atol=2e-4)
            state, _ = consolidate(model, state, tokens, passes)


def test_replies_that_write_nothing(rng):
    """In parallel and window by window alike."""
    model, arrays = model_of(), lives(rng)
    batch = life_batch(arrays, fold="user")
    assert not (np.array(batch.write) & arrays["reply"]).any()
    h = life_hidden(model, batch.tokens, batch.write)
    state = model.init_state(B)
    for w in range(W):
        _, state = model.hidden(batch.tokens[:, w], state, write=batch.write[:, w])
        state = [{k: x for k, x in s.items() if k == "fast_weights"} for s in state]
    last, _ = model.hidden(batch.tokens[:, 0], state, write=batch.write[:, 0])
    again = mx.concatenate([batch.tokens, batch.tokens[:, :1]], axis=1)
    write = mx.concatenate([batch.write, batch.write[:, :1]], axis=1)
    np.testing.assert_allclose(life_hidden(model, again, write)[:, -1], last, atol=2e-4)
    assert mx.allclose(h[:, 0], life_hidden(model, again, write)[:, 0], atol=1e-5)


@pytest.mark.parametrize("passes", [1, 2])
def test_the_loss_by_hand(rng, passes):
    """Cross-entropy by its weights, values four times; KL in nats; and both have a gradient."""
    model, arrays = model_of(passes=passes), lives(rng)
    batch = life_batch(arrays)
    base = base_hidden(model, batch)
    loss, hits, kl = life_loss(model, batch, base, passes)
    h = life_hidden(model, batch.tokens, batch.write, passes)
    logits = np.array(model.head(h)).astype(float)
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    total = count = right = 0.0
    for b, w, t in np.argwhere(arrays["weight"] > 0):
        if arrays["kl"][b, w]:
            continue
        weight = arrays["weight"][b, w, t] * (4 if arrays["value"][b, w, t] else 1)
        token = arrays["tokens"][b, w, t]
        total, count = total - weight * log_p[b, w, t - 1, token], count + weight
        right += arrays["value"][b, w, t] and logits[b, w, t - 1].argmax() == token
    tokens = mx.array(arrays["tokens"][-1:, -1])
    theirs = np.array(model.host(tokens)[0][0]).astype(float)
    log_base = theirs - np.log(np.exp(theirs).sum(-1, keepdims=True))
    rows = [t - 1 for t in np.flatnonzero(arrays["reply"][-1, -1]) if t]
    divergence = [(np.exp(log_base[t]) * (log_base[t] - log_p[-1, -1, t])).sum() for t in rows]
    assert kl.item() == pytest.approx(np.mean(divergence), rel=1e-3)
    assert loss.item() == pytest.approx(total / count + np.mean(divergence), rel=1e-3)
    assert hits.item() == right


def test_gradients_by_finite_differences(rng):
    model, batch = model_of(), life_batch(lives(rng))
    base = base_hidden(model, batch)

    _, grads = nn.value_and_grad(model, life_loss)(model, batch, base)
    grads = dict(tree_flatten(grads))
    assert all(name.startswith("sleep_layers.") for name in grads)
    parameters = dict(tree_flatten(model.trainable_parameters()))
    for name in ("sleep_layers.0.mixer.v_proj.weight", "sleep_layers.1.mixer.conv_weight"):
        direction = grads[name] / mx.linalg.norm(grads[name])
        losses = []
        for sign in (1, -1):
            model.load_weights([(name, parameters[name] + sign * 1e-3 * direction)], strict=False)
            losses.append(life_loss(model, batch, base)[0].item())
        model.load_weights([(name, parameters[name])], strict=False)
        slope = (losses[0] - losses[1]) / 2e-3
        assert slope == pytest.approx(mx.linalg.norm(grads[name]).item(), rel=0.05)


def trainer_of(folder, tokens, rank=0, passes=1, data_seed=0, **options):
    def batches(jobs):
        for step, _ in jobs:
            yield lives(np.random.default_rng(data_seed + step))

    config = {"sleep_layers": [], "sleep": SLEEP, "lora_rank": rank, "base": {"fingerprint": "x"}}
    model = model_of(gain=0.05, lora_rank=rank, passes=passes)
    unseen = [lives(np.random.default_rng(99))]
    return Retrofit(model, folder, batches, Budget(tokens=tokens), config, unseen=unseen, **options)


def rows_of(folder):
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [(row["step"], row["loss"]) for row in rows if "loss" in row]


@pytest.mark.parametrize("rank", [0, 2])
def test_a_run_goes_on_to_the_same_losses(tmp_path, rank):
    """Only what is added moves; a run stopped by a signal and gone on with sees what a whole one
    does."""
    whole = trainer_of(tmp_path / "whole", 400, rank)
    before = {n: mx.array(x) for n, x in tree_flatten(whole.model.parameters())}
    whole.run()
    after = dict(tree_flatten(whole.model.parameters()))
    moved = {n for n in before if not mx.array_equal(before[n], after[n])}
    frozen = {n for n in before if not n.startswith("sleep_layers") and "lora" not in n}
    assert moved and not moved & frozen and (rank == 0) == (not any("lora" in n for n in moved))
    cut = trainer_of(tmp_path / "cut", 400, rank)
    cut.run(on_row=lambda row: os.kill(os.getpid(), signal.SIGTERM) if row["step"] == 2 else None)
    assert cut.stopped and rows_of(tmp_path / "cut") == rows_of(tmp_path / "whole")[:2]
    resumed = trainer_of(tmp_path / "cut", 400, rank)
    resumed.run(resume=True)
    assert rows_of(tmp_path / "cut") == rows_of(tmp_path / "whole") and resumed.step > 3
    assert {"recall", "zeroed"} <= resumed.figures.keys()
    with pytest.raises(UserError, match="holds a run already"):
        trainer_of(tmp_path / "cut", 400, rank).run()
    with pytest.raises(UserError, match="other settings"):
        trainer_of(tmp_path / "cut", 400, rank, muon_lr=1.0).run(resume=True)
    with pytest.raises(UserError, match="holds no run"):
        trainer_of(tmp_path / "none", 400, rank).run(resume=True)


def test_it_learns(tmp_path):
    """One batch again and again: the loss halves."""
    trainer = trainer_of(tmp_path / "run", 3000, passes=2, warmup=2)
    same = lives(np.random.default_rng(0))
    trainer.batches = lambda jobs: (same for _ in jobs)
    trainer.run()
    losses = [loss for _, loss in rows_of(tmp_path / "run")]
    assert losses[-1] < 0.6 * losses[0]


def test_what_is_not_finite_stops_it(tmp_path):
    trainer = trainer_of(tmp_path / "run", 4000)
    trainer.every = 0.0  # a checkpoint after each step

    def spoil(row):
        if row["step"] == 2 and "loss" in row:
            trainer.model.sleep_layers[0].gain = mx.full((64,), float("nan"))

    with pytest.raises(UserError, match="not finite at step 3"):
        trainer.run(on_row=spoil)
    kept = mx.load(str(tmp_path / "run" / "checkpoint" / "model.safetensors"))
    assert "sleep_layers.0.gain" in kept


def test_a_full_disk_is_one_line(tmp_path, monkeypatch):
    trainer = trainer_of(tmp_path / "run", 4000)
    trainer.run(on_row=lambda row: trainer._interrupted())
    first = (tmp_path / "run" / "checkpoint" / "progress.json").read_text()

    def full(*_):
        raise RuntimeError("[write] Unable to write 9 bytes to file")

    monkeypatch.setattr(mx, "save_safetensors", full)
    again = trainer_of(tmp_path / "run", 4000)
    with pytest.raises(UserError, match="free some space there, and --resume goes on"):
        again.run(resume=True, on_row=lambda row: again._interrupted())
    assert (tmp_path / "run" / "checkpoint" / "progress.json").read_text() == first


def test_a_second_signal_stops_at_once(tmp_path):
    """The first one is told; the checkpoint before them goes on."""
    trainer, said = trainer_of(tmp_path / "run", 4000), []
    trainer.every = 0.0  # a checkpoint after each step

    def twice(row):
        if row["step"] == 2 and "loss" in row:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        trainer.run(on_row=twice, on_stop=lambda: said.append(trainer.step))
    assert said == [2] and not (tmp_path / "run" / "adapters.safetensors").exists()
    again = trainer_of(tmp_path / "run", 4000)
    again.run(resume=True, on_row=lambda row: again._interrupted())
    assert again.step == 2


@pytest.mark.parametrize(
    ("name", "what"), [("config.json", "a model"), ("adapter_config.json", "an adapter")]
)
def test_nothing_is_written_over(tmp_path, name, what):
    (tmp_path / name).write_text("{}")
    with pytest.raises(UserError, match=f"holds {what}; choose another --out"):
        trainer_of(tmp_path, 4000).run()
    assert os.listdir(tmp_path) == [name]


def test_its_adapter_loads(tmp_path):
    base = base_folder(tmp_path / "base", 0)
    host, _ = load_model(base)
    layers = plan(host, kind="delta_attention", before=[1])
    model = prepare(host, layers, new_layers(host, layers))
    config = {"sleep_layers": layers, "sleep": SLEEP, "base": {"fingerprint": fingerprint(base)}}
    trainer = Retrofit(
        model,
        tmp_path / "run",
        lambda jobs: (lives(np.random.default_rng(step)) for step, _ in jobs),
        Budget(tokens=100),
        config,
    )
    trainer.run()
    loaded, _ = load_model(base, adapter_path=tmp_path / "run")
    x = mx.array([[5, 6, 7]])
    np.testing.assert_allclose(loaded(x)[0], model(x)[0], atol=0.05)


def test_a_batch_is_a_tuple_of_arrays(rng):
    assert LifeBatch._fields[-1] == "real" and life_batch(lives(rng)).real > 0


# --- the command line --------------------------------------------------------------------------


CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@cache
def chatml_tokenizer() -> Tokenizer:
    """One that knows the words of lives, the two marks of ChatML and those of a thought."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    folder = files("mlx_sleep.lab.tasks") / "language"
    texts = [file.read_text()[:20_000] for file in folder.iterdir() if file.name.endswith(".txt")]
    trainer = trainers.BpeTrainer(
        vocab_size=1000,
        special_tokens=["<|im_end|>", "<|im_start|>", "<think>", "</think>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def chat_folder(path, model_type, template=CHATML, config=CONFIG):
    """A random model with a tokenizer that knows the words of lives."""
    source = path.with_name(f"{path.name}-tokenizer")
    PreTrainedTokenizerFast(
        tokenizer_object=chatml_tokenizer(), eos_token="<|im_end|>", chat_template=template
    ).save_pretrained(source)
    config = {**config, "model_type": model_type, "vocab_size": 1000, "eos_token_id": 0}
    mx.random.seed(0)
    save(path, build(config), config, tokenizer_source=source)
    return path


def invoke(*arguments):
    return CliRunner().invoke(app, ["retrofit", *map(str, arguments)])


@pytest.mark.parametrize("model_type", ["llama", "qwen3"])
def test_from_a_model_to_a_chat(tmp_path, model_type):
    """Three steps, an adapter that loads and remembers, and a run that goes on. One template
    thinks, unless it is told not to."""
    template = CHATML if model_type == "llama" else TEMPLATES["opens"]
    model, out = chat_folder(tmp_path / "model", model_type, template), tmp_path / "adapter"
    options = [model, "--out", out, "--before", "1,2", "--batch", 512, "--ordinary", 2]
    if model_type == "qwen3":
        options += ["--passes", 2, "--loop-range", "1,3", "--heads", 2]
    done = invoke(*options, "--tokens", 1000)
    assert done.exit_code == 0, (done.output, done.exception)
    assert "of 2 ordinary chats came to an end" in done.output
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert rows[0]["step"] == 1 and {"recall", "zeroed"} <= rows[-1].keys()
    with Session.open(model, adapter=out, max_tokens=4) as session:
        assert (session.model.sleep.passes == 2) == (model_type == "qwen3")
        heads = {layer.mixer.H for layer in session.model.sleep_layers}
        assert heads == ({2} if model_type == "qwen3" else {4})
        thinks_off = session.tokenizer.with_thinking("auto").trained == "off"
        assert thinks_off == (model_type == "qwen3")
        asked = session.tokenizer.turn("What is my dog called?", first=True)
        assert session.tokenizer.decode(asked).endswith(NONE) == thinks_off
        session.tell("My dog is called Rex.")
        assert session.sleep().tokens > 0
    fuse(model, out, tmp_path / "fused")
    assert load(tmp_path / "fused")[1].trained == ("off" if model_type == "qwen3" else "auto")
    again = invoke(*options, "--tokens", 1000)
    assert isinstance(again.exception, UserError) and "--resume" in str(again.exception)
    more = invoke(*options, "--tokens", 2000, "--resume")
    assert more.exit_code == 0, more.exception
    assert len((out / "metrics.jsonl").read_text().splitlines()) > len(rows)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--hours or --tokens"),
        (["--hours", 1, "--tokens", 9], "--hours or --tokens"),
        (["--hours", 0], "--hours must be above 0"),
        (["--tokens", 9, "--before", "9"], "before block 0 to 3"),
        (["--tokens", 9, "--before", "1,1"], "one sleep layer goes before block 1"),
        (["--tokens", 9, "--init", "warm"], "host or random"),
        (["--tokens", 9, "--heads", 3], "give a divisor of 64"),
        (["--tokens", 9, "--heads", 2, "--head-dim", 8], "--init random"),
        (["--tokens", 9, "--loop-range", "2,3"], "LO at most 1"),
        (["--tokens", 9, "--fold", "some"], "fold must be"),
        (["--tokens", 9, "--lora-rank", 65], "at most 64"),
        (["--tokens", 9, "--heads", 2**30, "--head-dim", 1, "--init", "random"], "channels"),
        (["--tokens", 9, "--resume"], "holds no run"),
        (["--tokens", 9, "--out", ""], "--out is empty"),
    ],
)
def test_wrong_options(tmp_path, shared_model, arguments, message):
    result = invoke(shared_model, "--out", tmp_path / "out", "--before", "1", *arguments)
    assert isinstance(result.exception, UserError) and message in str(result.exception)
    assert not (tmp_path / "out").exists()


@pytest.fixture(scope="module")
def shared_model(tmp_path_factory):
    return chat_folder(tmp_path_factory.mktemp("shared") / "model", "llama")


def test_models_that_cannot_be_trained(tmp_path, shared_model):
    """No template, no model: one line."""
    bare = chat_folder(tmp_path / "bare", "llama", template=None)
    for folder, message in (
        (bare, "has no chat template; take one"),
        (tmp_path / "x", "no model"),
    ):
        result = invoke(folder, "--out", tmp_path / "out", "--tokens", 9, "--layers", 1)
        assert isinstance(result.exception, UserError), (folder, result.exception)
        assert message in str(result.exception)
