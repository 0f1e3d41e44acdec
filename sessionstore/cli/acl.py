"""``sessionstore acl``: the rule of a user who may do one role's work on one namespace.

It talks to no server: its line is for whoever administers one.
"""

from __future__ import annotations

import sys
from enum import StrEnum
from getpass import getpass
from hashlib import sha256
from typing import Annotated
from urllib.parse import parse_qs, urlsplit

import typer

from sessionstore.acl import Server, rule, setuser
from sessionstore.cli import failures
from sessionstore.cli.failures import CommandError, note
from sessionstore.cli.options import GlobalOptions, Namespace, named_url_if_any, write
from sessionstore.errors import InvalidArgumentError
from sessionstore.settings import StoreSettings


class Role(StrEnum):
    """What a user is for."""

    WORKER = "worker"
    READER = "reader"
    OPERATOR = "operator"


def acl(
    context: typer.Context,
    role: Annotated[
        Role,
        typer.Option(
            "--role",
            help="reader writes nothing; worker does all but check, repair and import; operator "
            "does those too.",
        ),
    ],
    user: Annotated[
        str | None,
        typer.Option("--user", metavar="NAME", help="Default: the namespace, a dash, the role."),
    ] = None,
    password_stdin: Annotated[
        bool,
        typer.Option(
            "--password-stdin",
            help="Read the user's password from stdin; only its hash is printed.",
        ),
    ] = False,
    server: Annotated[
        str | None,
        typer.Option(
            "--server",
            metavar="VERSION",
            help="Such as redis-6.2, redis-7.0 or valkey-9. Default: Redis 7.2 or newer, Valkey.",
        ),
    ] = None,
    namespace: Namespace = None,
) -> None:
    """Print the least ACL rule for a role, as a line for redis-cli.

    For the namespace, and as $SESSIONSTORE_PARTITIONS, $SESSIONSTORE_CLUSTER and the database in
    the URL say. Without a password the user stays off.
    """
    before: GlobalOptions = context.obj
    named = namespace if namespace is not None else before.namespace
    settings = StoreSettings.load() if named is None else StoreSettings.load(namespace=named)
    try:
        words = rule(
            role.value,
            settings,
            Server() if server is None else Server.named(server),
            database=_database(named_url_if_any(context)),
        )
        if user is None:  # without colons, which a URL would take for the password's
            user = f"{settings.namespace.replace(':', '-')}-{role}"
        setuser(user, words, None)  # a wrong name is told before a password is asked for
        digest = _digest_of_password() if password_stdin else None
        write(setuser(user, words, digest))
    except InvalidArgumentError as error:
        raise CommandError(failures.USAGE, f"--{error}") from None
    if digest is None:
        note(f"user {user!r} stays off: give it a password with --password-stdin")


def _digest_of_password() -> str:
    if sys.stdin.isatty():
        password = getpass("Password: ").encode()
    else:
        password = sys.stdin.buffer.read().removesuffix(b"\n").removesuffix(b"\r")
    if not password:
        raise CommandError(failures.USAGE, "--password-stdin: there is no password on stdin")
    if b"\n" in password:
        raise CommandError(failures.USAGE, "--password-stdin: the password has several lines")
    return sha256(password).hexdigest()


def _database(url: str | None) -> int:
    """The number of the database that a URL names: 0 if none."""
    parts = urlsplit(url or "")
    path = "" if parts.scheme == "unix" else parts.path.strip("/")
    number = parse_qs(parts.query).get("db", [path])[0]
    return int(number) if number.isdecimal() else 0
