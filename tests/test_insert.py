"""Sleep layers put into models that have none: nothing changes at first, then they learn."""

from __future__ import annotations

import math

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
import pytest
from mlx.utils import tree_flatten, tree_map

from mlx_sleep.convert.heads import heads_of
from mlx_sleep.convert.insert import insert_into, new_layers, plan, plan_for
from mlx_sleep.convert.pipeline import convert
from mlx_sleep.memory import Memory
from mlx_sleep.models import inserted, mlx_lm_model, ouro, sleep_hybrid
from mlx_sleep.models.inserted import SleepLayer
from mlx_sleep.models.load import load_model
from mlx_sleep.session import Session
from mlx_sleep.sleep import consolidate
from mlx_sleep.training.losses import checkpointed_block, sleep_loss
from mlx_sleep.training.trainer import Trainer
from mlx_sleep.training.windows import Window, labelled
from mlx_sleep.utils.errors import UserError
from tests.fakes import fake_folder, fake_tokenizer

SIZES = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "rms_norm_eps": 1e-6,
}


def make_ouro(**changes):
    config = {"num_hidden_layers": 2, "total_ut_steps": 2, "sleep": {"window": 16}}
    return ouro.Model(ouro.ModelArgs.from_dict({**SIZES, **config, **changes}))


def make_hybrid(**changes):
    config = {"layer_types": ["attention"] * 3, "sleep": {"window": 16}}
    return sleep_hybrid.Model(sleep_hybrid.ModelArgs.from_dict({**SIZES, **config, **changes}))


def make_mlx_lm(model_type):
    config = {
        "model_type": model_type,
        "num_hidden_layers": 3,
        "tie_word_embeddings": model_type == "llama",
        "max_position_embeddings": 512,
        "rope_theta": 10_000.0,
        "sleep": {"window": 16},
    }
    return mlx_lm_model.Model(mlx_lm_model.ModelArgs.from_dict({**SIZES, **config}))


MODELS = {
    "ouro": make_ouro,
    "sleep_hybrid": make_hybrid,
    **{name: lambda name=name: make_mlx_lm(name) for name in ("llama", "qwen2", "qwen3")},
}


def tokens(rng, *shape):
    return mx.array(rng.integers(0, 61, shape))


def awake(model, x, mask):
    """Logits of a chunk, a step, and a padded chunk after it."""
    first, state = model(x)
    step, state = model(x[:, :1], state)
    return first, step, model(x, state, mask)[0]


def speak(model, scale=0.3):
    """Gives the sleep layers a voice, as training would."""
    for layer in model.sleep_layers:
        if "gain" in layer:
            layer.gain = mx.ones_like(layer.gain)
        out = layer.mixer.o_proj if "o_proj" in layer.mixer else layer.mixer.out_proj
        out.weight = scale * mx.random.normal(out.weight.shape).astype(out.weight.dtype)


# --- nothing changes at first ------------------------------------------------------------------


@pytest.mark.parametrize("kind", inserted.KINDS)
@pytest.mark.parametrize("name", MODELS)
def test_logits_stay_to_the_bit(rng, name, kind):
    model, x = MODELS[name](), tokens(rng, 2, 9)
    mask = mx.arange(9) < mx.array([[9], [5]])
    before = awake(model, x, mask)
    names = {n for n, _ in tree_flatten(model.parameters())}
    model = insert_into(model, plan(model, kind=kind, count=2))
    assert all(mx.array_equal(a, b) for a, b in zip(before, awake(model, x, mask), strict=True))
    added = {n for n, _ in tree_flatten(model.parameters())} - names
    assert names <= {n for n, _ in tree_flatten(model.parameters())}
    assert {n.split(".")[1] for n in added if n.startswith("sleep_layers.")} == {"0", "1"}
    # They sleep now, but what they remember is not heard yet; once they speak, it is.
    state, report = consolidate(model, model.init_state(), x, 2)
    assert report.moved[0] == pytest.approx(1)
    assert mx.array_equal(model(x, state)[0], before[0])
    speak(model)
    state, _ = consolidate(model, model.init_state(), x, 2)
    assert mx.abs(model(x, state)[0] - model(x)[0]).max() > 1e-3
    with pytest.raises(UserError, match="already"):
        plan(model)
    with pytest.raises(UserError, match="already"):
        insert_into(model, plan_for(32, 2))


