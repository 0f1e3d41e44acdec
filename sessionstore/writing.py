"""What writers do, apart from blocking or awaiting: shared by both stores.

A ``Backlog`` is what has been written to one buffer and is not stored yet. Places in the text are
counted from the opening of the writer, in bytes of UTF-8 and 16 for each write:

    |···· stored ····|·· on its way, batch by batch ··|·· gathered since ··|
    0              stored                           taken              written

One batch is on its way at a time, as one ``add_output`` or ``add_error``: so the order is that of
the writes, and each line is stored once, for each such call is (``lanes.py``). What is gathered
meanwhile makes the next batches, so a fast writer does not wait for round trips.
"""

from __future__ import annotations

import codecs
import logging
import time
from collections.abc import Callable, Iterator
from typing import Any, Literal

from sessionstore import arguments as check
from sessionstore._call import Steps
from sessionstore.errors import (
    PASSING,
    InvalidArgumentError,
    OutcomeUnknownError,
    WritesLostError,
)
from sessionstore.lines import LONGEST_ENTRY, LineSplitter
from sessionstore.operations import SessionOperations

logger = logging.getLogger("sessionstore")

BATCH_BYTES = 64 * 1024
INTERVAL = 0.05  # seconds
MAX_PENDING = 4 * 1024 * 1024  # bytes
PATIENCE = 60.0  # seconds
LONGEST_INTERVAL = 60.0
OVERHEAD = 16  # bytes counted for each write beside its text
# In one batch, which holds the server up for about 1 ms. With 10,000 entries it would be 5 ms, and
# the lines a second are the same.
MOST_ENTRIES = 2000
MOST_CHARACTERS = 1024 * 1024

PAUSE = 0.2  # seconds between two attempts, beside those that the store makes by itself

_new_decoder = codecs.getincrementaldecoder("utf-8")


