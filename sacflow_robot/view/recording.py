"""An episode as a recording for the Rerun viewer (https://rerun.io).

Everything is on two timelines: ``step``, and ``time`` since the first observation. Row t holds observation t and what was
done on it; the last row has an observation alone.

    camera/<name>                         pictures
    world/eef, world/objects/<name>       poses, with the path of each
    action/<dimension>/{policy_action, intervention_action, action, measured}
    joints/<name>, observation/<key>/<i>, reward, source, flags, timing/<name>_ms
    events                                who takes over when, flags, the end
    episode                               what the log says of the whole episode
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import rerun as rr
import rerun.blueprint as rrb

from sacflow_robot.episode import STEP_TIMES, Episode, Source, StepFlag
from sacflow_robot.errors import DataError, one_line
from sacflow_robot.spec import Array, ArraySpec, RobotSpec
from sacflow_robot.utils.atomic_files import replacing

_JPEG_QUALITY = 80
_PARTS = {
    "policy_action": (150, 155, 162),
    "intervention_action": (80, 200, 120),
    "action": (86, 156, 255),
    "measured": (255, 176, 46),
}
_AXES = [[255, 80, 80], [80, 200, 120], [86, 156, 255]]
_PATHS = [(86, 156, 255), (255, 176, 46), (80, 200, 120), (200, 120, 220), (230, 100, 100)]
_AXIS_M = 0.05
# Bits of a step's flags that are worth a line; where a chunk starts is not.
_FLAGS = {StepFlag.LATE: "late", StepFlag.CLIPPED: "clipped", StepFlag.HELD: "held"}


@dataclass(frozen=True)
class SceneColumns:
    """Columns that a simulator makes of an episode's states; empty where there is none."""

    # per joint its positions (T + 1,), rad or m
    joints: Mapping[str, Array] = field(default_factory=dict)
    # per object its poses (T + 1, 7) in the world: position (m), unit quaternion x y z w
    objects: Mapping[str, Array] = field(default_factory=dict)
    pictures: Iterable[npt.NDArray[np.uint8]] = ()  # pictures (T + 1 of them) of (height, width, 3)
    camera: str = "agentview"  # name of the camera that they are from


def write_recording(
    path: Path, robot: RobotSpec, episode: Episode, title: str, scene: SceneColumns | None = None
) -> None:
    """Write an episode as ``.rrd``, under its final name only once it is whole.

    Args:
        episode: The episode; every column of it is exported.
        scene: What a simulator adds.

    Raises:
        DataError: It cannot be written there.
    """
    try:
        with replacing(path) as partial:
            partial.touch()  # a folder that takes no file is found out before the pictures are drawn
            stream = rr.RecordingStream("sacflow-robot")
            # Rerun's writer does not report a full disk, so collect in memory and write the file ourselves.
            memory = stream.memory_recording()
            exporter = _Exporter(stream, robot, episode, scene or SceneColumns())
            stream.send_blueprint(make_blueprint(robot, exporter.contents()))
            stream.send_recording_name(title)
            exporter.send(title)
            stream.flush()
            partial.write_bytes(memory.drain_as_bytes())
    except OSError as error:
        raise DataError(f"cannot write a recording at {path}: {one_line(error)}") from None


def make_blueprint(robot: RobotSpec, contents: set[str]) -> rrb.Blueprint:
    """Pictures and space on the left, curves in the middle, the episode's own text on the right."""
    legend = rrb.PlotLegend(visible=False)
    left: list[rrb.View] = []
    if "camera" in contents:
        left.append(rrb.Spatial2DView(origin="/camera", name="Camera"))
    if "world" in contents:
        left.append(rrb.Spatial3DView(origin="/world", name="Gripper and objects"))
    actions = [
        rrb.TimeSeriesView(origin=f"/action/{name}", name=f"{name} (1 is {unit})")
        for name, unit in zip(robot.action_names, robot.action_units, strict=True)
    ]
    grid = rrb.Grid(*actions, grid_columns=2, name="Proposed, human, commanded, measured")
    curves: list[rrb.View | rrb.Container] = [grid]
    if "world" in contents:
        position = rrb.TimeSeriesView(origin="/observation/robot0_eef_pos", name="Position (m)")
        turn = rrb.TimeSeriesView(origin="/observation/robot0_eef_quat", name="Orientation (quaternion x y z w)")
        curves.append(rrb.Vertical(position, turn, name="Gripper"))
    if "joints" in contents:
        curves.append(rrb.TimeSeriesView(origin="/joints", name="Joints (rad, fingers m)"))
    curves.append(rrb.TimeSeriesView(origin="/observation", name="Observation", plot_legend=legend))
    curves.append(rrb.TimeSeriesView(origin="/timing", name="Timing (ms)"))
    story = rrb.Vertical(
        rrb.TextDocumentView(origin="/episode", name="Episode"),
        rrb.TextLogView(origin="/events", name="Events"),
        rrb.TimeSeriesView(origin="/", contents=["/reward", "/source", "/flags"], name="Reward, source, flags"),
        row_shares=[3, 2, 2],
    )
    columns = [*([rrb.Vertical(*left)] if left else []), rrb.Tabs(*curves, active_tab=0), story]
    return rrb.Blueprint(
        rrb.Horizontal(*columns, column_shares=[3.0, 4.0, 2.0][-len(columns) :]),
        rrb.BlueprintPanel(state="collapsed"),
        rrb.SelectionPanel(state="collapsed"),
        rrb.TimePanel(state="expanded"),
    )


