"""The workstation's sockets, heard by a bare ZeroMQ subscriber; what the messages say is tested in ``test_messages``."""

import time
from contextlib import closing

import pytest
import zmq

from sacflow_robot.robot.drivers.deoxys.config import DeoxysConfig
from sacflow_robot.robot.drivers.deoxys.wire import DeoxysWire


@pytest.mark.parametrize("within_s", [0.0, 3e-4, 2e-3])
def test_a_command_right_after_another_is_not_lost(config: DeoxysConfig, within_s: float) -> None:
    """A stop comes right after a standstill: of a queue of one, ZeroMQ drops it for as long as a millisecond."""
    with (
        closing(DeoxysWire(config)) as wire,
        zmq.Context() as context,
        context.socket(zmq.SUB) as arm,
        context.socket(zmq.SUB) as gripper,
    ):
        for socket, port in ((arm, config.command_port), (gripper, config.gripper_command_port)):
            socket.setsockopt(zmq.RCVTIMEO, 2000)
            socket.subscribe(b"")
            socket.connect(f"tcp://{config.pc_ip}:{port}")
        while not arm.poll(10) or not gripper.poll(10):  # a publisher drops what nobody has subscribed to yet
            wire.send(b"first", b"first")
        for socket in (arm, gripper):
            while socket.poll(100):
                socket.recv()
        for i in range(20):
            sent = [b"%d, %d" % (i, j) for j in range(4)]
            for command in sent:
                wire.send(command, command)
                time.sleep(within_s)
            assert [arm.recv() for _ in sent] == sent
            assert [gripper.recv() for _ in sent] == sent
            time.sleep(0.01)
