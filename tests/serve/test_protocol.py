import contextlib

import msgpack
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from sacflow_robot.errors import WireError
from sacflow_robot.serve import protocol as wire

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
        ({"v": 1, "arrays": []}, [], "version is not 2"),
        ([1], [], "not a msgpack map"),
        ({"v": 2, "arrays": [{}]}, [b""], "description of array 0 is not"),
        ({"v": 2, "arrays": [["a", "<f4"]]}, [b""], "description of array 0 is not"),
        ({"v": 2, "arrays": []}, [b""], "does not describe the array frames"),
        ({"v": 2, "arrays": 3}, [b""], "does not describe the array frames"),
        ({"v": 2, "arrays": [["a", "|O", [1]]]}, [b"1234"], "dtype that the protocol does not carry; valid: <f4"),
        ({"v": 2, "arrays": [["a", ["<f4"], [1]]]}, [b"1234"], "description of array 0 is not"),
        ({"v": 2, "arrays": [["a", "<f4", [2]]]}, [b"1234"], "4 bytes, which its shape"),
        ({"v": 2, "arrays": [["a", "<f4", [-1]]]}, [b"1234"], "shape"),
        ({"v": 2, "arrays": [["a", "<f4", [2**40, 2**40]]]}, [b""], "shape"),
        ({"v": 2, "arrays": [["a", "|u1", [0]]] * 65}, [b""] * 65, "does not describe"),
    ],
)
def test_broken_messages(header: object, frames: list[bytes], message: str) -> None:
    with pytest.raises(WireError, match=message.replace("|", r"\|")):
        wire.decode([msgpack.packb(header), *frames])


def test_other_dtypes_and_what_is_not_carried() -> None:
    content = {
        "image": np.arange(12, dtype=np.uint8).reshape(2, 2, 3),
        "count": np.array([1, -1]),
        "on": np.array([True]),
    }
    message = wire.decode(wire.encode(wire.Message({}, content)))
    for name, array in content.items():
        assert message.arrays[name].dtype == array.dtype and np.array_equal(message.arrays[name], array)
    for bad in (np.array([{}]), np.zeros(1, np.complex64), np.array(["x"])):
        with pytest.raises(WireError, match="array 'bad' has dtype"):
            wire.encode(wire.Message({}, {"bad": bad}))


def test_a_frame_that_starts_anywhere_in_memory_is_read_right() -> None:
    values = np.arange(6, dtype="<f4")
    header, _ = wire.encode(wire.Message({}, {"a": values}))
    odd = memoryview(b"x" + values.tobytes())[1:]
    array = wire.decode([header, odd]).arrays["a"]
    assert array.flags.aligned and np.array_equal(array, values)


def test_arrays_are_sent_from_their_own_memory() -> None:
    array = np.zeros((300, 300), np.float32)
    _, frame = wire.encode(wire.Message({}, {"a": array}))
    array[0, 0] = 1
    assert np.frombuffer(frame, "<f4")[0] == 1
