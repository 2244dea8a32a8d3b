"""OpenBLAS is loaded, makes products fast, and can be refused; doctor says what is the case."""

from __future__ import annotations

import ctypes
import json
import os
import subprocess
import sys

import mlx.core as mx
import pytest
import typer
from typer.testing import CliRunner

import mlx_sleep
from mlx_sleep.cli import doctor as doctor_module
from mlx_sleep.cli import doctor_blas
from mlx_sleep.models import load
from mlx_sleep.models.sleep_hybrid import Model, ModelArgs
from mlx_sleep.utils import blas_choice, platform
from mlx_sleep.utils.blas import Blas

linux = pytest.mark.skipif(sys.platform != "linux", reason="BLAS is loaded on Linux only")


def has_openblas() -> bool:
    try:
        ctypes.CDLL("libopenblas.so.0")
    except OSError:
        return False
    return True


def fresh(code: str, **environment: str) -> dict:
    """What `code` prints as JSON in a new process, where nothing is imported yet."""
    kept = {k: v for k, v in os.environ.items() if k not in BLAS}
    kept["XDG_CACHE_HOME"] = os.environ["MLX_SLEEP_HOME"]  # nothing was measured there
    done = subprocess.run(
        [sys.executable, "-c", f"import json\n{code}"],
        env={**kept, **environment},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


BLAS = (
    "MLX_SLEEP_BLAS",
    "OPENBLAS_CORETYPE",
    "OPENBLAS_NUM_THREADS",
    "GOTO_NUM_THREADS",
    "OMP_NUM_THREADS",
)
STATUS = "import mlx_sleep; b = mlx_sleep.BLAS; print(json.dumps([b.status, b.detail]))"
SPEED = (
    "import mlx_sleep.utils.platform as p\n"
    "print(json.dumps([p.matmul_check(512), __import__('mlx_sleep').BLAS.status]))"
)


def test_importing_the_package_does_not_import_mlx():
    code = "import sys, mlx_sleep; print(json.dumps([m for m in sys.modules if 'mlx.' in m]))"
    assert fresh(code) == []


def test_the_package_gives_its_names_when_they_are_asked_for():
    code = (
        "from mlx_sleep import BLAS, Session, consolidate, load\n"
        "print(json.dumps([x.__module__ for x in (Session, consolidate, load)] + [BLAS.status]))"
    )
    *modules, status = fresh(code)
    assert modules == ["mlx_sleep.session", "mlx_sleep.sleep", "mlx_sleep.models.load"]
    assert status != "late"
    with pytest.raises(ImportError, match="cannot import name 'nothing'"):
        from mlx_sleep import nothing  # noqa: F401


@linux
@pytest.mark.skipif(not has_openblas(), reason="OpenBLAS is not installed")
def test_openblas_makes_products_several_times_faster():
    for _ in range(3):  # other work on the machine can spoil one comparison
        (slow, slow_error), off = fresh(SPEED, MLX_SLEEP_BLAS="off")
        (fast, fast_error), loaded = fresh(SPEED)
        assert (off, loaded) == ("off", "loaded")
        assert max(slow_error, fast_error) < 1e-5
        if fast > 3 * slow:  # 10 to 30 times on an idle machine
            return
    pytest.fail(f"reference BLAS {slow:.1f} GFLOP/s, OpenBLAS {fast:.1f}")


@linux
@pytest.mark.skipif(not has_openblas(), reason="OpenBLAS is not installed")
def test_threads_are_those_of_the_user_or_of_the_process():
    assert fresh(STATUS, OPENBLAS_NUM_THREADS="1")[1].endswith(" 1 thread)")
    threads = platform.available_cpus()
    assert f" {threads} thread" in fresh(STATUS)[1]
    code = "import os, mlx_sleep; print(json.dumps('OPENBLAS_NUM_THREADS' in os.environ))"
    assert fresh(code) is False


@linux
def test_mlx_imported_first_is_noticed():
    status, detail = fresh("import mlx.core\n" + STATUS)
    assert status == "late" and "before" in detail


@linux
def test_a_wrong_path_is_reported_and_harms_nothing(tmp_path):
    path = str(tmp_path / "libnone.so")
    code = f"{STATUS}\nimport mlx.core as mx; assert (mx.ones(2) @ mx.ones(2)).item() == 2"
    status, detail = fresh(code, MLX_SLEEP_BLAS=path)
    assert status == "failed" and path in detail


@linux
def test_a_path_is_loaded_in_place_of_openblas():
    assert fresh(STATUS, MLX_SLEEP_BLAS="libm.so.6") == ["loaded", "libm.so.6"]


@pytest.mark.parametrize(
    ("files", "cpus"),
    [
        ({"cpu.max": "250000 100000\n"}, 2.5),
        ({"cpu.max": "max 100000\n"}, None),
        ({"cpu/cpu.cfs_quota_us": "400000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 4.0),
        ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, None),
        ({"cpu.max": "\n"}, None),
        ({}, None),
    ],
)
def test_the_quota_of_a_container(files, cpus, tmp_path):
    (tmp_path / "cpu").mkdir()
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    assert platform.cgroup_cpus(str(tmp_path)) == cpus


@pytest.fixture
def embedded(tmp_path, monkeypatch):
    """A small model in the place of the embedded one, and a data folder of its own."""
    config = {
        "model_type": "sleep_hybrid",
        "vocab_size": 32,
        "hidden_size": 16,
        "intermediate_size": 24,
        "layer_types": ["attention", "mamba2"],
    }
    path = tmp_path / "embedded"
    load.save(path, Model(ModelArgs.from_dict(config)), config)
    monkeypatch.setattr(load, "EMBEDDED", path)
    monkeypatch.setenv("MLX_SLEEP_HOME", str(tmp_path / "home"))
    return path


def doctor(*arguments: str):
    app = typer.Typer()
    app.command()(doctor_module.doctor)
    return CliRunner().invoke(app, arguments)


def test_doctor_as_json(embedded):
    result = doctor("--json")
    report = json.loads(result.stdout)
    assert result.exit_code == 0 and report["usable"] and report["problems"] == []
    assert report["backend"] in ("CPU", "Metal", "CUDA")
    assert report["versions"]["mlx"]
    assert report["model"]["fingerprint"] == load.fingerprint(embedded)
    assert set(report["ops"]) == {"gated_delta", "ssd", "conv"}
    if report["backend"] == "CPU":
        assert report["blas"]["status"] == mlx_sleep.BLAS.status
        assert report["blas"]["gflops"] > 0 and report["blas"]["error"] < 1e-5
    assert not (embedded.parent / "home").exists()  # it only looks


def test_doctor_as_text(embedded):
    result = doctor()
    assert result.exit_code == 0
    for word in ("backend", "BLAS", "gated_delta", "memories", load.fingerprint(embedded)[:12]):
        assert word in result.stdout


def test_doctor_finds_a_damaged_model(embedded):
    weights = mx.load(str(embedded / "model.safetensors"))
    weights["norm.weight"] = weights["norm.weight"] + 0.5
    mx.save_safetensors(str(embedded / "model.safetensors"), weights, {"format": "mlx"})
    result = doctor()
    assert result.exit_code == 1 and "damaged" in result.stdout


def test_doctor_without_a_model(embedded, monkeypatch, tmp_path):
    monkeypatch.setattr(load, "EMBEDDED", tmp_path / "none")
    result = doctor("--json")
    report = json.loads(result.stdout)
    assert result.exit_code == 1 and not report["usable"]
    assert "no model folder" in report["model"]["problem"]


def test_doctor_with_a_data_folder_that_cannot_be_written(embedded, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("MLX_SLEEP_HOME", str(tmp_path / "file" / "home"))
    result = doctor()
    assert result.exit_code == 1 and "MLX_SLEEP_HOME" in result.stdout


def test_doctor_without_mlx(embedded, monkeypatch):
    monkeypatch.setitem(sys.modules, "mlx.core", None)
    report = doctor_module.examine()
    assert not report["usable"] and "MLX cannot be imported" in report["problems"][0]
    if sys.platform == "linux":
        assert "pip install" in report["advice"]


def test_doctor_rejects_wrong_products(embedded, monkeypatch):
    monkeypatch.setattr(doctor_module, "_backend", lambda mx: "CPU")
    monkeypatch.setattr(platform, "matmul_check", lambda: (200.0, float("nan")))
    report = doctor_module.examine()
    assert not report["usable"] and report["advice"] == "export MLX_SLEEP_BLAS=off"


@linux
def test_doctor_names_one_command_when_openblas_is_missing(embedded, monkeypatch):
    monkeypatch.setattr(doctor_module, "_backend", lambda mx: "CPU")
    monkeypatch.setattr(doctor_blas, "BLAS", Blas("missing"))
    monkeypatch.setattr(blas_choice, "installed", lambda: [])
    monkeypatch.setattr(platform, "nvidia_gpu", lambda: False)
    monkeypatch.setattr(doctor_blas.shutil, "which", lambda tool: tool == "apt-get")
    report = doctor_module.examine()
    assert report["usable"] and report["advice"].endswith("apt-get install libopenblas0-pthread")
