"""Retrofits in PyTorch from outside: runs, adapters, bases on disk, the example."""

from __future__ import annotations

import json
import os
import runpy
import signal
import subprocess
import sys
import zipfile
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from mlx_sleep.convert.opening import open_model
from mlx_sleep.models.load import load_model
from mlx_sleep.training.schedule import Budget, stage_at, trapezoid
from mlx_sleep.utils.errors import UserError

torch = pytest.importorskip("torch")
from safetensors.torch import save_file  # noqa: E402

from mlx_sleep.convert.torch import chat  # noqa: E402
from mlx_sleep.convert.torch.adapter import read_adapter, save_adapter  # noqa: E402
from mlx_sleep.convert.torch.base import (  # noqa: E402
    BaseConfig,
    dequantize,
    read_tokenizer,
    read_weights,
)
from mlx_sleep.convert.torch.carry import carry_over  # noqa: E402
from mlx_sleep.convert.torch.delta_rule import naive  # noqa: E402
from mlx_sleep.convert.torch.loss import LifeBatch  # noqa: E402
from mlx_sleep.convert.torch.muon import orthogonal  # noqa: E402
from mlx_sleep.convert.torch.retrofit import AdapterConfig, Retrofit  # noqa: E402
from mlx_sleep.convert.torch.trainer import Settings, Trainer  # noqa: E402
from mlx_sleep.lab.tasks.life_batches import Source  # noqa: E402
from mlx_sleep.lab.tasks.life_examples import examples  # noqa: E402
from tests.retrofits import ADAPTER, BASE, ROOT, lives, seeded, tiny, tiny_weights  # noqa: E402

assert seeded  # a fixture of every test here

# --- the schedule and the optimizer ----------------------------------------------------------


def test_the_schedule():
    assert [stage_at((1, 3), x) for x in (0.0, 0.24, 0.26, 1.0)] == [0, 0, 1, 1]
    assert Budget(tokens=10).progress(5, 99.0) == 0.5
    assert Budget(seconds=2.0).progress(5, 3.0) == 1.0
    assert trapezoid(0, 0.0, 10) == pytest.approx(0.1)
    assert trapezoid(99, 0.5, 10) == 1.0
    assert trapezoid(99, 1.0, 10) == pytest.approx(0.05)


def test_muon_steps_are_nearly_orthogonal():
    x = torch.linalg.svdvals(orthogonal(torch.randn(3, 8, 20)).float())
    assert (x > 0.6).all() and (x < 1.3).all()


# --- runs ------------------------------------------------------------------------------------


def task(jobs):
    """Batches by step and stage alone: a stage has as many windows as its number, and one."""
    for step, stage in jobs:
        yield lives(np.random.default_rng([step, stage]), windows=stage + 1)


def trainer(folder, tokens=700, batches=task, seed=3, **settings) -> Trainer:
    torch.manual_seed(seed)
    return Trainer(
        tiny(dtype=torch.float32, stirred=False),
        folder,
        batches,
        Budget(tokens=tokens),
        Settings(**{"shares": (0.5, 0.5), "warmup": 2, **settings}),
        say=lambda line: None,
    )


