"""The machine that a figure was measured on."""

import datetime
import os
import platform
from pathlib import Path
from typing import Any


def machine() -> str:
    """Processor, core count and system, e.g. ``"AMD EPYC (family 25, model 17), 2 cores, Linux"``."""
    try:
        lines = [line.partition(":") for line in Path("/proc/cpuinfo").read_text().splitlines()]
    except OSError:
        lines = []
    said = {name.strip(): value.strip() for name, _, value in lines}
    model = said.get("model name") or platform.processor() or platform.machine()
    # Virtual machines name processors of several generations alike, one twice as fast as another; these numbers differ.
    if "cpu family" in said and "model" in said:
        model += f" (family {said['cpu family']}, model {said['model']})"
    return f"{model}, {os.cpu_count()} cores, {platform.system()}"


def present_load() -> float | None:
    """Processes that wanted a core in the last minute, on average; None where the system does not say."""
    return round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None


def now() -> dict[str, Any]:
    """The time, and how busy the machine is: processes that wanted a core in the last 1, 5 and 15 minutes, on average."""
    moment = datetime.datetime.now().isoformat(timespec="minutes")
    return {"time": moment, "load": [round(value, 2) for value in os.getloadavg()]}


def stamp() -> dict[str, Any]:
    """Date, machine and present load, with which a result begins. Call it before measuring, which is load itself."""
    return {"date": datetime.date.today().isoformat(), "machine": machine(), "load_1min": present_load()}
