"""Imports run one way: cli -> server -> session -> sleep -> models -> ops -> kernels, cli -> lab ->
training -> sleep, and cli -> convert -> models."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = {"mlx_sleep": "mlx_sleep", "mlx_sleep.convert": "convert", "mlx_sleep.kernels": "kernels"}

# What each room of mlx_sleep imports besides itself. Everything may import utils, the command line
# everything, and nothing the command line.
ALLOWED = {
    "utils": "",
    "kernels": "",
    "ops": "kernels",
    "tokens": "",
    "templates": "",
    "template_process": "",
    "thoughts": "",
    "template_parts": "tokens thoughts",
    "chat_template": "tokenizer_config templates tokens thoughts template_parts",
    "models": "ops chat_template thoughts",
    "tokenizer_config": "",
    "sleep": "models",
    "wake": "models",
    "sampling": "models",
    "manners": "",
    "memory": "models",
    "window": "memory sleep wake models chat_template",
    "turns": "window sleep",
    "reply": "window turns sampling thoughts",
    "opening": "memory sampling models chat_template thoughts",
    "stats": "",
    "session": "opening window turns reply stats memory sleep sampling models chat_template "
    "thoughts",
    "server": "session stats memory sleep thoughts",
    "rebuild": "session memory sleep models chat_template",
    "deep_sleep": "rebuild session memory sleep models",
    "training": "sleep models",
    "convert": "models convert.torch",
    "convert.torch": "training",  # its schedule; PyTorch takes the place of models
    "lab.tasks": "",
    "lab.bench": "lab session sleep models ops kernels chat_template",
    "lab.study": "lab lab.tasks memory training sleep models",
    "lab": "lab.bench lab.study lab.tasks training sleep models",
}
EXEMPT = {
    ("mlx_sleep.lab.bench.conversion", "convert"): "times a conversion",
    ("mlx_sleep.models.source", "open_model"): "asks the package for what convert can open",
    ("mlx_sleep.lab.study.torch_step", "convert.torch"): "compares with the PyTorch definition",
}


def modules() -> Iterator[tuple[str, Path]]:
    for package, folder in FOLDERS.items():
        for path in sorted((ROOT / folder).rglob("*.py")):
            name = ".".join((package, *path.relative_to(ROOT / folder).with_suffix("").parts))
            yield name, path


def imported(module: str, path: Path) -> Iterator[str]:
    """Absolute names of all that a file imports, inside functions too."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parents = module.split(".")[: -node.level] if node.level else []
            yield from (
                ".".join([*parents, *filter(None, [node.module]), alias.name])
                for alias in node.names
            )


def room(name: str) -> str | None:
    """mlx_sleep.lab.study.plan -> lab.study; None for other packages and for mlx_sleep itself."""
    top, *parts = name.split(".")
    if top != "mlx_sleep" or not parts or parts[0] in ("__init__", "__version__", "BLAS"):
        return None
    inner = ".".join(parts[:2])
    return inner if inner in ALLOWED else parts[0]


@pytest.mark.parametrize(("module", "path"), list(modules()))
def test_imports_run_one_way(module, path):
    here = room(module)
    if here in (None, "cli"):
        return
    for name in imported(module, path):
        there = room(name)
        if there not in (None, here, "utils") and (module, there) not in EXEMPT:
            assert there in ALLOWED[here].split(), f"{module} imports {name}"


def test_every_exemption_is_needed():
    found = {(module, room(name)) for module, path in modules() for name in imported(module, path)}
    assert set(EXEMPT) <= found


def test_a_wrong_import_is_seen(tmp_path):
    path = tmp_path / "gated_delta.py"
    path.write_text("def f():\n    from ..models import load\n    from .. import session\n")
    found = [room(name) for name in imported("mlx_sleep.ops.gated_delta", path)]
    assert found == ["models", "session"] and not {*found} & {*ALLOWED["ops"].split()}
