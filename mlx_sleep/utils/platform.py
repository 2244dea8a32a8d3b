"""Facts about this machine: CPUs, GPU, MLX, and how fast it multiplies matrices.

It knows nothing of models, and imports MLX only inside functions that measure it.
"""

from __future__ import annotations

import os
import time


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
