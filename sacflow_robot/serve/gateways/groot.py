"""Isaac GR00T's ZeroMQ protocol (N1.6, 1.7), so that its policy client connects unchanged.

REQ/REP; msgpack with string keys, ``{endpoint, data}``. Endpoints: ``ping``, ``get_action``, ``reset``,
``get_modality_config``; its ``kill``, open to anyone there, does not exist here. An observation is ``state[key]``
(B, T, D), of which the last time step counts, ``video`` and ``language`` likewise if the policy has them; the answer is
``action["action"]`` (B, H, A) in the robot's units, and an info map.
"""

import io
import json
import secrets
import threading
from collections.abc import Callable, Mapping
from typing import Any

import msgpack
import numpy as np
import zmq

from sacflow_robot.errors import InvalidValueError, SacflowError, UsageError, WireError
from sacflow_robot.export.onnx_policy import OnnxPolicy
from sacflow_robot.serve import protocol as wire
from sacflow_robot.serve.batching import checked
from sacflow_robot.spec import FloatArray
from sacflow_robot.utils.seeding import chunk_noise
from sacflow_robot.utils.sockets import AddressClaim

_POLL_MS = 100
_MAX_ROWS = 64
_NPY_HEADER_BYTES = 4096
ENDPOINTS = "ping", "get_action", "reset", "get_modality_config"


class GrootGateway:
    """A ZeroMQ REP socket on a thread of its own.

    Args:
        policy: Gives the policy to ask, anew for every request.
        bind: Address, e.g. ``tcp://127.0.0.1:5557``.
        text_config: Whether clients read the modality config as JSON text, as earlier ones do, or as a map, as those of N1.7
            do. Nothing in what a client sends tells which it is, and no answer suits both.

    Raises:
        UsageError: The address cannot be had.
    """

    def __init__(self, policy: Callable[[], OnnxPolicy], bind: str, *, text_config: bool = False) -> None:
        self._policy, self._seed, self._count = policy, secrets.randbits(63), 0
        self._text_config = text_config
        self._claim = AddressClaim(bind)
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._socket = self._context.socket(zmq.REP)
        self._socket.setsockopt(zmq.MAXMSGSIZE, wire.MAX_FRAME_BYTES)
        self._socket.setsockopt(zmq.RCVTIMEO, _POLL_MS)
        self._socket.setsockopt(zmq.RCVHWM, 8)
        self._socket.setsockopt(zmq.IPV6, wire.speaks_ipv6(bind))
        try:
            self._socket.bind(bind)
        except zmq.ZMQError as error:
            self._context.destroy(linger=0)
            self._claim.release()
            raise UsageError(f"cannot bind {bind}: {error}; see --groot") from None
        self.address = self._socket.getsockopt_string(zmq.LAST_ENDPOINT)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="groot-gateway", daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._stop.set()
        self._thread.join()
        self._context.destroy(linger=200)
        self._claim.release()

    def _run(self) -> None:
        while not self._stop.is_set():
            try:
                frames = self._socket.recv_multipart()
            except zmq.Again:
                continue
            self._socket.send(msgpack.packb(self._answer(frames), default=pack))

    def _answer(self, frames: list[bytes]) -> Any:
        try:
            request = unpack(frames)
            endpoint, data = request.get("endpoint", "get_action"), request.get("data") or {}
            if not isinstance(data, dict):
                raise WireError("data is not a map")
            if endpoint == "ping":
                return {"status": "ok", "message": "Server is running"}
            if endpoint == "get_action":
                return self._get_action(data)
            if endpoint == "reset":
                return {}
            if endpoint == "get_modality_config":
                return modality_config(self._policy(), self._text_config)
            raise WireError(f"unknown endpoint; valid: {', '.join(ENDPOINTS)}")
        except SacflowError as error:
            return {"error": str(error)}
        except Exception as error:  # whatever one client sends, the others are served on
            return {"error": f"the request cannot be answered ({type(error).__name__})"}

    @np.errstate(over="ignore")  # a float64 too large for float32 becomes infinite, and is refused
    def _get_action(self, data: Mapping[str, Any]) -> list[Any]:
        policy = self._policy()
        observation = data.get("observation", data)
        if not isinstance(observation, dict):
            raise WireError("observation is not a map")
        arrays = last_steps(observation, policy)
        rows = len(next(iter(arrays.values()))) if arrays else 1
        if not 1 <= rows <= _MAX_ROWS:
            raise WireError(f"{rows} rows, at most {_MAX_ROWS} are answered at once")
        self._count += 1
        noise = chunk_noise((rows, *policy.spec.noise_shape), self._seed, self._count)
        actions = policy.run(checked(policy, arrays, noise))
        if not np.isfinite(actions).all():
            raise InvalidValueError("the policy put out NaN or infinity; its actions were withheld")
        return [{"action": actions}, {"policy_version": policy.version}]


