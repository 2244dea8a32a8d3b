"""The BLAS under MLX's CPU backend on Linux: which one, and loading it before `mlx.core`.

MLX's Linux wheel links the reference BLAS, whose symbols it looks up like everybody's. A BLAS that
was loaded into the global symbol scope before `mlx.core` comes first there and multiplies matrices
tens of times faster, so `mlx_sleep` loads one as its first act: the one that was measured to be
right and fastest on this machine (`blas_choice`), or OpenBLAS as it is found. Only the standard
library is imported here, and of that little, because every start waits for it.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import sys
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.machinery import PathFinder
from pathlib import Path

from .platform import available_cpus, mlx_distributions, nvidia_gpu

BLAS_VARIABLE = "MLX_SLEEP_BLAS"
"""Environment variable: `off`, or the path of a BLAS library to load whatever was measured."""

OPENBLAS = ("libopenblas.so.0", "libopenblas.so")
# What OpenBLAS itself reads, in its order.
_THREAD_VARIABLES = ("OPENBLAS_NUM_THREADS", "GOTO_NUM_THREADS", "OMP_NUM_THREADS")


@dataclass(frozen=True)
class Blas:
    """The outcome of `load_blas`.

    `status` is one of `loaded`, `late` (MLX was imported first: no effect), `off` (by the
    environment, or because all others were wrong here), `missing` (no library found), `failed`
    (`detail` has the loader's words) or `not needed` (not Linux, or MLX runs on CUDA). `detail` is
    the library's own description when it is loaded, or else the reason; `path` where it is.
    """

    status: str
    detail: str = ""
    path: str = ""


def load_blas() -> Blas:
    """Load a BLAS so that MLX's CPU backend uses it. Must run before `import mlx.core`.

    Honours `MLX_SLEEP_BLAS`, then what was measured. It gets as many threads as `available_cpus`
    unless the user has set OPENBLAS_NUM_THREADS (or the other variables OpenBLAS reads): left
    alone, it starts one thread for every CPU of the host, which is ruinous in a container with a
    quota.

    Never raises: without OpenBLAS everything works, slowly.
    """
    wish = os.environ.get(BLAS_VARIABLE, "")
    if wish.lower() == "off":
        return Blas("off", f"{BLAS_VARIABLE}=off")
    if sys.platform != "linux" or (not wish and _mlx_uses_cuda()):
        return Blas("not needed")
    if "mlx.core" in sys.modules:  # its symbols are bound already
        return Blas("late", "mlx was imported before mlx_sleep")
    if wish:
        return _load((wish,), {})
    kept = kept_choice()
    if kept and not kept["library"]:
        return Blas("off", "every other BLAS that is installed computes wrong results here")
    if kept and (blas := _load((kept["library"],), kept["settings"], kept["detail"])):
        if blas.status == "loaded":
            return blas
    blas = _load(OPENBLAS, {})
    return blas if blas.status == "loaded" else Blas("missing", blas.detail)


def _mlx_uses_cuda() -> bool:
    return nvidia_gpu() and any(name.startswith("mlx-cuda") for name in mlx_distributions())


def _load(names: tuple[str, ...], settings: dict[str, str], detail: str = "") -> Blas:
    """The first of the names that loads, with `settings` in its environment."""
    settings = {name: value for name, value in settings.items() if name not in os.environ}
    if not any(os.environ.get(name) for name in _THREAD_VARIABLES):
        settings["OPENBLAS_NUM_THREADS"] = str(available_cpus())
    errors = []
    for name in names:
        try:
            with _environment(settings):
                library = ctypes.CDLL(name, mode=ctypes.RTLD_GLOBAL)
        except OSError as error:
            errors.append(str(error))
            continue
        if hasattr(library, "MKL_Set_Threading_Layer"):
            return Blas("loaded", _set_up_mkl(library, name, detail), _path(library))
        return Blas("loaded", _describe(library, name), _path(library))
    return Blas("failed", errors[0])


@contextlib.contextmanager
def _environment(variables: dict[str, str]) -> Iterator[None]:
    """Variables that a library reads once, when it is loaded; other programs make their choice."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _describe(library: ctypes.CDLL, name: str) -> str:
    try:
        config = library.openblas_get_config
        threads = library.openblas_get_num_threads()
    except AttributeError:  # another BLAS, by MLX_SLEEP_BLAS
        return name
    config.restype = ctypes.c_char_p
    # "OpenBLAS 0.3.21 NO_LAPACKE DYNAMIC_ARCH NO_AFFINITY Zen MAX_THREADS=128"
    words = [w for w in config().decode().split() if "=" not in w]
    core = words[-1] if len(words) > 2 else "?"
    return f"{' '.join(words[:2])} ({core} kernels, {threads} thread{'s'[: threads != 1]})"


def _set_up_mkl(library: ctypes.CDLL, name: str, detail: str) -> str:
    """MKL's threads, before its first product; its description, or `detail` where that is known.

    Threads are TBB's where it is there: OpenMP's wait for each other in a loop at every small
    product, which on a machine with other work took a training step from 0.1 to 1.3 seconds.
    """
    library.MKL_Set_Interface_Layer(0)  # 32-bit sizes, as MLX calls it
    counts = [os.environ.get(name) for name in ("MKL_NUM_THREADS", *_THREAD_VARIABLES)]
    if "1" in counts or available_cpus() == 1:
        threads, layer = "1 thread", 1
    elif _loads(os.path.join(os.path.dirname(name), "libtbb.so.12")):
        threads, layer = "TBB threads", 4
    else:
        threads, layer = "OpenMP threads", 0
    if "MKL_THREADING_LAYER" not in os.environ:
        library.MKL_Set_Threading_Layer(layer)
    if detail:  # asking MKL for its version takes 30 ms
        return detail
    version = ctypes.create_string_buffer(256)
    library.MKL_Get_Version_String(version, len(version))
    # "Intel(R) oneAPI Math Kernel Library Version 2026.2-Product Build ..."
    words = version.value.decode(errors="replace").partition("Version ")[2].split("-")
    return f"MKL {words[0]} ({threads})"


def _loads(path: str) -> bool:
    try:
        ctypes.CDLL(path)
    except OSError:
        return False
    return True


def _path(library: ctypes.CDLL) -> str:
    """Where the loader found it, or "" where it does not tell (dlinfo, glibc and musl)."""

    class LinkMap(ctypes.Structure):
        _fields_ = [("address", ctypes.c_void_p), ("name", ctypes.c_char_p)]

    found = ctypes.POINTER(LinkMap)()
    try:
        failed = ctypes.CDLL(None).dlinfo(
            ctypes.c_void_p(library._handle), 2, ctypes.byref(found)
        )  # 2 is RTLD_DI_LINKMAP
    except AttributeError:
        return ""
    return "" if failed else os.path.realpath(os.fsdecode(found.contents.name))


# --- what was measured ---------------------------------------------------------------------


def kept_choice() -> dict | None:
    """What `blas_choice` kept for this machine: its row in the file, or None.

    A row counts while all libraries that it is about are as they were.
    """
    try:
        row = json.loads(choice_file().read_bytes())[machine()]
        for path, stamp in row["stamps"].items():
            if stamp_of(path) != stamp:
                return None
        strings = row["library"], row["detail"], *row["settings"], *row["settings"].values()
        return row if all(isinstance(x, str) for x in strings) else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None


def choice_file() -> Path:
    """blas.json in the user's cache folder; platformdirs says the same, and takes 10 ms."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "mlx-sleep/blas.json"


def machine() -> str:
    """What a choice holds for: the processor, the CPUs that may be used, and MLX's library."""
    spec = PathFinder.find_spec("mlx")  # a namespace: other folders may be part of it
    folders = spec.submodule_search_locations if spec else None
    files = (f"{folder}/lib/libmlx.so" for folder in folders or ())
    library = next(filter(os.path.exists, files), "")
    fields = cpu_fields()
    kind = f"{fields.get('model name', 'CPU')} {zlib.crc32(repr(fields).encode()):08x}"
    return f"{kind} x {available_cpus()}, {library} {stamp_of(library)}"


def cpu_fields(path: str = "/proc/cpuinfo") -> dict[str, str]:
    """The fields of /proc/cpuinfo that tell one kind of processor from another (x86 and ARM)."""
    x86 = ("vendor_id", "cpu family", "model", "model name", "stepping", "flags")
    arm = ("CPU implementer", "CPU variant", "CPU part", "CPU revision", "Features")
    try:
        with open(path, "rb", buffering=0) as file:
            text = file.read(8192).decode(errors="replace")  # all of it takes long on a large host
    except OSError:
        return {}
    rows = (line.partition(":") for line in text.split("\n\n")[0].splitlines())
    return {n.strip(): value.strip() for n, _, value in rows if n.strip() in x86 + arm}


def stamp_of(path: str) -> list[int] | None:
    """Size and time of a file, which tell one version from another; None where there is none."""
    try:
        found = os.stat(path)
    except OSError:
        return None
    return [found.st_size, found.st_mtime_ns]
