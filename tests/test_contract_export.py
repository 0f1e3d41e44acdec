"""Export and import of a namespace: exact, whole, never over another's session.

What is compared is every key's content, by plain redis-py.
"""

from __future__ import annotations

import asyncio
import json
import random
import re
import subprocess
import sys
import time
import tracemalloc
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
import redis
from conftest import SERVERS
from consistency import assert_consistent
from faults import FaultyWorld, counted, seeded, shuffled, weather
from programme import Attack, proves
from rawkeys import RawKeys

import sessionstore.exporting
import sessionstore.importing
from sessionstore import (
    ImportConflictError,
    Imported,
    ImportFormatError,
    InvalidArgumentError,
    LeaseLostError,
    SessionBusyError,
    SessionExistsError,
    SessionStore,
)
from sessionstore._server import PrivateServer
from sessionstore.testing import MemoryServer, async_memory_store, memory_store

pytestmark = pytest.mark.operator
LONG = 3600.0  # seconds: no lease is renewed in the background during a test
HOSTILE = ["", "\x00\x1b[2J\u202e\u2028", "\ud7ff\U0001f600", '{"end": 1}\n', "\\ud800", "ä" * 5000]


@pytest.fixture(autouse=True)
def _small_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that few sessions take several pages, and small buffers are read and staged in parts."""
    monkeypatch.setattr(sessionstore.exporting, "PAGE_ROWS", 4)
    monkeypatch.setattr(sessionstore.exporting, "PAGE_BYTES", 20_000)
    monkeypatch.setattr(sessionstore.exporting, "MOST_ENTRIES", 30)
    monkeypatch.setattr(sessionstore.importing, "MOST_AT_ONCE", 3_000)


class Namespace(RawKeys):
    """A fresh namespace beside a world's own, on the same server."""

    def __init__(self, world: Any, partitions: int) -> None:
        self.world = world
        super().__init__(world.redis, f"test-{uuid4().hex[:12]}", partitions)

    def store(self, **settings: Any) -> Any:
        own = {"namespace": self.namespace, "partitions": self.partitions}
        return self.world.store(**own | settings)


@pytest.fixture
def fresh(world: Any) -> Iterator[Callable[..., Namespace]]:
    made: list[Namespace] = []

    def make(partitions: int = 1) -> Namespace:
        made.append(Namespace(world, partitions))
        return made[-1]

    yield make
    for namespace in made:
        namespace.remove()


def stock(store: Any) -> list[str]:
    """Sessions of every kind that nobody holds; their ids."""
    rng = random.Random(7)
    ids = []
    for i, status in enumerate(("starting", "active", "busy", "error", "terminated") * 2):
        session = store.create_session(
            ("claude", "codex")[i % 2],
            ("service-1", f"service {i} ü{{}}")[i % 3 > 0],
            "/src/ä",
            ("task-1", None)[i % 2],
            (None, "mcp-1")[i % 2],
            status=status,
            metadata={"branch": HOSTILE[i % 5], "n": str(i)} if i % 2 else None,
        )
        ids.append(session.id)
        for _ in range(i % 3):
            store.add_output(session.id, *(rng.choice(HOSTILE) for _ in range(20)))
            store.add_error(session.id, *HOSTILE)
    trimmed, ended, large = ids[:3]
    store.add_output(trimmed, *map(str, range(150)))
    store.update_status(ended, "terminated")
    store.add_output(ended, "after its end")
    store.add_output(large, *("y" * 300 for _ in range(90)))
    store.add_error(large, *("e" * 400 for _ in range(60)))
    return ids


READ: dict[str, Callable[[Any, str], Any]] = {
    "hash": lambda pipe, key: pipe.hgetall(key),
    "list": lambda pipe, key: pipe.lrange(key, 0, -1),
    "set": lambda pipe, key: pipe.smembers(key),
    "zset": lambda pipe, key: pipe.zrange(key, 0, -1, withscores=True),
}


def contents(keys: RawKeys) -> dict[str, Any]:
    """What the keys of sessions hold, however many partitions there are."""
    names = [
        (prefix, name)
        for prefix, some in keys.by_partition().items()
        for name in some
        if not name.startswith(("lane:", "meta", "events", "import:"))
    ]
    found: dict[str, Any] = {}
    with keys.redis.pipeline(transaction=False) as pipe:
        for prefix, name in names:
            pipe.type(prefix + name)
        kinds = pipe.execute()
        for (prefix, name), kind in zip(names, kinds, strict=True):
            READ[kind](pipe, prefix + name)
        for (_, name), kind, value in zip(names, kinds, pipe.execute(), strict=True):
            if kind in ("set", "zset"):
                found.setdefault(name, set()).update(value)
            else:
                found[name] = value
    return found


