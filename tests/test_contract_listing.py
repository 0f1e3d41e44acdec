"""Listings: every filter and combination, both orders, limits and tails, pages of any kind.

What must come out is told by a plain Python filter over sessions that were read one by one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import combinations
from typing import Any

import pytest
from conftest import ON_ONE_SERVER, WORLDS, opened
from consistency import ENDED
from shelf import FILTERS, ORDERS, Shelf, backdate, ids, stock

from sessionstore import AgentSession

MIB = 1024 * 1024

# Sessions that tests only read are created once for all of them.


@pytest.fixture(scope="module", params=WORLDS)
def shelf(request: pytest.FixtureRequest, running: Callable[[str], Any]) -> Iterator[Shelf]:
    """Sixty sessions of every kind, seeded."""
    with opened(request.param, running) as world:
        store = world.store()
        stock(world, store)
        yield Shelf(world, store)


def test_each_filter_alone_in_both_orders(shelf: Shelf) -> None:
    every_status = [{"status": one} for one in ("starting", "active", "busy", *ENDED)]
    for filters in [*({name: FILTERS[name]} for name in FILTERS), *every_status]:
        for order in ORDERS:
            expected = shelf.find(order, **filters)
            assert 0 < len(expected) < 60
            assert ids(shelf.store.find_sessions(order=order, **filters)) == expected, (
                order,
                filters,
            )


def test_every_combination_of_filters(shelf: Shelf) -> None:
    with_results = 0
    for size in range(len(FILTERS) + 1):
        for names in combinations(FILTERS, size):
            filters = {name: FILTERS[name] for name in names}
            order = ORDERS[with_results % 2]
            expected = shelf.find(order, **filters)
            with_results += bool(expected)
            assert ids(shelf.store.find_sessions(order=order, **filters)) == expected, (
                order,
                filters,
            )
    assert with_results > 64  # of 128


def test_a_limit_keeps_the_first_in_order(shelf: Shelf) -> None:
    filters = {"type": "claude", "idle_for": 1050}
    for order in ORDERS:
        for limit in (0, 1, 7, 59, 60, 61, 5000):
            assert ids(shelf.store.find_sessions(order=order, limit=limit)) == shelf.find(
                order, limit
            )
            found = shelf.store.find_sessions(order=order, limit=limit, **filters)
            assert ids(found) == shelf.find(order, limit, **filters)


def test_a_value_that_no_session_has_finds_nothing(shelf: Shelf) -> None:
    for name in set(FILTERS) - {"status", "idle_for"}:
        assert shelf.store.find_sessions(**{name: "nobody"}) == [], name


def test_sessions_are_found_by_the_worker_that_holds_them(world: Any, store: Any) -> None:
    one, other = world.store(worker="one"), world.store(worker="other")
    held = [store.create_session("claude", f"s-{i}", "/src").id for i in range(6)]
    leases = [(one if i % 3 else other).claim(own) for i, own in enumerate(held)]
    owner = leases[1].owner
    expected = [own for i, own in enumerate(held) if i % 3]

    assert ids(store.find_sessions(owner=owner)) == expected
    assert ids(store.iter_sessions(owner=owner)) == expected
    assert ids(store.find_sessions(owner=owner, status="active")) == []
    assert {found.owner for found in store.find_sessions(owner=owner)} == {owner}

    leases[1].release()
    store.update_status(held[2], "terminated", force=True)
    assert ids(store.find_sessions(owner=owner)) == held[4:]


def test_an_ended_session_counts_as_idle_since_it_ended(world: Any, store: Any) -> None:
    session_id = store.create_session("claude", "s", "/src").id
    store.update_status(session_id, "terminated")
    backdate(world, session_id, 1000)
    store.add_output(session_id, "a late line")
    assert ids(store.find_sessions(idle_for=999)) == [session_id]
    assert store.find_sessions(idle_for=2000) == []


def test_idle_for_zero_finds_all(shelf: Shelf) -> None:
    assert ids(shelf.store.find_sessions(idle_for=0)) == shelf.find()


def test_listings_of_find_sessions_load_no_buffers_unless_asked(store: Any) -> None:
    session_id = store.create_session("claude", "s", "/src").id
    store.add_output(session_id, "a", "b")
    (session,) = store.find_sessions()
    assert (session.output_buffer, session.output_total) == ((), 2)
    (session,) = store.find_sessions(tail=None)
    assert session.output_buffer == ("a", "b")


def test_a_sessions_row_is_what_get_session_gives(shelf: Shelf) -> None:
    for row in shelf.store.find_sessions(tail=None):
        alone = shelf.store.get_session(row.id)
        assert row.model_copy(update={"read_at": alone.read_at}) == alone


def test_the_latest_active_comes_first(store: Any) -> None:
    first, second, third = [store.create_session("claude", "s", "/src").id for _ in range(3)]
    store.update_activity(second)
    store.update_status(first, "terminated")
    assert ids(store.find_sessions(order="-last_activity")) == [first, second, third]


# ---- More than 1,000 sessions: the walk in pages, and the smallest index -----------------------

MANY = 1205


@pytest.fixture(scope="module", params=ON_ONE_SERVER)
def many(request: pytest.FixtureRequest, running: Callable[[str], Any]) -> Iterator[Shelf]:
    """Over 1,000 of one type and status, exactly 1,000 of a task, 1,001 of an MCP session."""
    with opened(request.param, running) as world:
        store = world.store()
        for i in range(MANY):
            store.create_session(
                "codex" if i % 30 == 0 else "claude",
                f"service-{i % 400}",
                "/src",
                "task-1" if i >= MANY - 1000 else None,
                "mcp-1" if i < 1001 else None,
                status="terminated" if i % 50 == 0 else "active",
            )
        sizes = {"type:claude": 1164, "status:active": 1180, "task:task-1": 1000, "mcp:mcp-1": 1001}
        for index, size in sizes.items():
            assert len(world.members(f"sessions:{index}")) == size
        # Many of one microsecond: the order among those is by id.
        for prefix in world.prefixes:
            key = f"{prefix}activity"
            first = world.redis.zrange(key, 0, 900 // world.partitions - 1)
            world.redis.zadd(key, dict.fromkeys(first, 1_700_000_000_000_000))
        yield Shelf(world, store)


def test_both_ways_to_walk_agree_with_a_plain_filter(many: Shelf) -> None:
    for order in ORDERS:
        for filters in (
            {},  # all, walked in pages
            {"type": "claude"},  # walked in pages, probing the set
            {"type": "claude", "status": "active"},
            {"mcp_session_id": "mcp-1"},  # one too many to be taken whole
            {"task_id": "task-1"},  # just few enough
            {"task_id": "task-1", "type": "claude"},
            {"type": "codex"},  # the smallest index
            {"type": "codex", "status": ("active", "terminated")},
            {"service_session_id": "service-7", "type": "claude"},
            {"idle_for": 0},
            {"idle_for": 1_000_000},
        ):
            expected = many.find(order, **filters)
            assert ids(many.store.find_sessions(order=order, **filters)) == expected, (
                order,
                filters,
            )


def test_limits_across_pages(many: Shelf) -> None:
    for order in ORDERS:
        for limit in (1, 999, 1000, 1001, MANY - 1, MANY, MANY + 1):
            found = many.store.find_sessions(order=order, limit=limit)
            assert ids(found) == many.find(order, limit), (order, limit)
        found = many.store.find_sessions(order=order, type="claude", status="active", limit=1100)
        assert ids(found) == many.find(order, 1100, type="claude", status="active")


def test_all_and_by_type_across_pages(many: Shelf) -> None:
    assert ids(many.store.get_all_sessions()) == many.find()
    assert ids(many.store.get_sessions_by_type("claude")) == many.find(type="claude")
    assert many.store.get_metrics().total_sessions == MANY


# ---- Buffers larger than a page ----------------------------------------------------------------


@pytest.fixture
def heavy(store: Any) -> list[AgentSession]:
    """Sessions above a page, several to a page, and empty ones, mixed; read one by one."""
    sizes = ["big", "small", "empty", "big", "big", "mid", "mid", "mid", "small", "big"]
    contents: dict[str, Callable[[int], tuple[str, ...]]] = {
        "big": lambda i: tuple(f"{i}-{part}-" + "x" * 700_000 for part in range(3)),
        "mid": lambda i: (f"{i}-" + "y" * 400_000,),
        "small": lambda i: (f"{i}-a", f"{i}-b"),
    }
    created = []
    for i, size in enumerate(sizes):
        session_id = store.create_session("claude", "service-1", "/src", f"task-{i}").id
        created.append(session_id)
        if size != "empty":
            add = store.add_error if i % 4 == 3 else store.add_output
            add(session_id, *contents[size](i))
    return [store.get_session(session_id) for session_id in created]


def _same(found: list[AgentSession], expected: list[AgentSession]) -> bool:
    """Equal but for when they were read; without printing megabytes when they are not."""
    return [s.model_dump(exclude={"read_at"}) for s in found] == [
        s.model_dump(exclude={"read_at"}) for s in expected
    ]


def test_sessions_larger_than_a_page_are_listed_whole(
    store: Any, heavy: list[AgentSession]
) -> None:
    assert sum(map(len, heavy[0].output_buffer)) > MIB
    for found in (
        store.get_all_sessions(),
        store.get_sessions_by_type("claude"),
        store.find_sessions(service_session_id="service-1", tail=None),
        list(reversed(store.find_sessions(order="-last_activity", tail=None))),
    ):
        assert _same(found, heavy)


@pytest.mark.parametrize("limit", [1, 3, 4, 5])
def test_a_limit_counts_sessions_larger_than_a_page(
    store: Any, heavy: list[AgentSession], limit: int
) -> None:
    assert _same(store.find_sessions(tail=None, limit=limit), heavy[:limit])


def test_a_tail_of_large_buffers(store: Any, heavy: list[AgentSession]) -> None:
    for tail in (1, 2):
        found = store.get_all_sessions(tail=tail)
        assert ids(found) == ids(heavy)
        for row, whole in zip(found, heavy, strict=True):
            assert row.output_buffer == whole.output_buffer[-tail:]
            assert row.error_buffer == whole.error_buffer[-tail:]


def test_find_by_service_id_loads_a_session_larger_than_a_page(
    store: Any, heavy: list[AgentSession]
) -> None:
    assert _same([store.find_session_by_service_id("service-1")], heavy[:1])
    store.update_status(heavy[0].id, "terminated")
    store.update_status(heavy[1].id, "terminated")
    store.update_status(heavy[2].id, "terminated")
    found = store.find_session_by_service_id("service-1", live=True)
    assert _same([found], heavy[3:4])
