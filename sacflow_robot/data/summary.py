"""Figures about a set of demonstrations."""

from collections import Counter, defaultdict
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from sacflow_robot.data.formats.demonstrations import DemoSet, gripper_dimensions, gripper_disagreement
from sacflow_robot.data.log.columns import OBSERVATION_COLUMNS, STEP_COLUMNS
from sacflow_robot.episode import NOMINAL_CLOCK, Episode, Source, StepFlag
from sacflow_robot.spec import RobotSpec

_STILL = 1e-3  # of an action's range: what is commanded below this is no motion


def summarize(demos: DemoSet) -> dict[str, Any]:
    """JSON values: steps, lengths, rates (Hz), sources, keys with shapes and ranges, idle share, duplicates."""
    episodes, robot = demos.episodes, demos.robot
    lengths = [len(e) for e in episodes]
    return {
        "arm": {"robot": robot.robot, "task": robot.task, "controller": robot.controller},
        "steps": sum(lengths),
        "steps_per_episode": {"min": min(lengths), "median": float(np.median(lengths)), "max": max(lengths)},
        "rate": {"nominal_hz": robot.control_rate_hz, **measured_rate(episodes)},
        "sources": count_sources(episodes),
        "policies": sorted(successes_by_version(episodes)),
        "returns": {name: float(f([e.rewards.sum() for e in episodes])) for name, f in _RANGE.items()},
        "keys": describe_keys(demos),
        "idle_share": float(np.mean(np.concatenate([idle_steps(e, robot) for e in episodes]))),
        "saturated_share": _saturated_share(episodes, robot),
        "duplicates": duplicates(episodes),
        "gripper": gripper_disagreement(episodes, robot),
    }


_RANGE: dict[str, Any] = {"min": np.min, "mean": np.mean, "max": np.max}


def measured_rate(episodes: list[Episode]) -> dict[str, Any]:
    """The rate of the capture times, and the shortest, mean and longest period; None where nobody measured them.

    Times of the nominal clock, which counts steps, are not a measurement. ``clock`` says what the times are worth.
    """
    clocks = sorted({str(e.info["clock"]) for e in episodes if "clock" in e.info})
    timed = [e.time_ns for e in episodes if e.info.get("clock") != NOMINAL_CLOCK]
    spans = sum(int(times[-1] - times[0]) for times in timed) / 1e9
    if spans <= 0:
        return {"measured_hz": None, "period_s": None, "clock": clocks}
    periods = np.concatenate([np.diff(times) for times in timed]) / 1e9
    return {
        "measured_hz": len(periods) / spans,
        "period_s": {name: float(f(periods)) for name, f in _RANGE.items()},
        "clock": clocks,
    }


def describe_rate(rate: Mapping[str, Any], nominal_hz: float) -> str:
    """``19.98 Hz measured (periods 49.1 to 53.2 ms), 20 Hz nominal``, or that no time was recorded."""
    if rate["measured_hz"] is None:
        return f"not recorded; nominal {nominal_hz:g} Hz"
    shortest, longest = (1e3 * rate["period_s"][name] for name in ("min", "max"))
    clock = ", ".join(rate["clock"]) or "not named"
    return (
        f"{rate['measured_hz']:.4g} Hz measured (periods {shortest:.4g} to {longest:.4g} ms), {nominal_hz:g} Hz nominal; "
        f"clock: {clock}"
    )


def count_sources(episodes: list[Episode]) -> dict[str, int]:
    """Steps by who chose them."""
    counts: Counter[str] = Counter()
    names = {int(source): source.name.lower() for source in Source}
    for episode in episodes:
        for value, count in zip(*np.unique(episode.source, return_counts=True), strict=True):
            counts[names.get(int(value), f"unknown ({value})")] += int(count)
    return dict(counts)


def count_flags(episodes: list[Episode]) -> dict[str, int]:
    """Steps by what was unusual about them; empty where no episode keeps flags."""
    kept = [episode.flags for episode in episodes if episode.flags is not None]
    return {str(flag.name).lower(): sum(int((each & flag != 0).sum()) for each in kept) for flag in StepFlag if kept}


def successes_by_version(episodes: list[Episode]) -> dict[str, list[bool]]:
    """Successes of each policy version, in the order of their first episodes."""
    found: dict[str, list[bool]] = {}
    for episode in episodes:
        if "policy_version" in episode.info:
            found.setdefault(str(episode.info["policy_version"]), []).append(episode.success)
    return found


def describe_keys(demos: DemoSet) -> list[dict[str, Any]]:
    """Per array of an episode: name, shape of a row, type, unit, and the range over all episodes and dimensions."""
    arrays: dict[str, list[npt.NDArray[Any]]] = defaultdict(list)
    for episode in demos.episodes:
        arrays["action"].append(episode.action)
        for spec in demos.robot.observations:
            arrays[spec.key].append(episode.observations[spec.key])
        for column in (*STEP_COLUMNS[1:], *OBSERVATION_COLUMNS):
            values = getattr(episode, column.attribute)
            if values is not None and not (values.dtype.kind == "f" and np.isnan(values).all()):
                arrays[column.attribute].append(values)
    units = {a.key: " ".join(filter(None, (a.unit, a.frame and f"in {a.frame}"))) for a in demos.robot.observations}
    units["action"] = ", ".join(dict.fromkeys(demos.robot.action_units))
    return [
        {
            "key": key,
            "shape": list(parts[0].shape[1:]),
            "dtype": parts[0].dtype.name,
            "unit": units.get(key, ""),
            "min": min(np.nanmin(part).item() for part in parts),
            "max": max(np.nanmax(part).item() for part in parts),
        }
        for key, parts in arrays.items()
    ]


def idle_steps(episode: Episode, robot: RobotSpec) -> npt.NDArray[np.bool_]:
    """Mask (T,) of the steps that command nothing new: no motion (of a controller of positions, no other one) and the same grip."""
    low, high = robot.action_bounds
    actions = episode.action / np.where(np.isfinite(high - low), (high - low) / 2, 1)
    changes = np.abs(np.diff(actions, axis=0, prepend=actions[:1]))
    changes[0] = np.inf if "delta" not in robot.controller else changes[0]
    gripper = gripper_dimensions(robot)
    motion = np.where(gripper, changes, np.abs(actions) if "delta" in robot.controller else changes)
    still: npt.NDArray[np.bool_] = (motion < _STILL).all(axis=1)
    return still


def duplicates(episodes: list[Episode]) -> list[list[int]]:
    """Groups of episodes with the very same actions, by index."""
    groups: dict[bytes, list[int]] = defaultdict(list)
    for i, episode in enumerate(episodes):
        groups[episode.action.tobytes()].append(i)
    return [group for group in groups.values() if len(group) > 1]


def _saturated_share(episodes: list[Episode], robot: RobotSpec) -> float | None:
    """Share of motion commands at the controller's limit; None where there is no motion to command."""
    motion = ~gripper_dimensions(robot)
    if not motion.any():
        return None
    low, high = robot.action_bounds
    actions = np.concatenate([e.action for e in episodes])
    return float(np.mean(((actions <= low) | (actions >= high))[:, motion]))
