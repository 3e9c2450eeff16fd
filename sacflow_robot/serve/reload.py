"""A new policy file takes the place of the one being served, if it is fit to."""

from __future__ import annotations

import logging
import threading
from pathlib import Path

import numpy as np

from sacflow_robot.errors import PolicyFileError, one_line
from sacflow_robot.export.metadata import NOISE
from sacflow_robot.export.onnx_policy import OnnxPolicy
from sacflow_robot.serve.batching import checked
from sacflow_robot.serve.protocol import PREFIX_MASK
from sacflow_robot.serve.server import PolicyServer

_POLL_S = 0.25
_LOG = logging.getLogger(__name__)


class Reloader:
    """Watches the policy file; loads, tests and compares a new one beside the one that is being served.

    Args:
        max_change: Largest difference from the actions given for the last observations that a new policy may have, in
            action units; None for any.
        watch: Whether to look for a new file; otherwise :meth:`ask` does.
    """

    def __init__(
        self, server: PolicyServer, path: Path, *, max_change: float | None = None, watch: bool = True
    ) -> None:
        self._server, self._path, self._max_change, self._watch = server, path, max_change, watch
        self._wake, self._stop = threading.Event(), threading.Event()
        self._tried = self._stamp()
        self._thread = threading.Thread(target=self._run, name="policy-reloader", daemon=True)

    def start(self) -> Reloader:
        self._thread.start()
        return self

    def ask(self) -> None:
        """Load the file now, also if it looks unchanged; may be called from a signal handler."""
        self._wake.set()

    def close(self) -> None:
        self._stop.set()
        self._wake.set()
        self._thread.join()

    def reload(self) -> bool:
        """Load the file, and have it served if it is fit to; whether it is. The server's meters say what came of it."""
        running = self._server.newest
        try:
            candidate = OnnxPolicy(self._path, running.engine)
            if candidate.version == running.version:
                return False
            comparison = self._compare(running, candidate)
            self._server.offer(candidate)
        except Exception as error:  # whatever is wrong with a file, the one before is served on
            reason = one_line(error, 500)
            self._server.meters.reloaded("refused", {"reason": reason})
            _LOG.warning("new policy file refused: %s", reason, extra={"serving": running.version})
            return False
        self._server.meters.reloaded("taken", {"version": candidate.version, **comparison})
        _LOG.info("policy replaced", extra={"old": running.version, "version": candidate.version, **comparison})
        return True

    def _compare(self, running: OnnxPolicy, candidate: OnnxPolicy) -> dict[str, float]:
        """Largest and mean difference of actions on recent observations, how many rows these were, and their share of
        all recent rows.
        """
        different = running.spec.robot.differences(candidate.spec.robot)
        if candidate.spec.chunk_length != running.spec.chunk_length:
            different.append(f"chunk_length: {running.spec.chunk_length}, {candidate.spec.chunk_length}")
        if different:
            raise PolicyFileError(f"{self._path} is for another robot (served, new): {'; '.join(different)}")
        recent = [(inputs, actions) for inputs, actions in self._server.recent.copy() if np.isfinite(actions).all()]
        differences = []
        for inputs, actions in recent:
            if np.any(inputs.get(PREFIX_MASK, 0)) and not candidate.takes_prefix:
                continue  # it was to complete a prefix, which the new one cannot
            proposed = candidate.run(checked(candidate, inputs, inputs[NOISE]))
            if not np.isfinite(proposed).all():
                raise PolicyFileError(f"{self._path} puts out NaN or infinity for a recent observation")
            differences.append(np.abs(proposed - actions).reshape(-1))
        every = np.concatenate(differences) if differences else np.zeros(0)
        if not every.size:
            return {"max_change": 0.0, "mean_change": 0.0, "compared_rows": 0, "compared_share": 0.0}
        largest = float(every.max())
        if self._max_change is not None and largest > self._max_change:
            raise PolicyFileError(
                f"{self._path} changes a recent action by {largest:.3g}, at most {self._max_change:g} is allowed"
            )
        return {
            "max_change": round(largest, 4),
            "mean_change": round(float(every.mean()), 4),
            "compared_rows": every.size // int(np.prod(running.spec.noise_shape)),
            "compared_share": round(every.size / sum(actions.size for _, actions in recent), 3),
        }

    def _run(self) -> None:
        previous = self._tried
        while not self._stop.is_set():
            asked = self._wake.wait(_POLL_S)
            self._wake.clear()
            if self._stop.is_set():
                return
            now = self._stamp()
            settled = now is not None and now == previous and now != self._tried  # not while it is being written
            if asked or (self._watch and settled):
                self._tried = now
                self.reload()
            previous = now

    def _stamp(self) -> tuple[int, int, int] | None:
        try:
            status = self._path.stat()
        except OSError:
            return None
        return status.st_mtime_ns, status.st_size, status.st_ino
