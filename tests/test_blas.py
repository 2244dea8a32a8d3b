"""The BLAS that is right and fastest is taken, kept and loaded; one that is wrong never is."""

from __future__ import annotations

import mlx_sleep  # isort: skip  (OpenBLAS before MLX)

import json
import os
import shutil
import subprocess
import sys

import pytest
import typer
from typer.testing import CliRunner

from mlx_sleep.cli import doctor, doctor_blas
from mlx_sleep.utils import blas, blas_choice, blas_trial, platform
from mlx_sleep.utils.blas_choice import Candidate
from tests.metal.harness import compiler
from tests.test_platform import STATUS, fresh, has_openblas

assert mlx_sleep
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="a BLAS is chosen on Linux only")

FAST = {"large": 200.0, "small": 50.0}
SLOW = {"large": 190.0, "small": 20.0}
CLOSE = {"large": 204.0, "small": 51.0}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for name in (blas.BLAS_VARIABLE, "OPENBLAS_CORETYPE"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path / "cache/mlx-sleep/blas.json"


def choose(**answers):
    """The choice among candidates, in this order, that give these answers."""
    candidates = [Candidate(name, {}) for name in answers]
    return blas_choice.choose(candidates, lambda candidate: answers[candidate.library])


def answer(name, gflops, error=5e-7, status="loaded"):
    return {"status": status, "detail": name, "path": "", "error": error, "gflops": gflops}


def test_the_fastest_is_taken_and_the_first_of_those_that_are_close():
    assert choose(a=answer("a", SLOW), b=answer("b", FAST)).detail == "b"
    assert choose(a=answer("a", FAST), b=answer("b", SLOW)).detail == "a"
    assert choose(a=answer("a", FAST), b=answer("b", CLOSE)).detail == "a"


def test_what_is_wrong_crashes_or_is_not_there_is_not_taken():
    choice = choose(
        none=answer("none", FAST, status="failed"),
        wrong=answer("wrong", FAST, error=0.01),
        crashes="crashed (SIGILL)",
        slow=answer("slow", SLOW),
    )
    assert choice.detail == "slow"
    assert [r.barred for r in choice.results] == ["wrong", "crashed (SIGILL)", ""]
    assert choose(none=answer("none", FAST, status="failed")) is None


def test_kernels_are_asked_for_that_the_processor_can_run(monkeypatch):
    monkeypatch.setattr(blas_choice, "_mkl", lambda: [])
    monkeypatch.setattr(blas_choice, "cpu_fields", lambda: {"flags": "sse2 fma avx2 avx512f"})
    assert [c.settings for c in blas_choice.installed()][:2] == [
        {},
        {"OPENBLAS_CORETYPE": "Haswell"},
    ]
    monkeypatch.setenv("OPENBLAS_CORETYPE", "Zen")  # the user's own
    assert not any(candidate.settings for candidate in blas_choice.installed())


def test_an_error_in_one_of_the_tries_is_enough():
    errors = iter([5e-7, 0.5])
    choice = blas_choice.choose(
        [Candidate("a", {})], lambda candidate: answer("a", FAST, next(errors))
    )
    assert choice.library == "" and choice.results[0].barred == "wrong"


SOURCE = r"""
#include <dlfcn.h>
#include <signal.h>
#include <unistd.h>
typedef void (*gemm)(int, int, int, int, int, int, float, const float *, int, const float *, int,
                     float, float *, int);
extern "C" void cblas_sgemm(int order, int ta, int tb, int m, int n, int k, float alpha,
                            const float *a, int lda, const float *b, int ldb, float beta, float *c,
                            int ldc) {
  static gemm real = (gemm)dlsym(dlopen("libopenblas.so.0", RTLD_LAZY), "cblas_sgemm");
  if (CRASHES) raise(SIGILL);
  if (SLOW) usleep(3000);
  real(order, ta, tb, m, n, k, alpha, a, lda, b, ldb, beta, c, ldc);
  if (WRONG && m == 33) c[0] += 10;  // in one entry, at an odd size
}
"""


@pytest.mark.skipif(compiler() is None, reason="there is no C++ compiler")
@pytest.mark.skipif(not has_openblas(), reason="OpenBLAS is not installed")
def test_libraries_are_tried_in_processes_of_their_own(tmp_path, monkeypatch):
    kinds = ("CRASHES", "WRONG", "SLOW")
    libraries = [tmp_path / f"lib{kind.lower()}.so" for kind in kinds]
    for library, kind in zip(libraries, kinds, strict=True):
        flags = [f"-D{other}={int(other == kind)}" for other in kinds]
        subprocess.run(
            [compiler(), "-shared", "-fPIC", *flags, "-x", "c++", "-", "-o", library],
            input=SOURCE.encode(),
            check=True,
        )
    monkeypatch.setattr(blas_choice, "ROUNDS", 1)
    candidates = [Candidate(str(library), {}) for library in libraries]
    candidates.append(Candidate("libopenblas.so.0", {"OPENBLAS_CORETYPE": "Prescott"}))
    choice = blas_choice.choose(candidates)
    barred = [result.barred for result in choice.results]
    assert barred == ["crashed (SIGILL)", "wrong", "", ""]
    assert "Prescott" in choice.detail and "openblas" in choice.library

    # What is kept is what the next process loads, unless the user says otherwise.
    assert blas_choice.keep(choice) == ""
    cache = {"XDG_CACHE_HOME": os.environ["XDG_CACHE_HOME"], "OPENBLAS_NUM_THREADS": "1"}
    assert fresh(STATUS, **cache) == ["loaded", choice.detail.replace("2 threads", "1 thread")]
    assert "Nehalem" in fresh(STATUS, **cache, OPENBLAS_CORETYPE="Nehalem")[1]
    assert fresh(STATUS, **cache, MLX_SLEEP_BLAS="off")[0] == "off"


def keep(library, **changes):
    """Keeps a choice of `library`, and says what `kept_choice` makes of it."""
    tried = [answer("it", FAST) | {"path": str(library)}]
    choice = blas_choice.choose([Candidate(str(library), {})], lambda candidate: tried[0])
    assert blas_choice.keep(choice) == ""
    return choice


def test_a_choice_holds_while_its_libraries_do(tmp_path, cache):
    library = tmp_path / "lib.so"
    library.write_bytes(b"1")
    keep(library)
    assert blas.kept_choice()["library"] == str(library)
    assert cache.stat().st_mode & 0o777 == 0o600
    library.write_bytes(b"22")
    assert blas.kept_choice() is None


def test_a_choice_is_of_one_machine(tmp_path, monkeypatch):
    for name in ("one", "two"):
        monkeypatch.setattr(platform, "available_cpus", lambda: 1)
        monkeypatch.setattr(blas, "cpu_fields", lambda name=name: {"model name": name})
        assert blas.kept_choice() is None
        (tmp_path / name).write_bytes(b"")
        keep(tmp_path / name)
    monkeypatch.setattr(blas, "cpu_fields", lambda: {"model name": "one"})
    assert blas.kept_choice()["library"].endswith("one")


def test_the_file_forgets_the_oldest_machines(tmp_path, monkeypatch, cache):
    for i in range(blas_choice.ROWS + 2):
        monkeypatch.setattr(blas, "cpu_fields", lambda i=i: {"model name": f"cpu{i}"})
        keep(tmp_path)
    rows = json.loads(cache.read_bytes())
    assert len(rows) == blas_choice.ROWS and not any("cpu1 " in row for row in rows)


@pytest.mark.parametrize("text", ["", "[", "[]", "[" * 100_000, '{"MACHINE": 3}'])
def test_a_damaged_file_counts_as_none(text, cache, tmp_path):
    cache.parent.mkdir(parents=True)
    cache.write_text(text.replace("MACHINE", blas.machine()))
    assert blas.kept_choice() is None
    keep(tmp_path)
    assert blas.kept_choice() is not None


def test_a_choice_that_does_not_load_gives_way_to_openblas(tmp_path):
    (tmp_path / "libbad.so").write_bytes(b"not a library")
    keep(tmp_path / "libbad.so")
    cache = {"XDG_CACHE_HOME": os.environ["XDG_CACHE_HOME"]}
    assert fresh(STATUS, **cache)[0] == ("loaded" if has_openblas() else "missing")


@pytest.mark.skipif(os.name != "posix", reason="needs a folder that can't be written")
def test_a_read_only_cache_is_named(tmp_path, monkeypatch):
    (tmp_path / "file").write_bytes(b"")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    monkeypatch.setattr(blas_choice, "try_one", lambda candidate: answer("fast", FAST))
    monkeypatch.setattr(doctor_blas, "BLAS", blas.Blas("loaded", "OpenBLAS"))
    assert "can't be kept" in doctor_blas.calibrate() and "fast" in doctor_blas.calibrate()


def test_the_first_cpu_of_cpuinfo(tmp_path):
    file = tmp_path / "cpuinfo"
    one = "processor\t: {}\nmodel name\t: A CPU\ncpu MHz\t\t: {}\nflags\t\t: fpu avx2\n\n"
    file.write_text(one.format(0, 1000.1) + one.format(1, 2000.2))
    assert blas.cpu_fields(str(file)) == {"model name": "A CPU", "flags": "fpu avx2"}
    assert blas.cpu_fields(str(tmp_path / "none")) == {}


# --- doctor --------------------------------------------------------------------------------


@pytest.fixture
def blas_report(monkeypatch):
    """The report with a BLAS that was found, and the candidates of a machine with AVX2."""
    monkeypatch.setattr(doctor_blas, "BLAS", blas.Blas("loaded", "OpenBLAS"))
    monkeypatch.setattr(blas_choice, "installed", lambda: [Candidate("libopenblas.so.0", {})])
    monkeypatch.setattr(blas_choice, "can_use_mkl", lambda: True)
    monkeypatch.setattr(blas, "cpu_fields", lambda: {"flags": "avx2"})
    return {"status": "loaded", "detail": "OpenBLAS", "gflops": 150.0, "error": 1e-7}


def calibrated(monkeypatch, chunk=80.0):
    gflops = {"large": 200.0, doctor_blas._CHUNK: chunk}
    monkeypatch.setattr(blas_choice, "try_one", lambda candidate: answer("OpenBLAS", gflops))
    return doctor_blas.calibrate()


def test_doctor_advises_to_measure_and_then_not_again(blas_report, monkeypatch):
    assert doctor_blas.advice(blas_report) == "mlx-sleep doctor --calibrate"
    assert calibrated(monkeypatch) == "OpenBLAS"
    assert doctor_blas.advice(blas_report) == ""
    rows = doctor_blas.lines(doctor_blas.examine(cpu=False))
    assert rows[1][1] == ("OpenBLAS: GFLOP/s 200 (large), 80 (256 of 32x64x64), error 5e-07, taken")
    more = [*blas_choice.installed(), Candidate("libmkl_rt.so.3", {})]
    monkeypatch.setattr(blas_choice, "installed", lambda: more)
    assert doctor_blas.advice(blas_report) == "mlx-sleep doctor --calibrate"


def test_doctor_advises_mkl_where_openblas_is_slow_or_cannot_be_had(blas_report, monkeypatch):
    assert doctor_blas._CHUNK in blas_trial.SIZES
    calibrated(monkeypatch, chunk=25.0)
    slow = blas_report
    assert doctor_blas.advice(slow).endswith("pip install 'mlx-sleep[mkl]'")
    monkeypatch.setattr(shutil, "which", lambda tool: None)
    missing = {**blas_report, "status": "missing", "gflops": 7.0}
    assert doctor_blas.advice(missing).endswith("pip install 'mlx-sleep[mkl]'")
    monkeypatch.setattr(blas_choice, "can_use_mkl", lambda: False)  # on ARM
    assert doctor_blas.advice(slow) == doctor_blas.advice(missing) == ""


def test_doctor_leaves_the_choice_to_the_environment(blas_report, monkeypatch):
    monkeypatch.setenv(blas.BLAS_VARIABLE, "libother.so")
    assert doctor_blas.advice(blas_report) == "" and "nothing" in doctor_blas.calibrate()


def test_doctor_calibrates_by_command(monkeypatch):
    monkeypatch.setattr(doctor_blas, "calibrate", lambda: "OpenBLAS")
    app = typer.Typer()
    app.command()(doctor.doctor)
    assert "calibrated  OpenBLAS" in CliRunner().invoke(app, ["--calibrate"]).stdout
