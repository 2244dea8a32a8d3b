"""Models opened as they are: of mlx-lm, of PyTorch, of Hugging Face's hub."""

from __future__ import annotations

import json
import shutil

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten

from mlx_sleep.convert.opening import open_model
from mlx_sleep.convert.pipeline import convert
from mlx_sleep.models.compat import mlx_lm_classes
from mlx_sleep.models.load import fingerprint, load, load_model
from mlx_sleep.models.weights import weights_digest
from mlx_sleep.utils.errors import UserError
from tests.checkpoints import FLA, GRANITE, LLAMA, random_weights, write
from tests.fakes import fake_folder, hf_tokenizer
from tests.hub import COMMIT, Hub, fill_cache, point_at, serving

NOWHERE = "http://127.0.0.1:9"  # nobody listens at this port


def logits(source, **options):
    model, _ = load_model(source, **options)
    return model(mx.array([[3, 1, 4, 1, 5]]))[0]


def same(a, b) -> bool:
    return bool(mx.array_equal(a, b).item())


@pytest.fixture
def torch_folder(tmp_path):
    """A folder as transformers writes it, with a tokenizer."""
    config = {**LLAMA, "vocab_size": 360, "rope_parameters": {"rope_theta": 500.0}}
    folder = write(tmp_path / "torch", config, random_weights(config))
    hf_tokenizer().save_pretrained(folder)
    return folder


# --- PyTorch's folders -----------------------------------------------------------------------


@pytest.mark.parametrize("config", [LLAMA, FLA, GRANITE], ids=lambda config: config["model_type"])
def test_a_pytorch_folder_is_what_its_conversion_is(tmp_path, config):
    folder = write(tmp_path / "torch", config, random_weights(config))
    opened = open_model(folder)
    convert(folder, tmp_path / "ours")
    model, read = load_model(opened)
    ours, theirs = load_model(tmp_path / "ours")
    assert model.sleep == ours.sleep and read["sleep"] == theirs["sleep"]
    assert (
        dict(tree_flatten(model.parameters())).keys()
        == dict(tree_flatten(ours.parameters())).keys()
    )
    assert same(logits(opened), logits(tmp_path / "ours"))
    # An adapter that was trained in the one fits the other.
    assert opened.digest() == weights_digest(tmp_path / "ours")


@pytest.mark.parametrize("model_type", ["olmo2", "qwen3_moe", "cohere"])
def test_what_only_mlx_lm_knows_is_opened_as_it_does(tmp_path, model_type):
    config = {
        **{**LLAMA, "model_type": model_type, "max_position_embeddings": 64, "head_dim": 12},
        **{"num_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 8},
        **{"decoder_sparse_step": 1, "mlp_only_layers": [], "norm_topk_prob": True},
        **{"rope_theta": 500.0, "layer_norm_eps": 1e-5},
    }
    model_class, args = mlx_lm_classes(config)
    model = model_class(args.from_dict(config))
    weights = {n: mx.random.normal(x.shape) for n, x in tree_flatten(model.parameters())}
    model.load_weights(list(weights.items()))
    for name in [name for name in weights if ".switch_mlp." in name]:  # as PyTorch has them
        stacked = weights.pop(name)
        for i, x in enumerate(stacked):
            weights[name.replace("switch_mlp", f"experts.{i}")] = x
    opened = open_model(write(tmp_path / "torch", config, weights))
    assert opened.config["sleep"]["window"] == 64
    assert mx.allclose(logits(opened), model(mx.array([[3, 1, 4, 1, 5]])), rtol=1e-4, atol=1e-4)


def test_its_rope_and_its_tokenizer_are_its_own(torch_folder):
    model, tokenizer, config = load(open_model(torch_folder))
    assert config["rope_theta"] == 500.0 and "sleep" in config
    assert tokenizer.turn("hi", first=True)
    assert not model.trained_to_sleep


def test_it_has_an_identity_of_its_own(tmp_path, torch_folder):
    identity = fingerprint(open_model(torch_folder))
    assert identity == fingerprint(open_model(torch_folder))
    config = json.loads((torch_folder / "config.json").read_text())
    write(torch_folder, config, random_weights(config))
    assert fingerprint(open_model(torch_folder)) != identity


def test_bin_files_are_read_too(torch_folder):
    torch = pytest.importorskip("torch")
    expected = logits(open_model(torch_folder))
    weights = mx.load(str(torch_folder / "model.safetensors"))
    torch.save(
        {name: torch.tensor(x.tolist()) for name, x in weights.items()},
        torch_folder / "pytorch_model.bin",
    )
    (torch_folder / "model.safetensors").unlink()
    opened = open_model(torch_folder)
    assert same(logits(opened), expected) and len(fingerprint(opened)) == 64


def test_the_library_s_load_opens_one_too(torch_folder):
    assert same(logits(torch_folder), logits(open_model(torch_folder)))
    assert load_model(torch_folder)[1] == load_model(open_model(torch_folder))[1]


def test_mlx_s_folders_are_opened_by_both(tmp_path):
    folder = fake_folder(tmp_path / "m")
    assert same(logits(open_model(folder)), logits(folder))
    assert open_model(folder).mapped is None


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("gone", "no model folder at .*gone; give a folder with a config.json, or the id"),
        ("a.gguf", "is a file; convert it: mlx-sleep convert"),
        ("empty", "has no config.json"),
        ("bare", "has no weights: no safetensors"),
    ],
)
def test_what_cannot_be_opened(tmp_path, name, message):
    (tmp_path / "a.gguf").write_bytes(b"GGUF")
    (tmp_path / "empty").mkdir()
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare" / "config.json").write_text(json.dumps(LLAMA))
    with pytest.raises(UserError, match=message):
        open_model(tmp_path / name)


