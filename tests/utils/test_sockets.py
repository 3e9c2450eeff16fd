"""Real Unix sockets, bound by ZeroMQ as the servers do, and real processes."""

import socket
import subprocess
import sys
from pathlib import Path

import pytest
import zmq

from sacflow_robot.errors import UsageError
from sacflow_robot.utils.sockets import AddressClaim

SERVER = """
import sys, zmq
from sacflow_robot.errors import UsageError
from sacflow_robot.utils.sockets import AddressClaim

print("ready", flush=True)
sys.stdin.readline()
try:
    claim = AddressClaim(sys.argv[1])
except UsageError as error:
    print(error, flush=True)
else:
    server = zmq.Context().socket(zmq.ROUTER)
    server.bind(sys.argv[1])
    print("serving", flush=True)
    sys.stdin.read()
"""


def server(address: str) -> subprocess.Popen[str]:
    """A process that binds the address once it is told to."""
    process = subprocess.Popen(
        [sys.executable, "-c", SERVER, address], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    return process


def told(process: subprocess.Popen[str]) -> str:
    assert process.stdin is not None and process.stdout is not None
    process.stdin.write("go\n")
    process.stdin.flush()
    return process.stdout.readline().strip()


def end(process: subprocess.Popen[str]) -> None:
    process.kill()
    process.communicate()


def test_a_second_server_is_refused_until_the_first_is_gone_and_a_killed_one_leaves_nothing(tmp_path: Path) -> None:
    address = f"ipc://{tmp_path}/robot.sock"
    first, second = server(address), server(address)
    assert told(first) == "serving"
    assert "another process serves there" in told(second)
    with pytest.raises(UsageError, match="another process serves there"):
        AddressClaim(address)
    end(first)
    end(second)
    assert (tmp_path / "robot.sock").is_socket(), "kill -9 leaves the socket file"
    claim = AddressClaim(address)
    assert not (tmp_path / "robot.sock").exists()
    with pytest.raises(UsageError, match="another process serves there"):
        AddressClaim(address)
    claim.release()
    claim.release()
    AddressClaim(address).release()


def test_of_servers_that_start_at_the_same_instant_one_wins(tmp_path: Path) -> None:
    address = f"ipc://{tmp_path}/robot.sock"
    stale = server(address)
    assert told(stale) == "serving"
    end(stale)
    servers = [server(address) for _ in range(5)]
    for process in servers:
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()
    said = [process.stdout.readline().strip() for process in servers if process.stdout is not None]
    assert said.count("serving") == 1 and sum("another process serves there" in line for line in said) == 4
    for process in servers:
        end(process)


def test_a_server_that_knows_nothing_of_claims_and_a_file_are_left_alone(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as other:
        other.bind(str(tmp_path / "other.sock"))
        other.listen(0)
        queue = [socket.socket(socket.AF_UNIX) for _ in range(4)]
        for waiting in queue:  # nobody accepts: its queue is full
            waiting.setblocking(False)
            waiting.connect_ex(str(tmp_path / "other.sock"))
        with pytest.raises(UsageError, match="another process serves there"):
            AddressClaim(f"ipc://{tmp_path}/other.sock")
        for waiting in queue:
            waiting.close()
    (tmp_path / "file").write_text("precious")
    with pytest.raises(UsageError, match="is not a socket"):
        AddressClaim(f"ipc://{tmp_path}/file")
    assert (tmp_path / "file").read_text() == "precious"


def test_what_cannot_be_a_socket_is_one_clear_line(tmp_path: Path) -> None:
    for name, why in (("nowhere/robot.sock", "there is no folder"), ("x" * 120, "longer than 107 bytes")):
        with pytest.raises(UsageError, match=why):
            AddressClaim(f"ipc://{tmp_path}/{name}")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("address", ["tcp://127.0.0.1:7199", "ipc://@sacflow-robot-claims", "ipc://*"])
def test_other_addresses_need_no_claim(address: str) -> None:
    claims = [AddressClaim(address), AddressClaim(address)]
    for claim in claims:
        claim.release()


def test_an_address_is_free_again_after_a_server_closed(tmp_path: Path) -> None:
    address = f"ipc://{tmp_path}/robot.sock"
    for _ in range(3):
        claim = AddressClaim(address)
        with zmq.Context() as context, context.socket(zmq.ROUTER) as router:
            router.bind(address)
        claim.release()