class _Exporter:
    """Sends the columns of one episode."""

    def __init__(self, stream: rr.RecordingStream, robot: RobotSpec, episode: Episode, scene: SceneColumns) -> None:
        self._stream = stream
        self._robot = robot
        self._episode = episode
        self._scene = scene
        self._seconds = (episode.time_ns - episode.time_ns[0]) / 1e9

    def contents(self) -> set[str]:
        """The top-level entities that this episode has, of those that not every episode has."""
        seen = self._episode.observations
        there = {
            "camera": self._cameras() or self._scene.pictures,
            "joints": self._scene.joints or "robot0_joint_pos" in seen,
            "world": self._scene.objects or "robot0_eef_pos" in seen,
        }
        return {name for name, content in there.items() if content}

    def send(self, title: str) -> None:
        self._send_text(title)
        self._send_actions()
        self._send_observations()
        self._send_world()
        for name, values in self._scene.joints.items():
            self._scalars(f"joints/{name}", values, name)
        self._send_step_columns()
        self._send_events()
        for name, images in self._cameras().items():
            self._send_pictures(f"camera/{name}", images)
        self._send_pictures(f"camera/{self._scene.camera}", self._scene.pictures)

    def _send_text(self, title: str) -> None:
        rows = {"robot": self._robot.robot, "controller": self._robot.controller, "steps": len(self._episode)}
        rows |= {"duration": f"{self._seconds[-1]:.2f} s", **self._episode.info}
        cells = {key: " ".join(str(value).replace("|", "\\|").split()) for key, value in rows.items()}
        table = "\n".join(f"| {key} | {cell} |" for key, cell in cells.items())
        text = f"# {title}\n\n| | |\n|---|---|\n{table}\n"
        self._stream.log("episode", rr.TextDocument(text, media_type="text/markdown"), static=True)

    def _send_actions(self) -> None:
        for part, color in _PARTS.items():
            actions = getattr(self._episode, part)
            if actions is None or np.isnan(actions).all():
                continue
            for i, name in enumerate(self._robot.action_names):
                self._scalars(f"action/{name}/{part}", actions[:, i], part, color)

    def _send_observations(self) -> None:
        for spec in self._robot.observations:
            values = self._episode.observations[spec.key]
            if _is_picture(spec):
                continue
            entity = "joints" if spec.key == "robot0_joint_pos" else f"observation/{spec.key}"
            flat = values.reshape(len(values), -1)
            for i, name in enumerate(_component_names(spec)):
                self._scalars(f"{entity}/{name}", flat[:, i], f"{name} ({spec.unit})" if len(spec.unit) < 5 else name)

    def _send_world(self) -> None:
        self._stream.log("world", rr.ViewCoordinates.RIGHT_HAND_Z_UP, static=True)
        observations = self._episode.observations
        if "robot0_eef_pos" in observations:
            quaternions = observations.get("robot0_eef_quat")
            self._send_pose("world/eef", observations["robot0_eef_pos"], quaternions, _PATHS[0])
        for i, (name, poses) in enumerate(self._scene.objects.items()):
            color = _PATHS[1 + i % (len(_PATHS) - 1)]
            self._send_pose(f"world/objects/{name}", poses[:, :3], poses[:, 3:], color)

    def _send_pose(
        self, entity: str, positions: npt.NDArray[Any], quaternions: npt.NDArray[Any] | None, color: tuple[int, ...]
    ) -> None:
        """A frame that moves, three axes that move with it, and its whole path, which does not."""
        pose = rr.Transform3D.columns(translation=positions, quaternion=quaternions)
        self._stream.send_columns(entity, self._times(len(positions)), pose)
        axes = rr.Arrows3D(vectors=np.eye(3) * _AXIS_M, colors=_AXES, radii=0.002)
        self._stream.log(f"{entity}/axes", axes, static=True)
        name = entity.rpartition("/")[2]
        path = rr.LineStrips3D([positions], colors=[color], radii=0.0015, labels=[name], show_labels=False)
        self._stream.log(f"world/paths/{name}", path, static=True)

    def _send_step_columns(self) -> None:
        self._scalars("reward", self._episode.rewards, "reward", (80, 200, 120))
        self._scalars("source", self._episode.source, "source", (255, 176, 46))
        if (flags := self._episode.flags) is not None:
            self._scalars("flags", flags, "flags", (230, 100, 100))
        for name, values in self._timings().items():
            self._scalars(f"timing/{name}_ms", values, f"{name} (ms)")

    def _timings(self) -> dict[str, Array]:
        """Spans of each step (T,), ms: its period, and the times of its events after its observation."""
        episode = self._episode
        spans = {"period": np.diff(episode.time_ns) / 1e6}
        for column in STEP_TIMES:
            times = getattr(episode, column)
            if times is not None:
                after = (times - episode.time_ns[:-1]) / 1e6
                spans[column.removesuffix("_ns")] = np.where(times < 0, np.nan, after)  # negative: nobody took it
        return spans

    def _send_events(self) -> None:
        """One line for whatever changes: who acts, the flags, how it ended."""
        episode, before = self._episode, ""
        flags = episode.flags
        for step in range(len(episode)):
            if step == 0 or episode.source[step] != episode.source[step - 1]:
                self._event(step, f"{Source(int(episode.source[step])).name.lower()} acts", "INFO")
            now = "" if flags is None else ", ".join(name for bit, name in _FLAGS.items() if flags[step] & bit)
            if now != before:
                self._event(step, now or f"no longer {before}", "WARN" if now else "INFO")
            before = now
        end = "terminated" if episode.terminated[-1] else "truncated"
        verdict = "solved" if episode.success else "not solved"
        self._event(len(episode), f"{end}, {verdict}", "INFO" if episode.success else "WARN")

    def _event(self, step: int, text: str, level: str) -> None:
        self._set_time(step)
        self._stream.log("events", rr.TextLog(text, level=level))

    def _send_pictures(self, entity: str, images: Iterable[npt.NDArray[Any]]) -> None:
        for step, image in enumerate(images):
            self._set_time(step)
            self._stream.log(entity, _jpeg(image))

    def _cameras(self) -> dict[str, npt.NDArray[Any]]:
        return {a.key: self._episode.observations[a.key] for a in self._robot.observations if _is_picture(a)}

    def _times(self, rows: int) -> list[rr.TimeColumn]:
        steps, seconds = np.arange(rows), self._seconds[:rows]
        return [rr.TimeColumn("step", sequence=steps), rr.TimeColumn("time", duration=seconds)]

    def _set_time(self, step: int) -> None:
        self._stream.set_time("step", sequence=step)
        self._stream.set_time("time", duration=float(self._seconds[step]))

    def _scalars(
        self, entity: str, values: npt.NDArray[Any], name: str, color: tuple[int, int, int] | None = None
    ) -> None:
        """A curve; rows (T,) of steps or (T + 1,) of observations."""
        self._stream.log(entity, rr.SeriesLines(names=[name], colors=None if color is None else [color]), static=True)
        times = self._times(len(values))
        self._stream.send_columns(entity, times, rr.Scalars.columns(scalars=np.asarray(values, np.float64)))


def _is_picture(spec: ArraySpec) -> bool:
    return len(spec.shape) == 3 and spec.shape[-1] in (1, 3)


def _component_names(spec: ArraySpec) -> list[str]:
    if spec.key.endswith("_pos") and spec.shape == (3,):
        return ["x", "y", "z"]
    if spec.key.endswith("_quat") and spec.shape == (4,):
        return ["x", "y", "z", "w"]
    return [str(i) for i in range(spec.size)]


def _jpeg(image: npt.NDArray[Any]) -> rr.EncodedImage | rr.Image:
    """An image (height, width, 1 or 3) of 0 to 255; floats up to 1 are scaled to that."""
    pixels = np.asarray(image)
    if pixels.dtype != np.uint8:
        pixels = np.clip(pixels * (255 if pixels.max(initial=0) <= 1 else 1), 0, 255).astype(np.uint8)
    return rr.Image(pixels[..., 0] if pixels.shape[-1] == 1 else pixels).compress(jpeg_quality=_JPEG_QUALITY)
