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

(The idea is Martin Kleppmann's, "How to do distributed locking": a lock that expires needs a token
that the resource itself checks.) Silence is not death: a lease that has expired is its worker's
still, until somebody else claims the session or a reaper has found it unrenewed twice, a grace
period apart. So a worker that an outage kept from renewing goes on when the outage is over.

``Lease`` blocks and renews in a daemon thread, ``AsyncLease`` awaits and renews in a task; what
they share is in ``holding.py``.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Callable, Generator
from contextlib import suppress
from types import TracebackType
from typing import Any, Self, cast

from sessionstore._call import REQUESTS, Request, Steps
from sessionstore._operation import AsyncExecutor, SyncExecutor
from sessionstore.errors import DurabilityError, InvalidArgumentError, SessionStoreError
from sessionstore.holding import Apart, Holding, Leases, alive
from sessionstore.models import AgentSessionStatus
from sessionstore.operations import SessionOperations

logger = logging.getLogger("sessionstore")

DEFAULT_TTL = 30.0  # seconds


class HeldLease:
    """What ``Lease`` and ``AsyncLease`` tell."""

    def __init__(self, leases: Leases, holding: Holding) -> None:
        self._holding = holding
        self._registry = leases

    def __repr__(self) -> str:
        state = "lost" if self.lost else "released" if self.released else "held"
        left = f", {self.expires_in:.1f} s left" if state == "held" else ""
        return f"<{type(self).__name__} on {self.session_id}, {state}{left}>"

    @property
    def session_id(self) -> str:
        """The session."""
        return self._holding.session_id

    @property
    def owner(self) -> str:
        """This worker's name, as others see it."""
        return self._holding.owner

    @property
    def ttl(self) -> float:
        """Seconds that the lease lasts from each renewal."""
        return self._holding.ttl

    @property
    def fence(self) -> int:
        """The number that this worker's writes to the session carry."""
        return int(self._holding.fence)

    @property
    def expires_in(self) -> float:
        """Seconds until the lease expires unless it is renewed.

        Counted by this process's clock (``time.monotonic``, which may stand still while the machine
        is suspended) from before the last renewal was sent, so never too many. A negative number
        says that others may have taken the session by now; whether they have, the next renewal or
        write will tell.
        """
        return self._holding.deadline - time.monotonic()

    @property
    def lost(self) -> bool:
        """True once the server has said that others have ended this lease."""
        return self._holding.lost is not None

    @property
    def released(self) -> bool:
        """True once this worker has given the session back."""
        return self._holding.released

    @property
    def writes_lost(self) -> int:
        """How many entries, added under this lease and acknowledged, failovers took, as is known.

        A renewal finds it, which logs a warning, or a write, which raises ``WritesLostError``.
        """
        return self._holding.told_lost + self._holding.found_lost

    def abandon(self) -> None:
        """Neither renew it nor give the session back: it is ``busy`` until the lease expires."""
        self._registry.abandon(self._holding)

    def on_lost(self, callback: Callable[[Self], object]) -> None:
        """Have a function called with this lease, once, when it is found to be lost.

        It is called wherever that is found out: in the thread that renews (of an ``AsyncLease``: on
        the event loop), or in a write of this worker's, before its ``LeaseLostError``. It must not
        wait: all leases are renewed there.
        """
        if not callable(callback):
            raise InvalidArgumentError.of("callback", "must be a function of the lease")
        self._registry.when_lost(self._holding, lambda: callback(self))


# ---- Blocking -----------------------------------------------------------------------------------


class Lease(HeldLease):
    """A session in this worker's hands, renewed by a daemon thread until it is given back.

    In a ``with``, leaving gives the session back as ``active``, after an exception with a line in
    its error buffer. Leaving does nothing if it was given back before, has ended, or is gone. It
    raises ``LeaseLostError`` if another worker holds it by now. If the server has lost entries that
    were added under the lease, it gives the session back and raises ``WritesLostError``.
    """

    def __init__(self, leases: ThreadLeases, holding: Holding) -> None:
        super().__init__(leases, holding)
        self._leases = leases

    def renew(self) -> None:
        """Let the lease last for ``ttl`` from now on; the background does it by itself.

        Raises:
            LeaseLostError: others have ended it.
        """
        self._leases.executor.carry(self._leases.renewing(self._holding))

    def release(self, status: AgentSessionStatus = "active") -> None:
        """Give the session back with this status; nothing is done if it was given back before.

        Raises:
            LeaseLostError: others have ended the lease.
            WritesLostError: the server has lost entries that were added under it; the session has
                been given back.
        """
        self._leases.executor.carry(self._leases.releasing(self._holding, status))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._leases.executor.carry(self._leases.leaving(self._holding, error))


