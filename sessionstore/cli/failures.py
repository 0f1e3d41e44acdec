"""From what went wrong to one line on stderr and an exit code.

    1    a failure
    2    wrong usage: an option, an argument, a missing or wrong setting
    3    no such session
    4    the store cannot be reached, or refuses the password
    5    ``run`` has lost its lease on the session, and stopped its command
    130  interrupted (Ctrl-C)
    141  whoever read the output has gone, as a command killed by SIGPIPE

A message may quote agents and servers, so it is made harmless; it never quotes the URL, which may
hold a password.
"""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Generator
from contextlib import contextmanager, suppress
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

from redis.exceptions import (
    AuthenticationError,
    ConnectionError,
    OutOfMemoryError,
    RedisError,
    TimeoutError,
)

from sessionstore import sentinels
from sessionstore._server import ServerNotFoundError
from sessionstore.cli import terminal
from sessionstore.errors import (
    DurabilityError,
    InvalidArgumentError,
    OutcomeUnknownError,
    SessionNotFoundError,
    SessionStoreError,
    is_transient,
)

FAILURE = 1
USAGE = 2
NO_SESSION = 3
UNREACHABLE = 4
LEASE_LOST = 5
INTERRUPTED = 130
READER_GONE = 141


class CommandError(Exception):
    """A command cannot go on; the message is for its user."""

    def __init__(self, exit_code: int, message: str) -> None:
        super().__init__(message)
        self.exit_code = exit_code


def note(message: str) -> None:
    """Tell something on stderr, after what was written to stdout so far."""
    sys.stdout.flush()
    print(terminal.lines(message), file=sys.stderr, flush=True)


def report(error: BaseException) -> int:
    """Tell what went wrong; the exit code."""
    try:
        sys.stdout.flush()
    except OSError:
        _discard_output()
    if isinstance(error, KeyboardInterrupt):
        return INTERRUPTED
    if isinstance(error, BrokenPipeError):
        return READER_GONE
    code, message = _explain(error)
    with suppress(OSError):
        print(message, file=sys.stderr)
    return code


def _explain(error: BaseException) -> tuple[int, str]:
    usage = _usage(error)
    if usage is not None:
        return usage
    message = f"error: {terminal.one_line(str(error))}"
    if isinstance(error, CommandError):
        return error.exit_code, message
    if isinstance(error, InvalidArgumentError):
        return USAGE, message
    if isinstance(error, SessionNotFoundError):
        return NO_SESSION, message
    if isinstance(error, (ConnectionError, TimeoutError)):
        return UNREACHABLE, message
    if isinstance(error, (SessionStoreError, RedisError, ServerNotFoundError)):
        return FAILURE, message
    if isinstance(error, OSError):
        about = f"{error.filename}: " if error.filename else ""
        return FAILURE, f"error: {terminal.one_line(f'{about}{error.strerror or error}')}"
    # A bug: whoever reports it needs all there is.
    return FAILURE, terminal.lines("".join(traceback.format_exception(error)).rstrip())


def _usage(error: Any) -> tuple[int, str] | None:
    """Typer's own complaint. Its class is click's or typer's own, as the version will have it."""
    if not hasattr(error, "format_message"):
        return None
    message = f"error: {error.format_message()}"
    context = getattr(error, "ctx", None)
    if context is not None:
        message = f"{context.get_usage()}\nTry '{context.command_path} --help'.\n\n{message}"
    return int(error.exit_code), terminal.lines(message)


def passes(error: Exception) -> bool:
    """Whether the same may well succeed later: an outage, a server whose memory is full."""
    cause = error.__cause__ if isinstance(error, CommandError) else error
    passing = (OutcomeUnknownError, OutOfMemoryError)
    return cause is not None and (isinstance(cause, passing) or is_transient(cause))


def _discard_output() -> None:
    """Stdout takes no more; without this, Python would complain of it once more at exit."""
    with suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


@contextmanager
def naming_the_server(url: str, timeout: float) -> Generator[None, None, None]:
    """Turn failures of the connection into such that name the server's address.

    Args:
        url: the server's.
        timeout: seconds that a call may take.
    """
    try:
        yield
    except AuthenticationError as error:
        raise CommandError(
            UNREACHABLE,
            f"authentication failed at {address(url)}: {without_password(str(error), url)}",
        ) from error
    except DurabilityError as error:
        have = "an unknown number" if error.acknowledged is None else error.acknowledged
        raise CommandError(
            FAILURE,
            f"the change was made at {address(url)}, but {have} of {error.wanted} replicas "
            "have acknowledged it",
        ) from error
    except OutcomeUnknownError as error:
        raise CommandError(
            UNREACHABLE,
            f"no answer from the store at {address(url)} within {timeout:g} s: the change may or "
            "may not have been made",
        ) from error
    except TimeoutError as error:
        raise CommandError(
            UNREACHABLE, f"cannot reach the store at {address(url)}: no answer in time"
        ) from error
    except ConnectionError as error:
        raise CommandError(
            UNREACHABLE,
            f"cannot reach the store at {address(url)}: {without_password(_reason(error), url)}",
        ) from error


def address(url: str) -> str:
    """Where the server is: ``host:port``, the path of its socket, or who is asked for it."""
    if sentinels.is_sentinel_url(url):
        named = sentinels.parsed(url)
        return f"{named.service} of {', '.join(named.addresses)}"
    parts = urlsplit(url)
    if parts.scheme == "unix":
        return unquote(parts.path)
    return sentinels.joined(unquote(parts.hostname or "localhost"), parts.port or 6379)


def _reason(error: BaseException) -> str:
    """What the operating system said, if it was that; else the error's own message."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) and cause.strerror:
            return cause.strerror
        cause = cause.__cause__ or cause.__context__
    return str(error)


def without_password(message: str, url: str) -> str:
    """A message without the password that a URL holds."""
    parts = urlsplit(url)
    named = parse_qs(parts.query)
    in_query = (*named.get("password", ()), *named.get("sentinel_password", ()))
    for password in (parts.password, *in_query):
        if password:
            message = message.replace(password, "***").replace(unquote(password), "***")
    return message
