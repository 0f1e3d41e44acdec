"""A session store as plain Python: what every operation must answer, and what must be stored then.

It knows nothing of Redis and nothing of the library but its arguments. Workers are told apart by
their names; each has settings and leases of its own. What only the server knows, times and fences,
is left open by the model (``TOUCHED``) and adopted from what is stored, within bounds.
"""

# ruff: noqa: ARG002  every operation has a worker, though some do not ask who it is

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any

STATUSES = ("starting", "active", "busy", "error", "terminated")
ENDED = frozenset({"terminated", "error"})
LIVE = ("starting", "active", "busy")
ENTRY_OVERHEAD = 16  # bytes
MOST_NAMES = 64  # of metadata
MOST_CLEARED = 2  # ended sessions, with each new one
S = 1_000_000  # µs


class RefusedError(Exception):
    """An operation that is refused: a code, and the attributes that its error must have.

    An attribute may be a set of values, each as good as the others.
    """

    def __init__(self, code: str, **attributes: Any) -> None:
        super().__init__(code, attributes)
        self.code, self.attributes = code, attributes


@dataclass
class Buffer:
    """The entries that are kept, and how many there ever were."""

    entries: list[str] = field(default_factory=list)
    total: int = 0

    @property
    def bytes(self) -> int:
        return sum(len(entry.encode()) + ENTRY_OVERHEAD for entry in self.entries)

    def add(self, chunks: Iterable[str], most_entries: int, most_bytes: int) -> None:
        before = len(self.entries)
        self.entries += chunks
        self.total += len(self.entries) - before
        while len(self.entries) > 1 and (
            (most_entries and len(self.entries) > most_entries)
            or (most_bytes and self.bytes > most_bytes)
        ):
            del self.entries[0]

    def tail(self, tail: int | None) -> list[str]:
        return self.entries if tail is None else self.entries[-tail:] if tail else []


@dataclass
class Session:
    """What is stored of one session. Times in µs, of leases and marks in ms."""

    id: str
    type: str
    service_session_id: str
    project_path: str
    task_id: str | None
    mcp_session_id: str | None
    status: str
    metadata: dict[str, str]
    partition: str
    created_us: int = 0
    last_us: int = 0
    ended_us: int | None = None
    output: Buffer = field(default_factory=Buffer)
    error: Buffer = field(default_factory=Buffer)
    owner: str | None = None
    fence: int | None = None
    expires_ms: int | None = None
    ttl_ms: int = 0
    marked_ms: int | None = None
    #: What the last operation has set to a time, or to a fence, that only the server knows.
    touched: set[str] = field(default_factory=set)

    @property
    def order_us(self) -> int:
        """Where it is in the order of activity."""
        return self.last_us if self.ended_us is None else self.ended_us

    @property
    def ended(self) -> bool:
        return self.status in ENDED

    def is_live(self, now_us: float) -> bool:
        return self.expires_ms is not None and self.expires_ms * 1000 > now_us

    def move(self, status: str) -> None:
        was_ended, self.status = self.ended, status
        if self.ended and not was_ended:
            self.touched.add("ended")
        elif not self.ended:
            self.ended_us = None
            self.touched.discard("ended")

    def end_lease(self) -> None:
        self.owner = self.expires_ms = self.marked_ms = None

    def stored(self) -> dict[str, str]:
        """The fields of its hash."""
        fields: dict[str, Any] = {
            "id": self.id,
            "type": self.type,
            "service_session_id": self.service_session_id,
            "project_path": self.project_path,
            "task_id": self.task_id,
            "mcp_session_id": self.mcp_session_id,
            "status": self.status,
            "created_at": iso(self.created_us),
            "last_activity": iso(self.last_us),
            "owner": self.owner,
            "fence": self.fence,
            "lease_expires_at": None if self.expires_ms is None else iso(self.expires_ms * 1000),
            "reap_seen_ms": self.marked_ms,
        }
        for name, buffer in (("output", self.output), ("error", self.error)):
            if buffer.total:
                fields |= {f"{name}_total": buffer.total, f"{name}_bytes": buffer.bytes}
        fields |= {f"meta:{name}": value for name, value in self.metadata.items()}
        return {name: str(value) for name, value in fields.items() if value is not None}

    def shown(self, tail: int | None) -> dict[str, Any]:
        """As the library shows it, times in µs."""
        return {
            "id": self.id,
            "type": self.type,
            "service_session_id": self.service_session_id,
            "status": self.status,
            "project_path": self.project_path,
            "task_id": self.task_id,
            "mcp_session_id": self.mcp_session_id,
            "created_at": self.created_us,
            "last_activity": self.last_us,
            "output_buffer": list(self.output.tail(tail)),
            "error_buffer": list(self.error.tail(tail)),
            "output_total": self.output.total,
            "error_total": self.error.total,
            "metadata": dict(self.metadata),
            "owner": self.owner,
            "lease_expires_at": None if self.expires_ms is None else self.expires_ms * 1000,
        }