class Backlog:
    """What has been written to one buffer and is not stored. Not safe for threads.

    Args:
        store: where the session is kept.
        operation: which buffer.
        session_id: the session.
        batch_bytes: so much is sent at once, without waiting for more.
        interval: seconds that a write waits for others to go with it.
        max_pending: bytes; a write has to wait while there is so much.
        patience: seconds to try again after a failure that may pass.
    """

    def __init__(
        self,
        store: SessionOperations,
        operation: Literal["add_output", "add_error"],
        session_id: str,
        batch_bytes: int,
        interval: float,
        max_pending: int,
        patience: float,
    ) -> None:
        self.session_id = session_id
        self._store = store
        self._build: Callable[..., Any] = vars(SessionOperations)[operation].build
        self._batch_bytes = min(batch_bytes, max_pending)
        self._interval = interval
        self._max_pending = max_pending
        self._patience = patience
        self.closing = False
        self.closed = False
        self.start_afresh()

    def start_afresh(self) -> None:
        """Nothing has been written."""
        self.pieces: list[str] = []
        self.written = self.taken = self.stored = 0
        self.finished = 0  # up to here every complete line is stored
        #: A write that reaches further than this needs more than to be appended.
        self.alarm = -1
        self.failure: BaseException | None = None
        self.loss: WritesLostError | None = None  # yet to be told
        self._splitter = LineSplitter(min(LONGEST_ENTRY, self._store.settings.chunk_limit))
        self._decoder = _new_decoder("replace")
        self._is_cut = False  # the last bytes end inside a character
        self._gathering_since = 0.0  # time.monotonic()
        self._is_on_its_way = False
        self._wanted = 0  # somebody waits until all up to here is stored

    # ---- Writing -----------------------------------------------------------------------------

    def _text_of(self, data: str | bytes | bytearray | memoryview) -> str:
        if not isinstance(data, str):
            return self._decoder.decode(bytes(data))
        text = str.__str__(data)
        return self._decoder.decode(b"", final=True) + text if self._is_cut else text

    def append(self, data: str | bytes | bytearray | memoryview) -> bool:
        """Take what is written; True if whoever sends has to be told."""
        text = self._text_of(data)
        self._is_cut = not isinstance(data, str) and bool(self._decoder.getstate()[0])
        is_first = self.written == self.taken
        self.pieces.append(text)
        self.written += size_of(text)
        if is_first:
            self._gathering_since = time.monotonic()
        gathered = self.written - self.taken
        news = not self._is_on_its_way and (is_first or gathered >= self._batch_bytes)
        self._set_alarm()
        return news

    def _set_alarm(self) -> None:
        full = self.stored + self._max_pending
        if self.is_over or self._is_cut or self.loss is not None:
            self.alarm = -1
        elif self.written == self.taken:  # the next write is the first of those to come
            self.alarm = self.written
        elif self._is_on_its_way or self.written - self.taken >= self._batch_bytes:
            self.alarm = full
        else:
            self.alarm = min(self.taken + self._batch_bytes - 1, full)

    @property
    def pending(self) -> int:
        """Bytes that have been written and are not stored, an unfinished line aside."""
        return self.written - self.stored

    @property
    def is_full(self) -> bool:
        return self.pending >= self._max_pending and not self.is_over

    @property
    def is_over(self) -> bool:
        """Whether nothing can be written any more."""
        return self.failure is not None or self.closing

    def refuse_if_over(self) -> None:
        """Raise what a write raises when nothing can be written any more."""
        self.refuse_if_failed()
        if self.closing:
            raise ValueError("this writer has been closed")  # as of any closed file

    def refuse_if_failed(self) -> None:
        """Raise what kept something from being stored."""
        if self.failure is not None:  # again and again: its traceback must not grow
            raise self.failure.with_traceback(self._failed_at)
        loss, self.loss = self.loss, None
        if loss is not None:  # once: what was written since is stored all the same
            self._set_alarm()
            raise loss

    # ---- Sending -----------------------------------------------------------------------------

    def want_all(self) -> int:
        """Have all complete lines stored without waiting for more; the place until which."""
        self._wanted = self.written
        return self._wanted

    def close(self) -> None:
        """Have everything stored, an unfinished last line too; nothing more can be written."""
        self.closing = True
        self.want_all()
        self._set_alarm()

    def pause(self) -> float | None:
        """Seconds until something is to be sent; None if there is nothing to send."""
        if self.failure is not None:
            return None
        if not (self._is_unfinished if self.closing else self.written != self.taken):
            return None
        if (
            self.closing
            or self._wanted > self.taken
            or self.written - self.taken >= self._batch_bytes
        ):
            return 0.0
        return max(self._gathering_since + self._interval - time.monotonic(), 0.0)

    @property
    def is_done(self) -> bool:
        """Whether everything is stored, after ``close``; or nothing will be any more."""
        if self.failure is not None:
            return True
        return self.closing and self.is_empty

    @property
    def is_empty(self) -> bool:
        """Whether nothing is to be stored, not even an unfinished line."""
        return not (self._is_on_its_way or self._is_unfinished)

    @property
    def _is_unfinished(self) -> bool:
        return self.written != self.taken or self._is_cut or self._splitter.is_within_a_line

    def take(self) -> Iterator[tuple[list[str], int]]:
        """What is gathered is on its way from now on.

        Returns:
            An iterator over the batches: the entries of each, and up to where everything is stored
            with them. It may be used without a lock.
        """
        pieces, self.pieces = self.pieces, []
        if self.closing and self._is_cut:
            pieces.append(self._decoder.decode(b"", final=True))
            self._is_cut = False
        self.taken = self.written
        self._is_on_its_way = True
        self._set_alarm()
        return self._batches(pieces, is_last=self.closing)

    def _batches(self, pieces: list[str], *, is_last: bool) -> Iterator[tuple[list[str], int]]:
        begin, size = self.stored, self.taken - self.stored
        entries = self._splitter.feed("".join(pieces))
        pieces.clear()
        if is_last:
            entries += self._splitter.close()
        first = 0
        while first < len(entries):
            batch = entries[first : first + MOST_ENTRIES]
            while len(batch) > 1 and sum(map(len, batch)) > MOST_CHARACTERS:
                del batch[len(batch) // 2 :]
            first += len(batch)
            # By the number of entries: near enough to make room by, and never up to the end.
            yield batch, begin + size * first // (len(entries) + 1)

    def has_stored(self, place: int) -> None:
        """A batch is stored."""
        self.stored = place
        self._set_alarm()

    def has_stored_all(self) -> None:
        """Everything that was taken is stored."""
        self.stored = self.finished = self.taken
        self._is_on_its_way = False
        self._set_alarm()

    def fail(self, error: BaseException) -> None:
        """Nothing can be stored any more."""
        self.failure, self._failed_at = error, error.__traceback__
        self.pieces.clear()
        self._is_on_its_way = False
        self._set_alarm()

    def storing(self, entries: list[str]) -> Steps[None]:
        """Store the entries of one batch, and try again while what fails may pass."""
        give_up_at = time.monotonic() + self._patience
        unknown: OutcomeUnknownError | None = None
        is_told = False
        while True:
            try:
                if unknown is None:
                    yield self._build(self._store, self.session_id, *entries)
                else:
                    yield unknown
                return
            except PASSING as error:
                if isinstance(error, OutcomeUnknownError):
                    unknown = error
                if time.monotonic() >= give_up_at:
                    raise
                if not is_told:
                    is_told = True
                    message = "%s: the store takes nothing now (%s), output waits for it"
                    logger.warning(message, self.session_id, error)
            except WritesLostError as error:
                self.loss, unknown = WritesLostError.together(self.loss, error), None
                continue
            except InvalidArgumentError:
                if unknown is None:
                    raise
                raise unknown from None  # it is too old to be repeated
            yield PAUSE


def length_of(data: Any) -> int:
    """How much a write of this says it has taken."""
    if isinstance(data, memoryview):
        return data.nbytes
    if isinstance(data, (str, bytes, bytearray)):
        return len(data)
    raise TypeError(f"a writer takes str or bytes, not {type(data).__name__}")


def size_of(text: str) -> int:
    """Bytes that a write counts for."""
    if text.isascii():
        return len(text) + OVERHEAD
    return len(text.encode(errors="surrogatepass")) + OVERHEAD


def backlog(
    store: SessionOperations,
    session_id: str,
    *,
    errors: bool,
    batch_bytes: int,
    interval: float,
    max_pending: int,
    patience: float,
) -> Backlog:
    """A backlog, if the arguments of ``store.writer`` are good."""
    return Backlog(
        store,
        "add_error" if check.flag("errors", errors) else "add_output",
        check.text("session_id", session_id),
        check.whole("batch_bytes", batch_bytes, 1),
        check.seconds("interval", interval, 0, LONGEST_INTERVAL),
        check.whole("max_pending", max_pending, 1),
        check.seconds("patience", patience),
    )
