"""The service's files, and what is done with them; launchctl and systemctl are played."""

from __future__ import annotations

import configparser
import plistlib
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from mlx_sleep.cli import service as cli
from mlx_sleep.server.service import service

PROGRAM = ["/opt/my env/bin/mlx-sleep", "serve", "--port", "8081"]


def made(platform, environment=None, home="/Users/anna"):
    return service(PROGRAM, environment or {}, platform=platform, home=Path(home), uid=501)


def test_the_launchd_agent():
    agent = made("darwin", {"MLX_SLEEP_HOME": "/Users/anna/my memories"})
    assert agent.file == Path("/Users/anna/Library/LaunchAgents/mlx-sleep.serve.plist")
    plist = plistlib.loads(agent.text, fmt=plistlib.FMT_XML)
    assert plist["Label"] == agent.file.stem and plist["ProgramArguments"] == PROGRAM
    assert plist["EnvironmentVariables"] == {"MLX_SLEEP_HOME": "/Users/anna/my memories"}
    assert plist["KeepAlive"] == {"SuccessfulExit": False} and plist["RunAtLoad"] is True
    assert plist["Umask"] == 0o077 and plist["ExitTimeOut"] > 15  # serve finishes for 10 s
    assert agent.start[-1] == ["launchctl", "bootstrap", "gui/501", str(agent.file)]
    assert agent.stop == [["launchctl", "bootout", "gui/501/mlx-sleep.serve"]]


def test_the_systemd_unit(monkeypatch):
    monkeypatch.delenv("XDG_CONFIG_HOME", raising=False)
    unit = made("linux", {"MLX_SLEEP_HOME": '/home/a "b" 100%'}, home="/home/a")
    assert unit.file == Path("/home/a/.config/systemd/user/mlx-sleep.serve.service")
    parser = configparser.ConfigParser(interpolation=None)
    parser.optionxform = str
    parser.read_string(unit.text.decode())
    section = parser["Service"]
    assert shlex.split(section["ExecStart"]) == PROGRAM
    assert section["Environment"] == r'"MLX_SLEEP_HOME=/home/a \"b\" 100%%"'
    assert section["Restart"] == "on-failure" and section["UMask"] == "0077"
    assert parser["Install"]["WantedBy"] == "default.target"
    monkeypatch.setenv("XDG_CONFIG_HOME", "/elsewhere")
    assert made("linux").file.parent == Path("/elsewhere/systemd/user")


@pytest.fixture(params=["darwin", "linux"])
def manager(request, monkeypatch, tmp_path):
    """launchctl or systemctl: the commands that it got, and whether the service runs."""

    class Manager:
        commands: list[list[str]] = []
        runs = False
        fails = ""
        busy = 0

        def __call__(self, command, **_):
            self.commands.append(command)
            verb = next(w for w in command[1:] if not w.startswith("-"))
            if self.fails and verb in ("bootstrap", "enable"):
                return subprocess.CompletedProcess(command, 5, "", self.fails)
            if verb in ("bootstrap", "enable") and self.busy:
                self.busy -= 1
                return subprocess.CompletedProcess(command, 5, "", "busy")
            code = 0
            if verb in ("print", "is-active", "bootout", "stop"):
                code = 0 if self.runs else 3
            if verb in ("bootstrap", "enable"):
                self.runs = True
            elif verb in ("bootout", "stop", "disable"):
                self.runs = False
            return subprocess.CompletedProcess(command, code, "", "")

    manager = Manager()
    manager.commands = []
    monkeypatch.setattr(sys, "platform", request.param)
    monkeypatch.setattr(cli.subprocess, "run", manager)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("XDG_CONFIG_HOME", raising=False)
    return manager


def files(home):
    return [path for path in home.rglob("*") if path.is_file()]


def test_install_status_remove(manager, run, tmp_path, monkeypatch):
    assert run("service", "status")[0] == 1
    code, out, _ = run("service", "install", "--", "--port", "8081")
    assert code == 0 and "installed and started" in out and manager.runs
    [file] = files(tmp_path)
    assert b"8081" in file.read_bytes() and file.stat().st_mode & 0o777 == 0o600
    assert run("service", "status") == (0, f"installed, running: {file}\n", "")

    manager.commands.clear()
    assert "installed and running" in run("service", "install", "--", "--port", "8081")[1]
    assert len(manager.commands) == 1  # it was asked, and left alone
    manager.busy = 2  # what was stopped is not gone yet
    monkeypatch.setattr(cli.time, "sleep", lambda seconds: None)
    run("service", "install", "--", "--port", "8082")
    assert b"8082" in file.read_bytes() and manager.runs

    assert "stopped and removed" in run("service", "remove")[1]
    assert files(tmp_path) == [] and not manager.runs
    assert run("service", "remove") == (0, "not installed\n", "")


def test_a_dry_run_does_nothing(manager, run, tmp_path):
    out = run("service", "install", "--dry-run", "--", "--port", "8081")[1]
    assert "8081" in out and "mlx-sleep.serve" in out
    assert files(tmp_path) == [] and manager.commands == []


def test_options_that_serve_would_refuse(manager, run, refused, tmp_path):
    code, _, error = run("service", "install", "--", "--prot", "8081")
    assert code == 2 and "--prot" in error
    error = refused("service", "install", "--", "--api-key=sesame")
    assert "--api-key-file" in error and "sesame" not in error
    assert files(tmp_path) == []


def test_a_manager_that_fails_is_quoted(manager, refused):
    manager.fails = "Bootstrap failed: 5: Input/output error"
    assert manager.fails in refused("service", "install")


def test_a_machine_without_one(manager, monkeypatch, refused):
    def missing(command, **_):
        raise FileNotFoundError(2, "No such file or directory")

    monkeypatch.setattr(cli.subprocess, "run", missing)
    assert "launchd or systemd" in refused("service", "install")