def losses(folder) -> list[float]:
    return [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").open()]


def test_a_run_that_is_stopped_goes_on_to_the_same_losses(tmp_path):
    trainer(tmp_path / "whole").run()

    def stopped(jobs):
        for i, arrays in enumerate(task(jobs)):
            if i == 4:
                signal.raise_signal(signal.SIGTERM)
            yield arrays

    first = trainer(tmp_path / "parts", batches=stopped)
    first.run()
    assert first.stop and 0 < first.step < 6
    with open(tmp_path / "parts" / "metrics.jsonl", "a") as file:
        file.write('{"step": 99, "loss": 0')  # a line that a crash cut short
    again = trainer(tmp_path / "parts")
    again.run(resume=True)
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")
    assert again.progress == 1
    saved = [read_adapter(tmp_path / name)[1] for name in ("whole", "parts")]
    assert all(torch.equal(x, saved[1][name]) for name, x in saved[0].items())
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_a_folder_is_one_run(tmp_path):
    with pytest.raises(UserError, match="holds no run"):
        trainer(tmp_path / "a").run(resume=True)
    trainer(tmp_path / "a", tokens=50).run()
    with pytest.raises(UserError, match="add --resume"):
        trainer(tmp_path / "a").run()
    with pytest.raises(UserError, match="other settings"):
        trainer(tmp_path / "a", muon_lr=1.0).run(resume=True)
    checkpoint = tmp_path / "a" / "checkpoint.pt"
    whole = checkpoint.read_bytes()
    with zipfile.ZipFile(checkpoint) as archive:
        record = max(archive.infolist(), key=lambda each: each.file_size)
    at = whole.index(b"\0" * 4, record.header_offset + record.file_size // 2)  # among its numbers
    checkpoint.write_bytes(whole[:at] + b"\1" + whole[at + 1 :])
    with pytest.raises(UserError, match="the checksum of .* is another"):
        trainer(tmp_path / "a").run(resume=True)
    checkpoint.write_bytes(b"PK")
    with pytest.raises(UserError, match="cannot be read"):
        trainer(tmp_path / "a").run(resume=True)


def test_what_is_not_finite_stops_the_run(tmp_path):
    run = trainer(tmp_path, adamw_lr=float("inf"))
    with pytest.raises(UserError, match="not finite at step 2"):
        run.run()
    assert not (tmp_path / "adapters.safetensors").exists()


def test_adapters_come_back(tmp_path):
    adapter = replace(ADAPTER, passes=2, window=64, fold="user", lora_rank=2)
    model = tiny(adapter, dtype=torch.float32)
    save_adapter(tmp_path, model, {"tokens": 5})
    found, state, config = read_adapter(tmp_path)
    assert found == adapter
    assert config["base"] == {"fingerprint": "f00d", "name": "tiny"}
    assert config["trained"] == {"tokens": 5}
    assert state["sleep_layers.0.mixer.conv_weight"].shape == (3 * 24, 4)
    other = tiny(found, dtype=torch.float32)
    other.load_state_dict(state)
    assert all(
        torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True)
    )
    # The shipped adapter is in 8 bits; training can go on from it.
    shipped = ROOT / "mlx_sleep" / "adapters" / "smollm2"
    found, state, _ = read_adapter(shipped)
    assert found == AdapterConfig(read_eps=0.25)
    stored = mx.load(str(shipped / "adapters.safetensors"))
    name = "sleep_layers.3.mixer.k_proj"
    parts = (stored[f"{name}.{part}"] for part in ("weight", "scales", "biases"))
    theirs = np.array(mx.dequantize(*parts, group_size=64, bits=8).astype(mx.float32))
    np.testing.assert_allclose(state[f"{name}.weight"], theirs, atol=2e-3 * abs(theirs).max())
    (tmp_path / "adapter_config.json").write_text('{"format": "peft"}')
    with pytest.raises(UserError, match="holds no mlx-sleep-adapter"):
        read_adapter(tmp_path)


# --- bases on disk ---------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_mlx_quantization_is_read(bits):
    x = mx.random.normal((5, 64))
    packed, scales, biases = mx.quantize(x, group_size=32, bits=bits)
    found = dequantize(*(torch.from_numpy(np.array(a)) for a in (packed, scales, biases)), bits)
    expected = mx.dequantize(packed, scales, biases, group_size=32, bits=bits)
    np.testing.assert_allclose(found.numpy(), np.array(expected), atol=1e-6)


def folder_of(path: Path, **changes) -> Path:
    """A tiny Llama model with a tokenizer of bytes and the marks of ChatML."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    c = replace(BASE, vocab_size=320)
    path.mkdir()
    save_file({n: x.float() for n, x in tiny_weights(c).items()}, path / "model.safetensors")
    config = {name: getattr(c, name) for name in BaseConfig.__dataclass_fields__ if name != "name"}
    config |= {"model_type": "llama", "tie_word_embeddings": True, **changes}
    (path / "config.json").write_text(json.dumps(config))
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    vocabulary = {piece: i for i, piece in enumerate([*specials, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(specials)
    tokenizer.save(str(path / "tokenizer.json"))
    return path


def test_bases_that_cannot_be_retrofitted(tmp_path):
    folder = folder_of(tmp_path / "a", tie_word_embeddings=False)
    with pytest.raises(UserError, match=r"cannot be retrofitted \(tie_word_embeddings False\)"):
        BaseConfig.from_folder(folder)
    (tmp_path / "b").mkdir()
    with pytest.raises(UserError, match="no .safetensors file"):
        read_weights(tmp_path / "b")
    (tmp_path / "a" / "model.safetensors").write_bytes(b"cut")
    with pytest.raises(UserError, match="convert the model again"):
        read_weights(folder)
    for text in (None, "{"):
        (folder / "tokenizer.json").unlink(missing_ok=True)
        if text:
            (folder / "tokenizer.json").write_text(text)
        with pytest.raises(UserError, match="tokenizer.json.* convert the model again"):
            read_tokenizer(folder)
    for before in ((), (3, 1), (1, 4)):
        with pytest.raises(UserError, match="give numbers from 0 to 3"):
            tiny(replace(ADAPTER, before=before))


def test_chat_continues_greedily_as_the_model_does(tmp_path):
    folder = folder_of(tmp_path / "a")
    chatter = chat.Chatter(folder, dtype=torch.float32)
    model = Retrofit(chatter.config, read_weights(folder), ADAPTER)
    texts = ["ab", "a longer text", "c"]  # padded on the left
    for text, (made, _) in zip(texts, chatter.continue_(texts, 12), strict=True):
        ids = chatter.tokenizer.encode(text).ids
        new: list[int] = []
        while len(new) < 12:
            with torch.no_grad():
                h = model.base_hidden(torch.tensor([ids + new]))
            new.append(int(model.logits(h[0, -1]).argmax()))
            if new[-1] == chatter.end:
                new.pop()
                break
        assert made == chatter.tokenizer.decode(new).strip()


def test_degenerate_chat_is_dropped():
    good = chat.Exchange("Hi there", "Hello, how can I help?", True)
    loop = chat.Exchange("Go on", "and so on and " * 8, True)
    empty = chat.Exchange("Well", "", True)
    assert list(chat.sound([good, loop, empty, good])) == [good]


def test_another_shape_begins_with_what_fits():
    old, more = tiny(), tiny(replace(ADAPTER, before=(0, 1, 3), lora_rank=2))
    kept = {name: x.clone() for name, x in more.state_dict().items()}
    carry_over(more, ADAPTER, old.state_dict())
    found, given = more.state_dict(), old.state_dict()
    for name, x in found.items():
        if name.startswith(("sleep_layers.1.", "sleep_layers.2.")):
            at = int(name.split(".")[1]) - 1
            assert torch.equal(x, given[f"sleep_layers.{at}." + name.split(".", 2)[2]])
        else:
            assert torch.equal(x, kept[name])
    fewer = tiny(replace(ADAPTER, before=(3,)))
    carry_over(fewer, ADAPTER, given)
    for name, x in fewer.state_dict().items():
        assert torch.equal(x, given[name.replace("sleep_layers.0", "sleep_layers.1")])
    with pytest.raises(UserError, match=r"before blocks \[1, 3\], and none before \[2\]"):
        carry_over(tiny(replace(ADAPTER, before=(2,))), ADAPTER, given)
    with pytest.raises(UserError, match="another head_dim"):
        carry_over(tiny(), replace(ADAPTER, head_dim=8), given)


# --- the example -----------------------------------------------------------------------------


def test_the_example_trains_a_retrofit(tmp_path):
    model = folder_of(tmp_path / "tiny")
    command = [sys.executable, str(ROOT / "examples" / "train_in_pytorch.py"), "retrofit", model]
    command += ["--out", tmp_path / "run", "--tokens", "3000", "--batch", "1024", "--before", "1"]

    def go(*more):
        env = {**os.environ, "OMP_NUM_THREADS": "1"}
        return subprocess.run([*command, *more], capture_output=True, text=True, env=env)

    done = go()
    assert done.returncode == 0, done.stderr
    assert "evaluation: " in done.stdout
    adapter, state, config = read_adapter(tmp_path / "run")
    assert adapter.before == (1,) and config["trained"]["tokens"] >= 3000
    assert {"values", "refusals", "zeroed"} <= config["trained"]["figures"].keys()
    assert config["base"]["weights"] == open_model(model).digest()
    load_model(open_model(model), adapter_path=tmp_path / "run")  # its own base takes it
    again = go()
    assert again.returncode == 1 and again.stderr.startswith("error: ")
    assert again.stderr.count("\n") == 1
    more = ["--out", tmp_path / "more", "--tokens", "500", "--start", tmp_path / "run"]
    done = go(*more, "--read-eps", "0.1")
    assert done.returncode == 0, done.stderr
    assert read_adapter(tmp_path / "more")[0] == replace(adapter, read_eps=0.1)


@pytest.fixture
def example(monkeypatch, capfd):
    """run(name, runs, *options): what the script examples/NAME prints, with these runs."""

    def run(name: str, runs: dict | None, *options) -> str:
        script = runpy.run_path(str(ROOT / "examples" / name))
        if runs:
            monkeypatch.setitem(script["main"].__globals__, "RUNS", runs)
        monkeypatch.setenv("OMP_NUM_THREADS", "1")
        monkeypatch.setattr(sys, "argv", [name, *map(str, options)])
        script["main"]()
        return capfd.readouterr().out

    monkeypatch.syspath_prepend(ROOT / "examples")
    return run


@pytest.mark.parametrize(
    "option",
    ["--hours 0", "--hours nan", "--batch 0", "--workers -1", "--muon-lr nan", "--two-hop 2"],
)
def test_numbers_that_the_example_refuses(option, monkeypatch):
    script = runpy.run_path(str(ROOT / "examples" / "train_in_pytorch.py"))
    budget = [] if "--hours" in option else ["--tokens", "9"]
    arguments = ["x", "retrofit", "nowhere", "--out", "out", *budget, *option.split()]
    monkeypatch.setattr(sys, "argv", arguments)
    with pytest.raises(UserError, match=f"{option.split()[0]} must be"):
        script["main"]()


def test_a_second_signal_stops_at_once(tmp_path):
    def twice(jobs):
        for i, arrays in enumerate(task(jobs)):
            for _ in range(2 if i == 2 else 0):
                signal.raise_signal(signal.SIGINT)
            yield arrays

    with pytest.raises(KeyboardInterrupt):
        trainer(tmp_path, batches=twice).run()
    assert not (tmp_path / "adapters.safetensors").exists()
    trainer(tmp_path).run(resume=True)
    assert losses(tmp_path)


def test_ablations_train_what_is_missing(tmp_path, example):
    runs = {"one layer": "--before 1", "random": "--before 1 --init random"}
    model, out = folder_of(tmp_path / "tiny"), tmp_path / "out"
    options = [model, "--out", out, "--tokens", 800, "--batch", 512, "--batches", 4, "--only"]
    said = example("ablations.py", runs, *options, "one layer")
    (first,) = json.loads((out / "ablations.json").read_text())
    assert first["tokens"] >= 800 and 0 <= first["zeroed"] <= 1
    assert first["low"] <= first["accuracy"] <= first["high"] and first["n"] > 0
    assert "evaluation: " in said and "one layer" in said
    said = example("ablations.py", runs, *options, *runs)
    again, other = json.loads((out / "ablations.json").read_text())
    assert again == first and other["options"] == runs["random"]
    assert said.count("evaluation: ") == 1  # the first was there already
    options[2] = out / "further"
    example("ablations.py", {"two": "--before 1 3"}, *options, "two", "--start", out / "one-layer")
    assert read_adapter(out / "further" / "two")[0].before == (1, 3)


def test_where_recall_is_lost(tmp_path, example):
    model, run = folder_of(tmp_path / "tiny"), tmp_path / "run"
    adapter = replace(ADAPTER, before=(1,))
    base = Retrofit(BaseConfig.from_folder(model), read_weights(model), adapter)
    save_adapter(run, base, {"tokens": 0})
    out = tmp_path / "seen.json"
    said = example("generalization.py", None, model, run, "--out", out, "--batches", 4)
    rows = json.loads(out.read_text())
    assert [(r["wordings"], r["values"]) for r in rows] == [
        *(("training's", x) for x in ("training's", "others")),
        *(("others", x) for x in ("training's", "others")),
    ]
    assert all(r["n"] > 0 for r in rows) and "wordings others, values training's" in said


def test_what_later_sleeps_cost(tmp_path, example):
    from forgetting import HISTORIES, batches, kept

    model, run, out = folder_of(tmp_path / "tiny"), tmp_path / "run", tmp_path / "forgetting.json"
    adapter = replace(ADAPTER, before=(1, 2))
    save_adapter(
        run, Retrofit(BaseConfig.from_folder(model), read_weights(model), adapter), {"tokens": 0}
    )
    options = ["--out", out, "--questions", 6, "--window-tokens", 500]
    said = example("forgetting.py", None, model, run, *options)
    found = json.loads(out.read_text())
    assert [row["what"] for row in found["recall"]] == [*HISTORIES]
    assert [layer["before"] for layer in found["layers"]] == [1, 2] and "before 2" in said
    assert HISTORIES["its own window"]([1, 2, 3, 4], 3) == [2]
    assert HISTORIES["the windows before it too"]([1, 2, 3, 4], 3) == [1, 2]
    assert HISTORIES["the windows after it too"]([1, 2, 3, 4], 3) == [2, 3, 4]

    # What is left of the first window, as the difference of two lives: with its values and without.
    one = replace(ADAPTER, before=(1,))
    base = Retrofit(BaseConfig.from_folder(model), read_weights(model), one, dtype=torch.float64)
    lives = Source(str(model / "tokenizer.json"), "test").lives()
    batch = batches(lives, examples(lives, "after_5_sleeps", 4, 500))[0]
    shares, (rows, T) = kept(base, batch), (batch["tokens"].shape[0], batch["tokens"].shape[2])
    ready, ends = LifeBatch.from_arrays(batch, "cpu"), []

    def seen(q, k, v, g, beta, S):
        inputs = [x[:, : 2 * T] for x in (q, k, v, g, beta)]
        ends.append(naive(*(x[:, :T] for x in inputs), S)[1])
        for written in (1, 0):
            values = inputs[2].clone()
            values[:, :T] *= written
            ends.append(naive(*inputs[:2], values, *inputs[3:], S)[1])
        return naive(q, k, v, g, beta, S)

    base.rule = seen
    with torch.no_grad():
        base.hidden(ready.tokens, ready.mask)
    told, both, without = (x.flatten(2) for x in ends)
    expected = ((both - without).norm(dim=-1) / told.norm(dim=-1)).mean(0)
    assert shares.shape == (1, ADAPTER.num_heads) and rows == len(told)
    np.testing.assert_allclose(shares[0], expected, rtol=1e-9)


def test_two_hops(tmp_path, example):
    from two_hops import Run, cost

    model, out = folder_of(tmp_path / "tiny"), tmp_path / "out"
    tiny_runs = {"N = 2": Run(2), "N = 1, FLOPs of N = 2": Run(1, flops=2)}
    start = tmp_path / "start"
    start.mkdir()
    adapter = replace(ADAPTER, before=(1, 2), read_eps=0.25)
    once = Retrofit(BaseConfig.from_folder(model), read_weights(model), adapter)
    save_adapter(start, once, {"tokens": 0})
    options = [model, "--start", start, "--out", out, "--tokens", 600, "--batch", 512]
    options += ["--loop-range", 1, 3, "--questions", 6]
    options += ["--window-tokens", 500]
    assert "FLOPs of N = 2" in example("two_hops.py", tiny_runs, *options)
    twice, once = json.loads((out / "two_hops.json").read_text())
    assert (twice["passes"], once["passes"]) == (2, 1)
    assert cost(2, 4, (1, 3)) == 1.5 and once["tokens"] > twice["tokens"]
    assert read_adapter(out / "N2")[0].passes == 2 and read_adapter(start)[0].passes == 1
    assert 0 < twice["n"] <= 6 and twice["n"] == once["n"]
