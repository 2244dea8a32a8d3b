"""From a kernel's text to a shared library: the generated signature, the compiler, the cache.

The signature is the one that `mx.fast.metal_kernel` documents: template arguments, inputs (small
ones in the constant address space, scalars by reference, `NAME_shape`, `NAME_strides` and
`NAME_ndim` where the text mentions them), outputs, and Metal's thread attributes that the text
mentions. This module runs nothing.
"""

from __future__ import annotations

import functools
import hashlib
import os
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

from platformdirs import user_cache_dir

HERE = Path(__file__).parent
# -O1 keeps an access for every value that a kernel asks for twice with a write between.
FLAGS = ("-std=gnu++14", "-fPIC", "-g1", "-U_FORTIFY_SOURCE", "-ffp-contract=off", "-w")
WATCHED = ("-O1", "-fsanitize=thread", "-fsanitize=bounds")

# Metal's thread attributes and where runtime.h keeps them.
ATTRIBUTES = {
    "dispatch_threads_per_threadgroup": "three(ids->full_group_size)",
    "simdgroup_index_in_threadgroup": "ids->simdgroup",
    "simdgroups_per_threadgroup": "ids->simdgroups",
    "thread_index_in_simdgroup": "ids->lane",
    "thread_index_in_threadgroup": "ids->index",
    "thread_position_in_grid": "three(ids->in_grid)",
    "thread_position_in_threadgroup": "three(ids->in_group)",
    "threadgroup_position_in_grid": "three(ids->group)",
    "threadgroups_per_grid": "three(ids->threadgroups)",
    "threads_per_grid": "three(ids->grid)",
    "threads_per_simdgroup": "32",
    "threads_per_threadgroup": "three(ids->group_size)",
}
ARRAY = re.compile(r"\bthreadgroup\s+(\w+)\s+(\w+)\s*((?:\[[^\]]*\])+)\s*;")


@functools.cache
def compiler() -> str | None:
    """The system's C++ compiler, or None."""
    for name in (os.environ.get("CXX"), "g++", "clang++"):
        if name and shutil.which(name):
            return name
    return None


def cache_folder() -> Path:
    """Where compiled kernels are kept, each under the hash of all that went into it."""
    return Path(user_cache_dir("mlx-sleep")) / "kernels"


def signature(source: str, header: str, inputs, outputs, template) -> tuple[str, list[str]]:
    """The kernel's text as MLX writes it, and what C++ calls it with.

    inputs and outputs are lists of (name, C++ type, shape), template one of (name, C++ value).
    """
    parameters, arguments, index = [], [], 0

    def add(parameter, argument):
        nonlocal index
        parameters.append(f"{parameter} [[buffer({index})]]")
        arguments.append(argument.format(f"buffers[{index}]"))
        index += 1

    for name, kind, shape in inputs:
        size = int(functools.reduce(lambda a, b: a * b, shape, 1))
        space = "constant" if size < 8 else "device"
        if shape == ():
            add(f"const {space} {kind}& {name}", f"*(const {kind}*){{}}")
            continue
        add(f"const {space} {kind}* {name}", f"(const {kind}*){{}}")
        if f"{name}_shape" in source:
            add(f"const constant int* {name}_shape", "(const int*){}")
        if f"{name}_strides" in source:
            add(f"const constant int64_t* {name}_strides", "(const int64_t*){}")
        if f"{name}_ndim" in source:
            add(f"const constant int& {name}_ndim", "*(const int*){}")
    for name, kind, _ in outputs:
        add(f"device {kind}* {name}", f"({kind}*){{}}")
    for name, value in ATTRIBUTES.items():
        if name in source:
            parameters.append(f"{'uint3' if 'three' in value else 'uint'} {name} [[{name}]]")
            arguments.append(value)

    names = ", ".join(
        ("typename " if v[0].isalpha() and v not in ("true", "false") else "int ") + n
        for n, v in template
    )
    text = "\n".join(
        [
            '#line 1 "header"',
            header,
            f"template <{names}>" if template else "",
            "[[kernel]] void custom_kernel(",
            ",\n".join(parameters) + ") {",
            '#line 1 "kernel"',
            source,
            "}",
        ]
    )
    return text, arguments


def name_of(template) -> str:
    """The kernel with its template arguments."""
    return f"custom_kernel<{', '.join(v for _, v in template)}>" if template else "custom_kernel"


def wrap(source: str, header: str, inputs, outputs, template) -> str:
    """The C++ text of a kernel and of `harness_thread`, which calls it for one thread."""
    text, arguments = signature(source, header, inputs, outputs, template)
    text = ARRAY.sub(r"HARNESS_THREADGROUP(\1, \2, \3);", text)
    call = f"{name_of(template)}({', '.join(arguments)});"
    return (
        f'#include "msl.h"\n{text}\nusing harness::three;\n'
        'extern "C" UNWATCHED void harness_thread(void** buffers, const harness::Ids* ids) {\n'
        f"  {call}\n}}\n"
    )


def library(text: str) -> Path:
    """The shared library of a wrapped kernel, compiled unless the user's cache has it.

    Raises RuntimeError with the compiler's words.
    """
    runtime = _compile((HERE / "runtime.cpp").read_text(), "runtime", (*FLAGS, "-O2", "-c"), ".o")
    flags = (*FLAGS, *WATCHED, "-c")
    thing = _compile(text, "kernel", flags, ".o")
    return _compile(
        "", f"{thing.stem}-{runtime.stem}", ("-shared", str(thing), str(runtime)), ".so"
    )


def _compile(text: str, name: str, flags, suffix: str) -> Path:
    headers = "".join((HERE / h).read_text() for h in ("msl.h", "runtime.h"))
    key = hashlib.sha256("\0".join([compiler(), *flags, headers, text]).encode()).hexdigest()[:20]
    folder = cache_folder()
    target = folder / f"{name}-{key}{suffix}"
    if target.exists():
        return target
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as work:
        built = Path(work) / target.name
        command = [compiler(), *flags, "-o", str(built)]
        if text:
            source = Path(work) / "kernel.cpp"
            source.write_text(text)
            command += ["-I", str(HERE), "-I", str(HERE / "include"), str(source)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"the kernel does not compile:\n{done.stderr[:4000]}")
        built.replace(target)  # whole or not at all, for a run beside this one
    return target
