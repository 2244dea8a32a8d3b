"""Checkpoints in PyTorch's own files, and comparisons with PyTorch. Needs torch."""

from __future__ import annotations

import hashlib
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
from tests import checkpoints, parity  # noqa: E402
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
        ({"w": torch.zeros(2, dtype=torch.complex64)}, "w is complex64"),
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


TINY = {"vocab_size": 37, "hidden_size": 24, "num_attention_heads": 2, "num_key_value_heads": 1}
TINY |= {"intermediate_size": 20}
MAMBA = {"num_hidden_layers": 2, "mamba_n_heads": 4, "mamba_d_head": 12, "mamba_d_state": 8}
MAMBA |= {"mamba_n_groups": 1, "mamba_chunk_size": 8}
SSM = {"mamba_num_heads": 4, "mamba_head_dim": 12, "ssm_state_size": 8, "n_groups": 2}
GRANITE = {**MAMBA, "layer_types": ["mamba", "attention"], "num_local_experts": 0}


@pytest.mark.parametrize(
    ("kind", "fields"),
    [
        ("granitemoehybrid", {**GRANITE, "shared_intermediate_size": 20, "pad_token_id": None}),
        ("falcon_h1", {**MAMBA, "head_dim": 12, "mamba_d_ssm": 48}),
        (
            "nemotron_h",
            {**SSM, "layers_block_type": ["mamba", "mlp", "attention"], "chunk_size": 8},
        ),
    ],
)
def test_verify_with_infinity_in_the_config(tmp_path, kind, fields):
    """transformers writes a time_step_limit of [0.0, {"__float__": "Infinity"}]."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(kind, **TINY, **fields)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "theirs")
    written = json.loads((tmp_path / "theirs" / "config.json").read_text())
    assert {"__float__": "Infinity"} in written["time_step_limit"]
    convert(tmp_path / "theirs", tmp_path / "ours")
    found = verify(tmp_path / "theirs", tmp_path / "ours")
    assert found.reference.startswith("transformers") and found.greedy_agreement == 1.0


def test_verify_fails_where_the_model_is_another(tmp_path, source, state):
    pytest.importorskip("transformers")
    torch.save(state, source / "model.pt")
    convert(source, tmp_path / "ours")
    config = json.loads((tmp_path / "ours" / "config.json").read_text())
    (tmp_path / "ours" / "config.json").write_text(json.dumps({**config, "rope_theta": 7.0}))
    with pytest.raises(UserError, match="is not what .* computes: .*bound.* no tensor differs"):
        verify(source, tmp_path / "ours")


def test_verify_names_the_tensor_that_differs_most(tmp_path, source, state):
    pytest.importorskip("transformers")
    torch.save(state, source / "model.pt")
    convert(source, tmp_path / "ours", NumberTypes(dtype="bfloat16"))
    file = tmp_path / "ours" / "model.safetensors"
    weights = mx.load(str(file))
    name = "layers.0.mlp.down_proj.weight"
    x = weights[name] = 100 * weights[name]
    mx.save_safetensors(str(file), weights, {"format": "mlx"})
    report = json.loads((tmp_path / "ours" / "convert.json").read_text())
    row = next(row for row in report["tensors"] if row["name"] == name)
    row["sha256"] = hashlib.sha256(memoryview(mx.view(x, mx.uint8))).hexdigest()
    (tmp_path / "ours" / "convert.json").write_text(json.dumps(report))
    with pytest.raises(UserError, match=f"the tensor that differs most is {name}, by 9.9e"):
        verify(source, tmp_path / "ours")


def test_verify_of_a_quantized_result_has_no_bound(tmp_path):
    pytest.importorskip("transformers")
    theirs = write(tmp_path / "theirs", checkpoints.CONFIG, random_weights(checkpoints.CONFIG))
    convert(theirs, tmp_path / "ours", NumberTypes(bits=2, group_size=32))
    found = verify(theirs, tmp_path / "ours")
    assert found.bound is None and found.max_logit_error > 0.1


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
    assert done.stdout.startswith("step 3: loss ") and "right answers" in done.stdout
    convert(tmp_path / "trained", tmp_path / "model")
    from mlx_sleep.models.load import load

    model, tokenizer, _ = load(tmp_path / "model")
    assert model.sleep.passes == 2
    assert tokenizer.decode(tokenizer.encode_text("amy blue")) == "amy blue"
