"""Commands as processes of their own: what they import, and how they end."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from sacflow_robot.data.log.reader import EpisodeLog
from sacflow_robot.export.onnx_policy import OnnxPolicy
from sacflow_robot.serve.server import PolicyServer


def test_serving_imports_neither_torch_nor_the_simulator() -> None:
    """A robot PC has the base package only, and ``serve --help`` must answer at once."""
    heavy = "torch", "zarr", "robosuite", "mujoco", "gymnasium", "onnxruntime", "matplotlib", "h5py"
    code = (
        "import sys\nfrom sacflow_robot.cli import main\n"
        "try:\n    main(['serve', '--help'])\nexcept SystemExit:\n    pass\n"
        f"print([name for name in {heavy} if name in sys.modules], file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr.strip() == "[]"
    code = (
        "import sys, importlib\n"
        "for name in ('serve.server', 'serve.client', 'robot.control.loop', 'robot.drivers.registry', 'data.log.reader', 'cli.run', 'cli.serve', 'robot.control.playback', 'cli.replay'):\n"
        "    importlib.import_module('sacflow_robot.' + name)\n"
        "print([name for name in ('torch', 'onnx', 'robosuite', 'mujoco', 'h5py') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_launch_stops_the_others_when_one_fails(tmp_path: Path) -> None:
    file = tmp_path / "cell.yaml"
    file.write_text("server: serve --policy absent.onnx\narm: run --timeout 60\n")
    done = subprocess.run(
        [sys.executable, "-m", "sacflow_robot", "launch", str(file)], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 1
    assert "process 'server' ended first, with exit status 1" in done.stderr


@pytest.mark.slow
def test_a_launched_cell_runs_and_ends(policy_file: Path, tmp_path: Path) -> None:
    file = tmp_path / "cell.yaml"
    file.write_text(
        f"server: serve --policy {policy_file} --bind ipc://{tmp_path}/cell\n"
        f"arm: run --server ipc://{tmp_path}/cell --episodes 1 --log {tmp_path}/log.zarr --timeout 30\n"
    )
    command = [sys.executable, "-m", "sacflow_robot", "launch", str(file)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    assert len(EpisodeLog.open(tmp_path / "log.zarr")) == 1


def test_a_disk_that_fills_while_running_is_one_clear_line(policy_file: Path, tmp_path: Path) -> None:
    """The process may write small files only, so that the log can be made and no room for its steps."""
    with PolicyServer(OnnxPolicy(policy_file), "tcp://127.0.0.1:*") as server:
        server.start()
        code = (
            "import resource, signal, sys\n"
            "from sacflow_robot.cli import main\n"
            "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
            "resource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000))\n"
            f"sys.exit(main(['run', '--server', '{server.address}', '--episodes', '2', '--log', 'log.zarr']))"
        )
        done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=100)
    assert done.returncode == 1
    lines = [line for line in done.stderr.splitlines() if line.startswith("sacflow-robot: error: ")]
    assert len(lines) == 1 and "no room for" in lines[0] and "Traceback" not in done.stderr
    assert len(EpisodeLog.open(tmp_path / "log.zarr")) == 0


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGINT])
def test_the_server_stops_cleanly_when_asked(policy_file: Path, how: signal.Signals) -> None:
    command = [
        sys.executable,
        "-m",
        "sacflow_robot",
        "serve",
        "--policy",
        str(policy_file),
        "--bind",
        "tcp://127.0.0.1:*",
    ]
    server = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert server.stderr is not None
    assert "self-test passed" in server.stderr.readline()
    for _ in range(2):
        server.stderr.readline()
    server.send_signal(how)
    assert "stopped after 0 requests" in server.stderr.read()
    assert server.wait(10) == 0
    server.stderr.close()
