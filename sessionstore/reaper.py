"""A reaper in the background: ``reap``, again and again.

Any number of workers may run one; no leader is needed. A pass that has marked a session whose lease
has expired is followed by another when the grace period is over, however rare passes are otherwise.
"""

from __future__ import annotations

import asyncio
import logging
import random
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from types import TracebackType
from typing import Any, Self

from sessionstore import arguments as check
from sessionstore.errors import InvalidArgumentError
from sessionstore.models import Reaped
from sessionstore.store import AsyncSessionStore, SessionStore

logger = logging.getLogger("sessionstore")

DEFAULT_EVERY = 10.0  # seconds
#: When a mark is looked at again, in grace periods: it counts from one to three of them.
LOOK_AGAIN = 1.1


class _Reaping:
    """What a reaper does apart from waiting."""

    def __init__(
        self,
        every: float,
        idle_for: float | None,
        ended_for: float | None,
        on_reaped: Callable[[Reaped], object] | None,
    ) -> None:
        self.every = check.seconds("every", every, 0.01, 86_400.0)
        if on_reaped is not None and not callable(on_reaped):
            raise InvalidArgumentError.of("on_reaped", "must be a function of a Reaped")
        self.arguments: dict[str, Any] = {
            name: None if value is None else check.seconds(name, value)
            for name, value in (("idle_for", idle_for), ("ended_for", ended_for))
        }
        self._on_reaped = on_reaped

    def pause_after_failure(self, grace: float) -> float:
        """Seconds until the next pass: this one may have marked sessions, in some partitions."""
        return min(self.every, LOOK_AGAIN * grace)

    def pause_after(self, reaped: Sequence[Reaped], grace: float) -> float:
        """Tell of one pass; seconds until the next."""
        for one in reaped:
            if one.action != "marked":
                logger.info("%s %s: %s", one.session_id, one.action, one.reason)
            if self._on_reaped is not None:
                try:
                    self._on_reaped(one)
                except (Exception, SystemExit):
                    logger.exception("on_reaped failed, told of %s", one.session_id)
        # Not all workers at the same time.
        pause = self.every * random.uniform(0.9, 1.1)
        return min(pause, LOOK_AGAIN * grace) if reaped else pause


class Reaper:
    """Reaps in a daemon thread, from ``start`` to ``stop`` or within a ``with``.

    A pass that fails is logged, and the next one tries again.

    Args:
        store: the store.
        every: seconds between two passes.
        idle_for: as for ``reap``.
        ended_for: as for ``reap``.
        on_reaped: called with everything that is done, in the thread.
    """

    def __init__(
        self,
        store: SessionStore,
        *,
        every: float = DEFAULT_EVERY,
        idle_for: float | None = None,
        ended_for: float | None = None,
        on_reaped: Callable[[Reaped], object] | None = None,
    ) -> None:
        self._store = store
        self._reaping = _Reaping(every, idle_for, ended_for, on_reaped)
        self._stopping = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Begin, with a pass at once."""
        if self._thread is None:
            self._stopping.clear()
            self._thread = threading.Thread(
                target=self._run, name="sessionstore-reaper", daemon=True
            )
            self._thread.start()

    def stop(self) -> None:
        """End, after the pass that is on its way."""
        self._stopping.set()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join()
        self._thread = None

    def _run(self) -> None:
        pause = 0.0
        while not self._stopping.wait(pause):
            try:
                reaped = self._store.reap(**self._reaping.arguments)
                pause = self._reaping.pause_after(reaped, self._store.settings.reap_grace)
            except Exception as error:
                logger.warning("a pass of the reaper failed: %s", error)
                pause = self._reaping.pause_after_failure(self._store.settings.reap_grace)

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.stop()


class AsyncReaper:
    """Reaps in a task; otherwise as ``Reaper``, in an ``async with``."""

    def __init__(
        self,
        store: AsyncSessionStore,
        *,
        every: float = DEFAULT_EVERY,
        idle_for: float | None = None,
        ended_for: float | None = None,
        on_reaped: Callable[[Reaped], object] | None = None,
    ) -> None:
        self._store = store
        self._reaping = _Reaping(every, idle_for, ended_for, on_reaped)
        self._stopping = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin, with a pass at once."""
        if self._task is None:
            self._stopping.clear()
            self._task = asyncio.get_running_loop().create_task(self._run())

    async def stop(self) -> None:
        """End, after the pass that is on its way."""
        self._stopping.set()
        if self._task is not None:
            await self._task
        self._task = None

    async def _run(self) -> None:
        pause = 0.0
        while not await self._stopped_within(pause):
            try:
                reaped = await self._store.reap(**self._reaping.arguments)
                pause = self._reaping.pause_after(reaped, self._store.settings.reap_grace)
            except Exception as error:
                logger.warning("a pass of the reaper failed: %s", error)
                pause = self._reaping.pause_after_failure(self._store.settings.reap_grace)

    async def _stopped_within(self, seconds: float) -> bool:
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._stopping.wait()
        return self._stopping.is_set()

    async def __aenter__(self) -> Self:
        self.start()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.stop()