@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float16])
@pytest.mark.parametrize("kind", inserted.KINDS)
def test_in_16_bits(rng, dtype, kind):
    """h keeps its dtype; only what the decay of S is made of stays float32."""
    model, x = make_ouro(), tokens(rng, 1, 9)
    model.update(tree_map(lambda a: a.astype(dtype), model.parameters()))
    before = model(x)[0]
    model = insert_into(model, plan(model, kind=kind, count=2))
    after, state = model(x)
    assert after.dtype == before.dtype == dtype and mx.array_equal(after, before)
    kept = {n for n, a in tree_flatten(model.parameters()) if a.dtype == mx.float32}
    assert kept and all(n.endswith(("A_log", "dt_bias")) for n in kept)
    assert all(s["fast_weights"].dtype == mx.float32 for s in state if "fast_weights" in s)


def test_into_a_quantized_model(rng):
    """Layers at the top of the model (embedding, head) are quantized under both names."""
    model, x = make_hybrid(), tokens(rng, 1, 9)
    nn.quantize(model, group_size=32, bits=4)
    before = model(x)[0]
    model = insert_into(model, plan(model, count=1))
    assert mx.array_equal(model(x)[0], before)
    later = make_mlx_lm("qwen3")
    later = insert_into(later, plan(later, count=1))
    full = later(x)[0]
    nn.quantize(later, group_size=32, bits=4, class_predicate=lambda n, m: n == "lm_head")
    assert 0 < mx.abs(later(x)[0] - full).max() < 1


def test_a_folder(tmp_path, rng):
    """Config, tokenizer and logits of a folder that `mlx-sleep convert --insert` writes."""
    source, dest = fake_folder(tmp_path / "source"), tmp_path / "dest"
    convert(source, dest, insert={"kind": "gated_deltanet", "before": [0, 2, 4]})
    old, before = load_model(source)
    model, config = load_model(dest)
    layers = config["sleep_layers"]
    assert [layer["before"] for layer in layers] == [0, 2, 4]
    assert config["model_type"] == "sleep_hybrid"
    x = tokens(rng, 1, 9)
    assert mx.array_equal(old(x)[0], model(x)[0])
    assert (dest / "tokenizer.json").read_bytes() == (source / "tokenizer.json").read_bytes()
    assert config["fingerprint"] != before["fingerprint"]
    for layer, same in zip(model.sleep_layers, new_layers(old, layers), strict=True):
        pairs = zip(tree_flatten(layer.parameters()), tree_flatten(same.parameters()), strict=True)
        assert all(a[0] == b[0] and mx.array_equal(a[1], b[1]) for a, b in pairs)
    with pytest.raises(UserError, match="already"):
        convert(dest, tmp_path / "twice", insert={})
    assert not (tmp_path / "twice").exists()


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ({"before": 0}, "list"),
        ([{"before": 0, "kind": "mamba2"}], "kind"),
        ([{"before": 4, "kind": "jet"}], "before block 0 to 3"),
        ([{"before": True, "kind": "jet"}], "before block"),
        ([{"kind": "jet"}], "before block"),
        ([{"before": 2, "kind": "jet"}, {"before": 1, "kind": "jet"}], "order"),
    ],
)
def test_wrong_descriptions(layers, message):
    with pytest.raises(UserError, match=message):
        inserted.Inserted(make_hybrid(), layers)


def test_plan():
    """Evenly spaced; the head sizes fit the model; the places are those that were asked for."""
    assert [x["before"] for x in plan_for(2048, 24)] == [2, 6, 10, 14, 18, 22]
    assert plan_for(2048, 24)[0]["num_heads"] == 16
    for width in (1, 2, 40, 576):
        (layer,) = plan_for(width, 3, count=1)
        assert layer["num_heads"] * layer["head_dim"] * layer["expand_v"] <= width
        assert SleepLayer(width, layer).mixer.o_proj.weight.shape[0] == width
    assert [x["before"] for x in plan_for(64, 3, before=[3, 0])] == [0, 3]
    for wrong in (
        {"count": 0},
        {"count": 4},
        {"before": [4]},
        {"before": [1, 1]},
        {"kind": "mamba2"},
    ):
        with pytest.raises(UserError):
            plan_for(64, 3, **wrong)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ((None, None), (9, 64)),
        ((3, None), (3, 192)),
        ((None, 32), (18, 32)),
        ((4, 144), (4, 144)),
        ((5, 8, False), (5, 8)),
        ((3, None, False), (3, 192)),
    ],
)
def test_heads_of_delta_attention(given, expected):
    assert tuple(heads_of((9, 64), *given).values()) == expected


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ((7, None), "576 channels can't be 7 heads; give a divisor of 576"),
        ((None, 50), "576 channels can't be heads of 50"),
        ((4, 64), "4 heads of 64 can't start as attention of 9 heads of 64: together they must be"),
        ((7, None, False), "give a divisor"),
    ],
)
def test_heads_that_cannot_be(given, message):
    with pytest.raises(UserError, match=message):
        heads_of((9, 64), *given)