# --- Hugging Face's hub ------------------------------------------------------------------------


@pytest.fixture
def hub(tmp_path, monkeypatch):
    with serving(hub := Hub()) as endpoint:
        point_at(monkeypatch, tmp_path / "cache", endpoint)
        yield hub


def test_an_id_is_downloaded_once_and_only_what_is_needed(tmp_path, torch_folder, hub):
    expected = logits(open_model(torch_folder))
    (torch_folder / "modeling_llama.py").write_text("raise SystemExit")
    (torch_folder / "consolidated.safetensors").write_bytes(b"the same again")
    (torch_folder / "pytorch_model.bin").write_bytes(b"and again")
    (torch_folder / "onnx").mkdir()
    (torch_folder / "onnx" / "config.json").write_text("{}")
    hub.models["org/tiny"] = torch_folder
    opened = open_model("org/tiny")
    assert opened.name == "org/tiny" and same(logits(opened), expected)
    assert hub.downloaded == {
        "config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json",
        *(name for name in ("chat_template.jinja", "special_tokens_map.json")
          if (torch_folder / name).exists()),
    }  # fmt: skip
    asked = len(hub.asked)
    assert same(logits(open_model("org/tiny", revision=COMMIT)), expected)
    assert len(hub.asked) == asked  # a commit never changes


def test_an_old_repository_has_a_bin_alone(tmp_path, torch_folder, hub):
    (torch_folder / "model.safetensors").rename(torch_folder / "pytorch_model.bin")
    hub.models["org/old"] = torch_folder
    with pytest.raises(UserError, match="pytorch_model.bin"):  # no pickle: the fake stays a fake
        open_model("org/old")
    assert "pytorch_model.bin" in hub.downloaded


@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        ("org/none", {}, "Hugging Face has no model org/none, or it is private; check the name"),
        ("org/gated", {}, "org/gated is gated: ask for access at https://huggingface.co/org/gated"),
        ("org/tiny", {"revision": "v9"}, "org/tiny has no revision 'v9'"),
        ("org/tiny", {"local_files_only": True}, "not in .* cache, .*without --local-files-only"),
        ("org/empty", {}, "org/empty has no weights that mlx-sleep reads"),
    ],
)
def test_what_the_hub_refuses(tmp_path, torch_folder, hub, model, options, message):
    empty = tmp_path / "weightless"
    shutil.copytree(torch_folder, empty, ignore=shutil.ignore_patterns("*.safetensors"))
    hub.models |= {"org/tiny": torch_folder, "org/empty": empty, "org/gated": "GatedRepo"}
    with pytest.raises(UserError, match=message) as error:
        open_model(model, **options)
    assert "\n" not in str(error.value)


