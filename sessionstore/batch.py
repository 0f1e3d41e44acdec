"""Batches: several operations in one round trip.

    with store.batch() as batch:
        added = batch.add_output(session_id, "done")
        batch.update_status(session_id, "terminated")
    added.result()

Within the ``with`` an operation is only noted; leaving sends all of them, in order, in one
pipeline. They are not atomic: each is carried out, or refused, by itself, and has its own result or
error.

Order is kept: the scripts are loaded at the head of the pipeline, so that none is missing in the
middle (``pipelining.py`` has the one gap); and if a failure leaves it open how far the server came,
all are sent again in the same order, for those that were carried out only give their answer again
(``lanes.py``). Once the store has been given up as away, nothing that comes later is sent.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self, TypeVar

from redis.exceptions import OutOfMemoryError, RedisError

from sessionstore._call import REQUESTS, Call, Request, Snapshot, Steps, Together
from sessionstore._operation import AsyncExecutor, BatchExecutor, Outcome, SyncExecutor
from sessionstore.attempts import Attempts
from sessionstore.errors import (
    DurabilityError,
    OutcomeUnknownError,
    SessionStoreError,
    is_transient,
    of_any_server,
    own_copy,
    surely_not_run,
)
from sessionstore.holding import Leases
from sessionstore.lanes import Lane, Lanes
from sessionstore.operations import SessionOperations
from sessionstore.pipelining import Single

T = TypeVar("T")

MOST_TOGETHER = 1000  # operations in one round trip

#: The answer to a write that was never sent: it has done nothing, and so has not ended a lease.
_NOT_SENT = "NOT_SENT {}"


@dataclass(slots=True)
class _Noted:
    """One operation: its request, what becomes of it, and the lane of its write."""

    request: Single
    outcome: Outcome[Any]
    lane: Lane | None = None


@dataclass(frozen=True, slots=True)
class Sender:
    """What a batch needs of its store."""

    operations: SessionOperations
    leases: Leases
    lanes: Lanes
    attempts: Callable[[bool], Attempts]
    pending: Callable[[Request[Any], Lane], object]


class _Batch(SessionOperations, BatchExecutor):
    """What both batches do, apart from sending."""

    def __init__(self, sender: Sender) -> None:
        self._sender = sender
        operations = sender.operations
        self.settings, self.keyspace = operations.settings, operations.keyspace
        self.redact, self._leases = operations.redact, sender.leases
        self._noted: list[_Noted] = []
        self._is_over = False

    def __repr__(self) -> str:
        state = "sent or given up" if self._is_over else "not sent yet"
        return f"<{type(self).__name__} of {len(self)} operations, {state}>"

    def __len__(self) -> int:
        return len(self._noted)

    def __iter__(self) -> Iterator[Outcome[Any]]:
        """What became of each operation, in their order."""
        return iter([noted.outcome for noted in self._noted])

    def note(self, operation: str, request: Request[T]) -> Outcome[T]:
        """Note a request; what will become of it."""
        if self._is_over:
            raise SessionStoreError("this batch has been sent or given up; begin another")
        assert not isinstance(request, Together)  # no operation is a batch
        outcome = Outcome[T](operation)
        self._noted.append(_Noted(request, outcome))
        return outcome

    def _leaving(self, error: BaseException | None) -> Steps[None]:
        """Send all that was noted, and what follows from it; nothing after an exception."""
        is_first, self._is_over = not self._is_over, True
        # Methods that were looked up are kept, each with the batch. Without them it goes when its
        # user lets it go, and outcomes that nobody has looked at are logged then.
        for name in [name for name in vars(self) if hasattr(SessionOperations, name)]:
            del vars(self)[name]
        if not is_first:
            return
        if error is not None:
            for noted in self._noted:
                _give_up(noted.request)
            return
        away: Exception | None = None
        for first in range(0, len(self._noted), MOST_TOGETHER):
            some = self._noted[first : first + MOST_TOGETHER]
            if away is None:
                away = yield from self._sending_some(some)
                continue
            for noted in some:
                _give_up(noted.request)
                noted.outcome.fail(own_copy(away))

    def _sending_some(self, some: Sequence[_Noted]) -> Steps[Exception | None]:
        """Send some; gives the failure for which no more of them need be sent."""
        lanes = self._sender.lanes
        for noted in some:
            if noted.request.lane is not None:
                noted.lane = lanes.take()
        away: Exception | None = None
        try:
            try:
                replies, away = yield from self._replies(some)
            except Exception as error:
                replies, away = [error] * len(some), error
            for number, noted in enumerate(some):
                reply = replies[number]
                if away is not None and reply is away:
                    replies[number] = self._own_error(noted, away)
                elif isinstance(reply, DurabilityError):
                    self._keep(noted, reply)
        finally:
            for noted in some:
                if noted.lane is not None:
                    lanes.give_back(noted.lane)
        for noted, reply in zip(some, replies, strict=True):
            yield from _settling(noted, reply)
        return _cause(away) if isinstance(away, OutcomeUnknownError) else away

    def _replies(self, some: Sequence[_Noted]) -> Steps[tuple[list[Any], Exception | None]]:
        """The reply to each, or its error; sent again while one of them failed in passing.

        If one did so to the end, that failure too.
        """
        requests = [(noted.request, noted.lane) for noted in some]
        attempts = self._sender.attempts(any(lane for _, lane in requests))
        together: Together[list[Any]] = Together(requests, attempts, lambda replies: replies)
        while True:
            replies: list[Any] = yield together
            failures = [reply for reply in replies if _is_passing(reply)]
            if not failures:
                return replies, None
            failure = next((one for one in failures if not surely_not_run(one)), failures[0])
            try:
                pause = attempts.pause_after(failure)
            except OutcomeUnknownError as error:  # of an earlier attempt, perhaps
                return [error if _is_passing(reply) else reply for reply in replies], error
            except RedisError as error:
                return replies, error
            yield pause

    def _own_error(self, noted: _Noted, error: Exception) -> Exception:
        """Of a failure, what it means for one operation."""
        if not isinstance(error, OutcomeUnknownError):
            return own_copy(error)
        if noted.lane is None:
            return own_copy(_cause(error))
        own = OutcomeUnknownError(f"{noted.outcome.operation} in a {error}")
        own.__cause__ = error.__cause__
        self._keep(noted, own)
        return own

    def _keep(self, noted: _Noted, error: OutcomeUnknownError) -> None:
        """Keep the lane of a write for its repeat."""
        if noted.lane is not None:
            error.pending = self._sender.pending(noted.request, noted.lane)
            noted.lane = None


def _cause(error: OutcomeUnknownError) -> Exception:
    return error.__cause__ if isinstance(error.__cause__, Exception) else error


def _give_up(request: Single) -> None:
    """Tell a request that it is not going to be sent."""
    if isinstance(request, Call) and request.lane is not None:
        with suppress(SessionStoreError):
            request.decode(_NOT_SENT)


def _settling(noted: _Noted, reply: Any) -> Steps[None]:
    """From the reply to an operation's outcome, with further round trips if it takes any."""
    request, outcome = noted.request, noted.outcome
    try:
        if isinstance(request, Snapshot) and isinstance(reply, OutOfMemoryError):
            instead = request.instead  # MULTI was refused
            result = yield Call(instead.script, instead.keys, instead.args, request.decode)
        elif isinstance(reply, Exception):
            raise of_any_server(reply)
        else:
            result = request.decode(reply)
            if isinstance(result, REQUESTS):
                result = yield result
    except Exception as error:
        outcome.fail(error)
    else:
        outcome.succeed(result)


def _is_passing(reply: Any) -> bool:
    return isinstance(reply, Exception) and is_transient(of_any_server(reply))


class Batch(_Batch):
    """Operations of a ``SessionStore`` in one round trip; see the module.

    In a ``with``, leaving sends them; nothing is sent after an exception. More than 1,000 take a
    round trip for each 1,000, and an operation that takes several anyway, such as a long listing,
    goes on after the others. An operation that fails raises nothing here: its outcome has the
    error, and if nobody looks at that, it is logged.
    """

    def __init__(self, sender: Sender, executor: SyncExecutor) -> None:
        super().__init__(sender)
        self._executor = executor

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._executor.carry(self._leaving(error))


class AsyncBatch(_Batch):
    """Operations of an ``AsyncSessionStore`` in one round trip; see ``Batch``.

    Within the ``async with`` they are noted, not awaited.
    """

    def __init__(self, sender: Sender, executor: AsyncExecutor) -> None:
        super().__init__(sender)
        self._executor = executor

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self._executor.carry(self._leaving(error))
