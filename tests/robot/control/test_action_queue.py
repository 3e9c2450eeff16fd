"""Chunks over a made-up network whose delays are known, and over a real one."""

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from sacflow_robot.errors import ConnectionLost, DeadlineExceeded, SpecMismatchError
from sacflow_robot.export.onnx_policy import OnnxPolicy
from sacflow_robot.robot.control.action_queue import ActionQueue
from sacflow_robot.serve.client import PolicyClient
from sacflow_robot.serve.server import PolicyServer
from sacflow_robot.spec import FloatArray, Observation, PolicySpec

PERIOD_NS = 50_000_000  # lift's control rate is 20 Hz


class Network:
    """A client on a made-up clock. A chunk asked for at time t says t / period + 0, 1, 2, ..., plus a jump of its own."""

    def __init__(self, spec: PolicySpec, delay_ns: int, jump: Callable[[int], float] = lambda n: 0.0) -> None:
        self.spec, self.delay_ns, self._jump = spec, delay_ns, jump
        self.now_ns, self.count, self.deadlines, self.error = 0, 0, [], None
        self.takes_prefix, self.prefixes = False, []
        self._asked: dict[int, int] = {}

    def ask(
        self,
        observation: Observation,
        noise: FloatArray | None = None,
        deadline_s: float | None = None,
        *,
        prefix: FloatArray | None = None,
        prefix_mask: FloatArray | None = None,
    ) -> int:
        if isinstance(self.error, ConnectionLost):
            raise self.error
        self.count += 1
        self._asked = {self.count: self.now_ns}
        self.deadlines.append(deadline_s)
        self.prefixes.append((prefix, prefix_mask))
        return self.count

    def collect(self, number: int, wait_s: float | None = None) -> FloatArray:
        ready = self._asked[number] + self.delay_ns
        if wait_s is None:
            self.now_ns = max(self.now_ns, ready)
        if self.now_ns < ready:
            raise TimeoutError
        if self.error is not None:
            raise self.error
        steps = self._asked[number] // PERIOD_NS + np.arange(5) + self._jump(number)
        return np.repeat(steps[None, :, None], 7, 2).astype(np.float32)


@pytest.fixture(scope="module")
def spec(policy_file: Path) -> PolicySpec:
    return OnnxPolicy(policy_file).spec


def play(network: Network, stream: ActionQueue, steps: int) -> list[float | None]:
    actions = []
    for _ in range(steps):
        result = stream.step({"x": np.zeros(3, np.float32)})
        actions.append(None if result.action is None else float(result.action[0]))
        network.now_ns += PERIOD_NS
    return actions


@pytest.mark.parametrize("delay_ms", [1, 49, 60, 90])
def test_every_action_is_for_the_step_it_is_played_at(spec: PolicySpec, delay_ms: int) -> None:
    network = Network(spec, delay_ms * 1_000_000)
    stream = ActionQueue(network, clock_ns=lambda: network.now_ns)
    first = play(network, stream, 1)
    assert first == [0.0 if delay_ms < 50 else None], "the first chunk is waited for; after its period the robot stands"
    network.now_ns = PERIOD_NS * len(
        [a for a in first if a is not None]
    )  # as where that wait is not a part of the episode
    assert [*first, *play(network, stream, 60)] == [*first, *map(float, range(first != [None], 60 + (first != [None])))]
    assert stream.lost == 0 and 60 / 5 <= network.count <= 61


