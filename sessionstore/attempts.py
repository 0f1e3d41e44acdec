"""One deadline per call, over all its attempts.

With a client of its own, a store sends a call again after a failure that may pass by itself, with
exponential backoff and full jitter (Marc Brooker, "Exponential Backoff And Jitter"). The last
attempt must fit in the deadline too: waiting for a connection, connecting, and reading the reply.
So the deadline is divided:

    0 s                               5.5 s        6 s          7.5 s               10 s
    |------- attempts may begin --------|- pool wait -|- connect --|------ read ------|
"""

from __future__ import annotations

import logging
import random
import time
from dataclasses import dataclass

from sessionstore.errors import (
    DurabilityError,
    OutcomeUnknownError,
    is_transient,
    of_any_server,
    surely_not_run,
)

logger = logging.getLogger("sessionstore")

ATTEMPTS_SHARE = 0.55
POOL_WAIT_SHARE = 0.05
CONNECT_SHARE = 0.15
READ_SHARE = 0.25
#: How much of the time to read its answer a write waits for replicas: the answer must still come.
REPLICAS_SHARE = 0.6
REPLICAS_SECONDS = 1.0  # at most, with a client that was handed in

_FIRST_PAUSE = 0.01  # seconds
_LONGEST_PAUSE = 0.5


@dataclass(slots=True)
class Attempts:
    """The attempts of one call.

    ``deadline`` is in seconds, None for a client that was handed in: its own retries, if any, are
    all there are.
    """

    what: str
    deadline: float | None
    is_write: bool
    began: float  # time.monotonic()
    may_have_run: bool = False  # True from the start for the repeat of a write
    were_cut_off: bool = False  # another server may answer from now on
    _failed: int = 0

    def pause_after(self, error: Exception) -> float:
        """Seconds to wait before the next attempt.

        Raises:
            DurabilityError: the error itself: the write was carried out.
            OutcomeUnknownError: no more attempts, and this write may or may not have happened.
            redis.RedisError: no more attempts; the error itself.
        """
        if isinstance(error, DurabilityError):
            raise error
        error = of_any_server(error)
        # A client that was handed in may have tried more often than it tells. Any other answer
        # than a transient failure is the server's: this attempt changed nothing.
        if is_transient(error):
            self.may_have_run |= self.deadline is None or not surely_not_run(error)
            self.were_cut_off = True
        self._failed += 1
        pause = random.uniform(0, min(_LONGEST_PAUSE, _FIRST_PAUSE * 2**self._failed))
        time_left = (self.deadline or 0) * ATTEMPTS_SHARE - (time.monotonic() - self.began)
        if is_transient(error) and pause < time_left:
            logger.info(
                "%s: attempt %d failed (%s), next in %.2f s",
                self.what, self._failed, type(error).__name__, pause,
            )  # fmt: skip
            return pause
        if self.is_write and self.may_have_run:
            raise OutcomeUnknownError(
                f"{self.what}: no answer after {self._failed} attempts; it may or may not have "
                f"been carried out, store.repeat(error) sends it again safely ({error})"
            ) from error
        raise error
