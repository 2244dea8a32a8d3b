"""The models of a study, and how they are scored."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten

from mlx_sleep.lab.statistics import wilson
from mlx_sleep.lab.study import models, probes, score, worker
from mlx_sleep.lab.tasks.gsm import Gsm, make_tokenizer
from mlx_sleep.lab.tasks.synthetic import Batch
from mlx_sleep.models.sleep_hybrid import Model, ModelArgs
from mlx_sleep.sleep import consolidate
from tests.studies import PLAN, TASK, model_of, settings_of

# Models


def test_a_looped_model_is_a_deep_one_with_the_same_weights():
    looped = model_of("looped-d2-n1-s0")
    config = models.config_of(settings_of("looped-d2-n1-s0"), {}, TASK)
    deep = Model(ModelArgs.from_dict({**config, "layer_types": config["layer_types"] * 4}))
    weights = dict(tree_flatten(looped.parameters()))
    for name in [n for n in weights if n.startswith("layers.")]:
        _, i, rest = name.split(".", 2)
        weights |= {f"layers.{int(i) + 2 * loop}.{rest}": weights[name] for loop in range(4)}
    deep.load_weights(list(weights.items()))
    tokens = mx.random.randint(0, 3, (2, 9))
    assert looped.num_layers == 8
    for a, b in zip(tree_flatten(looped(tokens)), tree_flatten(deep(tokens)), strict=True):
        assert a[0] == b[0] and np.allclose(a[1], b[1], atol=1e-5)


def test_a_deeper_model_has_as_many_blocks_as_four_passes_run():
    full = model_of("transformer_deep-d2-n1-s0")
    assert full.args.layer_types == ["attention"] * 4 * PLAN["model"]["blocks"]
    assert "fast_weights" not in full(mx.array([[1, 2]]))[1][0]


def test_skipped_blocks_pass_h_through():
    settings = settings_of("sliding_warmup-d2-n2-s0")
    first, warm_up, last = models.stages_of(settings)
    model = models.build(settings, first, TASK)
    h = mx.random.normal((1, 4, 16))
    assert mx.array_equal(model.block(1, h, {})[0], h)
    assert not mx.array_equal(model.block(0, h, {})[0], h)
    assert [s["steps"] for s in (first, warm_up, last)] == [1, 1, 2]
    assert model.sleep.window >= 13 and last["eviction"] == "sliding"

    def trained(stage):
        names = [
            n for n, _ in tree_flatten(models.build(settings, stage, TASK).trainable_parameters())
        ]
        return {n.rsplit(".", 2)[0].partition(".mixer")[0].partition(".mlp")[0] for n in names}

    assert trained(warm_up) == {"layers.1"}
    assert "layers.1" not in trained(first) and "layers.0" in trained(first)
    assert {"layers.0", "layers.1"} <= trained(last)


def test_models_of_all_n_start_alike_and_see_the_same_data(tmp_path):
    def start(name):
        settings = settings_of(name)
        model = models.build(settings, {}, TASK)
        trainer = worker.make_trainer(settings, {"steps": 4}, TASK, model, tmp_path, 0, False)
        windows, passes = trainer.batches(3)
        return tree_flatten(model.parameters()), [w.tokens for w in windows], passes

    (a, x, n), (b, y, m), (c, z, _) = (
        start(f"hybrid-d2-n{passes}-s{seed}") for passes, seed in ((1, 0), (2, 0), (1, 1))
    )
    assert (n, m) == (1, 2)
    assert all(mx.array_equal(p, q) for (_, p), (_, q) in zip(a, b, strict=True))
    assert all(mx.array_equal(p, q) for p, q in zip(x, y, strict=True))
    assert not mx.array_equal(a[0][1], c[0][1]) and not mx.array_equal(x[0], z[0])


# Scores


class Oracle:
    """Predicts the next token as it is given, or the one above it where `errors` says so."""

    def __init__(self, errors):
        self.errors = mx.array(errors)

    def hidden(self, tokens, state, mask=None):
        following = mx.concatenate([tokens[:, 1:], tokens[:, :1]], axis=1)
        wrong = mx.concatenate([self.errors[:, 1:], self.errors[:, :1]], axis=1)
        return mx.eye(9)[following + wrong], state

    def head(self, h):
        return h


def test_a_question_is_right_when_all_its_tokens_are():
    question = np.array([[-1, 0, 0, -1, 1], [-1, 0, 0, -1, 1], [-1, 0, 0, -1, 1]])
    final = np.array([[5, 1, 2, 6, 3]] * 3, np.int32)
    batch = Batch(np.zeros((3, 1, 2), np.int32), None, final, None, question)
    errors = np.zeros((3, 5), np.int32)
    errors[1, 2] = 1  # the second token of the first answer
    errors[2, 4] = errors[2, 3] = 1  # the second answer; position 3 is nobody's label
    got = score.correct_answers(Oracle(errors), batch, [])
    assert got.tolist() == [[True, True], [False, True], [True, False]]


def test_keeping_the_context_is_one_window_without_gaps():
    task = Gsm(make_tokenizer(), tokens=(60, 110), ops=2, window=40)
    batch = task.batch("test", range(4), 2)
    (chunk,) = score.batch_windows(batch, kept=True)
    for row in range(4):
        context, final, _, [answer] = task.problem("test", row, 2)
        n = len(context) + len(final)
        assert chunk.tokens[row, :n].tolist() == context + final
        assert chunk.mask[row].tolist() == [True] * n + [False] * (chunk.mask.shape[1] - n)
        used = [int(t) for t, w in zip(chunk.targets[row], chunk.weights[row], strict=True) if w]
        assert used == final[-len(used) :] and len(used) == len(str(answer)) + 1


def test_examine_counts_examples():
    model = model_of("hybrid-d2-n2-s0")
    got = score.examine(model, TASK, "test", 12, 2, 2)
    right = 0
    for i in range(12):
        batch = TASK.batch("test", [i], 2)
        state = model.init_state()
        for w in range(2):
            state, _ = consolidate(model, state, mx.array(batch.context[:, w]), 2)
        logits, _ = model(mx.array(batch.final), state)
        said = mx.argmax(logits[0, :-1], axis=-1).tolist()
        right += said == batch.final[0, 1:].tolist()
    assert got["accuracy"] == right / 12
    assert (got["low"], got["high"]) == wilson(right, 12)


def test_constant_is_the_share_of_the_commonest_answer():
    labels = [tuple(f) for f in TASK.batch("test", range(50), 2).final[:, 1:].tolist()]
    assert score.constant(TASK, 50, 2) == max(labels.count(x) for x in labels) / 50


def test_each_row_stops_when_its_own_s_is_still():
    model = model_of("random_passes-d2-n1to6-s0")
    batch = TASK.batch("test", range(8), 2)
    chunk = score.batch_windows(batch)[0]
    moves = []
    for row in range(8):
        _, report = consolidate(model, model.init_state(), chunk.tokens[row : row + 1], 5)
        moves.append(report.moved)
    threshold = float(np.median([m[2] for m in moves]))  # some stop by pass 3, some later
    expected = [next((n for n, x in enumerate(m, 1) if x < threshold), 5) for m in moves]
    assert len(set(expected)) > 1
    state, used = probes.sleep_until_still(model, chunk, model.init_state(8), 5, threshold)
    assert used.tolist() == expected
    for row, n in enumerate(expected):
        alone, _ = consolidate(model, model.init_state(), chunk.tokens[row : row + 1], n)
        np.testing.assert_allclose(
            state[1]["fast_weights"][row], alone[1]["fast_weights"][0], atol=1e-5
        )


def test_halting_at_its_ends_is_a_fixed_n():
    model = model_of("random_passes-d2-n1to6-s0")
    never, at_once = probes.halting(model, TASK, 20, 2, 4, [0.0, 1e9])
    assert (never["mean_passes"], at_once["mean_passes"]) == (4, 1)
    for row, passes in ((never, 4), (at_once, 1)):
        fixed = score.examine(model, TASK, "test", 20, 2, passes)
        assert {k: row[k] for k in fixed} == fixed
