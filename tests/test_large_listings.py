"""Listings with whole buffers: small replies however large the buffers, and nothing amiss in them.

A proxy between store and server measures each reply, and can change something before a command
is passed on.
"""

from __future__ import annotations

import random
import socket
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from conftest import SERVERS, World
from faults import FaultProxy
from shelf import ids

from sessionstore import AgentSession, SessionStore, scripts
from sessionstore._server import PrivateServer

MIB = 1024 * 1024
#: A page's buffers are at most 1 MiB; hash fields, lengths and line ends come on top.
MOST_BYTES = MIB + 100_000
SCRIPTS = {scripts.load(name).sha.encode(): name for name in ("read_buffer", "get_session")}


class Meter(FaultProxy):
    """Injects no faults; measures."""

    def __init__(self, server_port: int) -> None:
        self.largest = 0
        self.seen = Counter[str]()
        #: What to do before a script is run: its name, and how often it was run before.
        self.before: dict[tuple[str, int], Callable[[], Any]] = {}
        super().__init__(server_port)

    def _pass_on(
        self, request: bytes, client: socket.socket, server: socket.socket, replies: Any
    ) -> bool:
        for name in (name for sha, name in SCRIPTS.items() if sha in request[:100]):
            self.before.pop((name, self.seen[name]), lambda: None)()
            self.seen[name] += 1
        server.sendall(request)
        reply = replies.next()
        if reply is None:
            return False
        self.largest = max(self.largest, len(reply))
        client.sendall(reply)
        return True


class MeteredWorld(World):
    """A world whose stores go through a meter, with a store that does not."""

    def __init__(self, style: str, server: PrivateServer, partitions: int) -> None:
        super().__init__(style, server.program.name.lower(), server.url, partitions)
        self.direct = SessionStore(
            self.client(), namespace=self.namespace, partitions=partitions, buffer_limit=0
        )
        self.meter = Meter(server.port)
        self.url = self.meter.url

    def create(self, number: int) -> str:
        return self.direct.create_session("claude", f"service-{number}", "/src").id

    def close(self) -> None:
        super().close()
        self.meter.close()


@pytest.fixture(
    params=[
        ("sync", SERVERS[0], 1),
        ("async", SERVERS[-1], 1),
        ("sync", SERVERS[-1], 16),
        ("async", SERVERS[0], 256),
    ],
    ids=lambda param: "-".join(map(str, param)),
)
def world(
    request: pytest.FixtureRequest, running: Callable[[str], PrivateServer]
) -> Iterator[MeteredWorld]:
    style, target, partitions = request.param
    world = MeteredWorld(style, running(target), partitions)
    yield world
    world.close()


def same(found: list[AgentSession], expected: list[AgentSession]) -> bool:
    """Equal but for when they were read; without printing megabytes when they are not."""
    return [s.model_dump(exclude={"read_at"}) for s in found] == [
        s.model_dump(exclude={"read_at"}) for s in expected
    ]


# ---- How large the replies are -----------------------------------------------------------------

