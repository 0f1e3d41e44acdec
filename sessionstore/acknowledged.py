"""What a worker's appends under a lease have been acknowledged, to find what a failover has lost.

A failover takes away what its new primary had not been sent; all before that is there. So a buffer
of a session whose claim is still there has at least the entries that it had at the claim, and those
acknowledged since:

    claimed, with 10 entries                              expected 10
    3 added: "13 in all"                                  expected 13
    2 more are on their way, and the server is lost; the new one has 11
    the 2 are sent again: "13 in all"                     expected 15
    the next write says 15, the server has 13             2 are lost, and it is refused

The greatest total that was told would not do: what comes late fills the gap up. What is carried out
and never acknowledged to this worker (its outcome is unknown, its task was cancelled) is not known
to it, and may hide the loss of as many entries.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, NamedTuple


class Added(NamedTuple):
    """What an append adds."""

    buffer: Literal["output", "error"]
    entries: int


@dataclass(slots=True)
class Acknowledged:
    """One buffer of a session under a lease."""

    #: The entries, ever added, that the server must have unless it has lost some.
    expected: int
    _counted: int = field(init=False)

    def __post_init__(self) -> None:
        self._counted = self.expected

    def add(self, count: int, total: int = 0) -> None:
        """An append of ``count`` entries was acknowledged, as making ``total``.

        The total may be more than what was counted: it tells of entries too whose own outcome is
        unknown.
        """
        self._counted += count
        self.expected = max(self.expected, self._counted, total)

    def start_again(self, lost: int, total: int) -> None:
        """A write was told that so many entries are lost, and that the total was this then.

        What was acknowledged while that write was on its way still counts: if it is lost too, the
        next write is told.
        """
        self._counted -= lost
        self.expected = max(self._counted, total)