def lines_of(store: Any, **filters: Any) -> list[str]:
    return list(store.export_sessions(**filters))


def line(lines: list[str], number: int) -> dict[str, Any]:
    told: dict[str, Any] = json.loads(lines[number])
    return told


# ---- A round trip is exact ----------------------------------------------------------------------


def test_a_round_trip_gives_the_same_keys(world: Any, fresh: Callable[..., Namespace]) -> None:
    store, there = world.store(buffer_limit=100), fresh(world.partitions)
    ids = stock(store)
    lines = list(store.export_sessions())

    done = there.store().import_sessions(lines)

    assert done == Imported(imported=len(ids))
    assert contents(there) == contents(world)
    assert_consistent(there)
    assert [json.loads(one) for one in there.store().export_sessions()][1:] == [
        json.loads(one) for one in lines
    ][1:]


def test_partitions_are_changed_by_a_round_trip(
    world: Any, fresh: Callable[..., Namespace]
) -> None:
    stock(world.store(buffer_limit=100))
    lines = lines_of(world.store())
    for partitions in (16, 256, 1):
        there = fresh(partitions)
        there.store().import_sessions(lines)
        assert contents(there) == contents(world)
        assert_consistent(there)
        lines = list(there.store().export_sessions())
    found = there.store().find_session_by_service_id("service-1", tail=0)
    assert found == world.store().find_session_by_service_id("service-1", tail=0).model_copy(
        update={"read_at": found.read_at}
    )


def test_cursors_stay_right(world: Any, fresh: Callable[..., Namespace]) -> None:
    store, there = world.store(buffer_limit=10), fresh().store(buffer_limit=10)
    own = store.create_session("claude", "s", "/src").id
    store.add_output(own, *map(str, range(25)))
    cursor = store.read_output(own, 0, 13).cursor
    there.import_sessions(lines_of(store))

    assert there.read_output(own, cursor) == store.read_output(own, cursor)
    assert there.read_output(own).dropped == 15
    assert there.add_output(own, "25") == 26


def test_bytes_that_are_not_utf8_come_through(world: Any, fresh: Callable[..., Namespace]) -> None:
    own = world.store().create_session("claude", "s", "/src").id
    raw, there = world.client(), fresh(world.partitions)
    raw.hset(world.session(own), b"meta:\xff", b"\xfe")
    raw.hset(world.session(own), mapping={"meta:a": b"\x80", "output_total": 1, "output_bytes": 18})
    raw.rpush(world.session(own, ":output"), b"\xff\x00")

    there.store().import_sessions(lines_of(world.store()))

    assert raw.hgetall(there.session(own)) == raw.hgetall(world.session(own))
    assert raw.lrange(there.session(own, ":output"), 0, -1) == [b"\xff\x00"]


