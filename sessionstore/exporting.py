"""Exports: the sessions of a namespace as lines of JSON, exactly as they are stored.

    {"sessionstore": "export", "format": 1, "schema": "1", "written_by": "0.1.0", …}
    {"session": "agent_claude_…", "fields": {…}, "created_us": …, "activity_us": …, "ended_us": …}
    {"output": ["…", "…"], "at": 0}
    {"output": ["…"], "at": 1000}
    {"errors": ["…"], "at": 0}
    {"end": "agent_claude_…", "output": 1001, "errors": 1}
    …
    {"total": {"sessions": 1, "output": 1001, "errors": 1, "unreadable": 0}}

``at`` is the position of a line's first entry. A session is given as it was when its fields were
read, less the oldest entries if they were trimmed meanwhile: a line of a later position than was
due says that what came before it is gone. Other lines in a session's place: ``gone`` (it was
deleted while its buffers were read) and ``unreadable`` with a ``reason``.

Text is a string, bytes that are no UTF-8 are ``{"base64": "…"}``. All lines are ASCII: whatever
agents have written, no terminal is harmed. The partitions follow each other, each in the order of
creation. Nothing is kept in the server, and no page is larger than 1 MiB or one entry.

A later version may add names to a line, and counts to the last one: who does not know them passes
over them. Another kind of line raises the format.
"""

from __future__ import annotations

import base64
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from sessionstore import codec
from sessionstore._call import Call, Feed, Page, Request, then
from sessionstore._version import __version__
from sessionstore.keys import Keys
from sessionstore.listing import PAGE_BYTES, Filters
from sessionstore.opening import SCHEMA_VERSION
from sessionstore.reading import MOST_ENTRIES, Buffer

logger = logging.getLogger("sessionstore")

FORMAT = 1
PAGE_ROWS = 100  # about 3 ms of the server's time
#: The buffers by their names in a file, and what their hash fields begin with.
BUFFERS: dict[str, Buffer] = {"output": "output", "errors": "error"}

#: What the last line counts.
COUNTS = ("sessions", "output", "errors", "unreadable")

_MISSING = "it is listed, and there is no such session"
_SPOILT = "one of its keys is of another type"
_NO_TEXT = "its id is no text"
_TOTALS = "it counts fewer entries than its buffers have"
_LOST = "the server has lost entries of it meanwhile"


def line_of(value: Mapping[str, Any]) -> str:
    """A line of an export."""
    return json.dumps(value, separators=(",", ":")) + "\n"


def raw(value: Any) -> bytes:
    """Bytes as they are stored, whichever way the client hands them out."""
    return value.encode() if isinstance(value, str) else bytes(value)


def to_json(value: bytes) -> str | dict[str, str]:
    """Stored bytes as a file has them."""
    try:
        return value.decode()
    except UnicodeDecodeError:
        return {"base64": base64.b64encode(value).decode()}


# ---- One session ------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Row:
    """A session as it is stored. ``entries`` is None if its buffers are to be read in pages."""

    id: bytes
    created_us: int | None
    activity_us: int | None
    ended_us: int | None
    unreadable: str = ""
    fields: tuple[tuple[bytes, bytes], ...] = ()
    lengths: tuple[int, int] = (0, 0)
    entries: tuple[Sequence[bytes], Sequence[bytes]] | None = None

    @classmethod
    def read(cls, reply: Sequence[Any]) -> Row:
        """One of ``export_sessions.lua``."""
        created, active, ended = (None if one is None else int(float(one)) for one in reply[1:4])
        head = cls(raw(reply[0]), created, active, ended)
        state = codec.text(reply[4])
        if state != "ok":
            return replace(head, unreadable=_MISSING if state == "missing" else _SPOILT)
        flat = [raw(part) for part in reply[5]]
        entries = None if reply[7] is None else (_raws(reply[7]), _raws(reply[9]))
        return replace(
            head,
            fields=tuple(zip(flat[::2], flat[1::2], strict=True)),
            lengths=(int(reply[6]), int(reply[8])),
            entries=entries,
        )

    def first_positions(self) -> tuple[int, int] | None:
        """Where its buffers begin; None if its totals are no totals of these buffers."""
        stored = dict(self.fields)
        first: list[int] = []
        for buffer, length in zip(BUFFERS.values(), self.lengths, strict=True):
            total = stored.get(f"{buffer}_total".encode(), b"0")
            if not total.isdigit() or int(total) < length:
                return None
            first.append(int(total) - length)
        return first[0], first[1]

    def head(self) -> str:
        """The line that a session begins with."""
        names: dict[str, Any] = {}
        others: list[Any] = []
        for name, value in self.fields:
            shown = to_json(name)
            if isinstance(shown, str):
                names[shown] = to_json(value)
            else:
                others.append([shown, to_json(value)])
        return line_of(
            {
                "session": to_json(self.id),
                "fields": names,
                **({"more_fields": others} if others else {}),
                "created_us": self.created_us,
                "activity_us": self.activity_us,
                "ended_us": self.ended_us,
            }
        )


