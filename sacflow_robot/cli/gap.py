"""``sacflow-robot gap``."""

from __future__ import annotations

from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from sacflow_robot.cli import common
from sacflow_robot.utils.atomic_files import check_output


@dataclass(frozen=True)
class GapReport:
    """Rank the causes of the difference between a robot and its simulator: replay a log's commands in the simulator.

    Attributes:
        log: Episode log of a robot that moves on its own time, or a recording of calibrate (.npz).
        profile: Calibration profile of the simulated robot to compare with.
        plot: Figure to write.
        json: Print the result as one JSON object.
    """

    log: Path
    profile: Path = Path("calibration/sim_panda.yaml")
    plot: Path = Path("gap.png")
    json: bool = False

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
        with closing(Predictors(recordings[0].robot.task, core_count())) as predictors, common.progress_bar("%") as bar:
            row = bar.add_task("comparing", total=100, success="")
            gap = measure_gap(
                recordings, predictors, profile.model, lambda share: bar.update(row, completed=round(100 * share))
            )
        draw_gap(gap, self.plot)
        out = common.results(self.json)
        out.print(
            f"{self.log} against {self.profile}: the gripper is {1e3 * gap.rmse_m:.1f} mm from where it was predicted"
        )
        rows = [("cause", "explains", "left (mm)", "what to do")]
        for cause in gap.causes:
            share = f"{cause.explains:.0%}" if math.isfinite(cause.explains) else "?"
            rows.append((cause.name, share, f"{1e3 * cause.left_m:.1f}", cause.advice))
        for line in common.aligned(rows):
            out.print(line)
        out.print(f"figure: {self.plot}")
        if self.json:
            common.print_json(gap.summary())
        return 0
