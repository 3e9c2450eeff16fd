"""``sacflow-robot serve``, ``top`` and ``keys``."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from sacflow_robot.cli import common
from sacflow_robot.errors import ServerError, UsageError

if TYPE_CHECKING:
    from rich.console import Group

    from sacflow_robot.export.onnx_policy import OnnxPolicy
    from sacflow_robot.serve.server import PolicyServer


@dataclass(frozen=True)
class Serve:
    """Serve a policy file over ZeroMQ until Ctrl-C or SIGTERM.

    Without keys it is open to this computer alone. SIGHUP loads the file again.

    Attributes:
        policy: Policy file.
        bind: Address to listen at.
        reload: Whether to watch the file, and serve a new one as soon as it has passed its tests.
        max_action_change: Refuse a new file that changes a recent action by more than this (action units).
        provider: What computes, as far as ONNX Runtime offers it: cpu, cuda, tensorrt.
        threads: Threads for one inference; if not given, what is quickest here is measured, for a second.
        spin: Let those threads keep their cores busy while they wait.
        max_batch: Rows evaluated together at most; 1 never evaluates two requests together.
        heartbeat: Time between heartbeats (s); a connection is dead after two without one.
        key: Secret key file of this server; with --clients, connections are encrypted and checked.
        clients: Folder of the public key files of the clients that may connect; looked at anew as it changes.
        insecure: Listen to other computers although nothing is encrypted and anyone may connect.
        openpi: Address host:port at which openpi's WebSocket clients are served too, usually port 8000.
        groot: Address at which GR00T's ZeroMQ clients are served too, e.g. tcp://127.0.0.1:5557.
        groot_text_config: Give GR00T's clients the modality config as JSON text, as those before N1.7 may need it.
        metrics: Address host:port at which Prometheus finds metrics, e.g. 127.0.0.1:9464.
        log_format: Log lines for people, or one JSON object each.
    """

    policy: Path
    bind: str = "tcp://127.0.0.1:5555"
    reload: bool = False
    max_action_change: float | None = None
    provider: str = "cpu"
    threads: int | None = None
    spin: bool = False
    max_batch: int = 64
    heartbeat: float = 1.0
    key: Path | None = None
    clients: Path | None = None
    insecure: bool = False
    openpi: str | None = None
    groot: str | None = None
    groot_text_config: bool = False
    metrics: str | None = None
    log_format: Literal["text", "json"] = "text"

    def run(self) -> int:
        from sacflow_robot.serve.auth import Security
        from sacflow_robot.serve.metrics import set_up_logging
        from sacflow_robot.serve.reload import Reloader
        from sacflow_robot.serve.server import PolicyServer

        self._check()
        set_up_logging(self.log_format == "json")
        say = self._speaker()
        policy, how = self._load()
        spec, security = policy.spec, Security(self.key, self.clients, self.insecure)
        with ExitStack() as stack:
            server = stack.enter_context(
                PolicyServer(policy, self.bind, max_batch=self.max_batch, heartbeat_s=self.heartbeat, security=security)
            )
            reloader = Reloader(server, self.policy, max_change=self.max_action_change, watch=self.reload)
            stack.enter_context(closing(reloader.start()))
            doors = self._open_doors(server, stack)
            for asked in (signal.SIGINT, signal.SIGTERM):
                signal.signal(asked, lambda *_: server.stop())
            if hasattr(signal, "SIGHUP"):
                signal.signal(signal.SIGHUP, lambda *_: reloader.ask())
            say(
                f"serving {self.policy} (version {policy.version}, {spec.velocity}, K = {spec.euler_steps}, "
                f"H = {spec.chunk_length}, self-test passed) for {spec.robot.robot} {spec.robot.task} at {server.address}",
                policy_version=policy.version,
                address=server.address,
            )
            for line in (how, *doors):
                say(line)
            if self.log_format == "text":
                robot = common.robot_hint(spec.robot)
                who = "your robot, by its driver's name," if robot.startswith("DRIVER") else "the simulated robot"
                say(f"drive {who} with:\n  {common.command_line('run --robot', robot, '--server', server.address)}")
            server.run()
            say(f"stopped after {server.requests:,} requests", requests=server.requests)
        return 0

    def _speaker(self) -> Callable[..., None]:
        """Tells people, or programs, what is going on."""
        if self.log_format == "json":
            import logging

            log = logging.getLogger(__name__)
            return lambda text, **fields: log.info(text, extra=fields)
        out = common.console()
        return lambda text, **_: out.print(text)

    def _check(self) -> None:
        if not 1 <= self.max_batch <= 4096 or not 0.01 <= self.heartbeat <= 60:
            raise UsageError("--max-batch must be 1 to 4096, --heartbeat 0.01 to 60")
        if self.threads is not None and not 1 <= self.threads <= 256:
            raise UsageError("--threads must be 1 to 256")

    def _load(self) -> tuple[OnnxPolicy, str]:
        """The policy, and how it computes, in words."""
        from sacflow_robot.export.onnx_policy import Engine, OnnxPolicy
        from sacflow_robot.serve import autotune as tune

        if self.threads is not None or self.provider != "cpu":
            policy = OnnxPolicy(self.policy, Engine(self.provider, self.threads or 1, self.spin))
            return policy, f"computing with {policy.engine}"
        policy, trials = tune.quickest(self.policy)
        tried = "; ".join(f"{t.engine} {t.p50_us:g} us" for t in trials)
        return policy, f"computing with {policy.engine} (measured: {tried}); --threads N says otherwise"

    def _open_doors(self, server: PolicyServer, stack: ExitStack) -> list[str]:
        """Open what else was asked for; a line about each."""
        from sacflow_robot.serve.auth import Security, check_bind, check_open, split_place

        lines: list[str] = []
        if self.metrics is not None:
            host, port = split_place(self.metrics)
            check_open(self.metrics, self.insecure, "a proxy that asks who it is")
            try:
                port = server.meters.expose(host, port)
            except OSError as error:
                raise UsageError(f"cannot bind {self.metrics}: {error.strerror or error}; see --metrics") from None
            lines.append(f"metrics for Prometheus at http://{host}:{port}/metrics")
        remedy = "a proxy that asks who it is; this protocol knows no keys"
        if self.openpi is not None:
            from sacflow_robot.serve.gateways.openpi import OpenpiGateway

            host, port = split_place(self.openpi)
            check_open(self.openpi, self.insecure, remedy)
            door = stack.enter_context(closing(OpenpiGateway(lambda: server.policy, host, port)))
            lines.append(f"openpi clients are served at ws://{host}:{door.port}")
        if self.groot is not None:
            from sacflow_robot.serve.gateways.groot import GrootGateway

            check_bind(self.groot, Security(insecure=self.insecure))
            gateway = stack.enter_context(
                closing(GrootGateway(lambda: server.policy, self.groot, text_config=self.groot_text_config))
            )
            lines.append(f"GR00T clients are served at {gateway.address}")
        return lines


@dataclass(frozen=True)
class Top(common.ClientOptions, common.JsonOptions):
    """Watch a policy server: what it serves, how fast, and to whom.

    Attributes:
        every: Time between looks (s).
        once: Look once and stop, as --json does.
    """

    every: float = 1.0
    once: bool = False

    def run(self) -> int:
        from rich.live import Live

        from sacflow_robot.serve.client import PolicyClient

        if not 0.1 <= self.every <= 3600:
            raise UsageError("--every must be 0.1 to 3600")
        with PolicyClient(self.server, name="top", keys=self.keys) as client:
            first = client.status()
            if self.json:
                hidden = "id", "ok", "server_ns"
                return self.finish({name: value for name, value in first.items() if name not in hidden})
            if self.once:
                common.results().print(table(self.server, first, None))
                return 0
            with Live(table(self.server, first, None), console=common.console(), auto_refresh=False) as live:
                while True:
                    time.sleep(self.every)
                    try:
                        now = client.status()
                    except ServerError as error:
                        live.update(f"{error}", refresh=True)
                        continue
                    live.update(table(self.server, now, first), refresh=True)
                    first = now


def table(address: str, now: Mapping[str, Any], before: Mapping[str, Any] | None) -> Group:
    """Table of one look at the server; rates since the look before."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    seconds = (now["server_ns"] - before["server_ns"]) / 1e9 if before is not None else 0.0

    def count(name: str) -> str:
        rate = f"  {(now[name] - before[name]) / seconds:,.0f}/s" if before is not None and seconds > 0 else ""
        return f"{now[name]:,}{rate}"

    head = Table.grid(padding=(0, 3))
    head.add_row(
        Text(address, "bold"), f"{now['task']}, {now['velocity']}, version {now['policy_version']}", now["engine"]
    )
    counts = Table("answered", "late", "refused", "dropped", "reloads", "refused", box=None, pad_edge=False)
    names = "requests", "late", "refused", "dropped"
    counts.add_row(*map(count, names), str(now["reloads_taken"]), str(now["reloads_refused"]))
    phases = Table("phase", "p50 us", "p99 us", box=None, pad_edge=False)
    for name, value in now["latency_us"].items():
        phases.add_row(name, f"{value['p50']:,.0f}", f"{value['p99']:,.0f}")
    clients = Table("client", "answered", "late", "refused", box=None, pad_edge=False)
    for client in now["clients"]:
        row = client["requests"], client["late"], client["refused"]
        clients.add_row(Text(client["client"] or "-"), *(f"{n:,}" for n in row))
    for part in (counts, phases, clients):
        for column in part.columns[1:]:
            column.justify = "right"
    return Group(head, "", counts, "", phases, "", *_reload_line(now.get("last_reload")), clients)


