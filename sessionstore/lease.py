"""Leases: one worker at a time.

A claim makes a session this worker's for a time, counted by the server's clock. Every write of the
store then carries the lease's *fence*, a number that grows with each claim, and the scripts refuse
any other while the lease is live (``lua/include/fence.lua``):

    12:00:00  A claims the session for 30 s, fence 7      A writes with fence 7
    12:00:10  A renews, in the background                 the lease runs until 12:00:40
    12:00:12  A's machine stalls
    12:00:40  the lease has expired                       nothing else happens by itself
    12:00:41  B claims the session, fence 8               B writes with fence 8
    12:01:30  A wakes up and writes with fence 7          refused: LeaseLostError, nothing changed

Silence is not death: a lease that has expired is its worker's still, until somebody else claims the
session or a reaper has found it unrenewed twice, a grace period apart. So a worker that an outage
kept from renewing goes on when the outage is over.

What both stores share comes first: which leases there are, what a round trip of theirs is, when
the next renewal is due. ``Lease`` blocks and renews in a daemon thread, ``AsyncLease`` awaits and
renews in a task.
"""

from __future__ import annotations

import asyncio
import atexit
import json
import logging
import math
import os
import random
import socket
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Generator, Iterable
from contextlib import suppress
from types import TracebackType
from typing import Any, Self, TypeGuard, TypeVar
from weakref import WeakSet

from redis.exceptions import RedisError

from sessionstore import arguments as check
from sessionstore import codec
from sessionstore._call import Call, Request, Steps
from sessionstore._operation import AsyncExecutor, SyncExecutor
from sessionstore.errors import (
    InvalidArgumentError,
    LeaseLostError,
    SessionBusyError,
    SessionNotActiveError,
    SessionNotFoundError,
    SessionStoreError,
)
from sessionstore.models import ENDED_STATUSES, AgentSessionStatus
from sessionstore.operations import SessionOperations

T = TypeVar("T")

logger = logging.getLogger("sessionstore")

DEFAULT_TTL = 30.0  # seconds
SHORTEST_TTL, LONGEST_TTL = 0.1, 86_400.0
RENEWED_AFTER = 1 / 3  # of its time to live, so that two renewals may fail
MOST_RENEWED = 500  # leases in one round trip
_FIRST_PAUSE, _LONGEST_PAUSE = 0.05, 1.0  # seconds between two attempts to claim
_LONGEST_MESSAGE = 4096  # characters of an exception in the error buffer


