"""``sacflow-robot top``."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sacflow_robot.cli import common
from sacflow_robot.errors import ServerError, UsageError

if TYPE_CHECKING:
    from rich.console import Group


@dataclass(frozen=True)
class Top:
    """Watch a policy server: what it serves, how fast, and to whom.

    Attributes:
        server: Address of the policy server.
        every: Time between looks (s).
        once: Look once and stop.
        key: Secret key file of this client, where the server asks for keys.
        server_key: Public key file of the server, likewise.
        json: Print one look as one JSON object, and stop.
    """

    server: str = "tcp://127.0.0.1:5555"
    every: float = 1.0
    once: bool = False
    key: Path | None = None
    server_key: Path | None = None
    json: bool = False

    def run(self) -> int:
        from rich.live import Live

        from sacflow_robot.serve.client import PolicyClient

        if not 0.1 <= self.every <= 3600:
            raise UsageError("--every must be 0.1 to 3600")
        with PolicyClient(self.server, name="top", keys=common.client_keys(self.key, self.server_key)) as client:
            first = client.status()
            if self.json:
                hidden = "id", "ok", "server_ns"
                common.print_json({name: value for name, value in first.items() if name not in hidden})
                return 0
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
    compared = f"{last['compared_rows']} observations of late ({last['compared_share']:.0%})"
    return [
        f"last new file taken; actions differ by {last['mean_change']:g}, {last['max_change']:g} at most, over {compared}",
        "",
    ]
