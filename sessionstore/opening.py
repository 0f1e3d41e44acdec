"""What a store looks at before its first call: the namespace's layout and the server.

Both come in one round trip, and are looked at again when a connection has failed: another server
may answer from then on. Another schema is not touched, and a server that may evict any key is
refused: measured under ``allkeys-lru``, 260 sessions lost an index and 2,205 index entries their
session.

The schema says what may be in the keys, and what workers of any version may rely on. It changes
with none of what older workers pass over: another hash field, key, event, or field of ``meta``
(README, "Rolling deploy"). A namespace keeps the schema that it was laid out with.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, cast

from redis.exceptions import NoPermissionError, ResponseError

from sessionstore import codec
from sessionstore._call import Call
from sessionstore._version import __version__
from sessionstore.errors import InvalidArgumentError, SchemaMismatchError, UnsafeServerError
from sessionstore.keys import Keyspace
from sessionstore.settings import StoreSettings

#: Of exports too: whoever raises it sees to it that those of every lower one can be imported.
SCHEMA_VERSION = "1"

#: The command beside the script: what the server says of its memory.
INFO = ("INFO", "memory")
#: And for ``wait_replicas``: it waits for none, but says whether it may be asked to.
WAIT = ("WAIT", 0, 1)


def _layout(settings: StoreSettings) -> dict[str, str]:
    return {
        "schema": SCHEMA_VERSION,
        "partitions": str(settings.partitions),
        "written_by": __version__,  # for who is refused: which version to upgrade to
    }


def open_store(keyspace: Keyspace, settings: StoreSettings) -> Call[None]:
    """Read what layout the namespace has; give a new one this store's."""
    return Call(
        "open_store",
        keys=(keyspace.meta,),
        args=[part for pair in _layout(settings).items() for part in pair],
        decode=lambda _: None,  # check_layout looks at it
    )


def check_layout(reply: Any, settings: StoreSettings) -> None:
    """Refuse a namespace of another layout.

    Raises:
        SchemaMismatchError: says what was found, and what this version works with.
    """
    refused = other_layout(codec.hash_fields(reply), settings)
    if refused:
        raise SchemaMismatchError(refused)


def other_layout(found: Mapping[str, str], settings: StoreSettings) -> str:
    """What is different in a namespace's layout, and what to do; empty if nothing is.

    Fields of ``meta`` that this version does not know make no difference.
    """
    name, schema, partitions = settings.namespace, found.get("schema"), found.get("partitions")
    if schema != SCHEMA_VERSION:
        return (
            f"namespace {name!r} has schema {schema!r:.20}{by(found.get('written_by'))}, this is "
            f"sessionstore {__version__}, which knows schema {SCHEMA_VERSION!r}: "
            f"{_remedy(schema)}; nothing was written"
        )
    if partitions != str(settings.partitions):
        return (
            f"namespace {name!r} has partitions {partitions!r:.20}, this store has "
            f"'{settings.partitions}': set the same number of partitions, or use another "
            "namespace; nothing was written"
        )
    return ""


def by(written_by: object) -> str:
    """Which version wrote something, in a sentence; empty if that is not known."""
    is_version = isinstance(written_by, str) and re.fullmatch("[0-9A-Za-z.+!]{1,40}", written_by)
    return f", written by sessionstore {written_by}" if is_version else ""


def _remedy(schema: str | None) -> str:
    if schema is None or not re.fullmatch("[1-9][0-9]{0,8}", schema):
        return "it is somebody else's, or damaged; use another namespace"
    if int(schema) > int(SCHEMA_VERSION):
        return "upgrade this worker to the version that wrote it, or a newer one"
    return (
        "use the version that wrote it, or move its sessions: export them with that version, "
        "import them with this one into another namespace"
    )


def check_server(info: Any, settings: StoreSettings) -> str:
    """Refuse a server that evicts; what to warn of, one that does not tell, or nothing.

    Raises:
        UnsafeServerError: the server may evict any key when its memory is full.
    """
    if not isinstance(info, Mapping):
        return "INFO is not available here: cannot tell whether the server evicts keys"
    policy, evicts = _policy(info), danger(info)
    if evicts == _ANY_KEY and not settings.allow_eviction:
        raise UnsafeServerError(
            f"the server evicts any key when its memory is full (maxmemory-policy {policy}), "
            "which would tear sessions apart: set it to noeviction, or pass allow_eviction=True"
        )
    if evicts == _LANES:
        return (
            f"maxmemory-policy {policy} may evict what protects writes from being applied twice: "
            "noeviction is safer"
        )
    return ""


def check_wait(reply: Any) -> None:
    """Refuse to write where nobody would tell whether replicas have it.

    Raises:
        NoPermissionError: the server's own, this user may not use WAIT.
        InvalidArgumentError: the server does not know WAIT.
    """
    if isinstance(reply, NoPermissionError):
        raise reply
    if isinstance(reply, ResponseError) and str(reply).lower().startswith("unknown command"):
        raise InvalidArgumentError.of(
            "wait_replicas", f"must be 0: this server does not know WAIT ({reply})"
        )


_LANES, _ANY_KEY = 1, 2


def danger(info: Any) -> int:
    """What a server evicts when its memory is full, as INFO says: the higher, the worse."""
    if not isinstance(info, Mapping) or not int(cast("Any", info).get("maxmemory", 0)):
        return 0
    return {"volatile": _LANES, "allkeys": _ANY_KEY}.get(_policy(info).partition("-")[0], 0)


def _policy(info: Any) -> str:
    return str(info.get("maxmemory_policy", ""))