class HeldLease:
    """What ``Lease`` and ``AsyncLease`` have in common.

    Attributes:
        session_id: the session.
        owner: this worker's name, as others see it.
        ttl: seconds that the lease lasts from each renewal.
        fence: the number that this worker's writes carry.
    """

    def __init__(self, leases: Leases, grant: Grant) -> None:
        self.session_id = grant.session_id
        self.owner = leases.worker
        self.ttl = grant.ttl
        self.fence = grant.fence
        self._leases = leases
        self._taken_from = grant.taken_from
        self._lost: LeaseLostError | None = None
        self._released = False
        self._callbacks: list[Callable[[Any], object]] = []
        self._renewed(grant.began)

    def __repr__(self) -> str:
        if self._released or self._lost:
            state = "released" if self._released else "lost"
        else:
            state = f"{self.expires_in:.1f} s left"
        return f"<{type(self).__name__} on {self.session_id}, {state}>"

    @property
    def expires_in(self) -> float:
        """Seconds until the lease expires unless it is renewed.

        Counted by this process's clock from before the last renewal was sent, so never too many. A
        negative number says that others may have taken the session by now; whether they have, the
        next renewal or write will tell.
        """
        return self._deadline - time.monotonic()

    @property
    def lost(self) -> bool:
        """True once the server has said that others have ended this lease."""
        return self._lost is not None

    @property
    def released(self) -> bool:
        """True once this worker has given the session back."""
        return self._released

    def on_lost(self, callback: Callable[[Self], object]) -> None:
        """Have a function called with this lease, once, when it is found to be lost.

        It is called wherever that is found out: in the thread that renews (of an ``AsyncLease``: on
        the event loop), or in a write of this worker's, before its ``LeaseLostError``.
        """
        if not callable(callback):
            raise InvalidArgumentError.of("callback", "must be a function of the lease")
        with self._leases.lock:
            if self._lost is None:
                self._callbacks.append(callback)
                return
        _call(callback, self)

    # ---- For the registry --------------------------------------------------------------------

    def _renewed(self, began: float) -> None:
        """It has been granted for another ``ttl`` by a request sent at ``began``."""
        self._deadline = began + self.ttl
        self._renew_at = began + self.ttl * RENEWED_AFTER

    def _was_lost(self, error: LeaseLostError) -> list[Callable[[Any], object]]:
        """Note it; the callbacks to call, once."""
        if self._released or self._lost is not None:
            return []
        self._lost = error
        callbacks, self._callbacks = self._callbacks, []
        return callbacks

    # ---- What both kinds do, step by step ----------------------------------------------------

    def _renewing(self) -> Steps[None]:
        self._refuse_if_over()
        yield self._leases.renewal([self])
        if self._lost is not None:
            raise self._lost

    def _releasing(self, status: AgentSessionStatus) -> Steps[None]:
        status = check.status("status", status)
        if status == "busy":
            raise InvalidArgumentError.of("status", "must be another than busy")
        if not self._released:
            if self._lost is not None:
                self._leases.forget(self)
            self._refuse_if_over()
            yield self._leases.request("update_status", self.session_id, status)

    def _leaving(self, error: BaseException | None) -> Steps[None]:
        """Give the session back as ``active``; of an exception, tell in the error buffer first."""
        if self._released:
            return
        try:
            if self._lost is None and _is_worth_telling(error):
                yield from self._telling(error)
            if self._lost is None:
                yield self._leases.request("update_status", self.session_id, "active")
        except (LeaseLostError, SessionNotFoundError):
            pass
        except RedisError as failure:
            if error is None:
                raise
            logger.warning("%s was not released: %s", self.session_id, failure)
        finally:
            self._leases.forget(self)
        if self._lost is not None and self._lost.status == "busy" and error is None:
            raise self._lost  # somebody else is at work on it, and so were we

    def _telling(self, error: BaseException) -> Steps[None]:
        try:
            yield self._leases.request("add_error", self.session_id, _message(error))
        except (LeaseLostError, SessionNotFoundError):
            raise
        except Exception as failure:  # that the session is given back matters more
            logger.warning("%r was not told in %s: %s", error, self.session_id, failure)

    def _refuse_if_over(self) -> None:
        if self._lost is not None:
            raise self._lost
        if self._released:
            raise SessionStoreError(f"the lease on session {self.session_id!r} has been released")


class Grant:
    """What the server has granted: a lease that is not in anybody's hands yet."""

    def __init__(self, session_id: str, ttl: float, began: float, answer: str) -> None:
        self.session_id, self.ttl, self.began = session_id, ttl, began
        self.fence, _, self.taken_from = answer.partition(" ")


