"""How a client waits: for an answer awake or asleep, and for how long before a silent server is gone."""

from __future__ import annotations

import math
import statistics

HEARTBEAT_S = 1.0
# A ping every half heartbeat, and an answer to it within one and a half: what does not answer is gone within two, and a
# computer that is busy for longer than one heartbeat is not taken for one that is gone.
PING, PATIENCE, TIME_TO_LIVE = 0.5, 1.5, 2.0
AWAKE_S = 0.002
_FIRST_TRIES = 128  # in turns; a median of fewer is wrong too often
_TRY_THE_OTHER = 128  # more often, and the slower way would be what the slowest hundredth of answers came by
_VOTES = 6  # by how many tries the other way has to be ahead: fewer, and chance decides
_STEP = 1.02
_PATIENT = 2.0


class NotThereError(Exception):
    """There is nobody to send to."""


class Habit:
    """Whether to wait for an answer awake or asleep: the way that brought answers sooner of late, the other one now and then.

    Awake is quicker as a rule. It is not where others want the core, who are given way to for long; nor where the answer comes
    from a thread of this process, which cannot run while this one holds the interpreter; nor where it comes from far away.
    """

    def __init__(self) -> None:
        self._turn, self._votes = 0, 0
        self._tried: dict[bool, list[float]] = {True: [], False: []}
        self._better, self._typical_s = True, math.inf

    def awake(self) -> bool:
        """How to wait this time."""
        self._turn += 1
        if math.isinf(self._typical_s):
            return self._turn % 2 == 1
        return self._better != (self._turn % _TRY_THE_OTHER == 0)

    @property
    def patience_s(self) -> float:
        """How long to wait awake: what takes longer than usual may be waiting for this one's core."""
        return _PATIENT * self._typical_s

    def learn(self, awake: bool, took_s: float) -> None:
        """The answer waited for in that way took so long."""
        if math.isinf(self._typical_s):
            self._tried[awake].append(took_s)
            if min(map(len, self._tried.values())) >= _FIRST_TRIES // 2:
                self._prefer({way: statistics.median(times) for way, times in self._tried.items()})
        elif awake is self._better:
            # Follows the median: what else the computer does makes some answers late, however they are waited for.
            self._typical_s *= _STEP if took_s > self._typical_s else 1 / _STEP
        else:
            self._votes = max(0, self._votes + (1 if took_s < self._typical_s else -1))
            if self._votes == _VOTES:
                self._prefer({awake: took_s})

    def _prefer(self, typical_s: dict[bool, float]) -> None:
        """The way in which answers typically take the shortest of these times."""
        self._votes, self._better = 0, min(typical_s, key=lambda way: typical_s[way])
        self._typical_s = typical_s[self._better]
