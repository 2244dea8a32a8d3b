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
from mlx_sleep.convert.torch.muon import orthogonal  # noqa: E402
from mlx_sleep.convert.torch.retrofit import AdapterConfig, Retrofit  # noqa: E402
from mlx_sleep.convert.torch.trainer import Settings, Trainer  # noqa: E402
from tests.retrofits import ADAPTER, BASE, ROOT, lives, tiny, tiny_weights  # noqa: E402

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
    again = go()
    assert again.returncode == 1 and again.stderr.startswith("error: ")
    assert again.stderr.count("\n") == 1
    more = ["--out", tmp_path / "more", "--tokens", "500", "--start", tmp_path / "run"]
    done = go(*more, "--read-eps", "0.1")
    assert done.returncode == 0, done.stderr
    assert read_adapter(tmp_path / "more")[0] == replace(adapter, read_eps=0.1)


def test_ablations_train_what_is_missing(tmp_path, monkeypatch, capfd):
    ablations = runpy.run_path(str(ROOT / "examples" / "ablations.py"))
    runs = {"one layer": "--before 1", "random start": "--before 1 --init random --passes 2"}
    monkeypatch.setitem(ablations["main"].__globals__, "RUNS", runs)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    model, out = folder_of(tmp_path / "tiny"), tmp_path / "out"

    def go(*names):
        options = [model, "--out", out, "--tokens", 800, "--batch", 512, "--workers", 0, "--only"]
        monkeypatch.setattr(sys, "argv", ["ablations.py", *map(str, options), *names])
        ablations["main"]()
        return json.loads((out / "ablations.json").read_text()), capfd.readouterr().out

    (first,), said = go("one layer")
    assert first["tokens"] >= 800 and 0 <= first["zeroed"] <= 1 and "step" not in first
    assert "evaluation: " in said and "one layer" in said
    (again, other), said = go(*runs)
    assert again == first and other["options"] == runs["random start"]
    assert said.count("evaluation: ") == 1  # the first was there already
    assert read_adapter(out / "random-start")[0].passes == 2