class Leases:
    """The leases that one store object holds. Safe for threads."""

    lease_class: type[HeldLease]

    def __init__(self, store: SessionOperations, label: str) -> None:
        self._store = store
        self._label = label
        self.start_afresh()
        _alive.add(self)

    def start_afresh(self) -> None:
        """Hold nothing."""
        self.worker = f"{socket.gethostname()}:{os.getpid()}"
        self.worker += f":{self._label}" if self._label else ""
        self.lock = threading.Lock()
        self._held: dict[str, HeldLease] = {}
        self._wakes_at = math.inf  # time.monotonic() of the next round of renewals

    def held(self) -> list[HeldLease]:
        """The leases that are in force, as far as this process knows."""
        with self.lock:
            return list(self._held.values())

    def fence_of(self, session_id: str) -> str:
        """What a write to the session carries: its lease's fence, or nothing."""
        lease = self._held.get(session_id)
        return "" if lease is None else lease.fence

    def guarded(
        self, session_id: str, fence: str, decode: Callable[[Any], T], *, ends: bool = False
    ) -> Callable[[Any], T]:
        """The decoder of a write under a lease; ``ends``: the write ends the lease too."""
        lease = self._held.get(session_id)
        if lease is None or lease.fence != fence:
            return decode

        def told(reply: Any) -> T:
            try:
                result = decode(reply)
            except (LeaseLostError, SessionNotFoundError) as error:
                self.lose(lease, error)
                raise
            if ends:
                lease._released = True  # pyright: ignore[reportPrivateUsage]
                self.forget(lease)
            return result

        return told

    def forget(self, lease: HeldLease) -> None:
        """Neither renew it nor send its fence any more."""
        with self.lock:
            if self._held.get(lease.session_id) is lease:
                del self._held[lease.session_id]

    def lose(self, lease: HeldLease, error: SessionStoreError) -> None:
        """The server has said that a lease is lost. Its writes go on carrying its fence."""
        if not isinstance(error, LeaseLostError):
            error = _lost({"session_id": lease.session_id})
        with self.lock:
            callbacks = lease._was_lost(error)  # pyright: ignore[reportPrivateUsage]
        for callback in callbacks:
            _call(callback, lease)

    def _keep(self, grant: Grant) -> HeldLease:
        lease = self.lease_class(self, grant)
        with self.lock:
            before = self._held.get(grant.session_id)
            self._held[grant.session_id] = lease
            sooner = lease._renew_at < self._wakes_at  # pyright: ignore[reportPrivateUsage]
        if before is not None:
            self.lose(before, _lost({"session_id": grant.session_id, "owner": self.worker}))
        self.renew_in_background(sooner=sooner)
        return lease

    def renew_in_background(self, *, sooner: bool) -> None:
        """See to it that leases are renewed; ``sooner``: one is due before the next round."""
        raise NotImplementedError  # a thread or a task

    def end_renewal(self) -> None:
        """Let what renews in the background find out that nothing is held."""
        raise NotImplementedError  # a thread or a task

    # ---- Round trips --------------------------------------------------------------------------

    def request(self, operation: str, *arguments: Any) -> Request[Any]:
        """The request that an operation of the store would send."""
        build: Callable[..., Request[Any]] = vars(SessionOperations)[operation].build
        return build(self._store, *arguments)

    def claiming(
        self,
        session_id: str,
        ttl: float,
        wait: float,
        expected: AgentSessionStatus | Iterable[AgentSessionStatus],
    ) -> Steps[Any]:
        """Claim a session, again and again until ``wait`` seconds are over."""
        session_id = check.text("session_id", session_id)
        ttl = check.seconds("ttl", ttl, SHORTEST_TTL, LONGEST_TTL)
        wait = check.seconds("wait", wait)
        statuses = check.statuses("expected", expected)
        keys = self._store.keyspace.of_session(session_id)

        def claim() -> Call[HeldLease]:
            began = time.monotonic()
            return Call(
                "claim",
                keys=(
                    keys.session(session_id),
                    keys.activity,
                    keys.ended,
                    keys.leases,
                    keys.events,
                    keys.by_status("busy"),
                    keys.by_owner(self.worker),
                ),
                args=(session_id, keys.prefix, self.worker, round(ttl * 1000), *statuses),
                decode=lambda reply: self._keep(Grant(session_id, ttl, began, codec.done(reply))),
                lane=keys.lane,
            )

        return self._claiming(claim, wait)

    def _claiming(self, claim: Callable[[], Call[Any]], wait: float) -> Steps[Any]:
        give_up_at = time.monotonic() + wait
        pause = _FIRST_PAUSE
        while True:
            try:
                return (yield claim())
            except (SessionBusyError, SessionNotActiveError) as error:
                left = give_up_at - time.monotonic()
                if left <= 0 or error.status in ENDED_STATUSES:
                    raise
                # A lease is released at any time; at the latest it expires.
                ends_in = pause if error.expires_in is None else error.expires_in
            yield min(left, max(ends_in, 0.001), random.uniform(pause / 2, pause))
            pause = min(2 * pause, _LONGEST_PAUSE)

    def giving_all_back(self) -> Steps[None]:
        """Release what is held: nobody is going to renew it."""
        for lease in self.held():
            try:
                yield from lease._leaving(None)  # pyright: ignore[reportPrivateUsage]
            except Exception as error:
                logger.warning("%s was not released: %s", lease.session_id, error)
                if isinstance(error, RedisError):
                    break  # nor would the others be, each after its deadline
        self.end_renewal()
        self.start_afresh()

    def renewal(self, leases: Iterable[HeldLease]) -> Call[None]:
        """Renew leases on sessions of one partition, in one round trip."""
        leases = list(leases)
        began = time.monotonic()
        keys = self._store.keyspace.of_session(leases[0].session_id)

        def decode(reply: Any) -> None:
            for lease, answer in zip(leases, json.loads(codec.done(reply)), strict=True):
                if answer is True:
                    lease._renewed(began)  # pyright: ignore[reportPrivateUsage]
                else:
                    self.lose(lease, _lost(answer))

        return Call(
            "renew",
            keys=(keys.leases, *(keys.session(lease.session_id) for lease in leases)),
            args=tuple(
                value
                for lease in leases
                for value in (lease.session_id, lease.fence, round(lease.ttl * 1000))
            ),
            decode=decode,
            lane=keys.lane,
        )

    def next_round(self) -> tuple[float, list[Call[None]]] | None:
        """Seconds until a renewal is due, and what is to be sent then; None if nothing is held.

        One round trip renews all leases of a partition that are due about now. Those that get no
        answer are due again soon.
        """
        now = time.monotonic()
        with self.lock:
            held = [lease for lease in self._held.values() if not lease.lost]
            if not held:
                self._wakes_at = math.inf
                return None
            due_at = min(lease._renew_at for lease in held)  # pyright: ignore[reportPrivateUsage]
            self._wakes_at = max(due_at, now)
        if due_at > now:
            return due_at - now, []
        by_partition: dict[str, list[HeldLease]] = defaultdict(list)
        for lease in held:
            if lease._renew_at - now < lease.ttl * RENEWED_AFTER / 2:  # pyright: ignore[reportPrivateUsage]
                lease._renew_at = now + min(1.0, lease.ttl / 10)  # pyright: ignore[reportPrivateUsage]
                by_partition[self._store.keyspace.of_session(lease.session_id).prefix].append(lease)
        return 0, [
            self.renewal(leases[first : first + MOST_RENEWED])
            for leases in by_partition.values()
            for first in range(0, len(leases), MOST_RENEWED)
        ]


