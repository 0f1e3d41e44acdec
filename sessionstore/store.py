"""The stores: where requests are carried out, blocking or on an event loop.

``SessionStore`` and ``AsyncSessionStore`` show the operations of ``operations.py``. Only how a
request travels differs, and it stands here twice, side by side. Sending a request again is always
safe: a read changes nothing, and a write carries the token of its lane (``lanes.py``).
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Self, TypeVar, Unpack, cast

import redis
import redis.asyncio
from redis.exceptions import NoScriptError, OutOfMemoryError, RedisError, ResponseError

from sessionstore import connecting, opening
from sessionstore._call import REQUESTS, Call, Feed, Request, Several, Snapshot, Steps
from sessionstore._operation import AsyncExecutor, SyncExecutor
from sessionstore.attempts import Attempts
from sessionstore.errors import (
    InvalidArgumentError,
    OutcomeUnknownError,
    SessionStoreError,
)
from sessionstore.keys import Keyspace
from sessionstore.lanes import Lane, Lanes
from sessionstore.lease import DEFAULT_TTL, AsyncClaim, Lease, TaskLeases, ThreadLeases
from sessionstore.models import AgentSessionStatus
from sessionstore.operations import SessionOperations
from sessionstore.scripts import Script, load
from sessionstore.settings import SettingsArguments, StoreSettings

T = TypeVar("T")
C = TypeVar("C")


@dataclass(frozen=True, slots=True)
class Pending:
    """A write whose outcome is unknown: all it takes to send exactly it again."""

    store: _Store
    request: Request[Any]
    lane: Lane


class _Store(SessionOperations):
    """What both stores have, apart from I/O."""

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
        self._checked = False
        self._closed = False

    def __repr__(self) -> str:
        return f"<{type(self).__name__} of namespace {self.settings.namespace!r}>"

    @property
    def worker(self) -> str:
        """This worker's name, ``host:pid`` or ``host:pid:label``: the owner of what it claims."""
        return self._leases.worker

    def _attempts(self, request: Request[Any], began: float, *, is_repeat: bool) -> Attempts:
        match request:
            case Call():
                what = request.script
            case Several():
                what = request.calls[0].script
            case Snapshot():
                what = "get_session"
        deadline = self.settings.deadline if self._own_client else None
        is_write = request.lane is not None
        return Attempts(what, deadline, is_write, began, may_have_run=is_repeat)

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

    def _check_opened(self, replies: list[Any]) -> None:
        meta, info = replies
        if isinstance(meta, ResponseError):
            raise meta
        opening.check_layout(meta, self.settings)
        opening.check_server(info, self.settings)
        self._checked = True


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
        client: redis.Redis | None = None,
        *,
        redact: Callable[[str], str] | None = None,
        **settings: Unpack[SettingsArguments],
    ) -> None:
        loaded = StoreSettings.load(**settings)
        super().__init__(own_client=client is None, redact=redact, settings=loaded)
        self._leases = ThreadLeases(self, self, loaded.worker)
        self._client = (
            connecting.connect(connecting.url_from_environment(), loaded)
            if client is None
            else connecting.accepted(client)
        )

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
            url: ``redis://``, ``rediss://`` or ``unix://``, as redis-py takes it.
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
        """
        claim = self._leases.claiming(session_id, ttl, wait, expected)
        lease: Lease = self.execute(claim) if isinstance(claim, Call) else self.carry(claim)
        return lease

    def execute(self, request: Request[T]) -> T:
        """Carry out a request, and those that follow from it."""
        result: T | Request[T] = request
        while isinstance(result, REQUESTS):
            following: Request[T] = cast("Any", result)
            lane = None if following.lane is None else self._lanes.take()
            result = self._carry_out(following, lane)
        return result

    def carry(self, steps: Steps[T]) -> T:
        """Carry out step after step."""
        value: Any = None
        failure: Exception | None = None
        try:
            while True:
                step = steps.send(value) if failure is None else steps.throw(failure)
                value, failure = None, None
                if not isinstance(step, REQUESTS):
                    time.sleep(step)
                    continue
                try:
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

    def _carry_out(
        self, request: Request[T], lane: Lane | None, *, is_repeat: bool = False
    ) -> T | Request[T]:
        began, attempts = time.monotonic(), None
        try:
            while True:
                try:
                    if not self._checked and self._must_open(request):
                        self._open()
                    reply = self._send(request, lane)
                    break
                except RedisError as error:
                    attempts = attempts or self._attempts(request, began, is_repeat=is_repeat)
                    time.sleep(attempts.pause_after(error))
        except BaseException as error:
            if lane is not None:
                self._settle(error, request, lane, is_repeat=is_repeat)
            raise
        if lane is not None:
            self._lanes.give_back(lane)
        return request.decode(reply)

    def _send(self, request: Request[Any], lane: Lane | None) -> Any:
        if isinstance(request, Call):
            script, operands = _command(request, lane)
            try:
                return self._client.execute_command("EVALSHA", script.sha, *operands)
            except NoScriptError:
                return self._client.execute_command("EVAL", script.text, *operands)
        if isinstance(request, Several):
            return self._send_several(request.calls)
        try:
            with self._client.pipeline(transaction=True) as pipe:
                for command in request.commands:
                    pipe.execute_command(*command)
                return pipe.execute()
        except OutOfMemoryError:
            return self._send(request.instead, None)

    def _send_several(self, calls: Sequence[Call[Any]]) -> list[Any]:
        with self._client.pipeline(transaction=False) as pipe:
            for call in calls:
                script, operands = _command(call, None)
                pipe.execute_command("EVALSHA", script.sha, *operands)
            replies = pipe.execute(raise_on_error=False)
        for number, reply in enumerate(replies):
            if isinstance(reply, NoScriptError):
                replies[number] = self._send(calls[number], None)
            elif isinstance(reply, Exception):
                raise reply
        return list(replies)

    def _open(self) -> None:
        self._refuse_if_closed()
        script, operands = _command(opening.open_store(self.keyspace, self.settings), None)
        with self._client.pipeline(transaction=False) as pipe:
            pipe.execute_command("EVAL", script.text, *operands)
            pipe.execute_command(*opening.INFO)
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
            result = self._carry_out(pending.request, pending.lane, is_repeat=True)
            # What was repeated may be one partition's part of a call.
            if isinstance(result, REQUESTS):
                return self.execute(cast("Any", result))
            return result
        except Exception:
            raise
        except BaseException:
            error.pending = pending  # interrupted: it can still be repeated
            raise

    def close(self) -> None:
        """Give back the sessions it holds, and close the connections that it has opened."""
        self.carry(self._leases.giving_all_back())
        self._closed, self._checked = True, False
        if self._own_client:
            self._client.close()

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
        client: redis.asyncio.Redis | None = None,
        *,
        redact: Callable[[str], str] | None = None,
        **settings: Unpack[SettingsArguments],
    ) -> None:
        loaded = StoreSettings.load(**settings)
        super().__init__(own_client=client is None, redact=redact, settings=loaded)
        self._leases = self._tasks = TaskLeases(self, self, loaded.worker)
        self._client = (
            connecting.connect_async(connecting.url_from_environment(), loaded)
            if client is None
            else connecting.accepted_async(client)
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

    async def execute(self, request: Request[T]) -> T:
        """Carry out a request, and those that follow from it."""
        self._refuse_other_loop()
        result: T | Request[T] = request
        while isinstance(result, REQUESTS):
            following: Request[T] = cast("Any", result)
            lane = None if following.lane is None else self._lanes.take()
            result = await self._carry_out(following, lane)
        return result

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
                if not isinstance(step, REQUESTS):
                    await asyncio.sleep(step)
                    continue
                try:
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

    async def _carry_out(
        self, request: Request[T], lane: Lane | None, *, is_repeat: bool = False
    ) -> T | Request[T]:
        began, attempts = time.monotonic(), None
        try:
            while True:
                try:
                    if not self._checked and self._must_open(request):
                        await self._open()
                    reply = await self._send(request, lane)
                    break
                except RedisError as error:
                    attempts = attempts or self._attempts(request, began, is_repeat=is_repeat)
                    await asyncio.sleep(attempts.pause_after(error))
        except BaseException as error:
            if lane is not None:
                self._settle(error, request, lane, is_repeat=is_repeat)
            raise
        if lane is not None:
            self._lanes.give_back(lane)
        return request.decode(reply)

    async def _send(self, request: Request[Any], lane: Lane | None) -> Any:
        if isinstance(request, Call):
            script, operands = _command(request, lane)
            try:
                return await self._client.execute_command("EVALSHA", script.sha, *operands)
            except NoScriptError:
                return await self._client.execute_command("EVAL", script.text, *operands)
        if isinstance(request, Several):
            return await self._send_several(request.calls)
        try:
            async with self._client.pipeline(transaction=True) as pipe:
                for command in request.commands:
                    pipe.execute_command(*command)
                return await pipe.execute()
        except OutOfMemoryError:
            return await self._send(request.instead, None)

    async def _send_several(self, calls: Sequence[Call[Any]]) -> list[Any]:
        async with self._client.pipeline(transaction=False) as pipe:
            for call in calls:
                script, operands = _command(call, None)
                pipe.execute_command("EVALSHA", script.sha, *operands)
            replies = await pipe.execute(raise_on_error=False)
        for number, reply in enumerate(replies):
            if isinstance(reply, NoScriptError):
                replies[number] = await self._send(calls[number], None)
            elif isinstance(reply, Exception):
                raise reply
        return list(replies)

    async def _open(self) -> None:
        self._refuse_if_closed()
        script, operands = _command(opening.open_store(self.keyspace, self.settings), None)
        async with self._client.pipeline(transaction=False) as pipe:
            pipe.execute_command("EVAL", script.text, *operands)
            pipe.execute_command(*opening.INFO)
            self._check_opened(await pipe.execute(raise_on_error=False))

    async def repeat(self, error: OutcomeUnknownError) -> Any:
        """Send a write of unknown outcome again; see ``SessionStore.repeat``."""
        self._refuse_other_loop()
        pending = self._take_pending(error)
        try:
            result = await self._carry_out(pending.request, pending.lane, is_repeat=True)
            if isinstance(result, REQUESTS):
                return await self.execute(cast("Any", result))
            return result
        except Exception:
            raise
        except BaseException:
            error.pending = pending  # cancelled: it can still be repeated
            raise

    async def close(self) -> None:
        """Give back the sessions it holds, and close the connections that it has opened."""
        await self.carry(self._leases.giving_all_back())
        self._closed, self._checked = True, False
        if self._own_client:
            with suppress(RuntimeError):  # redis-py's, if the loop of the store has ended
                await self._client.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self.close()


def _command(call: Call[Any], lane: Lane | None) -> tuple[Script, tuple[str | int, ...]]:
    """The script, and what follows it in EVALSHA: number of keys, keys, arguments."""
    if lane is None or call.lane is None:
        return load(call.script), (len(call.keys), *call.keys, *call.args)
    keys = (call.lane(lane.name), *call.keys)
    return load(call.script), (len(keys), *keys, lane.sequence, *call.args)
