"""Telling others from a thread that somebody may be waiting for.

A writer's thread logs, and tells of a lost lease. Whoever is told may be waiting for that very
thread, with the lock of a logging handler in hand:

    main thread      log.info(…): a StreamHandler, holding its lock, flushes the writer and waits
    writer's thread  the store is out of reach: a warning for the same handler, which waits too

So what a writer's thread tells is told by another thread, and waited for only so long.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable

LONGEST_WAIT = 1.0  # seconds


class WriterThread(threading.Thread):
    """A thread that others wait for, perhaps with a lock in hand."""


def call(function: Callable[[], object]) -> None:
    """Call a function; if this is a writer's thread, in another one."""
    if isinstance(threading.current_thread(), WriterThread):
        teller = threading.Thread(target=function, name="sessionstore-tells", daemon=True)
        try:
            teller.start()
        except RuntimeError:  # no more threads: the interpreter ends
            return
        teller.join(LONGEST_WAIT)
    else:
        function()


class _Aside(logging.Filter):
    """Hands the library's own records on, see the module."""

    def filter(self, record: logging.LogRecord) -> bool:
        if not isinstance(threading.current_thread(), WriterThread):
            return True
        call(lambda: logging.getLogger(record.name).handle(record))
        return False


logging.getLogger("sessionstore").addFilter(_Aside())