def last_steps(observation: Mapping[str, Any], policy: OnnxPolicy) -> dict[str, FloatArray]:
    """The policy's observation arrays (B, *shape), each from ``state`` or ``video``, at the last time step given.

    Raises:
        WireError: One is not an array (B, T, ...).
    """
    arrays = {}
    groups = [group for group in (observation.get("state"), observation.get("video")) if isinstance(group, dict)]
    for spec in policy.spec.robot.observations:
        value = next((group[spec.key] for group in groups if spec.key in group), None)
        if value is None:
            continue  # the policy says what it lacks
        if not isinstance(value, np.ndarray) or value.ndim != 2 + len(spec.shape) or not value.shape[1]:
            raise WireError(f"{spec.key} is not an array (B, T, {', '.join(map(str, spec.shape))})")
        arrays[spec.key] = value[:, -1]
    return arrays


def modality_config(policy: OnnxPolicy, as_text: bool = False) -> dict[str, Any]:
    """Modality configuration, the first request of GR00T's clients: names and time steps of what goes in and out, as maps or as JSON text."""
    robot = policy.spec.robot
    images = [a.key for a in robot.observations if len(a.shape) == 3]
    states = [a.key for a in robot.observations if a.key not in images]
    groups = {"state": ([0], states), "action": (list(range(policy.spec.chunk_length)), ["action"])}
    if images:
        groups["video"] = ([0], images)
    configs = {name: {"delta_indices": steps, "modality_keys": keys} for name, (steps, keys) in groups.items()}
    return {
        name: {"__ModalityConfig_class__": True, "as_json": json.dumps(config) if as_text else config}
        for name, config in configs.items()
    }


def unpack(frames: list[bytes]) -> dict[str, Any]:
    """A request, arrays as NumPy arrays."""
    request = wire.unpack_bounded(b"".join(frames), _unpack_array, ".npy")
    if not isinstance(request, dict):
        raise WireError("the message is not a map")
    return request


def pack(value: Any) -> Any:
    """An array as GR00T's clients read it; for ``msgpack.packb(default=...)``."""
    if isinstance(value, np.ndarray):
        buffer = io.BytesIO()
        np.save(buffer, value, allow_pickle=False)
        return {"__ndarray_class__": True, "as_npy": buffer.getvalue()}
    raise TypeError


def _unpack_array(value: dict[str, Any]) -> Any:
    if "__ndarray_class__" not in value:
        return value
    # A .npy header is a Python literal: a long one is an attack on whoever parses it.
    content = io.BytesIO(value["as_npy"])
    read = np.lib.format.read_array  # type: ignore[attr-defined, unused-ignore]
    array = read(content, allow_pickle=False, max_header_size=_NPY_HEADER_BYTES)  # type: ignore[no-untyped-call, call-arg, unused-ignore]
    if array.dtype.kind not in "fiub":
        raise ValueError("dtype")
    return array
