"""What `mlx-sleep doctor` says about the BLAS on a CPU, and its --calibrate there."""

from __future__ import annotations

import os
import shutil

from .. import BLAS
from ..utils import blas, blas_choice, platform
from ..utils.pip import pip_install

# GFLOP/s of one CPU in a chunk's products below which a BLAS is far from what it could be. Large
# products would tell less: they want all CPUs, and wait where the machine has other work.
_CHUNK = "256 of 32x64x64"
_SLOW = {"avx512f": 60, "avx2": 35}


def examine(cpu: bool) -> dict:
    """As JSON-able values; `cpu` when MLX computes on it."""
    report: dict = {"status": BLAS.status, "detail": BLAS.detail, "gflops": None, "error": None}
    if cpu:
        gflops, error = platform.matmul_check()
        report |= {"gflops": float(f"{gflops:.3g}"), "error": error}
    kept = blas.kept_choice() if _chosen_here() else None
    return {**report, "taken": kept and kept["detail"], "measured": kept["results"] if kept else []}


def wrong(report: dict) -> bool:
    """Whether products are; NaN is."""
    return report["error"] is not None and not report["error"] < blas_choice.LARGEST_ERROR


def calibrate() -> str:
    """Tries what is installed and keeps the fastest; says what was done."""
    if not _chosen_here():
        return f"nothing: {BLAS.detail or 'the BLAS is not of our choice'}"
    choice = blas_choice.choose(blas_choice.installed())
    if choice is None:
        return "nothing: there is no BLAS but MLX's own"
    failed = blas_choice.keep(choice)
    return choice.detail + (f", which can't be kept: {failed}" if failed else "")


def advice(report: dict) -> str:
    """The command that would make a CPU faster, or ''."""
    if wrong(report):
        return f"export {blas.BLAS_VARIABLE}=off"
    if os.environ.get(blas.BLAS_VARIABLE) and report["status"] in ("off", "failed"):
        return f"unset {blas.BLAS_VARIABLE}"
    mkl = pip_install("mlx-sleep[mkl]") if blas_choice.can_use_mkl() else ""
    candidates = blas_choice.installed()
    has_mkl = any("mkl" in candidate.library for candidate in candidates)
    if report["status"] == "missing" and not has_mkl:
        return _install_openblas() or mkl
    if not _chosen_here():
        return ""
    kept = blas.kept_choice()
    if kept is None or kept["candidates"] != [list(candidate) for candidate in candidates]:
        return "mlx-sleep doctor --calibrate"
    taken = [r["gflops"] for r in kept["results"] if r["detail"] == kept["detail"]]
    return mkl if not has_mkl and taken and _is_slow(taken[0].get(_CHUNK)) else ""


def lines(report: dict) -> list[tuple[str, str]]:
    words = {
        "loaded": report["detail"],
        "late": f"OpenBLAS may not be in use: {report['detail']}",
        "off": f"MLX's reference BLAS ({report['detail']})",
        "missing": "MLX's reference BLAS: OpenBLAS was not found",
        "failed": f"MLX's reference BLAS: {report['detail']}",
        "not needed": "the system's own",
    }[report["status"]]
    speed = f", {report['gflops']:g} GFLOP/s (1024x1024 float32)" if report["gflops"] else ""
    rows = [("BLAS", words + speed)]
    for result in report["measured"]:
        taken = ", taken" if result["detail"] == report["taken"] else ""
        rows.append(("measured", f"{result['detail']}: {_result(result)}{taken}"))
    return rows


def _chosen_here() -> bool:
    """Whether what was measured decides: on Linux, unless the environment does."""
    by_user = os.environ.get(blas.BLAS_VARIABLE)
    return not by_user and BLAS.status not in ("not needed", "late")


def _is_slow(gflops: float | None) -> bool:
    flags = blas.cpu_fields().get("flags", "").split()
    bound = next((bound for flag, bound in _SLOW.items() if flag in flags), 0)
    return gflops is not None and gflops < bound


def _result(result: dict) -> str:
    """ "251 GFLOP/s, small products 84, error 6e-07", or why it is barred."""
    error = "" if result["error"] is None else f"error {result['error']:.0e}"
    if result["barred"]:
        return result["barred"] + (f" ({error})" if error else "")
    rates = [f"{gflops:.3g} ({size})" for size, gflops in result["gflops"].items()]
    return f"GFLOP/s {', '.join(rates[:3])}, {error}"


def _install_openblas() -> str:
    sudo = "" if os.geteuid() == 0 else "sudo "
    for tool, command in (
        ("apt-get", "apt-get install libopenblas0-pthread"),
        ("dnf", "dnf install openblas"),
        ("pacman", "pacman -S openblas"),
    ):
        if shutil.which(tool):
            return sudo + command
    return ""