SIZES: dict[str, list[int]] = {
    "few": [6 * 1024 * 1024 // 20] * 20,
    "many": [1000] * 6000,
    "largest chunks": [MIB] * 6,
    "mixed": [],  # drawn
    "both buffers": [100_000] * 60,
}


def six_mebibytes(world: MeteredWorld) -> list[AgentSession]:
    """Five sessions of that size, of different entries, small ones between them."""
    rng, created = random.Random(3), []
    for number, (name, sizes) in enumerate(SIZES.items()):
        session_id = world.create(number)
        entries = [rng.choice("abcdef") * size for size in sizes]
        while not sizes and sum(map(len, entries)) < 6 * MIB:
            entries.append(rng.choice("abcdef") * rng.choice([0, 1, 5000, 200_000, 700_000]))
        for first in range(0, len(entries), 50):
            as_error = name == "both buffers" and first % 100
            add = world.direct.add_error if as_error else world.direct.add_output
            add(session_id, *entries[first : first + 50])
        small = world.create(10 + number)
        world.direct.add_output(small, *map(str, range(50)))
        created += [session_id, small]
    return [world.direct.get_session(session_id) for session_id in created]


def test_no_reply_is_over_a_mebibyte_however_large_the_buffers(world: MeteredWorld) -> None:
    sessions, store = six_mebibytes(world), world.store()
    for listed in (
        store.get_all_sessions,
        lambda: store.get_sessions_by_type("claude"),
        lambda: store.find_sessions(tail=None, order="-last_activity", status="active")[::-1],
        lambda: list(store.iter_sessions(tail=None)),
    ):
        found = listed()
        if ids(found) != ids(sessions):  # the order by activity is another
            found.sort(key=lambda session: session.created_at)
        assert same(found, sessions)
    assert world.meter.largest < MOST_BYTES
    assert world.meter.seen["read_buffer"] > 4 * 5 * 6


def test_the_meter_sees_a_large_reply(world: MeteredWorld) -> None:
    """The control: reading one session is one snapshot, as large as the session."""
    session_id = world.create(0)
    world.direct.add_output(session_id, *["x" * MIB] * 3)
    world.store().get_session(session_id)
    assert world.meter.largest > 3 * MIB


def test_no_reply_is_over_a_mebibyte_though_its_entries_are_small(world: MeteredWorld) -> None:
    """An entry weighs more than its text, on the wire and in Lua."""
    created = [world.create(number) for number in range(24)]
    for session_id in created:
        world.direct.add_output(session_id, *[""] * 10_000)
    found = world.store().get_all_sessions()
    assert [len(session.output_buffer) for session in found] == [10_000] * 24
    assert world.meter.largest < MOST_BYTES


def test_a_tail_of_large_entries_that_follow_small_ones_is_in_small_replies(
    world: MeteredWorld,
) -> None:
    """The average entry says little about the newest."""
    created = [world.create(number) for number in range(8)]
    for session_id in created:
        world.direct.add_output(session_id, *["x"] * 9000)
        world.direct.add_output(session_id, "y" * 900_000)
    found = world.store().get_all_sessions(tail=1)
    assert [len(session.output_buffer[0]) for session in found] == [900_000] * 8
    assert world.meter.largest < 2 * MIB


# ---- What changes while a large session is read ------------------------------------------------

ENTRIES = [f"{n:04}" + "x" * 4000 for n in range(1000)]  # four pages


@pytest.fixture
def listed(world: MeteredWorld) -> list[str]:
    """A session before the large one, and one after it."""
    first, large, last = (world.create(number) for number in range(3))
    world.direct.add_output(large, *ENTRIES)
    return [first, large, last]


def read_while(
    world: MeteredWorld, change: Callable[[], Any], before: int, **filters: Any
) -> list[AgentSession]:
    """A listing with whole buffers; the change comes before this page of the large session."""
    return listed_with(world, change, ("read_buffer", before), **filters)


def listed_with(
    world: MeteredWorld, change: Callable[[], Any], before: tuple[str, int], **filters: Any
) -> list[AgentSession]:
    world.meter.before[before] = change
    found: list[AgentSession] = world.store().find_sessions(tail=None, **filters)
    assert not world.meter.before, "the change did not happen"
    return found


@pytest.mark.parametrize("before", [0, 1, 3])
def test_what_is_appended_while_a_session_is_read_is_not_given(
    world: MeteredWorld, listed: list[str], before: int
) -> None:
    _, large, _ = listed
    found = read_while(world, lambda: world.direct.add_output(large, *ENTRIES), before)
    assert ids(found) == listed
    assert found[1].output_total == 1000
    assert found[1].output_buffer == tuple(ENTRIES) or pytest.fail("the entries differ")


def appending_and_trimming(world: MeteredWorld, session_id: str, kept: int, added: int) -> None:
    """Add entries; only the newest stay."""
    bounded = SessionStore(
        world.client(), namespace=world.namespace, partitions=world.partitions, buffer_limit=kept
    )
    bounded.add_output(session_id, *(f"new {n}" for n in range(added)))


@pytest.mark.parametrize(
    ("trimmed", "before"),
    [(100, 0), (100, 1), (600, 0), (600, 1), (600, 2), (999, 1), (999, 3)],
)
def test_what_is_trimmed_while_a_session_is_read_leaves_no_gap(
    world: MeteredWorld, listed: list[str], trimmed: int, before: int
) -> None:
    """The newest entries of the moment when its fields were read, each once, in order."""
    _, large, _ = listed
    found = read_while(world, lambda: appending_and_trimming(world, large, 1000, trimmed), before)
    assert ids(found) == listed
    buffer = found[1].output_buffer
    assert len(buffer) >= 1000 - trimmed
    assert buffer == tuple(ENTRIES[-len(buffer) :]) or pytest.fail("the entries differ")


@pytest.mark.parametrize("before", [0, 2])
@pytest.mark.parametrize("kept", [50, 900])
def test_of_a_buffer_that_was_trimmed_altogether_nothing_is_given(
    world: MeteredWorld, listed: list[str], kept: int, before: int
) -> None:
    """All that is there now was added after the fields were read."""
    _, large, _ = listed
    found = read_while(world, lambda: appending_and_trimming(world, large, kept, 1000), before)
    assert ids(found) == listed
    assert (found[1].output_total, found[1].output_buffer) == (1000, ())


@pytest.mark.parametrize("before", [0, 2])
def test_a_session_that_is_deleted_while_it_is_read_is_left_out(
    world: MeteredWorld, listed: list[str], before: int
) -> None:
    first, large, last = listed
    found = read_while(world, lambda: world.direct.delete_session(large), before)
    assert ids(found) == [first, last]


def test_a_limit_is_filled_past_a_session_that_is_deleted_while_it_is_read(
    world: MeteredWorld, listed: list[str]
) -> None:
    first, large, last = listed
    found = read_while(world, lambda: world.direct.delete_session(large), 1, limit=2)
    assert ids(found) == [first, last]


@pytest.mark.parametrize(
    ("filters", "change"),
    [
        ({"status": "active"}, lambda store, i: store.update_status(i, "busy")),
        ({"status": ("active", "busy")}, lambda store, i: store.update_status(i, "error")),
        ({"type": "claude"}, lambda store, i: store.delete_session(i)),
    ],
    ids=["another status", "none of several", "deleted"],
)
def test_a_large_session_that_stops_matching_before_it_is_read_is_left_out(
    world: MeteredWorld, listed: list[str], filters: dict[str, Any], change: Any
) -> None:
    first, large, last = listed
    found = listed_with(world, lambda: change(world.direct, large), ("get_session", 0), **filters)
    assert ids(found) == [first, last]
