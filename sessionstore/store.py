"""The stores: where requests are carried out, blocking or on an event loop.

``SessionStore`` and ``AsyncSessionStore`` show the operations of ``operations.py``. Only how a
request travels differs, and it stands here twice, side by side. Sending a request again is always
safe: a read changes nothing, and a write carries the token of its lane (``lanes.py``).
"""

from __future__ import annotations

import asyncio
import atexit
import logging
import time
from collections.abc import (
    AsyncIterable,
    AsyncIterator,
    Awaitable,
    Callable,
    Coroutine,
    Iterable,
    Iterator,
    Sequence,
)
from contextlib import AbstractAsyncContextManager, nullcontext, suppress
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Self, TypeVar, Unpack, cast

import redis
import redis.asyncio
from redis.client import NEVER_DECODE
from redis.exceptions import (
    MovedError,
    NoPermissionError,
    NoScriptError,
    OutOfMemoryError,
    RedisError,
)

from sessionstore import connecting, lease, opening, writer, writing
from sessionstore._call import (
    REQUESTS,
    Call,
    Feed,
    Live,
    Request,
    Several,
    Snapshot,
    Steps,
    Together,
)
from sessionstore._operation import AsyncExecutor, SyncExecutor
from sessionstore.attempts import (
    ATTEMPTS_SHARE,
    POOL_WAIT_SHARE,
    REPLICAS_SECONDS,
    REPLICAS_SHARE,
    Attempts,
)
from sessionstore.batch import AsyncBatch, Batch, Sender
from sessionstore.clusters import TaskCluster, ThreadCluster
from sessionstore.coalescing import LARGE_REPLIES, Coalescer
from sessionstore.errors import (
    InvalidArgumentError,
    OutcomeUnknownError,
    SessionStoreError,
    is_transient,
    own_copy,
)
from sessionstore.importing import Existing, Import
from sessionstore.keys import Keyspace
from sessionstore.lanes import Lane, Lanes
from sessionstore.lease import DEFAULT_TTL, AsyncClaim, Lease, TaskLeases, ThreadLeases
from sessionstore.models import AgentSessionStatus, Imported
from sessionstore.news import TaskNews, ThreadNews
from sessionstore.operations import SessionOperations
from sessionstore.pipelining import (
    Command,
    Replication,
    Rounds,
    Single,
    Words,
    answer,
    answers,
    commands,
    encoded,
)
from sessionstore.scripts import load
from sessionstore.settings import SettingsArguments, StoreSettings
from sessionstore.writer import AsyncWriter, Writer

logger = logging.getLogger("sessionstore")

T = TypeVar("T")
C = TypeVar("C")

#: Replies are left in bytes by a client that decodes them, perhaps strictly: of a pipeline, one
#: byte that is no UTF-8 would spoil the replies to all.
_LEFT_IN_BYTES: dict[str, Any] = {NEVER_DECODE: True}


@dataclass(frozen=True, slots=True)
class Pending:
    """A write whose outcome is unknown: all it takes to send exactly it again."""

    store: _Store
    request: Request[Any]
    lane: Lane


