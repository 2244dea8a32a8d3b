"""Adapters: saved, loaded into their base and no other, fused; replies that are not folded."""

from __future__ import annotations

import json
import shutil

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten
from typer.testing import CliRunner

from mlx_sleep.cli import app
from mlx_sleep.convert.insert import insert_into, plan
from mlx_sleep.memory import Memory
from mlx_sleep.models.adapter import WEIGHTS, open_adapter, save_adapter
from mlx_sleep.models.layers import dense
from mlx_sleep.models.load import build, fingerprint, fuse, generation_of, load, load_model, save
from mlx_sleep.models.weights import weights_digest
from mlx_sleep.session import Session
from mlx_sleep.sleep import consolidate
from mlx_sleep.utils.errors import UserError
from tests.fakes import fake_tokenizer, hf_tokenizer

CONFIG = {
    "model_type": "llama",
    "vocab_size": 360,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10_000.0,
    "max_position_embeddings": 512,
    "tie_word_embeddings": True,
    "eos_token_id": 1,
    "sleep": {"window": 96},
}
TOKENS = mx.array([[5, 6, 7, 8, 9, 10, 11]])


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return base_folder(tmp_path_factory.mktemp("base") / "model", 0)


def base_folder(path, seed):
    mx.random.seed(seed)
    source = path.with_name("tokenizer")
    hf_tokenizer().save_pretrained(source)
    save(path, build(CONFIG), CONFIG, tokenizer_source=source)
    return path


def adapter_folder(
    path, base, *, bits=None, lora=(), fold="all", change=lambda weights: None, layer=None, **sleep
):
    """A loud adapter of two layers, and low-rank changes of those projections of block 1."""
    mx.random.seed(1)
    host, _ = load_model(base)
    layers = [{**x, **(layer or {})} for x in plan(host, kind="delta_attention", before=[1, 2])]
    model = insert_into(host, layers)
    weights = {n: x for n, x in tree_flatten(model.parameters()) if n.startswith("sleep_layers")}
    for name, x in weights.items():
        if name.endswith(("gain", "g_proj.weight")):
            weights[name] = 0.5 * mx.random.normal(x.shape)
    for name in lora:
        out, inputs = dense(host.layers[1].self_attn[name]).shape
        weights[f"layers.1.self_attn.{name}.lora_a"] = 0.1 * mx.random.normal((2, inputs))
        weights[f"layers.1.self_attn.{name}.lora_b"] = 0.1 * mx.random.normal((out, 2))
    change(weights)
    config = {
        "sleep_layers": layers,
        "sleep": {"passes": 1, "window": 64, "eviction": "hard", "fold": fold, **sleep},
        "generation": {"do_sample": False},
        "lora_rank": 2 if lora else 0,
        "base": {"weights": weights_digest(base), "name": "tiny"},
    }
    save_adapter(path, weights, config, bits=bits)
    return path, model, weights


def logits_after_sleep(model):
    state, _ = consolidate(model, model.init_state(), TOKENS, 2)
    return model(TOKENS, state)[0]


@pytest.mark.parametrize("bits", [None, 8])
def test_it_computes_what_was_saved(tmp_path, base, bits):
    path, model, _ = adapter_folder(tmp_path / "adapter", base, bits=bits)
    before = mx.load(str(path / WEIGHTS))
    model.load_weights(
        [(n, before[n]) for n in before if n.endswith("gain") and bits is None], strict=False
    )
    loaded, config = load_model(base, adapter_path=path)
    assert config["sleep"] == {
        "passes": 1, "window": 64, "eviction": "hard", "fold": "all", "loop_range": [1, 3]
    }  # fmt: skip
    assert loaded.sleep.loop_range == (1, 5)
    stored = dict(tree_flatten(loaded.parameters()))
    assert ("sleep_layers.0.mixer.q_proj.scales" in stored) == (bits == 8)
    for name, x in before.items():
        assert mx.array_equal(stored[name], x), name
    plain, _ = load_model(base)
    assert mx.abs(loaded(TOKENS)[0] - plain(TOKENS)[0]).max() > 1e-2
    assert mx.abs(logits_after_sleep(loaded) - loaded(TOKENS)[0]).max() > 1e-2
    if bits:
        _, whole, _ = adapter_folder(tmp_path / "whole", base)
        exact, _ = load_model(base, adapter_path=tmp_path / "whole")
        error = mx.abs(logits_after_sleep(loaded) - logits_after_sleep(exact)).max()
        assert 0 < error < 0.05 * mx.abs(logits_after_sleep(exact)).max()


