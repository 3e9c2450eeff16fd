"""Ages of the newest states of arm and objects, the reasons why nothing newer comes, and waiting for news."""

import time
from collections.abc import Callable
from dataclasses import dataclass

from sacflow_robot.errors import StaleStateError
from sacflow_robot.robot.drivers.deoxys.config import DeoxysConfig
from sacflow_robot.robot.drivers.deoxys.objects import ObjectSource, Sighting, SourceReader
from sacflow_robot.robot.drivers.deoxys.states import ArmState, GripperState
from sacflow_robot.robot.drivers.deoxys.wire import DeoxysWire

_OLD_PERIODS = 2  # what is older than so many control periods has a reason to be told
_HANGS_S = 0.2


@dataclass(frozen=True)
class News:
    """The newest of everything.

    Attributes:
        arm: The newest arm state.
        gripper: The newest gripper state.
        sighting: The objects; None where none are observed.
        captured_ns: When ``arm state`` and ``object pose``, which an observation is as old as, were captured (monotonic ns).
    """

    arm: ArmState
    gripper: GripperState
    sighting: Sighting | None
    captured_ns: dict[str, int]


class Listener(DeoxysWire):
    """The wire, how old it is what came over it, and the object source; ``complain`` gets what goes wrong with that."""

    def __init__(self, config: DeoxysConfig, source: ObjectSource | None, complain: Callable[[str], None]) -> None:
        super().__init__(config)
        self._config = config
        self._old_ns = _OLD_PERIODS * config.arm.period_ns
        self._reader = None if source is None else SourceReader(source, self.take_sighting, complain)

    @property
    def alive(self) -> bool:
        """True while the object source, if there is one, is asked."""
        return self._reader is None or self._reader.alive

    def close(self) -> None:
        if self._reader is not None:
            self._reader.close()
        super().close()

    def news(self, engaged_ns: int | None) -> News:
        """The newest of everything, whatever its age.

        Args:
            engaged_ns: Since when a controller runs on our behalf (monotonic ns); None if none does.

        Raises:
            StaleStateError: Something has never been heard.
        """
        arm, gripper, sighting = self.arm, self.gripper, self.sighting
        if arm is None or gripper is None or (sighting is None and self._config.object):
            raise StaleStateError("the arm has not been heard; connect it first")
        captured = {"arm state": _captured_ns(arm, engaged_ns)}
        if sighting is not None:
            captured["object pose"] = sighting.time_ns
        return News(arm, gripper, sighting, captured)

    def fresh_arm(self, now_ns: int, engaged_ns: int | None) -> ArmState | None:
        old = self.arm is None or now_ns - _captured_ns(self.arm, engaged_ns) > self._old_ns
        return None if old else self.arm

    def check_ages(self, news: News, now_ns: int) -> str:
        """The reason why parts of an observation are old, yet not too old; empty if none is.

        Raises:
            StaleStateError: One is too old to act on.
        """
        for what, at in {**news.captured_ns, "gripper state": news.gripper.received_ns}.items():
            if now_ns - at > self._config.stale_s * 1e9:
                raise StaleStateError(
                    f"the newest {what} is {(now_ns - at) / 1e9:.2f} s old, allowed is {self._config.stale_s:g} s: "
                    f"{self._why_old(what)}"
                )
        return "; ".join(self._why_old(what) for what, at in news.captured_ns.items() if now_ns - at > self._old_ns)

    def wait(self, within_s: float, engaged_ns: int | None, frame: int = -1, trouble: Callable[[], str] = str) -> News:
        """Wait until everything has been heard that was captured after this call, and of no earlier frame.

        Args:
            engaged_ns: As in :meth:`news`.
            frame: The first frame that counts.

        Raises:
            StaleStateError: Something is not heard; says what, and why where that is known.
        """
        since_ns = time.monotonic_ns()
        seen_frame = frame if self._reader is None else -1  # a source that is called counts frames of its own, if any

        def missing() -> list[str]:
            arm, gripper, sighting = self.arm, self.gripper, self.sighting
            found = {
                "arm state": arm is not None and _captured_ns(arm, engaged_ns) >= since_ns and arm.frame >= frame,
                "gripper state": gripper is not None and gripper.received_ns >= since_ns,
                "object pose": not self._config.object
                or (sighting is not None and sighting.time_ns >= since_ns and sighting.frame >= seen_frame),
            }
            return [what for what, heard in found.items() if not heard]

        deadline = time.monotonic() + within_s
        while lacking := missing():
            if time.monotonic() > deadline:
                said = [trouble()] if trouble() else [why for what in lacking if (why := self._known_why(what))]
                if self.malformed:
                    said.append(f"{self.malformed} messages refused: {self.complaint}")
                because = f" ({'; '.join(said)})" if said else ""
                names = " and no ".join(f"{what} from {self._origin(what)}" for what in lacking)
                raise StaleStateError(f"no {names} within {within_s:g} s{because}; is it running?")
            time.sleep(0.002)
        return self.news(engaged_ns)

    def _origin(self, what: str) -> str:
        config = self._config
        if what == "object pose":
            nowhere = "anywhere (SACFLOW.OBJECTS is not given)"
            return config.objects or (nowhere if self._reader is None else "the object source")
        return f"tcp://{config.nuc_ip}:{config.state_port if what == 'arm state' else config.gripper_state_port}"

    def _known_why(self, what: str) -> str:
        if what == "object pose" and self._reader is not None and self._reader.waiting_s > _HANGS_S:
            return f"the object source has not returned for {self._reader.waiting_s:.2f} s"
        return self.repeats.get(what, "")

    def _why_old(self, what: str) -> str:
        if known := self._known_why(what):
            return known
        refused = f" ({self.malformed} messages refused: {self.complaint})" if self.malformed else ""
        if what == "object pose":
            return f"nothing newer came from {self._config.objects or 'the object source'}{refused}"
        return f"no newer {what} came{refused}; is deoxys running on {self._config.nuc_ip}, and the network up?"


def _captured_ns(arm: ArmState, engaged_ns: int | None) -> int:
    """Capture time of a state.

    deoxys reads the arm as long as a controller runs; then a time of the arm's own that stands still is a state that does.
    Without a controller it publishes the state that it read last, whose time stands still by right.
    """
    return arm.received_ns if engaged_ns is None else max(arm.read_ns, min(arm.received_ns, engaged_ns))