def _raws(entries: Sequence[Any]) -> list[bytes]:
    return [raw(entry) for entry in entries]


def one_row(keys: Keys, session_id: str) -> Call[Row | None]:
    """A session by its id, as a row; None if there is none."""

    def decode(reply: Any) -> Row | None:
        row = Row.read(reply[-1][0])
        return None if row.unreadable == _MISSING else row

    return _walk(keys, Filters(), ("", session_id), decode)


def _walk(keys: Keys, filters: Filters, place: tuple[Any, Any], decode: Any) -> Call[Any]:
    sets = filters.index_sets(keys)
    idle_for = filters.idle_for
    return Call(
        "export_sessions",
        keys=(keys.sessions, keys.activity, keys.ended, *(key for s in sets for key in s)),
        args=(
            keys.prefix,
            *place,
            PAGE_ROWS,
            PAGE_BYTES,
            "" if idle_for is None else round(idle_for * 1_000_000),
            *map(len, sets),
        ),
        decode=decode,
    )


@dataclass(frozen=True, slots=True)
class Piece:
    """A page of a buffer: where it begins, its entries, where the next one begins."""

    at: int
    entries: Sequence[bytes]
    following: int
    lost: bool = False  # the buffer is shorter now than it was


def piece(keys: Keys, session_id: str, name: str, at: int, until: int) -> Call[Piece | None]:
    """Entries of a large buffer from a position, none beyond ``until``; None if it is gone."""
    buffer = BUFFERS[name]
    key = keys.output if name == "output" else keys.errors

    def decode(reply: Any) -> Piece | None:
        if not reply[0]:
            return None
        _, _, _, start, entries = reply
        start = int(start)
        kept = _raws(entries[: max(0, until - start)])
        if not kept:
            return Piece(until, (), until, lost=start <= at)
        return Piece(start, kept, start + len(kept))

    return Call(
        "read_buffer",
        keys=(keys.session(session_id), key(session_id)),
        args=(at, MOST_ENTRIES, f"{buffer}_total", f"{buffer}_bytes"),
        decode=decode,
    )


# ---- All of them ------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Reading:
    """How far the buffers of a large session have been read."""

    keys: Keys
    id: str
    places: tuple[int, int]  # of the next entry of each buffer
    ends: tuple[int, int]
    kept: tuple[int, int] = (0, 0)

    def unfinished(self) -> int | None:
        """The number of the buffer to go on with."""
        for number in (0, 1):
            if self.places[number] < self.ends[number]:
                return number
        return None

    def after(self, number: int, read: Piece) -> Reading:
        """The same after another page."""
        places, kept = list(self.places), list(self.kept)
        is_next = read.at == places[number]
        kept[number] = (kept[number] if is_next else 0) + len(read.entries)
        places[number] = read.following
        return replace(self, places=(places[0], places[1]), kept=(kept[0], kept[1]))


@dataclass(frozen=True, slots=True)
class Place:
    """Where an export goes on, and what it has given so far."""

    partition: int = 0
    seen: tuple[str, Any] = ("", "")
    reading: Reading | None = None
    is_begun: bool = False
    sessions: int = 0
    output: int = 0
    errors: int = 0
    unreadable: int = 0

    def given(self, output: int, errors: int) -> Place:
        """The same after a session with so many entries."""
        return replace(
            self,
            reading=None,
            sessions=self.sessions + 1,
            output=self.output + output,
            errors=self.errors + errors,
        )


