"""`mlx-sleep doctor`: what this installation computes with, and what would make it faster.

It only looks and measures, and keeps nothing unless --calibrate asks for it.
"""

from __future__ import annotations

import os
import platform as python_platform
import sys
import tempfile
from dataclasses import asdict
from importlib import metadata, resources
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from ..utils import platform
from ..utils.errors import UserError
from ..utils.files import one_line
from ..utils.pip import pip_install
from . import doctor_blas, output
from .model_names import choose
from .options import Json, Model

if TYPE_CHECKING:  # it imports MLX
    from ..models.base import SleepModel

_USUAL_HEADS = (16, 32, 128, 128)  # Hk, Hv, Dk, Dv of Qwen3-Next


def doctor(
    as_json: Json = False,
    calibrate: Annotated[
        bool,
        typer.Option(
            "--calibrate",
            help="Measure now what is fastest: the BLAS on a CPU, the ops of --model on a Mac.",
        ),
    ] = False,
    model: Model = None,
):
    """Say which backend, BLAS and kernels are in use, and what would make them faster.

    The exit code is 0 when mlx-sleep can be used on this machine.

    Example: mlx-sleep doctor
    """
    if model is not None and not calibrate:
        raise UserError("--model is for --calibrate; add it")
    calibrated = _calibrate(model) if calibrate else ""
    report = examine() | {"calibrated": calibrated}
    if as_json:
        output.print_json(report)
    else:
        output.line("\n".join(_lines(report)))
    raise typer.Exit(0 if report["usable"] else 1)


def examine() -> dict:
    """Everything that doctor prints, as JSON-able values."""
    report: dict[str, Any] = {
        "command": "doctor",
        "versions": _versions(),
        "device": None,
        "backend": None,
        "blas": {},
        "ops": {},
        "odd_heads": "",
        "kernels": _kernels(),
        "calibrated": "",
        "verdicts": {},
        "model": None,
        "data": _data_folder(),
        "problems": [],
    }
    problems = report["problems"]
    try:
        import mlx.core as mx
    except ImportError as error:
        report["blas"] = doctor_blas.examine(cpu=False)
        problems.append(f"MLX cannot be imported: {one_line(error)}")
    else:
        report["backend"] = backend = _backend(mx)
        report["device"] = str(mx.device_info().get("device_name", mx.default_device()))
        report["blas"] = blas = doctor_blas.examine(cpu=backend == "CPU")
        if doctor_blas.wrong(blas):
            problems.append(
                f"matrix products are wrong on this CPU (relative error {blas['error']:.0e})"
            )
        report["ops"] = _ops()
        report["odd_heads"] = _odd_heads()
        report["verdicts"] = _verdicts()
        report["model"] = _embedded_model()
        if report["model"]["problem"]:
            problems.append(report["model"]["problem"])
    if report["data"]["problem"]:
        problems.append(report["data"]["problem"])
    report["advice"] = _advice(report)
    report["usable"] = not problems
    return report


def _calibrate(model: str | None) -> str:
    """On a CPU judges the BLAS, on Metal what a model asks of the ops, again if they have been;
    says what was done."""
    from ..models import calibrate, load
    from ..ops.paths import VARIABLE, by_verdict

    if os.environ.get(VARIABLE):
        return f"nothing, because {VARIABLE} decides; unset it"
    if not by_verdict():
        if model is not None:
            raise UserError("--model is for a Metal GPU, which this machine does not have")
        return doctor_blas.calibrate()
    chosen = choose(model)
    loaded, _ = load.load_model(chosen.open(), adapter_path=chosen.adapter)
    calibrate.calibrate(cast("SleepModel", loaded), gradients=True, again=True)
    return f"for {chosen.name}"


def _verdicts() -> dict[str, dict]:
    """What was measured on this machine, by op, use, sizes and dtypes; nothing without Metal."""
    from ..ops.paths import by_verdict
    from ..ops.verdicts import verdicts

    if not by_verdict():
        return {}
    return {name: asdict(verdict) for name, verdict in sorted(verdicts().all().items())}


def _versions() -> dict[str, str]:
    versions = {"python": python_platform.python_version()}
    versions |= platform.mlx_distributions()
    for name in ("mlx-sleep", "mlx-lm", "transformers", "numpy"):
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = "not installed"
    return versions


def _backend(mx) -> str:
    if mx.default_device() == mx.Device(mx.cpu):
        return "CPU"
    return "Metal" if mx.metal.is_available() else "CUDA"


def _ops() -> dict[str, dict[str, str]]:
    """The path of each op for a prompt and for a single token, with heads like Qwen3-Next's."""
    sizes = {"gated_delta": _USUAL_HEADS, "ssd": _USUAL_HEADS, "short_conv": (8192, 4)}
    return {
        op.removeprefix("short_"): {use: _path(op, use, these) for use in ("prompt", "token")}
        for op, these in sizes.items()
    }


def _odd_heads() -> str:
    """The path of a prompt whose heads the kernels in use do not support; "" for the usual one."""
    odd = _path("gated_delta", "prompt", (16, 32, 20, 20))
    return "" if odd == _path("gated_delta", "prompt", _USUAL_HEADS) else odd