@dataclass(eq=False)
class Lease:
    """A lease as its worker knows it."""

    session_id: str
    fence: int | None
    ttl_ms: int
    lost: RefusedError | None = None
    released: bool = False
    abandoned: bool = False

    def refuse_if_over(self) -> None:
        if self.lost is not None:
            raise self.lost
        if self.released or self.abandoned:
            raise RefusedError("SESSION_STORE_ERROR")


@dataclass
class Worker:
    """One store object."""

    name: str
    buffer_limit: int
    buffer_bytes: int
    retention: float
    reap_grace: float
    held: dict[str, Lease] = field(default_factory=dict)

    def lose(self, lease: Lease, **attributes: Any) -> None:
        if not lease.released and lease.lost is None:
            known: dict[str, Any] = {"session_id": lease.session_id, "status": None, "owner": None}
            lease.lost = RefusedError("LEASE_LOST", **known | attributes)

    def forget(self, lease: Lease) -> None:
        if self.held.get(lease.session_id) is lease:
            del self.held[lease.session_id]


class Model:
    """All sessions, and every operation on them.

    An operation returns its answer, or a function that gives it once times have been adopted.
    """

    def __init__(self, partition_of: Callable[[str], str], partitions: Iterable[str]) -> None:
        self.partition_of, self.partitions = partition_of, list(partitions)
        self.sessions: dict[str, Session] = {}
        self.deleted: dict[str, tuple[int, int]] = {}  # entries ever in both buffers
        self.events: dict[str, list[dict[str, str]]] = {}
        self.reaping: dict[str, tuple[int, str]] = {}
        self.now_us = 0.0

    # ---- The original ------------------------------------------------------------------------

    def create_session(
        self,
        worker: Worker,
        type: str,
        service_session_id: str,
        project_path: str,
        task_id: str | None = None,
        mcp_session_id: str | None = None,
        *,
        status: str = "active",
        metadata: Mapping[str, str] | None = None,
        unique: bool = False,
        new_id: str | None,
    ) -> Callable[[], Any]:
        if unique:
            of_service = [
                s for s in self.sessions.values() if s.service_session_id == service_session_id
            ]
            for live in LIVE:
                holders = [s for s in of_service if s.status == live]
                if holders:
                    raise RefusedError(
                        "SERVICE_SESSION_IN_USE",
                        session_id={s.id for s in holders},
                        status=live,
                        owner={s.owner for s in holders},
                    )
        assert new_id is not None, "it should have been created"
        session = Session(
            new_id,
            type,
            service_session_id,
            project_path,
            task_id,
            mcp_session_id,
            status,
            dict(metadata or {}),
            self.partition_of(new_id),
        )
        cleared = self._expired(session.partition, worker.retention, MOST_CLEARED)
        self.sessions[new_id] = session
        session.touched = {"created", "last"} | ({"ended"} if session.ended else set())
        self._tell(session, worker, "created", status=status)
        for one in cleared:
            self._remove(one, worker)
        return lambda: session.shown(0)

    def get_session(self, worker: Worker, session_id: str, *, tail: int | None = None) -> Any:
        return self._get(session_id).shown(tail)

    def find_session(self, worker: Worker, session_id: str, *, tail: int | None = None) -> Any:
        session = self.sessions.get(session_id)
        return session and session.shown(tail)

    def find_session_by_service_id(
        self,
        worker: Worker,
        service_session_id: str,
        *,
        tail: int | None = None,
        live: bool = False,
    ) -> Any:
        found = [
            session
            for session in self.sessions.values()
            if session.service_session_id == service_session_id and not (live and session.ended)
        ]
        return min(found, key=lambda s: s.created_us).shown(tail) if found else None

    def update_status(
        self,
        worker: Worker,
        session_id: str,
        status: str,
        *,
        expected: str | Iterable[str] | None = None,
        force: bool = False,
        noted: Lease | None = None,
    ) -> None:
        lease = noted or worker.held.get(session_id)
        with _Told(worker, lease, ends=force or status != "busy"):
            session = self._get(session_id)
            self._pass_fence(session_id, lease, force=force)
            wanted = (expected,) if isinstance(expected, str) else expected
            if wanted is not None and session.status not in wanted:
                raise RefusedError("SESSION_STATUS", session_id=session_id, status=session.status)
            old, owner = session.status, session.owner
            session.move(status)
            session.touched.add("last")
            if owner is not None and (status != "busy" or force):
                session.end_lease()
                self._tell(session, worker, "released", old_status=old, status=status, owner=owner)
            elif old != status:
                self._tell(session, worker, "status_changed", old_status=old, status=status)

    def update_activity(self, worker: Worker, session_id: str) -> None:
        self._get(session_id).touched.add("last")

    def add_output(
        self, worker: Worker, session_id: str, *chunks: str, noted: Lease | None = None
    ) -> int:
        return self._append(worker, session_id, "output", chunks, noted)

    def add_error(
        self, worker: Worker, session_id: str, *chunks: str, noted: Lease | None = None
    ) -> int:
        return self._append(worker, session_id, "error", chunks, noted)

    def _append(
        self,
        worker: Worker,
        session_id: str,
        which: str,
        chunks: tuple[str, ...],
        noted: Lease | None,
    ) -> int:
        lease = noted or worker.held.get(session_id)
        with _Told(worker, lease):
            session = self._get(session_id)
            self._pass_fence(session_id, lease)
            buffer: Buffer = getattr(session, which)
            buffer.add(chunks, worker.buffer_limit, worker.buffer_bytes)
            session.touched.add("last")
            return buffer.total

    def delete_session(
        self, worker: Worker, session_id: str, *, force: bool = False, noted: Lease | None = None
    ) -> bool:
        lease = noted or worker.held.get(session_id)
        with _Told(worker, lease, ends=True):
            session = self.sessions.get(session_id)
            if session is None:
                return False
            self._pass_fence(session_id, lease, force=force)
            self._remove(session, worker)
            return True

    def get_all_sessions(self, worker: Worker, *, tail: int | None = None) -> Any:
        return self.find_sessions(worker, tail=tail)

    def get_sessions_by_type(self, worker: Worker, type: str, *, tail: int | None = None) -> Any:
        return self.find_sessions(worker, type=type, tail=tail)

    def get_metrics(self, worker: Worker) -> Any:
        sessions = self.sessions.values()
        by_status = {one: sum(s.status == one for s in sessions) for one in STATUSES}
        return {
            "total_sessions": len(sessions),
            "active_sessions": by_status["active"],
            "busy_sessions": by_status["busy"],
            "error_sessions": by_status["error"],
            "sessions_by_type": {
                one: sum(s.type == one for s in sessions) for one in {s.type for s in sessions}
            },
            "sessions_by_status": by_status,
        }

    # ---- Beyond it ---------------------------------------------------------------------------

    def find_sessions(
        self,
        worker: Worker,
        *,
        status: str | Iterable[str] | None = None,
        idle_for: float | None = None,
        order: str = "created",
        limit: int | None = None,
        tail: int | None = 0,
        **equal: str,
    ) -> Any:
        wanted = (status,) if isinstance(status, str) else status
        found = [
            session
            for session in self.sessions.values()
            if all(getattr(session, name) == value for name, value in equal.items())
            and (wanted is None or session.status in wanted)
            and (idle_for is None or session.order_us <= self.now_us - idle_for * S)
        ]
        if order == "created":
            found.sort(key=lambda s: (s.created_us, s.id))
        else:
            found.sort(key=lambda s: (s.order_us, s.id), reverse=True)
        return [session.shown(tail) for session in found[:limit]]

    def iter_sessions(self, worker: Worker, **filters: Any) -> Any:
        return self.find_sessions(worker, **filters)

    def read_output(
        self, worker: Worker, session_id: str, cursor: int = 0, limit: int = 1000
    ) -> Any:
        return self._page(self._get(session_id), "output", cursor, limit)

    def read_errors(
        self, worker: Worker, session_id: str, cursor: int = 0, limit: int = 1000
    ) -> Any:
        return self._page(self._get(session_id), "error", cursor, limit)

    def _page(self, session: Session, which: str, cursor: int, limit: int = 1000) -> Any:
        buffer: Buffer = getattr(session, which)
        oldest = buffer.total - len(buffer.entries)
        start = min(max(cursor, oldest), buffer.total)
        chunks = buffer.entries[start - oldest :][:limit]
        end = start + len(chunks)
        return {
            "chunks": chunks,
            "cursor": end,
            "dropped": max(0, oldest - cursor),
            "lost": max(0, cursor - buffer.total),
            "ended": session.ended and end == buffer.total,
            "deleted": False,
        }

    def follow_output(self, worker: Worker, session_id: str, cursor: int = 0) -> Any:
        return self._follow(session_id, "output", cursor)

    def follow_errors(self, worker: Worker, session_id: str, cursor: int = 0) -> Any:
        return self._follow(session_id, "error", cursor)

    def _follow(self, session_id: str, which: str, cursor: int) -> Any:
        """Of a session that has ended or is deleted: its one page."""
        if session_id in self.deleted:
            missed = max(0, self.deleted[session_id][which == "error"] - cursor)
            end = {"cursor": cursor + missed, "dropped": missed, "ended": True, "deleted": True}
            return [end | {"chunks": [], "lost": 0}]
        session = self._get(session_id)
        assert session.ended
        return [self._page(session, which, cursor)]

    def update_metadata(
        self, worker: Worker, session_id: str, metadata: Mapping[str, str | None]
    ) -> None:
        session = self._get(session_id)
        to_set = {name: value for name, value in metadata.items() if value is not None}
        after = {n: v for n, v in session.metadata.items() if n not in metadata} | to_set
        if to_set and len(after) > MOST_NAMES:
            raise RefusedError("METADATA_LIMIT", session_id=session_id, limit=MOST_NAMES)
        session.metadata = after
        session.touched.add("nothing")

    def ping(self, worker: Worker) -> bool:
        return True

    def drift(self, worker: Worker) -> Any:
        return dict.fromkeys(("sessions", "by_status", "by_type", "by_time"), len(self.sessions))

    def reap(
        self,
        worker: Worker,
        *,
        idle_for: float | None = None,
        ended_for: float | None = None,
        limit: int = 100,
        dry_run: bool = False,
    ) -> Any:
        ended_for = worker.retention if ended_for is None else ended_for
        told: list[dict[str, Any]] = []
        for partition in self.partitions:
            told += self._reap_leases(partition, worker, limit, dry_run=dry_run)
            if idle_for is not None:
                told += self._reap_idle(partition, worker, idle_for, limit, dry_run=dry_run)
            for session in self._expired(partition, ended_for, limit):
                told.append(_reaped(session, "deleted"))
                if not dry_run:
                    self._remove(session, worker)
        return told

    def _reap_leases(
        self, partition: str, worker: Worker, limit: int, *, dry_run: bool
    ) -> list[dict[str, Any]]:
        held = [s for s in self._of(partition) if s.owner is not None]
        held.sort(key=lambda s: (s.expires_ms, s.id))
        grace_ms, told = worker.reap_grace * 1000, list[dict[str, Any]]()
        marked = lost = 0
        for session in held:
            if session.is_live(self.now_us):
                continue
            age = None if session.marked_ms is None else self.now_us / 1000 - session.marked_ms
            if age is None or age > 3 * grace_ms:
                if marked < limit:
                    marked += 1
                    told.append(_reaped(session, "marked", owner=session.owner))
                    if not dry_run:
                        session.touched.add("marked")
            elif age >= grace_ms and lost < limit:
                lost += 1
                told.append(_reaped(session, "lost", owner=session.owner))
                if not dry_run:
                    self._lose(session, worker)
        return told

    def _lose(self, session: Session, worker: Worker) -> None:
        old, owner, expired = session.status, session.owner, session.expires_ms
        assert owner is not None
        assert expired is not None
        session.move("error")
        session.end_lease()
        line = (
            f"worker {owner} was lost: its lease expired at {iso(expired * 1000)}; "
            f"ended by {worker.name}"
        )
        session.error.add([line], worker.buffer_limit, worker.buffer_bytes)
        self._tell(session, worker, "lease_expired", owner=owner, old_status=old, status="error")

    def _reap_idle(
        self, partition: str, worker: Worker, idle_for: float, limit: int, *, dry_run: bool
    ) -> list[dict[str, Any]]:
        first, last = self.reaping.get(partition, (0, ""))
        heads = [
            s
            for s in self._of(partition)
            if not s.ended and first <= s.last_us <= self.now_us - idle_for * S
        ]
        heads.sort(key=lambda s: (s.last_us, s.id))
        told = list[dict[str, Any]]()
        stopped: tuple[int, str] | None = None
        for session in heads:
            if len(told) == limit:
                break
            stopped = session.last_us, session.id
            if session.id != last and session.owner is None:
                told.append(_reaped(session, "terminated"))
                if not dry_run:
                    old = session.status
                    session.move("terminated")
                    self._tell(
                        session, worker, "status_changed", old_status=old, status="terminated"
                    )
        if not dry_run:
            self.reaping.pop(partition, None)
            if len(told) == limit and stopped is not None:
                self.reaping[partition] = stopped
        return told

    # ---- Leases ------------------------------------------------------------------------------

    def claim(
        self,
        worker: Worker,
        session_id: str,
        *,
        ttl: float = 30.0,
        expected: str | Iterable[str] = ("active",),
    ) -> Lease:
        session = self._get(session_id)
        if session.is_live(self.now_us):
            raise self._busy(session)
        wanted = (expected,) if isinstance(expected, str) else expected
        if session.owner is None and session.status not in wanted:
            raise RefusedError("SESSION_NOT_ACTIVE", session_id=session_id, status=session.status)
        old = session.status
        session.move("busy")
        if session.owner is not None:
            self._tell(session, worker, "lease_expired", owner=session.owner)
        session.end_lease()
        session.owner, session.ttl_ms = worker.name, round(ttl * 1000)
        session.touched |= {"last", "fence", "expires"}
        self._tell(session, worker, "claimed", old_status=old, status="busy", owner=worker.name)
        before = worker.held.get(session_id)
        if before is not None:
            worker.lose(before, owner=worker.name)
        lease = worker.held[session_id] = Lease(session_id, None, session.ttl_ms)
        return lease

    def renew(self, worker: Worker, lease: Lease) -> None:
        lease.refuse_if_over()
        session = self.sessions.get(lease.session_id)
        if session is not None and session.owner and session.fence == lease.fence:
            session.marked_ms, session.ttl_ms = None, lease.ttl_ms
            session.touched.add("expires")
            return
        status, owner = (session.status, session.owner) if session else (None, None)
        worker.lose(lease, status=status, owner=owner)
        assert lease.lost is not None
        raise lease.lost

    def release(self, worker: Worker, lease: Lease, status: str = "active") -> None:
        if lease.lost is not None:
            worker.forget(lease)
        if not lease.released:
            lease.refuse_if_over()
            try:
                self.update_status(worker, lease.session_id, status)
            except RefusedError:
                worker.forget(lease)
                raise

    def leave(self, worker: Worker, lease: Lease, error: str | None) -> None:
        """What the end of the ``with`` does; ``error``: what is told of an exception."""
        if lease.released or lease.abandoned:
            return
        try:
            if lease.lost is None and error is not None:
                self.add_error(worker, lease.session_id, error)
            if lease.lost is None:
                self.update_status(worker, lease.session_id, "active")
        except RefusedError:
            pass
        worker.forget(lease)
        if lease.lost is not None and lease.lost.attributes["owner"] and error is None:
            raise lease.lost

    def abandon(self, worker: Worker, lease: Lease) -> None:
        lease.abandoned = True
        worker.forget(lease)

    # ---- What several of them share ----------------------------------------------------------

    def _get(self, session_id: str) -> Session:
        if session_id not in self.sessions:
            raise RefusedError("SESSION_NOT_FOUND", session_id=session_id)
        return self.sessions[session_id]

    def _of(self, partition: str) -> list[Session]:
        return [s for s in self.sessions.values() if s.partition == partition]

    def _busy(self, session: Session) -> RefusedError:
        assert session.expires_ms is not None
        return RefusedError(
            "SESSION_BUSY",
            session_id=session.id,
            status=session.status,
            owner=session.owner,
            expires_us=session.expires_ms * 1000,
        )

    def _pass_fence(self, session_id: str, lease: Lease | None, *, force: bool = False) -> None:
        session = self.sessions[session_id]
        if force:
            return
        if lease is not None:
            if session.owner is None or session.fence != lease.fence:
                raise RefusedError(
                    "LEASE_LOST",
                    session_id=session_id,
                    status=session.status,
                    owner=session.owner,
                )
        elif session.is_live(self.now_us):
            raise self._busy(session)

    def _expired(self, partition: str, seconds: float, most: int) -> list[Session]:
        found = [
            session
            for session in self._of(partition)
            if session.ended_us is not None and session.ended_us <= self.now_us - seconds * S
        ]
        return sorted(found, key=lambda s: (s.ended_us, s.id))[:most]

    def _remove(self, session: Session, worker: Worker) -> None:
        del self.sessions[session.id]
        totals = session.output.total, session.error.total
        self.deleted[session.id] = totals
        self._tell(
            session,
            worker,
            "deleted",
            old_status=session.status,
            output_total=str(totals[0]),
            error_total=str(totals[1]),
        )

    def _tell(self, session: Session, worker: Worker, event: str, **further: str) -> None:
        self.events.setdefault(session.id, []).append(
            {"event": event, "session_id": session.id, "type": session.type, "actor": worker.name}
            | further
        )


class _Told:
    """What a worker learns of its lease from the answer to a write that carried its fence."""

    def __init__(self, worker: Worker, lease: Lease | None, *, ends: bool = False) -> None:
        self.worker, self.lease, self.ends = worker, lease, ends

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, error: BaseException | None, traceback: Any) -> None:
        if self.lease is None:
            return
        if error is None and self.ends:
            self.lease.released, self.lease.lost = True, None
            self.worker.forget(self.lease)
        elif isinstance(error, RefusedError) and error.code == "LEASE_LOST":
            self.worker.lose(self.lease, **error.attributes)
        elif isinstance(error, RefusedError) and error.code == "SESSION_NOT_FOUND":
            self.worker.lose(self.lease)


def _reaped(session: Session, action: str, owner: str | None = None) -> dict[str, Any]:
    return {"session_id": session.id, "action": action, "status": session.status, "owner": owner}


def iso(us: int) -> str:
    """A time as it is stored."""
    moment = datetime(1970, 1, 1, tzinfo=UTC) + timedelta(microseconds=us)
    return moment.isoformat(timespec="microseconds").replace("+00:00", "Z")