@pytest.mark.parametrize("bits", [None, 8])
@pytest.mark.parametrize("lora", [(), ("q_proj", "o_proj")])
def test_fused(tmp_path, base, bits, lora):
    """One folder that computes the same, with its tokenizer."""
    path, _, _ = adapter_folder(tmp_path / "adapter", base, bits=bits, lora=lora)
    fuse(base, path, tmp_path / "fused")
    apart, _ = load_model(base, adapter_path=path)
    fused, config = load_model(tmp_path / "fused")
    assert mx.allclose(logits_after_sleep(apart), logits_after_sleep(fused), atol=1e-4)
    assert config["sleep_layers"] and (tmp_path / "fused" / "tokenizer.json").is_file()
    assert generation_of(tmp_path / "fused").do_sample is False
    with pytest.raises(UserError, match="exists already"):
        fuse(base, path, tmp_path / "fused")


def test_low_rank_changes(tmp_path, base):
    """W + BA in the host's attention, whose own weights stay."""
    path, _, weights = adapter_folder(tmp_path / "adapter", base, lora=("v_proj",))
    model, _ = load_model(base, adapter_path=path)
    host, _ = load_model(base)
    attention = model.block_modules[2].self_attn
    a, b = (weights[f"layers.1.self_attn.v_proj.lora_{part}"] for part in "ab")
    x = mx.random.normal((1, 3, 64))
    wanted = x @ (host.layers[1].self_attn.v_proj.weight + b @ a).T
    assert mx.allclose(attention.v_proj(x), wanted, atol=1e-5)
    assert mx.array_equal(attention.v_proj.weight, host.layers[1].self_attn.v_proj.weight)
    assert "lora_a" not in attention.q_proj


def test_into_a_quantized_base(tmp_path, base):
    """In one of 4 bits: each matrix keeps its own bits, fused too; `load` makes all dense."""
    from mlx_sleep.convert.pipeline import convert
    from mlx_sleep.convert.quantize import NumberTypes

    convert(base, tmp_path / "q4", NumberTypes(bits=4, group_size=32))
    path, _, _ = adapter_folder(tmp_path / "adapter", tmp_path / "q4", bits=8, lora=("k_proj",))
    model, _ = load_model(tmp_path / "q4", adapter_path=path)
    assert model.sleep_layers[0].mixer.q_proj.bits == 8
    assert model.block_modules[0].self_attn.q_proj.bits == 4
    fuse(tmp_path / "q4", path, tmp_path / "fused")
    dense, _, _ = load(tmp_path / "fused")
    assert "scales" not in dense.block_modules[0].self_attn.q_proj
    np.testing.assert_allclose(
        logits_after_sleep(dense), logits_after_sleep(model), atol=2e-3, rtol=2e-3
    )


def test_another_base_is_refused(tmp_path, base):
    path, _, _ = adapter_folder(tmp_path / "adapter", base)
    other = base_folder(tmp_path / "other", 7)
    with pytest.raises(UserError, match="was trained in tiny, and .*other is another model"):
        load_model(other, adapter_path=path)


def corrupt(**changes):
    def change(folder):
        config = json.loads((folder / "adapter_config.json").read_text())
        config.update(changes)
        (folder / "adapter_config.json").write_text(json.dumps(config))

    return change


def rewrite(change):
    def run(folder):
        weights = mx.load(str(folder / WEIGHTS))
        mx.eval(weights)
        change(weights)
        mx.save_safetensors(str(folder / WEIGHTS), weights)

    return run


