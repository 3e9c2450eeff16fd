"""Layout of an episode in the Rerun viewer."""

from __future__ import annotations

import rerun.blueprint as rrb

from sacflow_robot.spec import RobotSpec


def make_blueprint(robot: RobotSpec, contents: set[str]) -> rrb.Blueprint:
    """Pictures and space on the left, curves in the middle, the episode's own text on the right.

    Args:
        robot: The robot.
        contents: Top-level entities that there are.
    """
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
    curves: list[rrb.View | rrb.Container] = [
        rrb.Grid(*actions, grid_columns=2, name="Proposed, human, commanded, measured")
    ]
    if "world" in contents:
        curves.append(
            rrb.Vertical(
                rrb.TimeSeriesView(origin="/observation/robot0_eef_pos", name="Position (m)"),
                rrb.TimeSeriesView(origin="/observation/robot0_eef_quat", name="Orientation (quaternion x y z w)"),
                name="Gripper",
            )
        )
    if "joints" in contents:
        curves.append(rrb.TimeSeriesView(origin="/joints", name="Joints (rad, fingers m)"))
    curves.append(rrb.TimeSeriesView(origin="/observation", name="Observation", plot_legend=legend))
    if "timing" in contents:
        curves.append(rrb.TimeSeriesView(origin="/timing", name="Timing (ms)"))
    story = rrb.Vertical(
        rrb.TextDocumentView(origin="/episode", name="Episode"),
        rrb.TextLogView(origin="/events", name="Events"),
        rrb.TimeSeriesView(origin="/", contents=["/reward", "/source", "/flags"], name="Reward, source, flags"),
        row_shares=[3, 2, 2],
    )
    columns: list[rrb.View | rrb.Container] = [
        *([rrb.Vertical(*left)] if left else []),
        rrb.Tabs(*curves, active_tab=0),
        story,
    ]
    shares = [*([3.0] if left else []), 4.0, 2.0]
    return rrb.Blueprint(
        rrb.Horizontal(*columns, column_shares=shares),
        rrb.BlueprintPanel(state="collapsed"),
        rrb.SelectionPanel(state="collapsed"),
        rrb.TimePanel(state="expanded"),
    )
