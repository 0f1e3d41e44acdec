"""How a session and its buffers are read: without buffers, whole, or in pieces."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

from sessionstore import codec
from sessionstore._call import Call, Request, Snapshot, then
from sessionstore.keys import Keys
from sessionstore.models import AgentSession, BufferPage

Buffer = Literal["output", "error"]

MOST_ENTRIES = 1000  # of a page

#: ``codec.session``, which raises on an unreadable record, or ``codec.listed``, which does not.
Decoder = Callable[..., AgentSession | None]
Found = AgentSession | None


def without_buffers(
    keys: Keys, session_id: str, session: Decoder = codec.session
) -> Call[AgentSession | None]:
    """A session with empty buffers."""
    return Call(
        "get_session",
        keys=(keys.session(session_id),),
        args=(),
        decode=lambda reply: session(reply[1], (), (), codec.moment(reply[0])),
    )


def whole(keys: Keys, session_id: str, tail: int | None) -> Snapshot[AgentSession | None]:
    """A session with its buffers, all of one moment."""

    def decode(reply: Any) -> AgentSession | None:
        time, fields, output, errors = reply
        return codec.session(fields, output, errors, codec.moment(time))

    first = 0 if tail is None else -tail
    session, output, errors = (
        keys.session(session_id),
        keys.output(session_id),
        keys.errors(session_id),
    )
    return Snapshot(
        (
            ("TIME",),
            ("HGETALL", session),
            ("LRANGE", output, first, -1),
            ("LRANGE", errors, first, -1),
        ),
        Call("read_whole", (session, output, errors), (first,), decode),
        decode,
    )


def buffer_page(
    keys: Keys, session_id: str, buffer: Buffer, cursor: int, limit: int = MOST_ENTRIES
) -> Call[BufferPage | None]:
    """A page of a buffer, at most ``limit`` entries or 1 MiB; None if there is no such session."""
    key = keys.output if buffer == "output" else keys.errors
    return Call(
        "read_buffer",
        keys=(keys.session(session_id), key(session_id)),
        args=(cursor, limit, f"{buffer}_total", f"{buffer}_bytes"),
        decode=lambda reply: codec.buffer_page(cursor, reply),
    )


def in_pieces(keys: Keys, session_id: str, tail: int | None) -> Request[AgentSession | None]:
    """A session with its buffers, read a page at a time for a listing: no reply is large.

    The buffers are as they were when the fields were read, less the oldest entries if they were
    trimmed meanwhile: positions do not shift.
    """

    def load(session: AgentSession | None) -> Found | Request[Found]:
        return session and _load(keys, session, tail, ("output", "error"))

    return then(without_buffers(keys, session_id, codec.listed), load)


def _load(
    keys: Keys, session: AgentSession, tail: int | None, buffers: tuple[Buffer, ...]
) -> Found | Request[Found]:
    """The session with these buffers loaded, one after the other."""
    if not buffers:
        return session
    buffer, *others = buffers
    total = session.output_total if buffer == "output" else session.error_total
    first = 0 if tail is None else max(0, total - tail)

    def load_from(cursor: int, entries: tuple[str, ...]) -> Found | Request[Found]:
        if cursor >= total:
            filled = session.model_copy(update={f"{buffer}_buffer": entries})
            return _load(keys, filled, tail, tuple(others))

        def more(page: BufferPage | None) -> Found | Request[Found]:
            if page is None:  # deleted meanwhile
                return None
            start = page.cursor - len(page.chunks)
            before = entries if start == cursor else ()  # trimmed up to here: no gap is left
            known = page.chunks[: max(0, total - start)]
            return load_from(page.cursor if page.chunks else total, before + known)

        return then(buffer_page(keys, session.id, buffer, cursor), more)

    return load_from(first, ())
