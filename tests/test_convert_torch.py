"""Checkpoints in PyTorch's own files, and comparisons with PyTorch. Needs torch."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

torch = pytest.importorskip("torch")

from mlx_sleep.convert.pipeline import convert  # noqa: E402
from mlx_sleep.convert.quantize import NumberTypes  # noqa: E402
from mlx_sleep.convert.torch.sleep_hybrid import SleepHybrid  # noqa: E402
from mlx_sleep.convert.verify import verify  # noqa: E402
from mlx_sleep.utils.errors import UserError  # noqa: E402
from tests import parity  # noqa: E402
from tests.checkpoints import random_weights, write  # noqa: E402
from tests.parity import CASES, fla, jet_nemotron, ouro, sleep_hybrid  # noqa: E402

CONFIG = sleep_hybrid.CONFIGS[0]
ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def state():
    torch.manual_seed(0)
    return SleepHybrid(CONFIG).state_dict()


@pytest.fixture
def source(tmp_path) -> Path:
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "config.json").write_text(json.dumps(CONFIG))
    return tmp_path / "source"


def check(folder: Path, state: dict) -> None:
    """The folder holds the state dict's tensors, to the bit."""
    found = {}
    for file in folder.glob("*.safetensors"):
        found.update(mx.load(str(file)))
    assert found.keys() == state.keys()
    for name, x in state.items():
        kind = mx.bfloat16 if x.dtype == torch.bfloat16 else mx.float32
        assert found[name].dtype == kind
        bits = x.view(torch.int16 if kind == mx.bfloat16 else torch.int32).numpy()
        got = mx.view(found[name], mx.int16 if kind == mx.bfloat16 else mx.int32)
        assert np.array_equal(np.array(got), bits), name


# --- files -----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["pytorch_model.bin", "step_100.pt", "last.pth"])
def test_a_state_dict(tmp_path, source, state, name, dtype):
    state = {key: x.to(dtype) for key, x in state.items()}
    torch.save(state, source / name)
    convert(source, tmp_path / "ours")
    check(tmp_path / "ours", state)
    assert not (tmp_path / "ours" / "reading").exists()


def test_a_file_by_its_name_and_the_old_format(tmp_path, source, state):
    torch.save(state, source / "a.pt", _use_new_zipfile_serialization=False)
    torch.save({}, source / "b.pt")
    convert(source / "a.pt", tmp_path / "ours")
    check(tmp_path / "ours", state)


def test_shards_with_an_index(tmp_path, source, state):
    names, index = list(state), {}
    for i, file in enumerate(("pytorch_model-1.bin", "pytorch_model-2.bin")):
        torch.save({name: state[name] for name in names[i::2]}, source / file)
        index.update(dict.fromkeys(names[i::2], file))
    (source / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": index}))
    convert(source, tmp_path / "ours")
    check(tmp_path / "ours", state)


def test_what_a_trainer_saves(tmp_path, source, state):
    saved = {f"module._orig_mod.{name}": x for name, x in state.items()}
    checkpoint = {"step": 7, "optimizer": {"lr": 1e-3}, "model": {"state_dict": saved}}
    torch.save(checkpoint, source / "checkpoint.pt")
    report = convert(source, tmp_path / "ours")
    check(tmp_path / "ours", state)
    assert report.notes == [
        "checkpoint.pt: beside the weights: step",
        "checkpoint.pt: beside the weights: optimizer",
    ]


class Malice:
    """A pickle of it would run a command when it is read."""

    def __init__(self, file: Path):
        self.file = file

    def __reduce__(self):
        return os.system, (f"touch {self.file}",)


@pytest.mark.parametrize("old", [False, True])
def test_a_pickle_that_runs_code_is_refused(tmp_path, source, state, old):
    ran = tmp_path / "ran"
    bad = {**state, "extra": Malice(ran)}
    torch.save(bad, source / "model.pt", _use_new_zipfile_serialization=not old)
    with pytest.raises(UserError, match="is refused: .* could run code"):
        convert(source, tmp_path / "ours")
    assert not ran.exists() and not (tmp_path / "ours").exists()


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([1, 2], "holds a list, not a state dict"),
        ({"lr": 1e-3}, "holds no tensors; its entries are: lr"),
        ({"w": torch.zeros(2, dtype=torch.float64)}, "w is float64"),
    ],
)
def test_files_without_weights(tmp_path, source, value, message):
    torch.save(value, source / "model.pt")
    with pytest.raises(UserError, match=message):
        convert(source, tmp_path / "ours")


