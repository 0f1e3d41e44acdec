"""Listings: the sessions that match, in order, page after page.

A page is one run of ``lua/find_sessions.lua``. Its cursor is a place in the order (a creation
time, or a last activity, and an id), so no server-side state is needed and a restart of the
server is not noticed. A session whose buffers do not fit a page is read alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

from sessionstore import arguments as check
from sessionstore import codec
from sessionstore._call import Call, Feed, Page, Request, Snapshot
from sessionstore.errors import InvalidArgumentError
from sessionstore.keys import Keys
from sessionstore.models import AgentSession, AgentSessionStatus

T = TypeVar("T")

Order = Literal["created", "-last_activity"]
CREATED: Order = "created"
BY_ACTIVITY: Order = "-last_activity"

MOST_ROWS = 1000  # in a page

#: The index sets of each filter: a session matches a filter if it is in one of its sets.
Filters = tuple[tuple[str, ...], ...]


def filters_of(
    keys: Keys,
    *,
    type: str | None = None,
    status: AgentSessionStatus | Iterable[AgentSessionStatus] | None = None,
    task_id: str | None = None,
    mcp_session_id: str | None = None,
    service_session_id: str | None = None,
    owner: str | None = None,
) -> Filters:
    """The filters that were given, checked."""
    filters: list[tuple[str, ...]] = []
    if service_session_id is not None:
        filters.append((keys.by_service(check.text("service_session_id", service_session_id)),))
    if task_id is not None:
        filters.append((keys.by_task(check.text("task_id", task_id)),))
    if mcp_session_id is not None:
        filters.append((keys.by_mcp(check.text("mcp_session_id", mcp_session_id)),))
    if owner is not None:
        filters.append((keys.by_owner(check.text("owner", owner)),))
    if type is not None:
        filters.append((keys.by_type(check.session_type(type, None)),))
    if status is not None:
        filters.append(tuple(map(keys.by_status, check.statuses("status", status))))
    return tuple(filters)


def whole_session(
    keys: Keys, session_id: str, tail: int | None, decode: Callable[[Any], T]
) -> Snapshot[T]:
    """Read a session with its buffers in one moment: TIME, hash fields, output, errors."""
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


@dataclass(frozen=True, slots=True)
class Place:
    """Where a listing goes on: after this score and id, with so many sessions already given.

    ``alone`` is the id of the session at this place if it must be read alone first.
    """

    score: str = ""
    id: str = ""
    given: int = 0
    alone: str = ""


@dataclass(frozen=True, slots=True)
class Listing:
    """One listing: what matches, in which order, how many, and how much of the buffers."""

    keys: Keys
    filters: Filters
    idle_for: float | None
    order: Order
    limit: int | None
    tail: int | None

    def __post_init__(self) -> None:
        check.tail(self.tail)
        if self.limit is not None:
            check.whole("limit", self.limit, 0)
        if self.idle_for is not None:
            check.seconds("idle_for", self.idle_for)
        if self.order not in (CREATED, BY_ACTIVITY):
            raise InvalidArgumentError.of(
                "order", f"must be {CREATED!r} or {BY_ACTIVITY!r}, not {self.order!r:.80}"
            )

    def feed(self) -> Feed[AgentSession, Place]:
        """The sessions, in pages."""
        return Feed(Place(), self._page)

    def _page(self, place: Place) -> Request[Page[AgentSession, Place]]:
        if place.alone:
            return self._lone_session(place)
        wanted = MOST_ROWS if self.limit is None else min(MOST_ROWS, self.limit - place.given)
        keys = self.keys
        return Call(
            "find_sessions",
            keys=(
                keys.sessions,
                keys.activity,
                keys.ended,
                *(index for sets in self.filters for index in sets),
            ),
            args=(
                keys.prefix,
                self.order,
                place.score,
                place.id,
                wanted,
                -1 if self.tail is None else self.tail,
                "" if self.idle_for is None else round(self.idle_for * 1_000_000),
                *map(len, self.filters),
            ),
            decode=lambda reply: self._decode(place, reply),
        )

    def _decode(self, place: Place, reply: Any) -> Page[AgentSession, Place]:
        time, score, last_id, alone, rows = reply
        sessions = codec.readable(rows, codec.moment(time))
        following = Place(
            codec.text(score), codec.text(last_id), place.given + len(sessions), codec.text(alone)
        )
        return Page(sessions, self._unless_done(following))

    def _unless_done(self, place: Place) -> Place | None:
        enough = self.limit is not None and place.given >= self.limit
        return None if enough or not place.score else place

    def _lone_session(self, place: Place) -> Request[Page[AgentSession, Place]]:
        def decode(reply: Any) -> Page[AgentSession, Place]:
            time, *row = reply
            sessions = codec.readable([row] if row[0] else [], codec.moment(time))
            following = Place(place.score, place.id, place.given + len(sessions))
            return Page(sessions, self._unless_done(following))

        return whole_session(self.keys, place.alone, self.tail, decode)