class _Store(SessionOperations):
    """What both stores have, apart from I/O."""

    _in_bytes: dict[str, Any]  # an option of each command
    _on_cluster: bool
    _client: Any  # redis-py's own types are too loose to help: a command's reply is unknown

    def __init__(
        self, *, own_client: bool, redact: Callable[[str], str] | None, settings: StoreSettings
    ) -> None:
        if redact is not None and not callable(redact):
            raise InvalidArgumentError.of("redact", "must be a function from str to str, or None")
        self.settings = settings
        self.keyspace = Keyspace(settings.namespace, settings.partitions)
        self.redact = redact
        self._own_client = own_client
        self._lanes = Lanes()
        self._checked = self._has_been_checked = False
        self._warned_of = ""
        self._may_load_scripts = True
        self._closed = False

    def __repr__(self) -> str:
        return f"<{type(self).__name__} of namespace {self.settings.namespace!r}>"

    @property
    def worker(self) -> str:
        """This worker's name, ``host:pid`` or ``host:pid:label``: the owner of what it claims."""
        return self._leases.worker

    def _attempts(self, request: Request[Any], began: float, *, is_repeat: bool) -> Attempts:
        is_write = request.lane is not None
        match request:
            case Call():
                what = request.script
            case Several():
                what = request.calls[0].script
            case Snapshot():
                what = "get_session"
            case Together():
                attempts: Attempts = request.attempts
                return attempts
        deadline = self.settings.deadline if self._own_client else None
        return Attempts(what, deadline, is_write, began, may_have_run=is_repeat)

    def _turn_by(self, began: float, share: float = ATTEMPTS_SHARE) -> float | None:
        """Until when a call may wait for its turn, by default as long as attempts may begin."""
        return began + self.settings.deadline * share if self._own_client else None

    def _sender(self) -> Sender:
        """What a batch needs."""
        return Sender(
            operations=self,
            leases=self._leases,
            lanes=self._lanes,
            attempts=lambda is_write: Attempts(
                "batch",
                self.settings.deadline if self._own_client else None,
                is_write,
                time.monotonic(),
            ),
            pending=lambda request, lane: Pending(self, request, lane),
        )

    def _apart(self, calls: Sequence[Call[None]]) -> Steps[list[Exception | None]]:
        """Try writes in one round trip, once; for each what it failed with, if it did."""
        once = Attempts("renew", None, is_write=False, began=time.monotonic())
        lanes = [self._lanes.take() for _ in calls]
        try:
            sent = list(zip(calls, lanes, strict=True))
            replies: list[Any] = yield Together(sent, once, lambda replies: replies)
        finally:
            for lane in lanes:
                self._lanes.give_back(lane)
        return [_failure(call, reply) for call, reply in zip(calls, replies, strict=True)]

    def _sent_as(self, request: Request[Any]) -> Any:
        """The request itself; on a cluster the script in place of a MULTI."""
        return request.instead if isinstance(request, Snapshot) and self._on_cluster else request

    def _commands(self, request: Single, lane: Lane | None) -> list[Command]:
        return commands(request, lane, is_guarded=self._on_cluster)

    def _in_order(self, sent: Iterable[Iterable[Command]]) -> Rounds:
        return Rounds(
            [one for several in sent for one in several],
            in_order=True,
            may_load=self._may_load_scripts,
            replication=self._replication,
        )

    def _rounds(self, commands: Sequence[Command]) -> Rounds:
        return Rounds(commands, replication=self._replication)

    def _waits(self, one: Command) -> bool:
        return one.waits and self._replication is not None

    @cached_property
    def _replication(self) -> Replication | None:
        """What each write waits for; asked for when it is known whose the client is."""
        if not self.settings.wait_replicas:
            return None
        most = self.settings.deadline if self._own_client else REPLICAS_SECONDS
        timeout = connecting.read_timeout(self._client)
        seconds = most if timeout is None else min(most, timeout * REPLICAS_SHARE)
        return Replication(self.settings.wait_replicas, max(round(seconds * 1000), 1))

    def _refuse_replicas_on_cluster(self) -> None:
        if self._on_cluster and self.settings.wait_replicas:
            raise InvalidArgumentError.of(
                "wait_replicas", "must be 0 on a Redis Cluster: it is for one primary"
            )

    def _importing(self, lines: object, existing: Existing, *, dry_run: bool) -> Import:
        self._refuse_if_closed()
        if isinstance(lines, (str, bytes)):
            raise InvalidArgumentError.of("lines", "must be several, such as an open file")
        return Import(self.keyspace, self.settings, self.worker, existing, dry_run=dry_run)

    def _refuse_if_closed(self) -> None:
        if self._closed:
            raise SessionStoreError("this store has been closed")

    def _settle(
        self, error: BaseException, request: Request[Any], lane: Lane, *, is_repeat: bool
    ) -> None:
        """Keep the lane of a write whose outcome is unknown; let others have it otherwise."""
        if isinstance(error, OutcomeUnknownError):
            error.pending = Pending(self, request, lane)
        elif isinstance(error, Exception) or not is_repeat:  # a repeat may be cancelled
            self._lanes.give_back(lane)

    def _take_pending(self, error: OutcomeUnknownError) -> Pending:
        pending = getattr(error, "pending", None)
        if not isinstance(pending, Pending) or pending.store is not self:
            raise InvalidArgumentError.of("error", "is not of this store, or was repeated already")
        if not pending.lane.is_repeatable:
            raise InvalidArgumentError.of(
                "error", "is over nine minutes old: sending its write again is not safe any more"
            )
        error.pending = None
        return pending

    def _must_open(self, request: Request[Any]) -> bool:
        self._refuse_if_closed()
        return not request.unopened

    def _opening(self) -> list[Words]:
        """The commands that are sent before all others: what they tell, ``_check_opened`` reads."""
        (opened,) = self._commands(opening.open_store(self.keyspace, self.settings), None)
        words = [opened.eval, opening.INFO, ("SCRIPT", "LOAD", load("ping").text)]
        return words if self._replication is None else [*words, opening.WAIT]

    def _check_opened(self, replies: list[Any]) -> None:
        meta, info, loaded, *waited = replies
        self._may_load_scripts = not isinstance(loaded, NoPermissionError)
        if isinstance(meta, MovedError):
            raise InvalidArgumentError.of(
                "cluster", "must be true: this server is a node of a Redis Cluster"
            ) from meta
        if not isinstance(meta, Exception):
            if meta:
                opening.check_layout(meta, self.settings)
        elif not (self._on_cluster and self._has_been_checked and is_transient(meta)):
            raise meta  # else the one node that has it is away, and others need not wait for it
        for reply in waited:
            opening.check_wait(reply)
        warning = opening.check_server(info, self.settings)
        if warning and warning != self._warned_of:  # once, however often connections fail
            logger.warning(warning)
        self._warned_of = warning
        # Who may only read and comes before all workers sees no layout yet, and looks again.
        self._checked = bool(meta)
        self._has_been_checked |= self._checked