def _lost(details: dict[str, Any]) -> LeaseLostError:
    error = LeaseLostError.from_details(details)
    assert isinstance(error, LeaseLostError)
    return error


def _is_worth_telling(error: BaseException | None) -> TypeGuard[BaseException]:
    """Not that a generator was closed, or that the program asked for its own good end."""
    if isinstance(error, SystemExit):
        return bool(error.code)
    return error is not None and not isinstance(error, GeneratorExit)


def _message(error: BaseException) -> str:
    """``Type: message``, without a traceback: that may show secrets."""
    text = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
    return text[:_LONGEST_MESSAGE].encode(errors="replace").decode()


def _call(callback: Callable[[Any], object], lease: HeldLease) -> None:
    try:
        callback(lease)
    except Exception:
        logger.exception("a callback failed, told of the lost lease on %s", lease.session_id)


_alive: WeakSet[Leases] = WeakSet()


def _after_fork() -> None:
    """The leases stay the parent's: in the child, which is another worker, they are over."""
    for leases in list(_alive):
        for lease in leases._held.values():  # pyright: ignore[reportPrivateUsage]
            lease._released = True  # pyright: ignore[reportPrivateUsage]
        leases.start_afresh()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


# ---- Blocking -----------------------------------------------------------------------------------


class Lease(HeldLease):
    """A session in this worker's hands, renewed by a daemon thread until it is given back.

    In a ``with``, leaving gives the session back as ``active``, after an exception with a line in
    its error buffer. Leaving does nothing if it was given back before, has ended, or is gone; it
    raises ``LeaseLostError`` if another worker holds it by now.
    """

    _leases: ThreadLeases

    def renew(self) -> None:
        """Let the lease last for ``ttl`` from now on; the background does it by itself.

        Raises:
            LeaseLostError: others have ended it.
        """
        self._leases.executor.carry(self._renewing())

    def release(self, status: AgentSessionStatus = "active") -> None:
        """Give the session back with this status; nothing is done if it was given back before.

        Raises:
            LeaseLostError: others have ended the lease.
        """
        self._leases.executor.carry(self._releasing(status))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._leases.executor.carry(self._leaving(error))


