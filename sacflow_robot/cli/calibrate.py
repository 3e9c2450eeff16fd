"""``sacflow-robot calibrate``."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import tyro

from sacflow_robot.cli import common
from sacflow_robot.cli.operator import OperatorOptions, operating
from sacflow_robot.errors import DataError, UsageError, one_line
from sacflow_robot.utils.atomic_files import check_output

if TYPE_CHECKING:
    from sacflow_robot.calibrate.profile import Profile
    from sacflow_robot.calibrate.recording import Recording
    from sacflow_robot.envs.robot_parameters import Measured
    from sacflow_robot.interfaces import Robot

_TWIN = "rtsim:lift?joints=1"
_DEFAULT_PROFILE = Path("calibration/sim_panda.yaml")


@dataclass(frozen=True)
class _Measure:
    """What measuring on a robot takes.

    Attributes:
        robot: Driver and what it takes; joint positions, where it has them, tell much more than the gripper's pose.
        profile: Calibration profile: its limits hold, its values are the old ones.
        out: Profile to write, with the new values; may be the same. Without it nothing is written.
        seconds: Time that the robot moves, at most 120.
        seed: Decides the motion, and the start on a simulated robot.
        clock: Of rtsim: real, or virtual, which does not wait.
        recording: Measure from this recording instead of moving the robot.
        save: Keep the recording here (.npz), to measure something else from it.
        plot: Figure to write; by default calibrate-<what>.png.
        operator: How a person stops the robot.
        json: Print the result as one JSON object.
    """

    robot: str = _TWIN
    profile: Path = _DEFAULT_PROFILE
    out: Path | None = None
    seconds: float = 60.0
    seed: int = common.RUN_SEED
    clock: Literal["real", "virtual"] | None = None
    recording: Path | None = None
    save: Path | None = None
    plot: Path | None = None
    operator: tyro.conf.OmitArgPrefixes[OperatorOptions] = field(default_factory=OperatorOptions)
    json: bool = False

    def _record(self, profile: Profile, size: float = 0.6) -> Recording:
        from sacflow_robot.calibrate.recording import Excitation, Recording, record
        from sacflow_robot.robot.control.operator import obey, settle
        from sacflow_robot.robot.control.operator_requests import OperatorRequests, operator_signals
        from sacflow_robot.robot.drivers.registry import make_robot
        from sacflow_robot.robot.safety.filter import SafetyFilter

        if self.recording is not None:
            return Recording.load(self.recording)
        name = (
            self.robot if self.clock is None else f"{self.robot}{'&' if '?' in self.robot else '?'}clock={self.clock}"
        )
        requests = OperatorRequests()
        with (
            operator_signals(requests),
            closing(make_robot(name)) as robot,
            common.progress_bar("%") as bar,
            operating(self.operator, robot.spec, requests) as operator,
        ):
            row = bar.add_task("moving", total=100, success="")
            limits = _patient(robot, profile)
            excitation = Excitation(robot.spec, self.seconds, self.seed, size)
            if robot.lockstep:
                raise UsageError(
                    f"{self.robot}: its time stands still between commands; nothing can be learnt of delays there"
                )
            safety = SafetyFilter(robot.spec, limits)
            robot.connect()
            try:
                made = record(
                    *(robot, safety, excitation, self.seed),
                    lambda share: bar.update(row, completed=round(100 * share)),
                    lambda commanded: obey(safety, operator.look(commanded)),
                )
            finally:
                settle(robot, safety, operator)
        if self.save is not None:
            made.save(self.save)
        return made

    def _report(
        self, what: str, profile: Profile, new: Mapping[str, Measured], lines: list[str], data: dict[str, Any]
    ) -> int:
        from sacflow_robot.calibrate.profile_update import write_profile

        out = common.results(self.json)
        rows: list[tuple[str, ...]] = [("quantity", "old", "new", "one standard deviation")]
        for name, measured in new.items():
            old = profile.measured.get(name)
            rows.append(
                (
                    name,
                    "-" if old is None else _numbers(old.value),
                    *map(_numbers, (measured.value, measured.uncertainty)),
                )
            )
        for line in common.aligned(rows):
            out.print(line)
        for line in lines:
            out.print(line)
        if self.plot_path(what).exists():
            out.print(f"figure: {self.plot_path(what)}")
        if self.out is None:
            common.console().print("nothing written; --out PROFILE.yaml writes a profile with the new values")
        else:
            made = write_profile(self.out, self.profile, new)
            out.print(f"wrote {self.out}: version {made.version}, sha256 {made.sha256[:12]}")
        if self.json:
            values = {n: {"value": list(m.value), "uncertainty": list(m.uncertainty)} for n, m in new.items()}
            common.print_json({"what": what, "values": values, **data})
        return 0

    def plot_path(self, what: str) -> Path:
        return self.plot or Path(f"calibrate-{what}.png")

    def _check_outputs(self, what: str) -> None:
        """Refuse files that could not be written, before anything moves."""
        check_output(self.out, parents=False)
        check_output(self.save, "--save", parents=False)
        check_output(self.plot_path(what), "--plot", parents=False)

    def _old(self) -> Profile:
        from sacflow_robot.calibrate.profile import load_profile

        return load_profile(self.profile)


@dataclass(frozen=True)
class Latency(_Measure):
    """Measure how late observations and commands are, and write it to a profile.

    Attributes:
        inference: Ask the policy server this often, and measure how long its answers take.
        server: Address of the policy server.
    """

    inference: int = 0
    server: str = "tcp://127.0.0.1:5555"

    def run(self) -> int:
        from sacflow_robot.calibrate.figures import draw_latency
        from sacflow_robot.calibrate.latency import measure_latency
        from sacflow_robot.calibrate.profile_update import with_story

        self._check_outputs("latency")
        profile = self._old()
        found = measure_latency(self._record(profile))
        import numpy as np

        one = np.ones(1)
        values = {"transport.command_delay_ms": (1e3 * found.command_mean_s * one, 1e3 * found.unsure_s * one)}
        if len(found.observation_s):
            late, clock = found.observation_s, found.clock
            apart = clock.spread_s if clock is not None and clock.differs else 0.0
            low = np.percentile(late, 2) if found.jitter_s else np.median(late)
            spread = 1e3 * np.hypot(late.std() / np.sqrt(len(late)), apart) + 0.5
            values["transport.observation_delay_ms"] = 1e3 * low * one, spread * one
            values["transport.jitter_ms"] = 1e3 * found.jitter_s * one, 0.5 * one
            if clock is not None and (clock.differs or "transport.clock_offset_ms" in profile.measured):
                values["transport.clock_offset_ms"] = 1e3 * clock.offset_s * one, 1e3 * clock.spread_s * one
        if self.inference:
            asked = _inference_ms(self.server, self.inference)
            values["transport.inference_delay_ms"] = np.median(asked) * one, asked.std() / np.sqrt(len(asked)) * one
        draw_latency(found, self.plot_path("latency"))
        percentiles = {
            name: [round(1e3 * float(v), 2) for v in np.percentile(rows, [5, 50, 95])] if len(rows) else None
            for name, rows in (
                ("observation_ms_p5_p50_p95", found.observation_s),
                ("command_ms_p5_p50_p95", found.command_s),
            )
        }
        lines = [f"{name}: {p}" for name, p in percentiles.items() if p]
        lines.append(found.clock.words() if found.clock else "the recording does not say when observations arrived")
        data = {
            **percentiles,
            "clock": None if found.clock is None else {
                "differs": found.clock.differs,
                "offset_ms_low_high": [round(1e3 * v, 3) for v in (found.clock.low_s, found.clock.high_s)],
                "drift_ppm": found.clock.way.drift_ppm,
                "drift_spread_ppm": found.clock.way.spread_ppm,
            },
            "round_trip_ms": 1e3 * found.round_trip_s,
        }  # fmt: skip
        return self._report("latency", profile, with_story(values, "calibrate latency"), lines, data)


@dataclass(frozen=True)
class NoiseOf(_Measure):
    """Measure the sensors' errors on a robot at rest, and write them to a profile.

    Attributes:
        seconds: Time that the robot rests, at most 120.
    """

    seconds: float = 20.0

    def run(self) -> int:
        import numpy as np

        from sacflow_robot.calibrate.figures import draw_noise
        from sacflow_robot.calibrate.noise import measure_noise
        from sacflow_robot.calibrate.predict import Predictor
        from sacflow_robot.calibrate.profile_update import with_story

        self._check_outputs("noise")
        profile = self._old()
        made = self._record(profile, size=0.0)
        joints = "robot0_joint_pos" in made.observations
        found = measure_noise(made, Predictor(made.robot.task).forward if joints else None)
        values = {n: v for n, v in found.values.items() if v[0].any() or n in profile.measured}
        values["transport.observation_drop_ratio"] = np.array([found.dropped]), np.array([0.5 / found.rows])
        draw_noise(found, self.plot_path("noise"))
        lines = [f"{found.rows} readings, {found.rate_hz:.0f} a second"]
        lines += [f"{name}: {value:.3g} per square root of hertz" for name, value in found.density.items() if value > 0]
        if not joints:
            lines.append("the pose's bias cannot be told: this robot does not observe its joints")
        data = {"density_per_sqrt_hz": found.density, "rows": found.rows, "rate_hz": found.rate_hz}
        return self._report("noise", profile, with_story(values, "calibrate noise, robot at rest"), lines, data)


@dataclass(frozen=True)
class Dynamics(_Measure):
    """Identify joints, gains, payload and delay from motion, and write them to a profile.

    Attributes:
        log: Identify from an episode log instead of moving the robot.
    """

    log: Path | None = None

    def run(self) -> int:
        import numpy as np

        from sacflow_robot.calibrate.dynamics import identify
        from sacflow_robot.calibrate.figures import draw_dynamics
        from sacflow_robot.calibrate.latency import measure_latency
        from sacflow_robot.calibrate.noise import measure_noise
        from sacflow_robot.calibrate.predict import Predictors, make_windows
        from sacflow_robot.calibrate.profile_update import with_story
        from sacflow_robot.calibrate.recording import bursts, read_log
        from sacflow_robot.envs.vector_env import core_count

        self._check_outputs("dynamics")
        profile = self._old()
        recordings = [self._record(profile)] if self.log is None else read_log(self.log)
        first, apart_s = recordings[0], 0.0
        predictors = Predictors(first.robot.task, core_count())
        start = profile.model.part("controller", "joints", "payload", "transport", "sensors")
        if self.log is None:
            noise = measure_noise(first, predictors.first.forward).values
            start = start.having({n: list(v[0]) for n, v in noise.items()})
            latency = measure_latency(first)
            start = start.having({"transport.command_delay_ms": 1e3 * latency.command_mean_s})
            if latency.clock is not None and latency.clock.differs:
                recordings, apart_s = [latency.clock.by_loop(first)], latency.clock.spread_s
        sigma = tuple(
            float(start.sensor(key).get(name, [least])[0])
            for key, name, least in (
                ("robot0_eef_pos", "noise_m", 1e-3),
                ("robot0_eef_quat", "noise_rad", 3e-3),
                ("robot0_joint_pos", "noise_rad", 3e-4),
            )
        )
        delay_s = start.number("transport.command_delay_ms") / 1e3
        windows = []
        for recording in recordings:
            step = round(recording.robot.control_rate_hz)
            pieces = bursts(recording) if self.log is None else [
                (i, min(i + step, len(recording.sent_ns))) for i in range(1, len(recording.sent_ns) - step // 2, step)
            ]  # fmt: skip
            windows += make_windows(recording, pieces, predictors.first, delay_s)
        with common.progress_bar("%") as bar:
            row = bar.add_task("fitting", total=100, success="")
            fit = identify(
                predictors, windows, start, (sigma[0], sigma[1], sigma[2]), before=profile.model,
                progress=lambda share: bar.update(row, completed=round(100 * share)),
            )  # fmt: skip
        window = windows[min(3, len(windows) - 1)]
        nominal = predictors.first.nominal.having(profile.model.values)
        ways = [(nominal, profile.model.number("transport.command_delay_ms") / 1e3), (fit.model, fit.delay_ms / 1e3)]
        before, after = (made[0] for made in predictors.predict(ways, [window]))
        draw_dynamics(fit, window, before, after, self.plot_path("dynamics"))
        predictors.close()
        shares = fit.spread / fit.reference
        hidden = [label for label, blind in zip(fit.labels, fit.hidden, strict=True) if blind]
        rough = [
            f"{label} (± {100 * share:.0f} %)"
            for label, share, told, blind in zip(fit.labels, shares, fit.identified, fit.hidden, strict=True)
            if not told and not blind
        ]
        lines = [
            f"held-out error of the gripper: {1e3 * fit.held_out_before_m:.2f} mm before, {1e3 * fit.held_out_rmse_m:.2f} mm after",
            f"told, but not to 10 %: {', '.join(rough) or 'nothing'}",
            f"the data do not tell: {', '.join(hidden) or 'nothing that was asked'}",
            f"told least: {', '.join(f'{n} ({v:+.2f})' for n, v in fit.weakest.items())}",
        ]
        data = {
            "held_out_before_m": fit.held_out_before_m,
            "held_out_after_m": fit.held_out_rmse_m,
            "parameters": [
                {"name": n, "value": float(v), "spread": float(s), "identified": bool(t), "hidden": bool(h)}
                for n, v, s, t, h in zip(fit.labels, fit.values, fit.spread, fit.identified, fit.hidden, strict=True)
            ],
            "singular_values": [float(s) for s in fit.singular_values],
        }
        measured, late = dict(fit.measured), "transport.command_delay_ms"
        if late in measured and apart_s:  # by two clocks only the delays' sum is told as well as the fit says
            measured[late] = measured[late][0], np.hypot(measured[late][1], 1e3 * apart_s)
        return self._report("dynamics", profile, with_story(measured, "calibrate dynamics"), lines, data)


@dataclass(frozen=True)
class Handeye:
    """Measure where a camera beside the robot is, from pictures of a ChArUco board that the gripper holds.

    The folder holds poses.yaml: ``camera_matrix_px`` (3 by 3), ``distortion`` (5 numbers), and ``pictures``, a list of
    ``file``, ``grip_position_m`` (3) and ``grip_rotation_rad`` (rotation vector in base, 3).

    Attributes:
        images: Folder of pictures and poses.yaml.
        profile: Calibration profile with the old values.
        out: Profile to write; without it nothing is written.
        columns: Squares of the board across.
        rows: Squares down.
        square_m: Side of a square (m).
        marker_m: Side of a marker (m).
        dictionary: OpenCV's name of the markers' dictionary.
        plot: Figure to write.
        json: Print the result as one JSON object.
    """

    images: Path
    profile: Path = _DEFAULT_PROFILE
    out: Path | None = None
    columns: int = 5
    rows: int = 7
    square_m: float = 0.03
    marker_m: float = 0.022
    dictionary: str = "DICT_4X4_50"
    plot: Path | None = None
    json: bool = False

    def run(self) -> int:
        import cv2
        import numpy as np
        import yaml

        from sacflow_robot.calibrate.figures import draw_handeye
        from sacflow_robot.calibrate.hand_eye import Board, measure_handeye
        from sacflow_robot.calibrate.profile_update import with_story

        shared = _Measure(profile=self.profile, out=self.out, plot=self.plot, json=self.json)
        shared._check_outputs("handeye")
        board = Board(self.columns, self.rows, self.square_m, self.marker_m, self.dictionary)
        try:
            told = yaml.safe_load((self.images / "poses.yaml").read_text())
            camera, distortion = (np.array(told[n], np.float64) for n in ("camera_matrix_px", "distortion"))
            pictures: list[Any] = []
            grips: list[Any] = []
            for entry in told["pictures"]:
                pictures.append(cv2.imread(str(self.images / entry["file"]), cv2.IMREAD_GRAYSCALE))
                if pictures[-1] is None:
                    raise DataError(f"{self.images / entry['file']} is no picture that OpenCV reads")
                turn = np.asarray(cv2.Rodrigues(np.array(entry["grip_rotation_rad"], np.float64))[0], np.float64)
                grips.append((np.array(entry["grip_position_m"], np.float64), turn))
        except (OSError, yaml.YAMLError, KeyError, TypeError, ValueError) as error:
            raise DataError(
                f"{self.images}/poses.yaml cannot be read: {one_line(error)}; see 'calibrate handeye --help'"
            ) from None
        found = measure_handeye(pictures, grips, camera, distortion, board)
        pixels = np.array([found.reprojection_px])
        values: dict[str, Any] = {
            "hand_eye.camera_position_m": (found.position_m, found.spread_m),
            "hand_eye.camera_rotation_rad": (found.rotation_rad, found.spread_rad),
            "hand_eye.reprojection_error_px": (pixels, 0 * pixels),
        }
        draw_handeye(found, shared.plot_path("handeye"))
        lines = [f"{len(found.corners)} of {len(pictures)} pictures used"]
        story = with_story(values, "calibrate handeye, ChArUco")
        return shared._report("handeye", shared._old(), story, lines, {"pictures": len(found.corners)})


def _patient(robot: Robot, profile: Profile) -> Any:
    """The profile's limits; ages as they are on a robot whose delays are yet to be measured."""
    from dataclasses import replace

    limits = profile.safety_limits(robot.spec)
    longest = max(limits.max_observation_age_s, 0.5)
    return replace(limits, max_observation_age_s=longest, max_action_age_s=longest, max_command_delay_s=0.4)


def _numbers(values: tuple[float, ...]) -> str:
    return ", ".join(f"{v:.4g}" for v in values)


def _inference_ms(server: str, count: int) -> Any:
    """Round trips of a policy server (count,), ms."""
    import time

    import numpy as np

    from sacflow_robot.serve.client import PolicyClient
    from sacflow_robot.utils.seeding import chunk_noise

    with PolicyClient(server, 2.0, name="calibrate") as client:
        spec = client.spec
        observation = {a.key: np.zeros((1, *a.shape), a.dtype) for a in spec.robot.observations}
        for array in spec.robot.observations:
            for start in array.quaternions:
                observation[array.key].reshape(-1)[start + 3] = 1
        asked = []
        for i in range(count):
            began = time.perf_counter()
            client.infer(observation, chunk_noise(spec.noise_shape, i)[None])
            asked.append(1e3 * (time.perf_counter() - began))
    return np.array(asked)
