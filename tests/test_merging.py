"""Listings over partitions, merged from many small pages, beside a plain sort.

The sessions are written with plain redis-py: random times that often tie, random partitions,
random buffers. What must come out is sorted from what plain redis-py reads.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from hashlib import sha1
from typing import Any
from uuid import UUID

import pytest
from conftest import SERVERS, World, opened
from consistency import ENDED, INDEXED
from faults import seeded
from shelf import ORDERS, Shelf, ids

import sessionstore.pipelining
from sessionstore import listing, scripts
from sessionstore._call import Page
from sessionstore.models import STATUSES

ROUNDS = 10
MOST_ROUNDS = 30  # before a mistake is seen
QUERIES = 5  # a round
MOST_SESSIONS = 60
NOW_US = 1_760_000_000_000_000
WORLDS = [
    f"{style}-{server}-{partitions}"
    for style, server in (("sync", SERVERS[0]), ("async", SERVERS[-1]))
    for partitions in (1, 16, 256)
]


@pytest.fixture(params=WORLDS)
def world(request: pytest.FixtureRequest, running: Callable[[str], Any]) -> Iterator[World]:
    """1, 16 and 256 partitions."""
    with opened(request.param, running) as world:
        yield world


class Bounds:
    """Random bounds of pages, so small that a few sessions are many pages."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._set = monkeypatch.setattr
        self._in_lua: dict[str, tuple[int, int]] = {}
        self._set(sessionstore.pipelining, "load", self._load)

    def draw(self, rng: random.Random) -> None:
        self._set(listing, "PAGE_ROWS", rng.randint(1, 25))
        self._set(listing, "LEAST_ROWS", rng.randint(1, 4))
        self._set(listing, "PAGE_BYTES", rng.choice([200, 1000, 1 << 20]))
        self._set(listing, "LEAST_BYTES", rng.choice([50, 200, 1 << 16]))
        self._in_lua = {
            "MOST_WALKED": (500, rng.choice([1, 3, 10, 500])),
            "A_PAGE": (500, rng.choice([1, 3, 10, 500])),
            "PAGE_BYTES": (1048576, rng.choice([60, 300, 1048576])),
        }

    def _load(self, name: str) -> scripts.Script:
        script = scripts.load(name)
        text = script.text
        for constant, (value, drawn) in self._in_lua.items():
            text = text.replace(f"local {constant} = {value}\n", f"local {constant} = {drawn}\n")
        return replace(script, text=text, sha=sha1(text.encode()).hexdigest())


@pytest.fixture
def bounds(monkeypatch: pytest.MonkeyPatch) -> Bounds:
    return Bounds(monkeypatch)


def iso(microseconds: int) -> str:
    moment = datetime(1970, 1, 1, tzinfo=UTC) + timedelta(microseconds=microseconds)
    return moment.strftime("%Y-%m-%dT%H:%M:%S.%fZ")


def fill(world: World, rng: random.Random) -> None:
    """Random sessions. Creation times tie only between partitions, activity within them too."""
    digits = [f"{rng.randrange(256):02x}" for _ in range(rng.randint(1, 12))]
    spread = rng.choice([2, 20, 1000])
    free = {
        prefix: rng.sample(range(spread + MOST_SESSIONS), MOST_SESSIONS)
        for prefix in set(map(world.prefix_of, (f"agent_x_{pair}" for pair in digits)))
    }

    with world.redis.pipeline(transaction=False) as pipe:
        for _ in range(rng.randrange(MOST_SESSIONS)):
            kind = rng.choice(["claude", "codex", "my-agent_2"])
            uuid = str(UUID(int=rng.getrandbits(128), version=4))
            session_id = f"agent_{kind}_{rng.choice(digits)}{uuid[2:]}"
            prefix, status = world.prefix_of(session_id), rng.choice(STATUSES)
            ordered = "ended" if status in ENDED else "activity"
            created, active = NOW_US + free[prefix].pop(), NOW_US + rng.randrange(spread)
            fields = {
                "id": session_id,
                "type": kind,
                "status": status,
                "service_session_id": "service-1",
                "task_id": rng.choice(["task-1", "task-2"]),
                "project_path": "/src",
                "created_at": iso(created),
                "last_activity": iso(active),
            }
            for name, part in (("output", ":output"), ("error", ":errors")):
                chunks = ["x" * rng.randrange(90) + str(n) for n in range(rng.choice([0, 0, 1, 6]))]
                if chunks:
                    pipe.rpush(world.session(session_id, part), *chunks)
                    size = sum(map(len, chunks)) + 16 * len(chunks)
                    fields |= {f"{name}_total": str(len(chunks)), f"{name}_bytes": str(size)}
            pipe.hset(world.session(session_id), mapping=fields)
            pipe.zadd(f"{prefix}sessions", {session_id: created})
            pipe.zadd(f"{prefix}{ordered}", {session_id: active})
            for field in set(fields) & set(INDEXED):
                pipe.sadd(f"{prefix}sessions:{INDEXED[field]}:{fields[field]}", session_id)
        pipe.execute()


