"""ZMTP, against itself cut anywhere; against libzmq in ``test_connection.py``."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sacflow_robot.errors import WireError
from sacflow_robot.serve import zmtp
from sacflow_robot.serve.protocol import MAX_ARRAYS, MAX_FRAME_BYTES

FRAMES = st.one_of(st.binary(max_size=20), st.integers(250, 600).map(bytes))
MESSAGES = st.lists(st.lists(FRAMES, min_size=1, max_size=5), max_size=5)


@given(MESSAGES, st.lists(st.integers(1, 300), min_size=1, max_size=20), st.binary(max_size=16))
def test_messages_come_out_as_they_went_in_however_the_stream_is_cut(
    messages: list[list[bytes]], cuts: list[int], context: bytes
) -> None:
    stream = b"".join(b"".join(zmtp.pack(message)) + zmtp.pong(context) for message in messages)
    reader, came, start = zmtp.Reader(), [], 0
    while start < len(stream):
        size = cuts[start % len(cuts)]
        came += reader.feed(stream[start : start + size])
        start += size
    assert came == messages and reader.commands == [(b"PONG", context)] * len(messages)


@given(st.binary(max_size=400))
def test_anything_at_all_is_read_or_refused(data: bytes) -> None:
    reader = zmtp.Reader()
    try:
        messages = reader.feed(data)
    except WireError:
        return
    assert sum(len(frame) for message in messages for frame in message) <= len(data)


@pytest.mark.parametrize(
    "data",
    [b"\x02" + (MAX_FRAME_BYTES + 1).to_bytes(8, "big"), b"\x08\x00", b"\x01\x00" * (MAX_ARRAYS + 2)],
)
def test_what_is_larger_than_the_protocol_allows_is_refused_before_it_is_kept(data: bytes) -> None:
    with pytest.raises(WireError):
        zmtp.Reader().feed(data)


def test_greetings() -> None:
    zmtp.check_greeting(zmtp.GREETING)
    zmtp.check_greeting(zmtp.GREETING[:11] + b"\x02" + zmtp.GREETING[12:])
    for wrong in (b"HTTP/1.1 200 OK".ljust(64), zmtp.GREETING[:10] + b"\x03\x00" + zmtp.GREETING[12:]):
        with pytest.raises(WireError):
            zmtp.check_greeting(wrong)
    with pytest.raises(zmtp.KeysNeededError):
        zmtp.check_greeting(zmtp.GREETING[:12] + b"CURVE".ljust(20, b"\0") + zmtp.GREETING[32:])


def test_a_ping_says_how_long_its_sender_is_to_be_remembered() -> None:
    assert zmtp.ping(2.0) == b"\x04\x07\x04PING\x00\x14"
    assert zmtp.ping(0.01)[-2:] == b"\x00\x01" and zmtp.ping(1e9)[-2:] == b"\xff\xff"
