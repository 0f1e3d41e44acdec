"""Writers: a session's buffer as a text file that batches.

``store.writer(session_id)`` takes text as fast as a program prints it. What is written is gathered
for a moment and sent in the background, so that many lines make one round trip; an error shows at
a later write, a ``flush`` or the ``close``, as with a file on a disk that fills up.

``Writer`` blocks when too much is pending, and sends in a daemon thread; ``AsyncWriter`` awaits,
and sends in a task. What they share is in ``writing.py``.
"""

from __future__ import annotations

import asyncio
import io
import logging
import os
import threading
from collections.abc import Iterable
from contextlib import suppress
from types import TracebackType
from typing import Any, Self

from sessionstore._operation import AsyncExecutor, SyncExecutor
from sessionstore.aside import WriterThread
from sessionstore.errors import SessionStoreError
from sessionstore.writing import OVERHEAD, Backlog, length_of

logger = logging.getLogger("sessionstore")

LINGER = 1.0  # seconds that a thread waits for more before it ends


# ---- Blocking -----------------------------------------------------------------------------------


class Writer(io.TextIOBase):
    """A session's output, or its errors, as a text file to write to; see ``SessionStore.writer``.

    For ``print(…, file=writer)``, ``logging.StreamHandler(writer)`` and anything else that writes
    to a file; ``writer.buffer`` is the same for bytes. Threads may share it. A child process that
    is forked may go on with it: what was pending is its parent's to send.
    """

    encoding = "utf-8"
    errors: str | None = "replace"

    def __init__(self, store: SyncExecutor, backlog: Backlog) -> None:
        self._store = store
        self._backlog = backlog
        self._buffer: WriterBuffer | None = None
        self._start_afresh()
        _open.add(self)

    def _start_afresh(self) -> None:
        """Nothing has been written: in a forked child it is the parent's to send."""
        # Reentrant: a signal handler may print.
        self._lock = threading.RLock()
        self._news = threading.Condition(self._lock)  # for the thread
        self._progress = threading.Condition(self._lock)  # for those who wait for it
        self._thread: threading.Thread | None = None
        self._sender: int | None = None  # the thread's number
        self._backlog.start_afresh()

    def __repr__(self) -> str:
        return _described(self, self._backlog)

    @property
    def session_id(self) -> str:
        """The session."""
        return self._backlog.session_id

    @property
    def closed(self) -> bool:
        """True once the writer has been closed."""
        return self._backlog.closed

    def writable(self) -> bool:
        """True: that is what it is for."""
        return True

    def write(self, text: str | bytes | bytearray | memoryview, /) -> int:
        """Take text, or bytes, to be stored line by line.

        Returns at once unless ``max_pending`` bytes wait to be stored.

        Args:
            text: with its newlines; bytes are decoded as UTF-8 with replacement, and may end
                inside a character.

        Returns:
            How many characters were taken; of bytes, how many bytes.

        Raises:
            SessionStoreError: earlier text could not be stored: the error of ``add_output``.
            redis.RedisError: the same, of Redis itself.
        """
        # What 300,000 lines a second pass through: 0.25 µs.
        if type(text) is str and text.isascii():
            backlog = self._backlog
            length = len(text)
            size = length + OVERHEAD
            with self._lock:
                if backlog.written + size <= backlog.alarm:
                    backlog.written += size
                    backlog.pieces.append(text)
                    return length
        return self._write(text)

    def _write(self, text: str | bytes | bytearray | memoryview) -> int:
        length = length_of(text)
        backlog = self._backlog
        with self._lock:
            backlog.refuse_if_over()
            while backlog.is_full and not self._is_sender():
                self._wait()
                backlog.refuse_if_over()
            if length and backlog.append(text):
                with suppress(RuntimeError):  # no more threads: tried again when one is needed
                    self._wake()
        return length

    def writelines(self, lines: Iterable[Any], /) -> None:
        """Write one after the other; newlines are not added."""
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        """Wait until every complete line written so far is stored.

        Raises:
            SessionStoreError: it could not be stored: the error of ``add_output``.
            redis.RedisError: the same, of Redis itself.
        """
        backlog = self._backlog
        with self._lock:
            backlog.refuse_if_over()
            place = backlog.want_all()
            if backlog.finished < place and not self._is_sender():
                self._wake()
                while backlog.finished < place:
                    self._wait()
                    backlog.refuse_if_failed()

    def close(self) -> None:
        """Store everything, an unfinished last line too, and take nothing more.

        Nothing is done if it was closed before.

        Raises:
            SessionStoreError: not everything could be stored: the error of ``add_output``.
            redis.RedisError: the same, of Redis itself.
        """
        self._begin_to_close()
        backlog = self._backlog
        with self._lock:
            if self._thread is None and not backlog.is_done:
                self._send_all()  # there are no more threads: the interpreter ends
            while not backlog.is_done and not self._is_sender():
                self._wait()
            if backlog.closed:
                return
            backlog.closed = True
        _open.discard(self)
        backlog.refuse_if_failed()

    def _begin_to_close(self) -> None:
        """Take nothing more, and have what is pending stored, without waiting for it."""
        with self._lock:
            if not self._backlog.closing:
                self._backlog.close()
                if not self._backlog.is_done:
                    with suppress(RuntimeError):
                        self._wake()

    @property
    def buffer(self) -> WriterBuffer:
        """The same as a binary file, for ``shutil.copyfileobj(process.stdout, writer.buffer)``."""
        if self._buffer is None:
            self._buffer = WriterBuffer(self)
        return self._buffer

    def __enter__(self) -> Self:
        self._backlog.refuse_if_over()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        try:
            self.close()
        except Exception as failure:
            if error is None:
                raise
            if failure is not error:
                _tell(self.session_id, failure)

    # ---- The thread --------------------------------------------------------------------------

    def _is_sender(self) -> bool:
        """Whether this is the thread that sends: it must not wait for itself."""
        return self._sender == threading.get_ident()

    def _wait(self) -> None:
        """Wait for progress."""
        if self._thread is None:
            self._wake()
        self._progress.wait()

    def _wake(self) -> None:
        """Have the thread look at the backlog."""
        if self._thread is None:
            thread = WriterThread(target=self._run, name="sessionstore-writer", daemon=True)
            thread.start()
            self._thread = thread
        else:
            self._news.notify()

    def _run(self) -> None:
        self._sender = threading.get_ident()
        while self._has_something_to_send():
            self._send_all()

    def _has_something_to_send(self) -> bool:
        """Wait until something is to be sent; False if it need not be waited for any longer."""
        backlog = self._backlog
        with self._lock:
            while (pause := backlog.pause()) != 0:
                if pause is not None:
                    self._news.wait(pause)
                elif backlog.is_over or not (
                    self._news.wait(LINGER) or backlog.pause() is not None
                ):
                    self._thread = self._sender = None
                    return False
            return True

    def _send_all(self) -> None:
        """Send what is gathered."""
        backlog, lock = self._backlog, self._lock
        try:
            with lock:
                batches = backlog.take()
            for entries, place in batches:
                self._store.carry(backlog.storing(entries))
                with lock:
                    backlog.has_stored(place)
                    # At once: who waits for room then writes while the next batch is on its way.
                    self._progress.notify_all()
            with lock:
                backlog.has_stored_all()
                self._progress.notify_all()
        except BaseException as error:  # it is raised where somebody writes
            with lock:
                backlog.fail(error)
                self._progress.notify_all()


