"""Imports: sessions from the lines of an export (``exporting.py``), each made in one step.

A session's lines are gathered until its end. A small session then goes to the server whole, in
one script; buffers over 1 MiB are staged there before, a page at a time, and the script moves them
into place. So an import that is cut off anywhere leaves whole sessions and no halves; run again, it
finds those that are there already to be the same, leaves them alone and goes on. What it had
staged, of one session at most, is taken over by the next import of it, or expires after an hour.

    line → take() → nothing, or some round trips      end of the lines → finish() → what was done

``take`` and ``finish`` are steps without I/O of their own: both stores carry them out.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import Any, Literal, cast
from uuid import uuid4

from sessionstore import arguments as check
from sessionstore import codec
from sessionstore._call import Call, Steps
from sessionstore._version import __version__
from sessionstore.errors import (
    PASSING,
    ImportConflictError,
    ImportFormatError,
    InvalidArgumentError,
    SessionExistsError,
)
from sessionstore.exporting import BUFFERS, COUNTS, FORMAT, Row, one_row, piece
from sessionstore.incoming import OF_LEASES, Head, InvalidLineError, listed, stored_bytes, whole
from sessionstore.keys import Keys, Keyspace
from sessionstore.models import ENDED_STATUSES, Imported
from sessionstore.opening import SCHEMA_VERSION, by
from sessionstore.settings import StoreSettings

logger = logging.getLogger("sessionstore")

Existing = Literal["error", "skip", "replace"]

MOST_AT_ONCE = 1024 * 1024  # bytes of entries in one script
MOST_TOLD = 1000  # ids in the result
ENTRY_OVERHEAD = 16  # bytes, as in append.lua

#: What exports are read. Those of earlier schemas are how their sessions come into this one.
_KNOWN: dict[str, Sequence[Any]] = {
    "format": [FORMAT],
    "schema": [str(number) for number in range(1, int(SCHEMA_VERSION) + 1)],
}

#: After these a session is yet to be stored, now or by the next import.
_KEEPING_WHAT_IS_STAGED: tuple[type[Exception], ...] = (SessionExistsError, *PASSING)


# ---- A session that comes in ------------------------------------------------------------------


@dataclass(slots=True)
class Incoming:
    """One buffer of the session that is being read."""

    name: str
    pending: list[bytes] = field(default_factory=list[bytes])
    pending_bytes: int = 0
    staged: int | None = None  # entries; None if nothing is staged
    count: int = 0
    size: int = 0  # bytes, as a session's hash has them
    following: int = 0  # the position after its last entry
    digest: Any = field(default_factory=blake2b)

    def take(self, at: int, entries: Sequence[bytes]) -> None:
        """More entries, that follow."""
        self.pending += entries
        self.count += len(entries)
        size = _digested(self.digest, entries)
        self.size += size
        self.pending_bytes += size
        self.following = at + len(entries)

    def begin_anew(self) -> None:
        """What came so far is gone."""
        self.forget_pending()
        self.count = self.size = 0
        self.digest = blake2b()

    def pages(self) -> Iterator[list[bytes]]:
        """What is pending, in pieces for one script each."""
        page: list[bytes] = []
        size = 0
        for entry in self.pending:
            weight = len(entry) + ENTRY_OVERHEAD
            if page and size + weight > MOST_AT_ONCE:
                yield page
                page, size = [], 0
            page.append(entry)
            size += weight
        if page:
            yield page

    def forget_pending(self) -> None:
        self.pending, self.pending_bytes = [], 0


def _digested(digest: Any, entries: Sequence[bytes]) -> int:
    """Add entries to a digest; their weight."""
    size = 0
    for entry in entries:
        digest.update(b"%d:" % len(entry))
        digest.update(entry)
        size += len(entry) + ENTRY_OVERHEAD
    return size


class _Session:
    """The session that is being read: its head or what is wrong with it, and its buffers."""

    def __init__(self, id: Any, head: Head | None, problem: str) -> None:
        self.id, self.head, self.problem = id, head, problem
        self.token = uuid4().hex
        self.buffers = {name: Incoming(name) for name in BUFFERS}
        self.is_here = False  # such a session is: nothing of this one needs to be staged

    def fail(self, problem: str) -> None:
        self.head, self.problem = None, problem
        for buffer in self.buffers.values():
            buffer.forget_pending()

    def fields(self, head: Head) -> dict[bytes, bytes]:
        """The hash fields to store: bytes are counted anew, for a buffer may have been trimmed."""
        stored = dict(head.fields)
        for name, prefix in BUFFERS.items():
            buffer, total, size = self.buffers[name], f"{prefix}_total", f"{prefix}_bytes"
            if buffer.count or size.encode() in stored or total.encode() in stored:
                stored[size.encode()] = str(buffer.size).encode()
        return stored


# ---- The import -------------------------------------------------------------------------------


class Import:
    """One import; see the module.

    Args:
        keyspace: where to.
        settings: the store's.
        actor: whose import it is, for the events.
        existing: what becomes of a session that is there already and differs.
        dry_run: change nothing.
    """

    def __init__(
        self,
        keyspace: Keyspace,
        settings: StoreSettings,
        actor: str,
        existing: Existing,
        *,
        dry_run: bool,
    ) -> None:
        if existing not in ("error", "skip", "replace"):
            rule = f"must be 'error', 'skip' or 'replace', not {existing!r:.80}"
            raise InvalidArgumentError.of("existing", rule)
        self._keyspace, self._settings, self._actor = keyspace, settings, actor
        self._existing, self._dry_run = existing, check.flag("dry_run", dry_run)
        self._line = 0
        self._is_begun = self._is_ended = False
        self._session: _Session | None = None
        self._seen: dict[str, int] = dict.fromkeys(COUNTS, 0)
        self._done: dict[str, int] = {
            name: 0 for name in Imported.model_fields if name != "differing_ids"
        }
        self._differing: list[str] = []

    def take(self, line: str | bytes) -> Steps[None]:
        """Take the next line, and store the session that it completes."""
        self._line += 1
        try:
            yield from self._take(line)
        except InvalidLineError as error:
            raise ImportFormatError.at(self._line, str(error)) from None

    def finish(self) -> Steps[Imported]:
        """All lines have been given."""
        if not self._is_begun:
            raise ImportFormatError.at(1, "this is no export of sessionstore: it is empty")
        if not self._is_ended:
            raise ImportFormatError.at(
                self._line, "the export is cut off after this line; what was complete is imported"
            )
        return Imported(**cast("Any", self._done), differing_ids=tuple(self._differing))
        yield 0.0  # steps are generators

    def _take(self, line: str | bytes) -> Steps[None]:
        if not line.strip():
            return
        told = self._parsed(line)
        if not self._is_begun:
            self._begin(told)
        elif self._is_ended:
            raise InvalidLineError("something follows the last line of the export")
        elif "session" in told:
            self._begin_session(told)
        elif "end" in told:
            yield from self._end_session(told)
        elif "gone" in told or "unreadable" in told:
            yield from self._leave_out(told)
        elif "total" in told:
            self._end(told)
        else:
            yield from self._take_entries(told)

    def _parsed(self, line: str | bytes) -> dict[str, Any]:
        try:
            told = json.loads(line)
        except (ValueError, RecursionError):
            told = None
        if isinstance(told, dict):
            return cast("dict[str, Any]", told)
        if not self._is_begun:
            raise InvalidLineError("this is no export of sessionstore")
        raise InvalidLineError("no JSON object; the export is damaged or cut off here")

    def _begin(self, told: dict[str, Any]) -> None:
        if told.get("sessionstore") != "export":
            raise InvalidLineError("this is no export of sessionstore")
        for name, known in _KNOWN.items():
            if told.get(name) not in known:
                raise InvalidLineError(
                    f"the export has {name} {told.get(name)!r:.20}{by(told.get('written_by'))}, "
                    f"this is sessionstore {__version__}, which knows {name} {known[-1]!r}: import "
                    "it with the version that wrote it, or a newer one; nothing was written"
                )
        self._is_begun = True

    def _end(self, told: dict[str, Any]) -> None:
        if self._session is not None:
            raise InvalidLineError(f"session {self._session.id!r} has no end")
        total = told["total"]
        if isinstance(total, dict):  # a later version may count more
            total = {name: n for name, n in cast("Any", total).items() if name in COUNTS}
        if total != self._seen:
            raise InvalidLineError(
                f"lines are missing or doubled: the export says it has {told['total']!r:.200}, and "
                f"there were {self._seen!r}"
            )
        self._is_ended = True

    # ---- A session's lines -------------------------------------------------------------------

    def _begin_session(self, told: dict[str, Any]) -> None:
        if self._session is not None:
            raise InvalidLineError(f"session {self._session.id!r} has no end")
        head, problem = None, ""
        try:
            head = Head.read(told, self._keyspace, self._settings)
        except (InvalidLineError, InvalidArgumentError) as error:
            problem = str(error)
        self._session = _Session(told["session"], head, problem)

    def _current(self) -> _Session:
        if self._session is None:
            raise InvalidLineError("this line belongs to no session")
        return self._session

    def _take_entries(self, told: dict[str, Any]) -> Steps[None]:
        name = next((name for name in BUFFERS if name in told), None)
        if name is None:
            raise InvalidLineError(f"unknown: {', '.join(told)!r:.80}")
        session = self._current()
        entries = list(map(stored_bytes, listed(told[name], name)))
        at = whole(told.get("at"), "at")
        buffer = session.buffers[name]
        if buffer.count and at != buffer.following:
            if at < buffer.following:
                raise InvalidLineError(f"entries of position {at} come twice")
            buffer.begin_anew()  # trimmed away while the rest was read
            yield from self._drop(session, buffer)
        buffer.take(at, entries)
        if session.head is None or session.is_here or self._dry_run:
            buffer.forget_pending()
        elif buffer.pending_bytes > MOST_AT_ONCE:
            yield from self._stage(session, session.head, buffer)

    def _leave_out(self, told: dict[str, Any]) -> Steps[None]:
        is_gone = "gone" in told
        session_id = told["gone"] if is_gone else told["unreadable"]
        session, self._session = self._session, None
        if session is not None:
            if session.id != session_id:
                raise InvalidLineError(f"session {session.id!r} has no end")
            for buffer in session.buffers.values():
                yield from self._drop(session, buffer)
        elif is_gone:
            raise InvalidLineError("this line belongs to no session")
        if not is_gone:
            self._seen["unreadable"] += 1
            self._tell_unreadable(session_id, str(told.get("reason"))[:200])

    def _tell_unreadable(self, session_id: Any, reason: str) -> None:
        self._done["unreadable"] += 1
        message = "line %d: session %.100r cannot be imported: %s"
        logger.warning(message, self._line, session_id, reason)

    def _end_session(self, told: dict[str, Any]) -> Steps[None]:
        session, self._session = self._current(), None
        if told["end"] != session.id:
            raise InvalidLineError(f"this is the end of another session than {session.id!r}")
        counts = {name: buffer.count for name, buffer in session.buffers.items()}
        if counts != {name: told.get(name) for name in BUFFERS}:
            raise InvalidLineError(f"lines of session {session.id!r} are missing or doubled")
        self._seen["sessions"] += 1
        for name, count in counts.items():
            self._seen[name] += count
        if session.head is not None:
            self._check_positions(session, session.head)
        if session.head is None:
            for buffer in session.buffers.values():
                yield from self._drop(session, buffer)
            self._tell_unreadable(session.id, session.problem)
            return
        what = yield from self._settle(session, session.head)
        self._done[what] += 1

    def _check_positions(self, session: _Session, head: Head) -> None:
        for name, prefix in BUFFERS.items():
            buffer = session.buffers[name]
            try:
                fits_total = head.total(prefix) == buffer.following or not buffer.count
            except InvalidLineError as error:
                return session.fail(str(error))
            if not fits_total:
                return session.fail(f"its {prefix}_total does not fit its entries")
        return None

    # ---- Storing a session -------------------------------------------------------------------

    def _settle(self, session: _Session, head: Head) -> Steps[str]:
        """Store a session, unless one with its id is here; what was done, as in ``Imported``."""
        if not (session.is_here or self._dry_run):
            try:
                yield from self._store(session, head, replace=False)
                return "imported"
            except SessionExistsError:
                pass
        row: Row | None = yield one_row(head.keys, head.id)
        if row is None and self._dry_run:
            return "imported"
        if row is None:  # deleted a moment ago
            raise ImportConflictError.from_details({"session_id": head.id})
        is_same = yield from self._is_same(session, head, row)
        if not is_same and self._existing == "replace":
            if not self._dry_run:
                yield from self._store(session, head, replace=True)
            return "replaced"
        for buffer in session.buffers.values():
            yield from self._drop(session, buffer)
        if is_same:
            return "unchanged"
        if self._existing == "error" and not self._dry_run:
            error = SessionExistsError(
                f"line {self._line}: session {head.id!r} exists here already and differs; nothing "
                "of it was changed"
            )
            error.session_id = head.id
            raise error
        logger.warning("line %d: session %r exists here and differs", self._line, head.id)
        if len(self._differing) < MOST_TOLD:
            self._differing.append(head.id)
        return "differing"

    def _store(self, session: _Session, head: Head, *, replace: bool) -> Steps[None]:
        for buffer in session.buffers.values():
            if sum(b.pending_bytes for b in session.buffers.values()) > MOST_AT_ONCE:
                yield from self._stage(session, head, buffer)
        if session.is_here:  # what would be stored is not all there
            raise SessionExistsError.from_details({"session_id": head.id})
        try:
            yield self._storing(session, head, replace=replace)
        except _KEEPING_WHAT_IS_STAGED:
            raise
        except Exception:
            for buffer in session.buffers.values():
                yield from self._drop(session, buffer)
            raise

    def _storing(self, session: _Session, head: Head, *, replace: bool) -> Call[None]:
        keys = head.keys
        fields = [part for pair in session.fields(head).items() for part in pair]
        output, errors = session.buffers["output"], session.buffers["errors"]
        return Call(
            "import_session",
            keys=(
                keys.session(head.id),
                keys.output(head.id),
                keys.errors(head.id),
                keys.staged(head.id, "output"),
                keys.staged(head.id, "errors"),
                keys.sessions,
                keys.types,
                keys.activity,
                keys.ended,
                keys.leases,
                keys.events,
                *head.indexes,
            ),
            args=(
                head.id,
                keys.prefix,
                "1" if replace else "",
                self._actor,
                head.type,
                head.status,
                head.created_us,
                head.active_us,
                "" if head.owner is None else "1",
                head.fence,
                "" if head.expires_ms is None else head.expires_ms,
                session.token,
                "" if output.staged is None else output.staged,
                "" if errors.staged is None else errors.staged,
                len(fields),
                len(output.pending),
                *fields,
                *output.pending,
                *errors.pending,
            ),
            decode=_nothing,
            lane=keys.lane,
        )

    def _stage(self, session: _Session, head: Head, buffer: Incoming) -> Steps[None]:
        """Have what is pending of a buffer kept aside by the server."""
        for page in buffer.pages():
            try:
                so_far = "" if buffer.staged is None else buffer.staged
                yield self._staging(session, head, buffer, so_far, page)
            except SessionExistsError:
                session.is_here = True  # it is compared with this one, that is all
                for one in session.buffers.values():
                    one.forget_pending()
                return
            buffer.staged = (buffer.staged or 0) + len(page)
        buffer.forget_pending()

    def _drop(self, session: _Session, buffer: Incoming) -> Steps[None]:
        """Have the server forget what it keeps aside of a buffer."""
        if buffer.staged is not None:
            buffer.staged = None
            keys = self._keyspace.of_session(session.id)
            yield _stage_buffer(keys, session, buffer, "drop", "", ())

    def _staging(
        self,
        session: _Session,
        head: Head,
        buffer: Incoming,
        so_far: int | str,
        page: Sequence[bytes],
    ) -> Call[None]:
        only_new = "" if self._existing == "replace" else "1"
        return _stage_buffer(head.keys, session, buffer, so_far, only_new, page)

    # ---- Comparing ---------------------------------------------------------------------------

    def _is_same(self, session: _Session, head: Head, row: Row) -> Steps[bool]:
        """Whether the session that is here is the one that would be imported."""
        active_us = row.ended_us if head.status in ENDED_STATUSES else row.activity_us
        here = {n: v for n, v in row.fields if n.decode(errors="replace") not in OF_LEASES}
        first = row.first_positions()
        buffers = tuple(session.buffers.values())
        if (
            row.unreadable
            or first is None
            or here != session.fields(head)
            or (row.created_us, active_us) != (head.created_us, head.active_us)
            or row.lengths != tuple(buffer.count for buffer in buffers)
        ):
            return False
        for number, buffer in enumerate(buffers):
            digest = blake2b()
            if row.entries is not None:
                _digested(digest, row.entries[number])
            else:
                end = first[number] + row.lengths[number]
                at = first[number]
                while at < end:
                    read = yield piece(head.keys, head.id, buffer.name, at, end)
                    if read is None or read.lost or read.at != at:
                        return False  # somebody is writing to it
                    _digested(digest, read.entries)
                    at = read.following
            if digest.digest() != buffer.digest.digest():
                return False
        return True


def _stage_buffer(
    keys: Keys,
    session: _Session,
    buffer: Incoming,
    so_far: int | str,
    only_new: str,
    page: Sequence[bytes],
) -> Call[None]:
    return Call(
        "stage_buffer",
        keys=(keys.session(session.id), keys.staged(session.id, buffer.name)),
        args=(session.id, session.token, so_far, only_new, *page),
        decode=_nothing,
        lane=keys.lane,
    )


def _nothing(reply: Any) -> None:
    codec.done(reply)
