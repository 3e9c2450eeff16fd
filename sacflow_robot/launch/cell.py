"""Launch files: which processes make up a cell, in which order they start, and what becomes of them when they end."""

import os
import re
import shlex
from collections.abc import Collection, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

import yaml

from sacflow_robot.errors import DataError, one_line

Restart = Literal["never", "on-failure"]

_RESTARTS: tuple[Restart, ...] = ("never", "on-failure")
_VARIABLE = re.compile(r"\$\{(\w+)(?::-([^}]*))?\}")


@dataclass(frozen=True)
class ProcessPlan:
    """One process of a cell.

    Attributes:
        name: Name in the launch file.
        words: Its command line: the command and its options.
        ready: When the next process may start: text that appears in a line of its output; ``tcp://host:port``, once
            something listens there; ``end``, once it has ended well; None, at once.
        ready_within_s: Longest wait for that (s).
        restart: Whether it is started again after it failed.
        restarts: How often at most; the count starts again once it has run for a minute.
        stop_within_s: How long it may take to stop before it is killed (s).
        may_end: Whether it may end well while the others go on.
        may_fail: Whether the others go on without it when it has failed and is not started again.
        unless: File or folder that makes it needless: where it exists, the process is not started.
        terminal: Whether it has the terminal, for its keyboard; then there is no table.
    """

    name: str
    words: tuple[str, ...]
    ready: str | None = None
    ready_within_s: float = 120.0
    restart: Restart = "never"
    restarts: int = 5
    stop_within_s: float = 30.0
    may_end: bool = False
    may_fail: bool = False
    unless: str | None = None
    terminal: bool = False

    @property
    def endpoint(self) -> tuple[str, int] | None:
        """Host and port at which something listens once it is ready, if that is how one can tell."""
        found = re.fullmatch(r"tcp://([^:/]+):(\d+)", self.ready or "")
        return None if found is None else (found[1], int(found[2]))

    @property
    def ready_at_end(self) -> bool:
        """True if the next process waits for its end."""
        return self.ready == "end"


def read_cell(path: Path, commands: Collection[str]) -> list[ProcessPlan]:
    """The processes of a launch file, in the order of starting.

    A file is a YAML map of process names to either a command line of this program, or a map with the key ``run`` for
    the command line and any of the other attributes of :class:`ProcessPlan`. ``${NAME}`` and ``${NAME:-default}`` in a
    command line stand for environment variables.

    Args:
        commands: This program's commands, of one word or two.

    Raises:
        DataError: The file cannot be read, or has an entry that is not understood.
    """
    try:
        data = yaml.safe_load(path.read_text())
    except (OSError, ValueError, OverflowError, RecursionError, yaml.YAMLError) as error:
        raise DataError(f"launch file {path} cannot be read: {one_line(error)}") from None
    if not isinstance(data, dict) or not data or not all(isinstance(v, str | dict) for v in data.values()):
        raise DataError(f"launch file {path} is not a map of process names to command lines")
    plans = []
    for name, entry in data.items():
        try:
            plans.append(_plan(str(name), {"run": entry} if isinstance(entry, str) else entry))
        except (TypeError, ValueError) as error:
            raise DataError(f"launch file {path}, process {str(name)!r}: {one_line(error)}") from None
        words = plans[-1].words
        if not words or not any(" ".join(words[:n]) in commands for n in (1, 2)):
            raise DataError(f"launch file {path}: process {str(name)!r} starts with no command of this program")
    if sum(plan.terminal for plan in plans) > 1:
        raise DataError(f"launch file {path}: only one process can have the terminal")
    if plans[-1].ready_at_end:
        raise DataError(f"launch file {path}: nothing comes after {plans[-1].name!r}, so nothing can wait for its end")
    return plans


def _plan(name: str, entry: Mapping[str, Any]) -> ProcessPlan:
    """Build the plan of one entry; raises TypeError or ValueError."""
    known = {"run": "run", **{f.name.removesuffix("_s"): f.name for f in fields(ProcessPlan)[2:]}}
    unknown = [str(key) for key in entry if key not in known]
    if unknown:
        raise ValueError(f"unknown key {unknown[0]!r}; valid keys: {', '.join(known)}")
    line = entry.get("run")
    if not isinstance(line, str):
        raise TypeError("it has no command line under the key 'run'")
    try:
        words = _words(line)
    except ValueError as error:
        raise ValueError(f"a command line cannot be read: {one_line(error)}") from None
    values: dict[str, Any] = {}
    for key, value in entry.items():
        if key == "run":
            continue
        field = known[key]
        kind = type(getattr(ProcessPlan(name, words), field))
        kind = str if kind is type(None) else kind
        accepted = (float, int) if kind is float else (kind,)
        if type(value) not in accepted:
            raise TypeError(f"{key} is {value!r}; it must be {_NOUNS[kind]}")
        values[field] = float(value) if kind is float else _VARIABLE.sub(_value, value) if field == "unless" else value
    plan = ProcessPlan(name, words, **values)
    if plan.restart not in _RESTARTS:
        raise ValueError(f"restart is {plan.restart!r}; it must be one of {', '.join(_RESTARTS)}")
    for field in ("ready_within_s", "stop_within_s"):
        if not 0 < getattr(plan, field) <= 86400:
            raise ValueError(f"{field.removesuffix('_s')} is {getattr(plan, field):g}; it must be above 0, in seconds")
    if plan.restarts < 0:
        raise ValueError(f"restarts is {plan.restarts}; it must not be negative")
    return plan


_NOUNS = {str: "text", float: "a number of seconds", int: "a whole number", bool: "true or false"}


def _words(line: str) -> tuple[str, ...]:
    """A command line's words. What a variable holds stays in its word, whatever is in it, and whether it stands in quotes."""
    values: list[str] = []

    def number(found: re.Match[str]) -> str:
        values.append(_value(found))
        return f"\0{len(values) - 1}\0" if values[-1] else ""

    split = shlex.split(_VARIABLE.sub(number, line.replace("\0", "")))
    return tuple(re.sub("\0(\\d+)\0", lambda found: values[int(found[1])], word) for word in split)


def _value(found: re.Match[str]) -> str:
    text = os.environ.get(found[1], found[2])
    if text is None:
        raise ValueError(f"the environment variable {found[1]} is not set")
    return text
