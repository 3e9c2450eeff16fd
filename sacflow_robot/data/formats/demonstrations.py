"""Demonstrations between formats: what every reader here returns and every writer takes.

The tables say where each column of :class:`Episode` stands in robomimic's HDF5 and in a LeRobotDataset. A column that
joins Episode joins every format by one more row; one that an episode lacks (None) is left out of its file.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from sacflow_robot.data.formats.agreement import AgreementOptions
from sacflow_robot.episode import NOMINAL_CLOCK, STEP_TIMES, Episode, Source
from sacflow_robot.spec import FloatArray, RobotSpec

ObserveState = Callable[[npt.NDArray[np.float64]], tuple[dict[str, FloatArray], bool]]
"""Observation and success flag of a full simulator state (S,)."""

FIRST_SUCCESS = "first_success"
"""Key of an episode's info: the step that first solved the task, where the recording went on after it."""


class Column(NamedTuple):
    """Names of one column.

    Attributes:
        attribute: Of :class:`Episode`.
        hdf5: Dataset of a demonstration.
        lerobot: Feature. LeRobot takes every name that begins with ``action`` or ``observation`` for a policy's
            output or input, so that none of these does.
        dtype: NumPy name of its type in an episode.
        vector: Whether each row is a vector, which formats that drop extents of 1 do not tell.
    """

    attribute: str
    hdf5: str
    lerobot: str
    dtype: str
    vector: bool = False

    def typed(self, rows: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """Rows as they came out of a file, with an episode's type and number of axes."""
        shaped = rows.reshape(len(rows), -1) if self.vector else rows.reshape(len(rows))
        return shaped.astype(self.dtype, copy=False)


STEP_COLUMNS = (
    Column("policy_action", "policy_action", "policy_action", "float32", vector=True),
    Column("measured", "measured", "measured", "float32", vector=True),
    Column("source", "source", "source", "uint8"),
    Column("rewards", "rewards", "next.reward", "float32"),
    Column("terminated", "dones", "next.terminated", "bool"),
    Column("truncated", "truncated", "next.truncated", "bool"),
    *(Column(name, name, name, "int64") for name in STEP_TIMES),
    Column("flags", "flags", "flags", "uint8"),
    Column("intervention_action", "intervention_action", "intervention_action", "float32", vector=True),
)
"""One row per step (T, ...), beside the commanded action."""

OBSERVATION_COLUMNS = (
    Column("time_ns", "time_ns", "time_ns", "int64"),
    Column("states", "states", "sim_state", "float64", vector=True),
)
"""One row per observation (T + 1, ...), beside the observations themselves."""

OPTIONAL = {f.name for f in fields(Episode) if f.default is None}
"""Attributes of Episode that may be None."""


@dataclass(frozen=True)
class DemoOptions:
    """Options for reading demonstrations.

    Attributes:
        robot: Robot and task that they must fit.
        env_name: robosuite's name of the task, which an HDF5 file must name.
        observe_state: Regenerates observations; needed for raw robosuite files.
        trim_idle: Drop idle steps of raw robosuite files, where keyboard teleoperation spends most of its time.
        sparse_rewards: Whether the task's own rewards are 1 once solved and 0 before, as those of all tasks here are.
        agreement: What the user vouches for, and what may be converted, where a file and the task differ.
    """

    robot: RobotSpec
    env_name: str
    observe_state: ObserveState | None = None
    trim_idle: bool = True
    sparse_rewards: bool = True
    agreement: AgreementOptions = field(default_factory=AgreementOptions)


@dataclass
class Losses:
    """Record of what reading or writing a format could not keep, by column; for one line to the user."""

    left_out: dict[str, None] = field(default_factory=dict)  # ordered, each once
    rounded: dict[str, None] = field(default_factory=dict)
    remarks: dict[str, None] = field(default_factory=dict)

    def leave_out(self, *columns: str) -> None:
        self.left_out.update(dict.fromkeys(columns))

    def remark(self, text: str) -> None:
        self.remarks[text] = None

    def to_float32(self, values: npt.ArrayLike, column: str) -> FloatArray:
        """The values as float32; notes the column if that changes one of them."""
        exact = np.asarray(values)
        with np.errstate(over="ignore"):  # what is beyond float32 becomes infinite, which readers refuse
            rounded = exact.astype(np.float32)
        if exact.dtype != np.float32 and not np.array_equal(rounded, exact, equal_nan=exact.dtype.kind == "f"):
            self.rounded[column] = None
        return rounded

    def __str__(self) -> str:
        """One line; empty when nothing was lost."""
        parts = []
        if self.left_out:
            parts.append(f"left out: {', '.join(self.left_out)}")
        if self.rounded:
            parts.append(f"rounded to float32: {', '.join(self.rounded)}")
        return "; ".join([*parts, *self.remarks])


@dataclass(frozen=True)
class DemoSet:
    """Demonstrations and what their file says about them as a whole.

    Attributes:
        robot: Robot and task of every episode.
        episodes: The episodes, in the file's order.
        env_args: robomimic's description of the environment, where there is one.
        attributes: What else the file says about all of them: names to texts or numbers.
        masks: Named subsets, as indices of episodes.
        model_files: The simulator's model (MJCF) of each episode, where there is one; empty or one per episode.
        losses: What the file holds and an Episode cannot.
    """

    robot: RobotSpec
    episodes: list[Episode]
    env_args: Mapping[str, Any] | None = None
    attributes: Mapping[str, Any] = field(default_factory=dict)
    masks: Mapping[str, list[int]] = field(default_factory=dict)
    model_files: list[str | None] = field(default_factory=list)
    losses: Losses = field(default_factory=Losses)

    def about(self) -> dict[str, Any]:
        """Facts beside the episodes, as JSON values, which formats keep under a name of their own."""
        found = {"env_args": self.env_args, "attributes": dict(self.attributes), "masks": dict(self.masks)}
        return {key: value for key, value in found.items() if value}


def human_episode(
    observations: Mapping[str, FloatArray],
    actions: FloatArray,
    robot: RobotSpec,
    *,
    rewards: FloatArray,
    solved: npt.NDArray[np.bool_] | None = None,
    **columns: Any,
) -> Episode:
    """An episode from a file that says no more than this; T steps.

    Args:
        observations: Per key (T + 1, ...).
        actions: As recorded (T, A); what was commanded is what the controller's range leaves of them.
        robot: Robot and task.
        rewards: (T,).
        solved: Which steps solved the task (T,); by default those of positive reward.
        columns: Columns of Episode that the file has, in place of what would be assumed.
    """
    steps = len(actions)
    solved = rewards > 0 if solved is None else solved
    solving = np.flatnonzero(solved)
    last = np.arange(steps) == steps - 1
    ends_solved = bool(solved[-1])
    info: dict[str, Any] = {"success": bool(len(solving)), "task": robot.task, "clock": NOMINAL_CLOCK}
    if len(solving) and solving[0] < steps - 1:
        info[FIRST_SUCCESS] = int(solving[0])
    known: dict[str, Any] = {
        "action": np.clip(actions, *robot.action_bounds),
        "policy_action": actions,
        "measured": np.full_like(actions, np.nan),
        "source": np.full(steps, Source.HUMAN, np.uint8),
        "terminated": last & ends_solved,
        "truncated": last & (not ends_solved),
        "time_ns": np.round(np.arange(steps + 1) * 1e9 / robot.control_rate_hz).astype(np.int64),
        "info": info,
    }
    return Episode(**{**known, "observations": observations, "rewards": rewards, **columns})


def end_at_success(episode: Episode) -> Episode:
    """The episode up to the step that first solved its task, as the environment would have ended it."""
    solved = episode.info.get(FIRST_SUCCESS)
    if not isinstance(solved, int) or not 0 <= solved < len(episode) - 1:
        return episode
    steps = solved + 1
    return replace(
        episode.cut(0, steps),
        terminated=np.arange(steps) == steps - 1,
        truncated=np.zeros(steps, bool),
        info={key: value for key, value in episode.info.items() if key != FIRST_SUCCESS},
    )