def set_nan(weights):
    weights["sleep_layers.1.gain"] = mx.full((64,), float("nan"))


def wrong_shape(weights):
    weights["sleep_layers.0.gain"] = mx.zeros((63,))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (shutil.rmtree, "no adapter at"),
        (lambda f: (f / WEIGHTS).unlink(), "has no adapters.safetensors"),
        (lambda f: (f / "adapter_config.json").unlink(), "has no adapter_config.json"),
        (lambda f: (f / "adapter_config.json").write_text("{"), "not valid JSON"),
        (lambda f: (f / WEIGHTS).write_bytes((f / WEIGHTS).read_bytes()[:-9]), "truncated"),
        (corrupt(format="lora"), "not of format"),
        (corrupt(base=None), "lacks base"),
        (corrupt(sleep_layers=[{"before": 9, "kind": "delta_attention"}]), "before block 0 to 3"),
        (corrupt(sleep_layers=[{"before": 1, "kind": "delta_attention"}]), "num_heads"),
        (corrupt(sleep={"fold": "some"}), 'fold must be "all" or "user"'),
        (corrupt(quantization={"bits": 8}), "quantization lacks group_size"),
        (rewrite(set_nan), "NaN or infinite weights in sleep_layers.1.gain"),
        (rewrite(wrong_shape), r"sleep_layers.0.gain is \[63\], not \[64\]"),
        (rewrite(lambda w: w.pop("sleep_layers.0.gain")), "lacks weights: sleep_layers.0.gain"),
        (rewrite(lambda w: w.update(more=mx.zeros(1))), "does not ask for: more"),
    ],
)
def test_damage_is_one_line(tmp_path, base, damage, message):
    path, _, _ = adapter_folder(tmp_path / "adapter", base)
    damage(path)
    with pytest.raises(UserError, match=message) as error:
        load_model(base, adapter_path=path)
    assert "\n" not in str(error.value)
    with pytest.raises(UserError):
        fuse(base, path, tmp_path / "fused")
    assert not (tmp_path / "fused").exists()


def test_nothing_is_saved_of_a_nan(tmp_path, base):
    with pytest.raises(UserError, match="not saved"):
        adapter_folder(tmp_path / "adapter", base, change=set_nan)
    assert not (tmp_path / "adapter").exists()


def test_a_memory_knows_the_adapter(tmp_path, base):
    """One made with another adapter, or none, is refused."""
    one, _, _ = adapter_folder(tmp_path / "one", base)

    def louder(weights):
        weights["sleep_layers.0.gain"] = 2 * weights["sleep_layers.0.gain"]

    two, _, _ = adapter_folder(tmp_path / "two", base, change=louder)
    assert open_adapter(one).base["weights"] == weights_digest(base)
    assert len({fingerprint(base), fingerprint(base, one), fingerprint(base, two)}) == 3
    with Session.open(base, "m", adapter=one, home=tmp_path, max_tokens=4) as session:
        session.tell("hello")
    for other in (two, None):
        with pytest.raises(UserError, match="another model|different model|model"):
            Session.open(base, "m", adapter=other, home=tmp_path)
    with Session.open(base, "m", adapter=one, home=tmp_path, max_tokens=4) as session:
        assert session.stats().sleeps == 1


def test_the_command_line(tmp_path, base):
    path, _, _ = adapter_folder(tmp_path / "adapter", base)
    options = ["--model", str(base), "--adapter-path", str(path)]
    said = CliRunner().invoke(app, ["generate", *options, "-m", "3", "--prompt", "hello"])
    assert said.exit_code == 0, said.output
    done = CliRunner().invoke(app, ["fuse", *options, "--out", str(tmp_path / "fused")])
    assert done.exit_code == 0 and (tmp_path / "fused" / "model.safetensors").is_file()


# --- what is folded ----------------------------------------------------------------------------


