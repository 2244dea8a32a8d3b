"""The retrofit's definition in PyTorch: the rule, the model, its losses and gradients."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from mlx_sleep.training.refusals import mark_refusals

torch = pytest.importorskip("torch")
import torch.nn.functional as F  # noqa: E402

from mlx_sleep.convert.torch.delta_rule import UnitLowerInverse, best_rule, chunked, errors, naive  # noqa: E402
from mlx_sleep.convert.torch.evaluate import evaluate, predicted, whole  # noqa: E402
from mlx_sleep.convert.torch.loss import (  # noqa: E402
    HeadCrossEntropy,
    HeadKL,
    LifeBatch,
    life_loss,
)
from mlx_sleep.convert.torch.retrofit import Retrofit, mixer_output  # noqa: E402
from mlx_sleep.convert.torch.soften import soften  # noqa: E402
from tests.retrofits import (  # noqa: E402
    ADAPTER,
    BASE,
    B,
    T,
    W,
    lives,
    seeded,
    tensors,
    tiny,
    tiny_weights,
)

assert seeded  # a fixture of every test here

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


def sleep_layer(p: dict, h, S, writes, H: int, read_eps: float, eps: float = 1e-5):
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
        o = o * (o.pow(2).mean(-1, keepdim=True) + read_eps).rsqrt() * p["mixer.o_norm.weight"]
        o = o.flatten() * 2 * torch.sigmoid(p["mixer.g_proj.weight"] @ x[t])
        outputs.append(p["mixer.o_proj.weight"] @ o)
    return h + p["gain"] * torch.stack(outputs), S


@torch.no_grad()
@pytest.mark.parametrize("read_eps", [None, 0.4])
def test_a_sleep_layer_is_its_equations(rng, read_eps):
    model, H = tiny(replace(ADAPTER, read_eps=read_eps)), ADAPTER.num_heads
    layer = model.sleep_layers[0]
    h = torch.randn(2, 2, T, BASE.hidden_size).double()
    writes = torch.from_numpy(rng.random((2, 2, T)) < 0.7)
    S = torch.randn(2, H, 6, 6).double()
    out, new = layer(h, S, writes, chunked)
    p = dict(layer.named_parameters())
    for b in range(2):
        state = S[b]
        for w in range(2):  # one S runs through both windows, the convolution starts in each
            expected, state = sleep_layer(p, h[b, w], state, writes[b, w], H, read_eps or 1e-5)
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
@pytest.mark.parametrize("loop_range", [None, (0, 4)])
def test_passes_are_algorithm_1(rng, passes, loop_range):
    """Block by block: a wake pass for what is said, then N passes over the window for S."""
    tokens, mask = tensors(lives(rng))
    model = tiny(replace(ADAPTER, passes=passes, loop_range=loop_range))
    lo, hi = loop_range or (1, BASE.num_hidden_layers)  # it begins at the first sleep layer

    def blocks(h, S, writes, first, last=BASE.num_hidden_layers):
        S = list(S)
        for i in range(first, last):
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
        h = model._frozen(embedded, 0, lo)
        for _ in range(passes):
            h, S = blocks(h, S, writes, lo, hi)
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
    random = Retrofit(BASE, weights, ADAPTER, copy=False).sleep_layers[1].mixer
    q = random.q_proj.weight.detach()
    assert q.std().item() == pytest.approx((3 * 24) ** -0.5, rel=0.2)
    correlation = torch.corrcoef(torch.stack([q, theirs["q"]]).flatten(1))
    assert abs(correlation[0, 1]) < 0.2
    assert torch.equal(random.dt_bias, mixer.dt_bias)
    wide = Retrofit(BASE, weights, replace(ADAPTER, num_heads=2, head_dim=12))
    other = wide.sleep_layers[1].mixer
    for name in ("q_proj", "k_proj", "v_proj", "o_proj"):  # as many channels in other heads
        assert torch.equal(getattr(other, name).weight, getattr(mixer, name).weight)
    assert wide.fresh(1)[0].shape == (1, 2, 12, 12)


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


@torch.no_grad()
def test_softened_reads_are_as_loud(rng):
    """By head, over the real tokens: the mean square of what o_proj reads, before the gate."""
    batch, reads = LifeBatch.from_arrays(lives(rng)), []
    model = tiny()
    mixer = model.mixers[0]  # before it, nothing changes

    def kept(o, gate, norm, o_proj, eps):
        columns = o_proj.view(len(o_proj), -1, o.shape[-1]).norm(dim=(0, 2))
        normed = o * (o.square().mean(-1, keepdim=True) + eps).rsqrt()
        reads.append(normed[batch.mask].square().mean((0, 2)).sqrt() * columns)
        return mixer_output(o, gate, norm, o_proj, eps)

    for read_eps in (0.02, 0.1):
        mixer.output = kept
        model.hidden(batch.tokens, batch.mask)
        mixer.output = mixer_output
        soften(model, read_eps, batch)
        assert mixer.eps == model.adapter.read_eps == read_eps and mixer.output is mixer_output
    torch.testing.assert_close(reads[1], reads[0], rtol=1e-3, atol=0)


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


def test_the_inverse_made_of_products_is_the_triangular_solve():
    make = torch.Generator().manual_seed(0)
    below, rows = (torch.randn(3, 16, 16, generator=make, dtype=torch.float64) for _ in range(2))
    solved = torch.linalg.solve_triangular(below, rows, upper=False, unitriangular=True)
    torch.testing.assert_close(UnitLowerInverse.apply(below) @ rows, solved)
    assert torch.autograd.gradcheck(UnitLowerInverse.apply, below[:1, :8, :8].requires_grad_())
