"""What ``logs -f`` and ``events -f`` share: they survive outages, and end with their reader."""

from __future__ import annotations

import os
import select
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import TypeVar

from sessionstore.cli import failures
from sessionstore.cli.failures import note

T = TypeVar("T")
C = TypeVar("C")

_AGAIN_AFTER = 0.5  # seconds


def through_outages(
    follow: Callable[[C], Iterator[T]],
    cursor: C,
    place_of: Callable[[T], C],
    url: str,
    deadline: float,
) -> Iterator[T]:
    """What is followed, from a cursor on; an outage of the store is told, and does not end it.

    Args:
        follow: an iterator from a cursor on.
        place_of: where to go on after an item.
        url, deadline: of the store, to name it.
    """
    items, in_outage = follow(cursor), False
    while True:
        try:
            with failures.naming_the_server(url, deadline):
                item = next(items)
        except StopIteration:
            return
        except Exception as error:
            if not failures.passes(error):
                raise
            if not in_outage:
                note(f"{error}; going on")
            in_outage = True
            time.sleep(_AGAIN_AFTER)
            items = follow(cursor)
        else:
            in_outage = False
            cursor = place_of(item)
            yield item


def end_with_the_reader() -> None:
    """End this process when the last reader of stdout has gone, as a signal ends others in a pipe.

    What waits for a quiet session would not notice: it writes nothing, so nothing fails.
    """
    poll = select.poll()
    poll.register(sys.stdout.fileno(), 0)

    def watch() -> None:
        while not any(event & select.POLLERR for _, event in poll.poll()):
            pass
        os._exit(failures.READER_GONE)

    threading.Thread(target=watch, daemon=True).start()
