"""What Apple's compiler would refuse and a CPU runs: address spaces, transpose flags, plain text.

clang compiles the kernels' own text, in the signature that MLX writes, against declarations whose
address spaces are real (address_spaces/). Inputs of less than 8 elements are in the constant
address space, so that each kernel is compiled for small calls and for large ones.
"""

from __future__ import annotations

import mlx_sleep  # isort: skip  (OpenBLAS before MLX)
import functools
import re
import shutil
import subprocess
from importlib import resources
from pathlib import Path

import mlx.core as mx
import mlx_lm
import pytest

from mlx_sleep.kernels import chunks, conv, delta_attention, gated_delta, source, ssd

from . import harness
from .harness import build
from .kernel_checks import (
    draw_conv,
    draw_delta_attention_mixer,
    draw_gated_delta_mixer,
    draw_ssd_mixer,
)

assert mlx_sleep  # imported for its effect
HERE = Path(__file__).parent / "address_spaces"
FLAGS = ("-x", "c++", "-std=c++14", "-fsyntax-only", "-nostdinc", "-nostdinc++", "-w", "-I", HERE)
FILES = (
    "common.metal",
    "conv.metal",
    "delta_attention_step.metal",
    "gated_delta_backward.metal",
    "gated_delta_prefill.metal",
    "gated_delta_step.metal",
    "ssd_backward.metal",
    "ssd_prefill.metal",
    "ssd_step.metal",
)
TYPES = (mx.float32, mx.float16, mx.bfloat16)
# B, T, Hk, Hv, Dk, Dv: every input small enough for the constant address space, and others.
SHAPES = (
    (1, 1, 1, 1, 32, 32),
    (2, 20, 2, 4, 128, 136),
    (1, 9, 1, 3, 136, 64),
    (1, 3, 1, 1, 256, 256),
)


def errors(clang: str, text: str) -> list[str]:
    """What clang says against a text; [] when it takes it."""
    text = "#include <metal_stdlib>\nusing namespace metal;\n" + text
    done = subprocess.run([clang, *FLAGS, "-"], input=text, capture_output=True, text=True)
    found = [line for line in done.stderr.splitlines() if "error:" in line]
    assert bool(found) == bool(done.returncode), done.stderr
    return found


@functools.cache
def compiler() -> str | None:
    """A clang that knows the 16-bit types (15 or newer on x86), or None."""
    for name in ("clang", *(f"clang-{n}" for n in range(30, 14, -1))):
        if shutil.which(name) and not errors(name, "half a; bfloat b;"):
            return name
    return None


needs_clang = pytest.mark.skipif(compiler() is None, reason="no clang 15 or newer: install clang")


def msl(source_text, header, inputs, outputs, template) -> str:
    """MLX's text and its explicit instantiation, with the one word that is not clang's."""
    text, _ = build.signature(source_text, header, inputs, outputs, template)
    # A threadgroup array is a local variable in Metal only.
    text = build.ARRAY.sub(r"static threadgroup \1 \2\3;", text)
    name = build.name_of(template)
    return f"{text}\ntemplate decltype({name}) {name};\n"


@pytest.fixture
def launched(monkeypatch):
    """The texts of all launches, as (kernel, text). Nothing runs: results are zeros."""
    texts = []

    def launch(text, name, _buffers, results, _grid, _threadgroup):
        texts.append((name.removeprefix(source.PREFIX), text))
        for x in results:
            x[...] = 0

    @functools.cache
    def kernel(file, name):
        known = source.read(file)[name]
        inputs = source.PREFIX + name, known.inputs, known.outputs, known.body, known.header
        return harness.metal_kernel(*inputs, wrap=msl, launch=launch)

    for module in (chunks, conv, delta_attention, gated_delta, ssd):
        monkeypatch.setattr(module, "kernel", kernel)
    return texts


def launch_rules(B, T, Hk, Hv, Dk, Dv, dtype, masked):
    """prefill and backward of both rules, with the skip and without."""
    q, k = (mx.zeros((B, T, Hk, Dk), dtype) for _ in "qk")
    v = mx.zeros((B, T, Hv, Dv), dtype)
    g, beta = (mx.zeros((B, T, Hv)) for _ in "gb")
    state, D = mx.zeros((B, Hv, Dv, Dk)), mx.zeros((Hv,), dtype)
    mask = mx.ones((B, T), mx.bool_) if masked else None
    inputs = q, k, v, g, beta, state
    gated_delta.prefill(*inputs, mask)
    gated_delta.backward(*inputs, v, state, mask)
    for skip in (None, D):
        ssd.prefill(*inputs, mask, skip)
        ssd.backward(*inputs, v, state, mask, skip)


