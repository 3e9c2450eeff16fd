"""``sacflow-robot run`` with a person at the keyboard, through a pseudo-terminal."""

import json
import os
import pty
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from sacflow_robot.data.log.reader import EpisodeLog
from sacflow_robot.episode import Source
from sacflow_robot.export.onnx_policy import OnnxPolicy
from sacflow_robot.serve.server import PolicyServer

POLICY = Path(__file__).parents[2] / "policies" / "lift.onnx"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_run_ends_in_order_when_it_is_asked_to(tmp_path: Path, number: signal.Signals) -> None:
    with PolicyServer(OnnxPolicy(POLICY), "tcp://127.0.0.1:*") as server:
        command = [sys.executable, "-m", "sacflow_robot", "run", "--robot", "sim:lift?speed=1", "--timeout", "60"]
        command += ["--server", server.start().address, "--episodes", "1000", "--log", str(tmp_path / "log.zarr")]
        # As from a script that starts it in the background, where the shell has Ctrl-C ignored.
        process = subprocess.Popen(["sh", "-c", 'trap "" INT; exec "$@"', "sh", *command], stderr=subprocess.PIPE)
        while not (tmp_path / "log.zarr" / ".writing").exists():
            assert process.poll() is None
            time.sleep(0.05)
        time.sleep(1)
        process.send_signal(number)
        _, said = process.communicate(timeout=60)
    assert process.returncode == 130 and b"interrupted" in said and b"see: sacflow-robot log info" in said
    log = EpisodeLog.open(tmp_path / "log.zarr")
    assert log.read(len(log) - 1).info["interrupted"]


def test_a_person_takes_over_and_labels_from_the_terminal(tmp_path: Path) -> None:
    hands, terminal = pty.openpty()
    with PolicyServer(OnnxPolicy(POLICY), "tcp://127.0.0.1:*") as server:
        command = [sys.executable, "-m", "sacflow_robot", "run", "--robot", "rtsim:lift", "--keyboard", "--json"]
        command += ["--server", server.start().address, "--episodes", "1", "--log", str(tmp_path / "log.zarr")]
        process = subprocess.Popen(
            command, stdin=terminal, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, bufsize=1
        )
        assert process.stderr is not None and process.stdout is not None
        said = ""

        def hear(answer: str) -> None:
            nonlocal said
            while answer not in said:
                line = process.stderr.readline()
                assert line, f"ended before it said {answer!r}: {said}"
                said += line

        hear("this help")
        # One key after the other, each when the one before has been heard: they are polled once per control period.
        for key, answer in (("t", "you have the robot"), ("g", "gripper closes"), ("n", "episode labeled: failure")):
            os.write(hands, key.encode())
            hear(answer)
        out, rest = process.communicate(timeout=60)
    os.close(hands)
    os.close(terminal)
    assert process.returncode == 0, said + rest
    assert json.loads(out.splitlines()[-1])["successes"] == 0
    episode = EpisodeLog.open(tmp_path / "log.zarr").read(0)
    assert episode.info["label"] == "failure" and not episode.info["success"]
    human = episode.source == Source.HUMAN
    assert episode.intervention_action is not None, "what the person asked for is kept beside what was sent"
    assert np.array_equal(np.isfinite(episode.intervention_action).all(axis=1), human)
    assert human.any() and human[np.flatnonzero(human)[0] :].all(), "who took over has the robot until the end"
