"""A profile with new values in it: the file's own words about limits stay, the measured sections are written anew."""

from __future__ import annotations

import datetime
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import yaml

from sacflow_robot.calibrate.profile import Profile, load_profile
from sacflow_robot.envs.robot_parameters import SECTIONS, Measured, check_value, quantity
from sacflow_robot.errors import DataError
from sacflow_robot.utils.atomic_files import replacing

Array = npt.NDArray[np.float64]
Values = Mapping[str, tuple[Array, Array]]
"""Value and one standard deviation of quantities, by name."""

_DIGITS = 4


def with_story(values: Values, method: str) -> dict[str, Measured]:
    """Values and standard deviations as measured today, rounded to what they tell.

    Raises:
        DataError: A value is not physically possible.
    """
    today, found = datetime.date.today().isoformat(), {}
    for name, (value, spread) in values.items():
        known = quantity(name)
        assert known is not None
        numbers = [float(f"{v:.{_DIGITS}g}") for v in np.broadcast_to(value, known.count)]
        spreads = [float(f"{s:.2g}") for s in np.broadcast_to(spread, known.count)]
        try:
            found[name] = Measured(check_value(name, numbers), tuple(spreads), today, method)
        except ValueError as error:
            raise DataError(f"what was measured is not possible: {error}") from None
    return found


def write_profile(path: Path, old: Path, new: Mapping[str, Measured]) -> Profile:
    """Write the profile ``old`` with some values in the place of its own, complete or not at all.

    Raises:
        DataError: ``old`` is no profile, or ``path`` cannot be written.
    """
    before = load_profile(old)
    head = _without_sections(old.read_text())
    head = re.sub(r"(?m)^version: .*$", f"version: {before.version + 1}", head)
    head = re.sub(r"(?m)^date: .*$", f"date: {datetime.date.today().isoformat()}", head)
    text = head.rstrip() + "\n" + _dump({**before.measured, **new})
    try:
        with replacing(path) as partial:
            partial.write_text(text)
            made = load_profile(partial)
    except OSError as error:
        raise DataError(f"profile {path} cannot be written: {error.strerror}") from None
    return made


def _without_sections(text: str) -> str:
    kept, skipping = [], False
    for line in text.splitlines():
        if re.match(r"[^\s#]", line):
            skipping = line.split(":")[0] in SECTIONS
        if not skipping:
            kept.append(line)
    return "\n".join(kept)


def _dump(measured: Mapping[str, Measured]) -> str:
    tree: dict[str, Any] = {}
    for name, m in sorted(measured.items(), key=lambda item: SECTIONS.index(item[0].split(".")[0])):
        section, *rest = name.split(".")
        place = tree.setdefault(section, {})
        if len(rest) == 2:
            place = place.setdefault(rest[0], {})
        value, spread = (list(v) if len(v) > 1 else v[0] for v in (m.value, m.uncertainty))
        place[rest[-1]] = {"value": value, "uncertainty": spread, "date": m.date, "method": m.method}
    return yaml.safe_dump(tree, sort_keys=False, default_flow_style=None, width=116) if tree else ""
