"""Messages between a control loop and a simulated robot: late, lost, overtaken."""

import numpy as np

from sacflow_robot.envs.robot_parameters import RobotParameters
from sacflow_robot.envs.transport import Channel, Link, link_of

MS = 1_000_000


def sent(channel: Channel[int], count: int) -> None:
    for number in range(count):
        channel.send(number, number * MS, channel.draw_delay())


def test_messages_arrive_in_order_after_their_delay_and_overtaken_ones_never() -> None:
    channel: Channel[int] = Channel(Link(delay_ms=5, jitter_ms=20), np.random.default_rng(1))
    sent(channel, 200)
    assert channel.next_ns is not None and channel.next_ns >= 5 * MS
    arrived = channel.receive(100 * MS) + channel.receive(1000 * MS)
    numbers = [number for _, number in arrived]
    assert numbers == sorted(numbers) and 20 < len(numbers) < 200
    late = np.array([time_ns - number * MS for time_ns, number in arrived]) / MS
    assert late.min() >= 5 and late.max() <= 25
    assert channel.next_ns is None and not channel.receive(2000 * MS)


def test_the_drop_ratio_is_lost_and_a_cleared_channel_is_empty() -> None:
    channel: Channel[int] = Channel(Link(drop_ratio=0.3), np.random.default_rng(2))
    sent(channel, 1000)
    assert abs(len(channel.receive(1000 * MS)) - 700) < 60
    channel.send(1, 1001 * MS, 0)
    channel.clear()
    assert not channel.receive(2000 * MS)


def test_a_robot_model_names_both_directions() -> None:
    model = RobotParameters({"transport.observation_delay_ms": (3,), "transport.command_drop_ratio": (0.1,),
                             "transport.jitter_ms": (2,)})  # fmt: skip
    assert link_of(model, "observation") == Link(3, 2, 0) and link_of(model, "command") == Link(0, 2, 0.1)
