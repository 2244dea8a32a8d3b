"""A Linux machine's conditions, from /sys: power supplies, the platform's profile, thermal zones.

Source: the kernel's Documentation/ABI/testing/sysfs-class-power, sysfs-platform_profile and
sysfs-class-thermal.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from . import Conditions


def conditions(sys: Path = Path("/sys")) -> Conditions:
    profile = _read(sys / "firmware/acpi/platform_profile")
    return Conditions(
        low_power=profile == "low-power" if profile else None,
        hot=_hot(sys / "class/thermal"),
        on_battery=_on_battery(sys / "class/power_supply"),
    )


def _on_battery(supplies: Path) -> bool | None:
    """Whether a battery of the machine is being emptied, and no supply is online."""
    online, discharging = [], []
    for supply in _folders(supplies):
        if _read(supply / "scope") == "Device":  # a mouse's, not the machine's
            continue
        if _read(supply / "type") == "Battery":
            discharging.append(_read(supply / "status") == "Discharging")
        elif state := _read(supply / "online"):
            online.append(state != "0")
    if not discharging:
        return None
    return any(discharging) and not any(online)


def _hot(zones: Path) -> bool | None:
    """Whether a zone is at or above a trip point from which the kernel slows things down."""
    seen = [hot for zone in _folders(zones, "thermal_zone*") for hot in _trips(zone)]
    return any(seen) if seen else None


def _trips(zone: Path) -> Iterator[bool]:
    temperature = _number(zone / "temp")
    for kind in sorted(zone.glob("trip_point_*_type")):
        limit = _number(zone / kind.name.replace("_type", "_temp"))
        # Firmware writes 0 or less where it means none.
        if _read(kind) in ("passive", "hot") and temperature is not None and limit and limit > 0:
            yield temperature >= limit


def _folders(path: Path, pattern: str = "*") -> list[Path]:
    try:
        return sorted(path.glob(pattern))
    except OSError:
        return []


def _read(path: Path) -> str:
    try:
        return path.read_text(errors="replace").strip()
    except OSError:
        return ""


def _number(path: Path) -> int | None:
    try:
        return int(_read(path))
    except ValueError:
        return None
