"""News: what wakes those who follow a buffer or the events.

Scripts publish a word when they change something that can be followed (``lua/include/wake.lua``).
All followers of one store object share one subscription connection, which a thread or a task reads.
News may be lost, with a connection or because a user may not subscribe, so a follower looks for
itself too: seldom while it is subscribed, every second while it is not.

    follower: reads all there is ─┬─ waits for news, at most so long ─┬─ reads …
    script:                       └ changes a key, publishes ─────────┘

Only the thread or task that reads it touches the subscription, for redis-py's is not made for more.
So it must be woken when there is something to subscribe to: by a word on a channel of its own. The
same word, sent now and then, tells whether the connection is alive.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import os
import random
import threading
import time
from collections.abc import (
    AsyncGenerator,
    Awaitable,
    Callable,
    Generator,
    Mapping,
    Sequence,
)
from contextlib import asynccontextmanager, contextmanager
from typing import Any
from uuid import uuid4
from weakref import WeakSet

from redis.exceptions import ConnectionError, NoPermissionError, RedisError

from sessionstore import codec

logger = logging.getLogger("sessionstore")

#: Seconds that a follower waits for news before it looks for itself: subscribed, and not.
LOOKS_SELDOM, LOOKS_OFTEN = 5.0, 1.0
#: Seconds between two words to oneself, and how long after one the connection counts as dead.
PULSE, SILENCE = 10.0, 5.0
_LISTENS_FOR = 1.0  # seconds in one go
_FIRST_PAUSE, _LONGEST_PAUSE = 0.05, 1.0  # seconds before the next connection
_UNTIL_PERMITTED = 60.0  # and if there is no right to subscribe
_MOST_CHANNELS = 1000  # in one command
_IN_ONE_TURN = 32  # messages, before others on the event loop have theirs
READERS = 2  # followers of one store that read at the same time


def _no_turn() -> ConnectionError:
    """What a follower is told that would wait too long for those before it."""
    return ConnectionError("No connection available: those who follow wait for the server")


class Listener:
    """One follower: what it listens to, how far it has come, and what wakes it.

    ``signal`` is a ``threading.Event`` or an ``asyncio.Event``.
    """

    def __init__(self, channels: Sequence[str], signal: Any) -> None:
        self.channels = channels
        self.signal = signal
        self.reached = -1

    def hear(self, news: str) -> None:
        """Wake up, unless the news are the end of a buffer that was read up to there."""
        if not (news.isdecimal() and int(news) <= self.reached):
            self.signal.set()


class News:
    """Who listens to what, apart from blocking or awaiting. Safe for threads."""

    def __init__(self, control: str) -> None:
        self._control_prefix = control
        self.start_afresh()

    def start_afresh(self) -> None:
        """Nobody listens."""
        self.control = self._control_prefix + uuid4().hex[:16]
        self.lock = threading.Lock()
        self._listeners: dict[str, set[Listener]] = {}
        self._subscribed: set[str] = set()  # has been asked for
        self._confirmed: set[str] = set()
        self._heard_at = self._spoke_at = 0.0  # time.monotonic()
        self._is_changed = True  # who listens to what, since it was last seen to
        self._is_told = False  # that it is
        self.is_closed = False

    # ---- Followers ---------------------------------------------------------------------------

    def add(self, listener: Listener) -> bool:
        """Have a follower told; whether what reads the subscription is to be told of a channel."""
        with self.lock:
            is_new = not self._subscribed.issuperset(listener.channels)
            for channel in listener.channels:
                self._listeners.setdefault(channel, set()).add(listener)
            is_untold = is_new and not self._is_told
            self._is_changed |= is_new
            self._is_told |= is_new
            return is_untold

    def remove(self, listener: Listener) -> None:
        """It follows no more."""
        with self.lock:
            for channel in listener.channels:
                others = self._listeners.get(channel, set())
                others.discard(listener)
                if not others:
                    self._listeners.pop(channel, None)
                    self._is_changed = True

    def patience(self, listener: Listener) -> float:
        """Seconds that a follower may wait for news before it looks for itself."""
        is_subscribed = self._confirmed.issuperset(listener.channels)
        # Not all of them at the same time.
        return (LOOKS_SELDOM if is_subscribed else LOOKS_OFTEN) * random.uniform(1.0, 1.2)

    def wake_all(self) -> None:
        """There may be something for everybody."""
        with self.lock:
            for listener in itertools.chain.from_iterable(self._listeners.values()):
                listener.signal.set()

    def close(self) -> None:
        """Whoever follows finds out that the store has been closed."""
        self.is_closed = True
        self.wake_all()

    # ---- The subscription ----------------------------------------------------------------------

    def is_wanted(self) -> bool:
        """Whether anybody listens; if not, whoever reads the subscription ends it."""
        with self.lock:
            wanted = bool(self._listeners) and not self.is_closed
            if not wanted:
                self._forget_subscription()
                self.end()
            return wanted

    def steps_of(self, pause: float) -> Generator[float]:
        """A pause in short steps, as long as anybody listens."""
        over_at = time.monotonic() + pause
        while (left := over_at - time.monotonic()) > 0 and self._listeners and not self.is_closed:
            yield min(left, _LISTENS_FOR)

    def end(self) -> None:
        """Nobody reads the subscription any more. The lock is held."""
        raise NotImplementedError  # a thread or a task

    def changes(self) -> list[tuple[str, tuple[str, ...]]]:
        """What is to be said to the server: ``subscribe`` or ``unsubscribe``, and the channels."""
        if not self._is_changed:  # as nearly always: it is asked after each message
            return []
        with self.lock:
            wanted = {self.control, *self._listeners}
            new, old = wanted - self._subscribed, self._subscribed - wanted
            self._subscribed = wanted
            self._is_changed = self._is_told = False
            self._confirmed -= old
        return [
            (command, tuple(channels[first : first + _MOST_CHANNELS]))
            for command, channels in (("subscribe", sorted(new)), ("unsubscribe", sorted(old)))
            for first in range(0, len(channels), _MOST_CHANNELS)
        ]

    def take(self, message: Mapping[str, Any] | None) -> None:
        """What the subscription has given; nothing after a while of silence.

        Raises:
            redis.ConnectionError: it has been silent although it was spoken to.
        """
        now = time.monotonic()
        if message is None:
            if self._heard_at < self._spoke_at < now - SILENCE:
                raise ConnectionError("the subscription is silent")
            return
        self._heard_at = now
        channel = codec.text(message["channel"])
        with self.lock:
            listeners = tuple(self._listeners.get(channel, ()))
            if message["type"] == "subscribe" and channel in self._subscribed:
                self._confirmed.add(channel)
        if message["type"] == "message":
            news = codec.texts((message["data"],))[0]
            for listener in listeners:
                listener.hear(news)
        elif message["type"] == "subscribe":
            for listener in listeners:  # what it has missed before
                listener.signal.set()

    def is_pulse_due(self) -> bool:
        """Whether it is time for a word to oneself. Nothing waits for it to be heard at once."""
        now = time.monotonic()
        if now - max(self._spoke_at, self._heard_at) < PULSE:
            return False
        self._spoke_at = now
        return True

    def was_not_sent(self) -> None:
        """A word to oneself was not sent: silence means nothing."""
        self._spoke_at = 0.0

    def is_down(self, error: Exception) -> None:
        """The connection is gone, and with it news."""
        logger.info("no news for those who follow, trying again: %s", error)
        with self.lock:
            was_up = bool(self._confirmed)
            self._forget_subscription()
        self.was_not_sent()
        if was_up:  # from now on they look more often
            self.wake_all()

    def _forget_subscription(self) -> None:
        self._subscribed.clear()
        self._confirmed.clear()
        self._is_changed, self._is_told = True, False


def _pause_after(error: Exception, before: float) -> float:
    """Seconds until the next connection; ``before``: the pause before the one that failed."""
    if isinstance(error, NoPermissionError):  # nobody is going to grant it this minute
        return _UNTIL_PERMITTED
    return min(max(2 * before, _FIRST_PAUSE), _LONGEST_PAUSE) * random.uniform(0.7, 1.0)


# ---- Blocking -----------------------------------------------------------------------------------


class ThreadNews(News):
    """The news of a ``SessionStore``, read by a daemon thread while anybody listens."""

    def __init__(self, client: Any, control: str) -> None:
        self._client = client
        super().__init__(control)
        _alive.add(self)

    def start_afresh(self) -> None:
        super().start_afresh()
        self._thread: threading.Thread | None = None
        self._readers = threading.BoundedSemaphore(READERS)

    def end(self) -> None:
        self._thread = None

    @contextmanager
    def turn(self, by: float | None) -> Generator[None]:
        """While a follower reads: hundreds of them need no more connections than a few.

        Raises:
            redis.ConnectionError: its turn has not come by then (``time.monotonic()``).
        """
        patience = None if by is None else max(0.0, by - time.monotonic())
        readers = self._readers
        if not readers.acquire(timeout=patience):
            raise _no_turn()
        try:
            yield
        finally:
            readers.release()

    @contextmanager
    def listening(self, channels: Sequence[str], may_speak_by: float | None) -> Generator[Listener]:
        """A follower of these channels; until then it may wait to tell what reads for it."""
        listener = Listener(channels, threading.Event())
        is_untold = self.add(listener)
        try:
            with self.lock:
                is_running = self._thread is not None
                if not is_running:
                    self._thread = threading.Thread(
                        target=self._run, name="sessionstore-news", daemon=True
                    )
                    self._thread.start()
            if is_running and is_untold:
                self._speak(may_speak_by)
            yield listener
        finally:
            self.remove(listener)

    def _speak(self, by: float | None = None) -> None:
        """Wake the thread that reads. Without the right to publish, it takes it a second longer."""
        try:
            with self.turn(by):
                self._client.publish(self.control, "")
        except RedisError:
            self.was_not_sent()

    def _run(self) -> None:
        pause = 0.0
        while True:
            try:
                pubsub = self._client.pubsub()
                try:
                    while self.is_wanted():
                        for command, channels in self.changes():
                            getattr(pubsub, command)(*channels)
                        self.take(pubsub.get_message(timeout=_LISTENS_FOR))
                        if self.is_pulse_due():
                            self._speak()
                        pause = 0.0
                    return
                finally:
                    pubsub.close()
            except Exception as error:
                self.is_down(error)
                pause = _pause_after(error, pause)
                for step in self.steps_of(pause):
                    time.sleep(step)


_alive: WeakSet[ThreadNews] = WeakSet()


def _after_fork() -> None:
    """In the child nobody listens yet, and the subscription is the parent's."""
    for news in list(_alive):
        news.start_afresh()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


