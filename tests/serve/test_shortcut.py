"""The short way gives what the long way gives, and leaves everything odd to it."""

from __future__ import annotations

import numpy as np
import zmq

from sacflow_robot.serve import wire
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
    for given in (sent, [zmq.Frame(frame) for frame in sent]):
        read = shortcut.read(given)
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