def _failure(call: Call[None], reply: Any) -> Exception | None:
    if isinstance(reply, Exception):
        return reply
    try:
        call.decode(reply)
    except SessionStoreError as error:
        return error
    return None


class SessionStore(_Store, SyncExecutor):
    """The session store for threads.

    Share one among all threads of a process; close it at the end, or use it in a ``with``.

    Args:
        client: a ``redis.Redis`` of yours, used as it is and never closed. None: connect to the
            URL in ``SESSIONSTORE_URL``.
        redact: called with every chunk before it leaves the process, returns what is stored.
        settings: see ``StoreSettings``.
    """

    def __init__(
        self,
        client: redis.Redis | redis.RedisCluster | None = None,
        *,
        redact: Callable[[str], str] | None = None,
        **settings: Unpack[SettingsArguments],
    ) -> None:
        loaded = StoreSettings.load(**settings)
        super().__init__(own_client=client is None, redact=redact, settings=loaded)
        self._leases = ThreadLeases(self, self, self._apart, loaded.worker)
        self._client = (
            connecting.connect(connecting.url_from_environment(), loaded)
            if client is None
            else connecting.accepted(client)
        )
        self._on_cluster = isinstance(self._client, ThreadCluster)
        self._refuse_replicas_on_cluster()
        self._news = ThreadNews(self._client, self.keyspace.news)
        self._in_bytes = _LEFT_IN_BYTES if connecting.decodes(self._client) else {}

    @classmethod
    def from_url(
        cls,
        url: str,
        *,
        redact: Callable[[str], str] | None = None,
        **settings: Unpack[SettingsArguments],
    ) -> Self:
        """A store with a client of its own: blocking pool, retries, one deadline per call.

        Args:
            url: ``redis://``, ``rediss://`` or ``unix://``, as redis-py takes it, or
                ``redis+sentinel://HOST[:PORT],…/SERVICE`` (``rediss+sentinel://`` over TLS).
            redact: see the class.
            settings: see ``StoreSettings``.
        """
        store = cls(
            connecting.connect(url, StoreSettings.load(**settings)), redact=redact, **settings
        )
        store._own_client = True
        return store

    def claim(
        self,
        session_id: str,
        *,
        ttl: float = DEFAULT_TTL,
        wait: float = 0.0,
        expected: AgentSessionStatus | Iterable[AgentSessionStatus] = ("active",),
    ) -> Lease:
        """Make a session this worker's, and ``busy``, until it is given back.

        Use it as ``with store.claim(session_id) as lease:``, or keep the lease and release it.
        Meanwhile it is renewed in the background, and other workers' writes to the session are
        refused. One worker is one store object: its threads share its leases.

        Args:
            session_id: the session.
            ttl: seconds that the lease lasts when it is not renewed, 0.1 to 86,400. A worker that
                dies keeps the session for so long.
            wait: seconds to go on trying while another worker holds the session, or its status is
                not among ``expected`` and may come to be.
            expected: the status, or statuses, that it must have; a session on which a lease has
                expired is taken in any case.

        Raises:
            SessionNotFoundError: there is no such session.
            SessionBusyError: another worker holds it; names the holder and how long for.
            SessionNotActiveError: its status is not among ``expected``.
            DurabilityError: it is held, and not renewed; ``repeat`` gives the lease.
        """
        claim = self._leases.claiming(session_id, ttl, wait, expected)
        lease: Lease = self.execute(claim) if isinstance(claim, Call) else self.carry(claim)
        return lease

    def batch(self) -> Batch:
        """Note operations and send them in one round trip, in order.

            with store.batch() as batch:
                added = batch.add_output(session_id, "done")
                batch.update_status(session_id, "terminated")
            added.result()

        The batch has the operations of the store; each returns an ``Outcome``, which has the
        operation's result or error once the ``with`` has been left.
        """
        return Batch(self._sender(), self)

    def writer(
        self,
        session_id: str,
        *,
        errors: bool = False,
        batch_bytes: int = writing.BATCH_BYTES,
        interval: float = writing.INTERVAL,
        max_pending: int = writing.MAX_PENDING,
        patience: float = writing.PATIENCE,
    ) -> Writer:
        """Open a session's output as a text file to write to; nothing is sent yet.

        Use it as ``with store.writer(session_id) as out: print("hello", file=out)``. Each line is
        an entry, without its newline; a last one without a newline is stored at the close. A line
        over 64 KiB (or over ``chunk_limit``) is stored in pieces. What is written is sent in the
        background, in order and once, as by ``add_output``, and under this worker's lease if there
        is one. What could not be stored is told by a later ``write``, ``flush`` or ``close``: they
        raise the error of ``add_output``.

        ``store.close()`` closes its writers first, and so does the end of the interpreter.

        Args:
            session_id: the session.
            errors: write to its errors instead of its output.
            batch_bytes: so much is sent at once; bytes of UTF-8, and 16 for each write.
            interval: seconds that a write waits for others to go with it, at most 60.
            max_pending: bytes, counted in the same way; a write waits while there are so many to be
                sent.
            patience: seconds to go on trying while the store cannot be reached or its memory is
                full; 0: only for the deadline of one call.

        Raises:
            InvalidArgumentError: an argument breaks its rule.
        """
        self._refuse_if_closed()
        return Writer(
            self,
            writing.backlog(
                self,
                session_id,
                errors=errors,
                batch_bytes=batch_bytes,
                interval=interval,
                max_pending=max_pending,
                patience=patience,
            ),
        )

    def import_sessions(
        self, lines: Iterable[str | bytes], *, existing: Existing = "error", dry_run: bool = False
    ) -> Imported:
        """Make the sessions of an export, exactly as they were.

            with open("agents.jsonl") as file:
                store.import_sessions(file)

        The namespace may be another one, with another number of partitions. Each session appears
        in one step, with its buffers and in all indexes; memory is bounded however many there are.
        A session that is here already and is the same is left alone, so an import that was cut off
        is run again to go on. One that was held by a worker when it was exported comes with its
        owner and an expired lease: anybody may claim it at once, and a reaper ends it otherwise.
        ``redact`` and the bounds of buffers do not apply.

        Args:
            lines: those of ``export_sessions``, such as an open file.
            existing: what to do about a session that is here already and differs: ``error`` stops,
                ``skip`` leaves it as it is, ``replace`` puts the imported one in its place unless a
                worker holds it. The last two are told in the result.
            dry_run: change nothing, tell what would be done.

        Raises:
            ImportFormatError: this is no export, a newer one, or cut off or damaged.
            SessionExistsError: with ``existing="error"``.
            SessionBusyError: one that is to be replaced is held by a worker.
            ImportConflictError: another import of the same session is under way.
        """
        importing = self._importing(lines, existing, dry_run=dry_run)
        for line in lines:
            self.carry(importing.take(line))
        return self.carry(importing.finish())

    def execute(self, request: Request[T]) -> T:
        """Carry out a request, and those that follow from it."""
        return self._carry_out(request, None if request.lane is None else self._lanes.take())

    def carry(self, steps: Steps[T]) -> T:
        """Carry out step after step."""
        value: Any = None
        failure: Exception | None = None
        try:
            while True:
                step = steps.send(value) if failure is None else steps.throw(failure)
                value, failure = None, None
                if isinstance(step, (int, float)):
                    time.sleep(step)
                    continue
                try:
                    if isinstance(step, OutcomeUnknownError):
                        value = self.repeat(step)
                    else:
                        value = self.execute(step)
                except Exception as error:
                    failure = error
        except StopIteration as end:
            result: T = end.value
            return result
        finally:
            steps.close()

    def drain(self, feed: Feed[T, C]) -> Iterator[T]:
        """Give a feed's items, reading a page when the one before has been given."""
        cursor: C | None = feed.first
        while cursor is not None:
            page = self.execute(feed.page(cursor))
            yield from page.items
            cursor = page.cursor

    def follow(self, feed: Live[T, C]) -> Iterator[T]:
        """Give a feed's items, and wait for news of more."""
        cursor, began = feed.first, time.monotonic()
        may_speak_by = self._turn_by(began, POOL_WAIT_SHARE)
        with self._news.listening(feed.channels, may_speak_by) as listener:
            while True:
                listener.signal.clear()  # before reading: what comes from now on wakes it
                with self._news.turn(self._turn_by(began)):
                    page = self._carry_out(feed.page(cursor), None, began=began)
                yield from page.items
                if page.cursor is None:
                    return
                cursor = page.cursor
                listener.reached = feed.reached(cursor)
                if not page.items:
                    listener.signal.wait(self._news.patience(listener))
                began = time.monotonic()

    def _carry_out(
        self,
        request: Request[T],
        lane: Lane | None,
        *,
        is_repeat: bool = False,
        began: float | None = None,
    ) -> T:
        """Send a request until it is answered, and then those that follow from it."""
        while True:
            began, attempts = began or time.monotonic(), None
            may_have_run = is_repeat  # then it is not refused for what is found afterwards
            try:
                while True:
                    try:
                        if not self._checked and self._must_open(request) and not may_have_run:
                            self._open()
                        may_have_run = True
                        reply = self._send(request, lane)
                        break
                    except RedisError as error:
                        attempts = attempts or self._attempts(request, began, is_repeat=is_repeat)
                        time.sleep(attempts.pause_after(error))
            except BaseException as error:
                if lane is not None:
                    self._settle(error, request, lane, is_repeat=is_repeat)
                raise
            finally:
                if attempts is not None and attempts.were_cut_off:
                    self._checked = False  # another server may answer the next call
            if lane is not None:
                self._lanes.give_back(lane)
            result = request.decode(reply)
            if not isinstance(result, REQUESTS):
                return result
            request, is_repeat, began = cast("Request[T]", result), False, None
            lane = None if request.lane is None else self._lanes.take()

    def _send(self, request: Request[Any], lane: Lane | None) -> Any:
        request = self._sent_as(request)
        if isinstance(request, Call):
            (one,) = self._commands(request, lane)
            if self._waits(one):
                return answer(request, self._send_pipeline(self._rounds([one])))
            try:
                return self._client.execute_command(*one.evalsha, **self._in_bytes)
            except NoScriptError:
                return self._client.execute_command(*one.eval, **self._in_bytes)
        if isinstance(request, Several):
            return answer(request, self._send_pipeline(self._rounds(self._commands(request, lane))))
        if isinstance(request, Together):
            requests = [(self._sent_as(one), lane) for one, lane in request.requests]
            sent = [self._commands(*one) for one in requests]
            return answers(requests, sent, self._send_pipeline(self._in_order(sent)))
        try:
            with self._client.pipeline(transaction=True) as pipe:
                for words in request.commands:
                    pipe.execute_command(*words)
                return pipe.execute()
        except OutOfMemoryError:
            return self._send(request.instead, None)

    def _send_pipeline(self, rounds: Rounds) -> list[Any]:
        while to_send := rounds.following():
            with self._client.pipeline(transaction=False) as pipe:
                for words in to_send:
                    pipe.execute_command(*words, **self._in_bytes)
                try:
                    replies = pipe.execute(raise_on_error=False)
                except RedisError as error:
                    if not rounds.fail(error):
                        raise
                else:
                    rounds.take(replies)
        return rounds.replies

    def _open(self) -> None:
        self._refuse_if_closed()
        with self._client.pipeline(transaction=False) as pipe:
            for words in self._opening():
                pipe.execute_command(*words)
            self._check_opened(pipe.execute(raise_on_error=False))

    def repeat(self, error: OutcomeUnknownError) -> Any:
        """Send a write of unknown outcome again; it is carried out unless it already was.

        Returns:
            What the write would have returned.

        Raises:
            InvalidArgumentError: over nine minutes have passed, or it was repeated already.
            OutcomeUnknownError: still no answer; this new error can be repeated.
        """
        pending = self._take_pending(error)
        try:
            return self._carry_out(pending.request, pending.lane, is_repeat=True)
        except Exception:
            raise
        except BaseException:
            error.pending = pending  # interrupted: it can still be repeated
            raise

    def close(self) -> None:
        """Close its writers, give back the sessions it holds, and close its own connections.

        Raises:
            SessionStoreError: a writer could not store everything; the rest is done all the same.
            redis.RedisError: the same, of Redis itself.
        """
        failure: Exception | None = None
        for one in writer.closing(self):
            try:
                one.close()
            except Exception as error:
                failure = failure or error
        self._news.close()
        self.carry(self._leases.giving_all_back())
        self._closed, self._checked = True, False
        if self._own_client:
            self._client.close()
        if failure is not None:
            raise failure

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()


