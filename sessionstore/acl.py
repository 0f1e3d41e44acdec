"""Least privilege: the ACL rule that lets a user do one role's work on one namespace, no more.

A script runs with its caller's rights, so a rule names every command that scripts call, beside
those that clients send. No categories: what a later server puts into one is nobody's intention.

    reader     reads all there is, writes nothing: no command that changes a key is in its rule
    worker     everything but what follows
    operator   also check, repair and import; SCAN shows the names of others' keys, not their values

Where servers differ, the rule is that of a version:

    6.2   one list of commands, keys and channels
    7.0   selectors: further lists, each for itself. Servers take it that EVAL writes its keys, so a
          reader may EVAL in one, and has its other commands for reading alone (%R~). In another
          it may publish to the channels on which a store speaks to itself (news.py), no others.
    7.2   CLIENT SETINFO, which redis-py sends and does without
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal, TypeAlias, get_args

from sessionstore.errors import InvalidArgumentError
from sessionstore.settings import StoreSettings

Role: TypeAlias = Literal["worker", "reader", "operator"]
ROLES: tuple[Role, ...] = get_args(Role)

_SCRIPTS = ("evalsha", "eval")
#: Beside scripts: what a store sends to open, and to follow.
_STORE = ("script|load", "info", "subscribe", "unsubscribe")
_ON_ONE_SERVER = ("multi", "exec")  # to read a session whole
_ON_CLUSTER = ("cluster|slots", "command", "asking")
_READING = (
    *("hget", "hgetall", "hmget", "llen", "lrange", "scard", "sismember", "smembers", "time"),
    *("type", "xrange", "xrevrange", "zcard", "zcount", "zinter", "zrangebyscore"),
    *("zrevrangebyscore", "zscore"),
)
_WRITING = (
    *("del", "exists", "get", "hdel", "hkeys", "hset", "lpop", "ltrim", "pexpire", "pttl"),
    *("publish", "rpush", "sadd", "set", "sinter", "srem", "unlink", "wait", "xadd", "xlen"),
    *("zadd", "zrange", "zrem"),
)
_MENDING = ("lindex", "persist", "rename", "scan", "sscan", "zscan")

_NAME = re.compile(r"[A-Za-z0-9_.-]{1,100}")
_SERVER = re.compile(r"(redis|valkey)-(\d{1,3})(?:\.(\d{1,3}))?(?:\.\d{1,3})?")
_OLDEST = (6, 2)
_HEX = "[0-9a-f]"


@dataclass(frozen=True, slots=True)
class Server:
    """What a server's version knows of ACLs; by default the newest."""

    has_selectors: bool = True
    has_setinfo: bool = True

    @classmethod
    def named(cls, name: str) -> Server:
        """The server called ``redis-7.0`` or ``valkey-9``.

        Raises:
            InvalidArgumentError: it is none of these, or too old.
        """
        found = _SERVER.fullmatch(name.lower())
        if found is None:
            raise InvalidArgumentError.of(
                "server", "must be a name and a version, such as redis-6.2, redis-7.0 or valkey-9"
            )
        version = int(found[2]), int(found[3] or 0)
        if version < _OLDEST:  # Valkey began as Redis 7.2.4
            raise InvalidArgumentError.of("server", "must be Redis 6.2 or newer, or Valkey")
        return cls(has_selectors=version >= (7, 0), has_setinfo=version >= (7, 2))


def rule(
    role: Role, settings: StoreSettings, server: Server | None = None, *, database: int = 0
) -> list[str]:
    """The least that a role needs: the words of ACL SETUSER for keys, channels and commands.

    Args:
        role: what the user is for.
        settings: the namespace, its partitions, and whether it is on a cluster.
        server: the server's version.
        database: the number of the database, if it is not 0.
    """
    server = server or Server()
    tags = [settings.namespace]
    if settings.partitions > 1:
        tags.append(f"{settings.namespace}/{_HEX}{_HEX}")
    # No character of a namespace has a meaning in a pattern, and neither have braces.
    names = [f"{{{tag}}}:*" for tag in tags]
    keys, commands = [f"~{name}" for name in names], [*_STORE, *_READING]
    if role != "reader":
        commands += _WRITING
    if role == "operator":
        commands += _MENDING
    commands += _ON_CLUSTER if settings.cluster else _ON_ONE_SERVER
    if server.has_setinfo:
        commands.append("client|setinfo")
    if database:
        commands.append("select")
    further: list[str] = []
    if role == "reader" and server.has_selectors:
        further = [
            f"({' '.join([*keys, *_allowed(_SCRIPTS)])})",
            f"(resetchannels &{{{settings.namespace}}}:news:* +publish)",
        ]
        keys = [f"%R{key}" for key in keys]
    else:
        commands += _SCRIPTS
    return [
        "resetchannels",
        *keys,
        *(f"&{name}" for name in names),
        *_allowed(sorted(commands)),
        *further,
    ]


def _allowed(commands: list[str] | tuple[str, ...]) -> list[str]:
    return [f"+{command}" for command in commands]


def setuser(user: str, rule: list[str], digest: str | None) -> str:
    """The command that gives a user this rule and no other, as a line for ``redis-cli``.

    Args:
        user: the user's name.
        rule: the words of ``rule``.
        digest: SHA-256 of the password in hexadecimal; None: the user stays off.
    """
    if not _NAME.fullmatch(user):
        raise InvalidArgumentError.of("user", "must be 1 to 100 of letters, digits and _ . -")
    access = ["off"] if digest is None else ["on", f"#{digest}"]
    return " ".join(["ACL SETUSER", user, "reset", *access, *rule])