def test_sessions_of_one_microsecond_are_all_listed_and_exported(
    world: Any, fresh: Callable[..., Namespace], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of several partitions, or of several namespaces, they may come together in one."""
    monkeypatch.setattr("sessionstore.listing.PAGE_ROWS", 4)
    monkeypatch.setattr("sessionstore.listing.LEAST_ROWS", 4)
    store = world.store()
    ids = {store.create_session("claude", f"s{n}", "/src").id for n in range(9)}
    for own in ids:
        world.redis.zadd(f"{world.prefix_of(own)}sessions", {own: 1_000_000})
    there = fresh()
    there.store().import_sessions(lines_of(store))

    assert {
        line["end"] for line in map(json.loads, there.store().export_sessions()) if "end" in line
    } == ids
    assert sorted(one.id for one in there.store().iter_sessions()) == sorted(ids)
    assert [one.id for one in there.store().find_sessions(limit=5)] == sorted(ids)[:5]


def test_filters_choose_what_is_exported(world: Any) -> None:
    store = world.store()
    stock(store)
    for filters in (
        {"type": "claude"},
        {"status": ("error", "active"), "type": "codex"},
        {"service_session_id": "service-1"},
        {"task_id": "task-1"},
        {"mcp_session_id": "mcp-1"},
        {"owner": "nobody"},
        {"idle_for": 3600},
    ):
        lines = map(json.loads, store.export_sessions(**filters))
        found = {one["end"] for one in lines if "end" in one}
        assert found == {one.id for one in store.find_sessions(**filters)}


# ---- Leases -------------------------------------------------------------------------------------


def test_a_held_session_comes_with_an_expired_lease(
    world: Any, fresh: Callable[..., Namespace]
) -> None:
    store = world.store(worker="old")
    own = store.create_session("claude", "s", "/src").id
    store.claim(own, ttl=LONG)
    there = fresh()
    new = there.store(worker="new")
    new.import_sessions(lines_of(store))

    session = new.get_session(own)
    assert (session.status, session.owner) == ("busy", store.worker)
    assert session.lease_expires_at <= session.read_at
    assert_consistent(there)
    assert [one.action for one in new.reap()] == ["marked"]
    new.claim(own, ttl=LONG)
    fences = [
        int(world.redis.hget(key, "fence")) for key in (world.session(own), there.session(own))
    ]
    assert fences[1] > fences[0] + 1
    assert_consistent(there)


def test_a_worker_of_before_cannot_write_to_the_imported_session(world: Any) -> None:
    """Also where the namespace was emptied and filled again under it."""
    store = world.store()
    own = store.create_session("claude", "s", "/src").id
    store.claim(own, ttl=LONG)
    lines = list(store.export_sessions())
    world.store().delete_session(own, force=True)
    world.store().import_sessions(lines)

    with pytest.raises(LeaseLostError):
        store.add_output(own, "late")
    assert world.store().get_session(own).output_buffer == ()


def test_an_import_says_so_in_an_event(world: Any, fresh: Callable[..., Namespace]) -> None:
    own = world.store().create_session("claude", "s", "/src", status="starting").id
    there = fresh()
    store = there.store(worker="w")
    store.import_sessions(lines_of(world.store()))
    (event,) = there.events()
    assert event == {
        "event": "imported", "session_id": own, "type": "claude", "actor": store.worker,
        "status": "starting",
    }  # fmt: skip


# ---- Existing sessions --------------------------------------------------------------------------


def test_an_import_run_again_changes_nothing(world: Any, fresh: Callable[..., Namespace]) -> None:
    store, there = world.store(buffer_limit=100), fresh()
    ids = stock(store)
    store.claim(ids[6], ttl=LONG)
    lines = list(store.export_sessions())
    there.store().import_sessions(lines)
    before, events = contents(there), len(there.events())

    for existing in ("error", "skip", "replace"):
        done = there.store().import_sessions(lines, existing=existing)
        assert done == Imported(unchanged=len(ids))
    assert contents(there) == before
    assert len(there.events()) == events


#: What differs, in a small session and in one whose buffers are staged.
DIFFERENCES: dict[str, Callable[[Any, str], Any]] = {
    "output": lambda store, own: store.add_output(own, "more"),
    "metadata": lambda store, own: store.update_metadata(own, {"x": "y"}),
    "status": lambda store, own: store.update_status(own, "error"),
    "activity": lambda store, own: store.update_activity(own),
}


@pytest.mark.parametrize(("what", "size"), [*zip(DIFFERENCES, (200, 1, 200, 1), strict=True)])
def test_a_session_that_differs_is_never_overwritten_unasked(
    world: Any, fresh: Callable[..., Namespace], what: str, size: int
) -> None:
    source = world.store()
    own = source.create_session("claude", "s", "/src").id
    source.add_output(own, *("z" * 100 for _ in range(size)))
    other = source.create_session("codex", "s2", "/src").id  # `own` is the last of its type
    lines = list(source.export_sessions())
    there = fresh(world.partitions)
    store = there.store()
    store.import_sessions(lines)
    store.delete_session(other)
    DIFFERENCES[what](store, own)
    before = contents(there)["session:" + own]

    with pytest.raises(SessionExistsError, match=own) as raised:
        store.import_sessions(lines)
    assert raised.value.session_id == own
    assert contents(there)["session:" + own] == before
    assert store.import_sessions(lines, existing="skip", dry_run=True).differing == 1
    skipped = store.import_sessions(lines, existing="skip")
    assert (skipped.differing, skipped.differing_ids) == (1, (own,))
    assert skipped.imported + skipped.unchanged == 1
    assert contents(there)["session:" + own] == before
    assert store.import_sessions(lines, existing="replace").replaced == 1
    assert contents(there) == contents(world)
    assert_consistent(there)


def test_a_held_session_is_not_replaced(world: Any, fresh: Callable[..., Namespace]) -> None:
    own = world.store().create_session("claude", "s", "/src").id
    lines = list(world.store().export_sessions())
    there = fresh()
    there.store().import_sessions(lines)
    there.store().claim(own, ttl=LONG)
    before = contents(there)
    with pytest.raises(SessionBusyError):
        there.store().import_sessions(lines, existing="replace")
    assert contents(there) == before


def test_a_dry_run_changes_nothing(world: Any, fresh: Callable[..., Namespace]) -> None:
    ids, there = stock(world.store()), fresh()
    store = there.store()
    assert store.ping()
    done = store.import_sessions(lines_of(world.store()), dry_run=True)
    assert done == Imported(imported=len(ids))
    assert there.keys() == {"meta"}


def test_what_another_import_has_staged_is_not_taken_for_ones_own(
    world: Any, fresh: Callable[..., Namespace]
) -> None:
    own = world.store().create_session("claude", "s", "/src").id
    world.store().add_output(own, *("z" * 100 for _ in range(200)))
    there = fresh()
    lines = list(world.store().export_sessions())

    staged = f"{there.prefix}import:{own}:output"

    def overtaken() -> Iterator[str]:
        yield from lines[:-2]
        assert there.redis.llen(staged) > 1
        assert there.redis.pttl(staged) > 3_000_000
        there.redis.lset(staged, 0, "the token of another")
        yield from lines[-2:]

    with pytest.raises(ImportConflictError, match=own):
        there.store().import_sessions(overtaken())
    assert there.store().find_session(own) is None
    assert there.redis.lindex(staged, 0) == "the token of another"
    there.store().import_sessions(lines)
    assert contents(there) == contents(world)
    assert_consistent(there)


def test_a_session_whose_staged_parts_are_not_all_there_is_not_imported(
    world: Any, fresh: Callable[..., Namespace]
) -> None:
    own = world.store().create_session("claude", "s", "/src").id
    world.store().add_output(own, *("z" * 100 for _ in range(200)))
    there, lines = fresh(), list(world.store().export_sessions())
    staged = f"{there.prefix}import:{own}:output"

    def losing() -> Iterator[str]:
        for one in lines:
            if '"end"' in one:
                there.redis.rpop(staged)
            yield one

    with pytest.raises(ImportConflictError, match=own):
        there.store().import_sessions(losing())
    assert there.store().find_session(own) is None


@pytest.mark.parametrize("what", ["a session that is there", "another import's part"])
def test_no_part_is_staged_in_vain(world: Any, fresh: Callable[..., Namespace], what: str) -> None:
    own = world.store().create_session("claude", "s", "/src").id
    world.store().add_output(own, *("z" * 100 for _ in range(400)))
    there, lines = fresh(), list(world.store().export_sessions())
    staged = f"{there.prefix}import:{own}:output"
    if what == "a session that is there":
        there.store().import_sessions(lines)
    lengths = []

    def watched() -> Iterator[str]:
        for one in lines:
            yield one
            lengths.append(there.redis.llen(staged))
            if lengths[-1] and what == "another import's part":
                there.redis.lset(staged, 0, "the token of another")

    if what == "a session that is there":
        assert there.store().import_sessions(watched()).unchanged == 1
        assert max(lengths) == 0
    else:
        with pytest.raises(ImportConflictError, match=own):
            there.store().import_sessions(watched())
        assert len({length for length in lengths if length}) == 1


# ---- A live namespace ---------------------------------------------------------------------------


def test_what_is_trimmed_while_it_is_exported_leaves_no_gap(
    world: Any, fresh: Callable[..., Namespace]
) -> None:
    store = world.store(buffer_limit=200)
    own = store.create_session("claude", "s", "/src").id
    store.add_output(own, *(f"{n:0200}" for n in range(200)))
    lines: list[str] = []
    for one in store.export_sessions():
        lines.append(one)
        if len(lines) == 3:
            store.add_output(own, *(f"{n:0200}" for n in range(200, 300)))
    there = fresh()
    there.store().import_sessions(lines)
    page = there.store().read_output(own)
    assert (page.dropped, page.cursor) == (100, 200)
    assert page.chunks == tuple(f"{n:0200}" for n in range(100, 200))
    assert_consistent(there)


def test_a_session_deleted_while_it_is_exported_is_left_out(
    world: Any, fresh: Callable[..., Namespace]
) -> None:
    store = world.store()
    own = store.create_session("claude", "s", "/src").id
    store.add_output(own, *("z" * 200 for _ in range(200)))
    lines = []
    for one in store.export_sessions():
        lines.append(one)
        if len(lines) == 3:
            store.delete_session(own)
    there = fresh()
    assert there.store().import_sessions(lines) == Imported()
    assert not [key for key in sorted(there.keys()) if not key.startswith(("meta", "lane"))]


def test_a_spoilt_session_stops_neither_export_nor_import(
    world: Any, fresh: Callable[..., Namespace], caplog: pytest.LogCaptureFixture
) -> None:
    store, there = world.store(), fresh()
    spoilt, gone, bad, good = (store.create_session("claude", f"s{n}", "/src").id for n in range(4))
    world.redis.unlink(world.session(gone))
    world.redis.hset(world.session(bad), "status", "asleep")
    world.redis.set(world.session(spoilt, ":errors"), "text")
    lines = list(store.export_sessions())

    done = there.store().import_sessions(lines)

    assert line(lines, -1)["total"] == {"sessions": 2, "output": 0, "errors": 0, "unreadable": 2}
    assert done == Imported(imported=1, unreadable=3)
    assert [one.id for one in there.store().get_all_sessions()] == [good]
    for session_id in (spoilt, gone, bad):
        assert session_id in caplog.text


# ---- Files that are not what they should be -----------------------------------------------------


def small_export() -> list[str]:
    with memory_store() as store:
        for n in range(3):
            own = store.create_session("claude", f"s{n}", "/src").id
            store.add_output(own, "one", "two")
            store.add_error(own, "three")
        return list(store.export_sessions())


LINES = small_export()
SESSION, OUTPUT, ERRORS, END, TOTAL = 1, 2, 3, 4, -1


def changed(number: int, **changes: Any) -> list[str]:
    lines = list(LINES)
    lines[number] = json.dumps(line(lines, number) | changes)
    return lines


def with_fields(**changes: Any) -> list[str]:
    return changed(SESSION, fields=line(LINES, SESSION)["fields"] | changes)


#: Files, and what is said of them.
DAMAGED: dict[str, tuple[list[str], str]] = {
    "empty": ([], "line 1: this is no export"),
    "another format": (["# notes\n"], "line 1: this is no export"),
    "another JSON": (['{"a": 1}\n'], "line 1: this is no export"),
    "newer": (changed(0, format=2), "line 1: the export has format 2"),
    "another schema": (changed(0, schema="2"), "line 1: the export has schema '2'"),
    "half a line": ([*LINES[:3], LINES[3][:10]], "line 4: no JSON object; .* cut off"),
    "deep": ([*LINES[:3], "[" * 100_000], "line 4: no JSON object"),
    "a line lost": (LINES[:2] + LINES[3:], "line 4: lines of session .* are missing"),
    "a line doubled": (LINES[:3] + LINES[2:], "line 4: entries of position 0 come twice"),
    "a session lost": (LINES[:1] + LINES[5:], "line 10: lines are missing or doubled"),
    "no end": (LINES[:4] + LINES[5:], "line 5: session .* has no end"),
    "no beginning": (LINES[:1] + LINES[2:], "line 2: this line belongs to no session"),
    "two files": (LINES * 2, "line 15: something follows"),
    "unknown": (changed(OUTPUT, at="0"), "line 3: at is no number"),
    "no entry": (changed(OUTPUT, output=[5, "x"]), "line 3: neither text nor base64: 5"),
    "a surrogate": (changed(OUTPUT, output=["\ud800"]), "line 3: neither text nor base64"),
    "bad base64": (changed(OUTPUT, output=[{"base64": "%"}]), "line 3: neither"),
    "no list": (changed(OUTPUT, output=5), "line 3: output is no list"),
    "another end": (changed(END, end="x"), "line 5: this is the end of another session"),
}  # fmt: skip


@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_file_is_refused_with_its_line(name: str) -> None:
    lines, message = DAMAGED[name]
    with memory_store() as store, pytest.raises(ImportFormatError, match=message) as raised:
        store.import_sessions(lines)
    assert str(raised.value).startswith(f"line {raised.value.line}: ")


@pytest.mark.parametrize("kept", range(1, len(LINES)))
def test_a_file_cut_off_anywhere_leaves_whole_sessions_and_is_told_of(kept: int) -> None:
    with memory_store() as store:
        with pytest.raises(ImportFormatError, match=rf"line {kept}: .* is cut off"):
            store.import_sessions(LINES[:kept])
        whole = store.get_all_sessions()
        assert len(whole) == (kept - 1) // 4
        assert all(one.output_buffer == ("one", "two") for one in whole)
        assert store.import_sessions(LINES).unchanged == len(whole)


@pytest.mark.parametrize(
    "changes",
    [
        {"type": "Claude"}, {"status": "asleep"}, {"service_session_id": "another"}, {"id": "x"},
        {"created_at": "yesterday"}, {"last_activity": "2026-13-01T00:00:00.000000Z"},
        {"output_total": "1"}, {"output_total": "many"}, {"task_id": "a\nb"}, {"fence": "x"},
        {"type": {"base64": "/w=="}}, {"owner": ""}, {"lease_expires_at": "1"},
    ],
    ids=str,
)  # fmt: skip
def test_a_session_that_breaks_the_rules_is_left_out(changes: dict[str, Any]) -> None:
    server = MemoryServer()
    with memory_store(server=server) as store:
        assert store.import_sessions(with_fields(**changes)) == Imported(imported=2, unreadable=1)
        assert len(store.get_all_sessions()) == store.get_metrics().total_sessions == 2


@pytest.mark.parametrize("id", ["agent_claude_x", "a:b", "", None, 5, ["x"]])
def test_an_id_that_is_none_is_left_out(id: Any) -> None:
    fields = line(LINES, SESSION)["fields"] | {"id": id}
    lines = changed(SESSION, session=id, fields=fields)
    lines[END] = json.dumps(line(lines, END) | {"end": id})
    if not isinstance(id, str):
        lines[SESSION] = json.dumps(
            line(lines, SESSION) | {"fields": line(LINES, SESSION)["fields"]}
        )
    with memory_store() as store:
        assert store.import_sessions(lines).unreadable == 1


def test_a_type_that_the_store_does_not_accept_is_left_out() -> None:
    with memory_store(types=["codex"]) as store:
        assert store.import_sessions(LINES) == Imported(unreadable=3)


def test_arguments_are_checked() -> None:
    with memory_store() as store:
        for wrong in ({"existing": "merge"}, {"dry_run": 1}):
            with pytest.raises(InvalidArgumentError, match=next(iter(wrong))):
                store.import_sessions(LINES, **wrong)  # type: ignore[arg-type]
        with pytest.raises(InvalidArgumentError, match="lines must be several"):
            store.import_sessions("agents.jsonl")


def test_blank_lines_bytes_and_asynchronous_lines_are_taken() -> None:
    async def lines() -> AsyncIterator[bytes]:
        for one in LINES:
            yield one.encode() + b"\n"

    async def main() -> Imported:
        async with async_memory_store() as store:
            return await store.import_sessions(line async for line in lines())

    assert asyncio.run(main()) == Imported(imported=3)


def test_every_line_is_ascii_and_one_line() -> None:
    with memory_store() as store:
        stock(store)
        for one in store.export_sessions():
            assert re.fullmatch(r"[\x20-\x7e]+\n", one)


# ---- Crashes, and memory ------------------------------------------------------------------------

IMPORTING = """
import sys
from sessionstore import SessionStore, importing
importing.MOST_AT_ONCE = 3000
with SessionStore.from_url(sys.argv[1], namespace=sys.argv[2]) as store:
    store.ping()
    print("go", flush=True)
    with open(sys.argv[3]) as file:
        store.import_sessions(file)
"""


def test_a_killed_import_leaves_whole_sessions_and_goes_on(
    server: PrivateServer, tmp_path: Path
) -> None:
    client = redis.Redis.from_url(server.url, decode_responses=True)
    source, there = (RawKeys(client, f"test-{uuid4().hex[:12]}") for _ in range(2))
    file = tmp_path / "agents.jsonl"
    rng = random.Random(11)
    with (
        SessionStore.from_url(server.url, namespace=source.namespace) as store,
        SessionStore.from_url(server.url, namespace=there.namespace) as target,
    ):
        for n in range(120):
            own = store.create_session("claude", f"s{n}", "/src").id
            store.add_output(own, *("x" * 200 for _ in range(1 + n % 40)))
        with file.open("w") as stream:
            stream.writelines(store.export_sessions())
        cut, original = set(), contents(source)
        for _ in range(4):
            process = subprocess.Popen(
                [sys.executable, "-c", IMPORTING, server.url, there.namespace, str(file)],
                stdout=subprocess.PIPE,
            )
            assert process.stdout is not None
            with process.stdout:
                assert process.stdout.readline() == b"go\n"
                wanted = client.zcard(f"{there.prefix}sessions") + rng.randint(3, 20)
                while client.zcard(f"{there.prefix}sessions") < wanted and process.poll() is None:
                    pass
                time.sleep(rng.uniform(0, 0.003))
                process.kill()
                process.wait()
            cut.add(target.get_metrics().total_sessions)
            assert sum(key.startswith("import:") for key in sorted(there.keys())) <= 2
            here = {key: v for key, v in contents(there).items() if key.startswith("session:")}
            assert here.items() <= original.items()
        assert 0 < min(cut) < 120
        with file.open() as lines:
            done = target.import_sessions(lines)
        assert done.imported + done.unchanged == 120
    assert contents(there) == contents(source)
    assert_consistent(there)
    source.remove()
    there.remove()
    client.close()


@pytest.mark.parametrize("style", ["sync", "async"])
@proves("bad network", ordinary=16, full=100)
def test_an_import_on_a_bad_network_stores_each_session_once(
    server: PrivateServer, style: str, attack: Attack
) -> None:
    rng, sessions = seeded(), 2 * attack.size
    with memory_store() as source:
        for n in range(sessions):
            own = source.create_session("claude", f"s{n}", "/src").id
            source.add_output(own, *("x" * 200 for _ in range(n % 30 + 1)))
        lines = lines_of(source)
    with closing(FaultyWorld(style, server)) as world:
        store = world.store()
        assert store.ping()
        world.proxy.plan(shuffled(rng, weather(rng, attack.size, waits=0.0), sessions))
        wrong = int(store.import_sessions(lines) != Imported(imported=sessions))
        for harmed in world.proxy.harmed:
            world.proxy.deliver(harmed.request)
        wrong += [event["event"] for event in world.events()] != ["imported"] * sessions
        wrong += lines_of(world.direct)[1:] != lines[1:]
        assert_consistent(world)
        attack.tell(
            injected=world.proxy.injected.total(),
            wrong=wrong,
            imported_sessions=sessions,
            late_duplicates=len(world.proxy.harmed),
            **counted(world.proxy.injected),
        )


def test_memory_does_not_grow_with_the_number_of_sessions(
    running: Callable[[str], PrivateServer], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()
    server = running(SERVERS[0])
    name = f"test-{uuid4().hex[:12]}"

    def lines(sessions: int) -> Iterator[str]:
        """An export of that many sessions, each of 6 MiB."""
        head, total = line(LINES, 0), {"sessions": 0, "output": 0, "errors": 0, "unreadable": 0}
        yield json.dumps(head)
        entries = ["x" * 1000] * 1000
        for n in range(sessions):
            told = line(LINES, SESSION)
            own = told["session"][:-4] + f"{n:04x}"
            told["session"] = told["fields"]["id"] = own
            told["fields"] |= {"output_total": "6000", "error_total": "0"}
            yield json.dumps(told)
            for at in range(0, 6000, 1000):
                yield json.dumps({"output": entries, "at": at})
            yield json.dumps({"end": own, "output": 6000, "errors": 0})
            total["sessions"] += 1
            total["output"] += 6000
        yield json.dumps({"total": total})

    with SessionStore.from_url(server.url, namespace=name) as store:
        tracemalloc.start()
        try:
            assert store.import_sessions(lines(5)).imported == 5
            assert sum(map(len, store.export_sessions())) > 30_000_000
            _, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        with store._client.pipeline(transaction=False) as pipe:
            for key in store._client.scan_iter(f"{{{name}}}:*", count=1000):
                pipe.unlink(key)
            pipe.execute()
    assert peak < 12 * 1024 * 1024, peak
