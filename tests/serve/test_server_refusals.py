"""What the server refuses, and that it goes on."""

import itertools
from dataclasses import replace

import msgpack
import numpy as np
import pytest

from sacflow_robot.errors import InvalidValueError, RefusedError, SpecMismatchError, WireError
from sacflow_robot.serve import protocol as wire
from sacflow_robot.serve.client import PolicyClient
from sacflow_robot.serve.server import PolicyServer
from sacflow_robot.utils.seeding import chunk_noise
from tests.serve.raw_client import RawClient, observation

pytestmark = pytest.mark.realtime


def test_a_client_that_expects_another_policy_is_refused_with_the_fields_named(server: PolicyServer) -> None:
    with PolicyClient(server.address) as client:
        robot, spec = client.spec.robot, client.spec
    with PolicyClient(server.address, expect=robot) as client:
        assert client.spec.robot == robot
    with pytest.raises(SpecMismatchError, match=r"differs .* in: robot\.robot, robot\.control_rate_hz$"):
        PolicyClient(server.address, expect=replace(robot, control_rate_hz=10.0, robot="UR5e"))
    fits = {"chunk_length": 5, "fingerprint": spec.fingerprint, "arm": {"control_rate_hz": 20, "robot": "Panda"}}
    PolicyClient(server.address, expect=fits).close()
    with pytest.raises(SpecMismatchError, match=r"in: chunk_length, fingerprint, robot\.action_names$"):
        bad = {"chunk_length": 8, "fingerprint": "0", "arm": {"action_names": ["x"]}}
        PolicyClient(server.address, expect=bad)
    for nonsense in ({"chunks": 5}, {"arm": {"color": 1}}, {"arm": 3}, [1]):
        with pytest.raises(RefusedError, match="expect"):
            PolicyClient(server.address, expect=nonsense)  # type: ignore[arg-type]


def test_repeated_and_reordered_requests_are_refused(server: PolicyServer) -> None:
    with RawClient(server) as client:
        session = client.welcome.header["session"]
        frames = wire.encode(wire.Message({"op": "infer", "id": 10, "session": session}, observation()))
        assert client.exchange(frames).header["ok"]
        for identifier in (10, 9, -1, None, "11", 1.5):
            header = {"op": "infer", "id": identifier, "session": session}
            reply = client.exchange(wire.encode(wire.Message(header, observation())))
            assert reply.header["error"]["kind"] == "replayed"
        assert server.requests == 1
        for unknown in ("0" * 16, None, 3, ["x"]):
            header = {"op": "infer", "id": 11, "session": unknown}
            reply = client.exchange(wire.encode(wire.Message(header, observation())))
            assert reply.header["error"]["kind"] == "session"


def test_bad_requests_are_answered_and_the_server_goes_on(server: PolicyServer) -> None:
    with PolicyClient(server.address) as client, RawClient(server) as raw:
        noise = chunk_noise((1, 5, 7), 0)
        bad = {**observation(), "object": np.full((1, 10), np.nan, np.float32)}
        with pytest.raises(RefusedError, match="refused the request: observation 'object' contains NaN"):
            client.infer(bad, noise)
        with pytest.raises(RefusedError, match="lacks 'robot0_eef_pos'"):
            client.infer({"object": bad["object"]}, noise)
        assert client.infer(observation(), noise).shape == (1, 5, 7)

        def kind(reply: wire.Message) -> str:
            assert reply.header["ok"] is False
            return str(reply.header["error"]["kind"])

        for frames in ([b"junk"], [b""], [b"\x80"], [b"\x81\xa1v\x02", b"extra"], [b"\x81\xa1v\x01"], [b"\x93" * 900]):
            assert kind(raw.exchange(frames)) == "malformed"
        for identifier, shape in enumerate(
            ([float("inf")], [2**62, 0], [1] * 70, [2**40, 0], [True], "x", [-1], [None])
        ):
            header = {"v": 2, "op": "infer", "id": 50 + identifier, "session": raw.welcome.header["session"]}
            layout = [["robot0_eef_pos", "<f4", shape]]
            assert kind(raw.exchange([msgpack.packb({**header, "arrays": layout}), b""])) == "malformed", shape
        raw._ids = itertools.count(100)
        assert "shape ()" in raw.ask("infer", {"robot0_eef_pos": np.float32(1)}).header["error"]["message"]
        assert kind(raw.ask("infer", {"robot0_eef_pos": np.zeros((65, 3), np.float32)})) == "limit"
        assert kind(raw.ask("infer")) == "invalid"
        unknown = raw.ask("kill")
        assert kind(unknown) == "malformed" and "valid: infer, hello" in unknown.header["error"]["message"]
        assert raw.ask("infer", observation(3)).arrays["actions"].shape == (3, 5, 7)


def test_errors_never_repeat_what_was_sent(server: PolicyServer) -> None:
    secret = "TOPSECRET"
    with RawClient(server, client=secret) as raw:
        messages = [
            {"op": secret},
            {"op": "infer", "session": secret},
            {"op": "hello", "expect": {secret: 1}},
            {"op": "hello", "expect": {"arm": {"robot": secret}}},
            {"op": "hello", "swap": secret},
            {"op": "infer", "session": raw.welcome.header["session"], "seed": secret},
            {"v": secret},
        ]
        for number, header in enumerate(messages, 10):
            frames = wire.encode(wire.Message({"id": number, **header}, {secret: np.zeros(1, np.float32)}))
            raw.socket.send_multipart(frames)
            assert secret.encode() not in b"".join(raw.socket.recv_multipart())


def test_a_frame_that_is_too_large_drops_its_sender_only(server: PolicyServer) -> None:
    with PolicyClient(server.address) as client, RawClient(server) as raw:
        raw.socket.send_multipart([b"x" * (wire.MAX_FRAME_BYTES + 1)])
        assert not raw.socket.poll(300)
        assert client.infer(observation()).shape == (1, 5, 7)


def test_half_a_prefix_is_refused_and_not_dropped(server: PolicyServer) -> None:
    prefix = np.zeros((1, 5, 7), np.float32)
    with PolicyClient(server.address) as client:
        for half in ({"prefix": prefix}, {"prefix_mask": prefix[..., 0]}):
            with pytest.raises(InvalidValueError, match="go together"):
                client.infer(observation(), **half)
        assert client.infer(observation()).shape == (1, 5, 7)


def test_what_is_too_large_is_not_sent(server: PolicyServer) -> None:
    with PolicyClient(server.address) as client:
        picture = np.zeros((1, wire.MAX_FRAME_BYTES), np.uint8)
        assert client.infer({**observation(), "picture": picture}).shape == (1, 5, 7)
        with pytest.raises(WireError, match="at most"):
            client.infer({**observation(), "picture": np.zeros((1, wire.MAX_FRAME_BYTES + 1), np.uint8)})
        assert client.connected
