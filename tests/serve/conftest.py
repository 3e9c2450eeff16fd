"""A server of an untrained policy."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from sacflow_robot.export.onnx_policy import OnnxPolicy
from sacflow_robot.serve.server import PolicyServer
from tests.serve.raw_client import ANY_PORT


@pytest.fixture
def server(policy_file: Path) -> Iterator[PolicyServer]:
    with PolicyServer(OnnxPolicy(policy_file), ANY_PORT) as running:
        yield running.start()
