"""How a client waits: for an answer awake or asleep, and for how long before a silent server is gone."""

from __future__ import annotations

import math

HEARTBEAT_S = 1.0
# A ping every half heartbeat, and an answer to it within one and a half: what does not answer is gone within two, and a
# computer that is busy for longer than one heartbeat is not taken for one that is gone.
PING, PATIENCE, TIME_TO_LIVE = 0.5, 1.5, 2.0
AWAKE_S = 0.002
_FIRST_TRIES = 32  # in turns
_TRY_THE_OTHER = 256  # more often, and the slower way would be what the slowest hundredth of answers came by
_STEP, _FIRST_STEP = 1.05, 1.3
_PATIENT = 2.0


class NotThereError(Exception):
    """There is nobody to send to."""


class Habit:
    """Whether to wait for an answer awake or asleep: the way that brought answers sooner of late, the other one now and then.

    Awake is quicker as a rule. It is not where others want the core, who are given way to for long; nor where the answer comes
    from a thread of this process, which cannot run while this one holds the interpreter; nor where it comes from far away.
    """

    def __init__(self) -> None:
        self._turn = 0
        self._typical_s: dict[bool, float] = {}

    def awake(self) -> bool:
        """How to wait this time."""
        self._turn += 1
        if self._turn <= _FIRST_TRIES or len(self._typical_s) < 2:
            return self._turn % 2 == 1
        better = self._typical_s[True] < self._typical_s[False]
        return better != (self._turn % _TRY_THE_OTHER == 0)

    @property
    def patience_s(self) -> float:
        """How long to wait awake: what takes longer than usual may be waiting for this one's core."""
        return _PATIENT * self._typical_s.get(True, math.inf)

    def learn(self, awake: bool, took_s: float) -> None:
        """The answer waited for in that way took so long."""
        before = self._typical_s.get(awake)
        step = _FIRST_STEP if self._turn <= _FIRST_TRIES else _STEP
        # Follows the median: what else the computer does makes some answers late, however they are waited for.
        self._typical_s[awake] = took_s if before is None else before * (step if took_s > before else 1 / step)
