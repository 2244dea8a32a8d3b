"""A Mac's conditions: NSProcessInfo, pmset and ioreg.

NSProcessInfo is asked through the Objective-C runtime, so that no package is needed. The tools are
called by their full paths, with a time limit; parsing is apart from that, and is what tests see.
It has run on recorded output of these tools only: nobody has tried it on a Mac yet.
"""

from __future__ import annotations

import ctypes
import re
import subprocess
from collections.abc import Callable

from . import Conditions

FOUNDATION = "/System/Library/Frameworks/Foundation.framework/Foundation"
OBJC = "/usr/lib/libobjc.A.dylib"
PMSET, IOREG = "/usr/bin/pmset", "/usr/sbin/ioreg"

Run = Callable[..., str]
"""A tool and its arguments -> what it prints; "" when it fails."""


def run(*command: str) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=5, errors="replace")
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout if done.returncode == 0 else ""


def conditions(run: Run = run, process_info: Callable[[], ProcessInfo] | None = None) -> Conditions:
    low_power: bool | None
    hot: bool | None
    try:
        info = (process_info or ProcessInfo)()
        low_power, hot = info.low_power, info.thermal_state > 0
    except (OSError, AttributeError):
        low_power, hot = low_power_mode(run(PMSET, "-g")), throttled(run(PMSET, "-g", "therm"))
    return Conditions(
        low_power=low_power,
        hot=hot,
        on_battery=on_battery(run(PMSET, "-g", "batt")),
        idle=idle_seconds(run(IOREG, "-c", "IOHIDSystem", "-d", "4")),
    )


def on_battery(batt: str) -> bool | None:
    """From `pmset -g batt`: "Now drawing from 'Battery Power'"."""
    source = re.search(r"Now drawing from '([^']+)'", batt)
    return None if source is None else source[1] == "Battery Power"


def low_power_mode(settings: str) -> bool | None:
    """From `pmset -g`, the settings in use."""
    mode = re.search(r"^\s*lowpowermode\s+(\d)", settings, re.MULTILINE)
    return None if mode is None else mode[1] == "1"


def throttled(therm: str) -> bool | None:
    """From `pmset -g therm`. Apple silicon prints notes that nothing was recorded, or a level."""
    limits = re.findall(r"CPU_(?:Scheduler|Speed)_Limit\s*=\s*(\d+)", therm)
    levels = re.findall(r"(?:thermal|performance) warning level\s*[=:]\s*(\d+)", therm, re.I)
    if limits or levels:
        return any(int(limit) < 100 for limit in limits) or any(map(int, levels))
    return False if "No thermal warning level has been recorded" in therm else None


def idle_seconds(ioreg: str) -> float | None:
    """From `ioreg -c IOHIDSystem`: nanoseconds; the least of several entries."""
    times = re.findall(r'"HIDIdleTime" = (\d+)', ioreg)
    return min(map(int, times)) / 1e9 if times else None


class ProcessInfo:
    """Foundation's NSProcessInfo.processInfo. OSError or AttributeError where there is none.

    thermal_state  0 nominal, 1 fair, 2 serious, 3 critical
    """

    def __init__(self) -> None:
        ctypes.CDLL(FOUNDATION)
        self._objc = ctypes.CDLL(OBJC)
        for name in ("objc_getClass", "sel_registerName"):
            function = getattr(self._objc, name)
            function.restype, function.argtypes = ctypes.c_void_p, [ctypes.c_char_p]
        of_class = self._objc.objc_getClass(b"NSProcessInfo")
        self._info = self._send(of_class, b"processInfo", ctypes.c_void_p)
        if not self._info:
            raise OSError("there is no NSProcessInfo")

    @property
    def low_power(self) -> bool:
        return bool(self._send(self._info, b"isLowPowerModeEnabled", ctypes.c_bool))

    @property
    def thermal_state(self) -> int:
        return self._send(self._info, b"thermalState", ctypes.c_long)

    def _send(self, receiver: int, selector: bytes, result: type) -> int:
        """[receiver selector]. Cast to its own type: a call of a variadic one passes arguments in
        another way on Apple silicon."""
        kind = ctypes.CFUNCTYPE(result, ctypes.c_void_p, ctypes.c_void_p)
        send = ctypes.cast(self._objc.objc_msgSend, kind)
        return send(receiver, self._objc.sel_registerName(selector))
