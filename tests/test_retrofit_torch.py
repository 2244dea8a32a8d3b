"""Retrofits in PyTorch: the definition, its fast forms, the losses, and a run that is resumed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from mlx_sleep.training.refusals import mark_refusals
from mlx_sleep.training.schedule import Budget, stage_at, trapezoid
from mlx_sleep.utils.errors import UserError

torch = pytest.importorskip("torch")
import torch.nn.functional as F  # noqa: E402
from safetensors.torch import save_file  # noqa: E402

from mlx_sleep.convert.torch import chat  # noqa: E402
from mlx_sleep.convert.torch.adapter import read_adapter, save_adapter  # noqa: E402
from mlx_sleep.convert.torch.base import (  # noqa: E402
    BaseConfig,
    dequantize,
    read_tokenizer,
    read_weights,
)
from mlx_sleep.convert.torch.delta_rule import UnitLowerInverse, best_rule, chunked, errors, naive  # noqa: E402
from mlx_sleep.convert.torch.evaluate import evaluate, predicted, whole  # noqa: E402
from mlx_sleep.convert.torch.loss import (  # noqa: E402
    HeadCrossEntropy,
    HeadKL,
    LifeBatch,
    life_loss,
)
from mlx_sleep.convert.torch.muon import orthogonal  # noqa: E402
from mlx_sleep.convert.torch.retrofit import AdapterConfig, Retrofit  # noqa: E402
from mlx_sleep.convert.torch.trainer import Settings, Trainer  # noqa: E402

ROOT = Path(__file__).parent.parent
BASE = BaseConfig(60, 24, 40, 4, 4, 2, 6, 1e4, 1e-5, "f00d", "tiny")
ADAPTER = AdapterConfig(before=(1, 3), num_heads=4, head_dim=6)
B, W, T = 3, 3, 10


@pytest.fixture(autouse=True)
def seeded(rng):
    torch.manual_seed(int(rng.integers(1 << 30)))
    torch.set_num_threads(1)


def tiny_weights(c: BaseConfig = BASE) -> dict[str, torch.Tensor]:
    D, d = c.hidden_size, c.head_dim
    shapes = {"model.embed_tokens": (c.vocab_size, D), "model.norm": (D,)}
    for i in range(c.num_hidden_layers):
        layer = f"model.layers.{i}."
        for name in ("q", "o"):
            shapes[f"{layer}self_attn.{name}_proj"] = (D, D)
        for name in ("k", "v"):
            shapes[f"{layer}self_attn.{name}_proj"] = (c.num_key_value_heads * d, D)
        for name in ("gate", "up"):
            shapes[f"{layer}mlp.{name}_proj"] = (c.intermediate_size, D)
        shapes[f"{layer}mlp.down_proj"] = (D, c.intermediate_size)
        shapes[f"{layer}input_layernorm"] = shapes[f"{layer}post_attention_layernorm"] = (D,)
    return {
        f"{name}.weight": torch.randn(shape).double() * shape[-1] ** -0.5
        if len(shape) == 2
        else 1 + 0.1 * torch.randn(shape).double()
        for name, shape in shapes.items()
    }


def tiny(
    adapter: AdapterConfig = ADAPTER, dtype=torch.float64, stirred=True, **options
) -> Retrofit:
    """A retrofit in float64. stirred: all that is trained is away from its start."""
    model = Retrofit(BASE, tiny_weights(), adapter, dtype=dtype, **{"gain": 0.3, **options})
    if stirred:
        with torch.no_grad():
            for p in model.parameters():
                p += 0.2 * torch.randn_like(p)
            for layer in model.sleep_layers:  # forget over a few tokens, so that decay matters
                layer.mixer.dt_bias.fill_(-1.5)
    return model


def lives(rng, rows: int = B, windows: int = W, width: int = T) -> dict[str, np.ndarray]:
    """Random arrays as the engine of lives makes them: padded on the right, odd lengths."""
    lengths = rng.integers(3, width + 1, (rows, windows))
    lengths[0, 0] = width
    mask = np.arange(width) < lengths[..., None]
    reply = mask & (rng.random(mask.shape) < 0.5)
    reply[0, 0, 1] = reply[-1, -1, 1] = True
    weight = np.where(reply, rng.choice([0.0, 0.1, 1.0], mask.shape), 0.0).astype(np.float32)
    weight[..., 0] = 0
    weight[0, 0, 1] = 1
    kl = rng.random((rows, windows)) < 0.2
    kl[0, 0], kl[-1, -1] = False, True
    return {
        "tokens": rng.integers(0, BASE.vocab_size, mask.shape).astype(np.int32) * mask,
        "mask": mask,
        "weight": weight,
        "value": (weight == 1) & (rng.random(mask.shape) < 0.6),
        "reply": reply,
        "kl": kl,
    }


def tensors(arrays) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.from_numpy(arrays["tokens"]).long(), torch.from_numpy(arrays["mask"])


# --- the delta rule --------------------------------------------------------------------------


@pytest.mark.parametrize("length", [1, 63, 64, 65, 130])
def test_chunked_is_naive(length):
    assert max(errors(naive, "cpu", torch.float64, length).values()) < 1e-9


def test_tokens_that_write_nothing_leave_S():
    q, k, v = (torch.randn(2, 70, 3, 5) for _ in range(3))
    g, beta = -torch.rand(2, 70, 3), torch.rand(2, 70, 3)
    g[:, 40:], beta[:, 40:] = 0, 0
    S = torch.randn(2, 3, 5, 5)
    for rule in (naive, chunked):
        _, whole_run = rule(q, k, v, g, beta, S)
        _, cut = rule(q[:, :40], k[:, :40], v[:, :40], g[:, :40], beta[:, :40], S)
        torch.testing.assert_close(whole_run, cut)


# --- the model -------------------------------------------------------------------------------


def sleep_layer(p: dict, h, S, writes, H: int, eps: float = 1e-5):
    """One sleep layer over one window of one row, from the equations: h [T, D], S [H, d, d]."""
    x = h * (h.pow(2).mean(-1, keepdim=True) + eps).rsqrt() * p["norm.weight"]
    qkv = torch.cat([x @ p[f"mixer.{n}_proj.weight"].T for n in "qkv"], -1)
    K, outputs = p["mixer.conv_weight"].shape[1], []
    for t in range(len(h)):
        conv = sum(qkv[t - i] * p["mixer.conv_weight"][:, K - 1 - i] for i in range(min(K, t + 1)))
        q, k, v = conv.view(3, H, -1)
        q, k = F.normalize(q, dim=-1, eps=1e-12), F.normalize(k, dim=-1, eps=1e-12)
        a = torch.exp(-F.softplus(p["mixer.a_proj.weight"] @ x[t] + p["mixer.dt_bias"]))
        beta = torch.sigmoid(p["mixer.b_proj.weight"] @ x[t] + p["mixer.b_proj.bias"])
        S = S.clone()
        for i in range(H):
            if writes[t]:
                old = a[i] * (S[i] - beta[i] * S[i] @ torch.outer(k[i], k[i]))
                S[i] = old + beta[i] * torch.outer(v[i], k[i])
        o = torch.stack([S[i] @ q[i] for i in range(H)])
        o = o * (o.pow(2).mean(-1, keepdim=True) + eps).rsqrt() * p["mixer.o_norm.weight"]
        o = o.flatten() * 2 * torch.sigmoid(p["mixer.g_proj.weight"] @ x[t])
        outputs.append(p["mixer.o_proj.weight"] @ o)
    return h + p["gain"] * torch.stack(outputs), S


@torch.no_grad()
def test_a_sleep_layer_is_its_equations(rng):
    model, H = tiny(), ADAPTER.num_heads
    layer = model.sleep_layers[0]
    h = torch.randn(2, 2, T, BASE.hidden_size).double()
    writes = torch.from_numpy(rng.random((2, 2, T)) < 0.7)
    S = torch.randn(2, H, 6, 6).double()
    out, new = layer(h, S, writes, chunked)
    p = dict(layer.named_parameters())
    for b in range(2):
        state = S[b]
        for w in range(2):  # one S runs through both windows, the convolution starts in each
            expected, state = sleep_layer(p, h[b, w], state, writes[b, w], H)
            torch.testing.assert_close(out[b, w], expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(new[b], state, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_windows_in_parallel_are_windows_in_turn(rng):
    tokens, mask = tensors(lives(rng))
    model = tiny()
    h, state = model.hidden(tokens, mask)
    model.rule, turn, outputs = naive, None, []
    for w in range(W):
        out, turn = model.hidden(tokens[:, w : w + 1], mask[:, w : w + 1], turn)
        outputs.append(out)
    torch.testing.assert_close(h[mask], torch.cat(outputs, 1)[mask])
    torch.testing.assert_close(state, turn)


@torch.no_grad()
@pytest.mark.parametrize("passes", [1, 2, 3])
def test_passes_are_algorithm_1(rng, passes):
    """Block by block: a wake pass for what is said, then N passes over the window for S."""
    tokens, mask = tensors(lives(rng))
    model = tiny(replace(ADAPTER, passes=passes))

    def blocks(h, S, writes, first):
        S = list(S)
        for i in range(first, BASE.num_hidden_layers):
            if i in ADAPTER.before:
                j = ADAPTER.before.index(i)
                h, S[j] = model.sleep_layers[j](h, S[j], writes, naive)
            h = model._frozen(h, i, i + 1)
        return h, S

    S, said = model.fresh(B), []
    for w in range(W):
        window, writes = tokens[:, w : w + 1], mask[:, w : w + 1]
        embedded = F.embedding(window, model.embedding)
        said.append(blocks(embedded, S, writes, 0)[0])
        h = model._frozen(embedded, 0, 1)  # the loop begins at the first sleep layer
        for _ in range(passes):
            h, S = blocks(h, S, writes, 1)
    h, state = model.hidden(tokens, mask)
    torch.testing.assert_close(h[mask], torch.cat(said, 1)[mask])
    torch.testing.assert_close(state, S)


@torch.no_grad()
def test_the_base_is_transformers(rng):
    transformers = pytest.importorskip("transformers")
    weights = {name: x.float() for name, x in tiny_weights().items()}
    config = transformers.LlamaConfig(
        vocab_size=BASE.vocab_size,
        hidden_size=BASE.hidden_size,
        intermediate_size=BASE.intermediate_size,
        num_hidden_layers=BASE.num_hidden_layers,
        num_attention_heads=BASE.num_attention_heads,
        num_key_value_heads=BASE.num_key_value_heads,
        head_dim=BASE.head_dim,
        rms_norm_eps=BASE.rms_norm_eps,
        rope_theta=BASE.rope_theta,
        tie_word_embeddings=True,
    )
    theirs = transformers.LlamaForCausalLM(config)
    theirs.load_state_dict({**weights, "lm_head.weight": weights["model.embed_tokens.weight"]})
    model = Retrofit(BASE, weights, ADAPTER, gain=0.0)
    tokens = torch.from_numpy(rng.integers(0, 60, (2, 20)))
    expected = theirs(tokens).logits
    torch.testing.assert_close(model.logits(model.base_hidden(tokens)), expected, atol=1e-4, rtol=0)
    # Without gain the sleep layers change nothing, to the bit.
    h, _ = model.hidden(tokens[:, None], torch.ones(2, 1, 20, dtype=torch.bool))
    assert torch.equal(h[:, 0], model.base_hidden(tokens))


def test_the_start_is_the_hosts_attention():
    weights = tiny_weights()
    model = Retrofit(BASE, weights, ADAPTER)
    mixer = model.sleep_layers[1].mixer
    theirs = {n: weights[f"model.layers.3.self_attn.{n}_proj.weight"].float() for n in "qkvo"}
    assert torch.equal(mixer.q_proj.weight, theirs["q"])
    assert torch.equal(mixer.o_proj.weight, theirs["o"])
    assert torch.equal(mixer.k_proj.weight[6:12], theirs["k"][:6])  # head 1 is of the first group
    assert torch.equal(mixer.v_proj.weight[12:18], theirs["v"][6:])
    half_lives = np.log(2) / F.softplus(mixer.dt_bias.detach()).numpy()
    np.testing.assert_allclose(half_lives[[0, -1]], [700, 40_000], rtol=1e-3)


@torch.no_grad()
def test_fold_user(rng):
    arrays = lives(rng)
    model = tiny(replace(ADAPTER, fold="user"))
    arrays["reply"][:] = False
    arrays["reply"][:, :, 3:] = True
    batch = LifeBatch.from_arrays(arrays, fold="user")
    _, state = model.hidden(batch.tokens, batch.mask, writes=batch.writes)
    heads = LifeBatch.from_arrays(
        {name: x[:, :, :3] if x.ndim == 3 else x for name, x in arrays.items()}
    )
    _, expected = model.hidden(heads.tokens, heads.mask)
    torch.testing.assert_close(state, expected)


def test_lora_starts_as_nothing_and_is_trained(rng):
    adapter = replace(ADAPTER, lora_rank=2)
    weights, (tokens, mask) = tiny_weights(), tensors(lives(rng))
    plain = Retrofit(BASE, weights, ADAPTER, dtype=torch.float64)
    model = Retrofit(BASE, weights, adapter, dtype=torch.float64)
    torch.testing.assert_close(model.hidden(tokens, mask)[0], plain.hidden(tokens, mask)[0])
    names = {n for n in model.state_dict() if "lora" in n}
    assert len(names) == 3 * 4 * 2  # of blocks 1 to 3
    with torch.no_grad():
        model.get_parameter("layers.2.self_attn.v_proj.lora_b").fill_(0.1)
    assert not torch.allclose(model.hidden(tokens, mask)[0], plain.hidden(tokens, mask)[0])
    torch.testing.assert_close(model.base_hidden(tokens[:, 0]), plain.base_hidden(tokens[:, 0]))


# --- losses ----------------------------------------------------------------------------------


def test_the_loss_is_its_formula(rng):
    arrays, model = lives(rng), tiny()
    loss, sums = life_loss(model, LifeBatch.from_arrays(arrays), kl_weight=0.5)
    tokens, mask = tensors(arrays)
    log_p = model.logits(model.hidden(tokens, mask)[0]).log_softmax(-1)
    total = weights = divergence = compared = 0.0
    hits = 0
    for b, w, t in np.argwhere(arrays["reply"]):
        if t == 0:
            continue
        if arrays["kl"][b, w]:
            base = model.logits(model.base_hidden(tokens[b, w][None]))[0, t - 1].log_softmax(-1)
            divergence += (base.exp() * (base - log_p[b, w, t - 1])).sum().item()
            compared += 1
        elif arrays["weight"][b, w, t]:
            weight = arrays["weight"][b, w, t] * (4 if arrays["value"][b, w, t] else 1)
            total -= weight * log_p[b, w, t - 1, tokens[b, w, t]].item()
            weights += weight
            right = log_p[b, w, t - 1].argmax() == tokens[b, w, t]
            hits += int(right and arrays["value"][b, w, t])
    assert sums["cross_entropy"].item() == pytest.approx(total / weights, rel=1e-5)
    assert sums["kl"].item() == pytest.approx(divergence / compared, rel=1e-5)
    assert loss.item() == pytest.approx(total / weights + 0.5 * divergence / compared, rel=1e-5)
    assert sums["values_right"] == hits


def test_gradients_are_finite_differences(rng):
    batch = LifeBatch.from_arrays(lives(rng))
    model = tiny(replace(ADAPTER, lora_rank=2))
    life_loss(model, batch)[0].backward()
    for name, p in model.named_parameters():
        direction = torch.randn_like(p) / p.numel() ** 0.5
        ends = []
        for sign in (1, -1):
            with torch.no_grad():
                p += sign * 1e-5 * direction
                ends.append(life_loss(model, batch)[0].item())
                p -= sign * 1e-5 * direction
        expected = (ends[0] - ends[1]) / 2e-5
        found = (p.grad * direction).sum().item()
        assert found == pytest.approx(expected, rel=1e-3, abs=1e-6), name


def test_gradients_through_two_passes(rng):
    batch = LifeBatch.from_arrays(lives(rng))
    model = tiny()
    loss, _ = life_loss(model, batch, passes=2)
    p = model.sleep_layers[1].mixer.k_proj.weight
    (grad,) = torch.autograd.grad(loss, p)
    direction = torch.randn_like(p)
    ends = []
    for sign in (1, -1):
        with torch.no_grad():
            p += sign * 1e-5 * direction
            ends.append(life_loss(model, batch, passes=2)[0].item())
            p -= sign * 1e-5 * direction
    assert (grad * direction).sum().item() == pytest.approx((ends[0] - ends[1]) / 2e-5, rel=1e-3)


def test_gradients_of_the_heads():
    h = torch.randn(5, 7).double().requires_grad_()
    head, base = torch.randn(11, 7).double(), torch.randn(5, 7).double()
    targets, weights = torch.randint(11, (5,)), torch.rand(5).double()
    assert torch.autograd.gradcheck(
        lambda h: HeadCrossEntropy.apply(h, head, targets, weights)[0], (h,)
    )
    assert torch.autograd.gradcheck(lambda h: HeadKL.apply(h, base, head), (h,))


def test_refusals_are_marked(rng):
    arrays = lives(rng)
    arrays["tokens"][1, 1, 2:5] = arrays["tokens"][2, 0, 1:4] = [8, 9, 8]
    arrays["weight"][:] = 0
    arrays["weight"][1, 1, 2:6] = 1
    marks = mark_refusals(arrays, [8, 9, 8])
    assert np.argwhere(marks).tolist() == [[1, 1, 2], [1, 1, 3], [1, 1, 4]]


# --- evaluation ------------------------------------------------------------------------------


def test_whole_values():
    marks = np.array([[1, 1, 0, 1, 0, 0, 1, 1]], bool)
    hits = np.array([[1, 1, 0, 0, 1, 1, 0, 1]], bool)
    assert whole(hits, marks).tolist() == [True, False, False]


def test_evaluation(rng):
    model, arrays = tiny(dtype=torch.float32), lives(rng)
    arrays["kl"][:] = False
    tokens, mask = tensors(arrays)
    best = model.logits(model.hidden(tokens, mask)[0]).argmax(-1).numpy()
    hits = predicted(model, arrays)
    b, w, t = np.nonzero(arrays["weight"] > 0)
    assert np.array_equal(hits[b, w, t], best[b, w, t - 1] == arrays["tokens"][b, w, t])
    figures = evaluate(model, [arrays, arrays])
    assert figures["values"] == pytest.approx(hits[arrays["value"]].mean())
    alone = model.logits(model.hidden(tokens.view(-1, 1, T), mask.view(-1, 1, T))[0]).argmax(-1)
    alone = alone.view(B, W, T).numpy()
    b, w, t = np.nonzero(arrays["value"])
    expected = (alone[b, w, t - 1] == arrays["tokens"][b, w, t]).mean()
    assert figures["zeroed"] == pytest.approx(expected)


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
    (tmp_path / "a" / "checkpoint.pt").write_bytes(b"PK")
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
    (tmp_path / "adapter_config.json").write_text('{"format": "peft"}')
    with pytest.raises(UserError, match="holds no mlx-sleep-adapter"):
        read_adapter(tmp_path)


# --- CUDA ------------------------------------------------------------------------------------

cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")


@cuda
def test_the_rule_that_cuda_gets_is_right():
    assert max(errors(best_rule("cuda"), "cuda", T=1000).values()) < 0.02


@cuda
def test_compiled_gradients_are_eager_ones(rng, device="cuda"):
    model = tiny(dtype=torch.float32, device=device)
    eager = model.project, model.finish, model.mixers[0].inputs, model.mixers[0].output
    model.compile()
    compiled = model.project, model.finish, model.mixers[0].inputs, model.mixers[0].output
    for shape in ((3, 3, 16), (4, 2, 32), (2, 4, 48)):
        batch, grads = LifeBatch.from_arrays(lives(rng, *shape), device), []
        for model.project, model.finish, *parts in (eager, compiled):
            for mixer in model.mixers:
                mixer.inputs, mixer.output = parts
            loss, _ = life_loss(model, batch)
            grads.append(torch.autograd.grad(loss, list(model.parameters())))
        for a, b in zip(*grads, strict=True):
            assert (a - b).norm() < 1e-3 * a.norm()


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


def test_the_inverse_made_of_products_is_the_triangular_solve():
    make = torch.Generator().manual_seed(0)
    below, rows = (torch.randn(3, 16, 16, generator=make, dtype=torch.float64) for _ in range(2))
    solved = torch.linalg.solve_triangular(below, rows, upper=False, unitriangular=True)
    torch.testing.assert_close(UnitLowerInverse.apply(below) @ rows, solved)
    assert torch.autograd.gradcheck(UnitLowerInverse.apply, below[:1, :8, :8].requires_grad_())