class WriterBuffer(io.RawIOBase):
    """A ``Writer`` as a binary file. Closing it leaves the writer open."""

    def __init__(self, writer: Writer) -> None:
        self._writer = writer

    def writable(self) -> bool:
        """True: that is what it is for."""
        return True

    def write(self, data: Any, /) -> int:
        """Take bytes; see ``Writer.write``."""
        return self._writer.write(memoryview(data))

    def flush(self) -> None:
        """Wait until every complete line is stored; see ``Writer.flush``."""
        if not self._writer.closed and not self.closed:
            self._writer.flush()


# ---- On an event loop ---------------------------------------------------------------------------


class AsyncWriter:
    """A session's output, or its errors, to write to; see ``AsyncSessionStore.writer``.

    Tasks may share it. It must be closed before its event loop ends: only there it can send.
    """

    def __init__(self, store: AsyncExecutor, backlog: Backlog) -> None:
        self._store = store
        self._backlog = backlog
        self._start_afresh()
        _open.add(self)

    def _start_afresh(self) -> None:
        """Nothing has been written: in a forked child it is the parent's to send."""
        self._news = asyncio.Event()  # for the task
        self._progress = asyncio.Event()  # for those who wait for it
        self._task: asyncio.Task[None] | None = None
        self._closing: asyncio.Task[None] | None = None
        self._backlog.start_afresh()

    def __repr__(self) -> str:
        return _described(self, self._backlog)

    @property
    def session_id(self) -> str:
        """The session."""
        return self._backlog.session_id

    @property
    def closed(self) -> bool:
        """True once the writer has been closed."""
        return self._backlog.closed

    async def write(self, text: str | bytes | bytearray | memoryview, /) -> int:
        """Take text, or bytes, to be stored line by line; see ``Writer.write``.

        It waits only while ``max_pending`` bytes wait to be stored. If it is cancelled then,
        nothing of ``text`` was taken.
        """
        length = length_of(text)
        backlog = self._backlog
        backlog.refuse_if_over()
        while backlog.is_full and asyncio.current_task() is not self._task:
            await self._wait()
            backlog.refuse_if_over()
        if length and backlog.append(text):
            self._wake()
        return length

    async def writelines(self, lines: Iterable[Any], /) -> None:
        """Write one after the other; newlines are not added."""
        for line in lines:
            await self.write(line)

    async def flush(self) -> None:
        """Wait until every complete line written so far is stored; see ``Writer.flush``."""
        backlog = self._backlog
        backlog.refuse_if_over()
        place = backlog.want_all()
        while backlog.finished < place:
            await self._wait()
            backlog.refuse_if_failed()

    async def close(self) -> None:
        """Store everything and take nothing more; see ``Writer.close``.

        If it is cancelled, everything is stored all the same, before it ends.
        """
        self._begin_to_close()
        self._closing = self._closing or asyncio.ensure_future(self._close())
        try:
            await asyncio.shield(self._closing)
        except asyncio.CancelledError:
            await asyncio.wait([self._closing])
            if self._backlog.failure is not None:
                _tell(self.session_id, self._backlog.failure)
            self._has_closed()
            raise
        if self._has_closed():
            self._backlog.refuse_if_failed()

    def _begin_to_close(self) -> None:
        """Take nothing more, and have what is pending stored, without waiting for it."""
        if not self._backlog.closing:
            self._backlog.close()
            if not self._backlog.is_done:
                self._wake()

    async def _close(self) -> None:
        while not self._backlog.is_done:
            await self._wait()
        if self._task is not None:
            await asyncio.wait([self._task])

    def _has_closed(self) -> bool:
        """True if it was open until now."""
        _open.discard(self)
        was_open, self._backlog.closed = not self._backlog.closed, True
        return was_open

    async def __aenter__(self) -> Self:
        self._backlog.refuse_if_over()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        try:
            await self.close()
        except Exception as failure:
            if error is None:
                raise
            if failure is not error:
                _tell(self.session_id, failure)

    # ---- The task ----------------------------------------------------------------------------

    async def _wait(self) -> None:
        """Wait for progress."""
        self._wake()
        await self._progress.wait()

    def _wake(self) -> None:
        """Have the task look at the backlog."""
        if self._task is None or self._task.done():
            self._task = asyncio.ensure_future(self._run())
        self._news.set()

    def _has_progressed(self) -> None:
        self._progress.set()
        self._progress = asyncio.Event()

    async def _run(self) -> None:
        try:
            while (pause := self._backlog.pause()) is not None:
                if pause:
                    # Not wait_for: Python 3.11's may swallow a cancellation.
                    with suppress(TimeoutError):
                        async with asyncio.timeout(pause):
                            await self._news.wait()
                    self._news.clear()
                else:
                    await self._send_all()
        finally:
            self._has_progressed()

    async def _send_all(self) -> None:
        """Send what is gathered."""
        backlog = self._backlog
        try:
            for entries, place in backlog.take():
                await self._store.carry(backlog.storing(entries))
                backlog.has_stored(place)
                self._has_progressed()
            backlog.has_stored_all()
            self._has_progressed()
        except asyncio.CancelledError:  # by the end of the event loop: nobody else knows the task
            told = f"{self.session_id}: the event loop ended before everything was stored"
            backlog.fail(SessionStoreError(told))
            raise
        except BaseException as error:  # it is raised where somebody writes
            backlog.fail(error)