def test_the_cache_will_do_without_a_network(tmp_path, monkeypatch, torch_folder):
    expected = logits(open_model(torch_folder))
    point_at(monkeypatch, tmp_path / "cache", NOWHERE)
    with pytest.raises(UserError, match="org/tiny is not in .* cache.* cannot be reached"):
        open_model("org/tiny")
    fill_cache(tmp_path / "cache", "org/tiny", torch_folder)
    assert same(logits(open_model("org/tiny")), expected)
    assert same(logits(open_model("org/tiny", local_files_only=True)), expected)


def test_a_path_is_no_id(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models").mkdir()
    with pytest.raises(UserError, match="no model folder at models/tiny"):
        open_model("models/tiny")
    with pytest.raises(UserError, match="a revision is for ids"):
        open_model(fake_folder(tmp_path / "m"), revision="main")


# --- the command line --------------------------------------------------------------------------


def test_commands_take_an_id(tmp_path, monkeypatch, run, torch_folder):
    point_at(monkeypatch, tmp_path / "cache", NOWHERE)
    fill_cache(tmp_path / "cache", "org/tiny", torch_folder)
    asked = ["--model", "org/tiny", "--local-files-only", "--home", tmp_path, "--max-tokens", "3"]
    code, _, error = run("chat", *asked, "--memory", "m", stdin=b"hello\n")
    assert code == 0 and "attention only" in error and "mlx-sleep retrofit" in error
    code, _, error = run("generate", *asked, "--memory", "m", "--prompt", "again")
    assert code == 0, error
    assert "org/tiny" in run("memory", "show", "m", "--home", tmp_path)[1]
    code, out, _ = run("convert", "org/tiny", tmp_path / "ours", "--local-files-only")
    assert (
        code == 0
        and json.loads((tmp_path / "ours/convert.json").read_text())["source"] == "org/tiny"
    )


def test_models_get_an_id(tmp_path, run, torch_folder, hub):
    hub.models["org/tiny"] = torch_folder
    code, out, error = run("models", "get", "org/tiny")
    assert code == 0 and "try: mlx-sleep chat --model org/tiny" in out, error
    code, _, error = run("models", "get", "org/tiny", tmp_path / "ours", "--revision", COMMIT)
    assert code == 0, error
    assert same(logits(tmp_path / "ours"), logits(open_model("org/tiny", local_files_only=True)))
    assert "'nano' to download; there are: smollm2, and ids" in run("models", "get", "nano")[2]
    assert "is for ids" in run("models", "get", "smollm2", "--revision", "v1")[2]


def test_models_show(tmp_path, run, torch_folder):
    (row,) = json.loads(run("models", "show", torch_folder, "--json")[1])["rows"]
    assert (row["architecture"], row["sleeps"]) == ("llama", "no")
    (row,) = json.loads(run("models", "show", "embedded", "--json")[1])["rows"]
    assert row["sleeps"] == "trained" and row["window"] == 128
    shown = run("models", "show", "embedded")[1]
    assert "this model was trained to sleep" in shown
    assert "\narchitecture  sleep_hybrid\n" in shown  # whole, however narrow the terminal is


def test_a_revision_is_for_ids(tmp_path, refused, torch_folder):
    wrong = "is for ids on Hugging Face"
    assert wrong in refused("chat", "--revision", "v1")
    assert wrong in refused("chat", "--model", "embedded", "--revision", "v1")
    assert wrong in refused("convert", torch_folder, tmp_path / "ours", "--revision", "v1")


def test_paths_that_are_none(tmp_path):
    for path in ("~nosuchuser/model", "a" * 5000):
        with pytest.raises(UserError, match="is no path here"):
            open_model(path)
        with pytest.raises(UserError, match="is no path here"):
            convert(tmp_path, path)


def test_an_index_with_a_name_that_is_none(tmp_path):
    index = {"weight_map": {"x.weight": "a" * 5000}}
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match="cannot read .*index.json: File name too long"):
        open_model(tmp_path)