class ThreadLeases(Leases):
    """The leases of a ``SessionStore``."""

    def __init__(
        self, store: SessionOperations, executor: SyncExecutor, apart: Apart, label: str
    ) -> None:
        self.executor = executor
        super().__init__(store, apart, label)

    def start_afresh(self) -> None:
        super().start_afresh()
        self._thread: threading.Thread | None = None
        self._news = threading.Event()

    def handed_out(self, holding: Holding) -> Lease:
        return Lease(self, holding)

    def renew_in_background(self, *, sooner: bool) -> None:
        if self._thread is None or not self._thread.is_alive():
            self._start()
        if sooner:
            self._news.set()

    def _start(self) -> None:
        with self.lock:
            if self._thread is None or not self._thread.is_alive():
                thread = threading.Thread(
                    target=self._renew, name="sessionstore-leases", daemon=True
                )
                thread.start()
                self._thread = thread

    def end_renewal(self) -> None:
        super().end_renewal()
        self._news.set()

    def _renew(self) -> None:
        while True:
            following = self.next_round()
            if following is None:
                with self.lock:
                    if all(holding.lost for holding in self._held.values()):
                        self._thread = None
                        return
                continue
            pause, renewals = following
            if self._news.wait(pause):
                self._news.clear()
            if renewals:
                self.executor.carry(self.renewing_all(renewals))


def give_all_back() -> None:
    """Release every lease that is held, at the end of the interpreter."""
    for leases in alive():
        if isinstance(leases, ThreadLeases) and leases.held():
            leases.executor.carry(leases.giving_all_back())


# ---- On an event loop ---------------------------------------------------------------------------


class AsyncLease(HeldLease):
    """A session in this worker's hands, renewed by a task until it is given back; see ``Lease``."""

    def __init__(self, leases: TaskLeases, holding: Holding) -> None:
        super().__init__(leases, holding)
        self._leases = leases

    async def renew(self) -> None:
        """Let the lease last for ``ttl`` from now on; see ``Lease.renew``."""
        await self._leases.executor.carry(self._leases.renewing(self._holding))

    async def release(self, status: AgentSessionStatus = "active") -> None:
        """Give the session back with this status; see ``Lease.release``."""
        await self._leases.executor.carry(self._leases.releasing(self._holding, status))

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        steps = self._leases.leaving(self._holding, error)
        leaving = self._leases.in_background(self._leases.executor.carry(steps))
        try:
            await asyncio.shield(leaving)
        except asyncio.CancelledError:
            await asyncio.wait([leaving])  # cancelled once more: the session is given back first
            raise


class TaskLeases(Leases):
    """The leases of an ``AsyncSessionStore``."""

    def __init__(
        self, store: SessionOperations, executor: AsyncExecutor, apart: Apart, label: str
    ) -> None:
        self.executor = executor
        super().__init__(store, apart, label)

    def start_afresh(self) -> None:
        super().start_afresh()
        self._task: asyncio.Task[None] | None = None
        self._news = asyncio.Event()
        self._tasks: set[asyncio.Task[Any]] = set()

    def handed_out(self, holding: Holding) -> AsyncLease:
        return AsyncLease(self, holding)

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
        super().end_renewal()
        self._news.set()

    async def _renew(self) -> None:
        while (following := self.next_round()) is not None:
            pause, renewals = following
            # Not wait_for: Python 3.11's may swallow a cancellation, and the loop then never ends.
            with suppress(TimeoutError):
                async with asyncio.timeout(pause):
                    await self._news.wait()
            self._news.clear()
            if renewals:
                await self.executor.carry(self.renewing_all(renewals))


class AsyncClaim:
    """A claim to be awaited: ``lease = await claim``, or ``async with claim as lease``."""

    def __init__(self, leases: TaskLeases, claim: Steps[Any] | Request[Any]) -> None:
        self._leases = leases
        self._claim: Steps[Any] | Request[Any] | None = claim
        self._lease: AsyncLease | None = None

    def __await__(self) -> Generator[Any, Any, AsyncLease]:
        return self._take().__await__()

    async def _take(self) -> AsyncLease:
        claim, self._claim = self._claim, None
        if claim is None:
            raise SessionStoreError("a claim can be awaited once; claim again")
        if isinstance(claim, REQUESTS):
            return await self._attempt(claim)
        lease: AsyncLease = await self._leases.executor.carry(claim, self._attempt)
        return lease

    async def _attempt(self, request: Request[AsyncLease]) -> AsyncLease:
        """One claim. If this task is cancelled meanwhile, what it was granted is given back."""
        attempt = self._leases.in_background(self._leases.executor.execute(request))
        try:
            return await asyncio.shield(attempt)
        except asyncio.CancelledError:
            undoing = self._leases.in_background(self._undo(request, attempt))
            await asyncio.wait([undoing])  # cancelled once more: it is given back all the same
            raise

    async def _undo(self, request: Request[AsyncLease], attempt: asyncio.Task[AsyncLease]) -> None:
        """Give back what nobody waits for any more, with the status it had."""
        with suppress(Exception):
            try:
                lease = await attempt
            except DurabilityError as error:  # it is held all the same
                lease = cast("AsyncLease", request.decode(error.answer))
            status: Any = lease._holding.taken_from  # pyright: ignore[reportPrivateUsage]
            await lease.release("active" if status == "busy" else status)

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
