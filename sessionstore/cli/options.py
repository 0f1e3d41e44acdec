"""The options that the commands share, and the store that they name."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Annotated, Any
from urllib.parse import urlsplit

import typer

from sessionstore import InvalidArgumentError, SessionStore
from sessionstore.cli import failures
from sessionstore.cli.failures import CommandError
from sessionstore.connecting import URL_VARIABLE
from sessionstore.sentinels import URL_FORMS
from sessionstore.settings import SettingsArguments

DEADLINE = 5.0  # seconds: a person waits
_DEADLINE_VARIABLE = "SESSIONSTORE_DEADLINE"

_DURATION = re.compile(r"(\d+(?:\.\d*)?|\.\d+)\s*([smhd]?)")
_UNITS = {"": 1, "s": 1, "m": 60, "h": 3600, "d": 86_400}  # seconds

_STORE_PANEL = "The store"
Url = Annotated[
    str | None,
    typer.Option(
        "--url",
        metavar="URL",
        help="The server: redis://, rediss:// or unix://, or redis+sentinel://HOST,HOST/SERVICE. "
        f"Default: ${URL_VARIABLE}.",
        rich_help_panel=_STORE_PANEL,
    ),
]
Namespace = Annotated[
    str | None,
    typer.Option(
        "--namespace",
        metavar="NAME",
        help="First part of every key. Default: $SESSIONSTORE_NAMESPACE, or agents.",
        rich_help_panel=_STORE_PANEL,
    ),
]
Timeout = Annotated[
    float | None,
    typer.Option(
        "--timeout",
        metavar="SECONDS",
        help="How long a call to the store may take. Default: 5; for run 10.",
        rich_help_panel=_STORE_PANEL,
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON, whether on a terminal or not.")]

# Which sessions: those that match all that are given.
OfType = Annotated[str | None, typer.Option("--type", metavar="TYPE", help="Of this agent type.")]
OfStatus = Annotated[
    list[str] | None,
    typer.Option(
        "--status",
        metavar="STATUS",
        help="Of this status: starting, active, busy, error or terminated. May be repeated, "
        "or several with commas.",
    ),
]
OfTask = Annotated[str | None, typer.Option("--task", metavar="ID", help="Working on this task.")]
OfService = Annotated[
    str | None, typer.Option("--service", metavar="ID", help="Driving this service session.")
]
OfMcp = Annotated[
    str | None, typer.Option("--mcp", metavar="ID", help="Belonging to this MCP session.")
]
OfOwner = Annotated[
    str | None, typer.Option("--owner", metavar="WORKER", help="Held by this worker.")
]
SessionId = Annotated[str, typer.Argument(metavar="ID", help="The session's id.")]


def filters(
    type: str | None,
    status: list[str] | None,
    task: str | None,
    service: str | None,
    mcp: str | None,
    owner: str | None,
) -> dict[str, Any]:
    """The filters of ``find_sessions`` that these options are."""
    statuses = [one.strip() for given in status or () for one in given.split(",")]
    return {
        "type": type,
        "status": statuses or None,
        "task_id": task,
        "service_session_id": service,
        "mcp_session_id": mcp,
        "owner": owner,
    }


def duration(text: str) -> float:
    """Seconds, from ``30``, ``1.5``, ``90s``, ``15m``, ``12h`` or ``7d``."""
    found = _DURATION.fullmatch(text.strip())
    if found is None:
        raise typer.BadParameter(f"{text!r} is no duration: 30 (seconds), 90s, 15m, 12h or 7d")
    return float(found[1]) * _UNITS[found[2]]


@dataclass(frozen=True, slots=True)
class GlobalOptions:
    """The options given before the command; the same after it win."""

    url: str | None = None
    namespace: str | None = None
    timeout: float | None = None


@contextmanager
def opened_store(
    context: typer.Context,
    url: str | None,
    namespace: str | None,
    timeout: float | None,
    default_timeout: float | None = DEADLINE,
) -> Generator[SessionStore, None, None]:
    """The store that options and environment name."""
    before: GlobalOptions = context.obj
    url = named_url(context, url)
    settings: SettingsArguments = {}
    namespace = namespace if namespace is not None else before.namespace
    if namespace is not None:
        settings["namespace"] = namespace
    timeout = timeout if timeout is not None else before.timeout
    if timeout is None and not os.environ.get(_DEADLINE_VARIABLE):
        timeout = default_timeout
    if timeout is not None:
        settings["deadline"] = timeout
    try:
        opened = SessionStore.from_url(url, **settings)
    except InvalidArgumentError as error:
        if error.argument == "deadline":
            raise CommandError(failures.USAGE, f"--timeout: {error}") from None
        if error.argument != "url":
            raise
        raise _invalid_url() from None
    if _has_stray_at(url):
        opened.close()
        raise _invalid_url()
    with opened, failures.naming_the_server(url, opened.settings.deadline):
        yield opened


def named_url(context: typer.Context, url: str | None) -> str:
    """The server's URL, from the options or the environment."""
    url = url or named_url_if_any(context)
    if not url:
        raise CommandError(
            failures.USAGE,
            f"no server is named: set {URL_VARIABLE} or pass --url, "
            "for example redis://localhost:6379",
        )
    return url


def named_url_if_any(context: typer.Context) -> str | None:
    """The server's URL, from the options before the command or the environment."""
    before: GlobalOptions = context.obj
    return before.url or os.environ.get(URL_VARIABLE)


def _invalid_url() -> CommandError:
    # Without what urllib says of the URL: it may quote a part of the password.
    return CommandError(
        failures.USAGE,
        "the URL is not valid: expected redis://[USER:PASSWORD@]HOST[:PORT][/DB], rediss://… "
        f"or unix:///PATH, or {URL_FORMS}, with special characters of the password percent-encoded",
    )


def _has_stray_at(url: str) -> bool:
    """A password with ``/``, ``?`` or ``#`` ends the host too early: it is read as the address."""
    parts = urlsplit(url)
    in_query = "@" in parts.query and "=" not in parts.query.partition("@")[0]
    return parts.scheme != "unix" and ("@" in parts.path + parts.fragment or in_query)


def write(line: str) -> None:
    sys.stdout.write(line + "\n")


def on_terminal() -> bool:
    return sys.stdout.isatty()
