"""``sacflow-robot keys``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from sacflow_robot.cli import common


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
        out = common.results()
        out.print(f"{public}: public, for the other side")
        out.print(f"{secret}: secret, stays here")
        return 0
