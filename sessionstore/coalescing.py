"""Coalescing: calls of one turn of the event loop in one pipeline.

Awaited one by one on redis-py, a call costs well over 100 µs of the interpreter's time, a
connection of its own, and beyond the pool's size a wait for one. In a pipeline it costs a fraction.
So calls that are made while others are on their way are gathered until the end of the loop's turn,
and sent together. A call that is alone goes alone, at once.

    one task      call → reply → call → reply              each alone, nothing is gathered
    many tasks    call call call … ─ end of the turn ─ one pipeline ─ replies → call call call …

What stays each call's own: its reply or error; its attempts, for after a failure of the connection
each call is sent again by itself, and gathered again; its deadline, for those that wait to be sent
are told when the server does not answer; and its end, for a caller that is cancelled disturbs
nobody. Cancelled before it was sent, its write does not happen; afterwards it happens once, or not
at all if it has not reached the server.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager, nullcontext, suppress
from functools import partial
from typing import Any, TypeAlias, cast

from redis.exceptions import ConnectionError
from redis.exceptions import TimeoutError as RedisTimeoutError

from sessionstore.errors import own_copy
from sessionstore.pipelining import Command

MOST_CALLS = 128  # in one pipeline
WORTH_HALVING = 32  # calls, where two pipelines may be on their way
MOST_BYTES = 1024 * 1024  # of arguments in one pipeline
#: Pipelines and lone calls on their way at the same time. With more of them there would be more
#: connections, smaller pipelines, and no more calls: the interpreter is what is short.
MOST_ON_THEIR_WAY = 2
#: Of what goes alone, as many on their way as a pool of connections has room for, but not more.
MOST_ALONE = 64
#: What a script counts for whose reply may be a page of 1 MiB: at most 16 of them in a pipeline.
LARGE_REPLY = MOST_BYTES // 16
LARGE_REPLIES = frozenset(
    {
        *("read_buffer", "find_sessions", "find_session_by_service_id", "read_whole"),
        "export_sessions",
    }
)

_ALONE: Any = object()

#: A command, whether its reply may be large, and who waits for it.
_Waiting: TypeAlias = tuple[Command, bool, "asyncio.Future[Any]"]


def _weight(command: Command, *, has_large_reply: bool) -> int:
    """What a command counts for in a pipeline, in bytes."""
    text = sum(map(len, cast("tuple[bytes, ...]", command.operands)))  # they are encoded
    return text + LARGE_REPLY if has_large_reply else text


class Coalescer:
    """Sends commands of one event loop, alone or together.

    Args:
        one: sends one command alone; its reply.
        together: sends several in one pipeline; for each its reply, or its error.
        connections: the most that the client's pool gives out before it raises; None: it waits.
        have_deadline: whether the calls are sent again until a deadline.
    """

    def __init__(
        self,
        one: Callable[[Command], Awaitable[Any]],
        together: Callable[[Sequence[Command]], Awaitable[list[Any]]],
        connections: int | None = None,
        have_deadline: Callable[[], bool] = lambda: False,
    ) -> None:
        self._one, self._together = one, together
        self._have_deadline = have_deadline
        self._alone: asyncio.Semaphore | None = None
        self._most_on_their_way = MOST_ON_THEIR_WAY
        if connections is not None:  # one of them may be taken by what brings news
            self._alone = asyncio.Semaphore(max(1, min(MOST_ALONE, connections - 3)))
            self._most_on_their_way = 1 if connections <= 3 else MOST_ON_THEIR_WAY
        self._waiting: deque[_Waiting] = deque()
        self._on_their_way = 0
        self._is_crowded = False  # the last that were gathered were several
        self._is_scheduled = False
        self._pipelines: set[asyncio.Task[None]] = set()
        self._idle: asyncio.Event | None = None  # for who waits until nothing is on its way

    async def send(self, command: Command, *, has_large_reply: bool = False) -> Any:
        """The reply to a command; raises its error."""
        if self._is_crowded or self._on_their_way or self._waiting:
            loop = asyncio.get_running_loop()
            future: asyncio.Future[Any] = loop.create_future()
            self._waiting.append((command, has_large_reply, future))
            self._schedule(loop)
            try:
                reply = await future
            except asyncio.CancelledError:
                if _is_told_to_go_alone(future):
                    self._has_come_back()
                raise
            if reply is not _ALONE:
                return reply
        else:
            self._on_their_way += 1
        try:
            return await self._one(command)
        except RedisTimeoutError:
            self._turn_away()
            raise
        finally:
            self._has_come_back()

    def _schedule(self, loop: asyncio.AbstractEventLoop) -> None:
        """Send what is waiting at the end of this turn: whoever calls until then is with it."""
        if not self._is_scheduled and self._on_their_way < self._most_on_their_way:
            self._is_scheduled = True
            loop.call_soon(self._send_waiting)

    def _has_come_back(self) -> None:
        self._on_their_way -= 1
        if self._waiting:
            self._schedule(asyncio.get_running_loop())
        elif not self._on_their_way and self._idle is not None:
            self._idle.set()

    def _send_waiting(self) -> None:
        self._is_scheduled = False
        while self._waiting and self._on_their_way < self._most_on_their_way:
            gathered = self._gather()
            self._is_crowded = len(gathered) > 1
            if not gathered:
                break
            self._on_their_way += 1
            if self._is_crowded:
                pipeline = asyncio.create_task(self._send_together(gathered))
                self._pipelines.add(pipeline)
                pipeline.add_done_callback(partial(self._has_ended, gathered))
            else:
                gathered[0][-1].set_result(_ALONE)
        if not self._on_their_way and self._idle is not None:  # all that waited were cancelled
            self._idle.set()

    def _gather(self) -> list[_Waiting]:
        """The next that are waiting, as many as a pipeline takes."""
        gathered: list[_Waiting] = []
        weight = 0
        most = MOST_CALLS
        room = self._most_on_their_way - self._on_their_way
        if room > 1 and len(self._waiting) >= WORTH_HALVING:
            # In halves, the server carries out the one while the other is being made ready.
            most = min(most, (len(self._waiting) + 1) // 2)
        while self._waiting and len(gathered) < most:
            command, has_large_reply, future = self._waiting[0]
            if not future.done():  # cancelled, and never sent
                weight += _weight(command, has_large_reply=has_large_reply)
                if gathered and weight > MOST_BYTES:
                    break
                gathered.append(self._waiting[0])
            self._waiting.popleft()
        return gathered

    async def _send_together(self, gathered: list[_Waiting]) -> None:
        replies: list[Any]
        try:
            replies = await self._together([command for command, _, _ in gathered])
        except Exception as error:
            # One each: what is added to it further up is that caller's alone.
            replies = [own_copy(error) for _ in gathered]
            if isinstance(error, RedisTimeoutError):
                self._turn_away()
        for (*_, future), reply in zip(gathered, replies, strict=True):
            if future.done():  # cancelled meanwhile
                continue
            if isinstance(reply, Exception):
                future.set_exception(reply)
            else:
                future.set_result(reply)
        self._has_come_back()  # last: callers that are woken now are gathered before more is sent

    def _turn_away(self) -> None:
        """The server does not answer: let each that waits see whether it has time to try again.

        They would wait for one timeout after another: of 2,000 calls to a stopped server half came
        back after one and a half deadlines, or later. Without a deadline each has but one attempt,
        and waits for it.
        """
        if not self._have_deadline():
            return
        while self._waiting:
            *_, future = self._waiting.popleft()
            if not future.done():
                future.set_exception(
                    ConnectionError("No connection available: the server does not answer")
                )

    def _has_ended(self, gathered: list[_Waiting], pipeline: asyncio.Task[None]) -> None:
        self._pipelines.discard(pipeline)
        if pipeline.cancelled():  # by others, perhaps before it began; its callers were not
            for *_, future in gathered:
                if not future.done():
                    future.set_exception(ConnectionError("the pipeline of this call was cancelled"))
            self._has_come_back()

    def alone(self) -> AbstractAsyncContextManager[Any]:
        """While something is on its way that goes alone: the pool must have room for it."""
        return nullcontext() if self._alone is None else self._alone

    async def aclose(self, patience: float) -> None:
        """Wait for what is on its way, for so many seconds at most: no task is left."""
        self._idle = asyncio.Event()
        if self._on_their_way or self._waiting:
            with suppress(TimeoutError):
                async with asyncio.timeout(patience):
                    await self._idle.wait()
        for pipeline in self._pipelines:
            pipeline.cancel()
        while self._pipelines:
            await asyncio.wait(list(self._pipelines))


def _is_told_to_go_alone(future: asyncio.Future[Any]) -> bool:
    is_answered = future.done() and not future.cancelled() and future.exception() is None
    return is_answered and future.result() is _ALONE