# ---- On an event loop ---------------------------------------------------------------------------


class TaskNews(News):
    """The news of an ``AsyncSessionStore``, read by a task while anybody listens.

    ``publish`` sends a word to a channel, if its turn comes by a time.
    """

    def __init__(
        self,
        client: Any,
        publish: Callable[[str, float | None], Awaitable[Any]],
        control: str,
    ) -> None:
        self._client, self._publish = client, publish
        super().__init__(control)
        self._task: asyncio.Task[None] | None = None
        self._readers = asyncio.BoundedSemaphore(READERS)

    def end(self) -> None:
        self._task = None

    @asynccontextmanager
    async def turn(self, by: float | None) -> AsyncGenerator[None]:
        """While a follower reads, unless many read in one pipeline; see ``ThreadNews``."""
        try:
            async with asyncio.timeout(None if by is None else max(0.0, by - time.monotonic())):
                await self._readers.acquire()
        except TimeoutError:
            raise _no_turn() from None
        try:
            yield
        finally:
            self._readers.release()

    @asynccontextmanager
    async def listening(
        self, channels: Sequence[str], may_speak_by: float | None
    ) -> AsyncGenerator[Listener]:
        """A follower of these channels; see ``ThreadNews``."""
        listener = Listener(channels, asyncio.Event())
        is_untold = self.add(listener)
        try:
            if self._task is None or self._task.done():
                self._task = asyncio.create_task(self._run(), name="sessionstore-news")
            elif is_untold:
                await self._speak(may_speak_by)
            yield listener
        finally:
            self.remove(listener)

    async def _speak(self, by: float | None = None) -> None:
        """Wake the task that reads; see ``ThreadNews``."""
        try:
            await self._publish(self.control, by)
        except RedisError:
            self.was_not_sent()

    async def _run(self) -> None:
        pause = 0.0
        while True:
            try:
                pubsub = self._client.pubsub()
                try:
                    while self.is_wanted():
                        for command, channels in self.changes():
                            await getattr(pubsub, command)(*channels)
                        for _ in range(_IN_ONE_TURN):
                            message = await pubsub.get_message(timeout=_LISTENS_FOR)
                            self.take(message)
                            if message is None or self._is_changed:
                                break
                        else:
                            await asyncio.sleep(0)  # what has come already does not wait by itself
                        if self.is_pulse_due():
                            await self._speak()
                        pause = 0.0
                    return
                finally:
                    await pubsub.aclose()
            except Exception as error:
                self.is_down(error)
                pause = _pause_after(error, pause)
                for step in self.steps_of(pause):
                    await asyncio.sleep(step)

    async def aclose(self) -> None:
        """No task is left."""
        self.close()
        task, self._task = self._task, None
        if task is not None:
            task.cancel()
            await asyncio.wait([task])
