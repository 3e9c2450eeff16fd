"""The short way gives what the long way gives, and leaves everything odd to it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
import pytest
import zmq
from hypothesis import example, given, settings
from hypothesis import strategies as st

from sacflow_robot.errors import InvalidValueError, WireError
from sacflow_robot.export.onnx_policy import OnnxPolicy
from sacflow_robot.serve import protocol as wire
from sacflow_robot.serve.batching import evaluate
from sacflow_robot.serve.server import PolicyServer
from sacflow_robot.serve.session import Refusal, Session, describe
from sacflow_robot.serve.shortcut import Shortcut

RNG = np.random.default_rng(0)
INPUTS = {
    "b": RNG.standard_normal((2, 3)).astype(np.float32),
    "noise": RNG.standard_normal((2, 5, 7)).astype(np.float32),
}
SENT = {"image": np.zeros((2, 4), np.uint8), **dict(reversed(INPUTS.items()))}


def frames(arrays: dict[str, np.ndarray]) -> tuple[list[list[object]], list[bytes]]:
    encoded = wire.encode(wire.Message({}, arrays))
    return wire.decode_header(encoded)["arrays"], [bytes(frame) for frame in encoded]


def test_it_reads_what_was_sent_whatever_lies_between() -> None:
    layout, sent = frames(SENT)
    shortcut = Shortcut(layout, INPUTS, lambda inputs: lambda: inputs["noise"] * 2)
    for whole in (sent, [zmq.Frame(frame) for frame in sent]):
        read = shortcut.read(whole)
        assert read is not None
        arrays = read.arrays()
        assert list(arrays) == list(INPUTS) and shortcut.rows == 2
        for name, array in INPUTS.items():
            assert np.array_equal(arrays[name], array) and arrays[name].flags.aligned
        assert np.array_equal(read.run(), INPUTS["noise"] * 2), "evaluated with what was read"


def test_what_is_odd_goes_the_long_way() -> None:
    layout, sent = frames(SENT)
    shortcut = Shortcut(layout, INPUTS, lambda inputs: lambda: inputs["noise"] * 2)
    assert shortcut.read(sent[:-1]) is None and shortcut.read([*sent, b""]) is None
    assert shortcut.read([*sent[:-1], sent[-1][:-4]]) is None
    _, bad = frames({**SENT, "b": np.full((2, 3), np.nan, np.float32)})
    assert shortcut.read(bad) is None


def test_where_there_is_no_short_way() -> None:
    layout, _ = frames(SENT)
    assert Shortcut.applies(layout, INPUTS)
    assert not Shortcut.applies([entry for entry in layout if entry[0] != "noise"], INPUTS), "noise drawn by the server"
    assert not Shortcut.applies([*layout, ["b", "<f4", [2, 3]]], INPUTS), "an array given twice"
    assert not Shortcut.applies([[n, "<f8", s] for n, _, s in layout], INPUTS)
    assert not Shortcut.applies(layout, {"image": SENT["image"]}), "bytes"
    large = {"b": np.zeros((2, 3000), np.float32)}
    assert not Shortcut.applies(frames(large)[0], large)


GOOD: dict[str, np.ndarray] = {
    "robot0_eef_pos": RNG.standard_normal((1, 3)).astype(np.float32),
    "robot0_eef_quat": RNG.standard_normal((1, 4)).astype(np.float32),
    "robot0_gripper_qpos": RNG.standard_normal((1, 2)).astype(np.float32),
    "object": RNG.standard_normal((1, 10)).astype(np.float32),
    "noise": RNG.standard_normal((1, 5, 7)).astype(np.float32),
    "prefix": RNG.standard_normal((1, 5, 7)).astype(np.float32),
    "prefix_mask": np.array([[1, 1, 0, 0, 0]], np.float32),
    "extra": np.zeros((1, 4), np.uint8),
}


ODD_NUMBERS = [0.0, 1.0, -0.0, 0.5, 1.0 + 1e-6, -1e-6, 5.0, -3.0, 1e30, 3e38, np.nan, np.inf, -np.inf]

Sent = tuple[list[list[Any]], list[bytes]]


def as_sent(arrays: dict[str, np.ndarray]) -> Sent:
    """A request's ``arrays`` and frames."""
    layout, encoded = frames(arrays)
    return layout, encoded[1:]


