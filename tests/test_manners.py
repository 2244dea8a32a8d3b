"""When a machine is left alone. The Mac's tools are played by their recorded output."""

from __future__ import annotations

import shutil
import subprocess

import pytest

from mlx_sleep.manners import Conditions, Manners, conditions, linux, macos

# Output as users have posted it.
SETTINGS = """\
System-wide power settings:
Currently in use:
 standby              1
 Sleep On Power Button 1
 hibernatefile        /var/vm/sleepimage
 powernap             1
 networkoversleep     0
 disksleep            10
 sleep                1 (sleep prevented by coreaudiod, powerd, sharingd)
 hibernatemode        3
 ttyskeepawake        1
 displaysleep         10
 tcpkeepalive         1
 lowpowermode         0
 womp                 1
"""
BATTERY = """\
Now drawing from 'Battery Power'
 -InternalBattery-0 (id=22806627)\t78%; discharging; 5:05 remaining present: true
"""
PLUGGED = """\
Now drawing from 'AC Power'
 -InternalBattery-0 (id=22806627)\t83%; charging; 1:00 remaining present: true
"""
DESKTOP = "Now drawing from 'AC Power'\n"
COOL = """\
Note: No thermal warning level has been recorded
Note: No performance warning level has been recorded
Note: No CPU power status has been recorded
"""
INTEL_COOL = """\
Note: No thermal warning level has been recorded
Note: No performance warning level has been recorded
2026-08-20 05:08:37 -0700 CPU Power notify
\tCPU_Scheduler_Limit \t= 100
\tCPU_Available_CPUs \t= 12
\tCPU_Speed_Limit \t= 100
"""
INTEL_HOT = """\
2026-08-20 05:08:37 -0700 CPU Power notify
\tCPU_Scheduler_Limit \t= 80
\tCPU_Available_CPUs \t= 12
\tCPU_Speed_Limit \t= 62
"""
IOREG = """\
  +-o IOHIDSystem  <class IOHIDSystem, id 0x100000282, registered, matched>
      {
        "HIDIdleTime" = 4500000000
        "HIDPointerAcceleration" = 49152
      }
"""


def mac(batt=PLUGGED, settings=SETTINGS, therm=COOL, ioreg=IOREG):
    """The tools of a Mac, as macos.run calls them."""
    tools = {
        (macos.PMSET, "-g", "batt"): batt,
        (macos.PMSET, "-g"): settings,
        (macos.PMSET, "-g", "therm"): therm,
        (macos.IOREG, "-c", "IOHIDSystem", "-d", "4"): ioreg,
    }
    return lambda *command: tools[command]


class Info:
    """NSProcessInfo."""

    def __init__(self, low_power, thermal_state):
        self.low_power, self.thermal_state = low_power, thermal_state


def test_a_mac_by_its_tools():
    found = macos.conditions(mac())  # there is no Objective-C runtime to ask
    assert found == Conditions(low_power=False, hot=False, on_battery=False, idle=4.5)
    tired = mac(BATTERY, SETTINGS.replace("mode         0", "mode         1"), INTEL_HOT, "")
    assert macos.conditions(tired) == Conditions(low_power=True, hot=True, on_battery=True)
    assert macos.conditions(mac("", "", "", "")) == Conditions()


@pytest.mark.parametrize("state", range(4))
def test_a_mac_by_its_process_info(state):
    found = macos.conditions(mac(therm=INTEL_HOT), lambda: Info(True, state))
    assert found.low_power and found.hot == (state > 0)


RUNTIME = r"""
#include <cstring>
extern "C" {
void *objc_getClass(const char *name) {
    return strcmp(name, "NSProcessInfo") ? nullptr : (void *)"class";
}
void *sel_registerName(const char *name) { return (void *)name; }
void *objc_msgSend(void *receiver, const char *selector) {
    if (!strcmp(selector, "processInfo"))
        return strcmp((char *)receiver, "class") ? nullptr : (void *)"info";
    if (strcmp((char *)receiver, "info")) return nullptr;
    if (!strcmp(selector, "isLowPowerModeEnabled")) return (void *)0x7f01;  // a bool is one byte
    return (void *)(strcmp(selector, "thermalState") ? 0 : 2);
}
}
"""


