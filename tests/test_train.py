"""Training runs: resumed to the same losses, several processes, clear stops; and evaluation."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from sentencepiece import SentencePieceTrainer

from mlx_sleep.cli.train import train as train_command
from mlx_sleep.lab import evaluation
from mlx_sleep.lab.evaluation import evaluate_memory
from mlx_sleep.lab.memory_training import make_batches, make_trainer, sentencepiece_encoder
from mlx_sleep.lab.statistics import wilson
from mlx_sleep.lab.tasks.memory import CASES, MemoryTask
from mlx_sleep.models.base import SleepConfig
from mlx_sleep.models.load import EMBEDDED, load_model
from mlx_sleep.training.recipe import read_recipe, total_steps
from mlx_sleep.training.schedule import rate_at
from mlx_sleep.training.trainer import Trainer
from mlx_sleep.utils.errors import UserError

RECIPE = {
    "task": "memory",
    "seed": 5,
    "batch": 4,
    "model": {
        "model_type": "sleep_hybrid",
        "vocab_size": 2048,
        "hidden_size": 16,
        "intermediate_size": 24,
        "layer_types": ["attention", "gated_deltanet"],
        "num_attention_heads": 2,
        "linear_num_key_heads": 1,
        "linear_num_value_heads": 1,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
        "sleep": {"passes": 2, "window": 64},
    },
    "optimizer": {"muon_lr": 0.01, "adamw_lr": 0.003, "warmup": 2, "cooldown": 0.5},
    "stages": [
        {"steps": 3, "passes": 1, "level": {"windows": 1, "window_tokens": 40}},
        {"steps": 3, "passes": [1, 2], "level": {"windows": [1, 2], "window_tokens": 40}},
    ],
}


@pytest.fixture
def recipe(tmp_path):
    path = tmp_path / "recipe.json"
    path.write_text(json.dumps(RECIPE))
    return path


def losses(folder):
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, len(rows) + 1))
    return [row["loss"] for row in rows]


class Stop(Exception):
    pass


def test_a_resumed_run_has_the_same_losses(recipe, tmp_path):
    settings = read_recipe(str(recipe))
    make_trainer(settings, tmp_path / "whole", EMBEDDED).run()
    whole = losses(tmp_path / "whole")
    assert len(whole) == total_steps(settings) == 6
    assert whole[-1] < whole[0]

    def stop(row):
        if row["step"] == 4:
            raise Stop

    with pytest.raises(Stop):  # one step after its last checkpoint
        make_trainer(settings, tmp_path / "cut", EMBEDDED, save_every=3).run(stop)
    assert len(losses(tmp_path / "cut")) == 4
    with open(tmp_path / "cut" / "metrics.jsonl", "a") as f:
        f.write('{"step": 5, "lo')  # a crash in the middle of a row
    trainer = make_trainer(settings, tmp_path / "cut", EMBEDDED, save_every=3)
    trainer.run()
    assert losses(tmp_path / "cut") == whole


def test_checkpointed_passes_give_the_same_losses(recipe, tmp_path):
    settings = read_recipe(str(recipe))
    for folder, on in (("plain", False), ("checkpointed", True)):
        make_trainer(settings, tmp_path / folder, EMBEDDED, checkpoint_passes=on).run()
    np.testing.assert_allclose(
        losses(tmp_path / "plain"), losses(tmp_path / "checkpointed"), rtol=1e-4
    )


def test_the_compiled_path_gives_the_same_losses(recipe, tmp_path, monkeypatch):
    """The path of a Mac: one graph for each number of passes, over batches of several shapes."""
    compiled, compile_ = [], mx.compile
    monkeypatch.setattr(mx, "compile", lambda *x, **y: compiled.append(x) or compile_(*x, **y))
    settings = read_recipe(str(recipe))
    make_trainer(settings, tmp_path / "plain", EMBEDDED).run()
    passes = set()

    def stop(row):
        passes.add(row["passes"])
        if row["step"] == 4:
            raise Stop

    cut = make_trainer(settings, tmp_path / "compiled", EMBEDDED, save_every=3)
    cut.compiled = True
    with pytest.raises(Stop):
        cut.run(stop)
    trainer = make_trainer(settings, tmp_path / "compiled", EMBEDDED, checkpoint_passes=True)
    trainer.compiled = True
    trainer.run(lambda row: passes.add(row["passes"]))
    assert passes == {1, 2} and len(compiled) >= 2
    np.testing.assert_allclose(losses(tmp_path / "compiled"), losses(tmp_path / "plain"), rtol=1e-4)


def test_a_row_of_the_metrics_is_written_whole_or_not_at_all(tmp_path):
    """A file size limit in place of a full disk, in the middle of a row."""
    code = (
        "import resource, sys\n"
        "from pathlib import Path\n"
        "from mlx_sleep.training.run_folder import Metrics\n"
        "from mlx_sleep.utils.errors import UserError\n"
        "metrics = Metrics(Path(sys.argv[1]))\n"
        "metrics.append({'step': 1})\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (20, 20))\n"
        "try: metrics.append({'step': 2})\n"
        "except UserError as error: print(error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True
    )
    assert "cannot write" in done.stdout and "free some space" in done.stdout, done.stderr
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1}\n'


@pytest.mark.parametrize("name", ["recipe.json", "metrics.jsonl"])
def test_a_kill_leaves_readable_files(recipe, tmp_path, monkeypatch, name):
    """What is replaced is replaced by one rename: before it, the old file is there or none."""
    settings, run = read_recipe(str(recipe)), tmp_path / "run"
    if name == "metrics.jsonl":
        with pytest.raises(Stop):
            make_trainer(settings, run, EMBEDDED, save_every=3).run(raise_stop)
    before = (run / name).read_text() if run.exists() else None

    def killed(source, target):
        assert Path(target) == run / name
        raise Stop

    with monkeypatch.context() as patch, pytest.raises(Stop):
        patch.setattr(os, "replace", killed)
        make_trainer(settings, run, EMBEDDED, save_every=3).open()
    assert ((run / name).read_text() if (run / name).exists() else None) == before
    make_trainer(settings, run, EMBEDDED, save_every=3).run()
    assert len(losses(run)) == 6 and json.loads((run / "recipe.json").read_text())["seed"] == 5


def test_another_recipe_in_the_same_folder_is_refused(recipe, tmp_path):
    settings = read_recipe(str(recipe))
    trainer = make_trainer(settings, tmp_path / "run", EMBEDDED)
    with pytest.raises(Stop):
        trainer.run(lambda row: (_ for _ in ()).throw(Stop))
    with pytest.raises(UserError, match="another recipe"):
        make_trainer({**settings, "seed": 6}, tmp_path / "run", EMBEDDED).run()


def test_a_loss_that_is_not_finite_stops_the_run(recipe, tmp_path):
    trainer = make_trainer(read_recipe(str(recipe)), tmp_path / "run", EMBEDDED)
    trainer.model.norm.weight = mx.full((16,), float("nan"))
    with pytest.raises(UserError, match="not finite at step 1"):
        trainer.run()
    assert not (tmp_path / "run" / "checkpoint").exists()


def test_a_gradient_that_is_not_finite_stops_before_it_is_saved(recipe, tmp_path, monkeypatch):
    trainer = make_trainer(read_recipe(str(recipe)), tmp_path / "run", EMBEDDED, save_every=1)
    step, calls = trainer.update, []

    def spoilt(chunks, passes):
        loss, accuracy, norm = step(chunks, passes)
        calls.append(passes)
        return loss, accuracy, norm if len(calls) < 2 else mx.array(float("inf"))

    monkeypatch.setattr(trainer, "update", spoilt)
    with pytest.raises(UserError, match="gradient is not finite at step 2"):
        trainer.run()
    progress = json.loads((tmp_path / "run" / "checkpoint" / "progress.json").read_text())
    assert progress["step"] == 1


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "progress.json"])
def test_a_damaged_run_is_refused_in_words(recipe, tmp_path, name):
    settings, run = read_recipe(str(recipe)), tmp_path / "run"
    with pytest.raises(Stop):
        make_trainer(settings, run, EMBEDDED, save_every=1).run(raise_stop)
    path = run / "checkpoint" / name
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match="cannot be read"):
        make_trainer(settings, run, EMBEDDED).run()
    path.unlink()
    with pytest.raises(UserError, match="cannot be read"):
        make_trainer(settings, run, EMBEDDED).run()
    (run / "recipe.json").write_text("")
    with pytest.raises(UserError, match="recipe.json is not valid JSON"):
        make_trainer(settings, run, EMBEDDED).run()


def raise_stop(row):
    raise Stop


def test_a_full_disk_keeps_the_checkpoint_before(recipe, tmp_path):
    """A file size limit in place of a full disk, as in test_load.py."""
    code = (
        "import resource, sys\n"
        "from pathlib import Path\n"
        "from mlx_sleep.utils.errors import UserError\n"
        "from mlx_sleep.models.load import EMBEDDED\n"
        "from mlx_sleep.lab.memory_training import make_trainer\n"
        "from mlx_sleep.training.recipe import read_recipe\n"
        "out = Path(sys.argv[2])\n"
        "trainer = make_trainer(read_recipe(sys.argv[1]), out, EMBEDDED, save_every=1)\n"
        "def limit(row):\n"
        "    if row['step'] == 2: resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))\n"
        "try: trainer.run(limit)\n"
        "except UserError as error: print(error)\n"
    )
    run = tmp_path / "run"
    done = subprocess.run(
        [sys.executable, "-c", code, str(recipe), str(run)], capture_output=True, text=True
    )
    assert "cannot write a checkpoint" in done.stdout, done.stderr
    make_trainer(read_recipe(str(recipe)), run, EMBEDDED, save_every=1).run()
    assert len(losses(run)) == 6


def test_a_kill_after_a_killed_save_leaves_a_checkpoint_as_well(recipe, tmp_path, monkeypatch):
    run = tmp_path / "run"
    trainer = make_trainer(read_recipe(str(recipe)), run, EMBEDDED)
    trainer.open()
    trainer.save()
    (run / "checkpoint").rename(run / "checkpoint.old")  # a kill between two renames

    def killed(self, target):
        raise Stop

    monkeypatch.setattr(type(tmp_path), "rename", killed)
    with pytest.raises(Stop):
        trainer.save()
    assert (run / "checkpoint.old" / "progress.json").exists()


def test_every_parameter_has_its_optimizer(recipe, tmp_path):
    """Muon for the projections of the blocks, AdamW for the rest, and every one of them moves."""
    from mlx.utils import tree_flatten

    trainer = make_trainer(read_recipe(str(recipe)), tmp_path / "run", EMBEDDED)
    muon = dict(tree_flatten(trainer.optimizer.optimizers[0].state))
    names = {n.rpartition(".")[0] for n in muon if n.endswith(".v")}
    assert names == {
        n for n, x in tree_flatten(trainer.model.parameters()) if x.ndim == 2 and "proj" in n
    }
    before = {n: np.array(x) for n, x in tree_flatten(trainer.model.parameters())}
    trainer.run()
    after = dict(tree_flatten(trainer.model.parameters()))
    assert [n for n in before if np.array_equal(before[n], after[n])] == []


def test_two_processes_train_as_one(recipe, tmp_path):
    """The ring backend over loopback: half the batch each, averaged gradients."""
    hosts = tmp_path / "hosts.json"
    ports = [free_port() for _ in range(2)]
    hosts.write_text(json.dumps([[f"127.0.0.1:{port}"] for port in ports]))
    arguments = ["train", "memory", "--recipe", str(recipe), "--out", str(tmp_path / "two")]
    command = f"import sys; from mlx_sleep.cli import main; sys.argv[1:] = {arguments!r}; main()"
    env = {**os.environ, "MLX_HOSTFILE": str(hosts)}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", command],
            env={**env, "MLX_RANK": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    errors = [p.communicate(timeout=300)[1] for p in processes]
    assert [p.returncode for p in processes] == [0, 0], errors
    make_trainer(read_recipe(str(recipe)), tmp_path / "one", EMBEDDED).run()
    # Each process divides by its own weights, so the mean is close, not equal.
    np.testing.assert_allclose(losses(tmp_path / "two"), losses(tmp_path / "one"), rtol=0.02)
    model, config = load_model(tmp_path / "two" / "model")
    assert config["sleep"]["passes"] == 2 and model.num_layers == 2


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def test_plan_is_a_function_of_the_step():
    encode, _, specials = sentencepiece_encoder(EMBEDDED)
    plans = [make_batches(RECIPE, encode, specials) for _ in range(2)]
    for step in (5, 0, 4):
        (a, n), (b, m) = plans[0](step), plans[1](step)
        assert n == m and len(a) == len(b)
        assert all(mx.array_equal(x.tokens, y.tokens) for x, y in zip(a, b, strict=True))
    halves = [make_batches(RECIPE, encode, specials, rank=r, size=2)(4)[0] for r in range(2)]
    both = mx.concatenate([h[0].tokens for h in halves])
    assert mx.array_equal(both, plans[0](4)[0][0].tokens)


def test_each_step_draws_windows_and_asking_from_their_lists():
    encode, decode, specials = sentencepiece_encoder(EMBEDDED)
    level = {"windows": [2, 3], "facts": [2, 2], "small_talk": 0.0, "asking": [0.0, 1.0]}
    stages = [{"steps": 20, "passes": 1, "level": level}]
    batches = make_batches({**RECIPE, "stages": stages}, encode, specials)
    drawn = set()
    for step in range(20):
        windows, _ = batches(step)
        second = windows[1].tokens.tolist()  # tells or asks, by the step
        drawn.add((len(windows), all("?" in decode(row) for row in second)))
    assert drawn == {(3, False), (3, True), (4, False), (4, True)}


def test_rate_rises_holds_and_falls():
    rates = [rate_at(s, 100, 10, 0.2) for s in range(100)]
    assert rates[0] == pytest.approx(0.1) and rates[9] == rates[50] == rates[79] == 1
    assert rates[80] == 1 and rates[90] == pytest.approx(0.5) and 0 < rates[99] < 0.06


@pytest.mark.parametrize(
    "change, message",
    [
        ({"task": "poetry"}, "unknown task"),
        ({"stages": [{"steps": 1, "passes": 0, "level": {}}]}, "at least 1 pass"),
        (
            {"stages": [{"steps": 1, "passes": 1, "level": {"fact": 3}}]},
            "level.fact is not a known field",
        ),
        ({"batch": None}, "lacks batch"),
    ],
)
def test_bad_recipes(tmp_path, change, message):
    values = {k: v for k, v in {**RECIPE, **change}.items() if v is not None}
    path = tmp_path / "bad.json"
    path.write_text(json.dumps(values))
    with pytest.raises(UserError, match=message):
        make_trainer(read_recipe(str(path)), tmp_path / "run", EMBEDDED).run()
    path.write_text("{")
    with pytest.raises(UserError, match="not valid JSON"):
        read_recipe(str(path))
    path.write_text("[1]")
    with pytest.raises(UserError, match="one JSON object"):
        read_recipe(str(path))
    (tmp_path / "folder.json").mkdir()
    with pytest.raises(UserError, match="cannot read"):
        read_recipe(str(tmp_path / "folder.json"))
    with pytest.raises(UserError, match="no recipe 'nothing'"):
        read_recipe("nothing")


def test_bad_options_of_the_train_command():
    with pytest.raises(UserError, match="unknown task 'poetry'; known: memory"):
        train_command("poetry")
    with pytest.raises(UserError, match="--save-every"):
        train_command("memory", save_every=0)


def test_a_tokenizer_that_the_task_cannot_use(tmp_path):
    with pytest.raises(UserError, match="no tokenizer at"):
        sentencepiece_encoder(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(b"junk")
    with pytest.raises(UserError, match="not a sentencepiece model"):
        sentencepiece_encoder(tmp_path)
    with open(tmp_path / "tokenizer.model", "wb") as file:
        SentencePieceTrainer.train(
            sentence_iterator=iter(["a b c d", "e f g h"]),
            model_writer=file,
            vocab_size=12,
            model_type="char",
            minloglevel=2,
        )
    with pytest.raises(UserError, match=r"has no <\|user\|>, .*trained on it"):
        sentencepiece_encoder(tmp_path)


def test_evaluation_counts_what_the_model_says(monkeypatch):
    """A model that answers by the book is right everywhere; one with random weights nowhere."""
    encode, decode, specials = sentencepiece_encoder(EMBEDDED)
    task = MemoryTask(encode, specials, "test", seed=5)  # no two of the examples ask alike
    model = make_trainer(RECIPE, "unused", EMBEDDED).model
    model.sleep = SleepConfig(window=128)
    rows = evaluate_memory(model, task, decode, cases=["after_1_sleep"], passes=[1, 2], n=6)
    assert [r["passes"] for r in rows] == [1, 2]
    assert all(r["accuracy"] == 0 and r["n"] == 6 for r in rows)

    seen = []

    def by_the_book(model, prompts, state, end):
        """Stands in for `answer`: knows the replies as long as S is not zero."""
        zero = all(not s["fast_weights"].any().item() for s in state if "fast_weights" in s)
        seen.append(zero)
        group = [e for e in examples if tuple(e.prompt) in {tuple(p) for p in prompts}]
        assert len(group) >= len(prompts)
        by_prompt = {tuple(e.prompt): e.reply for e in group}
        return [encode("I am.") if zero else encode(by_prompt[tuple(p)]) for p in prompts]

    monkeypatch.setattr(evaluation, "answer", by_the_book)
    for case in CASES:
        examples = list(task.evaluation(case, 6))
        (row,) = evaluate_memory(model, task, decode, cases=[case], passes=[1], n=6, batch=4)
        assert row["case"] == case
        assert row["accuracy"] == 1 and row["zeroed"] == 0
        assert row["high"] == pytest.approx(1)
    assert True in seen and False in seen


def test_evaluation_fills_windows_of_the_models_length():
    encode, decode, specials = sentencepiece_encoder(EMBEDDED)
    task = MemoryTask(encode, specials, "test", seed=3)
    model = make_trainer(RECIPE, "unused", EMBEDDED).model
    slept = []
    block = model.block

    def spy(i, h, state, mask=None):
        slept.append(h.shape[1])
        return block(i, h, state, mask)

    model.block = spy
    for window, most in ((200, 200), (96, 96)):
        model.sleep = SleepConfig(window=window)
        slept.clear()
        evaluate_memory(model, task, decode, cases=["after_5_sleeps"], passes=[1], n=4)
        assert most // 2 < max(slept) <= most
    for window in (12, 40):
        model.sleep = SleepConfig(window=window)
        with pytest.raises(UserError, match="longer"):
            evaluate_memory(model, task, decode, cases=["two_hop"], passes=[1], n=1)


def test_wilson():
    low, high = wilson(95, 100)
    assert low == pytest.approx(0.8882, abs=1e-3) and high == pytest.approx(0.9785, abs=1e-3)
    assert wilson(0, 10)[0] == 0 and wilson(10, 10)[1] == 1


def test_a_killed_save_leaves_a_checkpoint(recipe, tmp_path, monkeypatch):
    settings = read_recipe(str(recipe))
    trainer = make_trainer(settings, tmp_path / "run", EMBEDDED, save_every=2)
    calls = []
    rename = type(tmp_path).rename

    def killed(self, target):
        calls.append(self.name)
        if calls.count("checkpoint.new") == 2:
            raise Stop  # between the old checkpoint's rename and the new one's
        return rename(self, target)

    monkeypatch.setattr(type(tmp_path), "rename", killed)
    with pytest.raises(Stop):
        trainer.run()
    monkeypatch.undo()
    again = make_trainer(settings, tmp_path / "run", EMBEDDED, save_every=2)
    again.run()
    assert len(losses(tmp_path / "run")) == 6
    assert isinstance(again, Trainer) and again.step == 6
