from __future__ import annotations

import contextlib

import msgpack
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from sacflow_robot.errors import WireError
from sacflow_robot.serve import wire

arrays = hnp.arrays(np.float32, hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=4))


@given(st.dictionaries(st.text(max_size=8), arrays, max_size=4), st.integers(0, 2**63))
def test_messages_come_back(content: dict[str, np.ndarray], identifier: int) -> None:
    message = wire.decode(wire.encode(wire.Message({"op": "infer", "id": identifier}, content)))
    assert message.header == {"op": "infer", "id": identifier}
    assert message.arrays.keys() == content.keys()
    for name, array in content.items():
        assert np.array_equal(message.arrays[name], array, equal_nan=True)
        assert message.arrays[name].shape == array.shape


@given(st.lists(st.binary(max_size=40), max_size=4))
def test_any_bytes_are_a_message_or_a_wire_error(frames: list[bytes]) -> None:
    with contextlib.suppress(WireError):
        wire.decode(frames)


@pytest.mark.parametrize(
    ("header", "frames", "message"),
    [
        ({"v": 2, "arrays": []}, [], "version is not 1"),
        ([1], [], "not a msgpack map"),
        ({"v": 1, "arrays": [{}]}, [b""], "lacks name, dtype or shape"),
        ({"v": 1, "arrays": []}, [b""], "does not describe the array frames"),
        ({"v": 1, "arrays": 3}, [b""], "does not describe the array frames"),
        ({"v": 1, "arrays": [{"name": "a", "dtype": "|O", "shape": [1]}]}, [b"1234"], "dtype '|O'"),
        ({"v": 1, "arrays": [{"name": "a", "dtype": "<f4", "shape": [2]}]}, [b"1234"], "4 bytes, which shape"),
        ({"v": 1, "arrays": [{"name": "a", "dtype": "<f4", "shape": [-1]}]}, [b"1234"], "shape"),
        ({"v": 1, "arrays": [{"name": "a", "dtype": "<f4", "shape": [2**40, 2**40]}]}, [b""], "shape"),
    ],
)
def test_broken_messages(header: object, frames: list[bytes], message: str) -> None:
    with pytest.raises(WireError, match=message.replace("|", r"\|")):
        wire.decode([msgpack.packb(header), *frames])
