"""``sacflow-robot demos convert``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from sacflow_robot.cli import common
from sacflow_robot.data.formats.agreement import AgreementOptions


@dataclass(frozen=True)
class Convert(AgreementOptions):
    """Convert demonstrations between formats: episode log, robomimic HDF5, LeRobotDataset v3.0; read others too.

    What the destination cannot hold is said in one line; all else comes back bit for bit.

    Attributes:
        src: Episode log, LeRobotDataset or diffusion_policy store (folders), UMI's .zarr.zip, robomimic or raw robosuite
            HDF5 file, or robomimic:<task>/<ph|mh>.
        dst: What to make; its suffix names the format: .zarr, .hdf5 (or .h5), .lerobot.
        to: Format, where the suffix names none.
        env: Task that the demonstrations are to fit; by default the one, or the robot, that the source names.
        trim_idle: Leave out idle steps of raw robosuite files.
        json: Print the result as one JSON object.
    """

    src: Annotated[str, tyro.conf.Positional]
    dst: Annotated[Path, tyro.conf.Positional]
    to: Literal["zarr", "hdf5", "lerobot"] | None = None
    env: str | None = None
    trim_idle: bool = False
    json: bool = False

    def run(self) -> int:
        from sacflow_robot.data.formats.foreign_episodes import NO_SUCCESS
        from sacflow_robot.data.formats.sources import check_free, kind_to_write, write_demos
        from sacflow_robot.learn import demo_source

        kind = kind_to_write(self.dst, self.to)
        check_free(self.dst)
        demos = demo_source.read(demo_source.locate(self.src), self.env, self.trim_idle, self)
        if kind == "hdf5":
            demos = demo_source.describe_environment(demos)
        written = write_demos(self.dst, demos, kind)
        losses = str(written.losses)
        solved, steps = sum(e.success for e in written.episodes), sum(map(len, written.episodes))
        success = common.describe_success(solved, len(written.episodes))
        if NO_SUCCESS in written.losses.remarks:
            success = "not recorded"
        common.results(self.json).print(
            f"wrote {self.dst}: {len(written.episodes)} episodes, {steps:,} steps, success {success}"
        )
        if losses:
            common.console().print(f"not the same as in {self.src}: {losses}")
        if self.json:
            common.print_json(
                {
                    **common.success_json(solved, len(written.episodes)),
                    "steps": steps,
                    "out": str(self.dst),
                    "format": kind,
                    "left_out": list(written.losses.left_out),
                    "rounded": list(written.losses.rounded),
                    "remarks": list(written.losses.remarks),
                }
            )
        return 0