def test_which_tokens_are_replies():
    tokenizer = fake_tokenizer()
    turn = tokenizer.turn("ab", first=True)
    ids = [*turn, 70, 71, *tokenizer.end_ids, *tokenizer.turn("c", first=False), 72]
    later = len(tokenizer.turn("c", first=False))
    wanted = [*[False] * len(turn), True, True, True, *[False] * later, True]
    assert tokenizer.in_replies(ids) == wanted
    cut = len(turn) + 1  # a window that begins within a reply
    assert tokenizer.in_replies(ids[cut:]) == wanted[cut:]
    assert not any(fake_tokenizer(template=None).in_replies(ids))


def test_replies_write_nothing(tmp_path, base):
    """With fold "user" S after a sleep is the same whatever was said, and the same replayed."""
    path, _, _ = adapter_folder(tmp_path / "adapter", base, fold="user")
    model, tokenizer, _ = load(base, adapter=path)
    heard = tokenizer.turn("hello", first=True)
    end = tokenizer.end_ids

    def folded(reply, fold):
        memory = Memory.open("test", "fingerprint", home=tmp_path / f"{fold}{len(reply)}{reply[0]}")
        memory.append([*heard, *reply, *end])
        with Session(model if fold == "user" else loud, tokenizer, memory) as session:
            assert session.stats().window_tokens == len(heard) + len(reply) + len(end)
            session.sleep()
            return {n: x for n, x in memory.arrays.items() if n.endswith("fast_weights")}

    loud, _, _ = load(base, adapter=adapter_folder(tmp_path / "all", base)[0])
    same = folded([70, 71], "user"), folded([80, 81], "user")
    other = folded([70, 71], "all"), folded([80, 81], "all")
    assert same[0].keys() and all(mx.array_equal(same[0][n], same[1][n]) for n in same[0])
    assert any(not mx.array_equal(other[0][n], other[1][n]) for n in other[0])


def test_fold_needs_layers_that_can(base):
    jet = plan(load_model(base)[0], count=1)
    sleep = {"window": 64, "fold": "user"}
    for layers in ([], jet):
        with pytest.raises(UserError, match='fold "user" needs sleep layers'):
            build({**CONFIG, "sleep": sleep, "sleep_layers": layers})


def test_convert_quantizes_an_adapter(tmp_path, base):
    path, _, weights = adapter_folder(tmp_path / "trained", base)
    small = tmp_path / "small"
    done = CliRunner().invoke(app, ["convert", str(path), str(small), "-q"])
    assert done.exit_code == 0, done.exception
    assert open_adapter(small).config["quantization"] == {"group_size": 64, "bits": 8}
    whole, _ = load_model(base, adapter_path=path)
    near, _ = load_model(base, adapter_path=small)
    a, b = (np.array(logits_after_sleep(model)) for model in (whole, near))
    assert 0 < np.abs(a - b).max() < 0.05 * np.abs(a).max()
    for options, message in (
        ([str(small), str(tmp_path / "twice"), "-q"], "quantized already"),
        ([str(path), str(tmp_path / "other"), "--passes", "2"], "not for an adapter"),
        ([str(path), str(tmp_path / "other"), "--verify"], "not for an adapter"),
        ([str(path), str(tmp_path / "other"), "--q-bits", "4"], "needs -q"),
        ([str(path), str(small)], "exists"),
    ):
        with pytest.raises(UserError, match=message):
            CliRunner().invoke(app, ["convert", *options], catch_exceptions=False)


def test_a_base_is_known_by_its_weights_wherever_they_are_in_its_files(tmp_path, base):
    path, _, _ = adapter_folder(tmp_path / "adapter", base)
    weights = mx.load(str(base / "model.safetensors"))
    again = tmp_path / "again"
    shutil.copytree(base, again)
    mx.save_safetensors(str(again / "model.safetensors"), dict(reversed(weights.items())))
    assert weights_digest(again) == weights_digest(base)
    load_model(again, adapter_path=path)
    name = next(iter(weights))
    mx.save_safetensors(str(again / "model.safetensors"), {**weights, name: weights[name] + 1})
    with pytest.raises(UserError, match="is another model"):
        load_model(again, adapter_path=path)
