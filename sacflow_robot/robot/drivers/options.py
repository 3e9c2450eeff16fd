"""Names of robots: ``DRIVER:SUBJECT?OPTION=VALUE&OPTION=VALUE``, taken apart and checked."""

from collections.abc import Collection, Mapping
from typing import cast, get_args
from urllib.parse import parse_qsl

from sacflow_robot.errors import UnknownNameError, UsageError, one_line
from sacflow_robot.spec import Engine

Options = Mapping[str, str]


def split_name(name: str) -> tuple[str, str, dict[str, str]]:
    """Driver, subject and options of a name.

    Raises:
        UsageError: The options are not of the form ``name=value&name=value``.
    """
    driver, _, rest = name.partition(":")
    subject, _, query = rest.partition("?")
    try:
        options = parse_qsl(query, keep_blank_values=True, strict_parsing=True) if query else []
    except ValueError as error:
        raise UsageError(f"robot {name!r}: {one_line(error)}; expected DRIVER:SUBJECT?name=value&name=value") from None
    return driver, subject, dict(options)


def check_options(driver: str, options: Options, known: Collection[str]) -> None:
    """Refuse options that a driver does not know."""
    for option in options:
        if option not in known:
            raise UnknownNameError(f"option of robot driver {driver!r}", option, known)


def engine_option(options: Options) -> Engine:
    """The option ``engine``: ``compiled`` or ``stock``."""
    engine = options.get("engine", "compiled")
    if engine not in get_args(Engine):
        raise UnknownNameError("engine", engine, get_args(Engine))
    return cast(Engine, engine)
