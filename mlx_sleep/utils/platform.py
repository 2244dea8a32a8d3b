"""What this machine computes with: OpenBLAS for MLX's CPU backend, and facts for `doctor`.

MLX's Linux wheel links the reference BLAS. A BLAS loaded into the global symbol scope before
`mlx.core` takes its place and multiplies matrices tens of times faster, so `mlx_sleep` loads
OpenBLAS as its first act. This module knows nothing of models, and imports MLX only inside
functions that measure it.
"""

from __future__ import annotations

import ctypes
import os
import sys
import time
from dataclasses import dataclass

BLAS_VARIABLE = "MLX_SLEEP_BLAS"
"""Environment variable: `off`, or the path of a BLAS library to load in place of the system's."""

_NAMES = ("libopenblas.so.0", "libopenblas.so")
# What OpenBLAS itself reads, in its order.
_THREAD_VARIABLES = ("OPENBLAS_NUM_THREADS", "GOTO_NUM_THREADS", "OMP_NUM_THREADS")


@dataclass(frozen=True)
class Blas:
    """The outcome of `load_blas`.

    `status` is one of `loaded`, `late` (MLX was imported first: no effect), `off` (by the
    environment), `missing` (no library found), `failed` (`detail` has the loader's words) or
    `not needed` (not Linux, or MLX runs on CUDA). `detail` is the library's own description
    when it is loaded, or else the reason.
    """

    status: str
    detail: str = ""


def available_cpus() -> int:
    """CPUs that this process may use: its affinity mask, cut by the container's CPU quota."""
    try:
        cpus = len(os.sched_getaffinity(0))
    except AttributeError:  # macOS
        cpus = os.cpu_count() or 1
    quota = cgroup_cpus()
    return max(1, min(cpus, int(quota))) if quota else cpus


def cgroup_cpus(root: str = "/sys/fs/cgroup") -> float | None:
    """The CPU quota of this container in CPUs (cgroup v2, then v1), or None without one."""
    try:
        try:
            with open(f"{root}/cpu.max") as file:
                quota, period = file.read().split()
        except OSError:
            with open(f"{root}/cpu/cpu.cfs_quota_us") as file:
                quota = file.read()
            with open(f"{root}/cpu/cpu.cfs_period_us") as file:
                period = file.read()
        cpus = float(quota) / float(period)
    except (OSError, ValueError, ZeroDivisionError):  # v2 writes "max" for no quota
        return None
    return cpus if cpus > 0 else None  # v1 writes -1 for no quota


def nvidia_gpu() -> bool:
    """True when the NVIDIA driver shows a GPU to this process."""
    return os.path.exists("/dev/nvidiactl")


def mlx_distributions() -> dict[str, str]:
    """Installed MLX distributions and their versions, for example {"mlx": ..., "mlx-cpu": ...}."""
    from importlib import metadata  # slow to import

    found = {}
    for name in ("mlx", "mlx-metal", "mlx-cpu", "mlx-cuda-12", "mlx-cuda-13"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def _mlx_uses_cuda() -> bool:
    return nvidia_gpu() and any(name.startswith("mlx-cuda") for name in mlx_distributions())


def load_blas() -> Blas:
    """Load OpenBLAS so that MLX's CPU backend uses it. Must run before `import mlx.core`.

    Honours `MLX_SLEEP_BLAS`. OpenBLAS gets as many threads as `available_cpus` unless the user
    has set OPENBLAS_NUM_THREADS (or the other variables it reads): left alone, it starts one
    thread for every CPU of the host, which is ruinous in a container with a quota.

    Never raises: without OpenBLAS everything works, slowly.
    """
    wish = os.environ.get(BLAS_VARIABLE, "")
    if wish.lower() == "off":
        return Blas("off", f"{BLAS_VARIABLE}=off")
    if sys.platform != "linux" or (not wish and _mlx_uses_cuda()):
        return Blas("not needed")
    if "mlx.core" in sys.modules:  # its symbols are bound already
        return Blas("late", "mlx was imported before mlx_sleep")

    own_threads = not any(os.environ.get(name) for name in _THREAD_VARIABLES)
    if own_threads:
        os.environ["OPENBLAS_NUM_THREADS"] = str(available_cpus())
    try:
        return _load(wish)
    finally:
        if own_threads:  # read once, at load; other programs make their own choice
            del os.environ["OPENBLAS_NUM_THREADS"]


def _load(wish: str) -> Blas:
    errors = []
    for name in (wish,) if wish else _NAMES:
        try:
            library = ctypes.CDLL(name, mode=ctypes.RTLD_GLOBAL)
        except OSError as error:
            errors.append(str(error))
            continue
        return Blas("loaded", _describe(library, name))
    return Blas("failed", errors[0]) if wish else Blas("missing", "; ".join(errors))


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


def matmul_check(size: int = 1024, repeats: int = 3) -> tuple[float, float]:
    """Measure a [size, size] float32 product on MLX's CPU device.

    Returns (GFLOP/s of the best repeat, largest error against NumPy in float64 relative to the
    largest entry). The error is there because an OpenBLAS older than the processor can choose
    kernels that compute wrong results.
    """
    import mlx.core as mx
    import numpy as np

    rng = np.random.default_rng()
    a, b = rng.standard_normal((2, size, size)).astype(np.float32)
    best = float("inf")
    with mx.stream(mx.cpu):
        x, y = mx.array(a), mx.array(b)
        mx.eval(x @ y)  # warm-up
        for _ in range(repeats):
            start = time.perf_counter()
            z = x @ y
            mx.eval(z)
            best = min(best, time.perf_counter() - start)
    exact = a.astype(np.float64) @ b.astype(np.float64)
    error = np.abs(np.array(z) - exact).max() / np.abs(exact).max()
    return 2 * size**3 / best / 1e9, float(error)


def device() -> str:
    """What computes, in words: "AMD EPYC, CPU, mlx 0.32.4, OpenBLAS 0.3.21 (Zen kernels, ...)"."""
    import mlx.core as mx

    from .. import BLAS

    if mx.default_device() == mx.Device(mx.cpu):
        backend = "CPU"
    else:
        backend = "Metal" if mx.metal.is_available() else "CUDA"
    name = str(mx.device_info().get("device_name", "unknown"))
    parts = [name, backend, f"mlx {mlx_distributions().get('mlx', 'unknown')}"]
    if backend == "CPU":
        parts.append(BLAS.detail if BLAS.status == "loaded" else f"BLAS {BLAS.status}")
    return ", ".join(parts)
