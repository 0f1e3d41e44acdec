"""What can go wrong, as classes.

    SessionStoreError
    ├── SessionNotFoundError          SESSION_NOT_FOUND
    ├── SessionStatusError            SESSION_STATUS
    │   └── SessionNotActiveError     SESSION_NOT_ACTIVE
    ├── SessionBusyError              SESSION_BUSY
    ├── LeaseLostError                LEASE_LOST
    ├── WritesLostError               WRITES_LOST
    ├── SessionExistsError            SESSION_EXISTS
    ├── ServiceSessionInUseError      SERVICE_SESSION_IN_USE
    ├── MetadataLimitError            METADATA_LIMIT
    ├── InvalidArgumentError          INVALID_ARGUMENT          (a ValueError too)
    │   └── UnknownSessionTypeError   UNKNOWN_SESSION_TYPE
    ├── UnreadableSessionError        UNREADABLE_SESSION
    ├── ImportFormatError             IMPORT_FORMAT
    ├── ImportConflictError           IMPORT_CONFLICT
    ├── SchemaMismatchError           SCHEMA_MISMATCH
    ├── UnsafeServerError             UNSAFE_SERVER
    └── OutcomeUnknownError           OUTCOME_UNKNOWN           (a redis.RedisError too)
        └── DurabilityError           DURABILITY

Every class has a ``code``. A Lua script refuses with the same word, so that grep finds both ends
of a refusal. Redis's own failures stay redis-py exceptions: a store that cannot be reached
raises, it never looks empty.
"""

from __future__ import annotations

import copy
import json
import re
import socket
import ssl
from collections.abc import Iterator
from datetime import datetime
from typing import Any, ClassVar, cast

from redis.exceptions import (
    AuthenticationError,
    AuthorizationError,
    BusyLoadingError,
    ClusterDownError,
    ConnectionError,
    MaxConnectionsError,
    NoPermissionError,
    OutOfMemoryError,
    ReadOnlyError,
    RedisError,
    ResponseError,
    TimeoutError,
    TryAgainError,
)

_BY_CODE: dict[str, type[SessionStoreError]] = {}


