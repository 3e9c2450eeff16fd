import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest

from sacflow_robot.data.formats.demonstrations import DemoSet, gripper_disagreement
from sacflow_robot.data.report import draw_page
from sacflow_robot.data.summary import describe_rate, duplicates, idle_steps, measured_rate, summarize
from sacflow_robot.episode import NOMINAL_CLOCK, Episode, Source
from sacflow_robot.spec import ArraySpec, RobotSpec


def test_figures(make_episode: Callable[..., Episode], robot: RobotSpec) -> None:
    human = replace(make_episode(4, seed=1, success=False), source=np.full(4, Source.HUMAN, np.uint8))
    demos = DemoSet(robot, [make_episode(3), human, make_episode(3)])
    figures = json.loads(json.dumps(summarize(demos), allow_nan=False))
    assert figures["steps"] == 10 and figures["steps_per_episode"] == {"min": 3, "median": 3, "max": 4}
    assert figures["sources"] == {"policy": 6, "human": 4}
    assert figures["duplicates"] == [[0, 2]]
    assert figures["returns"] == {"min": 0, "mean": pytest.approx(2 / 3), "max": 1}
    keys = {key["key"]: key for key in figures["keys"]}
    assert keys["object"]["shape"] == [10] and keys["object"]["dtype"] == "float32"
    actions = np.concatenate([e.action for e in demos.episodes])
    assert (keys["action"]["min"], keys["action"]["max"]) == (actions.min(), actions.max())
    assert "measured" not in keys and keys["states"]["shape"] == [32] and keys["source"]["max"] == 1
    assert keys["robot0_eef_pos"]["unit"] == "m in world"


def test_the_measured_rate_is_that_of_the_times(make_episode: Callable[..., Episode]) -> None:
    late = replace(make_episode(4), time_ns=np.array([0, 50, 100, 200, 250]) * 1_000_000)
    rate = measured_rate([late, replace(late, info={"clock": "monotonic"})])
    assert rate["measured_hz"] == pytest.approx(16) and rate["clock"] == ["monotonic"]
    assert rate["period_s"] == pytest.approx({"min": 0.05, "mean": 0.0625, "max": 0.1})
    assert measured_rate([replace(late, time_ns=np.zeros(5, np.int64))])["measured_hz"] is None
    assert describe_rate(rate, 20) == "16 Hz measured (periods 50 to 100 ms), 20 Hz nominal; clock: monotonic"


def test_a_clock_that_counts_steps_measures_nothing(make_episode: Callable[..., Episode]) -> None:
    rate = measured_rate([replace(make_episode(4), info={"clock": NOMINAL_CLOCK})])
    assert rate["measured_hz"] is None and rate["period_s"] is None
    assert describe_rate(rate, 20) == "not recorded; nominal 20 Hz"


def test_a_gripper_that_disagrees_with_its_command(make_episode: Callable[..., Episode], robot: RobotSpec) -> None:
    def disagreement(sign: int, travel: float = 0.002) -> str | None:
        episode = make_episode(40)
        closing = np.where(np.arange(40) < 20, 1, -1).astype(np.float32)
        half = (0.04 - np.r_[0, np.cumsum(closing)] * travel / 2).astype(np.float32)
        observations = {**episode.observations, "robot0_gripper_qpos": np.column_stack([half, -half])}
        commanded = episode.action.copy()
        commanded[:, 6] = sign * closing
        return gripper_disagreement([replace(episode, observations=observations, action=commanded)], robot)

    assert disagreement(1) is None
    assert "in 100% of the steps that move the fingers they go against the command" in (disagreement(-1) or "")
    assert "it changes 1 times, and no finger moves" in (disagreement(1, travel=0) or "")
    joints = replace(robot, action_units=("rad",) * 7)
    assert gripper_disagreement([make_episode(40)], joints) is None, "nothing says what its command means"


def test_idle_steps_command_nothing_new(make_episode: Callable[..., Episode], robot: RobotSpec) -> None:
    actions = np.zeros((5, 7), np.float32)
    actions[:, 6] = -1, -1, 1, 1, 1
    actions[4, 2] = 0.5
    episode = replace(make_episode(5), action=actions)
    assert idle_steps(episode, robot).tolist() == [True, True, False, True, False]
    positions = replace(robot, controller="joint positions")
    assert idle_steps(episode, positions).tolist() == [False, True, False, True, False]


def test_duplicates_are_the_same_actions_to_the_bit(make_episode: Callable[..., Episode]) -> None:
    one, other = make_episode(3), make_episode(3, seed=1)
    nearly = replace(one, action=np.nextafter(one.action, np.float32(2)))
    assert duplicates([one, other, nearly]) == []
    assert duplicates([one, other, nearly, one, other]) == [[0, 3], [1, 4]]


@pytest.mark.parametrize("kind", ["mixed", "one", "other robot"])
def test_a_page_is_drawn(make_episode: Callable[..., Episode], robot: RobotSpec, tmp_path: Path, kind: str) -> None:
    """One page of a fixed size, with something on it; for one episode, and for a robot without our keys, too."""
    episodes = [make_episode(3 + i % 5, seed=i, success=bool(i % 3)) for i in range(1 if kind == "one" else 30)]
    if kind == "other robot":
        robot = replace(
            robot,
            observations=(ArraySpec("q", (2,), "rad"),),
            action_names=tuple("abcdefg"),
            action_low=(-np.inf,) * 7,
            action_high=(np.inf,) * 7,
        )
        episodes = [replace(e, observations={"q": e.observations["robot0_gripper_qpos"]}) for e in episodes]
    demos = DemoSet(robot, episodes)
    draw_page(tmp_path / "page.png", demos, summarize(demos), "title")
    picture = cv2.imread(str(tmp_path / "page.png"))
    assert picture.shape == (1210, 1540, 3)
    for row in np.array_split(picture, 3):
        assert 0.005 < (row < 250).any(axis=2).mean() < 0.9