# --- among the blocks --------------------------------------------------------------------------


def test_order_of_blocks(rng):
    """By hand: the layer before block 1, then block 1, then the two after all, in their order."""
    model = make_hybrid()
    befores = [1, 3, 3]
    own = list(model.layers)
    layers = [{**x, "before": b} for x, b in zip(plan_for(32, 3, count=3), befores, strict=True)]
    model = insert_into(model, layers)
    speak(model)
    sleep = model.sleep_layers
    modules = [own[0], sleep[0], own[1], own[2], sleep[1], sleep[2]]
    assert model.block_modules == modules and model.num_layers == 6
    x = tokens(rng, 1, 7)
    h = model.embed(x)
    for module in modules:
        h, _ = module(h, {}, None)
    assert mx.array_equal(model(x)[0], model.head(h))


@pytest.mark.parametrize(
    ("befores", "loop_range", "expected"),
    [
        ([0, 1, 2, 3], (1, 2), (2, 4)),  # block 1 and the layer before it
        ([0, 1, 2, 3], (1, 3), (2, 7)),  # up to the end: the layer after all too
        ([1, 1], (1, 2), (1, 4)),
        ([0], (2, 3), (3, 4)),
        ([0], None, None),
    ],
)
def test_loop_range(befores, loop_range, expected):
    """It counts the model's own blocks; a sleep layer is looped with the block after it."""
    model = make_hybrid(sleep={"window": 16, "loop_range": loop_range})
    layers = [{**plan_for(32, 3, count=1)[0], "before": b} for b in befores]
    assert insert_into(model, layers).sleep.loop_range == expected


def test_an_architecture_checks_itself_without_them(rng):
    """mlx-lm's untested models are compared with mlx-lm's own pass, which knows no sleep layer."""
    model = make_mlx_lm("llama")
    model._checked = False
    model = insert_into(model, plan(model, count=2))
    speak(model)
    assert len(model.init_state()) == 5 and model.host._checked
    assert model.num_layers == 5


# --- training ----------------------------------------------------------------------------------


def recall(rng):
    """A window of noise with one of four tokens in it, to be named after a sleep."""
    window, answer = rng.integers(10, 60, (4, 6)), np.arange(4)
    window[answer, rng.integers(0, 6, 4)] = answer
    asked = np.stack([np.full(4, 5), answer], axis=1)
    return [Window(mx.array(window)), labelled(asked, None, np.array([[0.0, 1.0]] * 4))]


@pytest.mark.parametrize(("name", "alone"), [("llama", True), ("ouro", False)])
def test_training(rng, name, alone):
    """The loss falls below what no memory can do: only S can tell, for the window is evicted.

    alone: everything else is frozen, the paper's first stage. Without S the four answers are
    equally likely, and the loss log 4 at best.
    """
    model = MODELS[name]()
    model = insert_into(model, plan(model, kind="gated_deltanet", count=2))
    if alone:
        model.freeze()
        for layer in model.sleep_layers:
            layer.unfreeze()
    chunks = recall(rng)
    frozen = {n: a for n, a in tree_flatten(model.parameters()) if not n.startswith("sleep_")}
    grad = nn.value_and_grad(model, sleep_loss_of(chunks))
    optimizer = optim.Adam(4e-3)
    losses = []
    while len(losses) < 80 and min(losses, default=9.0) > 0.6 * math.log(4):
        loss, grads = grad(model)
        optimizer.update(model, grads)
        mx.eval(model.parameters(), optimizer.state)
        losses.append(loss.item())
    assert losses[-1] <= 0.6 * math.log(4) < losses[0], losses
    after = dict(tree_flatten(model.parameters()))
    assert all(mx.array_equal(after[n], a) for n, a in frozen.items()) == alone


