"""``sacflow-robot calibrate`` and ``gap``."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import tyro

from sacflow_robot.cli import common
from sacflow_robot.cli.operator import OperatorOptions, operating, with_clock
from sacflow_robot.utils.atomic_files import check_output

if TYPE_CHECKING:
    from sacflow_robot.calibrate.profile import Profile
    from sacflow_robot.calibrate.recording import Recording, Values

_TWIN = "rtsim:lift?joints=1"
_DEFAULT_PROFILE = Path("calibration/sim_panda.yaml")


@dataclass(frozen=True)
class _Result(common.JsonOptions):
    """The old and the new profile, the figure and the report, of every calibration.

    Attributes:
        profile: Calibration profile: its limits hold, its values are the old ones.
        out: Profile to write, with the new values; may be the same. Without it nothing is written.
        plot: Figure to write; by default calibrate-<what>.png.
    """

    profile: Path = _DEFAULT_PROFILE
    out: Path | None = None
    plot: Path | None = None

    what: ClassVar[str]
    method: ClassVar[str]

    def run(self) -> int:
        from sacflow_robot.calibrate.profile import load_profile, with_story, write_profile

        check_output(self.out, parents=False)  # before anything moves
        check_output(self.figure, "--plot", parents=False)
        profile = load_profile(self.profile)
        values, lines, data = self.measure(profile)
        old, new = profile.measured, with_story(values, f"calibrate {self.method}")
        rows: list[tuple[str, ...]] = [("quantity", "old", "new", "one standard deviation")]
        for name, measured in new.items():
            before = _numbers(old[name].value) if name in old else "-"
            rows.append((name, before, _numbers(measured.value), _numbers(measured.uncertainty)))
        self.say(*common.aligned(rows), *lines, f"figure: {self.figure}")
        if self.out is None:
            common.console().print("nothing written; --out PROFILE.yaml writes a profile with the new values")
        else:
            made = write_profile(self.out, self.profile, new)
            self.say(f"wrote {self.out}: version {made.version}, sha256 {made.sha256[:12]}")
        found = {n: {"value": list(m.value), "uncertainty": list(m.uncertainty)} for n, m in new.items()}
        return self.finish({"what": self.what, "values": found, **data})

    @property
    def figure(self) -> Path:
        """The figure to write."""
        return self.plot or Path(f"calibrate-{self.what}.png")

    def measure(self, profile: Profile) -> tuple[Values, list[str], Mapping[str, Any]]:
        """Measure, and draw the figure: the values, lines for people, and more for the JSON object."""
        raise NotImplementedError


@dataclass(frozen=True)
class _Measure(_Result):
    """A calibration that moves a robot, or reads a recording of one that moved.

    Attributes:
        robot: Driver and what it takes; joint positions, where it has them, tell much more than the gripper's pose.
        seconds: Time that the robot moves, at most 120.
        seed: Decides the motion, and the start on a simulated robot.
        clock: Of rtsim: real, or virtual, which does not wait.
        recording: Measure from this recording instead of moving the robot.
        save: Keep the recording here (.npz), to measure something else from it.
        operator: How a person stops the robot.
    """

    robot: str = _TWIN
    seconds: float = 60.0
    seed: int = common.RUN_SEED
    clock: Literal["real", "virtual"] | None = None
    recording: Path | None = None
    save: Path | None = None
    operator: tyro.conf.OmitArgPrefixes[OperatorOptions] = field(default_factory=OperatorOptions)

    def _record(self, profile: Profile, size: float = 0.6) -> Recording:
        from sacflow_robot.calibrate.excitation import Excitation, patient, record
        from sacflow_robot.calibrate.recording import Recording
        from sacflow_robot.robot.control.operator import OperatorRequests, obey, operator_signals, settle
        from sacflow_robot.robot.drivers.registry import make_robot
        from sacflow_robot.robot.safety.filter import SafetyFilter

        check_output(self.save, "--save", parents=False)
        if self.recording is not None:
            return Recording.load(self.recording)
        requests = OperatorRequests()
        with (
            operator_signals(requests),
            closing(make_robot(with_clock(self.robot, self.clock))) as robot,
            _progress("moving") as progress,
            operating(self.operator, robot.spec, requests) as operator,
        ):
            safety = SafetyFilter(robot.spec, patient(profile.safety_limits(robot.spec)))
            excitation = Excitation(robot.spec, self.seconds, self.seed, size)
            robot.connect()
            try:
                made = record(
                    *(robot, safety, excitation, self.seed),
                    progress,
                    lambda commanded: obey(safety, operator.look(commanded)),
                )
            finally:
                settle(robot, safety, operator)
        if self.save is not None:
            made.save(self.save)
        return made


@dataclass(frozen=True)
class Latency(_Measure):
    """Measure how late observations and commands are, and write it to a profile.

    Attributes:
        inference: Ask the policy server this often, and measure how long its answers take.
        server: Address of the policy server.
    """

    inference: int = 0
    server: str = "tcp://127.0.0.1:5555"
    what, method = "latency", "latency"

    def measure(self, profile: Profile) -> tuple[Values, list[str], Mapping[str, Any]]:
        from sacflow_robot.calibrate.figures import draw_latency
        from sacflow_robot.calibrate.latency import measure_inference, measure_latency

        found = measure_latency(self._record(profile))
        values = found.measured(with_offset="transport.clock_offset_ms" in profile.measured)
        if self.inference:
            values["transport.inference_delay_ms"] = measure_inference(self.server, self.inference)
        draw_latency(found, self.figure)
        data = found.summary()
        lines = [f"{name}: {data[name]}" for name in data if name.endswith("p95") and data[name]]
        lines.append(found.clock.words() if found.clock else "the recording does not say when observations arrived")
        return values, lines, data


@dataclass(frozen=True)
class NoiseOf(_Measure):
    """Measure the sensors' errors on a robot at rest, and write them to a profile.

    Attributes:
        seconds: Time that the robot rests, at most 120.
    """

    seconds: float = 20.0
    what, method = "noise", "noise, robot at rest"

    def measure(self, profile: Profile) -> tuple[Values, list[str], Mapping[str, Any]]:
        from sacflow_robot.calibrate.figures import draw_noise
        from sacflow_robot.calibrate.noise import measure_noise
        from sacflow_robot.calibrate.predict import Predictor

        made = self._record(profile, size=0.0)
        joints = "robot0_joint_pos" in made.observations
        found = measure_noise(made, Predictor(made.robot.task).forward if joints else None)
        draw_noise(found, self.figure)
        lines = [f"{found.rows} readings, {found.rate_hz:.0f} a second"]
        lines += [f"{name}: {value:.3g} per square root of hertz" for name, value in found.density.items() if value > 0]
        if not joints:
            lines.append("the pose's bias cannot be measured: this robot does not observe its joints")
        data = {"density_per_sqrt_hz": found.density, "rows": found.rows, "rate_hz": found.rate_hz}
        return found.measured(profile.measured), lines, data


@dataclass(frozen=True)
class Dynamics(_Measure):
    """Identify joints, gains, payload and delay from motion, and write them to a profile.

    Attributes:
        log: Identify from an episode log instead of moving the robot.
    """

    log: Path | None = None
    what, method = "dynamics", "dynamics"

    def measure(self, profile: Profile) -> tuple[Values, list[str], Mapping[str, Any]]:
        from sacflow_robot.calibrate.dynamics import from_excitation, from_log, identify
        from sacflow_robot.calibrate.figures import draw_dynamics
        from sacflow_robot.calibrate.predict import Predictors
        from sacflow_robot.calibrate.recording import read_log
        from sacflow_robot.utils.processes import core_count

        model = profile.model
        recordings = [self._record(profile)] if self.log is None else read_log(self.log)
        with closing(Predictors(recordings[0].robot.task, core_count())) as predictors:
            first = predictors.first
            data = from_log(recordings, first, model) if self.log else from_excitation(recordings[0], first, model)
            with _progress("fitting") as progress:
                fit = identify(predictors, data.windows, data.start, data.sigma, before=model, progress=progress)
            draw_dynamics(fit, *fit.compare(predictors, data.windows, model), self.figure)
        hidden = [label for label, blind in zip(fit.labels, fit.hidden, strict=True) if blind]
        rough = [f"{label} (± {share:.0%})" for label, share in fit.rough.items()]
        lines = [
            f"held-out error of the gripper: {1e3 * fit.held_out_before_m:.2f} mm before, {1e3 * fit.held_out_rmse_m:.2f} mm after",
            f"poorly identified (> 10 %): {', '.join(rough) or 'none'}",
            f"not identified: {', '.join(hidden) or 'none'}",
            f"weakest combination: {', '.join(f'{n} ({v:+.2f})' for n, v in fit.weakest.items())}",
        ]
        return data.measured(fit), lines, fit.summary()


@dataclass(frozen=True)
class Handeye(_Result):
    """Measure where a camera beside the robot is, from pictures of a ChArUco board that the gripper holds.

    The folder holds poses.yaml: ``camera_matrix_px`` (3 by 3), ``distortion`` (5 numbers), and ``pictures``, a list of
    ``file``, ``grip_position_m`` (3) and ``grip_rotation_rad`` (rotation vector in base, 3).

    Attributes:
        images: Folder of pictures and poses.yaml.
        columns: Squares of the board across.
        rows: Squares down.
        square_m: Side of a square (m).
        marker_m: Side of a marker (m).
        dictionary: OpenCV's name of the markers' dictionary.
    """

    images: Path = field(kw_only=True)
    columns: int = 5
    rows: int = 7
    square_m: float = 0.03
    marker_m: float = 0.022
    dictionary: str = "DICT_4X4_50"
    what, method = "handeye", "handeye, ChArUco"

    def measure(self, profile: Profile) -> tuple[Values, list[str], Mapping[str, Any]]:
        from sacflow_robot.calibrate.hand_eye import Board, measure_handeye, read_pictures

        board = Board(self.columns, self.rows, self.square_m, self.marker_m, self.dictionary)
        pictures = read_pictures(self.images)
        found = measure_handeye(pictures, board)
        from sacflow_robot.calibrate.figures import draw_handeye

        draw_handeye(found, self.figure)
        lines = [f"{len(found.corners)} of {len(pictures.images)} pictures used"]
        return found.measured(), lines, {"pictures": len(found.corners)}


@dataclass(frozen=True)
class GapReport(common.JsonOptions):
    """Rank the causes of the difference between a robot and its simulator: replay a log's commands in the simulator.

    Attributes:
        log: Episode log of a robot that moves on its own time, or a recording of calibrate (.npz).
        profile: Calibration profile of the simulated robot to compare with.
        plot: Figure to write.
    """

    log: Path
    profile: Path = _DEFAULT_PROFILE
    plot: Path = Path("gap.png")

    def run(self) -> int:
        import math

        from sacflow_robot.calibrate.figures import draw_gap
        from sacflow_robot.calibrate.gap import measure_gap
        from sacflow_robot.calibrate.predict import Predictors
        from sacflow_robot.calibrate.profile import load_profile
        from sacflow_robot.calibrate.recording import read_log
        from sacflow_robot.utils.processes import core_count

        check_output(self.plot, "--plot", parents=False)
        profile, recordings = load_profile(self.profile), read_log(self.log)
        profile.check_fits(recordings[0].robot)
        with (
            closing(Predictors(recordings[0].robot.task, core_count())) as predictors,
            _progress("comparing") as progress,
        ):
            gap = measure_gap(recordings, predictors, profile.model, progress)
        draw_gap(gap, self.plot)
        rows = [("cause", "explains", "left (mm)", "what to do")]
        for cause in gap.causes:
            share = f"{cause.explains:.0%}" if math.isfinite(cause.explains) else "?"
            rows.append((cause.name, share, f"{1e3 * cause.left_m:.1f}", cause.advice))
        off = f"the gripper is {1e3 * gap.rmse_m:.1f} mm from where it was predicted"
        self.say(f"{self.log} against {self.profile}: {off}", *common.aligned(rows), f"figure: {self.plot}")
        return self.finish(gap.summary())


@contextmanager
def _progress(what: str) -> Iterator[Callable[[float], None]]:
    """A progress bar as a function of the share done."""
    with common.progress_bar("%") as bar:
        row = bar.add_task(what, total=100, success="")
        yield lambda share: bar.update(row, completed=round(100 * share))


def _numbers(values: tuple[float, ...]) -> str:
    return ", ".join(f"{v:.4g}" for v in values)