# ---- Both ---------------------------------------------------------------------------------------


def _described(writer: Writer | AsyncWriter, backlog: Backlog) -> str:
    state = "closed" if writer.closed else f"{backlog.pending} bytes pending"
    return f"<{type(writer).__name__} to {writer.session_id}, {state}>"


def _tell(session_id: str, failure: BaseException | str) -> None:
    logger.warning("%s: not everything that was written is stored: %s", session_id, failure)


#: Until they are closed: what is pending must not be collected as garbage.
_open: set[Any] = set()


def closing(store: SyncExecutor | AsyncExecutor) -> list[Any]:
    """The open writers of a store, which begin to close, all at the same time."""
    writers = [writer for writer in list(_open) if writer._store is store]
    for writer in writers:
        writer._begin_to_close()
    return writers


def close_all() -> None:
    """Close every open writer, at the end of the interpreter."""
    writers = [writer for writer in list(_open) if isinstance(writer, Writer)]
    for writer in list(_open):
        if isinstance(writer, Writer):
            writer._begin_to_close()  # pyright: ignore[reportPrivateUsage]
        elif not writer._backlog.is_empty:
            _tell(writer.session_id, "it was not closed before its event loop ended")
    for writer in writers:
        try:
            writer.close()
        except Exception as error:
            _tell(writer.session_id, error)


def _after_fork() -> None:
    """What is pending is the parent's to send, and only the parent has the thread."""
    for writer in list(_open):
        writer._start_afresh()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