def test_the_runtime_is_called_as_it_wants(tmp_path, monkeypatch):
    compiler = shutil.which("c++") or shutil.which("g++")
    if compiler is None:
        pytest.skip("there is no C++ compiler")
    library = tmp_path / "objc.so"
    command = [compiler, "-x", "c++", "-", "-shared", "-fPIC", "-o", library]
    subprocess.run(command, input=RUNTIME, text=True, check=True)
    monkeypatch.setattr(macos, "OBJC", str(library))
    monkeypatch.setattr(macos, "FOUNDATION", str(library))
    info = macos.ProcessInfo()
    assert info.low_power is True and info.thermal_state == 2
    assert macos.conditions(mac()).hot


def test_each_tool_s_output():
    assert macos.on_battery(BATTERY) and macos.on_battery(DESKTOP) is False
    assert macos.throttled(INTEL_COOL) is False and macos.throttled(INTEL_HOT)
    assert macos.throttled("Thermal Warning Level = 1") and macos.throttled("what?") is None
    two = IOREG + IOREG.replace("45", "15")
    assert macos.idle_seconds(two) == 1.5 and macos.idle_seconds("") is None
    assert macos.low_power_mode(" lowpowermode 1\n") and macos.low_power_mode("") is None


def test_a_tool_that_fails_or_is_missing():
    assert macos.run("/nonexistent/pmset") == "" and macos.run("false") == ""
    assert macos.run("echo", "-g") == "-g\n"


# --- Linux -----------------------------------------------------------------------------------


def machine(tmp_path, **files):
    """A /sys: {"class/power_supply/BAT0/type": "Battery", ...}"""
    for name, text in files.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n")
    return linux.conditions(tmp_path)


BAT = "class/power_supply/BAT0/"
AC = "class/power_supply/AC/"
ZONE = "class/thermal/thermal_zone0/"


def test_a_laptop_that_runs_linux(tmp_path):
    found = machine(
        tmp_path,
        **{
            BAT + "type": "Battery",
            BAT + "status": "Discharging",
            AC + "type": "Mains",
            AC + "online": "0",
            "class/power_supply/hidpp_battery_0/type": "Battery",
            "class/power_supply/hidpp_battery_0/scope": "Device",
            "class/power_supply/hidpp_battery_0/status": "Discharging",
            ZONE + "temp": "71000",
            ZONE + "trip_point_0_type": "critical",
            ZONE + "trip_point_0_temp": "0",
            ZONE + "trip_point_1_type": "passive",
            ZONE + "trip_point_1_temp": "95000",
            "firmware/acpi/platform_profile": "balanced",
        },
    )
    assert found == Conditions(low_power=False, hot=False, on_battery=True)
    plugged = machine(tmp_path, **{AC + "online": "1", BAT + "status": "Charging"})
    assert plugged.on_battery is False
    tired = {ZONE + "temp": "95000", "firmware/acpi/platform_profile": "low-power"}
    assert machine(tmp_path, **tired) == Conditions(low_power=True, hot=True, on_battery=False)


def test_a_machine_that_says_nothing(tmp_path):
    assert linux.conditions(tmp_path / "none") == Conditions()
    mouse = {BAT + "type": "Battery", BAT + "scope": "Device", BAT + "status": "Discharging"}
    odd = {ZONE + "temp": "warm", ZONE + "trip_point_0_type": "passive"}
    assert machine(tmp_path, **mouse, **odd) == Conditions()


# --- what follows ----------------------------------------------------------------------------


def test_manners():
    def why(on_battery=False, quiet=0.0, **found):
        return Manners(on_battery=on_battery, quiet=quiet, look=lambda: Conditions(**found))()

    assert why() == why(low_power=False, hot=False, on_battery=False, idle=0.0) == ""
    assert why(low_power=True) == "the machine saves power"
    assert why(hot=True, on_battery=True) == "the machine is hot"
    assert why(on_battery=False, quiet=5, idle=4.0) == "somebody is at the keyboard"
    assert why(quiet=5, idle=6.0) == why(quiet=5) == ""
    on_battery = lambda: Conditions(on_battery=True)  # noqa: E731
    assert Manners(look=on_battery)() == "on battery"
    assert Manners(look=on_battery, on_battery=True)() == ""


def test_this_machine_answers():
    assert isinstance(conditions(), Conditions) and isinstance(Manners()(), str)
