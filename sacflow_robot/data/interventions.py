"""What a person did in the middle of a policy's episodes, as demonstrations."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from sacflow_robot.episode import STEP_TIMES, Episode, Source


def human_parts(episode: Episode) -> list[Episode]:
    """The stretches of an episode in which a person had the robot, each as an episode that is cut at its end.

    A part ends as the episode does where it reaches that far, and is truncated otherwise: its last actions have no return
    of their own. It is a success if the episode is.
    """
    human = np.concatenate([[False], episode.source == Source.HUMAN, [False]])
    edges = np.flatnonzero(human[1:] != human[:-1]).reshape(-1, 2)
    return [_part(episode, int(first), int(end)) for first, end in edges]


def _part(episode: Episode, first: int, end: int) -> Episode:
    steps, states = slice(first, end), slice(first, end + 1)
    truncated = episode.truncated[steps].copy()
    truncated[-1] |= not episode.terminated[end - 1]
    columns: dict[str, Any] = {
        name: None if (column := getattr(episode, name)) is None else column[steps]
        for name in (
            "action",
            "policy_action",
            "measured",
            "source",
            "rewards",
            "terminated",
            *STEP_TIMES,
            "flags",
            "intervention_action",
        )
    }
    return replace(
        episode,
        observations={key: rows[states] for key, rows in episode.observations.items()},
        truncated=truncated,
        time_ns=episode.time_ns[states],
        states=None if episode.states is None else episode.states[states],
        info={**episode.info, "taken_over_at": first},
        **columns,
    )
