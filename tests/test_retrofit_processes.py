"""A retrofit in two processes, as mlx.launch starts them: the ring backend on this machine."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from tests.test_retrofit import rows_of, trainer_of

WORKER = """
import os, signal, sys
import mlx.core as mx
from pathlib import Path
from mlx.utils import tree_flatten
from tests.test_retrofit import trainer_of
folder, tokens, data, stops = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4]
rank = mx.distributed.init(strict=True).rank()
run = trainer_of(folder / "run", tokens, data_seed=0 if data == "alike" else 100 * rank)
if rank:
    run.model.sleep_layers[0].gain = run.model.sleep_layers[0].gain + 1  # not as the first one's
def on_row(row):
    if stops and row["step"] == 2:
        os.kill(os.getpid(), signal.SIGTERM)
run.run(on_row=on_row)
parameters = dict(tree_flatten(run.model.trainable_parameters()))
mx.savez(str(folder / f"rank{rank}.npz"), **parameters)
print(run.step, run.stopped)
"""


def two(folder: Path, tokens: int, data: str, stops: str = "") -> list[str]:
    hosts = []
    for _ in range(2):
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            hosts.append([f"127.0.0.1:{s.getsockname()[1]}"])
    folder.mkdir()
    (folder / "hosts.json").write_text(json.dumps(hosts))
    started = []
    for rank in range(2):
        ring = {"MLX_RANK": str(rank), "MLX_HOSTFILE": str(folder / "hosts.json")}
        command = [sys.executable, "-c", WORKER, str(folder), str(tokens), data, stops]
        started.append(
            subprocess.Popen(command, env={**os.environ, **ring}, stdout=-1, stderr=-1, text=True)
        )
    try:
        done = [process.communicate(timeout=120) for process in started]
    finally:
        for process in started:
            process.kill()
    assert all(process.returncode == 0 for process in started), done
    return [out.strip() for out, _ in done]


@pytest.mark.slow
def test_two_processes_with_the_same_lives_are_one(tmp_path):
    """Averaged gradients of equal batches are those of one; twice the tokens are counted."""
    alone = trainer_of(tmp_path / "alone", 400)
    alone.run()
    said = two(tmp_path / "two", 800, "alike")
    assert said == [f"{alone.step} False"] * 2
    ours, theirs = rows_of(tmp_path / "alone"), rows_of(tmp_path / "two" / "run")
    np.testing.assert_allclose([x for _, x in theirs], [x for _, x in ours], rtol=1e-4)
    assert (tmp_path / "two" / "run" / "adapters.safetensors").is_file()


@pytest.mark.slow
def test_two_processes_with_lives_of_their_own_stay_alike(tmp_path):
    """Until the first alone is told to stop: then both do, after the next step."""
    assert two(tmp_path / "two", 2000, "own", "stops") == ["3 True"] * 2
    first, second = (mx.load(str(tmp_path / "two" / f"rank{rank}.npz")) for rank in range(2))
    assert first.keys() == second.keys()
    for name in first:
        np.testing.assert_array_equal(np.array(first[name]), np.array(second[name]))
