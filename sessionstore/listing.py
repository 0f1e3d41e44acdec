"""Listings: the sessions that match, in order, page after page.

Each partition is walked by ``lua/find_sessions.lua``, from a place in the order: a creation time
or a last activity, and an id. So no state is needed in the server, and a restart of it is not
noticed. The partitions' pages are merged: what was read is given as far as no partition that is
still being walked can have anything before it.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from sessionstore import arguments as check
from sessionstore import codec
from sessionstore._call import Call, Feed, Page, Request, Several, then
from sessionstore.errors import InvalidArgumentError
from sessionstore.keys import Keys
from sessionstore.models import LIVE_STATUSES, AgentSession, AgentSessionStatus
from sessionstore.reading import in_pieces, whole

logger = logging.getLogger("sessionstore")

Order = Literal["created", "-last_activity"]
CREATED: Order = "created"
BY_ACTIVITY: Order = "-last_activity"

PAGE_ROWS = 150  # over all partitions: 2 to 4 ms of the server's time
PAGE_BYTES = 1024 * 1024  # of buffers, over all partitions
LEAST_ROWS, LEAST_BYTES = 64, 64 * 1024  # of one partition


@dataclass(frozen=True, slots=True)
class Filters:
    """What a session must match; None is no filter."""

    type: str | None = None
    status: AgentSessionStatus | Iterable[AgentSessionStatus] | None = None
    task_id: str | None = None
    mcp_session_id: str | None = None
    service_session_id: str | None = None
    owner: str | None = None
    idle_for: float | None = None
    statuses: tuple[AgentSessionStatus, ...] = ()

    def __post_init__(self) -> None:
        checked: dict[str, object] = {}
        for name in ("task_id", "mcp_session_id", "service_session_id", "owner"):
            if getattr(self, name) is not None:
                checked[name] = check.text(name, getattr(self, name))
        if self.type is not None:
            checked["type"] = check.session_type(self.type, None)
        if self.status is not None:
            checked["statuses"] = check.statuses("status", self.status)
        if self.idle_for is not None:
            checked["idle_for"] = check.seconds("idle_for", self.idle_for)
        for name, value in checked.items():
            object.__setattr__(self, name, value)  # frozen from here on

    def still_match(self, session: AgentSession) -> bool:
        """Whether a session that matched a moment ago does so now: what may change is compared."""
        return (not self.statuses or session.status in self.statuses) and (
            self.owner is None or session.owner == self.owner
        )

    def index_sets(self, keys: Keys) -> list[tuple[str, ...]]:
        """For each filter its index sets: a session matches that is in one of them."""
        sets: list[tuple[str, ...]] = []
        if self.service_session_id is not None:
            sets.append((keys.by_service(self.service_session_id),))
        if self.task_id is not None:
            sets.append((keys.by_task(self.task_id),))
        if self.mcp_session_id is not None:
            sets.append((keys.by_mcp(self.mcp_session_id),))
        if self.owner is not None:
            sets.append((keys.by_owner(self.owner),))
        if self.type is not None:
            sets.append((keys.by_type(self.type),))
        if self.statuses:
            sets.append(tuple(map(keys.by_status, self.statuses)))
        return sets


#: A score and an id: where a session is in the order.
Place = tuple[int, str]
#: A session and its place.
Row = tuple[Place, AgentSession]


@dataclass(frozen=True, slots=True)
class Strand:
    """How far one partition has been walked, and what was read there but not given yet."""

    keys: Keys
    place: Place | None = None
    rows: tuple[Row, ...] = ()
    finished: bool = False
    alone: str = ""  # the session at `place`, if it is too large for a page


@dataclass(frozen=True, slots=True)
class Progress:
    """Where a listing goes on, and how many sessions it has given and left out so far."""

    strands: tuple[Strand, ...]
    given: int = 0
    left_out: int = 0


@dataclass(frozen=True, slots=True)
class Listing:
    """One listing: where, what matches, in which order, how many, how much of the buffers."""

    partitions: Sequence[Keys]
    filters: Filters
    order: Order = CREATED
    limit: int | None = None
    tail: int | None = 0

    def __post_init__(self) -> None:
        check.tail(self.tail)
        if self.limit is not None:
            check.whole("limit", self.limit, 0)
        if self.order not in (CREATED, BY_ACTIVITY):
            raise InvalidArgumentError.of(
                "order", f"must be {CREATED!r} or {BY_ACTIVITY!r}, not {self.order!r:.80}"
            )

    def feed(self) -> Feed[AgentSession, Progress]:
        """The sessions, in pages."""
        return Feed(Progress(tuple(map(Strand, self.partitions))), self._page)

    def _page(self, progress: Progress) -> Request[Page[AgentSession, Progress]]:
        for number, strand in enumerate(progress.strands):
            if strand.alone:
                return self._read_alone(progress, number, strand)
        asked = [n for n, s in enumerate(progress.strands) if not (s.finished or s.rows)]
        rows = max(PAGE_ROWS // len(asked), LEAST_ROWS)
        if self.limit is not None:
            rows = min(rows, self.limit - progress.given)
        room = max(PAGE_BYTES // len(asked), LEAST_BYTES)

        def decode(replies: Sequence[Any]) -> Page[AgentSession, Progress]:
            strands, left_out = list(progress.strands), progress.left_out
            for number, reply in zip(asked, replies, strict=True):
                strands[number] = _walked(strands[number], reply)
                left_out += len(reply[-1]) - len(strands[number].rows)
            return self._merge(replace(progress, strands=tuple(strands), left_out=left_out))

        calls = [self._walk(progress.strands[number], rows, room) for number in asked]
        if len(calls) == 1:
            (call,) = calls
            return Call(call.script, call.keys, call.args, lambda reply: decode([reply]))
        return Several(calls, decode)

    def _walk(self, strand: Strand, rows: int, room: int) -> Call[Any]:
        keys = strand.keys
        score, last_id = strand.place or ("", "")
        sets = self.filters.index_sets(keys)
        idle_for = self.filters.idle_for
        return Call(
            "find_sessions",
            keys=(keys.sessions, keys.activity, keys.ended, *(key for s in sets for key in s)),
            args=(
                keys.prefix,
                self.order,
                score,
                last_id,
                rows,
                room,
                -1 if self.tail is None else self.tail,
                "" if idle_for is None else round(idle_for * 1_000_000),
                *map(len, sets),
            ),
            decode=lambda reply: reply,
        )

    def _read_alone(
        self, progress: Progress, number: int, strand: Strand
    ) -> Request[Page[AgentSession, Progress]]:
        def page(session: AgentSession | None) -> Page[AgentSession, Progress]:
            assert strand.place is not None
            fits = session is not None and self.filters.still_match(session)
            rows = ((strand.place, session),) if session is not None and fits else ()
            strands = list(progress.strands)
            strands[number] = replace(strand, rows=rows, alone="")
            return self._merge(replace(progress, strands=tuple(strands)))

        return then(in_pieces(strand.keys, strand.alone, self.tail), page)

    def _merge(self, progress: Progress) -> Page[AgentSession, Progress]:
        """Give what can be given, in order; keep the rest."""
        strands = progress.strands
        if any(strand.alone for strand in strands):
            return Page((), progress)
        descending = self.order == BY_ACTIVITY
        rows = [row for strand in strands for row in strand.rows]
        ready = len(rows)
        if len(strands) > 1:
            rows.sort(key=_place_of, reverse=descending)
            # Beyond the nearest end of a partition that is still walked, others may come between.
            ends = [s.place for s in strands if not s.finished and s.place is not None]
            if ends and descending:
                ready = sum(place >= max(ends) for place, _ in rows)
            elif ends:
                ready = sum(place <= min(ends) for place, _ in rows)
        if self.limit is not None:
            ready = min(ready, self.limit - progress.given)
        given = progress.given + ready
        sessions = [session for _, session in rows[:ready]]
        if given == self.limit or (ready == len(rows) and all(s.finished for s in strands)):
            if progress.left_out:
                logger.info(  # each was warned of
                    "%d records that cannot be read were left out of a listing of %d sessions",
                    progress.left_out, given,
                )  # fmt: skip
            return Page(sessions, None)
        kept = {place for place, _ in rows[ready:]}
        left = [replace(s, rows=tuple(r for r in s.rows if r[0] in kept)) for s in strands]
        return Page(sessions, Progress(tuple(left), given, progress.left_out))


def _place_of(row: Row) -> Place:
    return row[0]


def _walked(strand: Strand, reply: Any) -> Strand:
    """A partition after one more page of it."""
    time, score, last_id, alone, rows = reply
    read_at = codec.moment(time)
    found: list[Row] = []
    for row_score, fields, output, errors in rows:
        session = codec.listed(fields, output, errors, read_at)
        if session is None:
            if not fields:
                logger.warning("left out of a listing: an id that is indexed but has no session")
        else:
            found.append(((int(float(row_score)), session.id), session))
    place = (int(score), codec.text(last_id)) if score else None
    return replace(
        strand, place=place, rows=tuple(found), finished=place is None, alone=codec.text(alone)
    )


def earliest_of_service(
    keys: Keys, service_session_id: str, *, live: bool, tail: int | None
) -> Request[AgentSession | None]:
    """The earliest created session of a service session; with ``live``, of those not ended."""

    def by_listing() -> Request[AgentSession | None]:
        status = LIVE_STATUSES if live else None
        filters = Filters(service_session_id=service_session_id, status=status)
        sessions = Listing((keys,), filters, limit=1, tail=tail).feed().collect()
        return then(sessions, lambda found: found[0] if found else None)

    def decode(reply: Any) -> AgentSession | Request[AgentSession | None] | None:
        time, *found = reply
        if not found:  # too many sessions for one script
            return by_listing()
        session_id, *rows = found
        if not session_id:
            return None
        if not rows or not rows[0]:
            alone = whole(keys, codec.text(session_id), tail)
            return then(alone, lambda s: s if s and not (live and s.ended) else look_up)
        fields, output, errors = rows[0]
        session = codec.listed(fields, output, errors, codec.moment(time))
        return session or by_listing()  # past one that cannot be read

    look_up = Call(
        "find_session_by_service_id",
        keys=(keys.by_service(service_session_id), keys.sessions),
        args=(keys.prefix, "1" if live else "", -1 if tail is None else tail, PAGE_BYTES),
        decode=decode,
    )
    return look_up