def _path(op: str, use: str, sizes: tuple[int, ...]) -> str:
    """The path of an op, without a verdict where verdicts decide."""
    from ..ops.paths import path, recording
    from ..ops.verdicts import Shape

    with recording():  # nobody computes with it: it is not to be judged
        return path(Shape(op, use, sizes, ()))


def _kernels() -> list[str]:
    """The Metal kernel sources in the package."""
    files = resources.files("mlx_sleep.kernels").iterdir()
    return sorted(file.name for file in files if file.name.endswith(".metal"))


def _embedded_model() -> dict:
    from ..models import load

    found = {"path": str(load.EMBEDDED), "fingerprint": None, "problem": None}
    try:
        _, config = load.load_model(load.EMBEDDED)
        found["fingerprint"] = load.fingerprint(load.EMBEDDED)
        if found["fingerprint"] != config.get("fingerprint"):
            found["problem"] = "the embedded model is damaged: reinstall mlx-sleep"
    except UserError as error:
        found["problem"] = f"the embedded model cannot be used: {error}"
    return found


def _data_folder() -> dict:
    from ..memory import data_dir

    folder = data_dir()
    found = {"path": str(folder), "problem": None}
    existing = next(p for p in (folder, *folder.absolute().parents) if p.exists())
    try:
        with tempfile.TemporaryFile(dir=existing) as file:
            file.write(b"1")
    except OSError as error:
        found["problem"] = (
            f"memories cannot be written to {folder} ({error.strerror}): "
            "set MLX_SLEEP_HOME to a folder you can write to"
        )
    return found


def _advice(report: dict) -> str:
    """The one command that would help most, or ''."""
    if report["backend"] is None and sys.platform == "linux":
        return pip_install("mlx[cpu]") + " --force-reinstall"
    if report["backend"] != "CPU":
        return ""
    gpu = platform.nvidia_gpu() and not any("cuda" in name for name in report["versions"])
    if gpu and not doctor_blas.wrong(report["blas"]):
        return pip_install("mlx[cuda13]")
    return doctor_blas.advice(report["blas"])


def _lines(report: dict) -> list[str]:
    versions = report["versions"]
    first = ("mlx-sleep", "python")
    rest = [f"{name} {version}" for name, version in versions.items() if name not in first]
    rows = [
        ("mlx-sleep", f"{versions['mlx-sleep']}, Python {versions['python']}"),
        ("libraries", ", ".join(rest)),
        ("backend", f"{report['backend'] or 'none'}" + _in_brackets(report["device"])),
        *doctor_blas.lines(report["blas"]),
    ]
    for op, paths in report["ops"].items():
        rows.append((op, ", ".join(f"{path} for a {what}" for what, path in paths.items())))
    rows.append(("kernels", _kernels_line(report)))
    if report["calibrated"]:
        rows.append(("calibrated", report["calibrated"]))
    for name, verdict in report["verdicts"].items():
        rows.append(("measured", f"{_shorter(name)}: {verdict['taken']}"))
        rows += [("", f"  {path}: {_result(r)}") for path, r in verdict["results"].items()]
        if not verdict["results"]:
            rows.append(("", "  measuring it never ended; mlx-sleep doctor --calibrate repeats it"))
    if report["odd_heads"]:
        ours = report["ops"]["gated_delta"]["prompt"] == "metal"
        takes = (
            "take heads of 32 to 256 in steps of 8" if ours else "mlx.fast takes few kinds of heads"
        )
        rows.append(("", f"{takes}; others go by {report['odd_heads']}"))
    if model := report["model"]:
        rows.append(("model", _model_line(model)))
    data = report["data"]
    rows.append(("memories", data["path"] + (", not writable" if data["problem"] else "")))
    lines = [f"{name:<12}{value}" for name, value in rows]
    lines += [f"{'problem':<12}{problem}" for problem in report["problems"]]
    if report["advice"]:
        lines += [
            "",
            f"To {'make it faster' if report['usable'] else 'repair it'}:",
            "    " + report["advice"],
        ]
    return lines


def _kernels_line(report: dict) -> str:
    names = ", ".join(report["kernels"])
    if any("metal" in paths.values() for paths in report["ops"].values()):
        return names
    if report["backend"] == "Metal":
        return names + ", in use where they were measured to be right and fastest"
    return names + ", not in use (no Metal)"


def _shorter(name: str) -> str:
    """The name of a shape with each of its dtypes once."""
    *rest, dtypes = name.split(" ")
    return " ".join([*rest, "/".join(dict.fromkeys(dtypes.split(",")))])


def _result(result: dict) -> str:
    """ "0.412 ms, error 2e-07", "wrong (error 0.3)" or why else it is barred."""
    error = "" if result["error"] is None else f"error {result['error']:.0e}"
    if result["barred"]:
        return result["barred"] + _in_brackets(error)
    return f"{1e3 * result['seconds']:.3g} ms, {error}"


def _model_line(model: dict) -> str:
    if model["problem"]:
        return "embedded, not usable"
    return f"embedded, sound (fingerprint {model['fingerprint'][:12]})"


def _in_brackets(text) -> str:
    return f" ({text})" if text else ""