def draw_query(rng: random.Random) -> dict[str, Any]:
    query: dict[str, Any] = {"order": rng.choice(ORDERS), "tail": rng.choice([0, 0, 2, None])}
    query["limit"] = rng.choice([None, rng.randrange(MOST_SESSIONS)])
    if rng.random() < 0.5:
        filters = {
            "type": rng.choice(["claude", "codex"]),
            "status": rng.choice(["active", ("busy", "terminated"), STATUSES]),
            "task_id": "task-1",
            "idle_for": 0,
        }
        query |= {name: filters[name] for name in rng.sample(sorted(filters), rng.randint(1, 2))}
    return query


def differing(world: World, store: Any, bounds: Bounds, rng: random.Random) -> str:
    """What comes out otherwise than it should, in one round; '' if nothing does."""
    fill(world, rng)
    shelf = Shelf(world, store)
    for _ in range(QUERIES):
        bounds.draw(rng)
        query = draw_query(rng)
        filters = {name: query[name] for name in query if name != "tail"}
        found, expected = store.find_sessions(**query), shelf.find(**filters)
        if ids(found) != expected:
            return f"{query}: {ids(found)} and not {expected}"
        for session in found:
            wrong = wrong_buffers(world, session, query["tail"])
            if wrong:
                return f"{query}: {wrong}"
        if query["order"] == "created" and query["limit"] is None:
            del query["order"], query["limit"]
            if ids(store.iter_sessions(**query)) != expected:
                return f"iterating {query}"
    world.remove()
    return ""


def wrong_buffers(world: World, session: Any, tail: int | None) -> str:
    for part, found in ((":output", session.output_buffer), (":errors", session.error_buffer)):
        stored = world.redis.lrange(world.session(session.id, part), -(tail or 0), -1)
        if list(found) != ([] if tail == 0 else stored):
            return f"{session.id}{part}: {found} and not {stored}"
    return ""


def test_whatever_the_pages_a_listing_is_what_a_plain_sort_gives(
    world: World, bounds: Bounds
) -> None:
    rng, store = seeded(), world.store()
    for _ in range(ROUNDS if world.partitions < 256 else ROUNDS // 2):
        assert differing(world, store, bounds, rng) == ""


def given_at_once(listed: listing.Listing, progress: listing.Progress) -> Any:
    """A mistake: what was read is given without waiting for the other partitions."""
    finished = tuple(replace(strand, finished=True) for strand in progress.strands)
    page = MERGE(listed, replace(progress, strands=finished))
    if page.cursor is None and len(page.items) + progress.given == listed.limit:
        return page
    left = tuple(replace(strand, rows=()) for strand in progress.strands)
    ended = all(strand.finished for strand in left)
    following = replace(progress, strands=left, given=progress.given + len(page.items))
    return Page(page.items, None if ended else following)


def one_per_moment(listed: listing.Listing, progress: listing.Progress) -> Any:
    """A mistake: of sessions of one moment only one is given."""
    page = MERGE(listed, progress)
    return Page(list({s.created_at: s for s in page.items}.values()), page.cursor)


MERGE = listing.Listing._merge


@pytest.mark.parametrize("mistake", [given_at_once, one_per_moment])
@pytest.mark.parametrize("world", [f"sync-{SERVERS[0]}-16"], indirect=True)
def test_a_merge_with_one_mistake_is_told(
    world: World, bounds: Bounds, monkeypatch: pytest.MonkeyPatch, mistake: Any
) -> None:
    """The control: the comparison sees what it should see."""
    monkeypatch.setattr(listing.Listing, "_merge", mistake)
    rng, store = seeded(), world.store()
    assert any(differing(world, store, bounds, rng) for _ in range(MOST_ROUNDS))
