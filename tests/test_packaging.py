"""Wheel, sdist and editable install: what is in them, and that it imports from any folder."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from email import message_from_bytes
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = {
    "mlx_sleep": "mlx_sleep",
    "kernels": "mlx_sleep/kernels",
    "convert": "mlx_sleep/convert",
}
LARGEST_WHEEL = 40e6  # bytes


def run_python(code: str, cwd: Path, **environment: str) -> str:
    environment = {**os.environ, **environment}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=cwd, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def build_wheel(source: Path, built: Path) -> Path:
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation"]
    done = subprocess.run(
        [*command, "--wheel-dir", str(built), str(source)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return next(built.glob("*.whl"))


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """A copy of the sources, with one more file of each kind of data, and an earlier build's."""
    source = tmp_path_factory.mktemp("source")
    build = ("pyproject.toml", "setup.py", "MANIFEST.in")
    for name in (*build, "README.md", "LICENSE", "mlx_sleep_start.py"):
        shutil.copy(ROOT / name, source)
    for name in PACKAGES:
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    (source / "kernels" / "probe.metal").write_text("// a kernel\n")
    (source / "mlx_sleep" / "embedded").mkdir(exist_ok=True)
    (source / "mlx_sleep" / "embedded" / "probe.safetensors").write_bytes(b"weights")
    (source / "build" / "lib" / "mlx_sleep").mkdir(parents=True)
    (source / "build" / "lib" / "mlx_sleep" / "removed.py").write_text("# since then\n")
    (source / "tests").mkdir()
    (source / "tests" / "helper.py").write_text("# as sources of tests are\n")
    return source


@pytest.fixture(scope="module")
def wheel(source, tmp_path_factory) -> Path:
    return build_wheel(source, tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory) -> Path:
    target = tmp_path_factory.mktemp("installed")
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index"]
    subprocess.run([*command, "--target", str(target), str(wheel)], check=True)
    return target


def test_wheel_holds_every_source_and_data_file_and_no_other(wheel):
    expected = {"mlx_sleep_start.py"}
    expected |= {"mlx_sleep/kernels/probe.metal", "mlx_sleep/embedded/probe.safetensors"}
    for folder, place in PACKAGES.items():
        for file in (ROOT / folder).rglob("*"):
            if file.is_file() and file.parent.name != "__pycache__":
                expected.add(f"{place}/{file.relative_to(ROOT / folder).as_posix()}")
    names = zipfile.ZipFile(wheel).namelist()
    assert {name for name in names if ".dist-info/" not in name} == expected


def test_wheel_is_small(wheel):
    assert wheel.stat().st_size <= LARGEST_WHEEL


def test_sdist_has_the_tests_and_makes_the_same_wheel(source, wheel, tmp_path):
    code = f"from setuptools import build_meta; build_meta.build_sdist({str(tmp_path)!r})"
    run_python(code, source)
    with tarfile.open(next(tmp_path.glob("*.tar.gz"))) as archive:
        archive.extractall(tmp_path, filter="data")
    (unpacked,) = (path for path in tmp_path.iterdir() if path.is_dir())
    assert (unpacked / "tests" / "helper.py").is_file() and not (unpacked / "build").exists()
    rebuilt = build_wheel(unpacked, tmp_path)
    files = [zipfile.ZipFile(path).infolist() for path in (wheel, rebuilt)]
    contents = [
        {file.filename: file.CRC for file in infos if not file.filename.endswith("RECORD")}
        for infos in files
    ]
    assert contents[0] == contents[1]


def test_wheel_metadata(wheel):
    import mlx_sleep

    archive = zipfile.ZipFile(wheel)
    info = f"mlx_sleep-{mlx_sleep.__version__}.dist-info"
    metadata = message_from_bytes(archive.read(f"{info}/METADATA"))
    requires = {line.replace('"', "'") for line in metadata.get_all("Requires-Dist")}
    assert "mlx>=0.32; sys_platform == 'darwin'" in requires
    assert "mlx[cpu]>=0.32; sys_platform == 'linux'" in requires
    assert any(line.startswith("mlx[cuda13]") and "extra == 'cuda'" in line for line in requires)
    assert metadata["License-Expression"] == "Apache-2.0"
    assert f"{info}/licenses/LICENSE" in archive.namelist()
    assert b"mlx-sleep = mlx_sleep_start:main" in archive.read(f"{info}/entry_points.txt")


def test_wheel_imports(installed, tmp_path):
    code = (
        "import mlx_sleep.kernels, mlx_sleep.convert.quantize, mlx_sleep.models.load as load\n"
        "from importlib.resources import files\n"
        "print(mlx_sleep.kernels.__file__)\nprint(mlx_sleep.convert.__file__)\n"
        "print((files('mlx_sleep.kernels') / 'probe.metal').is_file())\n"
        "print((load.EMBEDDED / 'probe.safetensors').is_file())\n"
    )
    *places, metal, weights = run_python(code, tmp_path, PYTHONPATH=str(installed)).splitlines()
    assert places == [
        str(installed / "mlx_sleep" / name / "__init__.py") for name in ("kernels", "convert")
    ]
    assert metal == weights == "True"


@pytest.mark.parametrize("from_root", [True, False])
def test_editable_install_imports(from_root, tmp_path):
    code = (
        "import mlx_sleep.kernels as k, mlx_sleep.convert.quantize as q\n"
        "print(k.__file__, q.__file__, sep='\\n')"
    )
    places = run_python(code, ROOT if from_root else tmp_path).splitlines()
    assert [Path(place).resolve() for place in places] == [
        ROOT / "kernels" / "__init__.py",
        ROOT / "convert" / "quantize.py",
    ]


def test_top_level_names_are_not_taken(tmp_path):
    """`kernels` is also a package that transformers looks for; ours must not answer for it."""
    code = (
        "import importlib.util as u\n"
        "for name in ('kernels', 'convert'):\n"
        "    spec = u.find_spec(name)\n"
        "    print(spec.origin if spec else None)\n"
    )
    assert str(ROOT) not in run_python(code, tmp_path)


def test_transformers_is_not_misled_by_our_kernels_folder():
    code = "from transformers.utils.import_utils import is_kernels_available as f; print(f())"
    from importlib.util import find_spec

    if (spec := find_spec("kernels")) and not str(spec.origin).startswith(str(ROOT)):
        pytest.skip("the kernels package is installed")
    assert run_python(code, ROOT).strip() == "False"
