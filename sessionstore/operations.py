"""Every operation of a session store, once.

A method here checks its arguments and describes one round trip; it does no I/O. ``SessionStore``
shows these methods as blocking ones, ``AsyncSessionStore`` as coroutine functions, with the same
arguments, results and errors. What happens inside Redis is in ``lua/<operation>.lua``.

First the twelve methods of the TypeScript original, under their own names; then what goes beyond.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Literal

from sessionstore import arguments as check
from sessionstore import codec, following, reading
from sessionstore._call import Call, Feed, Live, Request, Several, stepwise, then
from sessionstore._operation import feed, operation
from sessionstore.acknowledged import Added
from sessionstore.doctor import Doctor, drift_of
from sessionstore.errors import SessionNotFoundError
from sessionstore.exporting import Export
from sessionstore.forking import no_fork_within
from sessionstore.keys import Keys, Keyspace, new_session_id
from sessionstore.listing import CREATED, Filters, Listing, Order, earliest_of_service
from sessionstore.models import (
    STATUSES,
    AgentSession,
    AgentSessionStatus,
    BufferPage,
    Drift,
    Problem,
    Reaped,
    SessionEvent,
    SessionMetrics,
)
from sessionstore.settings import StoreSettings

if TYPE_CHECKING:
    from sessionstore.holding import Leases

MOST_REAPED = 1000  # of each kind in one pass


class SessionOperations:
    """The operations; see the module."""

    settings: StoreSettings
    keyspace: Keyspace
    redact: Callable[[str], str] | None
    _leases: Leases

    # ---- The original ---------------------------------------------------------------------

    @operation
    def create_session(
        self,
        type: str,
        service_session_id: str,
        project_path: str,
        task_id: str | None = None,
        mcp_session_id: str | None = None,
        *,
        status: AgentSessionStatus = "active",
        metadata: Mapping[str, str] | None = None,
        unique: bool = False,
    ) -> Call[AgentSession]:
        """Create a session.

        Args:
            type: the agent, such as ``claude``: ``[a-z][a-z0-9_-]{0,31}``.
            service_session_id: the agent's own id of its session.
            project_path: the directory it works in.
            task_id: the task it works on.
            mcp_session_id: the MCP session it belongs to.
            status: the status it begins with.
            metadata: string fields of your own, as in ``update_metadata``.
            unique: refuse if a session that has not ended drives this service session.

        Raises:
            ServiceSessionInUseError: with ``unique``; names that session and its holder.
            UnknownSessionTypeError: the store accepts only other types.
            InvalidArgumentError: another argument breaks its rule.
        """
        type = check.session_type(type, self.settings.types)
        service_session_id = check.text("service_session_id", service_session_id)
        status = check.status("status", status)
        fields = {
            "service_session_id": service_session_id,
            "project_path": check.text("project_path", project_path, check.MAX_PATH_LENGTH),
        }
        session_id = new_session_id(type, service_session_id)
        keys = self.keyspace.of_session(session_id)
        indexes = [
            keys.by_type(type),
            keys.by_status(status),
            keys.by_service(service_session_id),
        ]
        if task_id is not None:
            fields["task_id"] = check.text("task_id", task_id)
            indexes.append(keys.by_task(fields["task_id"]))
        if mcp_session_id is not None:
            fields["mcp_session_id"] = check.text("mcp_session_id", mcp_session_id)
            indexes.append(keys.by_mcp(fields["mcp_session_id"]))
        noted = {name: v for name, v in check.metadata(metadata or {}).items() if v is not None}

        @no_fork_within
        def decode(reply: Any) -> AgentSession:
            created_at = codec.moment_of_us(int(codec.done(reply)))
            times = dict.fromkeys(("created_at", "last_activity", "read_at"), created_at)
            own = {"id": session_id, "type": type, "status": status, "metadata": noted}
            return AgentSession.model_validate(fields | own | times)

        stored = fields | {codec.METADATA_PREFIX + name: value for name, value in noted.items()}
        return Call(
            "create_session",
            keys=(
                keys.session(session_id),
                keys.sessions,
                keys.types,
                keys.activity,
                keys.ended,
                keys.events,
                keys.leases,
                *indexes,
            ),
            args=(
                session_id,
                keys.prefix,
                "1" if unique else "",
                status,
                type,
                self._leases.worker,
                _microseconds(self.settings.retention),
                *(part for pair in stored.items() for part in pair),
            ),
            decode=decode,
            lane=keys.lane,
        )

    @operation
    def get_session(self, session_id: str, *, tail: int | None = None) -> Request[AgentSession]:
        """Get a session, as one consistent snapshot.

        Args:
            session_id: the session.
            tail: how many of the newest entries of each buffer to load; None all, 0 none.

        Raises:
            SessionNotFoundError: there is no such session.
        """

        def found(session: AgentSession | None) -> AgentSession:
            if session is None:
                raise SessionNotFoundError.from_details({"session_id": session_id})
            return session

        return then(self._read(session_id, tail), found)

    @operation
    def find_session(
        self, session_id: str, *, tail: int | None = None
    ) -> Request[AgentSession | None]:
        """Find a session by its id: ``get_session`` that answers None instead of raising."""
        return self._read(session_id, tail)

    @operation
    def find_session_by_service_id(
        self, service_session_id: str, *, tail: int | None = None, live: bool = False
    ) -> Request[AgentSession | None]:
        """Find the earliest created session of a service session.

        Args:
            service_session_id: the agent's own id of its session.
            tail: as in ``get_session``.
            live: consider only sessions that have not ended.
        """
        service_session_id = check.text("service_session_id", service_session_id)
        keys = self.keyspace.of_service(service_session_id)
        return earliest_of_service(keys, service_session_id, live=live, tail=check.tail(tail))

    @operation
    def update_status(
        self,
        session_id: str,
        status: AgentSessionStatus,
        *,
        expected: AgentSessionStatus | Iterable[AgentSessionStatus] | None = None,
        force: bool = False,
    ) -> Call[None]:
        """Set a session's status; this is activity of the session.

        Any status but ``busy`` gives back a session that this worker has claimed.

        Args:
            session_id: the session.
            status: the new status.
            expected: the status, or statuses, that it must have now; None any.
            force: even if another worker holds it; this ends that worker's lease.

        Raises:
            SessionNotFoundError: there is no such session.
            SessionStatusError: its status is not among ``expected``; nothing was changed.
            SessionBusyError: another worker holds it; nothing was changed.
            LeaseLostError: this worker has claimed it and lost it; nothing was changed.
            WritesLostError: it holds it, and a failover has lost entries; nothing was changed.
        """
        keys, session_id = self._locate(session_id)
        status = check.status("status", status)
        fence = self._leases.fence_of(session_id)
        ends = force or status != "busy"
        return Call(
            "update_status",
            keys=(
                keys.session(session_id),
                keys.activity,
                keys.ended,
                keys.leases,
                keys.events,
                keys.by_status(status),
            ),
            args=(
                session_id,
                keys.prefix,
                "force" if force else fence,
                self._leases.worker,
                status,
                *(() if expected is None else check.statuses("expected", expected)),
            ),
            decode=self._leases.guarded(session_id, fence, _nothing, ends=ends),
            lane=keys.lane,
        )

    @operation
    def update_activity(self, session_id: str) -> Call[None]:
        """Mark a session as active now, by the server's clock.

        Raises:
            SessionNotFoundError: there is no such session.
        """
        keys, session_id = self._locate(session_id)
        return Call(
            "update_activity",
            keys=(keys.session(session_id), keys.activity),
            args=(session_id,),
            decode=_nothing,
            lane=keys.lane,
        )

    @operation
    def add_output(self, session_id: str, *chunks: str | bytes) -> Call[int]:
        """Append to a session's output; this is activity of the session.

        Args:
            session_id: the session.
            chunks: the entries, str or bytes (decoded as UTF-8 with replacement), at most
                10,000 in one call; either all of them are added or none.

        Returns:
            How many entries were ever added to this buffer.

        Raises:
            SessionNotFoundError: there is no such session.
            SessionBusyError: another worker holds it; nothing was added.
            LeaseLostError: this worker has claimed it and lost it; nothing was added.
            WritesLostError: it holds it, and a failover has lost entries; nothing was added.
        """
        return self._append("add_output", session_id, chunks)

    @operation
    def add_error(self, session_id: str, *chunks: str | bytes) -> Call[int]:
        """Append to a session's error buffer; otherwise as ``add_output``."""
        return self._append("add_error", session_id, chunks)

    @operation
    def delete_session(self, session_id: str, *, force: bool = False) -> Call[bool]:
        """Delete a session with its buffers.

        Args:
            session_id: the session.
            force: even if another worker holds it.

        Returns:
            True if it was deleted, False if there was no such session.

        Raises:
            SessionBusyError: another worker holds it; nothing was deleted.
            LeaseLostError: this worker has claimed it and lost it; nothing was deleted.
            WritesLostError: it holds it, and a failover has lost entries; nothing was deleted.
        """
        keys, session_id = self._locate(session_id)
        fence = self._leases.fence_of(session_id)
        return Call(
            "delete_session",
            keys=(
                keys.session(session_id),
                keys.output(session_id),
                keys.errors(session_id),
                keys.sessions,
                keys.activity,
                keys.ended,
                keys.leases,
                keys.types,
                keys.events,
            ),
            args=(
                session_id,
                keys.prefix,
                "force" if force else fence,
                self._leases.worker,
            ),
            decode=self._leases.guarded(
                session_id, fence, lambda reply: codec.done(reply) == "1", ends=True
            ),
            lane=keys.lane,
        )

    @operation
    def get_all_sessions(self, *, tail: int | None = None) -> Request[list[AgentSession]]:
        """Get all sessions in the order of their creation; ``tail`` as in ``get_session``."""
        return self._list(Filters(), tail=tail)

    @operation
    def get_sessions_by_type(
        self, type: str, *, tail: int | None = None
    ) -> Request[list[AgentSession]]:
        """Get the sessions of one agent type in the order of their creation."""
        return self._list(Filters(type=type), tail=tail)

    @operation
    def get_metrics(self) -> Request[SessionMetrics]:
        """Count the sessions by status and by type, at the same cost however many there are."""
        calls = [
            Call(
                "get_metrics",
                keys=(keys.sessions, keys.types),
                args=(keys.prefix, *STATUSES),
                decode=lambda reply: codec.metrics([reply]),
            )
            for keys in self.keyspace.all
        ]
        return calls[0] if len(calls) == 1 else Several(calls, codec.metrics)

    # ---- Beyond the original --------------------------------------------------------------

    @operation
    def find_sessions(
        self,
        *,
        type: str | None = None,
        status: AgentSessionStatus | Iterable[AgentSessionStatus] | None = None,
        task_id: str | None = None,
        mcp_session_id: str | None = None,
        service_session_id: str | None = None,
        owner: str | None = None,
        idle_for: float | None = None,
        order: Order = CREATED,
        limit: int | None = None,
        tail: int | None = 0,
    ) -> Request[list[AgentSession]]:
        """Find the sessions that match all of the filters given.

        Args:
            type: of this agent type.
            status: of this status, or of one of these.
            task_id: working on this task.
            mcp_session_id: belonging to this MCP session.
            service_session_id: driving this service session.
            owner: held by this worker.
            idle_for: without activity for at least so many seconds; of ended sessions, ended
                for at least so long.
            order: ``created``, or ``-last_activity`` for the latest active first, ended sessions
                by when they ended.
            limit: at most so many.
            tail: as in ``get_session``; buffers are not loaded unless asked for.
        """
        filters = Filters(
            type, status, task_id, mcp_session_id, service_session_id, owner, idle_for
        )
        return self._list(filters, order=order, limit=limit, tail=tail)

    @feed
    def iter_sessions(
        self,
        *,
        type: str | None = None,
        status: AgentSessionStatus | Iterable[AgentSessionStatus] | None = None,
        task_id: str | None = None,
        mcp_session_id: str | None = None,
        service_session_id: str | None = None,
        owner: str | None = None,
        idle_for: float | None = None,
        tail: int | None = 0,
    ) -> Feed[AgentSession, Any]:
        """Iterate over the sessions that match, in the order of their creation.

        They are read a page at a time while the iteration goes on, through a restart of the
        server too. A session that is there from start to end is given exactly once; one that is
        created or deleted meanwhile may or may not be given. The filters are those of
        ``find_sessions``.
        """
        filters = Filters(
            type, status, task_id, mcp_session_id, service_session_id, owner, idle_for
        )
        return self._listing(filters, tail=tail).feed()

    @feed
    def export_sessions(
        self,
        *,
        type: str | None = None,
        status: AgentSessionStatus | Iterable[AgentSessionStatus] | None = None,
        task_id: str | None = None,
        mcp_session_id: str | None = None,
        service_session_id: str | None = None,
        owner: str | None = None,
        idle_for: float | None = None,
    ) -> Feed[str, Any]:
        """Iterate over the lines of an export: the sessions that match, exactly as they are stored.

            with open("agents.jsonl", "w") as file:
                file.writelines(store.export_sessions())

        Each line is JSON and ends with a newline. They hold the sessions' fields, buffers,
        positions and times; ``import_sessions`` makes the same sessions of them. Nothing is
        changed, and workers go on meanwhile: each session is as it was when it was read. One that
        cannot be read is told of in its place, logged, and counted in the last line. The filters
        are those of ``find_sessions``.
        """
        filters = Filters(
            type, status, task_id, mcp_session_id, service_session_id, owner, idle_for
        )
        partitions = self._partitions_of(filters)
        number = self.settings.partitions
        return Export(self.settings.namespace, number, partitions, filters).feed()

    @operation
    def read_output(
        self, session_id: str, cursor: int = 0, limit: int = 1000
    ) -> Request[BufferPage]:
        """Read a page of a session's output, from an absolute position.

        Args:
            session_id: the session.
            cursor: the position to begin at, counted since the session began; go on with the
                ``cursor`` of the page before.
            limit: at most so many entries, 1 to 1,000; a page also ends at 1 MiB.

        Raises:
            SessionNotFoundError: there is no such session.
        """
        return self._read_buffer(session_id, "output", cursor, limit)

    @operation
    def read_errors(
        self, session_id: str, cursor: int = 0, limit: int = 1000
    ) -> Request[BufferPage]:
        """Read a page of a session's error buffer; otherwise as ``read_output``."""
        return self._read_buffer(session_id, "error", cursor, limit)

    @feed
    def follow_output(self, session_id: str, cursor: int = 0) -> Live[BufferPage, Any]:
        """Iterate over a session's output as it grows: what is stored, then what comes.

        Each entry comes exactly once, in order. A page says how many entries were ``dropped``
        before it, for a reader who is slower than the buffer's bounds. The last page has ``ended``:
        the session has ended and all is read; or it is ``deleted``, and ``dropped`` says how many
        entries went with it that had not been read.

        All that follow share one connection, which brings news; without it, and now and then
        anyway, a follower looks for itself. An outage of the store that is longer than a call's
        deadline raises redis-py's error; go on from the ``cursor`` of the last page.

        Args:
            session_id: the session.
            cursor: the position to begin at, as for ``read_output``.

        Raises:
            SessionNotFoundError: there is no such session, and no event that it was deleted.
        """
        return self._follow_buffer(session_id, "output", cursor)

    @feed
    def follow_errors(self, session_id: str, cursor: int = 0) -> Live[BufferPage, Any]:
        """Iterate over a session's error buffer as it grows; otherwise as ``follow_output``."""
        return self._follow_buffer(session_id, "error", cursor)

    @feed
    def watch(self, cursor: str | None = None) -> Live[SessionEvent, Any]:
        """Iterate over what happens to sessions, without an end.

        About the newest 10,000 events are kept in each partition. Events of one session come in
        order.

        Args:
            cursor: go on after the event that has this ``cursor``; ``"0"`` begins with the oldest
                event that is kept, None with what happens after the iteration has begun. If events
                after the cursor have been trimmed away, the next one has ``gap``.

        Raises:
            InvalidArgumentError: it is no event's cursor, or of another number of partitions.
        """
        return following.events(self.keyspace.all, cursor)

    @operation
    def update_metadata(self, session_id: str, metadata: Mapping[str, str | None]) -> Call[None]:
        """Set or remove string fields of your own: branch, model, pid, cost …

        This is not activity of the session.

        Args:
            session_id: the session.
            metadata: values by name, ``[A-Za-z0-9_.-]{1,64}``; None removes a name. A session has
                at most 64 names, a value at most 4 KiB.

        Raises:
            SessionNotFoundError: there is no such session.
            MetadataLimitError: it would have too many names; nothing was changed.
        """
        keys, session_id = self._locate(session_id)
        checked = check.metadata(metadata)
        to_set = {name: value for name, value in checked.items() if value is not None}
        return Call(
            "update_metadata",
            keys=(keys.session(session_id),),
            args=(
                session_id,
                check.MAX_METADATA_NAMES,
                len(to_set),
                *(p for n, v in to_set.items() for p in (codec.METADATA_PREFIX + n, v)),
                *(codec.METADATA_PREFIX + name for name in checked if name not in to_set),
            ),
            decode=_nothing,
            lane=keys.lane,
        )

    @operation
    def reap(
        self,
        *,
        idle_for: float | None = None,
        ended_for: float | None = None,
        limit: int = 100,
        dry_run: bool = False,
    ) -> Request[list[Reaped]]:
        """End what is dead, once; any worker may do so at any time.

        A session whose lease has expired is marked, and ended by a later pass unless its worker has
        renewed the lease: between one and three times ``reap_grace`` after the mark, for an older
        mark may be from before an outage in which nobody could renew. It becomes ``error``, with a
        line in its error buffer that names the lost worker. If a partition is away this raises; the
        others have been reaped.

        Args:
            idle_for: sessions that nobody holds and that have had no activity for so many seconds
                become ``terminated``; None leaves them alone.
            ended_for: sessions that ended so many seconds ago are deleted; None: after the
                ``retention`` of the store's settings, if it has one.
            limit: at most so many of each kind, 1 to 1,000, in each partition.
            dry_run: change nothing, tell what would be done.
        """
        if idle_for is not None:
            idle_for = check.seconds("idle_for", idle_for)
        ended_for = (
            self.settings.retention if ended_for is None else check.seconds("ended_for", ended_for)
        )
        check.whole("limit", limit, 1, MOST_REAPED)

        def script(keys: Keys, place: Sequence[str | int] = ()) -> Call[Any]:
            return Call(
                "reap",
                keys=(
                    keys.sessions,
                    keys.types,
                    keys.activity,
                    keys.ended,
                    keys.leases,
                    keys.events,
                    keys.reaping,
                ),
                args=(
                    keys.prefix,
                    self._leases.worker,
                    round(self.settings.reap_grace * 1000),
                    _microseconds(idle_for),
                    _microseconds(ended_for),
                    limit,
                    "1" if dry_run else "",
                    self.settings.buffer_limit,
                    self.settings.buffer_bytes,
                    *place,
                ),
                decode=codec.reaped,
                lane=keys.lane,
            )

        def in_each(partitions: Sequence[tuple[Keys, Sequence[str | int]]]) -> Request[list[Any]]:
            calls = [script(keys, place) for keys, place in partitions]
            if len(calls) == 1:
                return then(calls[0], lambda answer: [answer])
            return Several(calls, lambda replies: [codec.reaped(reply) for reply in replies])

        def rest(answers: list[Any]) -> Generator[Request[Any], Any, list[Reaped]]:
            """Script after script, where a partition has more to end than one script may."""
            told: list[Reaped] = []
            partitions = self.keyspace.all
            while True:
                told += [one for some, _ in answers for one in some]
                unfinished = [
                    (keys, place)
                    for keys, (_, place) in zip(partitions, answers, strict=True)
                    if place
                ]
                if not unfinished:
                    return told
                partitions = tuple(keys for keys, _ in unfinished)
                answers = yield in_each(unfinished)

        return stepwise(in_each([(keys, ()) for keys in self.keyspace.all]), rest)

    @feed
    def check(self) -> Feed[Problem, Any]:
        """Look for what disagrees between sessions and indexes; change nothing.

        Each session is judged as it is at one moment, so workers may go on writing meanwhile. The
        server's settings and the namespace's layout are looked at too: this works where no store
        could be opened. A session that is there from start to end is examined.
        """
        return Doctor(self.keyspace, self.settings, repairs=False).feed()

    @feed
    def repair(self) -> Feed[Problem, Any]:
        """Mend what ``check`` would find, while workers write, and tell it.

        The hash of a session is the truth; indexes are made to follow it, in the script that finds
        that they do not. What no session accounts for is set aside under ``quarantine``, never
        destroyed. Mending goes on as the iterator does; what was not reached is left as it was, and
        a second run finds only what repair leaves to people (``mendable`` is False).
        """
        return Doctor(self.keyspace, self.settings, repairs=True).feed()

    @operation
    def drift(self) -> Request[Drift]:
        """Count all sessions in several ways, at the same cost however many there are.

        They differ only if an index has been damaged: a cheap sign that ``check`` is due.
        """
        return drift_of(self.keyspace)

    @operation
    def ping(self) -> Call[bool]:
        """True if the server answers and runs scripts; redis-py's exception if it does not."""
        return Call("ping", keys=(self.keyspace.meta,), args=(), decode=bool)

    # ---- What several of them share -------------------------------------------------------

    def _locate(self, session_id: str) -> tuple[Keys, str]:
        """The keys of the partition that a session is in, and its id, checked."""
        session_id = check.text("session_id", session_id)
        return self.keyspace.of_session(session_id), session_id

    def _read(self, session_id: str, tail: int | None) -> Request[AgentSession | None]:
        """One session, whole or with the newest entries of its buffers."""
        keys, session_id = self._locate(session_id)
        if check.tail(tail) == 0:
            return reading.without_buffers(keys, session_id)
        return reading.whole(keys, session_id, tail)

    def _append(
        self,
        script: Literal["add_output", "add_error"],
        session_id: str,
        chunks: tuple[str | bytes, ...],
    ) -> Call[int]:
        if type(session_id) is not str:  # nothing that a cache could not look up
            session_id = check.text("session_id", session_id)
        keys, lane = _appended_to(self.keyspace, script, session_id)
        texts = check.chunks(chunks, self.redact, self.settings.chunk_limit)
        fence = self._leases.fence_of(session_id)
        decode: Callable[[Any], int] = _total
        if fence:
            added = Added("output" if script == "add_output" else "error", len(texts))
            decode = self._leases.guarded(session_id, fence, _total, added=added)
        return Call(
            script,
            keys,
            (
                session_id,
                self.settings.buffer_limit,
                self.settings.buffer_bytes,
                fence,
                *texts,
            ),
            decode,
            lane,
        )

    def _read_buffer(
        self, session_id: str, buffer: reading.Buffer, cursor: int, limit: int
    ) -> Request[BufferPage]:
        def found(page: BufferPage | None) -> BufferPage:
            if page is None:
                raise SessionNotFoundError.from_details({"session_id": session_id})
            return page

        keys, session_id = self._locate(session_id)
        check.whole("cursor", cursor, 0)
        check.whole("limit", limit, 1, reading.MOST_ENTRIES)
        return then(reading.buffer_page(keys, session_id, buffer, cursor, limit), found)

    def _follow_buffer(
        self, session_id: str, buffer: reading.Buffer, cursor: int
    ) -> Live[BufferPage, Any]:
        keys, session_id = self._locate(session_id)
        return following.buffer(keys, session_id, buffer, check.whole("cursor", cursor, 0))

    def _listing(
        self,
        filters: Filters,
        *,
        order: Order = CREATED,
        limit: int | None = None,
        tail: int | None = None,
    ) -> Listing:
        return Listing(self._partitions_of(filters), filters, order, limit, tail)

    def _partitions_of(self, filters: Filters) -> tuple[Keys, ...]:
        """Where sessions may be that match: only a service session's id tells the partition."""
        service = filters.service_session_id
        return self.keyspace.all if service is None else (self.keyspace.of_service(service),)

    def _list(
        self,
        filters: Filters,
        *,
        order: Order = CREATED,
        limit: int | None = None,
        tail: int | None = None,
    ) -> Request[list[AgentSession]]:
        """All sessions that match, page after page."""
        return self._listing(filters, order=order, limit=limit, tail=tail).feed().collect()


def _microseconds(seconds: float | None) -> int | str:
    return "" if seconds is None else round(seconds * 1_000_000)


@lru_cache(maxsize=4096)
def _appended_to(
    keyspace: Keyspace, script: str, session_id: str
) -> tuple[tuple[str, ...], Callable[[str], str]]:
    """The keys of an append and their lane's, kept for sessions that are written to again."""
    session_id = check.text("session_id", session_id)
    keys = keyspace.of_session(session_id)
    buffer = keys.output if script == "add_output" else keys.errors
    return (keys.session(session_id), buffer(session_id), keys.activity), keys.lane


def _total(reply: Any) -> int:
    return int(codec.done(reply))


def _nothing(reply: Any) -> None:
    codec.done(reply)