@pytest.mark.parametrize("kept", [0, 10, 0.5, -1])
def test_truncated_files(tmp_path, source, state, kept):
    torch.save(state, source / "model.pt")
    whole = (source / "model.pt").read_bytes()
    (source / "model.pt").write_bytes(whole[: int(kept * len(whole)) if kept == 0.5 else kept])
    with pytest.raises(UserError, match="truncated|damaged|refused"):
        convert(source, tmp_path / "ours")
    assert not (tmp_path / "ours").exists()


# --- against PyTorch -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def cases():
    return {case.case: case for case in parity.rows(sleep_hybrid, "sleep_hybrid")}


@pytest.mark.parametrize("case", CASES)
def test_sleep_hybrid_is_its_pytorch_definition(cases, case):
    assert cases[case].max_logit_error < 1e-4
    assert cases[case].greedy_agreement == 1.0


def test_verify_runs_the_source_in_pytorch(tmp_path, source, state):
    pytest.importorskip("transformers")
    torch.save(state, source / "model.pt")
    convert(source, tmp_path / "ours")
    found = verify(source, tmp_path / "ours")
    assert "PyTorch definition of sleep_hybrid" in found.reference
    assert found.max_logit_error < 1e-4 and found.greedy_agreement == 1.0
    assert (found.same_bytes, found.rewritten) == (len(state), 0)

    convert(source, tmp_path / "half", NumberTypes(dtype="bfloat16"))
    half = verify(source, tmp_path / "half")
    assert half.max_logit_error > 1e-3  # the comparison is not of a thing with itself


def test_verify_with_transformers(tmp_path):
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=37,
        hidden_size=24,
        intermediate_size=20,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "llama")
    convert(tmp_path / "llama", tmp_path / "ours")
    found = verify(tmp_path / "llama", tmp_path / "ours")
    assert found.reference == "transformers LlamaForCausalLM, the checkpoint"
    assert found.max_logit_error < 1e-4 and found.greedy_agreement == 1.0


@pytest.mark.parametrize(
    "config",
    [fla.CONFIGS["delta"][0], fla.CONFIGS["mamba"][0], jet_nemotron.TIED, ouro.config()],
    ids=lambda config: config["model_type"],
)
def test_verify_with_the_models_of_parity(tmp_path, config):
    pytest.importorskip("transformers")
    weights = random_weights(config)
    convert(write(tmp_path / "theirs", config, weights), tmp_path / "ours")
    found = verify(tmp_path / "theirs", tmp_path / "ours")
    assert config["model_type"] in found.reference
    assert found.max_logit_error < 1e-4 and found.greedy_agreement == 1.0


# --- the example -----------------------------------------------------------------------------


def test_the_training_script_writes_what_convert_takes(tmp_path):
    script = ROOT / "examples" / "train_in_pytorch.py"
    command = [
        sys.executable,
        str(script),
        "toy",
        "--steps",
        "3",
        "--out",
        str(tmp_path / "trained"),
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    convert(tmp_path / "trained", tmp_path / "model")
    from mlx_sleep.models.load import load

    model, tokenizer, _ = load(tmp_path / "model")
    assert model.sleep.passes == 2
    assert tokenizer.decode(tokenizer.encode_text("amy blue")) == "amy blue"
