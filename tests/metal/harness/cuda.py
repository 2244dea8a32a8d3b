"""Runs the kernels' own text on an NVIDIA GPU, through nvcc and cuda.h in place of g++ and msl.h.

It shows what a CPU can't: real threads at real speed, with NVIDIA's compute-sanitizer watching
(cuda_checks.py). Like the harness it proves nothing about Apple's compiler or GPUs. No GPU
has run this yet: all that is known is that nvcc compiles every kernel (test_kernels_cuda.py).
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

from . import KernelError, build
from . import metal_kernel as on_the_cpu

FLAGS = ("-std=c++17", "-O2", "-lineinfo", "-w")
# Metal's thread attributes, as in build.py.
ATTRIBUTES = {
    "dispatch_threads_per_threadgroup": "three(blockDim)",
    "simdgroup_index_in_threadgroup": "index_in_group() / 32",
    "simdgroups_per_threadgroup": "(blockDim.x * blockDim.y * blockDim.z + 31) / 32",
    "thread_index_in_simdgroup": "index_in_group() % 32",
    "thread_index_in_threadgroup": "index_in_group()",
    "thread_position_in_grid": "in_grid()",
    "thread_position_in_threadgroup": "three(threadIdx)",
    "threadgroup_position_in_grid": "three(blockIdx)",
    "threadgroups_per_grid": "three(gridDim)",
    "threads_per_simdgroup": "32",
}
_SPACES = re.compile(r"\b(device|constant|threadgroup|thread)\b")
LAUNCH = """
#undef inline
extern "C" int cuda_launch(int n, void** data, const uint64_t* bytes, const uint8_t* kinds,
                           const uint32_t* grid, const uint32_t* threadgroup, char* message) {
  std::vector<char*> buffers(n);
  cudaError_t error = cudaSuccess;
  auto good = [&](cudaError_t now) { return (error = error ? error : now) == cudaSuccess; };
  for (int i = 0; i < n && good(cudaMalloc(&buffers[i], std::max<uint64_t>(bytes[i], 1))); ++i) {
    if (kinds[i] != 1) good(cudaMemcpy(buffers[i], data[i], bytes[i], cudaMemcpyHostToDevice));
  }
  unsigned block[3], blocks[3];
  for (int d = 0; d < 3; ++d) {
    block[d] = std::min(threadgroup[d], grid[d]);
    blocks[d] = (grid[d] + block[d] - 1) / block[d];
  }
  if (!error) {
    const dim3 all(blocks[0], blocks[1], blocks[2]), one(block[0], block[1], block[2]);
    msl::custom_kernel%s<<<all, one>>>(grid[0], grid[1], grid[2]%s);
    good(cudaGetLastError());
    good(cudaDeviceSynchronize());
  }
  for (int i = 0; i < n; ++i) {
    if (kinds[i] == 1) good(cudaMemcpy(data[i], buffers[i], bytes[i], cudaMemcpyDeviceToHost));
    cudaFree(buffers[i]);
  }
  if (error) strcpy(message, cudaGetErrorString(error));
  return error != cudaSuccess;
}
"""


def compiler() -> str | None:
    """nvcc, or None."""
    return shutil.which("nvcc")


def metal_kernel(name, input_names, output_names, source, header="", **_options):
    """`mx.fast.metal_kernel` on an NVIDIA GPU: `harness.metal_kernel`, with nothing counted."""
    return on_the_cpu(name, input_names, output_names, source, header, wrap=wrap, launch=launch)


def wrap(source: str, header: str, inputs, outputs, template) -> str:
    """The CUDA text of a kernel and of `cuda_launch`, which runs it; called as `build.wrap`."""
    parameters, arguments, lines = ["uint grid_x, uint grid_y, uint grid_z"], [], []

    def add(parameter, kind):
        parameters.append(parameter)
        arguments.append(f", ({kind})buffers[{len(arguments)}]")

    for name, kind, shape in inputs:
        add(f"const {kind}* {name}{'' if shape else '_'}", f"const {_outside(kind)}*")
        if not shape:
            lines.append(f"const {kind} {name} = *{name}_;")
    for name, kind, _ in outputs:
        add(f"{kind}* {name}", f"{_outside(kind)}*")
    lines.append(
        "if (in_grid().x >= grid_x || in_grid().y >= grid_y || in_grid().z >= grid_z) return;"
    )
    for name, value in ATTRIBUTES.items():
        if name in source:
            lines.append(f"const auto {name} = {value};")
    types = ("typename " if _type(value) else "int " for _, value in template)
    names = ", ".join(kind + name for kind, (name, _) in zip(types, template, strict=True))
    values = ", ".join(_outside(value) for _, value in template)
    text = "\n".join(
        [
            '#include "cuda.h"',
            "namespace msl {",
            '#line 1 "header"',
            header,
            f"template <{names}>" if template else "",
            f"__global__ void custom_kernel({', '.join(parameters)}) {{",
            *lines,
            '#line 1 "kernel"',
            source,
            "}",
            "}  // namespace msl",
        ]
    )
    text = _SPACES.sub("", build.ARRAY.sub(r"HARNESS_THREADGROUP(\1, \2, \3);", text))
    return text + LAUNCH % (f"<{values}>" if template else "", "".join(arguments))


def library(text: str, arch: str = "native") -> Path:
    """The shared library of a wrapped kernel, compiled unless the user's cache has it.

    RuntimeError with the compiler's words. arch is nvcc's; "native" needs a GPU.
    """
    flags = (*FLAGS, "-shared", "-Xcompiler", "-fPIC", f"-arch={arch}")
    known = "\0".join([*flags, (build.HERE / "cuda.h").read_text(), text])
    folder = build.cache_folder()
    target = folder / f"cuda-{hashlib.sha256(known.encode()).hexdigest()[:20]}.so"
    if target.exists():
        return target
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as work:
        source, built = Path(work) / "kernel.cu", Path(work) / target.name
        source.write_text(text)
        includes = ["-I", str(build.HERE), "-I", str(build.HERE / "include")]
        command = [compiler(), *flags, *includes, "-o", str(built), str(source)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(
                f"the kernel does not compile:\n{(done.stderr + done.stdout)[:4000]}"
            )
        built.replace(target)
    return target


def launch(text, name, buffers, results, grid, threadgroup) -> None:
    """Runs a wrapped kernel; KernelError with CUDA's words."""
    everything = [*buffers, *results]
    n = len(everything)
    message = ctypes.create_string_buffer(1024)
    failed = _loaded(library(text))(
        n,
        (ctypes.c_void_p * n)(*(x.ctypes.data for x in everything)),
        (ctypes.c_uint64 * n)(*(x.nbytes for x in everything)),
        (ctypes.c_uint8 * n)(*[0] * len(buffers), *[1] * len(results)),
        (ctypes.c_uint32 * 3)(*grid),
        (ctypes.c_uint32 * 3)(*threadgroup),
        message,
    )
    if failed:
        raise KernelError(f"{name}: {message.value.decode()}")


@functools.cache
def _loaded(path: Path):
    return ctypes.CDLL(str(path), mode=os.RTLD_LOCAL | os.RTLD_NOW).cuda_launch


def _type(value: str) -> bool:
    return value[0].isalpha() and value not in ("true", "false")


def _outside(kind: str) -> str:
    """A type's or a value's name outside of namespace msl, where cuda.h defines three types."""
    return f"msl::{kind}" if kind in ("half", "bfloat", "uint") else kind
