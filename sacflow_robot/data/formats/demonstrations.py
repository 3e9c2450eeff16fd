"""Demonstrations between formats: what every reader here returns and every writer takes."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from sacflow_robot.data.formats.agreement import AgreementOptions
from sacflow_robot.episode import NOMINAL_CLOCK, Episode, Source
from sacflow_robot.spec import FloatArray, RobotSpec

ObserveState = Callable[[npt.NDArray[np.float64]], tuple[dict[str, FloatArray], bool]]
"""Observation and success flag of a full simulator state (S,)."""

FIRST_SUCCESS = "first_success"
"""Key of an episode's info: the step that first solved the task, where the recording went on after it."""
FINGERS = "robot0_gripper_qpos"

_MOVES_M = 5e-4  # fingers that come nearer or part by less than this in a step do not move
_FEWEST = 20  # moves, before anything is said
_AGAINST = 0.8


class Description(NamedTuple):
    """What a source says of itself as a whole."""

    robot: RobotSpec | None = None  # the robot that it was recorded with; None where it does not say
    env_name: str | None = None  # robosuite's name of its task, likewise
    rate_hz: float | None = None  # control rate (Hz), likewise
    has_observations: bool = True  # false for states, of which the task's simulator makes some


@dataclass(frozen=True)
class DemoOptions:
    """Options for reading demonstrations."""

    robot: RobotSpec  # robot and task that they must fit
    env_name: str  # robosuite's name of the task, which an HDF5 file must name
    observe_state: ObserveState | None = None  # regenerates observations; needed for raw robosuite files
    # drop idle steps of raw robosuite files, where keyboard teleoperation spends most of its time
    trim_idle: bool = True
    # whether the task's own rewards are 1 once solved and 0 before, as those of all tasks here are
    sparse_rewards: bool = True
    # what the user vouches for, and what may be converted, where a file and the task differ
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
    """Demonstrations and what their file says about them as a whole."""

    robot: RobotSpec  # robot and task of every episode
    episodes: list[Episode]  # the episodes, in the file's order
    env_args: Mapping[str, Any] | None = None  # robomimic's description of the environment, where there is one
    # what else the file says about all of them: names to texts or numbers
    attributes: Mapping[str, Any] = field(default_factory=dict)
    masks: Mapping[str, list[int]] = field(default_factory=dict)  # named subsets, as indices of episodes
    # the simulator's model (MJCF) of each episode, where there is one; empty or one per episode
    model_files: list[str | None] = field(default_factory=list)
    losses: Losses = field(default_factory=Losses)  # what the file holds and an Episode cannot

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
    """An episode of T steps from a file that says no more than this.

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


def gripper_dimensions(robot: RobotSpec) -> npt.NDArray[np.bool_]:
    """Mask (A,) of the action dimensions that are the gripper's, by their names."""
    return np.array(["gripper" in name for name in robot.action_names], bool)


def finger_width(episode: Episode) -> npt.NDArray[np.float64]:
    """Distance between the fingers (T + 1,), m."""
    width: npt.NDArray[np.float64] = np.ptp(episode.observations[FINGERS].astype(np.float64), axis=1)
    return width


def gripper_disagreement(episodes: Sequence[Episode], robot: RobotSpec) -> str | None:
    """A line that says so, where the fingers mostly part while the command closes them; None where they obey."""
    dimensions = np.flatnonzero(gripper_dimensions(robot))
    if len(dimensions) != 1 or robot.action_units[dimensions[0]] != "closing":
        return None
    if any(FINGERS not in each.observations for each in episodes):
        return None
    closing = [episode.action[:, dimensions[0]] for episode in episodes]
    change = np.concatenate([np.diff(finger_width(episode)) for episode in episodes])
    moving = np.abs(change) > _MOVES_M
    moves = int(moving.sum())
    against = int((moving & (np.sign(np.concatenate(closing)) == np.sign(change))).sum())
    commands = sum(int((np.diff(np.sign(each)) != 0).sum()) for each in closing)
    if moves >= _FEWEST and against > _AGAINST * moves:
        return (
            f"the gripper's command and fingers disagree: in {against / moves:.0%} of the steps that move the fingers they go "
            f"against the command; an action of 1 must close them, turn its sign around if it opens them"
        )
    if not moves and commands:
        return f"the gripper's command and fingers disagree: it changes {commands} times, and no finger moves"
    return None


def human_parts(episode: Episode) -> list[Episode]:
    """The stretches of an episode in which a person had the robot, each as an episode that is cut at its end.

    A part ends as the episode does where it reaches that far, and is truncated otherwise: its last actions have no return
    of their own. It is a success if the episode is.
    """
    human = np.concatenate([[False], episode.source == Source.HUMAN, [False]])
    edges = np.flatnonzero(human[1:] != human[:-1]).reshape(-1, 2).tolist()
    return [replace(episode.cut(first, stop), info={**episode.info, "taken_over_at": first}) for first, stop in edges]
