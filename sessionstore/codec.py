"""Redis's replies to models.

Bytes, strings and reply lists end here: a client may answer in bytes or (``decode_responses``)
in text, with a hash as a list or (RESP 3) as a dict, and nobody further up sees a difference.
"""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any

from pydantic import ValidationError

from sessionstore.errors import UnreadableSessionError, refusal
from sessionstore.forking import no_fork_within
from sessionstore.models import (
    ENDED_STATUSES,
    STATUSES,
    AgentSession,
    BufferPage,
    Reaped,
    SessionEvent,
    SessionMetrics,
)

logger = logging.getLogger("sessionstore")

METADATA_PREFIX = "meta:"
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


def text(value: Any) -> str:
    """A string from the server, whichever way the client hands it out."""
    return value if isinstance(value, str) else bytes(value).decode()


def _replaced(value: Any) -> str:
    return value if isinstance(value, str) else bytes(value).decode(errors="replace")


def texts(values: Iterable[Any]) -> tuple[str, ...]:
    """Entries of a buffer. Bytes that are not UTF-8, which only others write, are replaced."""
    return tuple(map(_replaced, values))


def _flat(reply: Mapping[Any, Any] | Sequence[Any]) -> Sequence[Any]:
    """Names and values in turn, whether they came as one list or as a dict."""
    if isinstance(reply, Mapping):
        return [part for pair in reply.items() for part in pair]
    return reply


def hash_fields(reply: Mapping[Any, Any] | Sequence[Any]) -> dict[str, str]:
    """The fields of a hash, given as a dict or as one flat list."""
    flat = _flat(reply)
    try:
        parts = b"\0".join(flat).decode().split("\0")  # half the cost of one by one
    except TypeError:  # text already
        parts = []
    if len(parts) != len(flat):  # or a value with a NUL in it
        parts = list(map(text, flat))
    return dict(zip(parts[::2], parts[1::2], strict=True))


def moment(time: Sequence[Any]) -> datetime:
    """The reply of TIME: seconds and microseconds."""
    return _EPOCH + timedelta(seconds=int(time[0]), microseconds=int(time[1]))


def moment_of_us(microseconds: int) -> datetime:
    """A point in time given in microseconds since 1970."""
    return _EPOCH + timedelta(microseconds=microseconds)


def done(reply: Any) -> str:
    """The result of a write, or the error it was refused with."""
    answer = text(reply)
    word, _, result = answer.partition(" ")
    if word != "ok":
        raise refusal(answer)
    return result


@no_fork_within
def session(
    fields: Mapping[Any, Any] | Sequence[Any],
    output: Iterable[Any],
    errors: Iterable[Any],
    read_at: datetime,
) -> AgentSession | None:
    """A stored session; None if there is none.

    Raises:
        UnreadableSessionError: the record breaks the format.
    """
    if not fields:
        return None
    try:
        stored: dict[str, Any] = dict(hash_fields(fields))
        stored["metadata"] = {
            name[len(METADATA_PREFIX) :]: value
            for name, value in stored.items()
            if name.startswith(METADATA_PREFIX)
        }
        stored["output_buffer"], stored["error_buffer"] = texts(output), texts(errors)
        stored["read_at"] = read_at
        return AgentSession.model_validate(stored)
    except (ValidationError, UnicodeDecodeError) as error:
        parts = list(map(_replaced, _flat(fields)))
        session_id = dict(zip(parts[::2], parts[1::2], strict=False)).get("id")
        raise _unreadable(session_id, error) from error


def _unreadable(session_id: str | None, error: ValidationError | UnicodeDecodeError) -> Exception:
    # Names of fields and rules, never the values: they may be anything.
    if isinstance(error, ValidationError):
        reason = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
    else:
        reason = "it holds bytes that are not UTF-8"
    unreadable = UnreadableSessionError(f"session {session_id!r} cannot be read: {reason}")
    unreadable.session_id = session_id
    return unreadable


def listed(
    fields: Mapping[Any, Any] | Sequence[Any],
    output: Iterable[Any],
    errors: Iterable[Any],
    read_at: datetime,
) -> AgentSession | None:
    """A session of a listing; one that cannot be read is left out and logged."""
    try:
        return session(fields, output, errors, read_at)
    except UnreadableSessionError as error:
        logger.warning("left out of a listing: %s", error)
        return None


@no_fork_within
def buffer_page(cursor: int, reply: Sequence[Any]) -> BufferPage | None:
    """A page of a buffer, read from position ``cursor``; None if there is no such session."""
    if not reply[0]:
        return None
    status, total, oldest, start, entries = reply
    end = int(start) + len(entries)
    return BufferPage(
        chunks=texts(entries),
        cursor=end,
        dropped=max(0, int(oldest) - cursor),
        lost=max(0, cursor - int(total)),
        ended=text(status) in ENDED_STATUSES and end == int(total),
    )


@no_fork_within
def event(
    cursor: str, ms: int, fields: Mapping[Any, Any] | Sequence[Any], *, gap: bool
) -> SessionEvent | None:
    """A lifecycle event; None, and logged, if somebody else has written it."""
    try:
        stored = hash_fields(fields)
        return SessionEvent(
            cursor=cursor,
            at=moment_of_us(ms * 1000),
            session_id=stored["session_id"],
            type=stored["type"],
            event=stored["event"],
            old_status=stored.get("old_status") or None,
            status=stored.get("status"),
            actor=stored.get("actor"),
            owner=stored.get("owner"),
            gap=gap,
        )
    except (KeyError, ValueError, OverflowError) as error:
        logger.warning("an event cannot be read (%s): left out", type(error).__name__)
        return None


@no_fork_within
def metrics(replies: Iterable[Sequence[Any]]) -> SessionMetrics:
    """The counts of ``get_metrics``, added up over the partitions."""
    total = 0
    by_status, by_type = dict.fromkeys(STATUSES, 0), Counter[str]()
    for sessions, counts, types in replies:
        total += int(sessions)
        for status, count in zip(STATUSES, counts, strict=True):
            by_status[status] += int(count)
        for name, count in zip(types[::2], types[1::2], strict=True):
            by_type[text(name)] += int(count)
    return SessionMetrics(
        total_sessions=total,
        active_sessions=by_status["active"],
        busy_sessions=by_status["busy"],
        error_sessions=by_status["error"],
        sessions_by_type=dict(by_type),
        sessions_by_status=by_status,
    )


@no_fork_within
def reaped(reply: Any) -> tuple[list[Reaped], list[str | int]]:
    """What a script of the reaper tells; and where the next one is to begin, empty at the end."""
    answer = json.loads(done(reply))
    reaped = [
        Reaped(
            session_id=told["session_id"],
            action=told["action"],
            reason=_REASONS[told["action"]](told),
            status=told["status"],
            owner=told.get("owner"),
        )
        for told in answer["told"]
    ]
    return reaped, answer["next"] or []


_REASONS: dict[str, Callable[[dict[str, Any]], str]] = {
    "marked": lambda told: f"the lease of {told['owner']} expired at {told['expired_at']}",
    "lost": lambda told: (
        f"the lease of {told['owner']} expired at {told['expired_at']} and was not renewed"
    ),
    "terminated": lambda told: f"idle for {told['idle_us'] / 1e6:.0f} s",
    "deleted": lambda told: f"{told['status']} for {told['ended_us'] / 1e6:.0f} s",
}
