"""Turn a person's interventions in a policy's episodes into demonstrations."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from sacflow_robot.episode import Episode, Source


def human_parts(episode: Episode) -> list[Episode]:
    """The stretches of an episode in which a person had the robot, each as an episode that is cut at its end.

    A part ends as the episode does where it reaches that far, and is truncated otherwise: its last actions have no return
    of their own. It is a success if the episode is.
    """
    human = np.concatenate([[False], episode.source == Source.HUMAN, [False]])
    edges = np.flatnonzero(human[1:] != human[:-1]).reshape(-1, 2).tolist()
    return [replace(episode.cut(first, stop), info={**episode.info, "taken_over_at": first}) for first, stop in edges]
