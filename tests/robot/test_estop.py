"""Stops over a real socket."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import zmq

from sacflow_robot.errors import DataError, RobotError, UsageError
from sacflow_robot.robot.estop import StopServer, read_key, request
from sacflow_robot.robot.switches import Switches

KEY = b"0123456789abcdef0123456789abcdef"


def test_a_stop_arrives_with_its_reason_and_an_arming_needs_the_key() -> None:
    switches = Switches()
    with StopServer("tcp://127.0.0.1:0", switches, KEY) as server:
        request(server.address, "stop", "smoke", KEY)
        assert switches.take() == ("stopped over the network: smoke", False)
        request(server.address, "arm", key=KEY)
        assert switches.take() == ("", True) and switches.take() == ("", False)
        for verb, key in (("stop", b""), ("stop", b"x" * 32), ("arm", b"")):
            with pytest.raises(RobotError, match="the key is not the right one"):
                request(server.address, verb, key=key)
        with pytest.raises(RobotError, match="unknown request"):
            request(server.address, "home", key=KEY)
        assert switches.take() == ("", False)


def test_without_a_key_this_machine_may_stop_and_nobody_arm() -> None:
    switches = Switches()
    with StopServer("tcp://127.0.0.1:0", switches) as server:
        request(server.address, "stop")
        assert switches.take()[0] == "stopped over the network: no reason given"
        with pytest.raises(RobotError, match="arming over the network needs a key"):
            request(server.address, "arm")
    with pytest.raises(UsageError, match="needs a key"):
        StopServer("tcp://0.0.0.0:0", switches)


def test_what_was_overheard_cannot_be_sent_again() -> None:
    """A proof is for one challenge; noise of any kind is refused, and the server goes on."""
    switches, context = Switches(), zmq.Context()
    socket = context.socket(zmq.DEALER)
    try:
        with StopServer("tcp://127.0.0.1:0", switches, KEY) as server:
            socket.connect(server.address)
            for frames in ([b"stop", b"", b"proof"], [b""], [b"\xff" * 4000], [b"challenge", b"challenge"]):
                socket.send_multipart(frames)
                assert socket.poll(2000) and socket.recv_multipart()[0] == b"refused"
            request(server.address, "stop", key=KEY)
            assert switches.take()[0]
    finally:
        context.destroy(linger=0)


def test_nobody_there_says_what_to_do_instead() -> None:
    began = time.monotonic()
    with pytest.raises(RobotError, match="USE THE ARM'S OWN STOP BUTTON"):
        request("tcp://127.0.0.1:9", "stop", timeout_s=0.2)
    assert time.monotonic() - began < 30


def test_keys_are_read_and_weak_ones_refused(tmp_path: Path) -> None:
    (tmp_path / "key").write_bytes(KEY + b"\n")
    assert read_key(tmp_path / "key") == KEY and read_key(None) == b""
    (tmp_path / "weak").write_bytes(b"1234")
    with pytest.raises(DataError, match="shorter than 16 bytes"):
        read_key(tmp_path / "weak")
    with pytest.raises(DataError, match="cannot be read"):
        read_key(tmp_path / "absent")