class SessionStoreError(Exception):
    """Base of all errors of this library.

    Attributes that do not apply are ``None``: ``session_id``, ``status`` and ``owner`` of the
    session in question, ``expires_in`` in seconds.
    """

    code: ClassVar[str] = "SESSION_STORE_ERROR"
    session_id: str | None = None
    status: str | None = None
    owner: str | None = None
    expires_in: float | None = None

    def __init_subclass__(cls, *, code: str, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls.code = code
        _BY_CODE[code] = cls

    @classmethod
    def from_details(cls, details: dict[str, Any]) -> SessionStoreError:
        """The error that a script's refusal stands for."""
        error = cls(cls.message(details))
        for name, value in details.items():
            setattr(error, name, value)
        return error

    @classmethod
    def message(cls, details: dict[str, Any]) -> str:
        return f"{cls.code}: {details}"


class SessionNotFoundError(SessionStoreError, code="SESSION_NOT_FOUND"):
    """There is no session with this id."""

    @classmethod
    def message(cls, details: dict[str, Any]) -> str:
        return f"no session {details['session_id']!r}"


class SessionStatusError(SessionStoreError, code="SESSION_STATUS"):
    """The session's status is not one of those expected; nothing was changed."""

    @classmethod
    def message(cls, details: dict[str, Any]) -> str:
        return f"session {details['session_id']!r} is {details['status']}; nothing was changed"


class SessionNotActiveError(SessionStatusError, code="SESSION_NOT_ACTIVE"):
    """The session cannot be claimed: its status is not one of those expected."""


class SessionBusyError(SessionStoreError, code="SESSION_BUSY"):
    """Another worker holds the session: ``owner``, for ``expires_in`` seconds unless it renews."""

    @classmethod
    def from_details(cls, details: dict[str, Any]) -> SessionStoreError:
        ends, now = (datetime.fromisoformat(details[name]) for name in ("expires_at", "now"))
        kept = {name: details[name] for name in ("session_id", "status", "owner")}
        return super().from_details(kept | {"expires_in": (ends - now).total_seconds()})

    @classmethod
    def message(cls, details: dict[str, Any]) -> str:
        return (
            f"session {details['session_id']!r} is held by {details['owner']}, whose lease runs "
            f"for another {details['expires_in']:.1f} s unless renewed; nothing was changed"
        )


class LeaseLostError(SessionStoreError, code="LEASE_LOST"):
    """This worker's lease on the session has been ended by others; nothing was changed.

    ``owner`` is who holds the session now, if anybody does.
    """

    @classmethod
    def message(cls, details: dict[str, Any]) -> str:
        owner, status = details.get("owner"), details.get("status")
        now = f"held by {owner}" if owner else f"{status} and held by nobody" if status else "gone"
        return (
            f"the lease on session {details['session_id']!r} has been lost: the session is now "
            f"{now}; nothing was changed"
        )


class WritesLostError(SessionStoreError, code="WRITES_LOST"):
    """The server has lost entries that this worker had added under its lease; nothing was changed.

    A failover promoted a replica that did not have them yet. ``lost`` is how many; the session
    still is this worker's, and who sends the write again goes on without them. ``output_total`` and
    ``error_total`` are what the server has.
    """

    lost: int
    output_total: int
    error_total: int

    @classmethod
    def message(cls, details: dict[str, Any]) -> str:
        return cls.found(details["session_id"], details["lost"]) + "; nothing was changed"

    @classmethod
    def together(
        cls, before: WritesLostError | None, after: WritesLostError | None
    ) -> WritesLostError | None:
        """What two writes were told, one after the other."""
        if before is None or after is None:
            return before or after
        return cast(
            "WritesLostError", cls.from_details(vars(after) | {"lost": before.lost + after.lost})
        )

    @staticmethod
    def found(session_id: str, lost: int) -> str:
        """What has been found, whether by a write or by a renewal."""
        entries = f"{lost:,} {'entry' if lost == 1 else 'entries'}"
        return (
            f"in a failover the server has lost {entries} of session {session_id!r} that had been "
            "acknowledged"
        )


class SessionExistsError(SessionStoreError, code="SESSION_EXISTS"):
    """A new session's id is taken.

    In an import: a session that is here differs from the one to be imported. In ``create_session``:
    its creation was sent again after more than ten minutes.
    """

    @classmethod
    def message(cls, details: dict[str, Any]) -> str:
        return f"session {details['session_id']!r} exists already"


class ServiceSessionInUseError(SessionStoreError, code="SERVICE_SESSION_IN_USE"):
    """A session that has not ended drives this service session already (``unique=True``)."""

    @classmethod
    def message(cls, details: dict[str, Any]) -> str:
        owner = details.get("owner")
        return (
            f"session {details['session_id']!r} ({details['status']}"
            f"{f', owned by {owner}' if owner else ''}) already drives this service session"
        )


class MetadataLimitError(SessionStoreError, code="METADATA_LIMIT"):
    """The session would have too many metadata names; nothing was changed."""

    limit: int

    @classmethod
    def message(cls, details: dict[str, Any]) -> str:
        return f"session {details['session_id']!r} may have {details['limit']} metadata names"


class InvalidArgumentError(SessionStoreError, ValueError, code="INVALID_ARGUMENT"):
    """An argument breaks a rule. Nothing was sent."""

    argument: str | None = None

    @classmethod
    def of(cls, argument: str, rule: str) -> InvalidArgumentError:
        """The error for one argument, its message naming argument and rule."""
        error = cls(f"{argument} {rule}")
        error.argument = argument
        return error


class UnknownSessionTypeError(InvalidArgumentError, code="UNKNOWN_SESSION_TYPE"):
    """The store was told to accept only some types, and this is none of them."""


class UnreadableSessionError(SessionStoreError, code="UNREADABLE_SESSION"):
    """A stored session breaks the format; somebody else has written to it."""


class ImportFormatError(SessionStoreError, code="IMPORT_FORMAT"):
    """What is to be imported is no export, is one of a newer version, or is cut off or damaged.

    ``line`` counts from 1. Sessions that were complete before it are imported.
    """

    line: int | None = None

    @classmethod
    def at(cls, line: int, reason: str) -> ImportFormatError:
        """The error for one line."""
        error = cls(f"line {line}: {reason}")
        error.line = line
        return error


class ImportConflictError(SessionStoreError, code="IMPORT_CONFLICT"):
    """Another import of the session went on at the same time, or this one stood still for an hour.

    Nothing of the session was changed; running the import again goes on.
    """

    @classmethod
    def message(cls, details: dict[str, Any]) -> str:
        return (
            f"what was staged of session {details['session_id']!r} is gone: another import of it "
            "is under way, or this one stood still for an hour; run the import again to go on"
        )


class SchemaMismatchError(SessionStoreError, code="SCHEMA_MISMATCH"):
    """The namespace has another schema than this version knows, or another number of partitions.

    The message says which, which version wrote it if that is known, and what to do. Nothing was
    written.
    """


class UnsafeServerError(SessionStoreError, code="UNSAFE_SERVER"):
    """The server may evict any key when its memory is full, and so tear sessions apart."""


class OutcomeUnknownError(SessionStoreError, RedisError, code="OUTCOME_UNKNOWN"):
    """A write was sent, no answer came within the deadline: it may or may not have happened.

    Sending it again through another call could apply it twice. ``store.repeat(error)`` sends
    exactly this write again, safely: it is carried out unless it already was.
    """

    #: What ``store.repeat`` needs: the call, its lane, and until when a repeat is safe.
    pending: Any = None


class DurabilityError(OutcomeUnknownError, code="DURABILITY"):
    """A write was carried out, and too few replicas have acknowledged it (``wait_replicas``).

    It lasts unless the primary is lost before a replica has it. ``store.repeat(error)`` waits for
    the replicas again, and gives the write's result. ``acknowledged`` is how many have it, None if
    the server did not tell; ``wanted`` is how many were to.
    """

    acknowledged: int | None
    wanted: int
    answer: Any = None  # the script's; for who gives back what a cancelled claim has got

    @classmethod
    def of(cls, wanted: int, acknowledged: int | None, why: str) -> DurabilityError:
        """The error for a reply to WAIT; ``why``: how long it waited, or what it failed with."""
        if acknowledged is None:
            message = f"the server does not tell whether replicas have it ({why})"
        else:
            message = f"{acknowledged} of {wanted} replicas had acknowledged it after {why}"
        error = cls(f"carried out, but {message}; store.repeat(error) waits again")
        error.acknowledged, error.wanted = acknowledged, wanted
        return error


def refusal(answer: str) -> SessionStoreError:
    """The error for a script's answer ``CODE {details as JSON}``."""
    code, _, details = answer.partition(" ")
    return _BY_CODE.get(code, SessionStoreError).from_details(json.loads(details or "{}"))


class NoReplicasError(ResponseError):
    """The server has fewer replicas than it needs to take a write (``min-replicas-to-write``)."""


# redis-py has no class for NOREPLICAS, and Redis 6.2 wraps a failure inside a script: "Error
# running script (…): -OOM command not allowed …"
_TOLD = re.compile(
    r"(?:Error running script .*-(OOM|READONLY|NOREPLICAS)|(NOREPLICAS)) (.*)", re.DOTALL
)
_CLASSES = {"OOM": OutOfMemoryError, "READONLY": ReadOnlyError, "NOREPLICAS": NoReplicasError}
# What a script may not do has no code of its own: so say Redis 6.2 and 7.0, and all later ones.
_DENIED = re.compile(r"(The user executing the script can't |ACL failure in script: ).*", re.DOTALL)


def of_any_server(error: Exception) -> Exception:
    """The error as if every server version told it with its code, of a class of its own."""
    if type(error) is not ResponseError:
        return error
    told, denied = _TOLD.match(str(error)), _DENIED.search(str(error))
    if told is not None:
        return _CLASSES[told[1] or told[2]](told[3])
    return error if denied is None else NoPermissionError(denied[0])


def own_copy(error: Exception) -> Exception:
    """An error for one of several callers who share a failure: each adds to its own."""
    own = copy.copy(error)
    own.__cause__ = error
    return own


# Which failures of a connection or a server pass by themselves.
TRANSIENT: tuple[type[Exception], ...] = (
    ConnectionError,
    TimeoutError,
    ReadOnlyError,  # a primary that has just been made a replica
    NoReplicasError,  # or is about to be
    TryAgainError,
    ClusterDownError,
)
# An outage of any kind, and a server whose memory is full: who can wait tries again.
PASSING: tuple[type[Exception], ...] = (OutcomeUnknownError, OutOfMemoryError, *TRANSIENT)
_NEVER_TRANSIENT = (AuthenticationError, AuthorizationError)
_NEVER_SENT = (ConnectionRefusedError, FileNotFoundError, socket.gaierror)
# redis-py's words; what refused the connection is not always among the error's causes.
_NOT_CONNECTED = re.compile(
    r"(Error (\S+ )?|Timeout )connecting to |No connection available|No master found"
)
_NEVER_RUN = (
    *(BusyLoadingError, ReadOnlyError, NoReplicasError),
    *(TryAgainError, ClusterDownError, MaxConnectionsError),
)


# What OpenSSL calls it when this side refuses the server's certificate, or the server this side's,
# of which TLS 1.3 tells at the first read only; and when the other side speaks no TLS.
_REFUSED_BY_TLS = re.compile(
    "CERTIFICATE_VERIFY_FAILED|ALERT_(.*CERTIFICATE|UNKNOWN_CA|ACCESS_DENIED|HANDSHAKE_FAILURE"
    "|PROTOCOL_VERSION)|WRONG_VERSION_NUMBER|UNSUPPORTED_PROTOCOL"
)


def is_transient(error: BaseException) -> bool:
    """Whether the same command may well succeed a moment later."""
    return isinstance(error, TRANSIENT) and not _is_refused_for_good(error)


def surely_not_run(error: BaseException) -> bool:
    """Whether the server certainly did not carry out the command that failed like this."""
    return (
        isinstance(error, _NEVER_RUN)
        or _is_refused_for_good(error)
        or _NOT_CONNECTED.match(str(error)) is not None
        or any(isinstance(cause, _NEVER_SENT) for cause in _causes(error))
    )


def _is_refused_for_good(error: BaseException) -> bool:
    """Whether a password or a certificate is refused: the next attempt would be too."""
    return isinstance(error, _NEVER_TRANSIENT) or any(
        isinstance(cause, ssl.SSLError) and _REFUSED_BY_TLS.search(str(cause)) is not None
        for cause in _causes(error)
    )


def _causes(error: BaseException) -> Iterator[BaseException]:
    """An error, what it came from, and so on."""
    cause: BaseException | None = error
    while cause is not None:
        yield cause
        cause = cause.__cause__ or cause.__context__
