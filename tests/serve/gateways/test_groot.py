"""The gateway with a client written from GR00T's wire format: ours, for their package needs CUDA to be installed."""

import io
import json
import random
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
import pytest
import zmq

from sacflow_robot.export.onnx_policy import OnnxPolicy
from sacflow_robot.serve.gateways.groot import GrootGateway
from sacflow_robot.utils.seeding import chunk_noise
from tests.serve.raw_client import observation


class Client:
    """REQ socket, msgpack, arrays as .npy."""

    def __init__(self, address: str) -> None:
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._socket = self._context.socket(zmq.REQ)
        self._socket.connect(address)

    def call(self, endpoint: str | None, data: Any = None) -> Any:
        request = {} if endpoint is None else {"endpoint": endpoint}
        return self.raw(msgpack.packb(request | ({} if data is None else {"data": data}), default=self._pack))

    def raw(self, message: bytes) -> Any:
        self._socket.send(message)
        assert self._socket.poll(5000), "no answer"
        return msgpack.unpackb(self._socket.recv(), object_hook=self._unpack)

    def close(self) -> None:
        self._context.destroy(linger=0)

    @staticmethod
    def _pack(value: Any) -> Any:
        buffer = io.BytesIO()
        np.save(buffer, value, allow_pickle=value.dtype.kind == "O")
        return {"__ndarray_class__": True, "as_npy": buffer.getvalue()}

    @staticmethod
    def _unpack(value: Any) -> Any:
        return np.load(io.BytesIO(value["as_npy"])) if "__ndarray_class__" in value else value


@pytest.fixture
def policy(policy_file: Path) -> OnnxPolicy:
    return OnnxPolicy(policy_file)


@pytest.fixture
def gateway(policy: OnnxPolicy) -> Iterator[GrootGateway]:
    with closing(GrootGateway(lambda: policy, "tcp://127.0.0.1:*")) as running:
        yield running


@pytest.fixture
def client(gateway: GrootGateway) -> Iterator[Client]:
    with closing(Client(gateway.address)) as connected:
        yield connected


def states(batch: int = 1) -> dict[str, Any]:
    """Two time steps, of which the last counts."""
    now = observation(batch)
    return {
        "state": {key: np.stack([array + 1, array], 1) for key, array in now.items()},
        "language": {"task": [["lift"]]},
    }


def test_a_client_gets_the_policys_actions(client: Client, gateway: GrootGateway, policy: OnnxPolicy) -> None:
    assert client.call("ping")["status"] == "ok"
    for count, batch in ((1, 1), (2, 3)):
        action, info = client.call("get_action", {"observation": states(batch), "options": None})
        noise = chunk_noise((batch, 5, 7), gateway._seed, count)
        assert np.array_equal(action["action"], policy.infer(observation(batch), noise))
        assert info["policy_version"] == policy.version
    assert client.call("reset", {"options": None}) == {}
    assert "lacks 'robot0_eef_pos'" in client.call(None, {"observation": {}})["error"], "get_action is the default"


@pytest.mark.parametrize("as_text", [False, True])
def test_the_modality_config_names_what_goes_in_and_out(policy: OnnxPolicy, as_text: bool) -> None:
    """As the clients of later versions read it, ``ModalityConfig(**as_json)``, or those of earlier ones, from text."""
    with closing(GrootGateway(lambda: policy, "tcp://127.0.0.1:*", text_config=as_text)) as gateway:
        client = Client(gateway.address)
        config = client.call("get_modality_config")
        client.close()
    assert all(value["__ModalityConfig_class__"] for value in config.values())
    read = json.loads if as_text else dict
    state, action = (read(config[name]["as_json"]) for name in ("state", "action"))
    assert state["modality_keys"] == [a.key for a in policy.spec.robot.observations]
    assert action == {"delta_indices": [0, 1, 2, 3, 4], "modality_keys": ["action"]}


def test_nobody_kills_it_and_nonsense_is_neither_executed_nor_repeated(client: Client) -> None:
    assert "unknown endpoint; valid: ping" in client.call("kill")["error"]
    rng, good = random.Random(0), msgpack.packb({"data": {"observation": states()}}, default=Client._pack)
    evil = np.array([{"TOPSECRET": 1}], dtype=object)
    for data in ({"observation": {"state": {"object": evil}}}, "TOPSECRET", {"observation": "TOPSECRET"}, [1]):
        answer = client.call("get_action", data)
        assert "error" in answer and "TOPSECRET" not in answer["error"]
    for bad in (np.zeros((1, 0, 10)), np.zeros((1, 10)), np.zeros((70, 1, 10)), np.zeros((0, 1, 10)), np.array(["x"])):
        assert "error" in client.call("get_action", {"observation": {"state": {"object": bad}}})
    messages = [good[: rng.randrange(len(good))] for _ in range(50)]
    messages += [bytes(rng.randrange(256) for _ in range(rng.randrange(60))) for _ in range(200)]
    for message in messages:
        assert "error" in client.raw(message)
    assert len(client.call("get_action", {"observation": states()})) == 2


@pytest.mark.parametrize(
    "many", [[[{}] * 1000] * 100, [0] * 70_000, [[0] * 1000] * 100, {str(i): 0 for i in range(5000)}]
)
def test_a_message_of_many_small_values_is_refused_before_it_is_read_to_its_end(client: Client, many: object) -> None:
    assert "not msgpack of plain values" in client.call("get_action", {"observation": many})["error"]
    assert client.call("ping")["status"] == "ok"
