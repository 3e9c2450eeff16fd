"""``sacflow-robot replay``."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import ExitStack, closing
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from sacflow_robot.cli import common
from sacflow_robot.cli.operator import OperatorOptions, operating, profile_of, safety_filter
from sacflow_robot.errors import InvalidValueError, SacflowError, UsageError, one_line
from sacflow_robot.spec import NO_ENVIRONMENT, Engine
from sacflow_robot.utils.atomic_files import check_output

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from sacflow_robot.envs.robosuite_env import RobosuiteEnv
    from sacflow_robot.episode import Episode
    from sacflow_robot.interfaces import Robot
    from sacflow_robot.robot.control.playback import ReplayResult
    from sacflow_robot.spec import RobotSpec

    Pictures = Iterator[npt.NDArray[np.uint8]]


@dataclass(frozen=True)
class Replay(common.JsonOptions):
    """Send a logged episode's commands to a robot again, and compare what comes of them with the log.

    In the simulator every state is compared; with lockstep timing they come out equal. On another robot the observations
    are compared, and the robot should stand near the logged start.

    Attributes:
        log: Episode log.
        episode: Which episode; negative counts from the end.
        robot: Robot to replay on; by default the log's task in the simulator.
        timing: lockstep sends each command as soon as the one before is done, logged at the logged times.
        profile: Calibration profile whose action limits hold on top of the robot's.
        video: MP4 file to write, where off-screen rendering works.
        env_engine: What steps a simulated robot: compiled, or robosuite's own (stock). By default what stepped it when it was
            logged.
        rerun: Recording to write for the Rerun viewer (.rrd); works without a simulator too, without pictures.
        operator: How a person stops the robot.
    """

    log: Annotated[Path, tyro.conf.Positional]
    episode: int = 0
    robot: str | None = None
    timing: Literal["lockstep", "logged"] = "lockstep"
    profile: Path | None = None
    video: Path | None = None
    env_engine: Engine | None = None
    rerun: Path | None = None
    operator: tyro.conf.OmitArgPrefixes[OperatorOptions] = field(default_factory=OperatorOptions)

    def run(self) -> int:
        from sacflow_robot.data.log.reader import EpisodeLog
        from sacflow_robot.robot.control.operator import OperatorRequests, operator_signals
        from sacflow_robot.robot.control.playback import replay_episode, sending_offsets

        check_output(self.video, "--video", suffix=".mp4", parents=False)
        check_output(self.rerun, "--rerun", suffix=".rrd", parents=False)
        # What is not installed is said before anything moves.
        if self.video is not None:
            _check_import("--video", "av", "PyAV", "sim")
        if self.rerun is not None:
            _check_import("--rerun", "rerun", "rerun-sdk", "viz")
        log = EpisodeLog.open(self.log)
        episode, index = log.read(self.episode), self.episode % len(log)
        title = f"{log.robot.task}, episode {index}"
        with ExitStack() as stack:
            requests = OperatorRequests()
            stack.enter_context(operator_signals(requests))
            robot = self._robot(log.robot, episode)
            env = None
            result = None
            if robot is not None:
                stack.enter_context(closing(robot))
                env = _simulator(robot)
                if self.video is not None and env is None:
                    raise UsageError(
                        f"--video needs a simulated robot to draw, and {self.robot} is not one; leave it out"
                    )
                with operating(self.operator, robot.spec, requests) as operator:
                    robot.connect()
                    result = replay_episode(
                        robot,
                        episode,
                        offsets_ns=sending_offsets(episode) if self.timing == "logged" else None,
                        safety=safety_filter(robot, profile_of(self.profile)),
                        operator=operator,
                    )
            written = self._export(env, log.robot, episode, result, title)
        told = f"{len(episode)} steps, {_verdict(episode.success)} when it was logged"
        if result is not None:
            told = _describe(result)
        self.say(*(f"{kind}: {path}" for kind, path in written.items()), f"episode {index}: {told}")
        self.finish({"episode": index, **_result_json(episode, result), "timing": self.timing})
        return 1 if result is not None and result.stopped else 0

    def _robot(self, spec: RobotSpec, episode: Episode) -> Robot | None:
        """The robot to replay on; None, with a line that says why, where a recording alone can be made."""
        from sacflow_robot.robot.control.playback import check_replayable
        from sacflow_robot.robot.drivers.registry import make_robot
        from sacflow_robot.robot.drivers.wrappers import bare

        asked = self.robot, self.video, self.profile
        needed = self.rerun is None or self.timing == "logged" or any(option is not None for option in asked)
        robot = None
        try:
            logged: Engine = "compiled" if episode.info.get("env_engine") == "compiled" else "stock"
            robot = bare(make_robot(self._robot_name(spec), self.env_engine or logged))
            check_replayable(robot, spec, episode, str(self.log))
        except SacflowError as error:
            if robot is not None:
                robot.close()
            if needed:
                raise
            common.console().print(f"not replayed, exported as logged: {error}")
            return None
        return robot

    def _robot_name(self, robot: RobotSpec) -> str:
        from sacflow_robot.envs.registry import environment_of

        if self.robot is not None:
            return self.robot
        env = environment_of(robot)
        if env == NO_ENVIRONMENT:
            raise UsageError(
                f"{self.log} is of {robot.robot}, {robot.task}, of which there is no simulator here; give --robot"
            )
        return f"sim:{env}"

    def _export(
        self, env: RobosuiteEnv | None, robot: RobotSpec, episode: Episode, result: ReplayResult | None, title: str
    ) -> dict[str, Path]:
        """Write the video of the replay and the recording of the log; returns what was written.

        Pictures are drawn from states after the replay, because drawing one takes as long as a control period.
        """
        written = {}
        drawing = False
        if env is not None and (self.video is not None or self.rerun is not None):
            try:
                env.render()
                drawing = True
            except InvalidValueError as error:
                common.console().print(f"no pictures: {error}")
        if self.video is not None and drawing and env is not None and result is not None:
            shown = replace(episode, action=result.commanded, states=result.states, info={"success": result.success})
            _write_video(self.video, env, robot, shown, title)
            written["video"] = self.video
        if self.rerun is not None:
            _write_recording(self.rerun, env, drawing, robot, episode, title)
            written["recording"] = self.rerun
        return written


def _describe(result: ReplayResult) -> str:
    parts = [f"{result.steps} steps replayed", _verdict(result.success)]
    if result.stopped:
        parts.insert(1, f"then ended: {result.stopped}")
    if result.max_state_deviation is not None:
        parts.append(f"largest state deviation {result.max_state_deviation:.1e}")
    else:
        worst = ", ".join(f"{key} {value:.2g}" for key, value in result.observation_deviation.items())
        parts.append(f"largest deviation of observations: {worst}")
    if result.limited_steps:
        parts.append(f"{result.limited_steps} commands limited")
    if result.max_lateness_ns is not None:
        parts.append(f"commands {result.max_lateness_ns / 1e6:.2f} ms late at most")
    return ", ".join(parts)


def _result_json(episode: Episode, result: ReplayResult | None) -> dict[str, Any]:
    if result is None:
        return {"steps": len(episode), "max_state_deviation": None, "success": episode.success, "replayed": False}
    late = result.max_lateness_ns
    return {
        "steps": result.steps,
        "max_state_deviation": result.max_state_deviation,
        "success": result.success,
        "replayed": True,
        "stopped": result.stopped,
        "max_observation_deviation": dict(result.observation_deviation),
        "limited_steps": result.limited_steps,
        "max_lateness_ms": None if late is None else late / 1e6,
    }


def _verdict(success: bool) -> str:
    return "solved" if success else "not solved"


def _check_import(option: str, module: str, package: str, extra: str) -> None:
    try:
        importlib.import_module(module)
    except ImportError as error:  # absent, or installed beside a NumPy that it cannot use
        raise UsageError(
            f"{option} needs {package} ({one_line(error)}); install it with pip install 'sacflow-robot[{extra}]'"
        ) from None


def _simulator(robot: Robot) -> RobosuiteEnv | None:
    """The simulator behind a simulated arm."""
    from sacflow_robot.robot.control.playback import Restorable

    if not isinstance(robot, Restorable):  # a robot's computer has no simulator to import
        return None
    from sacflow_robot.envs.robosuite_env import RobosuiteEnv
    from sacflow_robot.robot.drivers.sim import SimRobot

    return robot.env if isinstance(robot, SimRobot) and isinstance(robot.env, RobosuiteEnv) else None


def _drawn(what: str, env: RobosuiteEnv, states: npt.NDArray[np.float64]) -> Pictures:
    """Pictures of the states, with a progress bar."""
    from sacflow_robot.envs.scene import pictures

    with common.progress_bar("frames") as bar:
        row = bar.add_task(what, total=len(states), success="")
        for picture in pictures(env, states):
            yield picture
            bar.update(row, advance=1)


def _write_video(path: Path, env: RobosuiteEnv, robot: RobotSpec, episode: Episode, title: str) -> None:
    from sacflow_robot.view.video import CAPTION_HEIGHT, Caption, write_video

    assert episode.states is not None
    caption = Caption(robot, episode, title)
    height, width = env.render().shape[:2]
    with write_video(path, robot.control_rate_hz, (width, height + CAPTION_HEIGHT)) as add:
        for step, picture in enumerate(_drawn("video", env, episode.states)):
            add(caption.draw(picture, step))


def _write_recording(
    path: Path, env: RobosuiteEnv | None, drawing: bool, robot: RobotSpec, episode: Episode, title: str
) -> None:
    from sacflow_robot.view.recording import SceneColumns, write_recording

    scene = SceneColumns()
    if env is not None and episode.states is not None:
        from sacflow_robot.envs.scene import read_scene

        pictures = _drawn("recording", env, episode.states) if drawing else ()
        scene = SceneColumns(*read_scene(env, episode.states), pictures)
    write_recording(path, robot, episode, title, scene)