class ThreadLeases(Leases):
    """The leases of a ``SessionStore``."""

    lease_class = Lease

    def __init__(self, store: SessionOperations, executor: SyncExecutor, label: str) -> None:
        self.executor = executor
        super().__init__(store, label)

    def start_afresh(self) -> None:
        super().start_afresh()
        self._thread: threading.Thread | None = None
        self._news = threading.Event()

    def renew_in_background(self, *, sooner: bool) -> None:
        with self.lock:
            if self._thread is None:
                self._thread = threading.Thread(
                    target=self._renew, name="sessionstore-leases", daemon=True
                )
                self._thread.start()
        if sooner:
            self._news.set()

    def end_renewal(self) -> None:
        with self.lock:
            self._held.clear()
        self._news.set()

    def _renew(self) -> None:
        while True:
            following = self.next_round()
            if following is None:
                with self.lock:
                    if not any(not lease.lost for lease in self._held.values()):
                        self._thread = None
                        return
                continue
            pause, requests = following
            if self._news.wait(pause):
                self._news.clear()
            for request in requests:
                try:
                    self.executor.execute(request)
                except Exception as error:
                    logger.warning("leases were not renewed, trying again: %s", error)


@atexit.register
def _at_exit() -> None:
    for leases in list(_alive):
        if isinstance(leases, ThreadLeases) and leases.held():
            leases.executor.carry(leases.giving_all_back())


# ---- On an event loop ---------------------------------------------------------------------------


class AsyncLease(HeldLease):
    """A session in this worker's hands, renewed by a task until it is given back; see ``Lease``."""

    _leases: TaskLeases

    async def renew(self) -> None:
        """Let the lease last for ``ttl`` from now on; see ``Lease.renew``."""
        await self._leases.executor.carry(self._renewing())

    async def release(self, status: AgentSessionStatus = "active") -> None:
        """Give the session back with this status; see ``Lease.release``."""
        await self._leases.executor.carry(self._releasing(status))

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        leaving = self._leases.in_background(self._leases.executor.carry(self._leaving(error)))
        try:
            await asyncio.shield(leaving)
        except asyncio.CancelledError:
            await asyncio.wait([leaving])  # cancelled once more: the session is given back first
            raise


class TaskLeases(Leases):
    """The leases of an ``AsyncSessionStore``."""

    lease_class = AsyncLease

    def __init__(self, store: SessionOperations, executor: AsyncExecutor, label: str) -> None:
        self.executor = executor
        super().__init__(store, label)

    def start_afresh(self) -> None:
        super().start_afresh()
        self._task: asyncio.Task[None] | None = None
        self._news = asyncio.Event()
        self._tasks: set[asyncio.Task[Any]] = set()

    def in_background(self, work: Any) -> asyncio.Task[Any]:
        """A task that is not forgotten before its end."""
        task: asyncio.Task[Any] = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    def renew_in_background(self, *, sooner: bool) -> None:
        if self._task is None or self._task.done():
            self._task = self.in_background(self._renew())
        if sooner:
            self._news.set()

    def end_renewal(self) -> None:
        self._held.clear()
        self._news.set()

    async def _renew(self) -> None:
        while (following := self.next_round()) is not None:
            pause, requests = following
            with suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self._news.wait(), pause)
            self._news.clear()
            for request in requests:
                try:
                    await self.executor.execute(request)
                except Exception as error:
                    logger.warning("leases were not renewed, trying again: %s", error)


class AsyncClaim:
    """A claim to be awaited: ``lease = await claim``, or ``async with claim as lease``."""

    def __init__(self, leases: TaskLeases, steps: Steps[Any]) -> None:
        self._leases = leases
        self._steps: Steps[Any] | None = steps
        self._lease: AsyncLease | None = None

    def __await__(self) -> Generator[Any, Any, AsyncLease]:
        return self._take().__await__()

    async def _take(self) -> AsyncLease:
        steps, self._steps = self._steps, None
        if steps is None:
            raise SessionStoreError("a claim can be awaited once; claim again")
        lease: AsyncLease = await self._leases.executor.carry(steps, self._attempt)
        return lease

    async def _attempt(self, request: Request[AsyncLease]) -> AsyncLease:
        """One claim. If this task is cancelled meanwhile, what it was granted is given back."""
        attempt = self._leases.in_background(self._leases.executor.execute(request))
        try:
            return await asyncio.shield(attempt)
        except asyncio.CancelledError:
            with suppress(Exception):
                lease: AsyncLease = await attempt
                status: Any = lease._taken_from  # pyright: ignore[reportPrivateUsage]
                await lease.release("active" if status == "busy" else status)
            raise

    async def __aenter__(self) -> AsyncLease:
        self._lease = await self._take()
        return self._lease

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        assert self._lease is not None
        await self._lease.__aexit__(kind, error, traceback)