def test_it_asks_as_late_as_the_delay_allows(spec: PolicySpec) -> None:
    counts = []
    for delay_ms in (1, 60, 110):
        network = Network(spec, delay_ms * 1_000_000)
        stream = ActionQueue(network, blend=0, clock_ns=lambda network=network: network.now_ns)
        play(network, stream, 100)
        assert stream.delay_steps == -(-delay_ms // 50)
        counts.append(network.count)
    assert counts[0] < counts[1] <= counts[2]
    assert counts[0] <= 26, "a chunk of five serves four steps, and the fifth covers the delay"


def test_chunks_that_disagree_are_joined_smoothly(spec: PolicySpec) -> None:
    def jump(number: int) -> float:
        return 10.0 if number % 2 else -10.0

    steepest = {}
    for blend in (0, 2):
        network = Network(spec, 1_000_000, jump)
        stream = ActionQueue(network, blend=blend, clock_ns=lambda network=network: network.now_ns)
        actions = np.array(play(network, stream, 60))
        steepest[blend] = np.abs(np.diff(actions)).max()
    assert steepest[0] >= 19 and steepest[2] <= 1 + 20 / 3 + 1e-4, "a jump of 20 is spread over three steps"


def test_what_will_be_played_meanwhile_is_sent_ahead_where_the_policy_takes_it(spec: PolicySpec) -> None:
    network = Network(spec, 60_000_000, lambda number: 10.0 * number)
    network.takes_prefix = True
    stream = ActionQueue(network, blend=0, clock_ns=lambda: network.now_ns)
    played = play(network, stream, 40)
    first, *later = network.prefixes
    assert first[0] is not None and not first[1].any(), "at first nothing is decided"
    at = 0
    for prefix, mask in later[1:-1]:  # from the second on the delay is known: two steps
        assert mask.tolist() == [[1, 1, 0, 0, 0]]
        sent = prefix[0, :2, 0].tolist()
        at = next(i for i in range(at, 40) if played[i : i + 2] == sent)
    without = ActionQueue(network, blend=0, prefix=False, clock_ns=lambda: network.now_ns)
    play(network, without, 2)
    assert network.prefixes[-1] == (None, None)


@pytest.mark.parametrize(("takes_prefix", "decided"), [(True, 1), (False, 0)])
def test_a_chunk_takes_over_bit_by_bit_from_where_it_is_free_to_differ(
    spec: PolicySpec, takes_prefix: bool, decided: int
) -> None:
    class Completing(Network):
        def collect(self, number: int, wait_s: float | None = None) -> FloatArray:
            chunk = super().collect(number, wait_s)
            prefix, mask = self.prefixes[-1]
            return np.where(mask[..., None] > 0, prefix, chunk) if prefix is not None else chunk

    network = Completing(spec, 40_000_000, lambda number: 9.0 * (number > 8))
    network.takes_prefix = takes_prefix
    stream = ActionQueue(network, blend=2, clock_ns=lambda: network.now_ns)
    steps = np.diff(np.array(play(network, stream, 60)[10:], np.float64))
    assert np.abs(steps).max() == pytest.approx(4.0, abs=1e-4), "a third of the 9 that they differ by, and 1"
    assert {int(mask.sum()) for _, mask in network.prefixes[3:] if mask is not None} <= {decided}


def test_without_an_answer_it_plays_to_the_end_and_then_holds(spec: PolicySpec) -> None:
    network = Network(spec, 1_000_000)
    stream = ActionQueue(network, clock_ns=lambda: network.now_ns)
    play(network, stream, 1)
    network.delay_ns = 10**12
    assert play(network, stream, 8) == [1.0, 2.0, 3.0, 4.0, None, None, None, None]
    stream.begin()
    network.delay_ns = 1_000_000
    assert play(network, stream, 1)[0] is not None


def test_a_late_answer_or_a_lost_server_costs_nothing_while_there_is_a_chunk_to_play(spec: PolicySpec) -> None:
    network = Network(spec, 1_000_000)
    stream = ActionQueue(network, clock_ns=lambda: network.now_ns)
    play(network, stream, 1)
    assert play(network, stream, 1) == [1.0]
    for error in (DeadlineExceeded("late"), ConnectionLost("gone")):
        network.error = error
        before = stream.lost
        play(network, stream, 1)
        assert stream.lost >= before
    with pytest.raises(ConnectionLost):
        play(network, stream, 8)
    network.error = None
    assert None not in play(network, stream, 4)[1:]
    assert network.deadlines[0] is None and all(d is None or 0 < d <= 0.25 for d in network.deadlines[1:])


@pytest.mark.parametrize("delay_ms", [10, 200, 700])
@pytest.mark.parametrize("again", [False, True], ids=["begin", "after a hold"])
def test_an_arm_that_stands_plays_a_chunk_from_its_first_action(spec: PolicySpec, delay_ms: int, again: bool) -> None:
    network = Network(spec, delay_ms * 1_000_000)
    stream = ActionQueue(network, blend=0, clock_ns=lambda: network.now_ns)
    if again:
        play(network, stream, 7)
        stream.begin()
    asked_at = -(-network.now_ns // PERIOD_NS)
    played, joined = [], []
    for _ in range(4):
        network.now_ns = -(-network.now_ns // PERIOD_NS) * PERIOD_NS  # the loop waits for its next grid point
        step = stream.step({"x": np.zeros(3, np.float32)})
        if step.action is not None:
            played.append(float(step.action[0]))
            joined.append(step.joined)
        network.now_ns += 1_000_000
    assert played[:3] == [asked_at, asked_at + 1, asked_at + 2] and joined[:3] == [True, False, False]


def test_an_arm_that_has_run_out_of_actions_goes_on_where_it_stopped(spec: PolicySpec) -> None:
    network = Network(spec, 1_000_000)
    stream = ActionQueue(network, blend=0, clock_ns=lambda: network.now_ns)
    assert play(network, stream, 4) == [0.0, 1.0, 2.0, 3.0]
    network.delay_ns = 420_000_000
    played = play(network, stream, 14)
    assert played[:2] == [4.0, None], "the next chunk was asked for with the last step, and is late"
    after = [action for action in played if action is not None]
    assert after == [4.0, 5.0, 6.0, 7.0, 8.0], "none of its actions passed while the robot stood"


def test_one_slow_answer_changes_nothing_and_a_server_that_stays_slow_is_found(spec: PolicySpec) -> None:
    network = Network(spec, 700_000_000)
    stream = ActionQueue(network, blend=0, clock_ns=lambda: network.now_ns)
    play(network, stream, 2)
    network.delay_ns = 1_000_000
    for _ in range(40):
        play(network, stream, 5)
        assert stream.delay_steps == 1
    network.delay_ns = 700_000_000
    play(network, stream, 20)
    assert stream.delay_steps == 1
    network.delay_ns, count = 130_000_000, network.count
    while stream.delay_steps != 3:
        play(network, stream, 1)
        assert network.count < count + 7


def test_over_a_real_server(policy_file: Path) -> None:
    sizes = {"robot0_eef_pos": 3, "robot0_eef_quat": 4, "robot0_gripper_qpos": 2, "object": 10}
    policy = OnnxPolicy(policy_file)
    with PolicyServer(policy, "tcp://127.0.0.1:*").start() as server, PolicyClient(server.address) as client:
        stream, played, joined = ActionQueue(client, blend=1), 0, 0
        for _ in range(30):
            step = stream.step({key: np.zeros(size, np.float32) for key, size in sizes.items()})
            played, joined = played + (step.action is not None), joined + step.joined
            time.sleep(0.01)
        assert joined >= 4 and played >= 20


@pytest.mark.realtime
@pytest.mark.parametrize("transport", ["tcp", "ipc"])
def test_a_server_restarted_while_the_arm_is_held_is_greeted_before_the_arm_is_enabled(
    policy_file: Path, tmp_path: Path, transport: str
) -> None:
    policy = OnnxPolicy(policy_file)
    observation = {array.key: np.zeros(array.shape, np.float32) for array in policy.spec.robot.observations}
    server = PolicyServer(policy, "tcp://127.0.0.1:*" if transport == "tcp" else f"ipc://{tmp_path}/cell").start()
    with PolicyClient(server.address, expect=policy.spec.robot) as client:
        stream = ActionQueue(client)
        assert stream.step(observation).action is not None
        took = []

        def held(periods: int) -> None:
            for _ in range(periods):
                began = time.perf_counter()
                stream.keep_alive()
                took.append(time.perf_counter() - began)
                time.sleep(0.05)

        server.close()
        stream.begin()
        held(10)
        assert not client.connected
        with PolicyServer(policy, server.address).start():
            deadline = time.monotonic() + 20
            while not client.connected and time.monotonic() < deadline:
                held(1)
            stream.begin()  # one act of a person enables the robot
            step = stream.step(observation)
            assert step.action is not None and step.joined
            held(20)
        assert np.median(took) < 1e-3


@pytest.mark.realtime
def test_a_held_arm_is_told_of_a_server_restarted_with_a_policy_that_does_not_fit(policy_file: Path) -> None:
    policy = OnnxPolicy(policy_file)
    server = PolicyServer(policy, "tcp://127.0.0.1:*").start()
    with (
        PolicyClient(server.address, expect=policy.spec.robot) as client,
        PolicyClient(server.address) as open_minded,
    ):
        streams = ActionQueue(client), ActionQueue(open_minded)
        server.close()
        other = OnnxPolicy(policy_file)
        other.spec = replace(policy.spec, chunk_length=3, robot=replace(policy.spec.robot, robot="UR5e"))
        changed = PolicyServer(policy, server.address)
        changed.policy = other
        with changed.start():
            for stream, reason in zip(
                streams, (r"differs .* in: (arm|robot)\.robot", r"shape \(3, 7\).*began with \(5, 7\)"), strict=True
            ):
                with pytest.raises(SpecMismatchError, match=reason):
                    for _ in range(400):
                        stream.keep_alive()
                        time.sleep(0.05)