class AsyncSessionStore(_Store, AsyncExecutor):
    """The session store for asyncio: the same methods, awaited.

    Share one among all tasks of an event loop; close it at the end, or use it in an
    ``async with``. The arguments are those of ``SessionStore``, with a ``redis.asyncio.Redis``.
    """

    def __init__(
        self,
        client: redis.asyncio.Redis | redis.asyncio.RedisCluster | None = None,
        *,
        redact: Callable[[str], str] | None = None,
        **settings: Unpack[SettingsArguments],
    ) -> None:
        loaded = StoreSettings.load(**settings)
        super().__init__(own_client=client is None, redact=redact, settings=loaded)
        self._leases = self._tasks = TaskLeases(self, self, self._apart, loaded.worker)
        self._client = (
            connecting.connect_async(connecting.url_from_environment(), loaded)
            if client is None
            else connecting.accepted_async(client)
        )
        self._in_bytes = _LEFT_IN_BYTES if connecting.decodes(self._client) else {}
        self._on_cluster = isinstance(self._client, TaskCluster)
        self._refuse_replicas_on_cluster()
        #: Whether it was opened, or why not, for those who wait.
        self._being_opened: asyncio.Future[Exception | bool] | None = None
        self._news = TaskNews(self._client, self._publish, self.keyspace.news)
        self._coalescing = (
            Coalescer(
                self._send_alone,
                lambda several: self._send_pipeline(self._rounds(several)),
                connecting.connections_of(self._client),
                lambda: self._own_client,
            )
            if loaded.coalesce
            else None
        )

    @classmethod
    def from_url(
        cls,
        url: str,
        *,
        redact: Callable[[str], str] | None = None,
        **settings: Unpack[SettingsArguments],
    ) -> Self:
        """A store with a client of its own; see ``SessionStore.from_url``."""
        store = cls(
            connecting.connect_async(url, StoreSettings.load(**settings)), redact=redact, **settings
        )
        store._own_client = True
        return store

    def claim(
        self,
        session_id: str,
        *,
        ttl: float = DEFAULT_TTL,
        wait: float = 0.0,
        expected: AgentSessionStatus | Iterable[AgentSessionStatus] = ("active",),
    ) -> AsyncClaim:
        """Make a session this worker's; see ``SessionStore.claim``.

        Use it as ``async with store.claim(session_id) as lease:``, or
        ``lease = await store.claim(session_id)``. If the awaiting task is cancelled, the session is
        not held.
        """
        return AsyncClaim(self._tasks, self._leases.claiming(session_id, ttl, wait, expected))

    def batch(self) -> AsyncBatch:
        """Note operations and send them in one round trip; see ``SessionStore.batch``.

        Use it as ``async with store.batch() as batch:``; within, operations are not awaited.
        """
        return AsyncBatch(self._sender(), self)

    def writer(
        self,
        session_id: str,
        *,
        errors: bool = False,
        batch_bytes: int = writing.BATCH_BYTES,
        interval: float = writing.INTERVAL,
        max_pending: int = writing.MAX_PENDING,
        patience: float = writing.PATIENCE,
    ) -> AsyncWriter:
        """Open a session's output to write to; see ``SessionStore.writer``.

        Use it as ``async with store.writer(session_id) as out: await out.write("hello\\n")``.
        """
        self._refuse_if_closed()
        return AsyncWriter(
            self,
            writing.backlog(
                self,
                session_id,
                errors=errors,
                batch_bytes=batch_bytes,
                interval=interval,
                max_pending=max_pending,
                patience=patience,
            ),
        )

    async def import_sessions(
        self,
        lines: Iterable[str | bytes] | AsyncIterable[str | bytes],
        *,
        existing: Existing = "error",
        dry_run: bool = False,
    ) -> Imported:
        """Make the sessions of an export; see ``SessionStore.import_sessions``.

        ``lines`` may be asynchronous; the loop waits while a plain file is read.
        """
        importing = self._importing(lines, existing, dry_run=dry_run)
        if isinstance(lines, AsyncIterable):
            async for line in lines:
                await self.carry(importing.take(line))
        else:
            for line in lines:
                await self.carry(importing.take(line))
        return await self.carry(importing.finish())

    def execute(self, request: Request[T]) -> Coroutine[Any, Any, T]:
        """Carry out a request, and those that follow from it."""
        self._refuse_other_loop()
        return self._carry_out(request, None if request.lane is None else self._lanes.take())

    def _refuse_other_loop(self) -> None:
        """The loop of the first call is the store's: its connections cannot be used on another."""
        loop = asyncio.get_running_loop()
        # One step, so that of two loops in two threads only one can be first.
        if vars(self).setdefault("_loop", loop) is not loop:
            raise SessionStoreError(
                "this store belongs to another event loop; make one store per loop"
            )

    async def carry(
        self, steps: Steps[T], execute: Callable[[Request[Any]], Awaitable[Any]] | None = None
    ) -> T:
        """Carry out step after step."""
        execute = execute or self.execute
        value: Any = None
        failure: Exception | None = None
        try:
            while True:
                step = steps.send(value) if failure is None else steps.throw(failure)
                value, failure = None, None
                if isinstance(step, (int, float)):
                    await asyncio.sleep(step)
                    continue
                try:
                    if isinstance(step, OutcomeUnknownError):
                        value = await self.repeat(step)
                    else:
                        value = await execute(step)
                except Exception as error:
                    failure = error
        except StopIteration as end:
            result: T = end.value
            return result
        finally:
            steps.close()

    async def drain(self, feed: Feed[T, C]) -> AsyncIterator[T]:
        """Give a feed's items, reading a page when the one before has been given."""
        cursor: C | None = feed.first
        while cursor is not None:
            page = await self.execute(feed.page(cursor))
            for item in page.items:
                yield item
            cursor = page.cursor

    async def follow(self, feed: Live[T, C]) -> AsyncIterator[T]:
        """Give a feed's items, and wait for news of more."""
        self._refuse_other_loop()
        cursor, began = feed.first, time.monotonic()
        may_speak_by = self._turn_by(began, POOL_WAIT_SHARE)
        async with self._news.listening(feed.channels, may_speak_by) as listener:
            while True:
                listener.signal.clear()  # before reading: what comes from now on wakes it
                async with self._reading(began):
                    page = await self._carry_out(feed.page(cursor), None, began=began)
                for item in page.items:
                    yield item
                if page.cursor is None:
                    return
                cursor = page.cursor
                listener.reached = feed.reached(cursor)
                if not page.items:
                    with suppress(TimeoutError):
                        async with asyncio.timeout(self._news.patience(listener)):
                            await listener.signal.wait()
                began = time.monotonic()

    def _reading(self, began: float) -> AbstractAsyncContextManager[Any]:
        """Hundreds of followers need no more connections than a few."""
        if self._coalescing is not None:
            return nullcontext()
        return self._news.turn(self._turn_by(began))

    async def _carry_out(
        self,
        request: Request[T],
        lane: Lane | None,
        *,
        is_repeat: bool = False,
        began: float | None = None,
    ) -> T:
        """Send a request until it is answered, and then those that follow from it."""
        while True:
            began, attempts = began or time.monotonic(), None
            may_have_run = is_repeat  # then it is not refused for what is found afterwards
            try:
                while True:
                    try:
                        if not self._checked and self._must_open(request) and not may_have_run:
                            await self._open_together()
                        may_have_run = True
                        reply = await self._send(request, lane)
                        break
                    except RedisError as error:
                        attempts = attempts or self._attempts(request, began, is_repeat=is_repeat)
                        await asyncio.sleep(attempts.pause_after(error))
            except BaseException as error:
                if lane is not None:
                    self._settle(error, request, lane, is_repeat=is_repeat)
                raise
            finally:
                if attempts is not None and attempts.were_cut_off:
                    self._checked = False  # another server may answer the next call
            if lane is not None:
                self._lanes.give_back(lane)
            result = request.decode(reply)
            if not isinstance(result, REQUESTS):
                return result
            request, is_repeat, began = cast("Request[T]", result), False, None
            lane = None if request.lane is None else self._lanes.take()

    def _send(self, request: Request[Any], lane: Lane | None) -> Awaitable[Any]:
        request = self._sent_as(request)
        if isinstance(request, Call):
            if self._coalescing is None:
                return self._send_alone(*self._commands(request, lane))
            return self._coalescing.send(
                encoded(request, lane, is_guarded=self._on_cluster),
                has_large_reply=request.script in LARGE_REPLIES,
            )
        return self._send_several(request, lane)

    def _execute(self, *words: Any) -> Awaitable[Any]:
        reply: Awaitable[Any] = self._client.execute_command(*words, **self._in_bytes)
        return reply

    async def _send_alone(self, one: Command) -> Any:
        if self._waits(one):
            (reply,) = await self._send_pipeline(self._rounds([one]))
            if isinstance(reply, Exception):
                raise reply
            return reply
        try:
            return await self._execute(*one.evalsha)
        except NoScriptError:
            return await self._execute(*one.eval)

    async def _send_several(
        self, request: Several[Any] | Together[Any] | Snapshot[Any], lane: Lane | None
    ) -> Any:
        if self._coalescing is None:
            return await self._send_at_once(request, lane)
        async with self._coalescing.alone():
            return await self._send_at_once(request, lane)

    async def _send_at_once(
        self, request: Several[Any] | Together[Any] | Snapshot[Any], lane: Lane | None
    ) -> Any:
        if isinstance(request, Several):
            rounds = self._rounds(self._commands(request, lane))
            return answer(request, await self._send_pipeline(rounds))
        if isinstance(request, Together):
            requests = [(self._sent_as(one), lane) for one, lane in request.requests]
            sent = [self._commands(*one) for one in requests]
            return answers(requests, sent, await self._send_pipeline(self._in_order(sent)))
        try:
            async with self._client.pipeline(transaction=True) as pipe:
                for words in request.commands:
                    pipe.execute_command(*words)
                return await pipe.execute()
        except OutOfMemoryError:
            return await self._send(request.instead, None)

    async def _send_pipeline(self, rounds: Rounds) -> list[Any]:
        while to_send := rounds.following():
            async with self._client.pipeline(transaction=False) as pipe:
                for words in to_send:
                    pipe.execute_command(*words, **self._in_bytes)
                try:
                    replies = await pipe.execute(raise_on_error=False)
                except RedisError as error:
                    if not rounds.fail(error):
                        raise
                else:
                    rounds.take(replies)
        return rounds.replies

    async def _publish(self, channel: str, by: float | None) -> None:
        """A word to oneself; it takes no more connections than those who follow."""
        if self._coalescing is not None:
            await self._coalescing.send(Command(None, ("PUBLISH", channel.encode(), b"")))
        else:
            async with self._news.turn(by):
                await self._client.publish(channel, "")

    async def _open_together(self) -> None:
        """Open the store once for all tasks that wait for it: each would take a connection.

        If the task that does so is cancelled, another one does.
        """
        while self._being_opened is not None:
            told = await asyncio.shield(self._being_opened)  # cancelled, it leaves it alone
            if isinstance(told, Exception):
                raise own_copy(told)
            if told:
                return
        self._being_opened = being_opened = asyncio.get_running_loop().create_future()
        outcome: Exception | bool = False
        try:
            await self._open()
            outcome = True
        except Exception as error:
            outcome = error
            raise
        finally:
            self._being_opened = None
            being_opened.set_result(outcome)

    async def _open(self) -> None:
        self._refuse_if_closed()
        async with self._client.pipeline(transaction=False) as pipe:
            for words in self._opening():
                pipe.execute_command(*words)
            self._check_opened(await pipe.execute(raise_on_error=False))

    async def repeat(self, error: OutcomeUnknownError) -> Any:
        """Send a write of unknown outcome again; see ``SessionStore.repeat``."""
        self._refuse_other_loop()
        pending = self._take_pending(error)
        try:
            return await self._carry_out(pending.request, pending.lane, is_repeat=True)
        except Exception:
            raise
        except BaseException:
            error.pending = pending  # cancelled: it can still be repeated
            raise

    async def close(self) -> None:
        """Close its writers, and all that it has opened; see ``SessionStore.close``."""
        failure: Exception | None = None
        for one in writer.closing(self):
            try:
                await one.close()
            except Exception as error:
                failure = failure or error
        await self._news.aclose()
        await self.carry(self._leases.giving_all_back())
        self._closed, self._checked = True, False
        # If the loop of the store has ended, nothing comes back.
        if self._coalescing is not None and vars(self).get("_loop") is asyncio.get_running_loop():
            await self._coalescing.aclose(self.settings.deadline)
        if self._own_client:
            with suppress(RuntimeError):  # redis-py's, if the loop of the store has ended
                await self._client.aclose()
        if failure is not None:
            raise failure

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self.close()


@atexit.register
def _at_exit() -> None:
    """Writers first: what they have yet to send needs the leases."""
    try:
        writer.close_all()
    finally:
        lease.give_all_back()
