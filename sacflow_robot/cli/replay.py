"""``sacflow-robot replay``."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from sacflow_robot.cli import common
from sacflow_robot.errors import DataError, InvalidValueError, SpecMismatchError, UsageError

if TYPE_CHECKING:
    from sacflow_robot.robot.sim import SimRobot


@dataclass(frozen=True)
class Replay:
    """Run a logged episode again in the simulator and compare every state.

    Attributes:
        log: Episode log.
        episode: Which episode; negative counts from the end.
        robot: Simulated arm to replay on; by default the log's task.
        video: MP4 file to write, where off-screen rendering works.
        json: Print the result as one JSON object.
    """

    log: Annotated[Path, tyro.conf.Positional]
    episode: int = 0
    robot: str | None = None
    video: Path | None = None
    json: bool = False

    def run(self) -> int:
        from sacflow_robot.data.log import EpisodeLog
        from sacflow_robot.robot.drivers import make_robot
        from sacflow_robot.robot.replay import replay_episode
        from sacflow_robot.robot.sim import SimRobot

        if self.video is not None and (self.video.suffix.lower() != ".mp4" or not self.video.parent.is_dir()):
            raise UsageError(f"--video {self.video}: give a file that ends in .mp4, in a folder that exists")
        log = EpisodeLog.open(self.log)
        episode = log.read(self.episode)
        robot = make_robot(self.robot or f"sim:{log.arm.task}")
        if not isinstance(robot, SimRobot):
            raise UsageError(f"{self.robot} is not a simulated arm; replay needs one, e.g. sim:{log.arm.task}")
        different = robot.spec.differences(log.arm)
        if different:
            raise SpecMismatchError(f"{self.log} does not fit the robot (robot, log): {'; '.join(different)}")
        out = common.console()
        with _video(self.video, robot) as frame:
            result = replay_episode(robot, episode, frame)
        robot.close()
        index = self.episode % len(log)
        verdict = "solved" if result.success else "not solved"
        out.print(
            f"episode {index}: {result.steps} steps replayed, {verdict}, "
            f"largest state deviation {result.max_state_deviation:.1e}"
        )
        if self.json:
            common.print_json(
                {
                    "episode": index,
                    "steps": result.steps,
                    "max_state_deviation": result.max_state_deviation,
                    "success": result.success,
                }
            )
        return 0


@contextmanager
def _video(path: Path | None, robot: SimRobot) -> Iterator[Callable[[], None]]:
    """A function that adds the present scene to the video; without a path or rendering, one that does nothing."""
    if path is None:
        yield lambda: None
        return
    try:
        first = robot.env.render()
    except InvalidValueError as error:
        common.console().print(f"no video: {error}")
        yield lambda: None
        return
    import cv2

    partial = path.with_name(f".{path.stem}.partial.mp4")
    rate, size = robot.spec.control_rate_hz, (first.shape[1], first.shape[0])
    writer = cv2.VideoWriter(str(partial), cv2.VideoWriter.fourcc(*"mp4v"), rate, size)
    if not writer.isOpened():
        raise DataError(f"cannot write a video at {path}; check the folder")
    try:
        yield lambda: writer.write(cv2.cvtColor(robot.env.render(), cv2.COLOR_RGB2BGR))
        writer.release()
        partial.replace(path)
        common.console().print(f"video: {path}")
    finally:
        writer.release()
        partial.unlink(missing_ok=True)