def _reload_line(last: Mapping[str, Any] | None) -> list[str]:
    """Outcome of the last reload, in words."""
    if last is None:
        return []
    if last["result"] == "refused":
        return [f"last new file refused: {last['reason']}", ""]
    compared = f"{last['compared_rows']} recent observations ({last['compared_share']:.0%})"
    return [
        f"last new file taken; actions differ by {last['mean_change']:g}, {last['max_change']:g} at most, over {compared}",
        "",
    ]


@dataclass(frozen=True)
class New:
    """Make a pair of keys: NAME.key, to give away, and NAME.key_secret, to keep.

    Make one for the server and one for each client, on the computer that it is for. Then

        sacflow-robot serve --policy FILE --bind tcp://*:5555 --key keys/server.key_secret --clients keys/clients
        sacflow-robot run --server tcp://HOST:5555 --key keys/arm.key_secret --server-key keys/server.key

    where keys/clients holds the .key file of every client that may connect.

    Attributes:
        name: Name of the files, e.g. server or arm-1.
        out: Folder to write them to; made if absent.
    """

    name: Annotated[str, tyro.conf.Positional]
    out: Path = Path("keys")

    def run(self) -> int:
        from sacflow_robot.serve.auth import new_keys

        public, secret = new_keys(self.out, self.name)
        common.results().print(f"{public}: public, for the other side\n{secret}: secret, stays here")
        return 0
