"""Where a server listens: ports, files and IPv6, taken, free and left behind."""

import socket
import time
from contextlib import closing
from pathlib import Path

import pytest

from sacflow_robot.errors import ServerError, UsageError
from sacflow_robot.export.onnx_policy import OnnxPolicy
from sacflow_robot.serve.auth import Security, new_keys
from sacflow_robot.serve.client import Keys, PolicyClient
from sacflow_robot.serve.gateways.groot import GrootGateway
from sacflow_robot.serve.server import PolicyServer
from tests.serve.raw_client import observation

pytestmark = pytest.mark.realtime


def test_no_server_is_said_within_the_timeout() -> None:
    began = time.monotonic()
    with pytest.raises(ServerError, match=r"no answer from tcp://127.0.0.1:9 within 0.3 s.*sacflow-robot serve"):
        PolicyClient("tcp://127.0.0.1:9", timeout_s=0.3)
    assert time.monotonic() - began < 5
    with pytest.raises(UsageError, match="cannot connect to nonsense"):
        PolicyClient("nonsense")


@pytest.mark.skipif(not socket.has_dualstack_ipv6(), reason="this machine has no IPv6")
@pytest.mark.parametrize("with_keys", [False, True])
def test_over_ipv6(policy_file: Path, tmp_path: Path, with_keys: bool) -> None:
    server_key, own_key = new_keys(tmp_path, "server")[1], new_keys(tmp_path / "clients", "arm")[1]
    security = Security(server_key, tmp_path / "clients") if with_keys else None
    keys = Keys(own_key, tmp_path / "server.key") if with_keys else None
    with (
        PolicyServer(OnnxPolicy(policy_file), "tcp://[::1]:*", security=security).start() as server,
        PolicyClient(server.address, keys=keys) as client,
    ):
        assert client.infer(observation()).shape == (1, 5, 7)


def test_a_port_in_use(server: PolicyServer, policy_file: Path) -> None:
    with pytest.raises(UsageError, match="it is in use; give another address with --bind"):
        PolicyServer(OnnxPolicy(policy_file), server.address)
    for port in ("99999", "-1", "5\n5", "x", ""):
        with pytest.raises(UsageError, match="is not a port"):
            PolicyServer(OnnxPolicy(policy_file), f"tcp://127.0.0.1:{port}")
    with pytest.raises(UsageError, match="cannot bind nonsense"):
        PolicyServer(OnnxPolicy(policy_file), "nonsense")


def test_a_file_is_not_turned_into_a_socket(policy_file: Path, tmp_path: Path) -> None:
    precious = tmp_path / "notes"
    precious.write_text("precious")
    with pytest.raises(UsageError, match="notes exists"):
        PolicyServer(OnnxPolicy(policy_file), f"ipc://{precious}")
    assert precious.read_text() == "precious"
    for _ in range(2):  # its own socket is gone once it stops
        with PolicyServer(OnnxPolicy(policy_file), f"ipc://{tmp_path}/cell") as server:
            server.start()
            with pytest.raises(UsageError, match="another process serves there"):
                PolicyServer(OnnxPolicy(policy_file), f"ipc://{tmp_path}/cell")


@pytest.mark.parametrize("door", ["native", "groot"])
def test_a_socket_left_by_a_killed_server_is_in_nobodys_way(policy_file: Path, tmp_path: Path, door: str) -> None:
    path, policy = tmp_path / "cell", OnnxPolicy(policy_file)

    def serve() -> PolicyServer | GrootGateway:
        address = f"ipc://{path}"
        return PolicyServer(policy, address) if door == "native" else GrootGateway(lambda: policy, address)

    with socket.socket(socket.AF_UNIX) as killed:
        killed.bind(str(path))
        killed.listen()
        with pytest.raises(UsageError, match="another process serves there"):
            serve()
    assert path.exists(), "as after kill -9"
    with closing(serve()), pytest.raises(UsageError, match="another process serves there"):
        serve()
    assert not path.exists()
    path.write_text("precious")
    with pytest.raises(UsageError, match="cell exists and is not a socket"):
        serve()
    assert path.read_text() == "precious"