@pytest.mark.parametrize("kind", inserted.KINDS)
@pytest.mark.parametrize("name", ["ouro", "llama"])
def test_gradients_reach_every_layer(rng, name, kind):
    """Through the sleep, and the same with checkpointed passes."""
    model = MODELS[name]()
    model = insert_into(model, plan(model, kind=kind, count=2))
    speak(model)
    chunks = recall(rng)
    plain = dict(tree_flatten(nn.value_and_grad(model, sleep_loss_of(chunks))(model)[1]))
    reached = [n for n, g in plain.items() if n.startswith("sleep_layers") and mx.any(g).item()]
    # At the start a generator's taps are its bias, so nothing flows into what makes them yet.
    skipped = [n for n in plain if n.endswith("kernel_generator.w1.weight")]
    assert sorted(reached + skipped) == sorted(n for n in plain if n.startswith("sleep_layers"))
    block = checkpointed_block(model)
    saved = dict(tree_flatten(nn.value_and_grad(model, sleep_loss_of(chunks, block))(model)[1]))
    for n, g in plain.items():
        assert mx.allclose(g, saved[n], rtol=1e-3, atol=1e-5), n


def sleep_loss_of(chunks, block=None):
    return lambda model: sleep_loss(model, chunks, 2, block)[0]


def test_a_run(tmp_path, rng):
    """The trainer on a looped model with sleep layers; its checkpoint loads."""
    model = make_ouro()
    model = insert_into(model, plan(model, count=1))
    before = dict(tree_flatten(model.parameters()))
    steps = [(recall(rng), 1), (recall(rng), 2)]
    trainer = Trainer(
        model, tmp_path / "run", {}, 2, lambda step: steps[step], warmup=1, checkpoint_passes=True
    )
    row = trainer.run()
    assert row["step"] == 2 and np.isfinite(row["loss"])
    after = mx.load(str(tmp_path / "run" / "checkpoint" / "model.safetensors"))
    assert after.keys() == before.keys()
    changed = [n for n in before if not mx.array_equal(after[n], before[n])]
    assert any(n.startswith("sleep_layers.0.mixer") for n in changed)


# --- a chat ------------------------------------------------------------------------------------


def test_a_session_of_a_looped_model(tmp_path):
    """It sleeps, is saved with its loops' slots, and goes on where it was."""
    tokenizer = fake_tokenizer()
    model = make_ouro(vocab_size=360, sleep={"window": 64, "eviction": "sliding"})
    model = insert_into(model, plan(model, count=2))
    speak(model)
    mx.eval(model.parameters())

    def open_session():
        memory = Memory.open("test", "fingerprint", home=tmp_path)
        return Session(model, tokenizer, memory, passes=2, max_tokens=6)

    with open_session() as session:
        session.ask("hello there.")
        session.sleep()
        slept = session.snapshot
    with open_session() as session:
        assert len(session.snapshot) == 2 * model.num_layers
        x = mx.array([[7, 8, 9]])
        assert mx.array_equal(model(x, session.snapshot)[0], model(x, slept)[0])
        assert session.stats().kv_bytes > 0
        session.ask("and again.")


def test_a_chat_without_fast_weights_keeps_one_window_and_says_when_it_is_full(tmp_path):
    model, tokenizer = make_ouro(vocab_size=360, sleep={"window": 64}), fake_tokenizer()
    mx.eval(model.parameters())

    def open_session():
        return Session(model, tokenizer, Memory.open("test", "fingerprint", home=tmp_path))

    with open_session() as session:
        assert not session.can_sleep
        session.sampler = lambda logprobs: mx.array([9])  # a reply without an end
        session.ask("hello there.")
        full = session.pending
        assert len(full) == 64 and list(full[-1:]) == tokenizer.end_ids
        with pytest.raises(UserError, match="window of 64 tokens is full.*retrofit"):
            session.say("and again")
        with pytest.raises(UserError, match="nothing to sleep into.*mlx-sleep retrofit"):
            session.sleep()
        assert session.pending == full
    with open_session() as session:  # it closed without an error and kept the text
        assert session.pending == full and session.stats().kv_bytes > 0
    with Memory.open("test", "fingerprint", home=tmp_path) as memory:
        with pytest.raises(UserError, match="nothing to sleep into"):
            Session(model, tokenizer, memory, window=32)
    with open_session() as session:
        session.forget()
        with pytest.raises(UserError, match="is full"):  # a turn longer than the window
            session.say("word " * 20)
        assert session.pending == ()
