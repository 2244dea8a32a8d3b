"""The server as a service of its user: a launchd agent on macOS, a systemd unit on Linux.

Text and paths only; cli/service.py writes the file and calls launchctl or systemctl. No secret is
in the file: a key is in a file of its own (`serve --api-key-file`). The launchd agent has been
checked as a property list, and on no Mac yet.
"""

from __future__ import annotations

import os
import plistlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

LABEL = "mlx-sleep.serve"

STOP_SECONDS = 30
"""How long a stop may take: replies end, and what was said is put on the disk."""


@dataclass(frozen=True)
class Service:
    """A service file, and the commands that go with it; each takes the user's own rights.

    file    where it belongs
    text    what is in it
    start   after it was written; the first may fail (what it stops may not run)
    stop    before it is removed
    status  succeeds if it runs
    """

    file: Path
    text: bytes
    start: list[list[str]]
    stop: list[list[str]]
    status: list[str]


def service(
    program: Sequence[str],
    environment: Mapping[str, str],
    *,
    platform: str,
    home: Path,
    uid: int,
) -> Service:
    """program is the command that serves; environment what it needs besides the system's own.

    platform is sys.platform; anything but darwin is taken for one with systemd.
    """
    if platform == "darwin":
        return _launchd(program, environment, home, uid)
    return _systemd(program, environment, home)


def _launchd(
    program: Sequence[str], environment: Mapping[str, str], home: Path, uid: int
) -> Service:
    """launchd.plist(5)"""
    file = home / "Library/LaunchAgents" / f"{LABEL}.plist"
    agent = {
        "Label": LABEL,
        "ProgramArguments": list(program),
        "EnvironmentVariables": dict(environment),
        "RunAtLoad": True,
        "KeepAlive": {"SuccessfulExit": False},
        "ThrottleInterval": 30,
        "ExitTimeOut": STOP_SECONDS,
        "Umask": 0o077,
        "StandardErrorPath": str(home / "Library/Logs" / f"{LABEL}.log"),
    }
    domain = f"gui/{uid}"
    out = ["launchctl", "bootout", f"{domain}/{LABEL}"]
    return Service(
        file,
        plistlib.dumps(agent),
        start=[out, ["launchctl", "bootstrap", domain, str(file)]],
        stop=[out],
        status=["launchctl", "print", f"{domain}/{LABEL}"],
    )


def _systemd(program: Sequence[str], environment: Mapping[str, str], home: Path) -> Service:
    """systemd.service(5)"""
    config = Path(os.environ.get("XDG_CONFIG_HOME") or home / ".config")
    unit = f"{LABEL}.service"
    lines = [
        "[Unit]",
        "Description=mlx-sleep serve, a language model that sleeps",
        "",
        "[Service]",
        f"ExecStart={' '.join(_quoted(word).replace('$', '$$') for word in program)}",
        *(f"Environment={_quoted(f'{name}={value}')}" for name, value in environment.items()),
        "Restart=on-failure",
        "RestartSec=30",
        f"TimeoutStopSec={STOP_SECONDS}",
        "UMask=0077",
        "",
        "[Install]",
        "WantedBy=default.target",
        "",
    ]
    call = ["systemctl", "--user"]
    return Service(
        config / "systemd/user" / unit,
        "\n".join(lines).encode(),
        start=[
            [*call, "stop", unit],
            [*call, "daemon-reload"],
            [*call, "enable", "--now", unit],
        ],
        stop=[[*call, "disable", "--now", unit]],
        status=[*call, "is-active", "--quiet", unit],
    )


def _quoted(word: str) -> str:
    """A word of a unit file, as systemd.syntax(7) has it."""
    for character, escaped in (("\\", "\\\\"), ('"', '\\"'), ("\n", "\\n"), ("%", "%%")):
        word = word.replace(character, escaped)
    return f'"{word}"'