@st.composite
def requests(draw: st.DrawFn) -> tuple[Sent, Sent]:
    """A good request, and the same spoiled in up to two ways."""
    left_out = draw(st.sampled_from([(), (wire.PREFIX, wire.PREFIX_MASK), ("extra",)]))
    arrays = {name: array.copy() for name, array in GOOD.items() if name not in left_out}
    good = as_sent(arrays)
    for name, value in draw(
        st.lists(
            st.tuples(st.sampled_from(sorted(arrays.keys() - {"extra"})), st.sampled_from(ODD_NUMBERS)), max_size=1
        )
    ):
        flat = arrays[name].reshape(-1)
        flat[draw(st.integers(0, len(flat) - 1))] = value
    layout, sent = as_sent(arrays)
    for _ in range(draw(st.integers(0, 2))):
        i = draw(st.integers(0, len(layout) - 1))
        match draw(
            st.sampled_from(["extent", "extent", "size", "size", "name", "dtype", "order", "twice", "drop", "more"])
        ):
            case "extent":
                axis = draw(st.integers(0, len(layout[i][2]) - 1))
                before = layout[i][2][axis]
                same = before if isinstance(before, int) else 1  # it may be spoiled already
                layout[i][2][axis] = draw(
                    st.sampled_from([bool(same), float(same), 1, 2, 0, -1, 2**30, "1", None, [1]])
                )
            case "size":
                sent[i] = draw(st.sampled_from([sent[i][:-4], sent[i] + b"four", b"", sent[i][:-1]]))
            case "name":
                layout[i][0] = draw(st.sampled_from(["noise", "object", wire.PREFIX_MASK, "x"]))
            case "dtype":
                layout[i][1] = draw(st.sampled_from(["<f4", "<i4", "<f8", "|u1", ">f4"]))
            case "order":
                layout[0], layout[i], sent[0], sent[i] = layout[i], layout[0], sent[i], sent[0]
            case "twice":
                layout.append(list(layout[i]))
                sent.append(sent[i])
            case "drop":
                del layout[i], sent[i]
            case "more":
                sent.append(b"")
    return good, (layout, sent)


@pytest.fixture(scope="module")
def server(policy_file: Path) -> Iterator[PolicyServer]:
    with PolicyServer(OnnxPolicy(policy_file), "tcp://127.0.0.1:*") as made:
        yield made


@settings(max_examples=300, deadline=None)
@given(ways=requests())
@example(ways=(as_sent(GOOD), as_sent({**GOOD, "prefix_mask": np.array([[5, 1, 0, 0, 0]], np.float32)})))
def test_the_short_way_accepts_nothing_that_the_long_way_refuses_and_gives_the_same(
    server: PolicyServer, ways: tuple[Sent, Sent]
) -> None:
    def outcome(session: Session, layout: list[list[Any]], sent: list[bytes]) -> tuple[str, str] | np.ndarray:
        read = msgpack.unpackb(msgpack.packb(layout))
        header = {"id": 1, "op": "infer", "seed": 1, "step": 0, "arrays": read}
        try:
            request = server._admit(b"peer", header, [b"peer", b"header", *sent], session, 0)
        except (Refusal, WireError, InvalidValueError) as error:
            return describe(error)[:2]
        return evaluate([request])[0]

    good, spoiled = ways
    primed, fresh = (Session("token", b"peer", "", 1, None, 0) for _ in range(2))
    assert isinstance(outcome(primed, *good), np.ndarray) and primed.shortcut is not None
    short, long = outcome(primed, *spoiled), outcome(fresh, *spoiled)
    if isinstance(long, tuple):
        assert short == long
    else:
        assert np.array_equal(short, long, equal_nan=True)
