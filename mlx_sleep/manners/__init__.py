"""When a machine should be left alone: sleep is background work.

Nothing sleeps on its own in a low power mode, when the machine is warm, or, unless that was asked
for, on battery. macos.py and linux.py look; what a machine doesn't tell counts as no reason.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Conditions:
    """What a machine says of itself; None where it says nothing.

    low_power   the user asked it to save power
    hot         its thermal state is above nominal: it slows down, or is about to
    on_battery  it runs from its battery
    idle        seconds since its keyboard, mouse or trackpad was last touched
    """

    low_power: bool | None = None
    hot: bool | None = None
    on_battery: bool | None = None
    idle: float | None = None


def conditions() -> Conditions:
    """This machine's, now. Never raises; takes some milliseconds."""
    if sys.platform == "darwin":
        from . import macos

        return macos.conditions()
    from . import linux

    return linux.conditions()


@dataclass
class Manners:
    """Called, it says why not to sleep now, or "".

    on_battery  sleep on battery too
    quiet       seconds for which nobody must have touched the keyboard
    look        what tells the conditions; None is `conditions`
    """

    on_battery: bool = False
    quiet: float = 0.0
    look: Callable[[], Conditions] | None = None

    def __call__(self) -> str:
        now = (self.look or conditions)()
        if now.low_power:
            return "the machine saves power"
        if now.hot:
            return "the machine is hot"
        if now.on_battery and not self.on_battery:
            return "on battery"
        if now.idle is not None and now.idle < self.quiet:
            return "somebody is at the keyboard"
        return ""
