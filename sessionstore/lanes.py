"""Lanes: how a write happens exactly once on a network that loses replies.

A client that gets no reply cannot know whether its command ran; redis-py sends it again without
a word. So each write carries a token, the sequence number of the write within a *lane*. A lane is
used by one write at a time, and the script keeps the lane's last sequence number and answer in
the key of the lane (``lua/include/once.lua``): the same number again gets the stored answer, a
lower one is a late duplicate, and neither changes anything.

Lanes are kept in a free list, so there are as many as there were writes at the same time, and
their keys expire ten to twenty minutes after their last write.
"""

from __future__ import annotations

import itertools
import os
import time
from collections import deque
from dataclasses import dataclass
from uuid import uuid4
from weakref import WeakSet

#: How long after its first attempt a write may be sent again, in seconds: within the ten minutes
#: for which its lane remembers it.
REPEATABLE_FOR = 540.0


@dataclass(slots=True)
class Lane:
    """One lane: its name, and the sequence number and time of its current or last write."""

    name: str
    sequence: int = 0
    taken_at: float = 0.0  # time.monotonic()

    @property
    def is_repeatable(self) -> bool:
        """Whether the server surely remembers this lane's current write, if it has run."""
        return time.monotonic() < self.taken_at + REPEATABLE_FOR


class Lanes:
    """The lanes of one store object. Safe for threads: deque and count are atomic."""

    def __init__(self) -> None:
        self._start_afresh()
        _alive.add(self)

    def _start_afresh(self) -> None:
        self._writer = uuid4().hex[:16]
        self._numbers = itertools.count()
        self._free: deque[Lane] = deque()

    def take(self) -> Lane:
        """A lane that no other write uses, moved on to its next sequence number."""
        try:
            lane = self._free.pop()
        except IndexError:
            lane = Lane(f"{self._writer}-{next(self._numbers)}")
        lane.sequence += 1
        lane.taken_at = time.monotonic()
        return lane

    def give_back(self, lane: Lane) -> None:
        """Let the next write use this lane. Any late copy of its last write is then outdated."""
        if lane.name.startswith(self._writer):
            self._free.append(lane)


_alive: WeakSet[Lanes] = WeakSet()


def _after_fork() -> None:
    """Two processes must never share a lane: the child takes new names."""
    for lanes in list(_alive):
        lanes._start_afresh()  # pyright: ignore[reportPrivateUsage]


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
