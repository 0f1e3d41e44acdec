"""What is followed: a buffer as it grows, and the stream of lifecycle events.

Both are feeds that wait (``_call.Live``). How long, and what wakes them, is the stores' part
(``news.py``); here is what a page of them is, where to go on from, and when they are over.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from typing import Any, TypeAlias

from sessionstore import codec, reading
from sessionstore._call import Call, Live, Page, Request, Several, then
from sessionstore.errors import InvalidArgumentError, SessionNotFoundError
from sessionstore.keys import Keys
from sessionstore.models import BufferPage, SessionEvent

logger = logging.getLogger("sessionstore")

# ---- A buffer ------------------------------------------------------------------------------------

#: Where a follower of a buffer is: the position, and whether it has seen the session.
_Place: TypeAlias = tuple[int, bool]
_BufferPages: TypeAlias = Page[BufferPage, _Place]


def buffer(
    keys: Keys, session_id: str, which: reading.Buffer, cursor: int
) -> Live[BufferPage, _Place]:
    """A buffer from a position on: what is stored, then what comes.

    The last page is the only one with ``ended``. If the session is deleted, the event of that tells
    how many entries the follower has missed.
    """

    def page(place: _Place) -> Request[_BufferPages]:
        position, has_seen = place

        def read(found: BufferPage | None) -> _BufferPages | Request[_BufferPages]:
            if found is None:
                return _deleted(keys, session_id, which, position, has_seen=has_seen)
            if found.ended:
                return Page((found,), None)
            something = found.chunks or found.dropped or found.lost
            return Page((found,) if something else (), (found.cursor, True))

        return then(reading.buffer_page(keys, session_id, which, position), read)

    channel = keys.output if which == "output" else keys.errors
    return Live((cursor, False), page, (channel(session_id),), lambda place: place[0])


def _deleted(
    keys: Keys, session_id: str, which: reading.Buffer, position: int, *, has_seen: bool
) -> Request[_BufferPages]:
    """The last page of a session that is not there: it was deleted, if it ever was."""

    def walk(from_event: str) -> Call[_BufferPages]:
        def decode(reply: Any) -> _BufferPages | Request[_BufferPages]:
            total, following = (*reply, None)[:2]
            if total is not None:
                return last_page(int(total))
            if following is not None:
                return walk(codec.text(following))
            if not has_seen:
                raise SessionNotFoundError.from_details({"session_id": session_id})
            logger.warning("%s was deleted; how much was not read is unknown", session_id)
            return last_page(position)

        return Call(
            "find_deleted", (keys.events,), (session_id, f"{which}_total", from_event), decode
        )

    def last_page(total: int) -> _BufferPages:
        missed = max(0, total - position)
        end = position + missed
        return Page(
            (BufferPage(chunks=(), cursor=end, dropped=missed, ended=True, deleted=True),), None
        )

    return walk("+")


# ---- Events --------------------------------------------------------------------------------------

#: From the oldest event that is kept.
OLDEST = "0"
_PAGE = 1000  # events
_START = "0-0"
_STREAM_ID = re.compile(r"(\d{1,20})-(\d{1,20})")

#: The id of the last event seen, in each partition's stream.
_Positions: TypeAlias = tuple[str, ...]
#: An event's milliseconds and its number in them; its partition, its fields.
_Entry: TypeAlias = tuple[tuple[int, int], int, Any]


def events(partitions: Sequence[Keys], cursor: str | None) -> Live[SessionEvent, _Positions | None]:
    """Lifecycle events after a cursor; None: from now on.

    In order per session; those of several partitions, whose servers' clocks may differ, by time
    within a page.
    """
    most = max(_PAGE // len(partitions), 10)

    def page(positions: _Positions | None) -> Request[Page[SessionEvent, _Positions | None]]:
        asked = positions or ("",) * len(partitions)
        calls = [
            Call("read_events", (keys.events,), (position, most), lambda reply: reply)
            for keys, position in zip(partitions, asked, strict=True)
        ]

        def decode(replies: list[Any]) -> Page[SessionEvent, _Positions | None]:
            if positions is None:
                return Page((), tuple(map(codec.text, replies)))
            return _merged(positions, replies, most)

        if len(calls) == 1:
            (call,) = calls
            return Call(call.script, call.keys, call.args, lambda reply: decode([reply]))
        return Several(calls, decode)

    first = None if cursor is None else _positions_of(cursor, len(partitions))
    return Live(first, page, [keys.events for keys in partitions])


def _merged(
    positions: _Positions, replies: Sequence[Any], most: int
) -> Page[SessionEvent, _Positions | None]:
    """The partitions' pages in one order, as far as no partition can have more before it."""
    entries: list[_Entry] = []
    gaps: set[int] = set()
    horizon: tuple[int, int] | None = None
    for partition, (gap, following) in enumerate(replies):
        if gap:
            gaps.add(partition)
        for stream_id, fields in following:
            ms, number = map(int, codec.text(stream_id).split("-"))
            entries.append(((ms, number), partition, fields))
        if len(following) == most and (horizon is None or entries[-1][0] < horizon):
            horizon = entries[-1][0]
    entries.sort(key=lambda entry: entry[:2])
    reached = list(positions)
    items: list[SessionEvent] = []
    for (ms, number), partition, fields in entries:
        if horizon is not None and (ms, number) > horizon:
            break
        reached[partition] = f"{ms}-{number}"
        event = codec.event(_cursor_of(reached), ms, fields, gap=partition in gaps)
        if event is not None:
            gaps.discard(partition)
            items.append(event)
    return Page(items, tuple(reached))


def _cursor_of(positions: Sequence[str]) -> str:
    """One position a partition; of one at the start, nothing."""
    return ",".join("" if position == _START else position for position in positions) or OLDEST


def _positions_of(cursor: str, partitions: int) -> _Positions:
    if not isinstance(cursor, str):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise InvalidArgumentError.of("cursor", f"must be a str, not {type(cursor).__name__}")
    if cursor == OLDEST:
        return (_START,) * partitions
    positions = tuple(position or _START for position in cursor.split(",")) if cursor else ("",)
    if len(positions) != partitions:
        raise InvalidArgumentError.of(
            "cursor", f"is of a store with {len(positions)} partitions, this one has {partitions}"
        )
    for position in positions:
        found = _STREAM_ID.fullmatch(position)
        if found is None or max(map(int, found.groups())) >= 2**64:
            raise InvalidArgumentError.of("cursor", f"is not an event's: {cursor!r:.80}")
    return positions
