"""Log lines for people, or for programs: one JSON object a line."""

from __future__ import annotations

import json
import logging
import sys
from typing import Any

_STANDARD = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime"}


class StructuredFormatter(logging.Formatter):
    """Message and fields (``extra``) of a record.

    Args:
        as_json: One JSON object a line, or text with ``field=value`` after the message.
    """

    def __init__(self, as_json: bool) -> None:
        super().__init__(datefmt="%Y-%m-%dT%H:%M:%S%z")
        self._as_json = as_json

    def format(self, record: logging.LogRecord) -> str:
        fields: dict[str, Any] = {k: v for k, v in vars(record).items() if k not in _STANDARD}
        message = record.getMessage()
        if record.exc_info and record.exc_info[1] is not None:
            fields["exception"] = self.formatException(record.exc_info)
        if self._as_json:
            line = {"time": self.formatTime(record, self.datefmt), "level": record.levelname.lower(), "event": message}
            return json.dumps({**line, **fields}, default=str)
        text = " ".join([message, *(f"{name}={value}" for name, value in fields.items())])
        return text if record.levelno < logging.WARNING else f"{record.levelname.lower()}: {text}"


def set_up_logging(as_json: bool) -> None:
    """Write this package's log to stderr."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(StructuredFormatter(as_json))
    logger = logging.getLogger("sacflow_robot")
    logger.handlers[:] = [handler]
    logger.setLevel(logging.INFO)
    logger.propagate = False
