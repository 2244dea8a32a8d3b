"""`mlx-sleep serve` as a process: signals, a taken port, keys, and a kill while clients talk."""

from __future__ import annotations

import signal
import socket
import time

import httpx
import pytest

pytest.importorskip("uvicorn")

from mlx_sleep.memory import show_memory
from tests.fakes import fake_folder
from tests.serve_load import Serving, campaign


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return fake_folder(tmp_path_factory.mktemp("models") / "tiny", window=200)


def test_signals_end_it_and_what_was_said_is_kept(model, tmp_path):
    serving = Serving(model, tmp_path).start()
    body = {
        "model": serving.model,
        "messages": [{"role": "user", "content": "My cat is Zorvi."}],
        "max_tokens": 5,
        "user": "anna",
    }
    url = f"{serving.url}/v1/chat/completions"
    assert httpx.post(url, json=body, timeout=60).status_code == 200
    code, rest = serving.end(signal.SIGINT)
    assert (code, rest) == (0, "stopped; what was said is kept\n")
    assert show_memory("anna", tmp_path).pending > 20


def test_ctrl_c_twice_is_as_quiet(model, tmp_path):
    serving = Serving(model, tmp_path).start()
    assert httpx.get(f"{serving.url}/health", timeout=60).status_code == 200
    serving.process.send_signal(signal.SIGINT)
    time.sleep(0.05)  # two signals at once arrive as one; a stop takes longer than this
    assert serving.end(signal.SIGINT) == (0, "stopped; what was said is kept\n")


def test_what_is_wrong_is_one_line_before_the_model_is_loaded(refused, model, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert "is taken" in refused("serve", "--model", model, "--port", port)
    assert "API key" in refused("serve", "--model", model, "--host", "0.0.0.0")
    key = tmp_path / "key"
    key.write_text("sesame\n")
    key.chmod(0o644)
    assert "chmod 600" in refused("serve", "--model", model, "--api-key-file", key)
    assert "cannot read" in refused("serve", "--model", model, "--api-key-file", tmp_path / "no")
    key.write_text("\n")
    key.chmod(0o600)
    assert "not empty" in refused("serve", "--model", model, "--api-key-file", key)


def test_nothing_acknowledged_is_lost_when_it_is_killed(model, tmp_path):
    figures = campaign(model, tmp_path, memories=6, clients=2, kills=1, seconds=4)
    assert figures["lost"] == [] and figures["answers"] > 3 and figures["kills"] == 1
    assert figures["exit_code"] == 0