def launch_steps(rng, B, T, Hk, Hv, Dk, Dv, dtype, masked):
    shape = {"B": B, "Hk": Hk, "Hv": Hv, "Dk": Dk, "Dv": Dv, "K": 4 if masked else 2}
    *inputs, eps, state, Hk = draw_gated_delta_mixer(rng, **shape)
    gated_delta.step(*(x.astype(dtype) for x in inputs), eps, state, Hk)
    *inputs, state, Hk = draw_ssd_mixer(rng, **shape)
    ssd.step(*(x.astype(dtype) for x in inputs), state, Hk, (0.0, float("inf")))
    *inputs, eps, state = draw_delta_attention_mixer(rng, **shape)
    write = mx.ones((B,), mx.bool_) if masked else None
    delta_attention.step(*(x.astype(dtype) for x in inputs), eps, state, write)


def launch_convs(rng, B, T, dtype, masked):
    for dynamic in (False, True):
        for C in (1, 70):
            inputs = [mx.array(x, dtype) for x in draw_conv(rng, dynamic, B=B, T=T, C=C)]
            mask = mx.ones((B, T), mx.bool_) if masked else None
            conv.forward(*inputs, mask)
            conv.backward(*inputs, inputs[0], inputs[2], mask)


@needs_clang
@pytest.mark.parametrize("dtype", TYPES, ids=lambda t: str(t).removeprefix("mlx.core."))
def test_every_kernel_compiles_with_address_spaces(launched, rng, dtype):
    for i, shape in enumerate(SHAPES):
        masked = i % 2 == 1
        launch_rules(*shape, dtype, masked)
        launch_steps(rng, *shape, dtype, masked)
        launch_convs(rng, *shape[:2], dtype, masked)
    assert {name for name, _ in launched} == {k for file in FILES for k in source.read(file)}
    for name, text in dict.fromkeys(launched):
        assert errors(compiler(), text) == [], name


WRONG = {
    "a pointer of no address space": (
        "threadgroup float* own_half =",
        "float* own_half =",
    ),
    "device for threadgroup": (
        "const threadgroup float* other_half",
        "const device float* other_half",
    ),
    "a function that takes any pointer": (
        "decay(const threadgroup float* g",
        "decay(const float* g",
    ),
    "an input is written": ("g_chunk[t] = real", "g[t] = real"),
    "a load through a pointer of no address space": (
        "simdgroup_load(x, P + ",
        "const float* any = (const float*)P; simdgroup_load(x, any + ",
    ),
    "a transpose flag that is no constant": (
        "simdgroup_load(x, k_chunk + 8 * i * row_size + d, row_size);",
        "simdgroup_load(x, k_chunk + 8 * i * row_size + d, row_size, ulong2(0, 0), i == lane);",
    ),
    "an undeclared name": ("precise::exp(sum)", "precise::exp(total)"),
}


@needs_clang
@pytest.mark.parametrize("what", WRONG)
def test_wrong_texts_are_refused(launched, what):
    launch_rules(*SHAPES[1], mx.float32, False)
    text = next(text for name, text in launched if name == "gated_delta_prefill")
    right, wrong = WRONG[what]
    assert text.count(right) == 1
    assert errors(compiler(), text.replace(right, wrong)) != []


@needs_clang
def test_a_large_input_taken_for_a_small_one_is_refused():
    """A pointer to `constant` memory is none to `device` memory."""
    text = "kernel_body(const {} float* x) {{ const device float* y = x; }}"
    assert errors(compiler(), "void " + text.format("device")) == []
    assert errors(compiler(), "void " + text.format("constant")) != []


@pytest.mark.parametrize("file", FILES)
def test_plain_text(file):
    """ASCII, no double, and every transpose flag is a literal."""
    raw = (resources.files("mlx_sleep.kernels") / file).read_bytes()
    assert raw.isascii()
    code = re.sub(r"//[^\n]*", "", raw.decode())
    assert (
        re.findall(r"(?<![\w.])(?:\d+\.\d*|\.\d+)(?:e[-+]?\d+)?(?![\d.fe])|\bdouble\b", code) == []
    )
    flags = re.findall(r"ulong2\([^)]*\),\s+(.*?)\);", code)
    assert set(flags) <= {"true", "false"}


def test_all_files_are_here():
    folder = resources.files("mlx_sleep.kernels")
    assert sorted(f.name for f in folder.iterdir() if f.name.endswith(".metal")) == list(FILES)


def test_no_name_is_one_of_mlx_lm(monkeypatch):
    """Metal looks kernels up by name in one process."""
    made = []
    monkeypatch.setattr(mx.metal, "is_available", lambda: True)
    monkeypatch.setattr(mx.fast, "metal_kernel", lambda name, *_rest: made.append(name))
    for file in FILES:
        for kernel in source.read(file).values():
            source.build(kernel)
    folder = Path(mlx_lm.__file__).parent / "models"
    texts = [path.read_text() for path in folder.glob("*.py")]
    theirs = {name for text in texts for name in re.findall(r'\bname=f?"(\w+)', text)}
    assert "gated_delta_step" in theirs and theirs.isdisjoint(made)
    assert len(set(made)) == len(made) == 9 and all(n.startswith("mlx_sleep_") for n in made)
