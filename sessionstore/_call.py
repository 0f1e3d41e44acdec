"""A call: one round trip to Redis, as a value.

An operation builds a call and does no I/O; a store carries it out, blocking or awaiting. So each
operation is written once and serves both. A ``Call`` runs one Lua script; a ``Snapshot`` reads a
session whole, in one MULTI; ``Several`` asks every partition at once; ``Together`` is a batch.

A decoder turns Redis's reply into the result, or into the next call where one round trip cannot
be enough: the next page of a listing.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Generic, TypeAlias, TypeVar, cast

from sessionstore.errors import OutcomeUnknownError

T = TypeVar("T")
U = TypeVar("U")
C = TypeVar("C")


@dataclass(slots=True)  # frozen, each of them would take 1 µs longer
class Call(Generic[T]):
    """Run one script.

    ``lane`` is None for a read. For a write it names the key of a lane in the same hash slot as
    ``keys``: the store puts that key before ``keys`` and the write's sequence number before
    ``args`` (see ``lanes.py``). ``unopened``: it is sent without a look at the namespace's layout
    and at the server, by the doctor, who looks at both himself.
    """

    script: str
    keys: Sequence[str]
    args: Sequence[str | bytes | int]
    decode: Callable[[Any], T | Request[T]]
    lane: Callable[[str], str] | None = None
    unopened: bool = False


@dataclass(frozen=True, slots=True)
class Snapshot(Generic[T]):
    """Run reading commands in one MULTI, so that their replies are of one moment.

    ``instead`` is a script with the same replies, for a server that refuses MULTI because its
    memory is full.
    """

    commands: Sequence[tuple[str | int, ...]]
    instead: Call[Any]
    decode: Callable[[Any], T | Request[T]]
    lane: ClassVar[None] = None
    unopened: ClassVar[bool] = False


@dataclass(frozen=True, slots=True)
class Several(Generic[T]):
    """Run a script in several partitions, in one round trip.

    ``decode`` gets their replies in the same order. One lane serves them all: of one name, it is
    another key in each partition.
    """

    calls: Sequence[Call[Any]]
    decode: Callable[[list[Any]], T | Request[T]]

    @property
    def lane(self) -> Callable[[str], str] | None:
        """None if they only read."""
        return self.calls[0].lane

    @property
    def unopened(self) -> bool:
        """Whether all are."""
        return all(call.unopened for call in self.calls)


@dataclass(frozen=True, slots=True)
class Together(Generic[T]):
    """Send requests in one pipeline, each with the lane of its write.

    ``decode`` gets for each its reply, or its error; only a failure of the connection, which is all
    of theirs, is raised. ``attempts`` (``attempts.py``) are over all the times that they are sent.
    """

    requests: Sequence[tuple[Call[Any] | Snapshot[Any] | Several[Any], Any]]
    attempts: Any
    decode: Callable[[list[Any]], T | Request[T]]
    lane: ClassVar[None] = None
    unopened: ClassVar[bool] = False


Request: TypeAlias = Call[T] | Snapshot[T] | Several[T] | Together[T]
#: For isinstance.
REQUESTS = (Call, Snapshot, Several, Together)

#: Several round trips with logic between them, written once for both stores: a generator that
#: yields a request and is sent its result, or yields the error of a write whose outcome is unknown
#: and is sent the result of its repeat, or yields seconds to sleep.
Steps: TypeAlias = Generator[Request[Any] | OutcomeUnknownError | float, Any, T]


def then(request: Request[T], use: Callable[[T], U | Request[U]]) -> Request[U]:
    """The same request, its result handed to ``use``."""

    def decode(reply: Any) -> U | Request[U]:
        result = request.decode(reply)
        if isinstance(result, REQUESTS):
            following: Request[T] = cast("Any", result)
            return then(following, use)
        return use(result)

    if isinstance(request, Snapshot):
        return Snapshot(request.commands, request.instead, decode)
    if isinstance(request, Several):
        return Several(request.calls, decode)
    if isinstance(request, Together):
        return Together(request.requests, request.attempts, decode)
    return Call(request.script, request.keys, request.args, decode, request.lane, request.unopened)


def stepwise(
    first: Request[U], steps: Callable[[U], Generator[Request[Any], Any, T]]
) -> Request[T]:
    """A request, and those that a generator made from its result asks for one after another."""

    def begin(result: U) -> T | Request[T]:
        generator = steps(result)

        def advance(value: Any) -> T | Request[T]:
            try:
                request = generator.send(value)
            except StopIteration as end:
                last: T = end.value
                return last
            return then(request, advance)

        return advance(None)

    return then(first, begin)


@dataclass(frozen=True, slots=True)
class Page(Generic[T, C]):
    """Some items, and the cursor to go on from; None at the end."""

    items: Sequence[T]
    cursor: C | None


@dataclass(frozen=True, slots=True)
class Feed(Generic[T, C]):
    """Items in pages: a first cursor, and the call for the page at a cursor."""

    first: C
    page: Callable[[C], Request[Page[T, C]]]

    def collect(self) -> Request[list[T]]:
        """All items, page after page."""
        items: list[T] = []

        def more(page: Page[T, C]) -> list[T] | Request[list[T]]:
            items.extend(page.items)
            return items if page.cursor is None else then(self.page(page.cursor), more)

        return then(self.page(self.first), more)


@dataclass(frozen=True, slots=True)
class Live(Feed[T, C]):
    """A feed that waits: a page without items is not its end, there may be more later.

    News of it is published on ``channels`` (``lua/include/wake.lua``). ``reached`` tells how far a
    cursor has come, where news are numbers too: of what lies before, nobody needs to be told.
    """

    channels: Sequence[str]
    reached: Callable[[C], int] = lambda _: -1