@dataclass(frozen=True, slots=True)
class Export:
    """One export: of which namespace and partitions, and what matches."""

    namespace: str
    number_of_partitions: int
    partitions: Sequence[Keys]
    filters: Filters

    def feed(self) -> Feed[str, Place]:
        """Its lines, in pages."""
        return Feed(Place(), self._page)

    def _page(self, place: Place) -> Request[Page[str, Place]]:
        if place.reading is not None:
            return self._read_on(place, place.reading)
        keys = self.partitions[place.partition]

        def decode(reply: Any) -> Page[str, Place]:
            time, score, seen_id, rows = reply
            lines: list[str] = []
            reached = place
            if not place.is_begun:
                lines.append(self._first_line(time))
                reached = replace(reached, is_begun=True)
            if score:
                reached = replace(reached, seen=(codec.text(score), seen_id))
            else:
                reached = replace(reached, partition=place.partition + 1, seen=("", ""))
            for row in rows:
                reached = _give(keys, Row.read(row), reached, lines)
            return self._so_far(lines, reached)

        return _walk(keys, self.filters, place.seen, decode)

    def _read_on(self, place: Place, reading: Reading) -> Request[Page[str, Place]]:
        number = reading.unfinished()
        assert number is not None
        name = tuple(BUFFERS)[number]

        def following(read: Piece | None) -> Page[str, Place]:
            lines: list[str] = []
            if read is None:
                lines.append(line_of({"gone": reading.id}))
                return self._so_far(lines, replace(place, reading=None))
            if read.lost:
                reached = _leave_out(reading.id, _LOST, place, lines)
                return self._so_far(lines, replace(reached, reading=None))
            lines.append(_entries(name, read.at, read.entries))
            after = reading.after(number, read)
            if after.unfinished() is not None:
                return self._so_far(lines, replace(place, reading=after))
            lines.append(_end(after.id, after.kept))
            return self._so_far(lines, place.given(*after.kept))

        return then(
            piece(reading.keys, reading.id, name, reading.places[number], reading.ends[number]),
            following,
        )

    def _so_far(self, lines: list[str], place: Place) -> Page[str, Place]:
        """A page; it is the last one if nothing is left to be read."""
        if place.reading is not None or place.partition < len(self.partitions):
            return Page(lines, place)
        counts = {name: getattr(place, name) for name in COUNTS}
        return Page([*lines, line_of({"total": counts})], None)

    def _first_line(self, time: Sequence[Any]) -> str:
        return line_of(
            {
                "sessionstore": "export",
                "format": FORMAT,
                "schema": SCHEMA_VERSION,
                "written_by": __version__,
                "namespace": self.namespace,
                "partitions": self.number_of_partitions,
                "exported_at": codec.moment(time).isoformat().replace("+00:00", "Z"),
            }
        )


def _give(keys: Keys, row: Row, place: Place, lines: list[str]) -> Place:
    """Add a session's lines, all of them or, if its buffers are large, the first."""
    shown_id = to_json(row.id)
    if row.unreadable or not isinstance(shown_id, str):
        return _leave_out(shown_id, row.unreadable or _NO_TEXT, place, lines)
    first = row.first_positions()
    if first is None:
        return _leave_out(shown_id, _TOTALS, place, lines)
    lines.append(row.head())
    if row.entries is None:
        ends = (first[0] + row.lengths[0], first[1] + row.lengths[1])
        return replace(place, reading=Reading(keys, shown_id, first, ends))
    for name, at, entries in zip(BUFFERS, first, row.entries, strict=True):
        if entries:
            lines.append(_entries(name, at, entries))
    lines.append(_end(shown_id, row.lengths))
    return place.given(*row.lengths)


def _leave_out(session_id: Any, reason: str, place: Place, lines: list[str]) -> Place:
    logger.warning("session %r is not in the export: %s", session_id, reason)
    lines.append(line_of({"unreadable": session_id, "reason": reason}))
    return replace(place, unreadable=place.unreadable + 1)


def _entries(name: str, at: int, entries: Sequence[bytes]) -> str:
    return line_of({name: list(map(to_json, entries)), "at": at})


def _end(session_id: str, kept: tuple[int, int]) -> str:
    return line_of({"end": session_id, **dict(zip(BUFFERS, kept, strict=True))})
